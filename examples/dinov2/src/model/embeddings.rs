//! From pixels to tokens.

use burn::module::{Initializer, Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{Bool, DType, Device, FloatDType, Tensor};

use super::Dinov2Config;
use super::resample::Cubic;

/// Class token, register tokens and patches, with their positions.
#[derive(Module, Debug)]
pub struct Dinov2Embeddings {
    /// The class token: `[1, 1, hidden_size]`.
    pub cls_token: Param<Tensor<3>>,
    /// The token that replaces a masked patch: `[1, hidden_size]`.
    pub mask_token: Param<Tensor<2>>,
    /// The register tokens, which have no position: `[1, num_register_tokens, hidden_size]`.
    pub register_tokens: Option<Param<Tensor<3>>>,
    /// The position of the class token, then of the patches row by row:
    /// `[1, 1 + patches, hidden_size]`.
    pub position_embeddings: Param<Tensor<3>>,
    /// The patches as tokens.
    pub patch_embeddings: Dinov2PatchEmbeddings,
    grid_size: usize,
}

impl Dinov2Embeddings {
    pub(super) fn new(config: &Dinov2Config, device: &Device) -> Self {
        let grid_size = config.grid_size();
        let width = config.hidden_size;
        let random = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let registers = config.num_register_tokens;
        Self {
            cls_token: random.init([1, 1, width], device),
            mask_token: Initializer::Zeros.init([1, width], device),
            register_tokens: (registers > 0).then(|| random.init([1, registers, width], device)),
            position_embeddings: random.init([1, 1 + grid_size * grid_size, width], device),
            patch_embeddings: Dinov2PatchEmbeddings::new(config, device),
            grid_size,
        }
    }

    /// Turns images into tokens, with `masked` patches replaced by the mask token.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`
    /// - `masked`: `[batch, patches]`
    /// - output: `[batch, 1 + num_register_tokens + patches, hidden_size]`
    pub fn forward(&self, pixels: Tensor<4>, masked: Option<Tensor<2, Bool>>) -> Tensor<3> {
        let (mut patches, grid) = self.patch_embeddings.forward(pixels);
        let shape = patches.dims();
        let [batch, _, width] = shape;

        if let Some(masked) = masked {
            let mask = masked.unsqueeze_dim::<3>(2).expand(shape);
            let token = self.mask_token.val().unsqueeze::<3>().expand(shape);
            patches = patches.mask_where(mask, token);
        }

        let (cls_position, patch_positions) = self.positions(grid);
        let cls = (self.cls_token.val() + cls_position).expand([batch, 1, width]);
        let mut tokens = vec![cls];
        if let Some(registers) = &self.register_tokens {
            let registers = registers.val();
            let count = registers.dims()[1];
            tokens.push(registers.expand([batch, count, width]));
        }
        tokens.push(patches + patch_positions);
        Tensor::cat(tokens, 1)
    }

    /// Tokens that stand before the patches.
    pub(super) fn prefix_len(&self) -> usize {
        1 + self
            .register_tokens
            .as_ref()
            .map_or(0, |registers| registers.dims()[1])
    }

    /// The positions of the class token and of a `grid` of patches, resampled if the grid is not the one of training.
    fn positions(&self, grid: [usize; 2]) -> (Tensor<3>, Tensor<3>) {
        let positions = self.position_embeddings.val();
        let [_, count, width] = positions.dims();
        let cls = positions.clone().narrow(1, 0, 1);
        let patches = positions.narrow(1, 1, count - 1);
        if grid == [self.grid_size; 2] {
            return (cls, patches);
        }

        // Hugging Face antialiases only in models with registers.
        let cubic = match self.register_tokens {
            Some(_) => Cubic::Antialiased,
            None => Cubic::Interpolating,
        };
        // In half precision, resampling would change the positions noticeably.
        let dtype: FloatDType = patches.dtype().into();
        let patches = patches
            .cast(DType::F32)
            .reshape([self.grid_size, self.grid_size, width]);
        let patches = cubic.resample(patches, grid).cast(dtype);
        (cls, patches.reshape([1, grid[0] * grid[1], width]))
    }
}

/// One linear map of every patch, as a convolution whose stride is its kernel.
#[derive(Module, Debug)]
pub struct Dinov2PatchEmbeddings {
    /// The map: `[hidden_size, num_channels, patch_size, patch_size]`.
    pub projection: Conv2d,
}

impl Dinov2PatchEmbeddings {
    fn new(config: &Dinov2Config, device: &Device) -> Self {
        let patch = [config.patch_size; 2];
        Self {
            projection: Conv2dConfig::new([config.num_channels, config.hidden_size], patch)
                .with_stride(patch)
                .init(device),
        }
    }

    /// Turns images into patch tokens, row by row. Pixels at the edge that do not fill a patch are left out.
    ///
    /// # Shapes
    ///
    /// - `pixels`: `[batch, num_channels, height, width]`
    /// - output: `[batch, rows · columns, hidden_size]`, and `[rows, columns]`
    ///
    /// # Panics
    ///
    /// Where the images have other channels than the model, or are smaller than a patch.
    pub fn forward(&self, pixels: Tensor<4>) -> (Tensor<3>, [usize; 2]) {
        let [_, channels, height, width] = pixels.dims();
        let [_, expected, patch_height, patch_width] = self.projection.weight.dims();
        assert!(
            channels == expected && height >= patch_height && width >= patch_width,
            "expected [batch, {expected}, ≥ {patch_height}, ≥ {patch_width}] pixels, found {:?}",
            pixels.dims(),
        );

        let patches = self.projection.forward(pixels);
        let [_, _, rows, columns] = patches.dims();
        (patches.flatten::<3>(2, 3).swap_dims(1, 2), [rows, columns])
    }
}
