//! One span: its sizes, the indices that its blocks couple, and products with one factor.
//!
//! A span's matrix is a slice of `span²` f64, row by row. Nothing here permutes it: the stage permutation of BOFT's
//! section 4 is the arithmetic of [`Sizes::coupled`], which finds the rows that a block couples where they are.

use super::real::Real;
use super::tile::{add_scaled, line};
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

/// The first factor of a span as a matrix: its blocks on the diagonal, and zeros.
///
/// # Shapes
///
/// - matrix: `[span, span]`
/// - blocks: all blocks of the rotation, `[m, n, b, b]`
#[inline(always)]
pub(super) fn first_stage<E: Real>(matrix: &mut [f64], blocks: &[E], sizes: Sizes, span: usize) {
    let Sizes { b, span: s, .. } = sizes;
    let per_span = s / b;
    matrix.fill(0.0);
    let blocks = &blocks[sizes.offset(0, span * per_span)..][..s * b];
    for (row, values) in blocks.chunks_exact(b).enumerate() {
        let start = row * s + row / b * b;
        for (target, &value) in matrix[start..][..b].iter_mut().zip(values) {
            *target = value.into();
        }
    }
}

/// Multiplies a span's rows by a factor after the first in place, `t ← op(F)·t`, where `op` transposes for
/// [`Direction::Back`].
///
/// The blocks of a factor couple disjoint rows, so they follow one another without a second matrix.
///
/// # Shapes
///
/// - matrix: `[span, span]`
/// - blocks: all blocks of the rotation, `[m, n, b, b]`
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
    scratch: &mut Scratch,
) {
    let Sizes { b, span: s, .. } = sizes;
    for local in 0..s / b {
        scratch.take(blocks, sizes, (stage, span, local), direction);
        // Sides of a tile that divide the block and the span, which is twice the block at least.
        match (b % 4, s % 16) {
            (0, 0) => multiply_rows::<4, 16>(matrix, s, scratch),
            (0, _) => multiply_rows::<4, 8>(matrix, s, scratch),
            (_, 0 | 8) => multiply_rows::<2, 8>(matrix, s, scratch),
            _ => multiply_rows::<2, 4>(matrix, s, scratch),
        }
    }
}

/// One block at a time, in f64, and what a product with it needs. It is allocated once for many spans.
pub(super) struct Scratch {
    /// The block, `[b, b]`.
    pub(super) block: Vec<f64>,
    /// The `b` places in the span that the block couples.
    pub(super) places: Vec<usize>,
    /// A piece of the `b` results.
    results: Vec<f64>,
}

impl Scratch {
    pub(super) fn new(b: usize) -> Self {
        Self {
            block: vec![0.0; b * b],
            places: vec![0; b],
            results: vec![0.0; b * WIDEST],
        }
    }

    /// Takes a block of a span and a factor, transposed for [`Direction::Back`].
    #[inline(always)]
    pub(super) fn take<E: Real>(
        &mut self,
        blocks: &[E],
        sizes: Sizes,
        (stage, span, local): (usize, usize, usize),
        direction: Direction,
    ) {
        let b = sizes.b;
        let block = &blocks[sizes.offset(stage, span * (sizes.span / b) + local)..][..b * b];
        for (row, values) in block.chunks_exact(b).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                let place = match direction {
                    Direction::Forward => row * b + column,
                    Direction::Back => column * b + row,
                };
                self.block[place] = value.into();
            }
        }
        for (index, place) in self.places.iter_mut().enumerate() {
            *place = sizes.coupled(stage, local, index);
        }
    }
}

/// The most columns that [`multiply_rows`] takes at a time.
const WIDEST: usize = 16;

/// Multiplies the rows that a block couples by the block: `t[L] ← C·t[L]`, `LINES` rows of `LINE` sums at a time.
///
/// The columns of the rows take turns in pieces of `LINE` neighbours, which make vector instructions. All `b` results
/// of a piece are formed before the first is written back, since each of them reads all `b` rows.
#[inline(always)]
fn multiply_rows<const LINES: usize, const LINE: usize>(
    matrix: &mut [f64],
    s: usize,
    Scratch {
        block,
        places,
        results,
    }: &mut Scratch,
) {
    let b = places.len();
    for start in (0..s).step_by(LINE) {
        let groups = block.chunks_exact(LINES * b);
        for (block, results) in groups.zip(results.chunks_exact_mut(LINES * LINE)) {
            let mut sums = [[0.0; LINE]; LINES];
            for (from, place) in places.iter().enumerate() {
                let source = line::<f64, LINE>(matrix, place * s + start);
                for (to, sums) in sums.iter_mut().enumerate() {
                    add_scaled(sums, block[to * b + from], source);
                }
            }
            results.copy_from_slice(sums.as_flattened());
        }
        for (place, result) in places.iter().zip(results.chunks_exact(LINE)) {
            matrix[place * s + start..][..LINE].copy_from_slice(result);
        }
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
