//! One transformer layer.

use burn::module::{Initializer, Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::tensor::{Device, Tensor};

use super::{Dinov2Attention, Dinov2Config, Dinov2Mlp};

/// Attention and MLP. The input of each is normalized, its output is scaled, and the sum of both is passed on.
#[derive(Module, Debug)]
pub struct Dinov2Layer {
    /// The norm before the attention.
    pub norm1: LayerNorm,
    /// The attention.
    pub attention: Dinov2Attention,
    /// The scale after the attention.
    pub layer_scale1: Dinov2LayerScale,
    /// The norm before the MLP.
    pub norm2: LayerNorm,
    /// The MLP.
    pub mlp: Dinov2Mlp,
    /// The scale after the MLP.
    pub layer_scale2: Dinov2LayerScale,
}

impl Dinov2Layer {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            norm1: layer_norm(config, device),
            attention: Dinov2Attention::new(config, device),
            layer_scale1: Dinov2LayerScale::new(config, device),
            norm2: layer_norm(config, device),
            mlp: Dinov2Mlp::new(config, device),
            layer_scale2: Dinov2LayerScale::new(config, device),
        }
    }

    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        let update = self.attention.forward(self.norm1.forward(tokens.clone()));
        let tokens = tokens + self.layer_scale1.forward(update);

        let update = self.mlp.forward(self.norm2.forward(tokens.clone()));
        tokens + self.layer_scale2.forward(update)
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

    /// Scales every token.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        tokens * self.lambda1.val().unsqueeze()
    }
}

/// A norm as the model uses it everywhere.
pub(super) fn layer_norm(config: &Dinov2Config, device: &Device) -> LayerNorm {
    LayerNormConfig::new(config.hidden_size)
        .with_epsilon(config.layer_norm_eps)
        .init(device)
}
