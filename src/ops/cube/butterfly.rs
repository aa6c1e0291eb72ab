//! Rotations as one small matrix per span, applied in one pass over memory.
//!
//! Operands may have any strides and any float precision; sums run in f32.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::{into_contiguous, untile};
use burn_cubecl::tensor::CubeTensor;

use super::launch::{Sizes, UNITS, cubes, empty, units};
use crate::ops::butterfly::{Direction, Side};
use crate::ops::linear::{MAGNIFICATION, SHIFT};

/// Rows of activations that a cube rotates at once.
const ROTATED_ROWS: usize = 32;

/// `op(R)·t` or `t·op(R)`, times a scale per output channel of a weight.
pub(super) fn rotate(
    matrix: CubeTensor,
    blocks: CubeTensor,
    (sizes, element): (Sizes, ElemType),
    scale: Option<CubeTensor>,
    side: Side,
    direction: Direction,
) -> CubeTensor {
    let [rows, columns] = matrix.shape().dims::<2>();
    let matrix = untile(matrix);
    let rotations = compose(blocks, sizes, direction).into_buffer_arg();
    let scale = scale.map(CubeTensor::into_buffer_arg).into();
    let output = empty(&matrix, [rows, columns], matrix.dtype);
    let (client, matrix) = (output.client.clone(), matrix.into_tensor_arg());
    let result = output.clone().into_tensor_arg();
    match side {
        Side::Left => rotate_rows_kernel::launch(
            &client,
            cubes(columns.div_ceil(UNITS), sizes.count),
            units(UNITS),
            matrix,
            rotations,
            scale,
            result,
            sizes.span,
            element,
        ),
        Side::Right => {
            let width = UNITS / sizes.span * sizes.span;
            rotate_columns_kernel::launch(
                &client,
                cubes(columns.div_ceil(width), rows.div_ceil(ROTATED_ROWS)),
                units(width),
                matrix,
                rotations,
                scale,
                result,
                sizes.span,
                width,
                ROTATED_ROWS,
                element,
            )
        }
    }
    output
}

/// `op(R)` of every span, a `[count, span, span]` tensor.
fn compose(blocks: CubeTensor, sizes: Sizes, direction: Direction) -> CubeTensor {
    let blocks = into_contiguous(blocks);
    let Sizes { m, b, span, count } = sizes;
    let rotations = empty(&blocks, [count, span, span], DType::F32);
    let (per_cube, width) = sizes.per_cube();
    compose_kernel::launch(
        &rotations.client,
        cubes(count.div_ceil(per_cube), 1),
        units(width),
        blocks.into_buffer_arg(),
        rotations.clone().into_buffer_arg(),
        b,
        m,
        per_cube,
        direction == Direction::Back,
    );
    rotations
}

/// The place in the span of entry `index` of a block, whose halves are `2^stage` halves apart.
#[cube]
pub(super) fn coupled(
    block: usize,
    index: usize,
    #[comptime] b: usize,
    #[comptime] stage: usize,
) -> usize {
    let distance = comptime!(1usize << stage);
    let half = comptime!(b / 2);
    let start = block / distance * comptime!(b << stage) + block % distance * half;
    let mut place = start + index;
    if index >= half {
        place = start + comptime!(((b / 2) << stage) - b / 2) + index;
    }
    place
}

/// `op(R)` of every span. Each unit computes one column, which no other unit touches.
#[cube(launch)]
fn compose_kernel(
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

/// `op(R)·t` for a `[d, columns]` matrix with a scale per column. Each unit computes one column of a span.
#[cube(launch)]
fn rotate_rows_kernel<F: Float>(
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

/// `t·op(R)` for a `[rows, d]` matrix with a scale per row. Each unit computes `tile` rows of one column.
#[cube(launch)]
fn rotate_columns_kernel<F: Float>(
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

/// The rule for tiny scales, stated at [`crate::ops::linear::away_from_zero`].
#[cube]
fn away_from_zero(scale: f32) -> f32 {
    let is_zero = f32::abs(scale) * comptime!(MAGNIFICATION as f32) < 1.0f32;
    select(is_zero, scale + comptime!(SHIFT as f32), scale)
}
