//! Products with blocks that need not be orthogonal, such as those of a Cayley-Neumann polynomial.
//!
//! Without `RᵀR = I` the result says too little about the operand, so both operations keep the operand itself. For one factor
//! the gradient of a block is the product of the numbers that it meets, with no step after it:
//!
//! ```text
//! y = R·t          ∂L/∂R = dy·tᵀ      dt = Rᵀ·dy
//! y = (x·R)·W      ∂L/∂R = xᵀ·dz      dx = dz·Rᵀ      with dz = dy·Wᵀ
//! ```
//!
//! of which only the blocks on the diagonal are formed: the Gram backward with the identity in place of its blocks.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use super::gradients::nodes;
use crate::ops::backend::{BoftBackend, OptionalTensor};
use crate::ops::butterfly::{Direction, Side};
use crate::ops::cayley;
use crate::ops::linear::{Channels, channel_sum};
use crate::ops::precision::{cast, reshape};

/// [`BoftBackend::boft_block_diagonal`] in the graph. Its parents are the matrix and the blocks.
#[derive(Debug)]
pub(super) struct BlockDiagonal;

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(super) struct BlockDiagonalState<B: Backend> {
    /// The node of the matrix.
    matrix: NodeId,
    blocks: FloatTensor<B>,
    side: Side,
    direction: Direction,
}

/// Computes the product and enters it into the graph.
pub(super) fn block_diagonal<B: BoftBackend, C: CheckpointStrategy>(
    matrix: FloatTensor<Autodiff<B, C>>,
    blocks: FloatTensor<Autodiff<B, C>>,
    side: Side,
    direction: Direction,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [matrix.node(), blocks.node()];
    let blocks = blocks.into_primitive();
    let operand = matrix.primitive().clone();
    let output = B::boft_block_diagonal(operand, blocks.clone(), side, direction);
    match BlockDiagonal.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = BlockDiagonalState {
                matrix: prep.checkpoint(&matrix),
                blocks,
                side,
                direction,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend> Backward<B, 2> for BlockDiagonal {
    type State = BlockDiagonalState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [matrix_node, blocks_node] = ops.parents;
        let BlockDiagonalState {
            matrix,
            blocks,
            side,
            direction,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        if let Some(node) = blocks_node {
            let matrix = checkpointer.retrieve_node_output(matrix);
            // R·t and t·Rᵀ put the gradient first, t·R and Rᵀ·t the operand.
            let (lhs, rhs) = match direction == side.weight_direction() {
                true => (gradient.clone(), matrix),
                false => (matrix, gradient.clone()),
            };
            let gradient = products_of_blocks::<B>(lhs, rhs, &blocks, side);
            gradients.register::<B>(node.id, gradient);
        }
        if let Some(node) = matrix_node {
            let gradient = B::boft_block_diagonal(gradient, blocks, side, direction.reversed());
            gradients.register::<B>(node.id, gradient);
        }
    }
}

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
        if let Some(node) = bias_node {
            let sum = channel_sum::<B>(gradient.clone(), Channels::Columns);
            let dtype = bias.unwrap_or(sum.dtype());
            gradients.register::<B>(node, cast::<B>(sum, dtype));
        }
        let input: Option<FloatTensor<B>> = (blocks_node.is_some() || weight_node.is_some())
            .then(|| checkpointer.retrieve_node_output(input));
        if input_node.is_some() || blocks_node.is_some() {
            // The gradient of x·R.
            let product = B::boft_product(
                gradient.clone(),
                B::float_swap_dims(weight, 0, 1),
                OptionalTensor::Absent,
            );
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

/// The diagonal blocks of `lhs·rhsᵀ` on the left, or of `lhsᵀ·rhs` on the right.
///
/// # Shapes
///
/// - lhs, rhs: two `[d, columns]` for [`Side::Left`], or two `[rows, d]` for [`Side::Right`]
/// - blocks: `[1, n, b, b]`; so is the result
fn products_of_blocks<B: BoftBackend>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    blocks: &FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let identity = reshape::<B, 4>(cayley::identity::<B>(blocks, b), [1, 1, b, b]);
    let identities = B::float_expand(identity, [m, n, b, b].into());
    B::boft_block_gradient(lhs, rhs, identities, side)
}
