//! A linear layer with blocks that need not be orthogonal, such as those of a Cayley-Neumann polynomial.
//!
//! Without `RᵀR = I` the gradient of the input says too little, so the large product of the backward pass is that of `x·R`. For one
//! factor the gradient of a block is then the product of the numbers that it meets, with no step after it:
//!
//! ```text
//! y = (x·R)·W      dz = dy·Wᵀ      ∂L/∂R = xᵀ·dz      dx = dz·Rᵀ
//! ```

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use super::gradients::{Outputs, bias_gradient, input_gradient, nodes};
use crate::ops::backend::{BoftBackend, products_of_blocks};
use crate::ops::butterfly::{Direction, Side};

/// [`BoftBackend::boft_block_diagonal_linear`] in the graph. Its parents are the input, the weight, the blocks and, if there is
/// one, the bias.
///
/// Like [`Linear`](super::linear::Linear) it takes one large product for a frozen base, `dz`, and forms no gradient of the
/// base's shape. `dz` is then multiplied by the blocks once more.
#[derive(Debug)]
pub(super) struct BlockDiagonalLinear;

/// What the backward pass reads: operands of the layer, and nothing that it computed.
#[derive(Clone, Debug)]
pub(super) struct LinearState<B: Backend> {
    /// The node of `x`.
    input: NodeId,
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    /// The precision of the bias, if there is one.
    bias: Option<DType>,
}

/// Computes the layer and enters it into the graph, with the nodes that [`BlockDiagonalLinear`] lists.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - bias: `[o]`
/// - result: `[tokens, o]`
pub(super) fn block_diagonal_linear<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    blocks: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
    let dtype = bias.as_ref().map(TensorMetadata::dtype);
    let output = B::boft_block_diagonal_linear(
        input.primitive().clone(),
        weight.clone(),
        blocks.clone(),
        bias.into(),
    );
    match BlockDiagonalLinear
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let state = LinearState {
                input: prep.checkpoint(&input),
                weight,
                blocks,
                bias: dtype,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for BlockDiagonalLinear {
    type State = LinearState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [input_node, weight_node, blocks_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
        let LinearState {
            input,
            weight,
            blocks,
            bias,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        bias_gradient::<B>(&gradient, Outputs::Columns, bias_node, bias, gradients);
        let input: Option<FloatTensor<B>> = (blocks_node.is_some() || weight_node.is_some())
            .then(|| checkpointer.retrieve_node_output(input));
        if input_node.is_some() || blocks_node.is_some() {
            // The gradient of x·R.
            let product = input_gradient::<B>(gradient.clone(), weight);
            if let (Some(node), Some(input)) = (blocks_node, input.clone()) {
                let gradient =
                    products_of_blocks::<B>(input, product.clone(), &blocks, Side::Right);
                gradients.register::<B>(node, gradient);
            }
            if let Some(node) = input_node {
                let (side, back) = (Side::Right, Direction::Back);
                let gradient = B::boft_block_diagonal(product, blocks.clone(), side, back);
                gradients.register::<B>(node, gradient);
            }
        }
        if let (Some(node), Some(input)) = (weight_node, input) {
            let gradient = B::float_matmul(B::float_swap_dims(input, 0, 1), gradient);
            let gradient = B::boft_block_diagonal(gradient, blocks, Side::Left, Direction::Back);
            gradients.register::<B>(node, gradient);
        }
    }
}
