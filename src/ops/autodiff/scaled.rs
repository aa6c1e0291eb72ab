//! Scaling the output of a product and adding a bias.

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use super::gradients::{ChannelState, Outputs, nodes};
use crate::ops::backend::BoftBackend;
use crate::ops::linear::{Channels, along, away_from_zero};
use crate::ops::precision::cast;

/// [`BoftBackend::boft_scaled`] in the graph. Its parents are the output of a product, the scale and, if there is one, the
/// bias.
///
/// ```text
/// dz = dy ⊙ s      ∂L/∂s = Σ_tokens dy ⊙ (y − bias) / s      ∂L/∂bias = Σ_tokens dy
/// ```
#[derive(Debug)]
pub(super) struct Scaled;

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(super) struct ScaledState<B: Backend> {
    channels: ChannelState<B>,
    /// The precision of the product.
    dtype: DType,
}

/// Scales and adds, and enters the operation into the graph with the nodes that [`Scaled`] lists.
pub(super) fn scaled<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    output: FloatTensor<Autodiff<B, C>>,
    scale: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let keeps_output = scale.is_tracked();
    let (output, scale) = (output.into_primitive(), scale.into_primitive());
    let dtype = output.dtype();
    let output = B::boft_scaled(output, scale.clone(), bias.clone().into());
    match Scaled.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let channels = ChannelState {
                scale,
                bias,
                output: keeps_output.then(|| output.clone()),
                outputs: Outputs::Columns,
            };
            prep.finish(ScaledState { channels, dtype }, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Scaled {
    type State = ScaledState<B>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let [output_node, scale_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
        let ScaledState {
            mut channels,
            dtype,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        channels.gradients(&gradient, [scale_node, bias_node], gradients);
        if let Some(node) = output_node {
            let scale = away_from_zero::<B>(channels.scale);
            let scale = along::<B>(cast::<B>(scale, dtype), Channels::Columns);
            gradients.register::<B>(node, B::float_mul(gradient, scale));
        }
    }
}
