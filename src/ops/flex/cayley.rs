//! The Cayley map and its backward pass, a block at a time in f64.
//!
//! The portable version works on all blocks at once and therefore makes `b` passes over memory. Here a block stays in
//! a first-level cache from the first sweep to the last, and sweeps in f64 take the place of the Newton-Schulz step.

use std::mem;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::Real;
use super::tile::multiply;
use crate::ops::cayley::upper_triangle;

/// The blocks of one task, enough work to be worth a thread: about 32,768 multiplications, of which a block takes
/// `b³`.
fn blocks_per_task(b: usize) -> usize {
    (32_768 / (b * b * b)).max(1)
}

/// `C = (I − Q)(I + Q)⁻¹ = 2(I + Q)⁻¹ − I` for every block, by sweeps in place.
///
/// # Shapes
///
/// - skew: `[m, n, b(b−1)/2]`, contiguous, the strict upper triangles row by row
/// - result: `[m, n, b, b]`, contiguous
///
/// # Numerics
///
/// Inverted in f64 and rounded once. The sweeps leave an orthogonality defect of about `ε·‖Q‖²` in f64, far below the
/// rounding to f32, so that the Newton-Schulz step of the portable version is not needed. For a skew in f64 that
/// defect remains. A skew of zeros gives exactly `I`.
///
/// # References
///
/// Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, section 3.
pub(super) fn cayley<E: Real>(skew: &[E], b: usize) -> Vec<E> {
    let packed = b * (b - 1) / 2;
    let count = skew.len() / packed;
    let mut blocks = vec![E::default(); count * b * b];
    let task = blocks_per_task(b);
    let arch = Arch::new();
    blocks
        .par_chunks_mut(b * b * task)
        .zip(skew.par_chunks(packed * task))
        .for_each(|(blocks, skew)| arch.dispatch(Cayley { blocks, skew, b }));
    blocks
}

/// Runs a kernel with the common block sizes as constants, for which the compiler unrolls its loops.
///
/// With a variable size, a sweep over a `4×4` block is mostly checks of bounds and of the loop's end.
macro_rules! with_block_size {
    ($size:expr, $b:ident => $run:expr) => {
        match $size {
            2 => {
                let $b = 2;
                $run
            }
            4 => {
                let $b = 4;
                $run
            }
            8 => {
                let $b = 8;
                $run
            }
            $b => $run,
        }
    };
}

/// Some blocks of [`cayley`], with their skew numbers in the same order.
struct Cayley<'a, E> {
    blocks: &'a mut [E],
    skew: &'a [E],
    b: usize,
}

impl<E: Real> WithSimd for Cayley<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { blocks, skew, b } = self;
        with_block_size!(b, b => cayley_blocks(blocks, skew, b));
    }
}

/// Builds `I + Q` for each block, inverts it and writes `2(I + Q)⁻¹ − I`. All blocks of a task share one scratch
/// matrix.
#[inline(always)]
fn cayley_blocks<E: Real>(blocks: &mut [E], skew: &[E], b: usize) {
    let mut inverse = vec![0.0; b * b];
    for (block, skew) in blocks
        .chunks_exact_mut(b * b)
        .zip(skew.chunks_exact(b * (b - 1) / 2))
    {
        (0..b).for_each(|i| inverse[i * (b + 1)] = 1.0);
        for (&value, (row, column)) in skew.iter().zip(upper_triangle(b)) {
            inverse[row * b + column] = value.into();
            inverse[column * b + row] = -value.into();
        }
        invert(&mut inverse, b);
        for (value, inverse) in block.iter_mut().zip(&inverse) {
            *value = E::rounded(2.0 * inverse);
        }
        for i in 0..b {
            block[i * (b + 1)] = E::rounded(2.0 * inverse[i * (b + 1)] - 1.0);
        }
    }
}

/// Inverts in place by Gauss-Jordan sweeps, without pivoting: the symmetric part of the matrix is the identity.
///
/// The sweep on `k`, with pivot `p = A[k,k]`, for rows `i` and columns `j` other than `k`:
///
/// ```text
/// A[k,j] ← A[k,j] / p      A[i,j] ← A[i,j] − A[i,k]·A[k,j]      A[i,k] ← −A[i,k] / p      A[k,k] ← 1 / p
/// ```
///
/// Each pivot is that of a Schur complement, whose symmetric part is at least `I` again, so that `p ≥ 1` in every
/// sweep. This is the rank-one update of the portable version, written out for each entry.
///
/// With `1` in place of `A[k,k]` and `0` in place of `A[i,k]`, the rule for `A[i,j]` serves all columns, so that whole
/// rows are updated by vector instructions.
#[inline(always)]
fn invert(matrix: &mut [f64], b: usize) {
    for k in 0..b {
        let (above, rest) = matrix.split_at_mut(k * b);
        let (pivots, below) = rest.split_at_mut(b);
        let reciprocal = 1.0 / pivots[k];
        pivots[k] = 1.0;
        pivots.iter_mut().for_each(|pivot| *pivot *= reciprocal);
        eliminate(above, pivots, k);
        eliminate(below, pivots, k);
    }
}

/// Takes the entry in column `k` out of rows, in whose place the sweep has `−A[i,k] / p`.
#[inline(always)]
fn eliminate(rows: &mut [f64], pivots: &[f64], k: usize) {
    for row in rows.chunks_exact_mut(pivots.len()) {
        let factor = -mem::take(&mut row[k]);
        for (value, &pivot) in row.iter_mut().zip(pivots) {
            *value = factor.mul_add(pivot, *value);
        }
    }
}

/// The gradient of the skew numbers, `∂v_ij = D_ij − D_ji` with `D = −½ (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ`.
///
/// It reads the output of [`cayley`] instead of inverting again, since `(I + Q)⁻¹ = ½ (I + C)`.
///
/// # Shapes
///
/// - blocks, gradient: `[m, n, b, b]`, contiguous
/// - result: `[m, n, b(b−1)/2]`
///
/// # Numerics
///
/// In f64, rounded once.
pub(super) fn cayley_backward<E: Real>(blocks: &[E], gradient: &[E], b: usize) -> Vec<E> {
    let packed = b * (b - 1) / 2;
    let mut skew = vec![E::default(); blocks.len() / (b * b) * packed];
    let task = blocks_per_task(b);
    let arch = Arch::new();
    skew.par_chunks_mut(packed * task)
        .zip(
            blocks
                .par_chunks(b * b * task)
                .zip(gradient.par_chunks(b * b * task)),
        )
        .for_each(|(skew, (blocks, gradient))| {
            arch.dispatch(CayleyBackward {
                skew,
                blocks,
                gradient,
                b,
            });
        });
    skew
}

/// Some blocks of [`cayley_backward`], with their gradients and their skew numbers in the same order.
struct CayleyBackward<'a, E> {
    skew: &'a mut [E],
    blocks: &'a [E],
    gradient: &'a [E],
    b: usize,
}

impl<E: Real> WithSimd for CayleyBackward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self {
            skew,
            blocks,
            gradient,
            b,
        } = self;
        with_block_size!(b, b => skew_gradients(skew, blocks, gradient, b));
    }
}

/// Computes `−½ (P_ij − P_ji)` with `P = (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ`.
///
/// `shifted` holds `(I + C)ᵀ` row by row, transposed once when it is filled.
#[inline(always)]
fn skew_gradients<E: Real>(skew: &mut [E], blocks: &[E], gradient: &[E], b: usize) {
    let [mut shifted, mut wide, mut product] = [(); 3].map(|()| vec![0.0; b * b]);
    let matrices = blocks.chunks_exact(b * b).zip(gradient.chunks_exact(b * b));
    for (skew, (block, gradient)) in skew.chunks_exact_mut(b * (b - 1) / 2).zip(matrices) {
        for (row, values) in block.chunks_exact(b).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                shifted[column * b + row] = value.into();
            }
        }
        (0..b).for_each(|i| shifted[i * (b + 1)] += 1.0);
        for (wide, &value) in wide.iter_mut().zip(gradient) {
            *wide = value.into();
        }
        multiply(&mut product, &shifted, &wide, b);
        multiply(&mut wide, &product, &shifted, b);
        for (value, (row, column)) in skew.iter_mut().zip(upper_triangle(b)) {
            *value = E::rounded(-0.5 * (wide[row * b + column] - wide[column * b + row]));
        }
    }
}
