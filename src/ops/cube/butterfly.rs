//! Rotations as one small matrix per span, applied in one pass over memory.
//!
//! Operands may have any strides and any of the kernels' precisions; sums run in f32. A first launch composes the
//! factors of each span (BOFT, section 4), a second applies the matrices, reading and writing each number of the
//! operand once for any number of factors.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::{into_contiguous, untile};
use burn_cubecl::tensor::CubeTensor;

use super::launch::{CUBES, Sizes, UNITS, cubes, empty, units};
use crate::ops::butterfly::{Direction, Side};
use crate::ops::linear::{MAGNIFICATION, SHIFT};

/// Rows of activations that a cube rotates at once. With 128 columns of f32 they fill the 16 KiB of shared memory
/// that every device has.
const ROTATED_ROWS: usize = 32;

/// Whether a grid has enough cubes for a matrix of this shape.
pub(super) fn is_covered([rows, columns]: [usize; 2], side: Side) -> bool {
    match side {
        Side::Left => columns.div_ceil(UNITS) <= CUBES,
        Side::Right => rows.div_ceil(ROTATED_ROWS) <= CUBES,
    }
}

/// `op(R)·t` or `t·op(R)`, times a scale per output channel of a weight. The caller has asked whether the matrix
/// [`is_covered`].
///
/// # Shapes
///
/// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`], with any strides
/// - scale: in f32, a number per column on the left, per row on the right
/// - result: as the matrix, contiguous
///
/// # Numerics
///
/// Sums in f32, times the scale in f32, rounded once to the matrix's precision.
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

/// `op(R)` of every span.
///
/// # Shapes
///
/// - blocks: `[m, n, b, b]`, in f32
/// - result: `[count, span, span]`, in f32
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
///
/// `block` counts from the first block of the span. The span is seen as `[chunk, 2, 2^stage, b/2]`, of which a block
/// takes both entries of the second axis: with `b = 4` and stage 1, block 0 couples the places 0, 1, 4 and 5. The
/// kernels index their operands with it, so that no permutation is stored and nothing is moved.
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
///
/// It starts from a column of the identity and multiplies it by `F_0`, `F_1`, … in turn, block by block: the `b`
/// results of a block wait in registers until all of them have read the column, then replace it. No barrier is needed
/// in between. In a row of shared memory, neighbouring units use neighbouring numbers, and all units of a span read
/// the same number of a block at once.
///
/// # Numerics
///
/// In f32, with the rounding of `m` products.
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
///
/// For weights as Burn stores them. A cube takes 128 columns of one span and loads the span's rotation into shared
/// memory, where all units read the same number at once. A unit reads its `s` numbers into registers, then forms and
/// writes one result after another. Neighbouring units read and write neighbouring columns, which are neighbours in
/// memory in a contiguous matrix. The grid is 128 columns along `x`, a span along `y`.
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
///
/// For activations, and for weights that have their outputs in rows. Compared to `rotate_rows_kernel` the roles are
/// swapped: a cube loads `tile` rows of `width` columns, whole spans only, into shared memory, and each unit keeps
/// the one column of the rotation that it needs in registers for all of the rows. Units of a span read the same
/// number of the operand at once, and neighbouring units write neighbouring columns. The grid is `width` columns
/// along `x`, `tile` rows along `y`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_covers_two_million_rows_and_eight_million_columns() {
        assert!(is_covered([2_097_120, 8], Side::Right));
        assert!(!is_covered([2_097_121, 8], Side::Right));
        assert!(is_covered([8, 8_388_480], Side::Left));
        assert!(!is_covered([8, 8_388_481], Side::Left));
    }
}
