//! Multi-head self-attention.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::ops::attention;

use super::{BoftLinear, Dinov2Config, LinearLayer};

/// Self-attention and its output projection.
#[derive(Module, Debug)]
pub struct Dinov2Attention<L: LinearLayer = BoftLinear> {
    /// The heads.
    pub attention: Dinov2SelfAttention<L>,
    /// What follows them.
    pub output: Dinov2SelfOutput<L>,
}

impl<L: LinearLayer> Dinov2Attention<L> {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            attention: Dinov2SelfAttention::new(config, device),
            output: Dinov2SelfOutput {
                dense: linear(config, device),
            },
        }
    }

    /// Lets every token attend to all tokens of its image.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        self.output.dense.forward(self.attention.forward(tokens))
    }
}

/// The heads: `softmax(Q·Kᵀ / √head_size)·V`.
#[derive(Module, Debug)]
pub struct Dinov2SelfAttention<L: LinearLayer = BoftLinear> {
    /// Tokens to queries.
    pub query: L,
    /// Tokens to keys.
    pub key: L,
    /// Tokens to values.
    pub value: L,
    head_size: usize,
}

impl<L: LinearLayer> Dinov2SelfAttention<L> {
    fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            query: linear(config, device),
            key: linear(config, device),
            value: linear(config, device),
            head_size: config.head_size(),
        }
    }

    /// The heads side by side, before the output projection.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        let query = self.heads(self.query.forward(tokens.clone()));
        let key = self.heads(self.key.forward(tokens.clone()));
        let value = self.heads(self.value.forward(tokens));

        attention(query, key, value).swap_dims(1, 2).flatten(2, 3)
    }

    /// Splits `[batch, tokens, hidden_size]` into `[batch, heads, tokens, head_size]`.
    fn heads(&self, tokens: Tensor<3>) -> Tensor<4> {
        let [batch, count, width] = tokens.dims();
        tokens
            .reshape([batch, count, width / self.head_size, self.head_size])
            .swap_dims(1, 2)
    }
}

/// The output projection of the attention.
#[derive(Module, Debug)]
pub struct Dinov2SelfOutput<L: LinearLayer = BoftLinear> {
    /// Heads to tokens.
    pub dense: L,
}

fn linear<L: LinearLayer>(config: &Dinov2Config, device: &Device) -> L {
    L::init(config.hidden_size, config.hidden_size, device)
}
