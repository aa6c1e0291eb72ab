//! The list of backends: the one place that names them.

// Burn 0.22 deprecates `NdArray` and still ships it; 0.23 does not.
#![allow(deprecated)]
// Without a backend the generated dispatch has no arm that uses its arguments.
#![cfg_attr(
    not(any(feature = "flex", feature = "ndarray", feature = "cubecl")),
    allow(unused_variables)
)]

#[cfg(feature = "cubecl")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::{
    Backend, DispatchDevice, ExtensionType, backend_extension, tensor::FloatTensor,
};
#[cfg(feature = "cubecl")]
use burn::tensor::Shape;

use super::butterfly::{Direction, Side};
use super::linear::Channels;
#[cfg(feature = "cubecl")]
use super::precision::widened;
use super::{butterfly, cayley, linear};

/// A tensor that an operation may be given.
///
/// `#[backend_extension]` finds the backend's own tensor in an argument that is a tensor, or whose type derives
/// [`ExtensionType`]. An `Option<FloatTensor<Self>>` is neither: the macro would hand it on as it is, as a tensor
/// of the dispatcher.
#[derive(Debug, Clone, ExtensionType)]
pub enum OptionalTensor<B: Backend> {
    /// The operation does without.
    Absent,
    /// The operation uses this one.
    Present(FloatTensor<B>),
}

impl<B: Backend> From<Option<FloatTensor<B>>> for OptionalTensor<B> {
    fn from(tensor: Option<FloatTensor<B>>) -> Self {
        match tensor {
            Some(tensor) => Self::Present(tensor),
            None => Self::Absent,
        }
    }
}

impl<B: Backend> OptionalTensor<B> {
    /// The tensor, where there is one.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Present(tensor) => Some(tensor),
            Self::Absent => None,
        }
    }
}

/// The operations of orthogonal fine-tuning, as a backend runs them.
///
/// `blocks` is a `[m, n, b, b]` tensor of orthogonal blocks, factor by factor.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Autodiff,
    Fusion: cfg(feature = "cubecl"),
)]
pub trait BoftBackend: Backend {
    /// Maps packed skew-symmetric matrices to orthogonal blocks, `C = (I − Q)(I + Q)⁻¹`.
    ///
    /// From a `[m, n, b(b−1)/2]` tensor to a `[m, n, b, b]` tensor.
    #[fusion(dtype = skew, shape = {
        let [m, n, _] = skew.dims::<3>();
        Shape::from([m, n, *block_size, *block_size])
    })]
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        cayley::exact::<Self>(skew, block_size)
    }

    /// The gradient of [`boft_cayley`](Self::boft_cayley) with respect to its input, from its output.
    #[fusion(dtype = blocks, shape = {
        let [m, n, b, _] = blocks.dims::<4>();
        Shape::from([m, n, b * (b - 1) / 2])
    })]
    fn boft_cayley_backward(
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        cayley::backward::<Self>(blocks, gradient)
    }

    /// Rotates a matrix: `R·t` or `t·R`, or with the transpose of `R`.
    #[fusion(dtype = matrix, shape = matrix)]
    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        butterfly::apply::<Self>(matrix, blocks, side, direction)
    }

    /// Rotates and scales a weight: `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
    #[fusion(dtype = weight, shape = weight)]
    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        linear::weight::<Self>(weight, blocks, scale, side)
    }

    /// The gradient of the blocks from the two matrices whose product per span is `G`.
    #[fusion(dtype = blocks, shape = blocks)]
    fn boft_block_gradient(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        butterfly::block_gradient::<Self>(lhs, rhs, blocks, side)
    }

    /// Sums `gradient ⊙ output`, and `gradient`, per output channel: per column on the left, per row on
    /// the right.
    ///
    /// From `[rows, columns]` tensors to two vectors in f32 or wider.
    #[fusion(meta = |gradient, output, channels| {
        let [rows, columns] = output.shape.dims::<2>();
        let sums = TensorSpec {
            dtype: widened(gradient.dtype),
            shape: Shape::from([match channels {
                Channels::Columns => columns,
                Channels::Rows => rows,
            }]),
        };
        (sums.clone(), sums)
    })]
    fn boft_channel_sums(
        gradient: FloatTensor<Self>,
        output: FloatTensor<Self>,
        channels: Channels,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        linear::channel_sums::<Self>(gradient, output, channels)
    }

    /// Multiplies rows by a rotated and scaled weight and adds a bias, `x·(R·W·diag(s)) + bias`.
    #[fusion(default)]
    fn boft_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::boft_weight(weight, blocks, scale, Side::Left);
        Self::boft_product(input, weight, bias)
    }

    /// Multiplies two matrices and adds a bias, `x·W + bias`.
    #[fusion(default)]
    fn boft_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::product::<Self>(input, weight, bias.into_option())
    }
}

#[cfg(feature = "ndarray")]
impl BoftBackend for burn::backend::NdArray {}

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
