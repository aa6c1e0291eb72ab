//! The settings of a model, and the published sizes.

use burn::config::Config;
use burn::tensor::Device;

use super::{Dinov2ForImageClassification, Dinov2Model};

/// Settings of a DINOv2 model, under the names of Hugging Face's `config.json`.
///
/// | Name | Default | Purpose |
/// |---|---|---|
/// | `hidden_size` | | width of a token |
/// | `num_attention_heads` | | heads, each `hidden_size / num_attention_heads` wide |
/// | `num_hidden_layers` | | transformer layers |
/// | `patch_size` | 14 | side of a patch, in pixels |
/// | `image_size` | 518 | side of the square images that the position embeddings were trained on, in pixels |
/// | `num_channels` | 3 | channels of an image |
/// | `mlp_ratio` | 4 | width of the MLP, in widths of a token |
/// | `use_swiglu_ffn` | false | SwiGLU in place of the GELU MLP |
/// | `num_register_tokens` | 0 | register tokens between the class token and the patches |
/// | `layerscale_value` | 1.0 | initial layer scale |
/// | `layer_norm_eps` | 1e-6 | added to the variance in every norm |
/// | `num_labels` | 1000 | classes of the head |
#[derive(Config, Debug, PartialEq)]
pub struct Dinov2Config {
    /// Width of a token.
    pub hidden_size: usize,
    /// Heads of the attention; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Side of a patch, in pixels. Default: 14.
    #[config(default = 14)]
    pub patch_size: usize,
    /// Side of the square images that the position embeddings were trained on, in pixels; other
    /// images are served by interpolation. Default: 518.
    #[config(default = 518)]
    pub image_size: usize,
    /// Channels of an image. Default: 3.
    #[config(default = 3)]
    pub num_channels: usize,
    /// Width of the MLP, in widths of a token. Default: 4.
    #[config(default = 4)]
    pub mlp_ratio: usize,
    /// SwiGLU in place of the GELU MLP. Default: false.
    #[config(default = false)]
    pub use_swiglu_ffn: bool,
    /// Register tokens between the class token and the patches. Default: 0.
    #[config(default = 0)]
    pub num_register_tokens: usize,
    /// Initial layer scale. Default: 1.0.
    #[config(default = 1.0)]
    pub layerscale_value: f64,
    /// Added to the variance in every norm. Default: 1e-6.
    #[config(default = 1e-6)]
    pub layer_norm_eps: f64,
    /// Classes of the head. Default: 1000.
    #[config(default = 1000)]
    pub num_labels: usize,
}

impl Dinov2Config {
    /// `facebook/dinov2-small`: 12 layers of width 384, 22 million parameters.
    pub fn small() -> Self {
        Self::new(384, 6, 12)
    }

    /// `facebook/dinov2-base`: 12 layers of width 768, 87 million parameters.
    pub fn base() -> Self {
        Self::new(768, 12, 12)
    }

    /// `facebook/dinov2-large`: 24 layers of width 1024, 304 million parameters.
    pub fn large() -> Self {
        Self::new(1024, 16, 24)
    }

    /// `facebook/dinov2-giant`: 40 layers of width 1536 with SwiGLU, 1.1 billion parameters.
    pub fn giant() -> Self {
        Self::new(1536, 24, 40).with_use_swiglu_ffn(true)
    }

    /// Creates a classifier with random weights on `device`.
    ///
    /// # Panics
    ///
    /// Where `num_attention_heads` does not divide `hidden_size`, or `patch_size` does not divide
    /// `image_size`.
    pub fn init(&self, device: &Device) -> Dinov2ForImageClassification {
        Dinov2ForImageClassification::new(self, device)
    }

    /// Creates a model without a head, with random weights on `device`.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn init_backbone(&self, device: &Device) -> Dinov2Model {
        Dinov2Model::new(self, device)
    }

    /// Patches along one side of a trained image.
    pub(super) fn grid_size(&self) -> usize {
        assert!(
            self.patch_size > 0 && self.image_size.is_multiple_of(self.patch_size),
            "an image of side {} is no whole number of patches of side {}",
            self.image_size,
            self.patch_size,
        );
        self.image_size / self.patch_size
    }

    /// Width of one attention head.
    pub(super) fn head_size(&self) -> usize {
        assert!(
            self.num_attention_heads > 0
                && self.hidden_size.is_multiple_of(self.num_attention_heads),
            "a width of {} does not split into {} heads",
            self.hidden_size,
            self.num_attention_heads,
        );
        self.hidden_size / self.num_attention_heads
    }

    /// Hidden width of the GELU MLP.
    pub(super) fn mlp_size(&self) -> usize {
        self.hidden_size * self.mlp_ratio
    }

    /// Hidden width of the SwiGLU MLP: two thirds of the GELU one, rounded up to a multiple of 8.
    pub(super) fn swiglu_size(&self) -> usize {
        (self.mlp_size() * 2 / 3).next_multiple_of(8)
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Module;

    use super::*;

    #[test]
    fn the_giant_has_the_swiglu_width_of_the_published_checkpoint() {
        assert_eq!(Dinov2Config::giant().swiglu_size(), 4096);
    }

    #[test]
    fn the_named_sizes_have_the_published_numbers_of_parameters() {
        // facebook/dinov2-{small,base,large,giant}, without a head. Parameters are made when first
        // read, so this makes none.
        let device = Device::default();
        for (config, expected) in [
            (Dinov2Config::small(), 22_056_576),
            (Dinov2Config::base(), 86_580_480),
            (Dinov2Config::large(), 304_368_640),
            (Dinov2Config::giant(), 1_136_480_768),
        ] {
            assert_eq!(config.init_backbone(&device).num_params(), expected);
        }
    }

    #[test]
    fn the_defaults_are_those_of_the_published_checkpoints() {
        let config = Dinov2Config::small();
        assert_eq!(
            (config.patch_size, config.image_size, config.num_channels),
            (14, 518, 3)
        );
        assert_eq!(
            (
                config.mlp_ratio,
                config.num_register_tokens,
                config.num_labels
            ),
            (4, 0, 1000)
        );
        assert_eq!(
            (config.layerscale_value, config.layer_norm_eps),
            (1.0, 1e-6)
        );
        assert!(!config.use_swiglu_ffn);
    }

    #[test]
    #[should_panic(expected = "a width of 32 does not split into 5 heads")]
    fn heads_that_do_not_divide_the_width_are_refused() {
        Dinov2Config::new(32, 5, 1).init(&Device::default());
    }

    #[test]
    #[should_panic(expected = "an image of side 30 is no whole number of patches of side 14")]
    fn patches_that_do_not_divide_the_image_are_refused() {
        Dinov2Config::new(32, 4, 1)
            .with_image_size(30)
            .init(&Device::default());
    }
}
