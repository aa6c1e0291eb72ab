//! A linear layer whose weight is not rotated.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use super::gradients::nodes;
use crate::ops::backend::{BoftBackend, OptionalTensor};
use crate::ops::linear::{Channels, channel_sum};
use crate::ops::precision::cast;

/// [`BoftBackend::boft_product`] in the graph. Its parents are the input, the weight and, if there is one, the bias.
///
/// ```text
/// dx = dy·Wᵀ      ∂L/∂W = xᵀ·dy      ∂L/∂bias = Σ_tokens dy
/// ```
#[derive(Debug)]
pub(super) struct Product;

/// What the backward pass reads: each operand if the other one has a gradient.
#[derive(Clone, Debug)]
pub(super) struct ProductState {
    input: Option<NodeId>,
    weight: Option<NodeId>,
    /// The precision of the bias, if there is one.
    bias: Option<DType>,
}

/// Multiplies, and enters the operation into the graph with the nodes that [`Product`] lists.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - bias: `[o]`
/// - result: `[tokens, o]`
pub(super) fn product<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let dtype = bias.as_ref().map(TensorMetadata::dtype);
    let [x, w] = [&input, &weight].map(|tensor| tensor.primitive().clone());
    let output = B::boft_product(x, w, bias.into());
    match Product.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = ProductState {
                input: weight.is_tracked().then(|| prep.checkpoint(&input)),
                weight: input.is_tracked().then(|| prep.checkpoint(&weight)),
                bias: dtype,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Product {
    type State = ProductState;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [input_node, weight_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
        let ProductState {
            input,
            weight,
            bias,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        if let Some(node) = bias_node {
            let sum = channel_sum::<B>(gradient.clone(), Channels::Columns);
            let dtype = bias.unwrap_or(sum.dtype());
            gradients.register::<B>(node, cast::<B>(sum, dtype));
        }
        let mut transposed = |operand: NodeId| {
            let operand: FloatTensor<B> = checkpointer.retrieve_node_output(operand);
            B::float_swap_dims(operand, 0, 1)
        };
        let none = OptionalTensor::Absent;
        if let (Some(node), Some(input)) = (weight_node, input) {
            let product = B::boft_product(transposed(input), gradient.clone(), none.clone());
            gradients.register::<B>(node, product);
        }
        if let (Some(node), Some(weight)) = (input_node, weight) {
            let product = B::boft_product(gradient, transposed(weight), none);
            gradients.register::<B>(node, product);
        }
    }
}
