//! GPU kernels: one CubeCL source for CUDA, ROCm, Metal, Vulkan and WebGPU.
//!
//! They serve operands of f32, f16 and bf16 with up to 2³² numbers, spans of up to [`LARGEST_SPAN`](launch::LARGEST_SPAN) numbers, and
//! blocks in f32. Everything else takes the portable versions:
//!
//! | operation | a kernel serves | the portable version takes |
//! |---|---|---|
//! | `boft_cayley` and its backward pass | blocks of up to 44×44 numbers in f32 | larger blocks, f64 |
//! | `boft_butterfly`, `boft_weight` | spans of up to 64 numbers, from the right up to 2 million rows | longer spans, blocks or operands in f64, more rows |
//! | `boft_block_gradient` | the same, two operands of one precision | the same, and operands of two precisions |
//! | `boft_channel_sums` | channels in columns, up to 33 million rows | channels in rows, operands of two precisions |
//! | `boft_product` | nothing | everything, since Burn tunes matrix products for each device |
//!
//! A *cube* is a group of *units* (threads) that share memory and barriers, in CubeCL's words. All units of a cube
//! reach every barrier, so a unit that has nothing to compute skips the computation and does not return early. A
//! barrier also follows the last use of shared memory, because a runtime may give the shared memory to the next cube
//! as soon as one unit of this one ends.
//!
//! # Numerics
//!
//! Operands are read in their own precision and widened to f32, in which all sums run. A result is rounded to the
//! operand's precision once, when it is written. No kernel uses atomic additions, so that results do not depend on
//! the order in which cubes run.

mod butterfly;
mod cayley;
mod gram;
mod launch;
mod sums;

use burn::backend::ops::FloatTensorOps;
use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use launch::{CUBES, PARTIAL_SUM, Sizes, blocks_per_cube, element};

use super::backend::BoftBackend;
use super::butterfly::{Direction, Side};
use super::linear::Channels;
use super::precision::{cast, reshape};
use super::{
    butterfly as portable_butterfly, cayley as portable_cayley, linear as portable_linear,
};

impl BoftBackend for CubeBackend {
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        let [m, n, _] = skew.shape().dims::<3>();
        let Some(per_cube) = blocks_per_cube(&skew, block_size, m * n) else {
            return portable_cayley::exact::<Self>(skew, block_size);
        };
        cayley::cayley(skew, block_size, per_cube)
    }

    fn boft_cayley_backward(
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let per_cube = blocks_per_cube(&blocks, b, m * n);
        let Some(per_cube) = per_cube.filter(|_| gradient.dtype == DType::F32) else {
            return portable_cayley::backward::<Self>(blocks, gradient);
        };
        cayley::cayley_backward(blocks, gradient, per_cube)
    }

    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        match served(&matrix, &blocks, side) {
            Some(served) => butterfly::rotate(matrix, blocks, served, None, side, direction),
            None => portable_butterfly::apply::<Self>(matrix, blocks, side, direction),
        }
    }

    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        match served(&weight, &blocks, side) {
            Some(served) => {
                let scale = into_contiguous(cast::<Self>(scale, DType::F32));
                let direction = side.weight_direction();
                butterfly::rotate(weight, blocks, served, Some(scale), side, direction)
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
        let element = element(&lhs).filter(|_| lhs.dtype == rhs.dtype);
        let (Some(sizes), Some(element)) = (Sizes::of(&blocks), element) else {
            return portable_butterfly::block_gradient::<Self>(lhs, rhs, blocks, side);
        };
        let partial = gram::gram(lhs, rhs, sizes, element, side);
        gram::block_gradient(partial, blocks, sizes)
    }

    fn boft_channel_sums(
        gradient: FloatTensor<Self>,
        output: FloatTensor<Self>,
        channels: Channels,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [rows, columns] = output.shape().dims::<2>();
        let parts = rows.div_ceil(PARTIAL_SUM);
        let served =
            channels == Channels::Columns && gradient.dtype == output.dtype && parts <= CUBES;
        let Some(element) = element(&output).filter(|_| served) else {
            return portable_linear::channel_sums::<Self>(gradient, output, channels);
        };
        let (products, sums) = sums::column_sums(gradient, output, element);
        let total = |partial: CubeTensor| match parts {
            1 => reshape::<Self, 1>(partial, [columns]),
            _ => reshape::<Self, 1>(Self::float_sum_dim(partial, 0), [columns]),
        };
        (total(products), total(sums))
    }
}

/// The sizes of a rotation and the precision of the matrix that it rotates, if the kernels serve both.
fn served(matrix: &CubeTensor, blocks: &CubeTensor, side: Side) -> Option<(Sizes, ElemType)> {
    let is_covered = butterfly::is_covered(matrix.shape().dims::<2>(), side);
    let (sizes, element) = Sizes::of(blocks).zip(element(matrix))?;
    is_covered.then_some((sizes, element))
}
