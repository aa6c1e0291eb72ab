//! The Cayley map and its backward pass in f32. Each unit works on one row of a block in shared memory.
//!
//! Rows in shared memory are one number longer than those of the block, so that units that walk along their own rows
//! use different memory banks. Several blocks share a cube as far as its memory and its units reach, and one launch
//! serves all blocks of all factors of a layer.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{cubes, empty, units};

/// Launches [`cayley_kernel`].
///
/// # Shapes
///
/// - skew: `[m, n, b(b−1)/2]`, in f32
/// - result: `[m, n, b, b]`
pub(super) fn cayley(skew: CubeTensor, b: usize, per_cube: usize) -> CubeTensor {
    let [m, n, _] = skew.shape().dims::<3>();
    let skew = into_contiguous(skew);
    let blocks = empty(&skew, [m, n, b, b], DType::F32);
    cayley_kernel::launch(
        &blocks.client,
        cubes((m * n).div_ceil(per_cube), 1),
        units(per_cube * b),
        skew.into_buffer_arg(),
        blocks.clone().into_buffer_arg(),
        b,
        per_cube,
    );
    blocks
}

/// Launches [`cayley_backward_kernel`].
///
/// # Shapes
///
/// - blocks, gradient: `[m, n, b, b]`, in f32
/// - result: `[m, n, b(b−1)/2]`
pub(super) fn cayley_backward(
    blocks: CubeTensor,
    gradient: CubeTensor,
    per_cube: usize,
) -> CubeTensor {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let (blocks, gradient) = (into_contiguous(blocks), into_contiguous(gradient));
    let skew = empty(&blocks, [m, n, b * (b - 1) / 2], DType::F32);
    cayley_backward_kernel::launch(
        &skew.client,
        cubes((m * n).div_ceil(per_cube), 1),
        units(per_cube * b),
        blocks.into_buffer_arg(),
        gradient.into_buffer_arg(),
        skew.clone().into_buffer_arg(),
        b,
        per_cube,
    );
    skew
}

/// `C = 2(I + Q)⁻¹ − I` by sweeps, then one Newton-Schulz step; see the portable version.
///
/// A sweep on `k` is the rank-one update `A ← A − (A[:,k] − e_k)·(A[k,:] + e_k)/p`: the unit of row `k` writes
/// `(A[k,:] + e_k)/p` to the scratch, and after a barrier every unit subtracts its multiple of it from its own row.
/// After `b` sweeps with two barriers each, the matrix is `(I + Q)⁻¹`.
///
/// The Newton-Schulz step corrects from the left here, `C + ½ (I − C·Cᵀ)·C`, which is the same in exact arithmetic,
/// since a unit then needs only its own row of `I − C·Cᵀ`, which the scratch holds.
///
/// # Numerics
///
/// In f32. The step squares the orthogonality defect of the sweeps, about `ε·‖Q‖²`. A skew of zeros gives exactly
/// `I`.
#[cube(launch)]
fn cayley_kernel(
    skew: &[f32],
    blocks: &mut [f32],
    #[comptime] b: usize,
    #[comptime] per_cube: usize,
) {
    let line = comptime!(b + 1);
    let mut matrices = Shared::<[f32]>::new_slice(comptime!(per_cube * b * (b + 1)));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(per_cube * b * (b + 1)));

    let row = UNIT_POS_X as usize % b;
    let place = UNIT_POS_X as usize / b;
    let block = CUBE_POS_X as usize * per_cube + place;
    let is_block = block * b * b < blocks.len();
    let matrix = place * b * line;
    let own = matrix + row * line;

    // Units beyond the last block work on an identity, so that all units reach the barriers.
    for column in 0..b {
        let mut value = 0.0f32;
        if row == column {
            value = 1.0f32;
        } else if is_block {
            let packed = block * comptime!(b * (b - 1) / 2);
            if row < column {
                value = skew[packed + packed_index(row, column, b)];
            } else {
                value = 0.0f32 - skew[packed + packed_index(column, row, b)];
            }
        }
        matrices[own + column] = value;
    }
    for k in 0..b {
        // One unit scales the row of the sweep; then every unit updates its own row with it.
        if row == k {
            let pivot = matrices[own + k];
            for column in 0..b {
                let mut value = matrices[own + column];
                if column == k {
                    value += 1.0f32;
                }
                scratch[matrix + column] = value / pivot;
            }
        }
        sync_cube();
        let mut factor = matrices[own + k];
        if row == k {
            factor -= 1.0f32;
        }
        for column in 0..b {
            matrices[own + column] -= factor * scratch[matrix + column];
        }
        sync_cube();
    }
    for column in 0..b {
        let mut value = 2.0f32 * matrices[own + column];
        if row == column {
            value -= 1.0f32;
        }
        matrices[own + column] = value;
    }
    sync_cube();
    // C + ½ (I − C·Cᵀ)·C, row by row.
    for other in 0..b {
        let mut defect = 0.0f32;
        if row == other {
            defect = 1.0f32;
        }
        for column in 0..b {
            defect -= matrices[own + column] * matrices[matrix + other * line + column];
        }
        scratch[own + other] = defect;
    }
    if is_block {
        for column in 0..b {
            let mut correction = 0.0f32;
            for other in 0..b {
                correction += scratch[own + other] * matrices[matrix + other * line + column];
            }
            blocks[(block * b + row) * b + column] = matrices[own + column] + 0.5f32 * correction;
        }
    }
    // A runtime may give the shared memory to the next cube as soon as a unit of this one ends.
    sync_cube();
}

/// `∂v_ij = D_ij − D_ji` with `D = −½ (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ`.
///
/// The unit of row `i` forms row `i` of `P = (I + C)ᵀ·∂L/∂C` in shared memory. After a barrier it writes the skew
/// numbers `(i, j)` for `j > i`, each from two dot products: row `i` of `P` with row `j` of `I + C`, less row `j` of
/// `P` with row `i` of `I + C`. Both run along rows, so nothing is transposed.
///
/// # Numerics
///
/// In f32.
#[cube(launch)]
fn cayley_backward_kernel(
    blocks: &[f32],
    gradient: &[f32],
    skew: &mut [f32],
    #[comptime] b: usize,
    #[comptime] per_cube: usize,
) {
    let line = comptime!(b + 1);
    let mut shifted = Shared::<[f32]>::new_slice(comptime!(per_cube * b * (b + 1)));
    let mut product = Shared::<[f32]>::new_slice(comptime!(per_cube * b * (b + 1)));

    let row = UNIT_POS_X as usize % b;
    let place = UNIT_POS_X as usize / b;
    let block = CUBE_POS_X as usize * per_cube + place;
    let is_block = block * b * b < blocks.len();
    let matrix = place * b * line;
    let own = matrix + row * line;

    for column in 0..b {
        let mut value = 0.0f32;
        if is_block {
            value = blocks[(block * b + row) * b + column];
        }
        if row == column {
            value += 1.0f32;
        }
        shifted[own + column] = value;
    }
    sync_cube();
    // (I + C)ᵀ·∂L/∂C.
    for column in 0..b {
        let mut sum = 0.0f32;
        if is_block {
            for k in 0..b {
                sum += shifted[matrix + k * line + row] * gradient[(block * b + k) * b + column];
            }
        }
        product[own + column] = sum;
    }
    sync_cube();
    if is_block {
        for column in row + 1..b {
            let other = matrix + column * line;
            let mut difference = 0.0f32;
            for k in 0..b {
                difference += product[own + k] * shifted[other + k];
                difference -= product[other + k] * shifted[own + k];
            }
            let packed = block * comptime!(b * (b - 1) / 2);
            skew[packed + packed_index(row, column, b)] = -0.5f32 * difference;
        }
    }
    sync_cube();
}

/// The place of an entry of the strict upper triangle among the packed numbers: the `row` rows above it hold
/// `row·b − row·(row + 1)/2` of them.
#[cube]
fn packed_index(row: usize, column: usize, #[comptime] b: usize) -> usize {
    row * b - row * (row + 1) / 2 + column - row - 1
}
