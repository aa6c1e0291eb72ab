//! Rotated and scaled weights, their products and sums: the portable versions.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

use super::butterfly::{self, Side};
use super::precision::{cast, widen_primitive};

/// `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
pub(super) fn weight<B: Backend>(
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let dtype = weight.dtype();
    let weight = cast::<B>(weight, blocks.dtype());
    let rotated = butterfly::apply::<B>(weight, blocks, side, side == Side::Right);
    let scale = along_output::<B>(cast::<B>(scale, rotated.dtype()), side);
    cast::<B>(B::float_mul(rotated, away_from_zero::<B>(scale)), dtype)
}

/// The scale as a row for a `[d, o]` weight, as a column for an `[o, d]` weight.
pub(super) fn along_output<B: Backend>(scale: FloatTensor<B>, side: Side) -> FloatTensor<B> {
    let outputs = scale.shape().num_elements();
    let shape = match side {
        Side::Left => Shape::from([1, outputs]),
        Side::Right => Shape::from([outputs, 1]),
    };
    B::float_reshape(scale, shape)
}

/// The scale with zeros replaced by 1e-20, since its gradient divides by it.
pub(super) fn away_from_zero<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let magnitude = B::float_mul_scalar(B::float_abs(scale.clone()), 1e30.into());
    let is_zero = B::float_sub_scalar(B::float_clamp_max(magnitude, 1.0.into()), 1.0.into());
    B::float_add(scale, B::float_mul_scalar(is_zero, (-1e-20).into()))
}

/// `x·W + bias`.
pub(super) fn product<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let output = B::float_matmul(input, weight);
    match bias {
        Some(bias) => {
            let bias = cast::<B>(bias, output.dtype());
            B::float_add(output, along_output::<B>(bias, Side::Left))
        }
        None => output,
    }
}

/// `Σ gradient ⊙ output` and `Σ gradient` over the axis that is not the output's, in f32 or wider.
pub(super) fn channel_sums<B: Backend>(
    gradient: FloatTensor<B>,
    output: FloatTensor<B>,
    side: Side,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let summed_axis = match side {
        Side::Left => 0,
        Side::Right => 1,
    };
    let sum = |tensor| {
        let sum = B::float_sum_dim(tensor, summed_axis);
        let outputs = sum.shape().num_elements();
        B::float_reshape(sum, Shape::from([outputs]))
    };
    let gradient = widen_primitive::<B>(gradient);
    let products = B::float_mul(gradient.clone(), widen_primitive::<B>(output));
    (sum(products), sum(gradient))
}
