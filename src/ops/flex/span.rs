//! One span: its sizes, the indices that its blocks couple, and products with one factor.
//!
//! A span's matrix is a slice of `span²` f64, row by row. Nothing here permutes it: the stage permutation of BOFT's
//! section 4 is the arithmetic of [`Sizes::coupled`], which finds the rows that a block couples where they are.

use super::real::Real;
use crate::ops::butterfly::Direction;

/// The sizes of a rotation, as the `[m, n, b, b]` shape of its blocks gives them.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Butterfly factors.
    pub(super) m: usize,
    /// Blocks of a factor.
    pub(super) n: usize,
    /// Numbers that a block couples.
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

    /// The spans of one task, enough work to be worth a thread: about 32,768 multiplications.
    ///
    /// Composing a span takes `m·b·span²` of them, `b·span²` per factor.
    pub(super) fn spans_per_task(self) -> usize {
        (32_768 / (self.m * self.b * self.span * self.span)).max(1)
    }

    /// The index of the first number of a factor's block among all the blocks' numbers; the other `b² − 1` follow it.
    ///
    /// Span `k` owns the `span/b` blocks from `k·span/b` on of every factor, since no factor couples numbers of two
    /// spans.
    pub(super) fn offset(self, stage: usize, block: usize) -> usize {
        (stage * self.n + block) * self.b * self.b
    }

    /// The place in the span of entry `index` of a block, whose halves are `2^stage` halves apart.
    ///
    /// `block` counts from the first block of the span. The span is seen as `[chunk, 2, 2^stage, b/2]`, of which a
    /// block takes both entries of the second axis: with `b = 4` and stage 1, block 0 couples the places 0, 1, 4 and
    /// 5, block 1 the places 2, 3, 6 and 7.
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

/// Multiplies a span's rows by a factor in place, `t ← op(F)·t`, where `op` transposes for [`Direction::Back`].
///
/// The blocks of a factor couple disjoint rows, so they follow one another without a second matrix.
///
/// # Shapes
///
/// - matrix: `[span, span]`
/// - blocks: all blocks of the rotation, `[m, n, b, b]`
/// - rows: `[b, span]`, scratch of the caller
///
/// # Numerics
///
/// In f64, whatever the precision of the blocks.
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
///
/// The innermost loop runs along a row, whose numbers are neighbours in memory, so that it becomes vector
/// instructions for every block size. All `b` results are formed in `rows` before the first is written back, since
/// each of them reads all `b` rows.
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
