//! The precision that numbers are computed in, and casts and reshapes of a backend's own tensors.
//!
//! Skew numbers, blocks, `G` and sums are computed in f32 or wider, whatever the precision of the model: blocks
//! rounded to half precision would be orthogonal to three digits at most, and sums over thousands of rows would lose
//! the small terms.

use burn::backend::{Backend, Dispatch, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, Tensor};

/// The tensor in f32 or wider. Half precision becomes f32, which is exact; f32 and f64 stay as they are.
pub(crate) fn widen<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let dtype = widened(tensor.dtype());
    match tensor.dtype() == dtype {
        true => tensor,
        false => tensor.cast(FloatDType::from(dtype)),
    }
}

/// Whether a tensor of this precision is packed, so that neither a gradient nor an optimizer can change it.
pub(crate) fn is_quantized(dtype: DType) -> bool {
    matches!(dtype, DType::QFloat(_))
}

/// The numbers themselves of a quantized tensor. Any other tensor stays as it is.
pub(crate) fn dequantized<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match is_quantized(tensor.dtype()) {
        true => tensor.dequantize(),
        false => tensor,
    }
}

/// The precision that numbers of this one are computed in: f64 for f64, f32 for all others.
pub(crate) fn widened(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// [`widen`] for a backend's own tensor.
pub(super) fn widen_primitive<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let dtype = widened(tensor.dtype());
    cast::<B>(tensor, dtype)
}

/// Casts a tensor whose precision differs, and returns any other as it is, without an operation in the graph.
pub(super) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    match tensor.dtype() == dtype {
        true => tensor,
        false => B::float_cast(tensor, dtype.into()),
    }
}

/// Reshapes a tensor, also to axes of no length. Burn's `reshape` takes a zero for an axis that keeps its length.
pub(crate) fn reshaped<const D: usize, const E: usize>(
    tensor: Tensor<D>,
    shape: impl Into<Shape>,
) -> Tensor<E> {
    let tensor = Dispatch::float_reshape(tensor.into_dispatch(), shape.into());
    Tensor::from_dispatch(tensor)
}

/// Reshapes to a fixed number of axes, whose lengths have to multiply to the number of elements.
pub(super) fn reshape<B: Backend, const D: usize>(
    tensor: FloatTensor<B>,
    dims: [usize; D],
) -> FloatTensor<B> {
    B::float_reshape(tensor, Shape::from(dims))
}
