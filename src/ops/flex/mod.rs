//! CPU kernels in f32 and f64, and for rotations of bf16 and f16, for processors with vector instructions and a fused multiply-add.
//!
//! | operation | a kernel serves | the portable version takes |
//! |---|---|---|
//! | `boft_cayley` and its backward pass | every block size | blocks and gradient of two precisions |
//! | `boft_butterfly`, `boft_weight`, `boft_block_gradient` | spans of up to 64 numbers | longer spans |
//! | `boft_rotate_requests` | spans of up to 64 numbers | longer spans |
//! | `boft_conv2d_backward`, `boft_block_diagonal_conv2d_backward` | the same spans, operands of one precision, at least one image | all others |
//! | `boft_channel_sums` | two operands of one precision | operands of two precisions |
//! | `boft_product` | any strides, two operands of one precision | operands of two precisions |
//! | `boft_scale_requests` | every layer | |
//! | `boft_linear`, `boft_linear_input_gradient`, `boft_block_diagonal_linear` | products for several threads, operands of one precision, spans of up to 64 numbers | all others, by a rotated weight and `boft_product` |
//!
//! `boft_butterfly` and `boft_weight` read bf16 and f16 as they are stored, where the blocks are in f32. All other operands of
//! the second and third row are cast before a kernel reads them. In the last five rows, operands in half precision take the
//! portable version, too.
//!
//! # Vector instructions
//!
//! A kernel is a struct that implements [`WithSimd`](pulp::WithSimd), and `Arch::dispatch` picks one of several
//! compiled copies of it when the program runs; `tile::dispatch` picks a narrower one where a span does not fill the
//! registers of AVX-512. Rotations and Gram sums keep their sums in registers (`tile::Tile`). The other loops have lengths
//! that are constants, and the compiler turns them into vectors. All of this works only for code that is inlined into
//! `with_simd`, so everything that computes there is `#[inline(always)]`. A function compiled by itself has the vector width of
//! the oldest processor of its target, and calls a library for every fused multiply-add.
//!
//! # Threads
//!
//! Work is cut into tasks whose size depends on the shapes only, and partial sums are added up in a fixed order. A
//! result therefore has the same bits on any number of threads. The exception are large products, which are divided among the
//! threads that there are: their sums may be rounded otherwise on another number of threads.

mod butterfly;
mod cayley;
mod conv;
mod gram;
mod half;
mod matrix;
mod panels;
mod product;
mod real;
mod requests;
mod span;
mod sums;
mod tile;

use std::borrow::Cow;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Bytes, DType, Element, Shape, bf16, f16};
use bytemuck::Pod;
use pulp::Arch;

use butterfly::Stored;
use panels::Rotated;
use real::{Real, in_precision};
use span::Sizes;

use super::backend::{
    BoftBackend, OptionalTensor, Tensors, block_diagonal_conv2d_backward, conv2d_backward,
};
use super::butterfly::{Direction, Side};
use super::linear::Channels;
use super::precision::{cast, widen_primitive};
use super::{
    butterfly as portable_butterfly, cayley as portable_cayley, linear as portable_linear,
    requests as portable_requests,
};

/// The longest span that the kernels compose into one matrix; the portable version rotates longer ones factor by
/// factor.
///
/// A composed span takes `span` multiplications for each number of the operand, factor by factor it takes `m·b`. At
/// 64 numbers its matrix has 16 KiB in f32, half of a first-level cache of 32 KiB.
const LARGEST_SPAN: usize = 64;

/// A tensor of these numbers, stored row by row, without a copy.
fn tensor<E: Element + Pod>(values: Vec<E>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        E::dtype(),
    )
}

/// A tensor whose numbers are contiguous in memory, row by row.
///
/// The kernels cut slices into chunks of rows, so a view with other strides is copied once before it is read. Only
/// [`product`] reads any strides.
struct Contiguous(FlexTensor);

impl Contiguous {
    fn new(tensor: FlexTensor) -> Self {
        match tensor.layout().contiguous_offsets() {
            Some(_) => Self(tensor),
            None => Self(tensor.to_contiguous()),
        }
    }

    fn values<E: Element + Pod>(&self) -> &[E] {
        self.0
            .as_slice()
            .expect("the tensor is contiguous and of the precision matched on")
    }

    /// The numbers, which are copied first if another tensor shares them.
    fn values_mut<E: Element + Pod>(&mut self) -> &mut [E] {
        let layout = self.0.layout();
        let (start, len) = (layout.start_offset(), layout.num_elements());
        &mut self.0.storage_mut()[start..start + len]
    }
}

/// Whether the kernels serve this precision on this processor.
///
/// On a processor without a fused multiply-add each [`Real::mul_add`] would be a call of a library
/// function, and the portable versions are faster.
fn has_kernel(tensor: &FlexTensor) -> bool {
    matches!(tensor.dtype(), DType::F32 | DType::F64) && !matches!(Arch::new(), Arch::Scalar)
}

/// The sizes of a rotation, if the kernels serve its precision and span.
fn spans_of(blocks: &FlexTensor) -> Option<Sizes> {
    let sizes = Sizes::new(blocks.shape().dims::<4>());
    (has_kernel(blocks) && sizes.span <= LARGEST_SPAN).then_some(sizes)
}

/// Whether the kernel of the backward pass of a convolution serves its input, weight and gradient.
fn has_conv_kernel([input, weight, gradient]: [&FlexTensor; 3]) -> bool {
    let mut operands = [input, weight, gradient].into_iter();
    let alike = |operand: &FlexTensor| {
        operand.dtype() == input.dtype() && operand.shape().num_elements() > 0
    };
    has_kernel(input) && operands.all(alike)
}

/// The gradient of the input of a convolution, and the sums of its blocks; see [`conv::backward`].
fn convolution_backward(
    [input, weight, gradient]: [FlexTensor; 3],
    blocks: Option<FlexTensor>,
    options: &ConvOptions<2>,
    sizes: Sizes,
) -> (FlexTensor, Vec<f64>) {
    let [shape, kernel, output] = [&input, &weight, &gradient].map(|t| t.shape().dims::<4>());
    let convolution = conv::Convolution::new(shape, kernel, output, options);
    let dtype = input.dtype();
    let [input, weight, gradient] = [input, weight, gradient].map(Contiguous::new);
    let blocks = blocks.map(Contiguous::new);
    in_precision!(dtype, E => {
        let operands = [input.values::<E>(), weight.values(), gradient.values()];
        let blocks = blocks.as_ref().map(Contiguous::values);
        let (values, sums) = conv::backward(operands, blocks, &convolution, sizes.span);
        (tensor(values, shape), sums)
    })
}

impl BoftBackend for Flex {
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        if !has_kernel(&skew) {
            return portable_cayley::exact::<Self>(skew, block_size);
        }
        let [m, n, _] = skew.shape().dims::<3>();
        let skew = Contiguous::new(skew);
        let shape = [m, n, block_size, block_size];
        in_precision!(skew.0.dtype(), E => tensor(cayley::cayley::<E>(skew.values(), block_size), shape))
    }

    fn boft_cayley_backward(
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !has_kernel(&blocks) || blocks.dtype() != gradient.dtype() {
            return portable_cayley::backward::<Self>(blocks, gradient);
        }
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let (blocks, gradient) = (Contiguous::new(blocks), Contiguous::new(gradient));
        let shape = [m, n, b * (b - 1) / 2];
        in_precision!(blocks.0.dtype(), E => {
            tensor(cayley::cayley_backward::<E>(blocks.values(), gradient.values(), b), shape)
        })
    }

    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        match spans_of(&blocks) {
            Some(sizes) => rotate(matrix, blocks, sizes, None, side, direction),
            None => portable_butterfly::apply::<Self>(matrix, blocks, side, direction),
        }
    }

    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        match spans_of(&blocks) {
            Some(sizes) => {
                let scale =
                    portable_linear::away_from_zero::<Self>(cast::<Self>(scale, blocks.dtype()));
                rotate(
                    weight,
                    blocks,
                    sizes,
                    Some(scale),
                    side,
                    side.weight_direction(),
                )
            }
            None => portable_linear::weight::<Self>(weight, blocks, scale, side),
        }
    }

    fn boft_block_gradient(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let Some(sizes) = spans_of(&blocks) else {
            return portable_butterfly::block_gradient::<Self>(lhs, rhs, blocks, side);
        };
        let shape = lhs.shape().dims::<2>();
        let (lhs, rhs) = (widen_primitive::<Self>(lhs), widen_primitive::<Self>(rhs));
        let dtype = lhs.dtype();
        let (lhs, rhs) = (
            Contiguous::new(lhs),
            Contiguous::new(cast::<Self>(rhs, dtype)),
        );
        let gram = in_precision!(dtype, E => {
            gram::gram::<E>(lhs.values(), rhs.values(), shape, sizes, side)
        });
        let dims = blocks.shape();
        let blocks = Contiguous::new(blocks);
        in_precision!(blocks.0.dtype(), E => {
            tensor(gram::block_gradient::<E>(gram, blocks.values(), sizes), dims)
        })
    }

    fn boft_channel_sums(
        gradient: FloatTensor<Self>,
        output: FloatTensor<Self>,
        channels: Channels,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !has_kernel(&output) || output.dtype() != gradient.dtype() {
            return portable_linear::channel_sums::<Self>(gradient, output, channels);
        }
        let [rows, columns] = output.shape().dims::<2>();
        let (gradient, output) = (Contiguous::new(gradient), Contiguous::new(output));
        in_precision!(output.0.dtype(), E => {
            let (gradient, output) = (gradient.values::<E>(), output.values());
            let (count, [products, sums]) = match channels {
                Channels::Columns => (columns, sums::column_sums(gradient, output, columns)),
                Channels::Rows => (rows, sums::row_sums(gradient, output, columns)),
            };
            (tensor(products, [count]), tensor(sums, [count]))
        })
    }

    fn boft_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dtype, bias) = (input.dtype(), bias.into_option());
        if !has_kernel(&input) || weight.dtype() != dtype {
            return portable_linear::product::<Self>(input, weight, bias);
        }
        let shape = [input.shape().dims::<2>()[0], weight.shape().dims::<2>()[1]];
        let bias = bias.map(|bias| Contiguous::new(cast::<Self>(bias, dtype)));
        in_precision!(dtype, E => {
            let bias = bias.as_ref().map(|bias| bias.values());
            tensor(product::product::<E>(&input, &weight, bias), shape)
        })
    }

    fn boft_composed(blocks: FloatTensor<Self>) -> FloatTensor<Self> {
        let Some(sizes) = spans_of(&blocks).filter(|sizes| sizes.m > 1) else {
            return blocks;
        };
        let shape = [1, sizes.count(), sizes.span, sizes.span];
        let blocks = Contiguous::new(blocks);
        in_precision!(blocks.0.dtype(), E => {
            let spans = butterfly::compose::<E>(blocks.values(), sizes, Direction::Forward);
            tensor(spans.into_owned(), shape)
        })
    }

    fn boft_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dtype, bias) = (input.dtype(), bias.into_option());
        let rotated = RotatedWeight::new(dtype, &weight, &blocks, Some(&scale));
        let output = rotated.and_then(|rotated| rotated.product(&input, bias.as_ref()));
        output.unwrap_or_else(|| {
            let weight = Self::boft_weight(weight, blocks, scale, Side::Left);
            Self::boft_product(input, weight, bias.into())
        })
    }

    fn boft_linear_input_gradient(
        gradient: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let dtype = gradient.dtype();
        let rotated = RotatedWeight::new(dtype, &weight, &blocks, Some(&scale));
        let output = rotated.and_then(|rotated| rotated.transposed_product(&gradient));
        output.unwrap_or_else(|| {
            let weight = Self::boft_weight(weight, blocks, scale, Side::Left);
            Self::boft_product(gradient, weight.transpose(0, 1), OptionalTensor::Absent)
        })
    }

    fn boft_block_diagonal_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dtype, bias) = (input.dtype(), bias.into_option());
        let changed = RotatedWeight::new(dtype, &weight, &blocks, None);
        let output = changed.and_then(|changed| changed.product(&input, bias.as_ref()));
        output.unwrap_or_else(|| {
            let (side, direction) = (Side::Left, Direction::Forward);
            let weight = Self::boft_block_diagonal(weight, blocks, side, direction);
            Self::boft_product(input, weight, bias.into())
        })
    }

    fn boft_conv2d_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        options: ConvOptions<2>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operands = [&input, &weight, &gradient];
        let Some(sizes) = spans_of(&blocks).filter(|_| has_conv_kernel(operands)) else {
            return conv2d_backward::<Self>([input, weight, blocks, gradient], options);
        };
        let (input_gradient, gram) =
            convolution_backward([input, weight, gradient], None, &options, sizes);
        let dims = blocks.shape();
        let blocks = Contiguous::new(blocks);
        let blocks_gradient = in_precision!(blocks.0.dtype(), E => {
            tensor(gram::block_gradient::<E>(gram, blocks.values(), sizes), dims)
        });
        (input_gradient, blocks_gradient)
    }

    fn boft_block_diagonal_conv2d_backward(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        options: ConvOptions<2>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let has_kernel =
            has_conv_kernel([&input, &weight, &gradient]) && blocks.dtype() == input.dtype();
        let Some(sizes) = spans_of(&blocks).filter(|sizes| has_kernel && sizes.m == 1) else {
            let operands = [input, weight, blocks, gradient];
            return block_diagonal_conv2d_backward::<Self>(operands, options);
        };
        let (dtype, dims) = (blocks.dtype(), blocks.shape());
        let operands = [input, weight, gradient];
        let (input_gradient, products) =
            convolution_backward(operands, Some(blocks), &options, sizes);
        let blocks_gradient = in_precision!(dtype, E => {
            let rounded: Vec<E> = products.into_iter().map(E::rounded).collect();
            tensor(rounded, dims)
        });
        (input_gradient, blocks_gradient)
    }

    fn boft_rotate_requests(
        input: FloatTensor<Self>,
        rotations: Tensors<Self>,
        choices: Vec<Option<usize>>,
    ) -> FloatTensor<Self> {
        let Tensors(rotations) = rotations;
        let [_, span, _] = rotations[0].shape().dims::<3>();
        if !has_kernel(&rotations[0]) || span > LARGEST_SPAN {
            return portable_requests::rotate::<Self>(input, rotations, choices);
        }
        let (shape, dtype) = (input.shape().dims::<2>(), input.dtype());
        let input = Contiguous::new(cast::<Self>(input, rotations[0].dtype()));
        let rotations: Vec<_> = rotations.into_iter().map(Contiguous::new).collect();
        let rotated = in_precision!(input.0.dtype(), E => {
            let rotations: Vec<_> = rotations.iter().map(Contiguous::values::<E>).collect();
            tensor(requests::rotate(input.values(), &rotations, &choices, span, shape), shape)
        });
        cast::<Self>(rotated, dtype)
    }

    fn boft_scale_requests(
        output: FloatTensor<Self>,
        scales: Tensors<Self>,
        scaled: Vec<Option<usize>>,
        biases: Tensors<Self>,
        biased: Vec<Option<usize>>,
    ) -> FloatTensor<Self> {
        let (Tensors(scales), Tensors(biases)) = (scales, biases);
        if !has_kernel(&output) {
            return portable_requests::scale::<Self>(output, (scales, scaled), (biases, biased));
        }
        let (shape, dtype) = (output.shape().dims::<2>(), output.dtype());
        let contiguous = |vectors: Vec<FlexTensor>| {
            let vectors = vectors.into_iter();
            let vectors = vectors.map(|vector| Contiguous::new(cast::<Self>(vector, dtype)));
            vectors.collect::<Vec<_>>()
        };
        let (scales, biases) = (contiguous(scales), contiguous(biases));
        let mut output = Contiguous::new(output);
        in_precision!(dtype, E => {
            let [scales, biases] = [&scales, &biases]
                .map(|vectors| vectors.iter().map(Contiguous::values).collect::<Vec<&[E]>>());
            let (scales, biases) = ((&scales[..], &scaled[..]), (&biases[..], &biased[..]));
            requests::scale(output.values_mut(), scales, biases, shape);
        });
        output.0
    }
}

/// The operands of a weight that blocks rotate, which products with it compute panel by panel.
struct RotatedWeight {
    weight: Contiguous,
    blocks: Contiguous,
    sizes: Sizes,
    scale: Option<Contiguous>,
}

impl RotatedWeight {
    /// None if the kernels do not serve such operands, which have to be of one precision.
    fn new(
        dtype: DType,
        weight: &FlexTensor,
        blocks: &FlexTensor,
        scale: Option<&FlexTensor>,
    ) -> Option<Self> {
        let sizes = spans_of(blocks)?;
        if weight.dtype() != dtype || blocks.dtype() != dtype {
            return None;
        }
        let scale = scale.map(|scale| cast::<Flex>(scale.clone(), dtype));
        Some(Self {
            weight: Contiguous::new(weight.clone()),
            blocks: Contiguous::new(blocks.clone()),
            sizes,
            scale: scale
                .map(|scale| Contiguous::new(portable_linear::away_from_zero::<Flex>(scale))),
        })
    }

    /// `x·(R·W·diag(s)) + bias`, unless [`rotated_product`](product::rotated_product) has none.
    fn product(&self, input: &FlexTensor, bias: Option<&FlexTensor>) -> Option<FlexTensor> {
        let dtype = self.weight.0.dtype();
        let bias = bias.map(|bias| Contiguous::new(cast::<Flex>(bias.clone(), dtype)));
        let shape = [input.shape()[0], self.weight.0.shape()[1]];
        in_precision!(dtype, E => {
            let bias = bias.as_ref().map(Contiguous::values);
            let rotation = self.rotation::<E>();
            let output = product::rotated_product(input, self.operand(&rotation), bias);
            output.map(|output| tensor(output, shape))
        })
    }

    /// `dy·(R·W·diag(s))ᵀ`, likewise.
    fn transposed_product(&self, gradient: &FlexTensor) -> Option<FlexTensor> {
        let shape = [gradient.shape()[0], self.weight.0.shape()[0]];
        in_precision!(self.weight.0.dtype(), E => {
            let rotation = self.rotation::<E>();
            let output = product::rotated_transposed_product(gradient, self.operand(&rotation));
            output.map(|output| tensor(output, shape))
        })
    }

    /// The rotation of every span.
    fn rotation<E: Real>(&self) -> Cow<'_, [E]> {
        let direction = Side::Left.weight_direction();
        butterfly::compose(self.blocks.values(), self.sizes, direction)
    }

    fn operand<'a, E: Real>(&'a self, rotation: &'a [E]) -> Rotated<'a, E> {
        Rotated {
            weight: self.weight.values(),
            outputs: self.weight.0.shape()[1],
            rotation,
            span: self.sizes.span,
            scale: self.scale.as_ref().map(Contiguous::values),
        }
    }
}

/// `op(R)·t` on the left or `t·op(R)` on the right, times a scale per output channel of a weight.
///
/// First every span's rotation is composed into one matrix, then one pass over the operand applies it. A weight's
/// outputs are its columns on the left and its rows on the right, so that is where the scale goes; it is multiplied
/// in before a result leaves the registers.
///
/// # Shapes
///
/// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]; so is the result
/// - scale: a number per column on the left, per row on the right
///
/// # Numerics
///
/// Runs in the precision of the blocks. An operand of another precision is widened before and the result is rounded back
/// once, after the scale.
fn rotate(
    matrix: FlexTensor,
    blocks: FlexTensor,
    sizes: Sizes,
    scale: Option<FlexTensor>,
    side: Side,
    direction: Direction,
) -> FlexTensor {
    let (blocks, direction) = as_stored(blocks, sizes, direction);
    let rotation = Rotation {
        blocks,
        sizes,
        scale: scale.map(Contiguous::new),
        side,
        direction,
    };
    match (rotation.blocks.0.dtype(), matrix.dtype()) {
        (DType::F32, DType::BF16) => rotation.apply::<bf16>(matrix),
        (DType::F32, DType::F16) => rotation.apply::<f16>(matrix),
        (precision, stored) => {
            let matrix = cast::<Flex>(matrix, precision);
            let rotated = in_precision!(precision, E => rotation.apply::<E>(matrix));
            cast::<Flex>(rotated, stored)
        }
    }
}

/// What [`rotate`] applies to a matrix.
struct Rotation {
    blocks: Contiguous,
    sizes: Sizes,
    scale: Option<Contiguous>,
    side: Side,
    direction: Direction,
}

impl Rotation {
    fn apply<T: Stored>(&self, matrix: FlexTensor) -> FlexTensor {
        let shape = matrix.shape().dims::<2>();
        let matrix = Contiguous::new(matrix);
        let spans = butterfly::compose(self.blocks.values(), self.sizes, self.direction);
        let scale = self.scale.as_ref().map(Contiguous::values);
        let matrix = matrix.values::<T>();
        let rotated = butterfly::rotate(matrix, &spans, self.sizes, shape, scale, self.side);
        tensor(rotated, shape)
    }
}

/// The blocks as they lie in memory, and the direction that they are then for: one factor that is stored transposed is
/// the transposed rotation's, which spares the copy that would transpose it back.
fn as_stored(blocks: FlexTensor, sizes: Sizes, direction: Direction) -> (Contiguous, Direction) {
    if sizes.m == 1 && direction == Direction::Back {
        let transposed = blocks.transpose(2, 3);
        if transposed.layout().contiguous_offsets().is_some() {
            return (Contiguous(transposed), Direction::Forward);
        }
    }
    (Contiguous::new(blocks), direction)
}
