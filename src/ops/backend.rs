//! The operations that a backend may replace by kernels, and the only list of such backends.

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
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice, DispatchTensor,
    DispatchTensorKind, ExtensionType, TensorMetadata, backend_extension,
    tensor::{FloatTensor, QuantizedTensor},
};
#[cfg(feature = "cubecl")]
use burn::tensor::Shape;
use burn::tensor::ops::ConvOptions;

use super::butterfly::{Direction, Side};
use super::linear::Channels;
use super::precision::reshape;
#[cfg(feature = "cubecl")]
use super::precision::widened;
use super::{butterfly, cayley, conv, linear, requests};

/// The portable version of [`BoftBackend::boft_conv2d_backward`]: a gradient of the weight, and the Gram backward of that.
pub(super) fn conv2d_backward<B: BoftBackend>(
    [input, weight, blocks, gradient]: [FloatTensor<B>; 4],
    options: ConvOptions<2>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (input_gradient, weight_gradient) =
        conv::gradients::<B>(input, weight.clone(), gradient, options);
    let weight = conv::matrix::<B>(weight);
    let blocks_gradient = B::boft_block_gradient(weight_gradient, weight, blocks, Side::Right);
    (input_gradient, blocks_gradient)
}

/// The portable version of [`BoftBackend::boft_block_diagonal_conv2d_backward`], `∂L/∂R = dW'ᵀ·W` in the blocks.
pub(super) fn block_diagonal_conv2d_backward<B: BoftBackend>(
    [input, weight, blocks, gradient]: [FloatTensor<B>; 4],
    options: ConvOptions<2>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let changed = changed_kernel::<B>(weight.clone(), blocks.clone());
    let (input_gradient, weight_gradient) = conv::gradients::<B>(input, changed, gradient, options);
    let weight = conv::matrix::<B>(weight);
    let blocks_gradient = products_of_blocks::<B>(weight_gradient, weight, &blocks, Side::Right);
    (input_gradient, blocks_gradient)
}

/// The weight of a convolution times blocks that need not be orthogonal, `W·Rᵀ` for the weight as an `[o, c·kh·kw]` matrix.
///
/// # Shapes
///
/// - weight: `[o, c, kh, kw]`; so is the result
/// - blocks: `[1, n, b, b]`
pub(super) fn changed_kernel<B: BoftBackend>(
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
) -> FloatTensor<B> {
    let shape = weight.shape().dims::<4>();
    let (side, matrix) = (Side::Right, conv::matrix::<B>(weight));
    let changed = B::boft_block_diagonal(matrix, blocks, side, side.weight_direction());
    reshape::<B, 4>(changed, shape)
}

/// The diagonal blocks of `lhs·rhsᵀ` on the left, or of `lhsᵀ·rhs` on the right: the Gram backward of one factor, with the
/// identity in place of its blocks.
///
/// # Shapes
///
/// - lhs, rhs: two `[d, columns]` for [`Side::Left`], or two `[rows, d]` for [`Side::Right`]
/// - blocks: `[1, n, b, b]`; so is the result
pub(super) fn products_of_blocks<B: BoftBackend>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    blocks: &FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let identity = reshape::<B, 4>(cayley::identity::<B>(blocks, b), [1, 1, b, b]);
    let identities = B::float_expand(identity, [m, n, b, b].into());
    B::boft_block_gradient(lhs, rhs, identities, side)
}

/// A tensor that an operation may do without.
///
/// It stands in for `Option<FloatTensor<Self>>`, which `#[backend_extension]` does not support as an argument: the
/// macro converts an argument to the backend that runs only if it is a tensor itself or derives
/// [`ExtensionType`].
#[derive(Debug, Clone, ExtensionType)]
pub enum OptionalTensor<B: Backend> {
    /// There is no tensor.
    Absent,
    /// There is this one.
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
    /// The tensor, if there is one.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Present(tensor) => Some(tensor),
            Self::Absent => None,
        }
    }
}

/// Any number of tensors.
///
/// It stands in for `Vec<FloatTensor<Self>>`, which `#[backend_extension]` does not support as an argument. Its
/// conversion is what [`ExtensionType`] derives for one tensor, for each of them.
#[derive(Debug, Clone)]
pub struct Tensors<B: Backend>(pub Vec<FloatTensor<B>>);

impl<B: Backend> From<Vec<FloatTensor<B>>> for Tensors<B> {
    fn from(tensors: Vec<FloatTensor<B>>) -> Self {
        Self(tensors)
    }
}

impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let tensors = self.0.into_iter().map(|tensor| DispatchTensor {
            kind: map_kind(BackendTensor::Float(tensor)),
            autodiff,
        });
        Tensors(tensors.collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let tensors = target.0.into_iter();
        Self(tensors.map(|tensor| unwrap_kind(tensor).float()).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let contexts = target.0.iter().map(|tensor| tensor.autodiff);
        contexts.fold(DispatchAutodiffContext::Disabled, |all, one| all.merge(one))
    }
}

/// The operations of orthogonal fine-tuning, as a backend runs them.
///
/// [`Blocks`](super::Blocks) checks the shapes and calls them; call it rather than this trait. In every operation
/// `blocks` is a `[m, n, b, b]` tensor of orthogonal blocks in f32 or f64, and the result has the precision of the
/// first argument unless the operation says otherwise.
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
    /// # Shapes
    ///
    /// - skew: `[m, n, b(b−1)/2]`, in f32 or f64
    /// - result: `[m, n, b, b]`
    #[fusion(dtype = skew, shape = {
        let [m, n, _] = skew.dims::<3>();
        Shape::from([m, n, *block_size, *block_size])
    })]
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        cayley::exact::<Self>(skew, block_size)
    }

    /// The gradient of [`boft_cayley`](Self::boft_cayley) with respect to its input, from its output alone.
    ///
    /// # Shapes
    ///
    /// - blocks and their gradient: `[m, n, b, b]`
    /// - result: `[m, n, b(b−1)/2]`
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
    ///
    /// # Shapes
    ///
    /// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]; so is the result
    #[fusion(dtype = matrix, shape = matrix)]
    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        butterfly::apply::<Self>(matrix, blocks, side, direction)
    }

    /// Rotates and scales a weight: `R·W·diag(s)` from the left, `diag(s)·W·Rᵀ` from the right.
    ///
    /// # Shapes
    ///
    /// - weight: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
    /// - scale: `[o]`
    ///
    /// # Numerics
    ///
    /// 1e-20 is added to a scale of less than 1e-30 in magnitude.
    #[fusion(dtype = weight, shape = weight)]
    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        linear::weight::<Self>(weight, blocks, scale, side)
    }

    /// The gradient of the blocks from the two matrices whose product per span is `G`; see the [Gram
    /// backward](super#the-gram-backward).
    ///
    /// # Shapes
    ///
    /// - lhs, rhs: two `[d, columns]` for [`Side::Left`], where `G = lhs·rhsᵀ`, or two `[rows, d]` for
    ///   [`Side::Right`], where `G = lhsᵀ·rhs`
    /// - result: `[m, n, b, b]`, in the precision of the blocks
    ///
    /// # Numerics
    ///
    /// `G` is accumulated in f32 or wider, whatever the precision of the two matrices.
    #[fusion(dtype = blocks, shape = blocks)]
    fn boft_block_gradient(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        butterfly::block_gradient::<Self>(lhs, rhs, blocks, side)
    }

    /// Sums `gradient ⊙ output`, and `gradient` alone, per output channel.
    ///
    /// # Shapes
    ///
    /// - gradient, output: `[rows, columns]`
    /// - results: a number per column for [`Channels::Columns`], per row for [`Channels::Rows`], in f32 or wider
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

    /// The same rotation as the other operations take it with the least work: with its factors multiplied out, where a kernel
    /// would do that each time.
    ///
    /// # Shapes
    ///
    /// - blocks: `[m, n, b, b]`
    /// - result: the blocks as they are, or `[1, d/s, s, s]` with a block for each span of `s` channels
    #[fusion(default)]
    fn boft_composed(blocks: FloatTensor<Self>) -> FloatTensor<Self> {
        blocks
    }

    /// Multiplies rows by a rotated and scaled weight and adds a bias, `x·(R·W·diag(s)) + bias`.
    ///
    /// # Shapes
    ///
    /// - input: `[tokens, d]`
    /// - weight: `[d, o]`
    /// - scale, bias: `[o]`
    /// - result: `[tokens, o]`
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

    /// The gradient of the input of [`boft_linear`](Self::boft_linear), `dx = dy·(R·W·diag(s))ᵀ`.
    ///
    /// # Shapes
    ///
    /// - gradient: `[tokens, o]`
    /// - weight: `[d, o]`
    /// - scale: `[o]`
    /// - result: `[tokens, d]`
    #[fusion(default)]
    fn boft_linear_input_gradient(
        gradient: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::boft_weight(weight, blocks, scale, Side::Left);
        let transposed = Self::float_swap_dims(weight, 0, 1);
        Self::boft_product(gradient, transposed, OptionalTensor::Absent)
    }

    /// Multiplies a matrix by blocks that need not be orthogonal, as [`boft_butterfly`](Self::boft_butterfly) does by those of
    /// a rotation. There is one factor, `m = 1`.
    ///
    /// The two differ in their backward pass alone.
    ///
    /// # Shapes
    ///
    /// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]; so is the result
    #[fusion(default)]
    fn boft_block_diagonal(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        Self::boft_butterfly(matrix, blocks, side, direction)
    }

    /// Multiplies rows by a weight that blocks have changed, `x·(R·W) + bias`. The blocks need not be orthogonal, and there is
    /// one factor.
    ///
    /// # Shapes
    ///
    /// - input: `[tokens, d]`
    /// - weight: `[d, o]`
    /// - bias: `[o]`
    /// - result: `[tokens, o]`
    #[fusion(default)]
    fn boft_block_diagonal_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let weight = Self::boft_block_diagonal(weight, blocks, Side::Left, Direction::Forward);
        Self::boft_product(input, weight, bias)
    }

    /// Convolves with a rotated and scaled weight, `diag(s)·W·Rᵀ` for the weight as an `[o, c·kh·kw]` matrix, and adds a
    /// bias.
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`
    /// - weight: `[o, c, kh, kw]`
    /// - scale, bias: `[o]`
    /// - result: `[n, o, h', w']`
    #[fusion(default)]
    fn boft_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
        options: ConvOptions<2>,
    ) -> FloatTensor<Self> {
        let shape = weight.shape().dims::<4>();
        let weight = conv::matrix::<Self>(weight);
        let weight = Self::boft_weight(weight, blocks, scale, Side::Right);
        let weight = reshape::<Self, 4>(weight, shape);
        conv::convolve::<Self>(input, weight, bias.into_option(), options)
    }

    /// The gradients of the input and of the blocks of [`boft_conv2d`](Self::boft_conv2d).
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`; so is the first result
    /// - weight: `[o, c, kh, kw]`, rotated and scaled
    /// - blocks: `[m, n, b, b]`; so is the second result, in the precision of the blocks
    /// - gradient: `[n, o, h', w']`
    #[fusion(default)]
    fn boft_conv2d_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        options: ConvOptions<2>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        conv2d_backward::<Self>([input, weight, blocks, gradient], options)
    }

    /// Convolves with a weight that blocks have changed, `W·Rᵀ` for the weight as an `[o, c·kh·kw]` matrix, and adds a bias. The
    /// blocks need not be orthogonal, and there is one factor.
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`
    /// - weight: `[o, c, kh, kw]`
    /// - bias: `[o]`
    /// - result: `[n, o, h', w']`
    #[fusion(default)]
    fn boft_block_diagonal_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
        options: ConvOptions<2>,
    ) -> FloatTensor<Self> {
        let weight = changed_kernel::<Self>(weight, blocks);
        conv::convolve::<Self>(input, weight, bias.into_option(), options)
    }

    /// The gradients of the input and of the blocks of
    /// [`boft_block_diagonal_conv2d`](Self::boft_block_diagonal_conv2d).
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`; so is the first result
    /// - weight: `[o, c, kh, kw]`, as it is without the blocks
    /// - blocks: `[1, n, b, b]`; so is the second result, in the precision of the blocks
    /// - gradient: `[n, o, h', w']`
    #[fusion(default)]
    fn boft_block_diagonal_conv2d_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        options: ConvOptions<2>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        block_diagonal_conv2d_backward::<Self>([input, weight, blocks, gradient], options)
    }

    /// Multiplies two matrices and adds a bias, `x·W + bias`.
    ///
    /// # Shapes
    ///
    /// - input: `[tokens, d]`
    /// - weight: `[d, o]`
    /// - bias: `[o]`
    /// - result: `[tokens, o]`
    #[fusion(default)]
    fn boft_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::product::<Self>(input, weight, bias.into_option())
    }

    /// Multiplies rows by a frozen quantized weight, `x·W`.
    ///
    /// For its backward pass it keeps the packed weight. Burn's own product keeps the floats that it makes of it, for
    /// every layer of the model at once.
    ///
    /// # Shapes
    ///
    /// - input: `[tokens, d]`
    /// - weight: `[d, o]`
    /// - result: `[tokens, o]`
    #[fusion(default)]
    fn boft_packed_product(
        input: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::packed_product::<Self>(input, weight)
    }

    /// Scales the output channels of a product and adds a bias, `y = z ⊙ s + bias`.
    ///
    /// For its backward pass it keeps the result, which the next operation usually keeps anyway, and not `z`.
    ///
    /// # Shapes
    ///
    /// - output: `[tokens, o]`; so is the result
    /// - scale, bias: `[o]`
    ///
    /// # Numerics
    ///
    /// In the precision of the output. 1e-20 is added to a scale of less than 1e-30 in magnitude.
    #[fusion(default)]
    fn boft_scaled(
        output: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        linear::scaled::<Self>(output, scale, bias.into_option())
    }

    /// Rotates the rows of every request by the rotation that it takes, `x·R`; see
    /// [`rotate_requests`](super::rotate_requests). Burn differentiates it.
    ///
    /// # Shapes
    ///
    /// - input: `[rows, d]`, equally many rows for each request; so is the result
    /// - rotations: at least one, `[d/s, s, s]` each, of which request `i` takes number `choices[i]`
    #[fusion(default)]
    fn boft_rotate_requests(
        input: FloatTensor<Self>,
        #[extension_type] rotations: Tensors<Self>,
        choices: Vec<Option<usize>>,
    ) -> FloatTensor<Self> {
        requests::rotate::<Self>(input, rotations.0, choices)
    }

    /// Scales the output channels of every request and adds a bias, `z ⊙ s + bias`, with the scale and the bias that it
    /// takes. Burn differentiates it.
    ///
    /// # Shapes
    ///
    /// - output: `[rows, o]`, equally many rows for each request; so is the result
    /// - scales, biases: `[o]` each, of which request `i` takes number `scaled[i]` and `biased[i]`
    ///
    /// # Numerics
    ///
    /// In the precision of the output.
    #[fusion(default)]
    fn boft_scale_requests(
        output: FloatTensor<Self>,
        #[extension_type] scales: Tensors<Self>,
        scaled: Vec<Option<usize>>,
        #[extension_type] biases: Tensors<Self>,
        biased: Vec<Option<usize>>,
    ) -> FloatTensor<Self> {
        requests::scale::<Self>(output, (scales.0, scaled), (biases.0, biased))
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

/// Whether products on this device have a kernel of this crate; the others are Burn's.
pub(super) fn multiplies(device: &DispatchDevice) -> bool {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(inner) => multiplies(inner),
        #[allow(unreachable_patterns)] // Which devices exist depends on the whole build's features.
        _ => false,
    }
}
