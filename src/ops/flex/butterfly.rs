//! Rotations as one small matrix per span, applied in one pass over memory.
//!
//! `R = F_{m−1} ··· F_1 · F_0` is block-diagonal in spans of `s = b·2^(m−1)` neighbours (BOFT, section 4), so
//! [`compose`] multiplies the factors out once, for `m·b·s²` multiplications per span. The operand is then read once
//! and written once, whatever `m` is, while factor by factor it would be read and written `m` times. This costs `s`
//! multiplications for each number instead of `m·b`, which pays because moving the numbers takes longer than
//! multiplying them.

use std::borrow::Cow;
use std::mem::MaybeUninit;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::Real;
use super::span::{Scratch, Sizes, first_stage, multiply_by_stage, transpose};
use super::tile::{PASSING_ROWS, ROWS, add_scaled, line, with_tile};
use crate::ops::butterfly::Direction;

/// `op(R)` of every span, composed in f64.
///
/// # Shapes
///
/// - blocks: `[m, n, b, b]`, contiguous
/// - result: `[d/s, s, s]`, every span's matrix row by row
///
/// # Numerics
///
/// All factors are multiplied in f64 and the product is rounded once, so a composed rotation is as orthogonal as its
/// blocks are, to the rounding of `E`. [`Direction::Back`] transposes the same product and therefore rounds to the
/// same numbers. One factor is composed already.
pub(super) fn compose<E: Real>(blocks: &[E], sizes: Sizes, direction: Direction) -> Cow<'_, [E]> {
    if sizes.m == 1 && direction == Direction::Forward {
        return Cow::Borrowed(blocks);
    }
    let square = sizes.span * sizes.span;
    let arch = Arch::new();
    let task = sizes.spans_per_task();
    let mut rotations = vec![E::default(); sizes.count() * square];
    rotations
        .par_chunks_mut(task * square)
        .enumerate()
        .for_each(|(index, rotations)| {
            arch.dispatch(Compose {
                rotations,
                blocks,
                sizes,
                first: index * task,
                direction,
            });
        });
    Cow::Owned(rotations)
}

/// Some spans of [`compose`]. The scratch for a span in f64 is allocated once for all of them.
struct Compose<'a, E> {
    rotations: &'a mut [E],
    blocks: &'a [E],
    sizes: Sizes,
    /// The first of the spans.
    first: usize,
    direction: Direction,
}

impl<E: Real> WithSimd for Compose<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let s = self.sizes.span;
        let mut product = vec![0.0; s * s];
        let mut scratch = Scratch::new(self.sizes.b);
        for (index, rotation) in self.rotations.chunks_exact_mut(s * s).enumerate() {
            let span = self.first + index;
            first_stage(&mut product, self.blocks, self.sizes, span);
            for stage in 1..self.sizes.m {
                multiply_by_stage(
                    &mut product,
                    self.blocks,
                    self.sizes,
                    (stage, span),
                    Direction::Forward,
                    &mut scratch,
                );
            }
            if self.direction == Direction::Back {
                transpose(&mut product, s);
            }
            for (value, &product) in rotation.iter_mut().zip(&product) {
                *value = E::rounded(product);
            }
        }
    }
}

/// `op(R)·t` for a `[d, columns]` matrix, with a scale per column.
///
/// For weights as Burn stores them. The rows of a span lie together in memory, so each span is a task with one slice
/// of the operand and one of the result, and no task shares either.
///
/// # Shapes
///
/// - matrix: `[d, columns]`, contiguous; so is the result
/// - rotation: `[d/s, s, s]`
/// - scale: `[columns]`
///
/// # Numerics
///
/// Sums of `s` fused multiply-adds in `E`, then one multiplication by the scale.
pub(super) fn rotate_rows<E: Real>(
    matrix: &[E],
    rotation: &[E],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[E]>,
) -> Vec<E> {
    let s = sizes.span;
    let arch = Arch::new();
    let spans = matrix
        .par_chunks(s * columns)
        .zip(rotation.par_chunks(s * s));
    written(rows * columns, |output| {
        output
            .par_chunks_mut(s * columns)
            .zip(spans)
            .for_each(|(output, (matrix, rotation))| {
                arch.dispatch(RotateRows {
                    output,
                    matrix,
                    rotation,
                    columns,
                    scale,
                });
            });
    })
}

/// A vector of `len` numbers, every one of which `write` writes.
///
/// It spares the pass over memory that would fill the vector with zeros first.
pub(super) fn written<E: Real>(len: usize, write: impl FnOnce(&mut [MaybeUninit<E>])) -> Vec<E> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: every caller writes every number: every span of every row, and in it every tile.
    unsafe { values.set_len(len) };
    values
}

/// One span of [`rotate_rows`]. Its kernel takes four, two or one rows of the result at a time, whichever divides the
/// span.
struct RotateRows<'a, E> {
    output: &'a mut [MaybeUninit<E>],
    matrix: &'a [E],
    rotation: &'a [E],
    columns: usize,
    scale: Option<&'a [E]>,
}

impl<E: Real> WithSimd for RotateRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.matrix.len() / self.columns % 4 {
            0 => rotate_span_rows::<E, 4>(self),
            2 => rotate_span_rows::<E, 2>(self),
            _ => rotate_span_rows::<E, 1>(self),
        }
    }
}

/// Columns that stay in registers while rows of the rotation meet them.
///
/// With four rows of the result these are 64 sums. In f32 a tile's row is one cache line of 64 bytes.
const TILE: usize = 16;

/// Rotates one span, `LINES` rows of the result at a time.
///
/// From the outside in, the loops run over tiles of [`TILE`] columns, over groups of `LINES` rows of the result, and
/// over the `s` rows of the operand. Inside a tile of columns the operand's `s` pieces are read `s/LINES` times, but
/// they have only `64·s` bytes in f32 and stay in a first-level cache, and so does the rotation. Each number of the
/// result is written once. Columns beyond the last full tile are rotated one by one.
#[inline(always)]
fn rotate_span_rows<E: Real, const LINES: usize>(
    RotateRows {
        output,
        matrix,
        rotation,
        columns,
        scale,
    }: RotateRows<'_, E>,
) {
    let s = matrix.len() / columns;
    let tiles = columns / TILE * TILE;
    for start in (0..tiles).step_by(TILE) {
        for first in (0..s).step_by(LINES) {
            let mut sums = [[E::default(); TILE]; LINES];
            for inner in 0..s {
                let source = line::<E, TILE>(matrix, inner * columns + start);
                for (index, sums) in sums.iter_mut().enumerate() {
                    add_scaled(sums, rotation[(first + index) * s + inner], source);
                }
            }
            if let Some(scale) = scale {
                let scale = line::<E, TILE>(scale, start);
                for sums in &mut sums {
                    for (sum, &scale) in sums.iter_mut().zip(scale) {
                        *sum = *sum * scale;
                    }
                }
            }
            for (index, sums) in sums.iter().enumerate() {
                output[(first + index) * columns + start..][..TILE].write_copy_of_slice(sums);
            }
        }
    }
    for column in tiles..columns {
        for row in 0..s {
            let mut sum = E::default();
            for inner in 0..s {
                sum = rotation[row * s + inner].mul_add(matrix[inner * columns + column], sum);
            }
            output[row * columns + column].write(match scale {
                Some(scale) => sum * scale[column],
                None => sum,
            });
        }
    }
}

/// `t·op(R)` for a `[rows, d]` matrix, with a scale per row.
///
/// For activations, and for weights that have their outputs in rows. A span's numbers are a short piece of each row,
/// so tasks take whole rows: [`PASSING_ROWS`] at a time, and [`ROWS`] for a thread.
///
/// # Shapes
///
/// - matrix: `[rows, d]`, contiguous; so is the result
/// - rotation: `[d/s, s, s]`
/// - scale: `[rows]`
///
/// # Numerics
///
/// Sums of `s` fused multiply-adds in `E`, then one multiplication by the scale. Rows that do not fill a tile are
/// summed in the same order, so a row's result does not depend on how many others there are.
pub(super) fn rotate_columns<E: Real>(
    matrix: &[E],
    rotation: &[E],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[E]>,
) -> Vec<E> {
    let s = sizes.span;
    let arch = Arch::new();
    let rotate = |(task, (output, matrix)): (usize, (&mut [MaybeUninit<E>], &[E]))| {
        arch.dispatch(RotateColumns {
            output,
            matrix,
            rotation,
            s,
            columns,
            scale: scale.map(|scale| &scale[task * PASSING_ROWS..]),
        });
    };
    written(rows * columns, |output| {
        // Rows for a single thread do not wait for another one to wake up.
        if rows <= ROWS {
            let outputs = output.chunks_mut(PASSING_ROWS * columns);
            let tasks = outputs.zip(matrix.chunks(PASSING_ROWS * columns));
            return tasks.enumerate().for_each(rotate);
        }
        output
            .par_chunks_mut(PASSING_ROWS * columns)
            .zip(matrix.par_chunks(PASSING_ROWS * columns))
            .enumerate()
            .with_min_len(ROWS / PASSING_ROWS)
            .for_each(rotate);
    })
}

/// Up to [`PASSING_ROWS`] rows of [`rotate_columns`], with the scales from the first of them on.
pub(super) struct RotateColumns<'a, E> {
    pub(super) output: &'a mut [MaybeUninit<E>],
    pub(super) matrix: &'a [E],
    pub(super) rotation: &'a [E],
    pub(super) s: usize,
    pub(super) columns: usize,
    pub(super) scale: Option<&'a [E]>,
}

impl<E: Real> WithSimd for RotateColumns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        with_tile!(self.s, LINES, LINE => rotate_span_columns::<E, LINES, LINE>(self))
    }
}

/// Rotates every span of the rows, `LINES` rows by `LINE` columns of the result at a time.
///
/// From the outside in, the loops run over spans, over pieces of `LINE` columns within the span, over groups of
/// `LINES` rows, and over the `s` numbers of the span. The rotation's matrix stays in a first-level cache while all
/// rows of the task pass by. The innermost step multiplies one number of each row by a piece of one row of the
/// rotation, so that vectors run along the rotation's rows and the operand needs no transposing.
#[inline(always)]
fn rotate_span_columns<E: Real, const LINES: usize, const LINE: usize>(
    RotateColumns {
        output,
        matrix,
        rotation,
        s,
        columns,
        scale,
    }: RotateColumns<'_, E>,
) {
    for (span, rotation) in rotation.chunks_exact(s * s).enumerate() {
        for start in (0..s).step_by(LINE) {
            let place = span * s + start;
            let outputs = output.chunks_mut(LINES * columns);
            let tiles = outputs.zip(matrix.chunks(LINES * columns)).enumerate();
            for (tile, (output, matrix)) in tiles {
                let mut sums = [[E::default(); LINE]; LINES];
                let rows = matrix.len() / columns;
                if rows == LINES {
                    for inner in 0..s {
                        let rotation = line(rotation, inner * s + start);
                        for (row, sums) in sums.iter_mut().enumerate() {
                            add_scaled::<E, LINE>(
                                sums,
                                matrix[row * columns + span * s + inner],
                                rotation,
                            );
                        }
                    }
                } else {
                    for (row, sums) in sums.iter_mut().enumerate().take(rows) {
                        for inner in 0..s {
                            let value = matrix[row * columns + span * s + inner];
                            add_scaled::<E, LINE>(sums, value, line(rotation, inner * s + start));
                        }
                    }
                }
                for (row, sums) in sums.iter_mut().enumerate().take(rows) {
                    if let Some(scale) = scale {
                        let scale = scale[tile * LINES + row];
                        sums.iter_mut().for_each(|sum| *sum = *sum * scale);
                    }
                    output[row * columns + place..][..LINE].write_copy_of_slice(sums);
                }
            }
        }
    }
}
