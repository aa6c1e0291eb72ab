//! The list of backends: the one place that names them.

// Burn 0.22 deprecates `NdArray` and still ships it; 0.23 does not.
#![allow(deprecated)]
// Without a backend the generated dispatch has no arm that uses its arguments.
#![cfg_attr(
    not(any(feature = "flex", feature = "ndarray", feature = "cubecl")),
    allow(unused_variables)
)]

use burn::backend::{Backend, DispatchDevice, backend_extension, tensor::FloatTensor};

use super::{Side, butterfly, cayley, linear};

/// The operations of orthogonal fine-tuning, as a backend runs them.
///
/// `blocks` is a `[m, n, b, b]` tensor of orthogonal blocks, factor by factor.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Autodiff,
)]
pub trait BoftBackend: Backend {
    /// Maps packed skew-symmetric matrices to orthogonal blocks, `C = (I − Q)(I + Q)⁻¹`.
    ///
    /// From a `[m, n, b(b−1)/2]` tensor to a `[m, n, b, b]` tensor.
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        cayley::exact::<Self>(skew, block_size)
    }

    /// The gradient of [`boft_cayley`](Self::boft_cayley) with respect to its input, from its output.
    fn boft_cayley_backward(
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        cayley::backward::<Self>(blocks, gradient)
    }

    /// Rotates a matrix: `R·t` or `t·R`, or with the transpose of `R`.
    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        transpose: bool,
    ) -> FloatTensor<Self> {
        butterfly::apply::<Self>(matrix, blocks, side, transpose)
    }

    /// Rotates and scales a weight: `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        linear::weight::<Self>(weight, blocks, scale, side)
    }

    /// The gradient of the blocks from the two matrices whose product per span is `G`.
    fn boft_block_gradient(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        butterfly::block_gradient::<Self>(lhs, rhs, blocks, side)
    }

    /// Sums `gradient ⊙ output` per output channel: per column on the left, per row on the right.
    ///
    /// From `[rows, columns]` tensors to a vector in f32 or wider.
    fn boft_channel_products(
        gradient: FloatTensor<Self>,
        output: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        linear::channel_products::<Self>(gradient, output, side)
    }

    /// Multiplies rows by a rotated and scaled weight: `x·(R·W·diag(s))`.
    fn boft_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::boft_weight(weight, blocks, scale, Side::Left);
        Self::float_matmul(input, weight)
    }
}

#[cfg(feature = "ndarray")]
impl BoftBackend for burn::backend::NdArray {}

#[cfg(feature = "cubecl")]
impl BoftBackend for burn::backend::Cube {}

/// Whether tensors on this device reach [`BoftBackend`]; the others take the portable versions.
pub(super) fn is_listed(device: &DispatchDevice) -> bool {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[cfg(feature = "cubecl")]
        DispatchDevice::Cube(_) => true,
        DispatchDevice::Autodiff(inner) => is_listed(inner),
        #[allow(unreachable_patterns)] // Which devices exist depends on the whole build's features.
        _ => false,
    }
}
