//! The feed-forward part of a layer.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};

use crate::ops::gelu;

use super::{BoftLinear, Dinov2Config, LinearLayer};

/// `fc2(gelu(fc1(x)))`, or SwiGLU: `weights_out(silu(a) ⊙ b)` with `[a, b] = weights_in(x)`.
///
/// One struct holds both kinds, because a variant of an enum would add its name to the paths of the
/// parameters.
#[derive(Module, Debug)]
pub struct Dinov2Mlp<L: LinearLayer = BoftLinear> {
    /// The first map of the GELU kind: `[hidden_size, mlp_size]`.
    pub fc1: Option<L>,
    /// The second map of the GELU kind: `[mlp_size, hidden_size]`.
    pub fc2: Option<L>,
    /// Gate and value of the SwiGLU kind, side by side: `[hidden_size, 2 · swiglu_size]`.
    pub weights_in: Option<L>,
    /// The second map of the SwiGLU kind: `[swiglu_size, hidden_size]`.
    pub weights_out: Option<L>,
}

impl<L: LinearLayer> Dinov2Mlp<L> {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        let linear = |d_input, d_output| Some(L::init(d_input, d_output, device));
        let width = config.hidden_size;
        if config.use_swiglu_ffn {
            let hidden = config.swiglu_size();
            Self {
                fc1: None,
                fc2: None,
                weights_in: linear(width, 2 * hidden),
                weights_out: linear(hidden, width),
            }
        } else {
            let hidden = config.mlp_size();
            Self {
                fc1: linear(width, hidden),
                fc2: linear(hidden, width),
                weights_in: None,
                weights_out: None,
            }
        }
    }

    /// Maps every token by itself.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        match self {
            Self {
                fc1: Some(fc1),
                fc2: Some(fc2),
                ..
            } => fc2.forward(gelu(fc1.forward(tokens))),
            Self {
                weights_in: Some(weights_in),
                weights_out: Some(weights_out),
                ..
            } => {
                let [gate, value] = halves(weights_in.forward(tokens));
                weights_out.forward(silu(gate) * value)
            }
            _ => unreachable!("an MLP is made with both maps of its kind"),
        }
    }
}

/// Splits the last axis in two.
fn halves(tokens: Tensor<3>) -> [Tensor<3>; 2] {
    let half = tokens.dims()[2] / 2;
    [
        tokens.clone().narrow(2, 0, half),
        tokens.narrow(2, half, half),
    ]
}
