//! A linear layer whose weight is not rotated.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use super::gradients::{Outputs, bias_gradient, input_gradient, nodes};
use crate::ops::backend::{BoftBackend, OptionalTensor};

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
        bias_gradient::<B>(&gradient, Outputs::Columns, bias_node, bias, gradients);
        if let (Some(node), Some(input)) = (weight_node, input) {
            let input = B::float_swap_dims(checkpointer.retrieve_node_output(input), 0, 1);
            let product = B::boft_product(input, gradient.clone(), OptionalTensor::Absent);
            gradients.register::<B>(node, product);
        }
        if let (Some(node), Some(weight)) = (input_node, weight) {
            let weight = checkpointer.retrieve_node_output(weight);
            gradients.register::<B>(node, input_gradient::<B>(gradient, weight));
        }
    }
}
