//! The model, and the classifier on top of it.

use burn::module::Module;
use burn::nn::LayerNorm;
use burn::tensor::{Bool, DType, Device, Tensor};

use crate::ops::layer_norm;

use super::layer::norm;
use super::{BoftLinear, Dinov2Config, Dinov2Embeddings, Dinov2Encoder, LinearLayer};

/// DINOv2 without a head.
#[derive(Module, Debug)]
pub struct Dinov2Model<L: LinearLayer = BoftLinear> {
    /// From pixels to tokens.
    pub embeddings: Dinov2Embeddings,
    /// The transformer layers.
    pub encoder: Dinov2Encoder<L>,
    /// The norm after the last layer.
    pub layernorm: LayerNorm,
    epsilon: f64,
}

impl<L: LinearLayer> Dinov2Model<L> {
    /// Makes the model with linear layers of one's choice; [`init_backbone`](Dinov2Config::init_backbone) makes it with
    /// [`BoftLinear`].
    ///
    /// # Panics
    ///
    /// As [`init`](Dinov2Config::init).
    pub fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            embeddings: Dinov2Embeddings::new(config, device),
            encoder: Dinov2Encoder::new(config, device),
            layernorm: norm(config, device),
            epsilon: config.layer_norm_eps,
        }
    }

    /// The precision that the model computes in.
    pub fn dtype(&self) -> DType {
        self.embeddings
            .patch_embeddings
            .projection
            .weight
            .base()
            .dtype()
    }

    /// The normalized tokens after the last layer: class token, registers, patches row by row.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - output: `[batch, 1 + num_register_tokens + patches, hidden_size]`
    ///
    /// # Panics
    ///
    /// Where the images have other channels than the model, or are smaller than a patch.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let tokens = self.embeddings.forward(pixels, None);
        self.normalized(self.encoder.forward(tokens))
    }

    /// The norm after the last layer.
    ///
    /// # Shapes
    ///
    /// - `tokens`, output: `[batch, tokens, hidden_size]`
    pub fn normalized(&self, tokens: Tensor<3>) -> Tensor<3> {
        layer_norm(&self.layernorm, self.epsilon, tokens)
    }

    /// The tokens after the embeddings and after each layer, before the final norm, with `masked`
    /// patches hidden from the model.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - `masked`: `[batch, patches]`
    /// - each output: `[batch, 1 + num_register_tokens + patches, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn hidden_states(
        &self,
        pixels: Tensor<4>,
        masked: Option<Tensor<2, Bool>>,
    ) -> Vec<Tensor<3>> {
        let tokens = self.embeddings.forward(pixels, masked);
        self.encoder.hidden_states(tokens)
    }

    /// The features of the patches, row by row, and how many rows and columns of patches there are.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - output: `[batch, patches, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn patch_features(&self, pixels: Tensor<4>) -> (Tensor<3>, [usize; 2]) {
        let [_, _, height, width] = pixels.dims();
        let [_, _, patch_height, patch_width] =
            self.embeddings.patch_embeddings.projection.weight.dims();
        let tokens = self.forward(pixels);
        let [_, count, _] = tokens.dims();
        let prefix = self.embeddings.prefix_len();
        let patches = tokens.narrow(1, prefix, count - prefix);
        (patches, [height / patch_height, width / patch_width])
    }

    /// One vector per image: the class token beside the mean of the patches. Registers are left
    /// out.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - output: `[batch, 2 · hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn features(&self, pixels: Tensor<4>) -> Tensor<2> {
        let tokens = self.forward(pixels);
        let [_, count, _] = tokens.dims();
        let prefix = self.embeddings.prefix_len();
        let cls = tokens.clone().narrow(1, 0, 1);
        let patches = tokens.narrow(1, prefix, count - prefix).mean_dim(1);
        Tensor::cat(vec![cls, patches], 2).squeeze_dim(1)
    }
}

/// DINOv2 with a linear head: Hugging Face's `Dinov2ForImageClassification`, and with registers its
/// `Dinov2WithRegistersForImageClassification`.
#[derive(Module, Debug)]
pub struct Dinov2ForImageClassification {
    /// The model under the head.
    pub dinov2: Dinov2Model,
    /// The head: `[2 · hidden_size, num_labels]`.
    pub classifier: BoftLinear,
}

impl Dinov2ForImageClassification {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        Self {
            dinov2: Dinov2Model::new(config, device),
            classifier: LinearLayer::init(2 * config.hidden_size, config.num_labels, device),
        }
    }

    /// The logits of every class.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - output: `[batch, num_labels]`
    ///
    /// # Panics
    ///
    /// As [`Dinov2Model::forward`].
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.classifier.forward(self.features(pixels))
    }

    /// The device of the model.
    pub fn device(&self) -> Device {
        self.classifier.weight.base().device()
    }

    /// What the head reads: [`Dinov2Model::features`], in the precision of the head.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`, normalized
    /// - output: `[batch, 2 · hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`Dinov2Model::forward`].
    pub fn features(&self, pixels: Tensor<4>) -> Tensor<2> {
        let pixels = pixels.cast(self.dinov2.dtype());
        let features = self.dinov2.features(pixels);
        features.cast(self.classifier.weight.base().dtype())
    }
}
