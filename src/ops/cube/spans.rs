//! Rotations as one small matrix per span, applied in one pass over memory, and the Gram backward.
//!
//! Operands may have any strides and any float precision; sums run in f32.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

/// Where in the span entry `index` of a block lies: half-blocks at distance `2^stage`.
#[cube]
fn coupled(block: usize, index: usize, #[comptime] b: usize, #[comptime] stage: usize) -> usize {
    let distance = comptime!(1usize << stage);
    let half = comptime!(b / 2);
    let start = block / distance * comptime!(b << stage) + block % distance * half;
    let mut place = start + index;
    if index >= half {
        place = start + comptime!(((b / 2) << stage) - b / 2) + index;
    }
    place
}

/// `op(R)` of every span: a unit per column, which no other unit touches.
#[cube(launch)]
pub(super) fn compose_kernel(
    blocks: &[f32],
    rotations: &mut [f32],
    #[comptime] b: usize,
    #[comptime] m: usize,
    #[comptime] per_cube: usize,
    #[comptime] transpose: bool,
) {
    let s = comptime!(b << (m - 1));
    let mut product = Shared::<[f32]>::new_slice(comptime!(per_cube * s * s));
    let column = UNIT_POS_X as usize % s;
    let place = UNIT_POS_X as usize / s;
    let span = CUBE_POS_X as usize * per_cube + place;
    // Entry (row, column) of this unit's span.
    let own = place * comptime!(s * s) + column;
    let per_factor = blocks.len() / m;

    if span * comptime!(s * s) < rotations.len() {
        for row in 0..s {
            let mut value = 0.0f32;
            if row == column {
                value = 1.0f32;
            }
            product[own + row * s] = value;
        }
        #[unroll]
        for stage in 0..m {
            for local in 0..comptime!(s / b) {
                let block =
                    per_factor * stage + (span * comptime!(s / b) + local) * comptime!(b * b);
                let mut sums = Array::<f32>::new(b);
                for to in 0..b {
                    let mut sum = 0.0f32;
                    for from in 0..b {
                        sum += blocks[block + to * b + from]
                            * product[own + coupled(local, from, b, stage) * s];
                    }
                    sums[to] = sum;
                }
                for to in 0..b {
                    product[own + coupled(local, to, b, stage) * s] = sums[to];
                }
            }
        }
        for row in 0..s {
            let mut place = row * s + column;
            if comptime!(transpose) {
                place = column * s + row;
            }
            rotations[span * comptime!(s * s) + place] = product[own + row * s];
        }
    }
    sync_cube();
}

/// `op(R)·t` for a `[d, columns]` matrix with a scale per column: a unit per column of a span.
#[cube(launch)]
pub(super) fn rotate_rows_kernel<F: Float>(
    matrix: &Tensor<F>,
    rotations: &[f32],
    scale: ComptimeOption<&[f32]>,
    output: &mut Tensor<F>,
    #[comptime] s: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut rotation = Shared::<[f32]>::new_slice(comptime!(s * s));
    let span = CUBE_POS_Y as usize;
    let column = ABSOLUTE_POS_X as usize;

    let mut index = UNIT_POS_X as usize;
    while index < comptime!(s * s) {
        rotation[index] = rotations[span * comptime!(s * s) + index];
        index += CUBE_DIM_X as usize;
    }
    sync_cube();
    if column < matrix.shape(1) {
        let factor: ComptimeOption<f32> = scale.map(|scale| away_from_zero(scale[column]));
        let factor = factor.unwrap_or(1.0f32);
        let mut line = Array::<f32>::new(s);
        let start = span * s * matrix.stride(0) + column * matrix.stride(1);
        #[unroll]
        for row in 0..s {
            line[row] = f32::cast_from(matrix[start + row * matrix.stride(0)]);
        }
        for row in 0..s {
            let mut sum = 0.0f32;
            #[unroll]
            for inner in 0..s {
                sum += rotation[row * s + inner] * line[inner];
            }
            let place = (span * s + row) * output.stride(0) + column * output.stride(1);
            output[place] = F::cast_from(sum * factor);
        }
    }
    sync_cube();
}

/// `t·op(R)` for a `[rows, d]` matrix with a scale per row: a unit per column, over `tile` rows.
#[cube(launch)]
pub(super) fn rotate_columns_kernel<F: Float>(
    matrix: &Tensor<F>,
    rotations: &[f32],
    scale: ComptimeOption<&[f32]>,
    output: &mut Tensor<F>,
    #[comptime] s: usize,
    #[comptime] width: usize,
    #[comptime] tile: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut lines = Shared::<[f32]>::new_slice(comptime!(tile * width));
    let unit = UNIT_POS_X as usize;
    let column = CUBE_POS_X as usize * width + unit;
    let first = CUBE_POS_Y as usize * tile;
    let is_column = column < matrix.shape(1);

    for local in 0..tile {
        let row = first + local;
        let mut value = 0.0f32;
        if is_column && row < matrix.shape(0) {
            value = f32::cast_from(matrix[row * matrix.stride(0) + column * matrix.stride(1)]);
        }
        lines[local * width + unit] = value;
    }
    sync_cube();
    if is_column {
        let mut rotation = Array::<f32>::new(s);
        let start = column / s * comptime!(s * s) + column % s;
        #[unroll]
        for inner in 0..s {
            rotation[inner] = rotations[start + inner * s];
        }
        let span = unit / s * s;
        for local in 0..tile {
            let row = first + local;
            if row < matrix.shape(0) {
                let mut sum = 0.0f32;
                #[unroll]
                for inner in 0..s {
                    sum += lines[local * width + span + inner] * rotation[inner];
                }
                let factor: ComptimeOption<f32> = scale.map(|scale| away_from_zero(scale[row]));
                let factor = factor.unwrap_or(1.0f32);
                let place = row * output.stride(0) + column * output.stride(1);
                output[place] = F::cast_from(sum * factor);
            }
        }
    }
    sync_cube();
}

/// The scale with zeros replaced by 1e-20, since its gradient divides by it.
#[cube]
fn away_from_zero(scale: f32) -> f32 {
    select(scale == 0.0f32, 1e-20f32, scale)
}

/// Partial `G = lhsᵀ·rhs` per span, each over `tiles` tiles of the summed axis.
///
/// `channels` is the rotated axis. A unit per column of `G`; tiles are read along the axis that lies in
/// memory without gaps.
#[cube(launch)]
pub(super) fn gram_kernel<F: Float>(
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

/// The gradient of the blocks from partial sums of `G`: a unit per row, then per column, of a span.
///
/// Per factor, from the last: `H = G·F_i`, whose coupled entries are `∂L/∂C`, then `G ← F_iᵀ·H`.
#[cube(launch)]
pub(super) fn block_gradient_kernel(
    partial: &[f32],
    blocks: &[f32],
    gradient: &mut [f32],
    #[comptime] b: usize,
    #[comptime] m: usize,
    #[comptime] per_cube: usize,
) {
    let s = comptime!(b << (m - 1));
    let line = comptime!(s + 1);
    let mut gram = Shared::<[f32]>::new_slice(comptime!(per_cube * s * (s + 1)));
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

/// Partial `Σ gradient ⊙ output` and `Σ gradient` per column, each over `rows` rows: a unit per column.
#[cube(launch)]
pub(super) fn column_sums_kernel<F: Float>(
    gradient: &Tensor<F>,
    output: &Tensor<F>,
    products: &mut [f32],
    sums: &mut [f32],
    #[comptime] rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let column = ABSOLUTE_POS_X as usize;
    if column < gradient.shape(1) {
        let first = CUBE_POS_Y as usize * rows;
        let mut product = 0.0f32;
        let mut sum = 0.0f32;
        for local in 0..rows {
            let row = first + local;
            if row < gradient.shape(0) {
                let left = f32::cast_from(
                    gradient[row * gradient.stride(0) + column * gradient.stride(1)],
                );
                let right =
                    f32::cast_from(output[row * output.stride(0) + column * output.stride(1)]);
                product += left * right;
                sum += left;
            }
        }
        let place = CUBE_POS_Y as usize * gradient.shape(1) + column;
        products[place] = product;
        sums[place] = sum;
    }
}
