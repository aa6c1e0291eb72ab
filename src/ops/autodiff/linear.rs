//! A rotated linear layer.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Backend, tensor::FloatTensor};

use super::gradients::{ChannelState, Outputs, nodes, weight_gradient};
use crate::ops::backend::BoftBackend;
use crate::ops::butterfly::Side;

/// [`BoftBackend::boft_linear`] in the graph. Its parents are the input, the weight, the blocks, the scale and, if
/// there is one, the bias.
///
/// With `W' = R·W·diag(s)`, the layer of a frozen base takes one large product, `dx`, as a frozen layer does:
///
/// ```text
/// dx = dy·W'ᵀ      G = xᵀ·dx      ∂L/∂s = Σ_tokens dy ⊙ (y − bias) / s      ∂L/∂bias = Σ_tokens dy
/// ```
///
/// Only a trained base needs `dW' = xᵀ·dy`, a matrix of its own shape.
#[derive(Debug)]
pub(super) struct Linear;

/// What the backward pass reads: the layer's own operands, and its output.
#[derive(Clone, Debug)]
pub(super) struct LinearState<B: Backend> {
    /// The node of `x`, for `G` and for the gradient of a trained base.
    input: NodeId,
    /// The base, which is rotated again.
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    /// The blocks as products take them.
    composed: FloatTensor<B>,
    channels: ChannelState<B>,
}

/// Computes the layer and enters it into the graph, with the nodes that [`Linear`] lists.
///
/// The number of parents is a constant of Burn's graph, hence `N`: four without a bias, five with one.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - scale, bias: `[o]`
/// - result: `[tokens, o]`
///
/// # Numerics
///
/// `W'` is rounded to the precision of the weight, forward and where it is computed again, so that both passes see
/// the same numbers.
pub(super) fn rotated_linear<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    blocks: FloatTensor<Autodiff<B, C>>,
    scale: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let keeps_output = scale.is_tracked();
    let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
    let scale = scale.into_primitive();
    let composed = B::boft_composed(blocks.clone());
    let output = B::boft_linear(
        input.primitive().clone(),
        weight.clone(),
        composed.clone(),
        scale.clone(),
        bias.clone().into(),
    );
    match Linear.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = LinearState {
                input: prep.checkpoint(&input),
                weight,
                blocks,
                composed,
                channels: ChannelState {
                    scale,
                    bias,
                    output: keeps_output.then(|| output.clone()),
                    outputs: Outputs::Columns,
                },
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Linear {
    type State = LinearState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [input_node, weight_node, blocks_node, scale_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
        let mut state = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);

        let channels = &mut state.channels;
        channels.gradients(&gradient, [scale_node, bias_node], gradients);
        let input: Option<FloatTensor<B>> = (blocks_node.is_some() || weight_node.is_some())
            .then(|| checkpointer.retrieve_node_output(state.input));
        if input_node.is_some() || blocks_node.is_some() {
            let input_gradient = state.input_gradient(gradient.clone());
            if let (Some(node), Some(input)) = (blocks_node, input.clone()) {
                let blocks = state.blocks.clone();
                let gradient =
                    B::boft_block_gradient(input, input_gradient.clone(), blocks, Side::Right);
                gradients.register::<B>(node, gradient);
            }
            if let Some(node) = input_node {
                gradients.register::<B>(node, input_gradient);
            }
        }
        if let (Some(node), Some(input)) = (weight_node, input) {
            let gradient = B::float_matmul(B::float_swap_dims(input, 0, 1), gradient);
            let gradient =
                weight_gradient::<B>(gradient, state.blocks, state.channels.scale, Side::Left);
            gradients.register::<B>(node, gradient);
        }
    }
}

impl<B: BoftBackend> LinearState<B> {
    /// `dx = dy·(R·W·diag(s))ᵀ`.
    ///
    /// # Shapes
    ///
    /// - gradient: `[tokens, o]`
    /// - result: `[tokens, d]`
    fn input_gradient(&self, gradient: FloatTensor<B>) -> FloatTensor<B> {
        let (blocks, scale) = (self.composed.clone(), self.channels.scale.clone());
        B::boft_linear_input_gradient(gradient, self.weight.clone(), blocks, scale)
    }
}
