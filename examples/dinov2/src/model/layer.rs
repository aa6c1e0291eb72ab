//! One transformer layer.

use burn::module::{Initializer, Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::tensor::{Device, Tensor};

use crate::ops::{add_scaled, layer_norm};

use super::{BoftLinear, Dinov2Attention, Dinov2Config, Dinov2Mlp, LinearLayer};

/// Attention and MLP. The input of each is normalized, its output is scaled, and the sum of both is passed on.
#[derive(Module, Debug)]
pub struct Dinov2Layer<L: LinearLayer = BoftLinear> {
    /// The norm before the attention.
    pub norm1: LayerNorm,
    /// The attention.
    pub attention: Dinov2Attention<L>,
    /// The scale after the attention.
    pub layer_scale1: Dinov2LayerScale,
    /// The norm before the MLP.
    pub norm2: LayerNorm,
    /// The MLP.
    pub mlp: Dinov2Mlp<L>,
    /// The scale after the MLP.
    pub layer_scale2: Dinov2LayerScale,
    epsilon: f64,
}

impl<L: LinearLayer> Dinov2Layer<L> {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            norm1: norm(config, device),
            attention: Dinov2Attention::new(config, device),
            layer_scale1: Dinov2LayerScale::new(config, device),
            norm2: norm(config, device),
            mlp: Dinov2Mlp::new(config, device),
            layer_scale2: Dinov2LayerScale::new(config, device),
            epsilon: config.layer_norm_eps,
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        let normalized = layer_norm(&self.norm1, self.epsilon, tokens.clone());
        let update = self.attention.forward(normalized);
        let tokens = self.layer_scale1.add(tokens, update);

        let normalized = layer_norm(&self.norm2, self.epsilon, tokens.clone());
        let update = self.mlp.forward(normalized);
        self.layer_scale2.add(tokens, update)
    }
}

/// A learned factor for each channel.
#[derive(Module, Debug)]
pub struct Dinov2LayerScale {
    /// The factors: `[hidden_size]`.
    pub lambda1: Param<Tensor<1>>,
}

impl Dinov2LayerScale {
    fn new(config: &Dinov2Config, device: &Device) -> Self {
        let value = config.layerscale_value;
        Self {
            lambda1: Initializer::Constant { value }.init([config.hidden_size], device),
        }
    }

    /// Adds the scaled update to every token.
    ///
    /// # Shapes
    ///
    /// - `tokens`, `update`, output: `[batch, tokens, hidden_size]`
    pub fn add(&self, tokens: Tensor<3>, update: Tensor<3>) -> Tensor<3> {
        add_scaled(tokens, update, self.lambda1.val())
    }
}

/// A norm as the model uses it everywhere.
pub(super) fn norm(config: &Dinov2Config, device: &Device) -> LayerNorm {
    LayerNormConfig::new(config.hidden_size)
        .with_epsilon(config.layer_norm_eps)
        .init(device)
}
