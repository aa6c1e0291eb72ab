//! The Gram backward: `G` per span, and from it the gradient of the blocks.
//!
//! Operands may have any strides and any of the kernels' precisions; sums run in f32. A first launch reads the two
//! large operands once and writes partial sums of `G`; a second adds these up and carries `G` through all factors
//! without leaving the shared memory.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::{into_contiguous, untile};
use burn_cubecl::tensor::CubeTensor;

use super::butterfly::coupled;
use super::launch::{CUBES, PARTIAL_SUM, Sizes, UNITS, cubes, empty, units};
use crate::ops::butterfly::Side;

/// Terms of the sum, rows of activations or columns of a weight, that a cube holds in shared memory at once.
///
/// Two operands of 8 terms by 128 channels take about 8 KiB in f32, half of what every device has.
const MULTIPLIED_ROWS: usize = 8;

/// Partial sums of `G` per span: `lhsᵀ·rhs` on the right, `lhs·rhsᵀ` on the left.
///
/// # Shapes
///
/// - lhs, rhs: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`], with any strides
/// - result: `[parts, count, span, span]`, in f32
///
/// # Numerics
///
/// A part adds up 512 terms in f32, or more where the summed axis is so long that there would be too many parts, from
/// 33 million terms on.
pub(super) fn gram(
    lhs: CubeTensor,
    rhs: CubeTensor,
    sizes: Sizes,
    element: ElemType,
    side: Side,
) -> CubeTensor {
    let [rows, columns] = lhs.shape().dims::<2>();
    let (summed, rotated, channels) = match side {
        Side::Left => (columns, rows, 0),
        Side::Right => (rows, columns, 1),
    };
    let Sizes { span, count, .. } = sizes;
    let width = UNITS / span * span;
    // Partial sums have a fixed length unless that would take more cubes than an axis has.
    let tiles = (PARTIAL_SUM / MULTIPLIED_ROWS).max(summed.div_ceil(MULTIPLIED_ROWS * CUBES));
    let parts = summed.div_ceil(tiles * MULTIPLIED_ROWS);
    let (lhs, rhs) = (untile(lhs), untile(rhs));
    let partial = empty(&lhs, [parts, count, span, span], DType::F32);
    gram_kernel::launch(
        &partial.client,
        cubes(rotated.div_ceil(width), parts),
        units(width),
        lhs.into_tensor_arg(),
        rhs.into_tensor_arg(),
        partial.clone().into_buffer_arg(),
        tiles as u32,
        span,
        width,
        MULTIPLIED_ROWS,
        channels,
        element,
    );
    partial
}

/// The gradient of the blocks from the partial sums of `G`, in one launch for all factors.
///
/// # Shapes
///
/// - partial: `[parts, count, span, span]`
/// - blocks: `[m, n, b, b]`, in f32; so is the result
pub(super) fn block_gradient(partial: CubeTensor, blocks: CubeTensor, sizes: Sizes) -> CubeTensor {
    let blocks = into_contiguous(blocks);
    let gradient = empty(&blocks, blocks.shape(), DType::F32);
    let (per_cube, width) = sizes.per_cube();
    block_gradient_kernel::launch(
        &gradient.client,
        cubes(sizes.count.div_ceil(per_cube), 1),
        units(width),
        partial.into_buffer_arg(),
        blocks.into_buffer_arg(),
        gradient.clone().into_buffer_arg(),
        sizes.b,
        sizes.m,
        per_cube,
        sizes.line(),
    );
    gradient
}

/// Partial `G` per span, each over `tiles` tiles of the summed axis.
///
/// `channels` is the rotated axis. Each unit computes one column of `G` in registers, `s` sums:
/// `G[i, unit] += lhs[t, i]·rhs[t, unit]` for each term `t`. A tile of `tile` terms by `width` channels of each
/// operand is in shared memory, where all units of a span read the same number of `lhs` at once and each its own of
/// `rhs`.
///
/// Tiles are read along the axis whose numbers are neighbours in memory: units walk along the channels of
/// activations, and along the summed axis of weights. In shared memory a line is one number longer than a tile, so
/// that the second order also writes to different memory banks. Terms and channels beyond the operand count as zeros.
#[cube(launch)]
fn gram_kernel<F: Float>(
    lhs: &Tensor<F>,
    rhs: &Tensor<F>,
    partial: &mut [f32],
    tiles: u32,
    #[comptime] s: usize,
    #[comptime] width: usize,
    #[comptime] tile: usize,
    #[comptime] channels: usize,
    #[define(F)] _dtype: ElemType,
) {
    let line = comptime!(width + 1);
    let summed = comptime!(1 - channels);
    let mut lhs_lines = Shared::<[f32]>::new_slice(comptime!(tile * (width + 1)));
    let mut rhs_lines = Shared::<[f32]>::new_slice(comptime!(tile * (width + 1)));
    let unit = UNIT_POS_X as usize;
    let base = CUBE_POS_X as usize * width;
    let channel = base + unit;
    let span = unit / s * s;
    let mut sums = Array::<f32>::new(s);
    #[unroll]
    for inner in 0..s {
        sums[inner] = 0.0f32;
    }

    for step in 0..tiles as usize {
        let first = (CUBE_POS_Y as usize * tiles as usize + step) * tile;
        for round in 0..tile {
            let index = round * width + unit;
            let mut local = index / width;
            let mut offset = index % width;
            if comptime!(channels == 0) {
                local = index % tile;
                offset = index / tile;
            }
            let term = first + local;
            let mut left = 0.0f32;
            let mut right = 0.0f32;
            if term < lhs.shape(summed) && base + offset < lhs.shape(channels) {
                left = f32::cast_from(
                    lhs[term * lhs.stride(summed) + (base + offset) * lhs.stride(channels)],
                );
                right = f32::cast_from(
                    rhs[term * rhs.stride(summed) + (base + offset) * rhs.stride(channels)],
                );
            }
            lhs_lines[local * line + offset] = left;
            rhs_lines[local * line + offset] = right;
        }
        sync_cube();
        for local in 0..tile {
            let right = rhs_lines[local * line + unit];
            #[unroll]
            for inner in 0..s {
                sums[inner] += lhs_lines[local * line + span + inner] * right;
            }
        }
        sync_cube();
    }
    if channel < lhs.shape(channels) {
        let start = (CUBE_POS_Y as usize * lhs.shape(channels) + channel / s * s) * s + channel % s;
        #[unroll]
        for inner in 0..s {
            partial[start + inner * s] = sums[inner];
        }
    }
}

/// The gradient of the blocks from partial sums of `G`. Each unit works on a row of a span, then on a column.
///
/// For each factor, from the last to the first: `H = G·F_i`, whose coupled entries are `∂L/∂C`, then `G ← F_iᵀ·H`. A
/// row of `H` needs only the same row of `G`, so each unit computes its own in place. A column of `F_iᵀ·H` needs only
/// the same column of `H`, so after a barrier each unit computes a column in place. The first factor, which comes
/// last, needs no new `G`.
///
/// Rows of the matrices in shared memory are `line` numbers apart.
///
/// # Numerics
///
/// Partial sums are added in f32, in the order of the parts, and all products run in f32.
#[cube(launch)]
fn block_gradient_kernel(
    partial: &[f32],
    blocks: &[f32],
    gradient: &mut [f32],
    #[comptime] b: usize,
    #[comptime] m: usize,
    #[comptime] per_cube: usize,
    #[comptime] line: usize,
) {
    let s = comptime!(b << (m - 1));
    let mut gram = Shared::<[f32]>::new_slice(comptime!(per_cube * s * line));
    let row = UNIT_POS_X as usize % s;
    let place = UNIT_POS_X as usize / s;
    let span = CUBE_POS_X as usize * per_cube + place;
    let per_factor = blocks.len() / m;
    let size = per_factor / b * s;
    let is_span = span * comptime!(s * s) < size;
    let matrix = place * s * line;
    let own = matrix + row * line;

    for column in 0..s {
        let mut sum = 0.0f32;
        if is_span {
            let mut entry = span * comptime!(s * s) + row * s + column;
            while entry < partial.len() {
                sum += partial[entry];
                entry += size;
            }
        }
        gram[own + column] = sum;
    }
    sync_cube();
    #[unroll]
    for step in 0..m {
        let stage = comptime!(m - 1 - step);
        let factor = per_factor * stage + span * comptime!(s / b * b * b);
        if is_span {
            for local in 0..comptime!(s / b) {
                let block = factor + local * comptime!(b * b);
                let mut sums = Array::<f32>::new(b);
                let mut own_index = b.runtime();
                for to in 0..b {
                    let mut sum = 0.0f32;
                    for from in 0..b {
                        sum += gram[own + coupled(local, from, b, stage)]
                            * blocks[block + from * b + to];
                    }
                    sums[to] = sum;
                    if coupled(local, to, b, stage) == row {
                        own_index = to;
                    }
                }
                for to in 0..b {
                    gram[own + coupled(local, to, b, stage)] = sums[to];
                    if own_index < b {
                        gradient[block + own_index * b + to] = sums[to];
                    }
                }
            }
        }
        sync_cube();
        if comptime!(stage > 0) {
            if is_span {
                for local in 0..comptime!(s / b) {
                    let block = factor + local * comptime!(b * b);
                    let mut sums = Array::<f32>::new(b);
                    for to in 0..b {
                        let mut sum = 0.0f32;
                        for from in 0..b {
                            sum += blocks[block + from * b + to]
                                * gram[matrix + coupled(local, from, b, stage) * line + row];
                        }
                        sums[to] = sum;
                    }
                    for to in 0..b {
                        gram[matrix + coupled(local, to, b, stage) * line + row] = sums[to];
                    }
                }
            }
            sync_cube();
        }
    }
}
