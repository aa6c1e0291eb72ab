//! Rotated and scaled weights, products with them, and sums per output channel: the portable versions.

use burn::backend::{
    Backend, TensorMetadata, TensorPrimitive,
    tensor::{FloatTensor, QuantizedTensor},
};

use super::butterfly::{self, Side};
use super::precision::{cast, reshape, widen_primitive};

/// Where a matrix has its output channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channels {
    /// A column each: the outputs of a layer, `[tokens, o]`, or a `[d, o]` weight.
    Columns,
    /// A row each: an `[o, d]` weight.
    Rows,
}

impl Channels {
    /// The output channels of a weight that is rotated from this side: on the left it is `[d, o]`, on the right
    /// `[o, d]`.
    pub(super) fn of_weight(side: Side) -> Self {
        match side {
            Side::Left => Self::Columns,
            Side::Right => Self::Rows,
        }
    }
}

/// `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
///
/// # Shapes
///
/// - weight: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
/// - blocks: `[m, n, b, b]`
/// - scale: `[o]`
///
/// # Numerics
///
/// Weight and scale are cast to the precision of the blocks, so that rotation and scale are rounded to the weight's
/// precision together, once. The scale is moved [`away_from_zero`].
pub(super) fn weight<B: Backend>(
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let dtype = weight.dtype();
    let weight = cast::<B>(weight, blocks.dtype());
    let rotated = butterfly::apply::<B>(weight, blocks, side, side.weight_direction());
    let scale = along::<B>(cast::<B>(scale, rotated.dtype()), Channels::of_weight(side));
    cast::<B>(B::float_mul(rotated, away_from_zero::<B>(scale)), dtype)
}

/// A vector with a number per output channel, as a row or column that meets the channels of a matrix.
///
/// # Shapes
///
/// - vector: `[o]`
/// - result: `[1, o]` for [`Channels::Columns`], `[o, 1]` for [`Channels::Rows`]
pub(super) fn along<B: Backend>(vector: FloatTensor<B>, channels: Channels) -> FloatTensor<B> {
    let outputs = vector.shape().num_elements();
    let shape = match channels {
        Channels::Columns => [1, outputs],
        Channels::Rows => [outputs, 1],
    };
    reshape::<B, 2>(vector, shape)
}

/// A scale counts as zero if it is below one when multiplied by this. A product beyond the range of f32 is infinite,
/// and not below one either.
pub(super) const MAGNIFICATION: f64 = 1e30;

/// What is added to a scale that counts as zero. Gradients of up to 1e18 stay in the range of f32 when they are
/// divided by it.
pub(super) const SHIFT: f64 = 1e-20;

/// The scale, with 1e-20 added where its magnitude is below 1e-30, since its gradient divides by it.
///
/// The kernels follow the same rule. It changes no other scale, and lets the gradient of every scale through.
///
/// # Numerics
///
/// In the scale's precision, f32 or f64.
pub(super) fn away_from_zero<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let minus_one_if_zero = B::float_sub_scalar(one_unless_zero::<B>(scale.clone()), 1.0.into());
    B::float_add(
        scale,
        B::float_mul_scalar(minus_one_if_zero, (-SHIFT).into()),
    )
}

/// 0 where a number is below 1e-30 in magnitude, else 1. It has no gradient.
pub(super) fn one_unless_zero<B: Backend>(numbers: FloatTensor<B>) -> FloatTensor<B> {
    let magnified = B::float_mul_scalar(B::float_abs(numbers), MAGNIFICATION.into());
    B::float_floor(B::float_clamp_max(magnified, 1.0.into()))
}

/// `x·W + bias`, with the backend's matrix product.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - bias: `[o]`
/// - result: `[tokens, o]`
///
/// # Numerics
///
/// In the precision of the input, to which the bias is cast; the product is rounded before the bias is added.
pub(super) fn product<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    with_bias::<B>(B::float_matmul(input, weight), bias)
}

/// `z ⊙ s + bias` per output channel.
///
/// # Shapes
///
/// - output: `[tokens, o]`; so is the result
/// - scale, bias: `[o]`
///
/// # Numerics
///
/// In the precision of the output, to which scale and bias are cast. The scale is moved [`away_from_zero`] first.
pub(super) fn scaled<B: Backend>(
    output: FloatTensor<B>,
    scale: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let dtype = output.dtype();
    let scale = cast::<B>(away_from_zero::<B>(scale), dtype);
    with_bias::<B>(
        B::float_mul(output, along::<B>(scale, Channels::Columns)),
        bias,
    )
}

/// A bias added to the rows of a matrix, to whose precision it is cast.
fn with_bias<B: Backend>(output: FloatTensor<B>, bias: Option<FloatTensor<B>>) -> FloatTensor<B> {
    match bias {
        Some(bias) => {
            let bias = cast::<B>(bias, output.dtype());
            B::float_add(output, along::<B>(bias, Channels::Columns))
        }
        None => output,
    }
}

/// `x·W` with a quantized weight, by the backend's product for such weights.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - result: `[tokens, o]`, in the precision of the input
pub(super) fn packed_product<B: Backend>(
    input: FloatTensor<B>,
    weight: QuantizedTensor<B>,
) -> FloatTensor<B> {
    let dtype = input.dtype();
    match B::q_matmul(
        TensorPrimitive::Float(input),
        TensorPrimitive::QFloat(weight),
    ) {
        TensorPrimitive::Float(output) => output,
        // A device may be set to quantize every result.
        TensorPrimitive::QFloat(output) => B::dequantize(output, dtype.into()),
    }
}

/// The gradient of the input of [`packed_product`], `dx = dy·Wᵀ`.
///
/// # Shapes
///
/// - gradient: `[tokens, o]`
/// - weight: `[d, o]`
/// - result: `[tokens, d]`
pub(super) fn packed_product_backward<B: Backend>(
    gradient: FloatTensor<B>,
    weight: QuantizedTensor<B>,
) -> FloatTensor<B> {
    let weight = B::dequantize(weight, gradient.dtype().into());
    B::float_matmul(gradient, B::float_swap_dims(weight, 0, 1))
}

/// `Σ gradient ⊙ output` and `Σ gradient` per output channel, in f32 or wider.
///
/// They are what the gradients of scale and bias need: `∂L/∂s = (Σ dy ⊙ y − bias · Σ dy) / s` and `∂L/∂bias = Σ dy`.
///
/// # Shapes
///
/// - gradient, output: `[rows, columns]`
/// - results: `[columns]` for [`Channels::Columns`], `[rows]` for [`Channels::Rows`]
pub(super) fn channel_sums<B: Backend>(
    gradient: FloatTensor<B>,
    output: FloatTensor<B>,
    channels: Channels,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let sum = |tensor| channel_sum::<B>(tensor, channels);
    let gradient = widen_primitive::<B>(gradient);
    let products = B::float_mul(gradient.clone(), widen_primitive::<B>(output));
    (sum(products), sum(gradient))
}

/// The sum of a matrix per output channel, in its own precision.
pub(super) fn channel_sum<B: Backend>(
    matrix: FloatTensor<B>,
    channels: Channels,
) -> FloatTensor<B> {
    let summed_axis = match channels {
        Channels::Columns => 0,
        Channels::Rows => 1,
    };
    let sum = B::float_sum_dim(matrix, summed_axis);
    let outputs = sum.shape().num_elements();
    reshape::<B, 1>(sum, [outputs])
}
