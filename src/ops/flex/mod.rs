//! CPU kernels in f32 and f64.
//!
//! Operands of other precisions are cast as the portable versions cast them, or take those versions.

mod butterfly;
mod cayley;
mod gram;
mod product;
mod real;
mod span;
mod sums;
mod tile;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Bytes, DType, Shape};
use pulp::Arch;

use real::{Real, in_precision};
use span::Sizes;

use super::backend::{BoftBackend, OptionalTensor};
use super::butterfly::{Direction, Side};
use super::linear::Channels;
use super::precision::{cast, widen_primitive};
use super::{
    butterfly as portable_butterfly, cayley as portable_cayley, linear as portable_linear,
};

/// Spans beyond this size go to the portable version, factor by factor.
const LARGEST_SPAN: usize = 64;

fn tensor<E: Real>(values: Vec<E>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        E::dtype(),
    )
}

/// A tensor whose numbers are contiguous in memory.
struct Contiguous(FlexTensor);

impl Contiguous {
    fn new(tensor: FlexTensor) -> Self {
        match tensor.layout().contiguous_offsets() {
            Some(_) => Self(tensor),
            None => Self(tensor.to_contiguous()),
        }
    }

    fn values<E: Real>(&self) -> &[E] {
        self.0
            .as_slice()
            .expect("the tensor is contiguous and of the precision matched on")
    }
}

/// Whether the kernels serve this precision on this processor.
///
/// Without a fused multiply-add in hardware, the portable versions are faster.
fn has_kernel(tensor: &FlexTensor) -> bool {
    matches!(tensor.dtype(), DType::F32 | DType::F64) && !matches!(Arch::new(), Arch::Scalar)
}

/// The sizes of a rotation, if the kernels serve its precision and span.
fn spans_of(blocks: &FlexTensor) -> Option<Sizes> {
    let sizes = Sizes::new(blocks.shape().dims::<4>());
    (has_kernel(blocks) && sizes.span <= LARGEST_SPAN).then_some(sizes)
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
}

/// `op(R)·t` or `t·op(R)` in the precision of the blocks, times a scale per output channel of a weight.
fn rotate(
    matrix: FlexTensor,
    blocks: FlexTensor,
    sizes: Sizes,
    scale: Option<FlexTensor>,
    side: Side,
    direction: Direction,
) -> FlexTensor {
    let (shape, dtype) = (matrix.shape().dims::<2>(), matrix.dtype());
    let matrix = Contiguous::new(cast::<Flex>(matrix, blocks.dtype()));
    let (blocks, scale) = (Contiguous::new(blocks), scale.map(Contiguous::new));
    let rotated = in_precision!(blocks.0.dtype(), E => {
        let rotation = butterfly::compose::<E>(blocks.values(), sizes, direction);
        let scale = scale.as_ref().map(|scale| scale.values());
        let rotated = match side {
            Side::Left => butterfly::rotate_rows::<E>(matrix.values(), &rotation, sizes, shape, scale),
            Side::Right => butterfly::rotate_columns::<E>(matrix.values(), &rotation, sizes, shape, scale),
        };
        tensor(rotated, shape)
    });
    cast::<Flex>(rotated, dtype)
}
