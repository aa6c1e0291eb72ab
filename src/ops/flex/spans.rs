//! Rotations as one small matrix per span, applied in one pass over memory, and the Gram backward.

use std::mem::MaybeUninit;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Real;
use crate::ops::Side;

/// The sizes of a rotation.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    m: usize,
    n: usize,
    b: usize,
    /// Neighbours that the rotation mixes, `b·2^(m−1)`.
    pub(super) span: usize,
}

impl Sizes {
    pub(super) fn new([m, n, b, _]: [usize; 4]) -> Self {
        Self {
            m,
            n,
            b,
            span: b << (m - 1),
        }
    }

    /// Number of spans.
    fn count(self) -> usize {
        self.n * self.b / self.span
    }

    /// Spans whose small matrices are enough work to be worth a thread.
    fn spans_per_task(self) -> usize {
        (32_768 / (self.m * self.b * self.span * self.span)).max(1)
    }

    /// The place of a factor's block among all blocks, in numbers.
    fn offset(self, stage: usize, block: usize) -> usize {
        (stage * self.n + block) * self.b * self.b
    }

    /// Where in the span entry `index` of a block lies: half-blocks at distance `2^stage`.
    fn coupled(self, stage: usize, block: usize, index: usize) -> usize {
        if stage == 0 {
            return block * self.b + index;
        }
        let (distance, half) = (1 << stage, self.b / 2);
        let (chunk, place) = (block / distance, block % distance);
        let start = chunk * self.b * distance + place * half;
        match index < half {
            true => start + index,
            false => start + distance * half + index - half,
        }
    }
}

/// `op(R)` of every span, composed in f64.
pub(super) fn compose<E: Real>(blocks: &[E], sizes: Sizes, transpose: bool) -> Vec<E> {
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
                transpose,
            });
        });
    rotations
}

/// Some spans of [`compose`].
struct Compose<'a, E> {
    rotations: &'a mut [E],
    blocks: &'a [E],
    sizes: Sizes,
    /// The first of the spans.
    first: usize,
    transpose: bool,
}

impl<E: Real> WithSimd for Compose<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let s = self.sizes.span;
        let mut product = vec![0.0; s * s];
        let mut rows = vec![0.0; self.sizes.b * s];
        for (span, rotation) in self.rotations.chunks_exact_mut(s * s).enumerate() {
            product.fill(0.0);
            (0..s).for_each(|i| product[i * (s + 1)] = 1.0);
            for stage in 0..self.sizes.m {
                let place = (stage, self.first + span);
                multiply_by_stage(
                    &mut product,
                    self.blocks,
                    self.sizes,
                    place,
                    false,
                    &mut rows,
                );
            }
            if self.transpose {
                transpose(&mut product, s);
            }
            for (value, &product) in rotation.iter_mut().zip(&product) {
                *value = E::rounded(product);
            }
        }
    }
}

/// Multiplies a span's rows by a factor, `t ← op(F)·t`.
#[inline(always)]
fn multiply_by_stage<E: Real>(
    matrix: &mut [f64],
    blocks: &[E],
    sizes: Sizes,
    (stage, span): (usize, usize),
    transpose: bool,
    rows: &mut [f64],
) {
    let per_span = sizes.span / sizes.b;
    for local in 0..per_span {
        let block = &blocks[sizes.offset(stage, span * per_span + local)..];
        multiply_rows(matrix, block, sizes, (stage, local), transpose, rows);
    }
}

/// Multiplies the rows that a block couples by the block: `t[L] ← op(C)·t[L]`.
#[inline(always)]
fn multiply_rows<E: Real>(
    matrix: &mut [f64],
    block: &[E],
    sizes: Sizes,
    (stage, local): (usize, usize),
    transpose: bool,
    rows: &mut [f64],
) {
    let Sizes { b, span: s, .. } = sizes;
    rows.fill(0.0);
    for (to, row) in rows.chunks_exact_mut(s).enumerate() {
        for from in 0..b {
            let place = if transpose {
                from * b + to
            } else {
                to * b + from
            };
            let factor: f64 = block[place].into();
            let source = &matrix[sizes.coupled(stage, local, from) * s..][..s];
            for (sum, value) in row.iter_mut().zip(source) {
                *sum += factor * value;
            }
        }
    }
    for (to, row) in rows.chunks_exact(s).enumerate() {
        matrix[sizes.coupled(stage, local, to) * s..][..s].copy_from_slice(row);
    }
}

/// Runs a kernel with the sides of the tile that stays in registers as constants: `$lines` by `$line`.
///
/// The tile divides the span, and is of sizes that the compiler turns into vectors.
macro_rules! with_tile {
    ($span:expr, $lines:ident, $line:ident => $run:expr) => {
        match $span {
            s if s % 16 == 0 => with_tile!(4, 16, $lines, $line => $run),
            s if s % 8 == 0 => with_tile!(8, 8, $lines, $line => $run),
            s if s % 4 == 0 => with_tile!(4, 4, $lines, $line => $run),
            s if s % 2 == 0 => with_tile!(2, 2, $lines, $line => $run),
            _ => with_tile!(1, 1, $lines, $line => $run),
        }
    };
    ($lines_value:literal, $line_value:literal, $lines:ident, $line:ident => $run:expr) => {{
        const $lines: usize = $lines_value;
        const $line: usize = $line_value;
        $run
    }};
}

/// `N` numbers from a place on.
#[inline(always)]
fn line<E, const N: usize>(values: &[E], start: usize) -> &[E; N] {
    values[start..start + N]
        .try_into()
        .expect("the range is N long")
}

/// `sums += factor·line`.
#[inline(always)]
fn add_scaled<E: Real, const N: usize>(sums: &mut [E; N], factor: E, line: &[E; N]) {
    for (sum, &value) in sums.iter_mut().zip(line) {
        *sum = factor.mul_add(value, *sum);
    }
}

/// `op(R)·t` for a `[d, columns]` matrix, with a scale per column.
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
fn written<E: Real>(len: usize, write: impl FnOnce(&mut [MaybeUninit<E>])) -> Vec<E> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the two callers write whole rows: every span of them, and every tile of a span.
    unsafe { values.set_len(len) };
    values
}

/// One span of [`rotate_rows`].
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
const TILE: usize = 16;

/// Rotates one span, `LINES` rows of the result at a time.
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

/// Rows that one task rotates, and that one partial sum covers.
///
/// Fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 128;

/// Rows that pass by a span before the next span's turn: as many as a small cache holds.
const PASSING_ROWS: usize = 16;

/// `t·op(R)` for a `[rows, d]` matrix, with a scale per row.
pub(super) fn rotate_columns<E: Real>(
    matrix: &[E],
    rotation: &[E],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[E]>,
) -> Vec<E> {
    let s = sizes.span;
    let arch = Arch::new();
    written(rows * columns, |output| {
        output
            .par_chunks_mut(PASSING_ROWS * columns)
            .zip(matrix.par_chunks(PASSING_ROWS * columns))
            .enumerate()
            .with_min_len(ROWS / PASSING_ROWS)
            .for_each(|(task, (output, matrix))| {
                arch.dispatch(RotateColumns {
                    output,
                    matrix,
                    rotation,
                    s,
                    columns,
                    scale: scale.map(|scale| &scale[task * PASSING_ROWS..]),
                });
            });
    })
}

/// Some rows of [`rotate_columns`].
struct RotateColumns<'a, E> {
    output: &'a mut [MaybeUninit<E>],
    matrix: &'a [E],
    rotation: &'a [E],
    s: usize,
    columns: usize,
    scale: Option<&'a [E]>,
}

impl<E: Real> WithSimd for RotateColumns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        with_tile!(self.s, LINES, LINE => rotate_span_columns::<E, LINES, LINE>(self))
    }
}

/// Rotates every span of the rows, `LINES` rows by `LINE` columns of the result at a time.
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

/// `G = lhsᵀ·rhs` per span along the rotated axis, in f64 from partial sums of a fixed size.
pub(super) fn gram<E: Real>(
    lhs: &[E],
    rhs: &[E],
    [rows, columns]: [usize; 2],
    sizes: Sizes,
    side: Side,
) -> Vec<f64> {
    let s = sizes.span;
    let arch = Arch::new();
    match side {
        Side::Left => {
            let mut gram = vec![0.0; rows * s];
            gram.par_chunks_mut(s * s)
                .zip(lhs.par_chunks(s * columns).zip(rhs.par_chunks(s * columns)))
                .for_each(|(gram, (lhs, rhs))| {
                    arch.dispatch(GramOfRows {
                        gram,
                        lhs,
                        rhs,
                        columns,
                    });
                });
            gram
        }
        Side::Right => {
            let partial: Vec<Vec<E>> = lhs
                .par_chunks(ROWS * columns)
                .zip(rhs.par_chunks(ROWS * columns))
                .map(|(lhs, rhs)| {
                    let mut gram = vec![E::default(); columns * s];
                    arch.dispatch(GramOfColumns {
                        gram: &mut gram,
                        lhs,
                        rhs,
                        s,
                        columns,
                    });
                    gram
                })
                .collect();
            total(&partial, columns * s)
        }
    }
}

/// Numbers that one task adds up.
const SUMMED: usize = 1 << 12;

/// Adds partial sums, in f64 and always in the same order.
fn total<E: Real>(partial: &[Vec<E>], len: usize) -> Vec<f64> {
    let mut total = vec![0.0; len];
    total
        .par_chunks_mut(SUMMED)
        .enumerate()
        .for_each(|(chunk, total)| {
            for partial in partial {
                for (sum, &value) in total.iter_mut().zip(&partial[chunk * SUMMED..]) {
                    *sum += value.into();
                }
            }
        });
    total
}

/// One span of [`gram`] on the left.
struct GramOfRows<'a, E> {
    gram: &'a mut [f64],
    lhs: &'a [E],
    rhs: &'a [E],
    columns: usize,
}

impl<E: Real> WithSimd for GramOfRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self {
            gram,
            lhs,
            rhs,
            columns,
        } = self;
        let s = lhs.len() / columns;
        for (row, lhs) in lhs.chunks_exact(columns).enumerate() {
            for (column, rhs) in rhs.chunks_exact(columns).enumerate() {
                gram[row * s + column] = dot(lhs, rhs);
            }
        }
    }
}

/// A partial sum of [`gram`] on the right.
struct GramOfColumns<'a, E> {
    gram: &'a mut [E],
    lhs: &'a [E],
    rhs: &'a [E],
    s: usize,
    columns: usize,
}

impl<E: Real> WithSimd for GramOfColumns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        with_tile!(self.s, LINES, LINE => gram_of_columns::<E, LINES, LINE>(self))
    }
}

/// Adds the products of all rows to every span's sums, `LINES` rows of `LINE` sums at a time.
#[inline(always)]
fn gram_of_columns<E: Real, const LINES: usize, const LINE: usize>(
    GramOfColumns {
        gram,
        lhs,
        rhs,
        s,
        columns,
    }: GramOfColumns<'_, E>,
) {
    let passing = lhs
        .chunks(PASSING_ROWS * columns)
        .zip(rhs.chunks(PASSING_ROWS * columns));
    for (lhs, rhs) in passing {
        for (span, gram) in gram.chunks_exact_mut(s * s).enumerate() {
            for (row, column) in places(s, LINES, LINE) {
                let mut sums = [[E::default(); LINE]; LINES];
                for (index, sums) in sums.iter_mut().enumerate() {
                    *sums = *line(gram, (row + index) * s + column);
                }
                for (lhs, rhs) in lhs.chunks_exact(columns).zip(rhs.chunks_exact(columns)) {
                    let lhs = line::<E, LINES>(lhs, span * s + row);
                    let rhs = line::<E, LINE>(rhs, span * s + column);
                    for (sums, &value) in sums.iter_mut().zip(lhs) {
                        add_scaled(sums, value, rhs);
                    }
                }
                for (index, sums) in sums.iter().enumerate() {
                    gram[(row + index) * s + column..][..LINE].copy_from_slice(sums);
                }
            }
        }
    }
}

/// The corners of the tiles of a square.
#[inline(always)]
fn places(size: usize, rows: usize, columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let along = move |step| (0..size).step_by(step);
    along(rows).flat_map(move |row| along(columns).map(move |column| (row, column)))
}

/// A dot product.
struct Dot<'a, E>(&'a [E], &'a [E]);

impl<E: Real> WithSimd for Dot<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        dot(self.0, self.1)
    }
}

/// Independent sums of a dot product.
const LANES: usize = 16;

#[inline(always)]
fn dot<E: Real>(lhs: &[E], rhs: &[E]) -> f64 {
    let mut sum = [E::default(); LANES];
    let (lhs, rhs) = (lhs.chunks_exact(LANES), rhs.chunks_exact(LANES));
    let rest = lhs.remainder().iter().zip(rhs.remainder());
    let rest: f64 = rest.map(|(&lhs, &rhs)| (lhs * rhs).into()).sum();
    for (lhs, rhs) in lhs.zip(rhs) {
        for lane in 0..LANES {
            sum[lane] = lhs[lane].mul_add(rhs[lane], sum[lane]);
        }
    }
    sum.iter().map(|&value| value.into()).sum::<f64>() + rest
}

/// `Σ gradient ⊙ output` and `Σ gradient` per column, from partial sums of a fixed size.
pub(super) fn column_sums<E: Real>(gradient: &[E], output: &[E], columns: usize) -> [Vec<E>; 2] {
    let arch = Arch::new();
    let partial: Vec<Vec<E>> = gradient
        .par_chunks(ROWS * columns)
        .zip(output.par_chunks(ROWS * columns))
        .map(|(gradient, output)| {
            let mut sums = vec![E::default(); 2 * columns];
            arch.dispatch(ColumnSums {
                sums: &mut sums,
                gradient,
                output,
            });
            sums
        })
        .collect();
    let total = total(&partial, 2 * columns);
    let (products, sums) = total.split_at(columns);
    [products, sums].map(|sums| sums.iter().map(|&sum| E::rounded(sum)).collect())
}

/// A partial sum of [`column_sums`], the products before the gradients alone.
struct ColumnSums<'a, E> {
    sums: &'a mut [E],
    gradient: &'a [E],
    output: &'a [E],
}

impl<E: Real> WithSimd for ColumnSums<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        add_columns(self);
    }
}

#[inline(always)]
fn add_columns<E: Real>(
    ColumnSums {
        sums,
        gradient,
        output,
    }: ColumnSums<'_, E>,
) {
    let columns = sums.len() / 2;
    let (products, sums) = sums.split_at_mut(columns);
    let tiles = columns / LANES * LANES;
    for start in (0..tiles).step_by(LANES) {
        let (mut product, mut sum) = ([E::default(); LANES], [E::default(); LANES]);
        let lines = gradient
            .chunks_exact(columns)
            .zip(output.chunks_exact(columns));
        for (gradient, output) in lines {
            let gradient = line::<E, LANES>(gradient, start);
            let output = line::<E, LANES>(output, start);
            for lane in 0..LANES {
                product[lane] = gradient[lane].mul_add(output[lane], product[lane]);
                sum[lane] += gradient[lane];
            }
        }
        products[start..][..LANES].copy_from_slice(&product);
        sums[start..][..LANES].copy_from_slice(&sum);
    }
    for column in tiles..columns {
        let values = gradient.iter().zip(output).skip(column).step_by(columns);
        for (&gradient, &output) in values {
            products[column] = gradient.mul_add(output, products[column]);
            sums[column] += gradient;
        }
    }
}

/// `Σ gradient ⊙ output` and `Σ gradient` per row.
pub(super) fn row_sums<E: Real>(gradient: &[E], output: &[E], columns: usize) -> [Vec<E>; 2] {
    let arch = Arch::new();
    let (products, sums) = gradient
        .par_chunks_exact(columns)
        .zip(output.par_chunks_exact(columns))
        .with_min_len(ROWS)
        .map(|(gradient, output)| {
            let sum: f64 = gradient.iter().map(|&value| value.into()).sum();
            let product = arch.dispatch(Dot(gradient, output));
            (E::rounded(product), E::rounded(sum))
        })
        .unzip();
    [products, sums]
}

/// The gradient of the blocks from `G`; see the portable version.
pub(super) fn block_gradient<E: Real>(mut gram: Vec<f64>, blocks: &[E], sizes: Sizes) -> Vec<E> {
    let Sizes { b, span: s, .. } = sizes;
    let per_span = s / b;
    let arch = Arch::new();
    let gradients: Vec<Vec<f64>> = gram
        .par_chunks_mut(s * s)
        .enumerate()
        .with_min_len(sizes.spans_per_task())
        .map(|(span, gram)| {
            arch.dispatch(BlockGradient {
                gram,
                blocks,
                sizes,
                span,
            })
        })
        .collect();
    let mut output = vec![E::default(); blocks.len()];
    for (index, gradients) in gradients.into_iter().enumerate() {
        for (stage, gradients) in gradients.chunks(per_span * b * b).enumerate() {
            let target = &mut output[sizes.offset(stage, index * per_span)..][..gradients.len()];
            for (target, &gradient) in target.iter_mut().zip(gradients) {
                *target = E::rounded(gradient);
            }
        }
    }
    output
}

/// One span of [`block_gradient`]: every factor's blocks after each other.
struct BlockGradient<'a, E> {
    gram: &'a mut [f64],
    blocks: &'a [E],
    sizes: Sizes,
    span: usize,
}

impl<E: Real> WithSimd for BlockGradient<'_, E> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f64> {
        let Self {
            gram,
            blocks,
            sizes,
            span,
        } = self;
        let Sizes { m, b, span: s, .. } = sizes;
        let per_span = s / b;
        let mut gradients = vec![0.0; m * s * b];
        let mut rows = vec![0.0; b * s];
        for stage in (0..m).rev() {
            for local in 0..per_span {
                let block = &blocks[sizes.offset(stage, span * per_span + local)..][..b * b];
                let gradient = &mut gradients[(stage * per_span + local) * b * b..][..b * b];
                for row in 0..b {
                    let source = sizes.coupled(stage, local, row) * s;
                    for inner in 0..b {
                        let value = gram[source + sizes.coupled(stage, local, inner)];
                        for column in 0..b {
                            let factor: f64 = block[inner * b + column].into();
                            gradient[row * b + column] += value * factor;
                        }
                    }
                }
            }
            if stage > 0 {
                // Fᵀ·G·F = (Fᵀ·(Fᵀ·G)ᵀ)ᵀ.
                for _ in 0..2 {
                    multiply_by_stage(gram, blocks, sizes, (stage, span), true, &mut rows);
                    transpose(gram, s);
                }
            }
        }
        gradients
    }
}

#[inline(always)]
fn transpose(matrix: &mut [f64], size: usize) {
    for row in 0..size {
        for column in row + 1..size {
            matrix.swap(row * size + column, column * size + row);
        }
    }
}
