//! Rotations as one small matrix per span, applied in one pass over memory.
//!
//! `R = F_{m−1} ··· F_1 · F_0` is block-diagonal in spans of `s = b·2^(m−1)` neighbours (BOFT, section 4), so
//! [`compose`] multiplies the factors out once, for `m·b·s²` multiplications per span. The operand is then read once
//! and written once, whatever `m` is, while factor by factor it would be read and written `m` times. This costs `s`
//! multiplications for each number instead of `m·b`, which pays because moving the numbers takes longer than
//! multiplying them.

use std::borrow::Cow;
use std::mem::MaybeUninit;

use burn::tensor::Element;
use bytemuck::Pod;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::{Real, lanes};
use super::span::{Scratch, Sizes, first_stage, multiply_by_stage, transpose};
use super::tile::{
    PASSING_ROWS, ROWS, Tile, add_scaled, dispatch, line, registers, with_registers, with_tile,
};
use crate::ops::butterfly::{Direction, Side};

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

/// `op(R)·t` on the left or `t·op(R)` on the right, with a scale per column on the left and per row on the right.
///
/// On the left, for weights as Burn stores them, the rows of a span lie together in memory, so each span is a task with one
/// slice of the operand and one of the result, and no task shares either. On the right, for activations, and for weights that
/// have their outputs in rows, a span's numbers are a short piece of each row, so tasks take whole rows: [`PASSING_ROWS`] at a
/// time, and [`ROWS`] for a thread.
///
/// # Shapes
///
/// - matrix: `[d, columns]` or `[rows, d]`, contiguous; so is the result
/// - rotation: `[d/s, s, s]`
/// - scale: `[columns]` or `[rows]`
///
/// # Numerics
///
/// Sums of `s` fused multiply-adds in the precision of the rotation, then one multiplication by the scale. Rows that do not fill
/// a tile are summed in the same order, so a row's result does not depend on how many others there are.
///
/// # Panics
///
/// - If the rotation is for another number of channels, or the matrix has another shape.
pub(super) fn rotate<T: Stored>(
    matrix: &[T],
    rotation: &[T::Real],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[T::Real]>,
    side: Side,
) -> Vec<T> {
    let s = sizes.span;
    let channels = match side {
        Side::Left => rows,
        Side::Right => columns,
    };
    // With these, every number of the result is written below.
    assert_eq!(
        rotation.len(),
        channels * s,
        "a rotation of {channels} channels"
    );
    assert_eq!(matrix.len(), rows * columns, "a [{rows}, {columns}] matrix");
    if matrix.is_empty() {
        return Vec::new();
    }
    match side {
        Side::Left => {
            let spans = matrix
                .par_chunks(s * columns)
                .zip(rotation.par_chunks(s * s));
            let write = |output: &mut [MaybeUninit<T>]| {
                let spans = output.par_chunks_mut(s * columns).zip(spans);
                spans.for_each(|(output, (matrix, rotation))| {
                    let task = Task {
                        output,
                        matrix,
                        stride: columns,
                        rotation,
                        s,
                        columns,
                        scale,
                        side,
                    };
                    dispatch::<T::Real, _>(columns, task);
                });
            };
            // SAFETY: the assertions say that there is a rotation and a part of the matrix for every span.
            unsafe { written(rows * columns, write) }
        }
        Side::Right => {
            let rotate = |(index, (output, matrix)): (usize, (&mut [MaybeUninit<T>], &[T]))| {
                let task = Task {
                    output,
                    matrix,
                    stride: columns,
                    rotation,
                    s,
                    columns,
                    scale: scale.map(|scale| &scale[index * PASSING_ROWS..]),
                    side,
                };
                dispatch::<T::Real, _>(s, task);
            };
            let write = |output: &mut [MaybeUninit<T>]| {
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
            };
            // SAFETY: the assertions say that there is a row of the matrix for every row, and a rotation for every span of it.
            unsafe { written(rows * columns, write) }
        }
    }
}

/// A vector of `len` numbers, every one of which `write` writes.
///
/// It spares the pass over memory that would fill the vector with zeros first.
///
/// # Safety
///
/// `write` writes every number, or panics.
pub(super) unsafe fn written<T>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut values = Vec::new();
    // SAFETY: as the caller promises.
    unsafe { overwrite(&mut values, len, write) };
    values
}

/// [`written`] in the memory of a vector whose numbers nobody needs any more.
///
/// # Safety
///
/// `write` writes every number, or panics.
pub(super) unsafe fn overwrite<T>(
    values: &mut Vec<T>,
    len: usize,
    write: impl FnOnce(&mut [MaybeUninit<T>]),
) {
    values.clear();
    values.reserve(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: there is memory for them, and the caller promises that they are written.
    unsafe { values.set_len(len) };
}

/// A precision that a matrix may have where it is rotated.
pub(super) trait Stored: Element + Pod + Send + Sync {
    /// The precision that it is computed in.
    type Real: Real;

    /// Rotates a part of the matrix.
    fn run<S: Simd>(simd: S, task: Task<'_, Self>);
}

impl<E: Real> Stored for E {
    type Real = E;

    #[inline(always)]
    fn run<S: Simd>(simd: S, task: Task<'_, E>) {
        task.run(simd);
    }
}

/// What one thread rotates: the rows of a span on the left; up to [`PASSING_ROWS`] rows on the right, with the scales from the
/// first of them on.
pub(super) struct Task<'a, T: Stored> {
    pub(super) output: &'a mut [MaybeUninit<T>],
    pub(super) matrix: &'a [T],
    /// From one row of the matrix to the next: on the left there may be more columns than are rotated.
    pub(super) stride: usize,
    pub(super) rotation: &'a [T::Real],
    pub(super) s: usize,
    pub(super) columns: usize,
    pub(super) scale: Option<&'a [T::Real]>,
    pub(super) side: Side,
}

impl<T: Stored> WithSimd for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        T::run(simd, self);
    }
}

impl<E: Real> Task<'_, E> {
    /// Rotates numbers that are stored as they are computed.
    #[inline(always)]
    pub(super) fn run<S: Simd>(self, simd: S) {
        let s = self.s;
        match self.side {
            // Four, two or one rows of the result at a time, whichever divides the span.
            Side::Left if s.is_multiple_of(4) => self.rotate_rows::<S, 4>(simd),
            Side::Left if s.is_multiple_of(2) => self.rotate_rows::<S, 2>(simd),
            Side::Left => self.rotate_rows::<S, 1>(simd),
            Side::Right => simd.vectorize(Columns(self)),
        }
    }

    /// Rotates the span, `LINES` rows of the result at a time.
    ///
    /// From the outside in, the loops run over two registers of columns, over groups of `LINES` rows of the result, and over
    /// the `s` rows of the operand. Inside a tile of columns the operand's `s` pieces are read `s/LINES` times, but they have
    /// a few KiB and stay in a first-level cache, and so does the rotation. Each number of the result is written once. Columns
    /// beyond the last full register are rotated one by one.
    #[inline(always)]
    fn rotate_rows<S: Simd, const LINES: usize>(mut self, simd: S) {
        let (s, columns, lanes) = (self.s, self.columns, lanes::<E, S>());
        let [pairs, registers] = [2 * lanes, lanes].map(|width| columns / width * width);
        for start in (0..pairs).step_by(2 * lanes) {
            for first in (0..s).step_by(LINES) {
                self.tile_of_rows(Tile::<E, S, LINES, 2>::zero(simd), first, start);
            }
        }
        for start in (pairs..registers).step_by(lanes) {
            for first in (0..s).step_by(LINES) {
                self.tile_of_rows(Tile::<E, S, LINES, 1>::zero(simd), first, start);
            }
        }
        for column in registers..columns {
            for row in 0..s {
                let mut sum = E::default();
                for inner in 0..s {
                    let factor = self.rotation[row * s + inner];
                    sum = factor.mul_add(self.matrix[inner * self.stride + column], sum);
                }
                self.output[row * columns + column].write(match self.scale {
                    Some(scale) => sum * scale[column],
                    None => sum,
                });
            }
        }
    }

    /// `LINES` rows of the result from `first` on, in the columns from `start` on.
    #[inline(always)]
    fn tile_of_rows<S: Simd, const LINES: usize, const WIDTH: usize>(
        &mut self,
        mut tile: Tile<E, S, LINES, WIDTH>,
        first: usize,
        start: usize,
    ) {
        let s = self.s;
        let mut factors = [self.rotation; LINES];
        for (index, factors) in factors.iter_mut().enumerate() {
            *factors = &self.rotation[(first + index) * s..][..s];
        }
        for inner in 0..s {
            let numbers = registers::<E, S, _>(&self.matrix[inner * self.stride + start..]);
            tile.add(factors.map(|factors| factors[inner]), numbers);
        }
        if let Some(scale) = self.scale {
            tile.scale_columns(&scale[start..]);
        }
        for line in 0..LINES {
            let place = (first + line) * self.columns + start;
            tile.store(line, &mut self.output[place..]);
        }
    }

    /// Rotates spans of `s` numbers, which kernels of whole registers take `PART` at a time.
    #[inline(always)]
    fn rotate_spans<S: Simd, const PART: usize>(self, simd: S, s: usize) {
        with_registers!(
            s, E, S, LINES, WIDTH => self.rotate_columns::<S, LINES, WIDTH, PART>(simd, s),
            else with_tile!(s, LINES, LINE => rotate_span_columns::<E, LINES, LINE>(self))
        )
    }

    /// Rotates every span of the rows, `LINES` rows by `WIDTH` registers of the result at a time.
    ///
    /// From the outside in, the loops run over spans, over registers of columns within the span, over groups of `LINES` rows,
    /// and over the `s` numbers of the span, in parts of a constant length, which spare checks of bounds. The rotation's matrix
    /// stays in a first-level cache while all rows of the task pass by. The innermost step multiplies one number of each row by
    /// a piece of one row of the rotation, so that vectors run along the rotation's rows and the operand needs no transposing.
    #[inline(always)]
    fn rotate_columns<S: Simd, const LINES: usize, const WIDTH: usize, const PART: usize>(
        mut self,
        simd: S,
        s: usize,
    ) {
        let rows = self.matrix.len() / self.columns;
        let tiled = rows / LINES * LINES;
        for (span, rotation) in self.rotation.chunks_exact(s * s).enumerate() {
            for start in (0..s).step_by(WIDTH * lanes::<E, S>()) {
                for row in (0..tiled).step_by(LINES) {
                    let tile = Tile::<E, S, LINES, WIDTH>::zero(simd);
                    let place = [row, span, start];
                    self.tile_of_columns::<S, LINES, WIDTH, PART>(tile, rotation, s, place);
                }
                for row in tiled..rows {
                    let tile = Tile::<E, S, 1, WIDTH>::zero(simd);
                    let place = [row, span, start];
                    self.tile_of_columns::<S, 1, WIDTH, PART>(tile, rotation, s, place);
                }
            }
        }
    }

    /// Rotates spans of four, two of them at a time: in f32 both fill a register of eight.
    #[inline(always)]
    fn rotate_fours(self) {
        for (pair, rotations) in self.rotation.chunks_exact(32).enumerate() {
            // Row `inner` of both rotations side by side.
            let mut factors = [[E::default(); 8]; 4];
            for (inner, factors) in factors.iter_mut().enumerate() {
                factors[..4].copy_from_slice(&rotations[4 * inner..][..4]);
                factors[4..].copy_from_slice(&rotations[16 + 4 * inner..][..4]);
            }
            let rows = self.matrix.chunks_exact(self.columns);
            let rows = rows.zip(self.output.chunks_exact_mut(self.columns));
            for (row, (numbers, output)) in rows.enumerate() {
                let numbers = line::<E, 8>(numbers, 8 * pair);
                let mut sums = [E::default(); 8];
                for (inner, factors) in factors.iter().enumerate() {
                    for (place, sum) in sums.iter_mut().enumerate() {
                        *sum = numbers[place / 4 * 4 + inner].mul_add(factors[place], *sum);
                    }
                }
                if let Some(scale) = self.scale {
                    sums = sums.map(|sum| sum * scale[row]);
                }
                output[8 * pair..][..8].write_copy_of_slice(&sums);
            }
        }
    }

    /// `LINES` rows of the result from `row` on, in the columns of the span from `start` on.
    #[inline(always)]
    fn tile_of_columns<S: Simd, const LINES: usize, const WIDTH: usize, const PART: usize>(
        &mut self,
        mut tile: Tile<E, S, LINES, WIDTH>,
        rotation: &[E],
        s: usize,
        [row, span, start]: [usize; 3],
    ) {
        let (columns, lanes) = (self.columns, lanes::<E, S>());
        let rotation = E::registers::<S>(rotation);
        for part in (0..s).step_by(PART) {
            let place = row * columns + span * s + part;
            let mut factors = [line::<E, PART>(self.matrix, place); LINES];
            for (index, factors) in factors.iter_mut().enumerate() {
                *factors = line(self.matrix, place + index * columns);
            }
            for inner in 0..PART {
                let numbers = line(rotation, ((part + inner) * s + start) / lanes);
                tile.add(factors.map(|factors| factors[inner]), numbers);
            }
        }
        for line in 0..LINES {
            if let Some(scale) = self.scale {
                tile.scale(line, scale[row + line]);
            }
            let place = (row + line) * columns + span * s + start;
            tile.store(line, &mut self.output[place..]);
        }
    }
}

/// The kernel of [`Side::Right`], a function of its own: inlined beside that of [`Side::Left`], both would get fewer registers.
struct Columns<'a, E: Real>(Task<'a, E>);

impl<E: Real> WithSimd for Columns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self(task) = self;
        // The usual spans as constants, for which the innermost loop is unrolled.
        match task.s {
            4 if task.columns.is_multiple_of(8) => task.rotate_fours(),
            8 => task.rotate_spans::<S, 8>(simd, 8),
            16 => task.rotate_spans::<S, 16>(simd, 16),
            32 => task.rotate_spans::<S, 32>(simd, 32),
            64 => task.rotate_spans::<S, 32>(simd, 64),
            s => task.rotate_spans::<S, 8>(simd, s),
        }
    }
}

/// [`Task::rotate_columns`] for spans that are not whole registers, `LINES` rows by `LINE` columns of the result at a time.
#[inline(always)]
fn rotate_span_columns<E: Real, const LINES: usize, const LINE: usize>(
    Task {
        output,
        matrix,
        rotation,
        s,
        columns,
        scale,
        ..
    }: Task<'_, E>,
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

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use burn::tensor::bf16;

    use super::*;

    #[test]
    fn a_rotation_for_another_number_of_channels_is_refused() {
        let sizes = Sizes::new([1, 2, 4, 4]);
        for (side, shape) in [
            (Side::Left, [16, 4]),
            (Side::Right, [1, 16]),
            (Side::Right, [3, 10]),
        ] {
            let count = shape[0] * shape[1];
            let rotated = catch_unwind(|| {
                rotate(&vec![0.5_f32; count], &[0.5; 32], sizes, shape, None, side)
            });
            assert!(rotated.is_err(), "{side:?} {shape:?}");
            let rotated = catch_unwind(|| {
                let matrix = vec![bf16::from_f32(0.5); count];
                rotate(&matrix, &[0.5; 32], sizes, shape, None, side)
            });
            assert!(rotated.is_err(), "{side:?} {shape:?} in half precision");
        }
    }
}
