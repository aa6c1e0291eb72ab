//! The stack of layers.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{BoftLinear, Dinov2Config, Dinov2Layer, LinearLayer};

/// The transformer layers, in order.
#[derive(Module, Debug)]
pub struct Dinov2Encoder<L: LinearLayer = BoftLinear> {
    /// The layers.
    pub layer: Vec<Dinov2Layer<L>>,
}

impl<L: LinearLayer> Dinov2Encoder<L> {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            layer: (0..config.num_hidden_layers)
                .map(|_| Dinov2Layer::new(config, device))
                .collect(),
        }
    }

    /// Applies all layers.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        self.layer
            .iter()
            .fold(tokens, |tokens, layer| layer.forward(tokens))
    }

    /// What goes into the first layer, then what comes out of each.
    ///
    /// # Shapes
    ///
    /// - `tokens`, each output: `[batch, tokens, hidden_size]`
    pub fn hidden_states(&self, tokens: Tensor<3>) -> Vec<Tensor<3>> {
        let mut states = vec![tokens.clone()];
        let mut tokens = tokens;
        for layer in &self.layer {
            tokens = layer.forward(tokens);
            states.push(tokens.clone());
        }
        states
    }
}
