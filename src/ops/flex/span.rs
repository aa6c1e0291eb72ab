//! One span: its sizes, the indices that its blocks couple, and products with one factor.

use super::real::Real;
use crate::ops::butterfly::Direction;

/// The sizes of a rotation.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) b: usize,
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
    pub(super) fn count(self) -> usize {
        self.n * self.b / self.span
    }

    /// The spans of one task, enough work to be worth a thread.
    pub(super) fn spans_per_task(self) -> usize {
        (32_768 / (self.m * self.b * self.span * self.span)).max(1)
    }

    /// The index of the first number of a factor's block.
    pub(super) fn offset(self, stage: usize, block: usize) -> usize {
        (stage * self.n + block) * self.b * self.b
    }

    /// The place in the span of entry `index` of a block, whose halves are `2^stage` halves apart.
    pub(super) fn coupled(self, stage: usize, block: usize, index: usize) -> usize {
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

/// Multiplies a span's rows by a factor, `t ← op(F)·t`.
#[inline(always)]
pub(super) fn multiply_by_stage<E: Real>(
    matrix: &mut [f64],
    blocks: &[E],
    sizes: Sizes,
    (stage, span): (usize, usize),
    direction: Direction,
    rows: &mut [f64],
) {
    let per_span = sizes.span / sizes.b;
    for local in 0..per_span {
        let block = &blocks[sizes.offset(stage, span * per_span + local)..];
        multiply_rows(matrix, block, sizes, (stage, local), direction, rows);
    }
}

/// Multiplies the rows that a block couples by the block: `t[L] ← op(C)·t[L]`.
#[inline(always)]
fn multiply_rows<E: Real>(
    matrix: &mut [f64],
    block: &[E],
    sizes: Sizes,
    (stage, local): (usize, usize),
    direction: Direction,
    rows: &mut [f64],
) {
    let Sizes { b, span: s, .. } = sizes;
    rows.fill(0.0);
    for (to, row) in rows.chunks_exact_mut(s).enumerate() {
        for from in 0..b {
            let place = match direction {
                Direction::Forward => to * b + from,
                Direction::Back => from * b + to,
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

/// Transposes a square matrix in place.
#[inline(always)]
pub(super) fn transpose(matrix: &mut [f64], size: usize) {
    for row in 0..size {
        for column in row + 1..size {
            matrix.swap(row * size + column, column * size + row);
        }
    }
}
