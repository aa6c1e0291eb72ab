//! Convolutions with a rotated weight: the portable versions.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::ops::ConvOptions;

use super::precision::{cast, reshape};

/// The weight of a convolution as an `[o, c·kh·kw]` matrix.
pub(super) fn matrix<B: Backend>(weight: FloatTensor<B>) -> FloatTensor<B> {
    let [o, c, kh, kw] = weight.shape().dims::<4>();
    reshape::<B, 2>(weight, [o, c * kh * kw])
}

/// A convolution with a weight that is rotated and scaled, by the backend's convolution.
///
/// # Shapes
///
/// - input: `[n, c·groups, h, w]`
/// - weight: `[o, c, kh, kw]`
/// - bias: `[o]`, which is cast to the precision of the input
/// - result: `[n, o, h', w']`
pub(super) fn convolve<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    options: ConvOptions<2>,
) -> FloatTensor<B> {
    let dtype = input.dtype();
    let bias = bias.map(|bias| cast::<B>(bias, dtype));
    B::conv2d(input, weight, bias, options)
}

/// The gradients of the input and of the weight, which is a product as large as the convolution itself.
///
/// The Gram backward goes on from there with `G = dW'ᵀ·W'`.
///
/// # Shapes
///
/// - input: `[n, c·groups, h, w]`; so is the first result
/// - weight: `[o, c, kh, kw]`, rotated and scaled
/// - gradient: `[n, o, h', w']`
/// - second result: `[o, c·kh·kw]`
pub(super) fn gradients<B: Backend>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    gradient: FloatTensor<B>,
    options: ConvOptions<2>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let input_gradient = B::conv2d_x_backward(
        input.clone(),
        weight.clone(),
        gradient.clone(),
        options.clone(),
    );
    let weight_gradient = B::conv2d_weight_backward(input, weight, gradient, options);
    (input_gradient, matrix::<B>(weight_gradient))
}
