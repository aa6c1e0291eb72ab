//! Rotations as one small matrix per span, applied in one pass over memory, and the Gram backward.

use pulp::Arch;
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
    let Sizes { m, b, span: s, .. } = sizes;
    let mut rotations = vec![E::default(); sizes.count() * s * s];
    rotations
        .par_chunks_mut(s * s)
        .enumerate()
        .with_min_len(8)
        .for_each(|(index, rotation)| {
            let mut product = vec![0.0; s * s];
            (0..s).for_each(|i| product[i * (s + 1)] = 1.0);
            let mut rows = vec![0.0; b * s];
            for stage in 0..m {
                for local in 0..s / b {
                    let block = &blocks[sizes.offset(stage, index * (s / b) + local)..][..b * b];
                    multiply_rows(&mut product, block, sizes, (stage, local), false, &mut rows);
                }
            }
            for row in 0..s {
                for column in 0..s {
                    let value = product[row * s + column];
                    let place = if transpose {
                        column * s + row
                    } else {
                        row * s + column
                    };
                    rotation[place] = E::rounded(value);
                }
            }
        });
    rotations
}

/// Multiplies the rows that a block couples by the block: `t[L] ← op(C)·t[L]`.
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
    for to in 0..b {
        for from in 0..b {
            let place = if transpose {
                from * b + to
            } else {
                to * b + from
            };
            let factor: f64 = block[place].into();
            let source = sizes.coupled(stage, local, from) * s;
            for column in 0..s {
                rows[to * s + column] += factor * matrix[source + column];
            }
        }
    }
    for to in 0..b {
        let target = sizes.coupled(stage, local, to) * s;
        matrix[target..target + s].copy_from_slice(&rows[to * s..(to + 1) * s]);
    }
}

/// Calls a kernel with the span as a constant where it is a common one, so that its loops unroll.
macro_rules! with_span {
    ($span:expr, $s:ident => $run:expr) => {
        match $span {
            4 => {
                let $s = 4;
                $run
            }
            8 => {
                let $s = 8;
                $run
            }
            16 => {
                let $s = 16;
                $run
            }
            32 => {
                let $s = 32;
                $run
            }
            $s => $run,
        }
    };
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
    let mut output = vec![E::default(); rows * columns];
    let arch = Arch::new();
    output
        .par_chunks_mut(s * columns)
        .zip(
            matrix
                .par_chunks(s * columns)
                .zip(rotation.par_chunks(s * s)),
        )
        .for_each(|(output, (matrix, rotation))| {
            arch.dispatch(|| {
                with_span!(s, s => rotate_span_rows(output, matrix, rotation, s, columns, scale))
            })
        });
    output
}

/// Columns that stay in registers while a row of the rotation meets them.
const TILE: usize = 32;

#[inline(always)]
fn rotate_span_rows<E: Real>(
    output: &mut [E],
    matrix: &[E],
    rotation: &[E],
    s: usize,
    columns: usize,
    scale: Option<&[E]>,
) {
    let tiles = columns / TILE * TILE;
    for start in (0..tiles).step_by(TILE) {
        for row in 0..s {
            let mut sum = [E::default(); TILE];
            for inner in 0..s {
                let factor = rotation[row * s + inner];
                let source = &matrix[inner * columns + start..][..TILE];
                for lane in 0..TILE {
                    sum[lane] += factor * source[lane];
                }
            }
            if let Some(scale) = scale {
                let scale = &scale[start..][..TILE];
                for lane in 0..TILE {
                    sum[lane] = sum[lane] * scale[lane];
                }
            }
            output[row * columns + start..][..TILE].copy_from_slice(&sum);
        }
    }
    for column in tiles..columns {
        for row in 0..s {
            let mut sum = E::default();
            for inner in 0..s {
                sum += rotation[row * s + inner] * matrix[inner * columns + column];
            }
            if let Some(scale) = scale {
                sum = sum * scale[column];
            }
            output[row * columns + column] = sum;
        }
    }
}

/// Rows that one task rotates, and that one partial sum of a Gram matrix covers.
///
/// Fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 128;

/// `t·op(R)` for a `[rows, d]` matrix, with a scale per row.
pub(super) fn rotate_columns<E: Real>(
    matrix: &[E],
    rotation: &[E],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[E]>,
) -> Vec<E> {
    let mut output = vec![E::default(); rows * columns];
    let arch = Arch::new();
    output
        .par_chunks_mut(ROWS * columns)
        .zip(matrix.par_chunks(ROWS * columns))
        .enumerate()
        .for_each(|(task, (output, matrix))| {
            let scale = scale.map(|scale| &scale[task * ROWS..]);
            arch.dispatch(|| {
                with_span!(sizes.span, s => {
                    rotate_span_columns(output, matrix, rotation, s, columns, scale)
                })
            })
        });
    output
}

#[inline(always)]
fn rotate_span_columns<E: Real>(
    output: &mut [E],
    matrix: &[E],
    rotation: &[E],
    s: usize,
    columns: usize,
    scale: Option<&[E]>,
) {
    let mut sum = [E::default(); super::LARGEST_SPAN];
    let sum = &mut sum[..s];
    for (row, (output, matrix)) in output
        .chunks_exact_mut(columns)
        .zip(matrix.chunks_exact(columns))
        .enumerate()
    {
        let spans = output.chunks_exact_mut(s).zip(matrix.chunks_exact(s));
        for ((output, matrix), rotation) in spans.zip(rotation.chunks_exact(s * s)) {
            sum.fill(E::default());
            for inner in 0..s {
                for lane in 0..s {
                    sum[lane] += matrix[inner] * rotation[inner * s + lane];
                }
            }
            for lane in 0..s {
                output[lane] = match scale {
                    Some(scale) => sum[lane] * scale[row],
                    None => sum[lane],
                };
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
                    arch.dispatch(|| gram_of_rows(gram, lhs, rhs, s, columns))
                });
            gram
        }
        Side::Right => {
            let partial: Vec<Vec<E>> = lhs
                .par_chunks(ROWS * columns)
                .zip(rhs.par_chunks(ROWS * columns))
                .map(|(lhs, rhs)| {
                    let mut gram = vec![E::default(); columns * s];
                    arch.dispatch(
                        || with_span!(s, s => gram_of_columns(&mut gram, lhs, rhs, s, columns)),
                    );
                    gram
                })
                .collect();
            let mut gram = vec![0.0; columns * s];
            for partial in partial {
                for (sum, value) in gram.iter_mut().zip(partial) {
                    *sum += value.into();
                }
            }
            gram
        }
    }
}

#[inline(always)]
fn gram_of_rows<E: Real>(gram: &mut [f64], lhs: &[E], rhs: &[E], s: usize, columns: usize) {
    for (row, lhs) in lhs.chunks_exact(columns).enumerate() {
        for (column, rhs) in rhs.chunks_exact(columns).enumerate() {
            gram[row * s + column] = dot(lhs, rhs);
        }
    }
}

#[inline(always)]
fn dot<E: Real>(lhs: &[E], rhs: &[E]) -> f64 {
    const LANES: usize = 16;
    let mut sum = [E::default(); LANES];
    let (lhs, rhs) = (lhs.chunks_exact(LANES), rhs.chunks_exact(LANES));
    let rest = lhs.remainder().iter().zip(rhs.remainder());
    let rest: f64 = rest.map(|(&lhs, &rhs)| (lhs * rhs).into()).sum();
    for (lhs, rhs) in lhs.zip(rhs) {
        for lane in 0..LANES {
            sum[lane] += lhs[lane] * rhs[lane];
        }
    }
    sum.iter().map(|&value| value.into()).sum::<f64>() + rest
}

/// `Σ lhs ⊙ rhs` per column, from partial sums of a fixed size.
pub(super) fn column_products<E: Real>(lhs: &[E], rhs: &[E], columns: usize) -> Vec<E> {
    let arch = Arch::new();
    let partial: Vec<Vec<E>> = lhs
        .par_chunks(ROWS * columns)
        .zip(rhs.par_chunks(ROWS * columns))
        .map(|(lhs, rhs)| {
            let mut sums = vec![E::default(); columns];
            arch.dispatch(|| {
                for (lhs, rhs) in lhs.chunks_exact(columns).zip(rhs.chunks_exact(columns)) {
                    for ((sum, &lhs), &rhs) in sums.iter_mut().zip(lhs).zip(rhs) {
                        *sum += lhs * rhs;
                    }
                }
            });
            sums
        })
        .collect();
    let total = |column: usize| partial.iter().map(|sums| sums[column].into()).sum::<f64>();
    (0..columns)
        .map(|column| E::rounded(total(column)))
        .collect()
}

/// `Σ lhs ⊙ rhs` per row.
pub(super) fn row_products<E: Real>(lhs: &[E], rhs: &[E], columns: usize) -> Vec<E> {
    let arch = Arch::new();
    lhs.par_chunks_exact(columns)
        .zip(rhs.par_chunks_exact(columns))
        .with_min_len(ROWS)
        .map(|(lhs, rhs)| E::rounded(arch.dispatch(|| dot(lhs, rhs))))
        .collect()
}

#[inline(always)]
fn gram_of_columns<E: Real>(gram: &mut [E], lhs: &[E], rhs: &[E], s: usize, columns: usize) {
    for (lhs, rhs) in lhs.chunks_exact(columns).zip(rhs.chunks_exact(columns)) {
        let spans = lhs.chunks_exact(s).zip(rhs.chunks_exact(s));
        for (gram, (lhs, rhs)) in gram.chunks_exact_mut(s * s).zip(spans) {
            for row in 0..s {
                for lane in 0..s {
                    gram[row * s + lane] += lhs[row] * rhs[lane];
                }
            }
        }
    }
}

/// The gradient of the blocks from `G`; see the portable version.
pub(super) fn block_gradient<E: Real>(gram: Vec<f64>, blocks: &[E], sizes: Sizes) -> Vec<E> {
    let Sizes { m, b, span: s, .. } = sizes;
    let per_span = s / b;
    let gradients: Vec<Vec<f64>> = gram
        .par_chunks(s * s)
        .enumerate()
        .with_min_len(8)
        .map(|(index, gram)| {
            let mut gram = gram.to_vec();
            let mut gradients = vec![0.0; m * per_span * b * b];
            let mut rows = vec![0.0; b * s];
            for stage in (0..m).rev() {
                for local in 0..per_span {
                    let block = &blocks[sizes.offset(stage, index * per_span + local)..][..b * b];
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
                        for local in 0..per_span {
                            let offset = sizes.offset(stage, index * per_span + local);
                            let block = &blocks[offset..][..b * b];
                            multiply_rows(&mut gram, block, sizes, (stage, local), true, &mut rows);
                        }
                        transpose(&mut gram, s);
                    }
                }
            }
            gradients
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

fn transpose(matrix: &mut [f64], size: usize) {
    for row in 0..size {
        for column in row + 1..size {
            matrix.swap(row * size + column, column * size + row);
        }
    }
}
