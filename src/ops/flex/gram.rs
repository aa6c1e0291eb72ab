//! The Gram backward: `G` per span, and from it the gradient of the blocks.
//!
//! For spans of `s` numbers `G` has `d·s`, and the `s²` of one span fit a cache. So the two large operands are read
//! once, and all that follows works on matrices of a span's size, in f64. The proof is in the documentation of
//! [`ops`](crate::ops).

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::{Real, lanes};
use super::span::{Scratch, Sizes, multiply_by_stage, transpose};
use super::sums::{dot, total};
use super::tile::{
    LANES, PASSING_ROWS, ROWS, Tile, add_scaled, dispatch, line, multiply, places, prefetch,
    registers, with_registers, with_tile,
};
use crate::ops::butterfly::{Direction, Side};

/// `G` per span along the rotated axis, `lhs·rhsᵀ` on the left and `lhsᵀ·rhs` on the right.
///
/// On the left the rows of a span lie together in memory, so each span is a task, and each entry of `G` is a dot
/// product of two rows. On the right a span is a short piece of each row, so tasks take [`ROWS`] rows with all their
/// spans, and the partial sums are added up at the end.
///
/// # Shapes
///
/// - lhs, rhs: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`], contiguous
/// - result: `[d/s, s, s]`
///
/// # Numerics
///
/// On the left the entries are summed as [`dot`] sums them, in lanes of the operands' precision. On the right partial sums of
/// [`ROWS`] rows run in the operands' precision and are added up in f64. Either order depends on the shape alone, not
/// on the number of threads.
pub(super) fn gram<E: Real>(
    lhs: &[E],
    rhs: &[E],
    [rows, columns]: [usize; 2],
    sizes: Sizes,
    side: Side,
) -> Vec<f64> {
    let s = sizes.span;
    if lhs.is_empty() {
        return vec![0.0; sizes.count() * s * s];
    }
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
                    let kernel = GramOfColumns {
                        gram: &mut gram,
                        lhs,
                        rhs,
                        s,
                        columns,
                    };
                    dispatch::<E, _>(s, kernel);
                    gram
                })
                .collect();
            total(&partial, columns * s)
        }
    }
}

/// One span of [`gram`] on the left: `s` rows of each operand, and the `[s, s]` matrix that their dot products are added to.
pub(super) struct GramOfRows<'a, E> {
    pub(super) gram: &'a mut [f64],
    pub(super) lhs: &'a [E],
    pub(super) rhs: &'a [E],
    pub(super) columns: usize,
}

impl<E: Real> WithSimd for GramOfRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let s = self.lhs.len() / self.columns;
        match LANES / lanes::<E, S>() {
            1 if s.is_multiple_of(4) => self.dots::<S, 4, 2, 1>(simd),
            2 if s.is_multiple_of(2) => self.dots::<S, 2, 2, 2>(simd),
            _ => self.dot_by_dot(),
        }
    }
}

impl<E: Real> GramOfRows<'_, E> {
    /// The dot products of `LINES` rows with `OTHERS` rows at a time, each in `WIDTH` registers of sums.
    ///
    /// A register of an operand that has been loaded meets several of the other one.
    #[inline(always)]
    fn dots<S: Simd, const LINES: usize, const OTHERS: usize, const WIDTH: usize>(self, simd: S) {
        let columns = self.columns;
        let s = self.lhs.len() / columns;
        let whole = columns / LANES * LANES;
        for (row, other) in places(s, LINES, OTHERS) {
            let (mut lhs, mut rhs) = ([self.lhs; LINES], [self.rhs; OTHERS]);
            for (line, lhs) in lhs.iter_mut().enumerate() {
                *lhs = &self.lhs[(row + line) * columns..][..columns];
            }
            for (line, rhs) in rhs.iter_mut().enumerate() {
                *rhs = &self.rhs[(other + line) * columns..][..columns];
            }
            let mut sums = [[[E::splat(simd, E::default()); WIDTH]; OTHERS]; LINES];
            for start in (0..whole).step_by(LANES) {
                let rhs = rhs.map(|rhs| E::registers::<S>(&rhs[start..][..LANES]));
                for (sums, lhs) in sums.iter_mut().zip(&lhs) {
                    let lhs = E::registers::<S>(&lhs[start..][..LANES]);
                    for (sums, rhs) in sums.iter_mut().zip(rhs) {
                        for (sum, (&lhs, &rhs)) in sums.iter_mut().zip(lhs.iter().zip(rhs)) {
                            *sum = E::mul_add_registers(simd, lhs, rhs, *sum);
                        }
                    }
                }
            }
            for (line, sums) in sums.iter().enumerate() {
                for (index, sums) in sums.iter().enumerate() {
                    let sum: f64 = E::sum_registers(simd, *sums).into();
                    let rest = lhs[line][whole..].iter().zip(&rhs[index][whole..]);
                    let rest: f64 = rest.map(|(&lhs, &rhs)| (lhs * rhs).into()).sum();
                    self.gram[(row + line) * s + other + index] += sum + rest;
                }
            }
        }
    }

    /// The same dot products one by one.
    #[inline(always)]
    fn dot_by_dot(self) {
        let s = self.lhs.len() / self.columns;
        for (row, lhs) in self.lhs.chunks_exact(self.columns).enumerate() {
            for (column, rhs) in self.rhs.chunks_exact(self.columns).enumerate() {
                self.gram[row * s + column] += dot(lhs, rhs);
            }
        }
    }
}

/// A partial sum of [`gram`] on the right: up to [`ROWS`] rows of each operand, and `[d/s, s, s]` sums.
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
    fn with_simd<S: Simd>(self, simd: S) {
        let s = self.s;
        with_registers!(
            s, E, S, LINES, WIDTH => self.add::<S, LINES, WIDTH>(simd),
            else with_tile!(s, LINES, LINE => gram_of_columns::<E, LINES, LINE>(self))
        );
    }
}

impl<'a, E: Real> GramOfColumns<'a, E> {
    /// The rows after the first group, of which each tile of this many sums asks for its share.
    #[inline(always)]
    fn ahead(&self, tile: usize) -> Ahead<'a, E> {
        Ahead {
            operands: [self.lhs, self.rhs],
            start: PASSING_ROWS * self.columns,
            share: PASSING_ROWS * tile / self.s,
        }
    }

    /// Adds the products of all rows to every span's sums, `LINES` rows of `WIDTH` registers at a time.
    ///
    /// From the outside in, the loops run over groups of [`PASSING_ROWS`] rows, over spans, over tiles of the span's `G`,
    /// and over the rows of the group. A tile's sums are loaded into registers, meet all rows of the group and are stored
    /// again, so that they are loaded and stored once for 16 products. The operands come from memory once: the rows of a
    /// group stay in a cache while their spans take turns. Meanwhile they ask for the next group, [`Ahead`].
    #[inline(always)]
    fn add<S: Simd, const LINES: usize, const WIDTH: usize>(self, simd: S) {
        let (s, columns) = (self.s, self.columns);
        let width = Tile::<E, S, LINES, WIDTH>::LINE;
        let mut ahead = self.ahead(LINES * width);
        let passing = self
            .lhs
            .chunks(PASSING_ROWS * columns)
            .zip(self.rhs.chunks(PASSING_ROWS * columns));
        for (lhs, rhs) in passing {
            for (span, gram) in self.gram.chunks_exact_mut(s * s).enumerate() {
                for (row, column) in places(s, LINES, width) {
                    ahead.advance();
                    let mut tile = Tile::<E, S, LINES, WIDTH>::zero(simd);
                    for index in 0..LINES {
                        tile.load(index, &gram[(row + index) * s + column..]);
                    }
                    for (lhs, rhs) in lhs.chunks_exact(columns).zip(rhs.chunks_exact(columns)) {
                        let factors = *line::<E, LINES>(lhs, span * s + row);
                        tile.add(factors, registers::<E, S, _>(&rhs[span * s + column..]));
                    }
                    for index in 0..LINES {
                        tile.write(index, &mut gram[(row + index) * s + column..]);
                    }
                }
            }
        }
    }
}

/// The rows that come after the ones that are multiplied.
///
/// A processor that sees small pieces of 32 rows being read does not guess which pieces will be read next. So each tile
/// asks for its share of the next [`PASSING_ROWS`] rows, which come from memory while it is computed.
struct Ahead<'a, E> {
    operands: [&'a [E]; 2],
    /// The numbers that have been asked for already.
    start: usize,
    /// The numbers that a tile asks for.
    share: usize,
}

impl<E> Ahead<'_, E> {
    /// Asks for the next share of both operands.
    #[inline(always)]
    fn advance(&mut self) {
        let end = self.start + self.share;
        for operand in self.operands {
            prefetch(operand.get(self.start..end).unwrap_or_default());
        }
        self.start = end;
    }
}

/// [`GramOfColumns::add`] for spans that are not whole registers, `LINES` rows of `LINE` sums at a time.
#[inline(always)]
fn gram_of_columns<E: Real, const LINES: usize, const LINE: usize>(kernel: GramOfColumns<'_, E>) {
    let mut ahead = kernel.ahead(LINES * LINE);
    let GramOfColumns {
        gram,
        lhs,
        rhs,
        s,
        columns,
    } = kernel;
    let passing = lhs
        .chunks(PASSING_ROWS * columns)
        .zip(rhs.chunks(PASSING_ROWS * columns));
    for (lhs, rhs) in passing {
        for (span, gram) in gram.chunks_exact_mut(s * s).enumerate() {
            for (row, column) in places(s, LINES, LINE) {
                ahead.advance();
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

/// The gradient of the blocks from `G`, where `∂L/∂R = G·R`.
///
/// For each factor from the last to the first: `∂L/∂C = G[L,L]·C` for the indices `L` that a block couples, then
/// `G ← F_iᵀ·G·F_i`. The portable version, `backward` in `ops/butterfly.rs`, has the proof.
///
/// A span's blocks of different factors lie far apart in the result, so that tasks cannot share it among themselves.
/// Each returns a list of its own, and the numbers, few as they are, are put in place by one thread.
///
/// # Shapes
///
/// - gram: `[d/s, s, s]`, overwritten
/// - blocks: `[m, n, b, b]`, contiguous; so is the result
///
/// # Numerics
///
/// In f64 throughout, rounded once to the precision of the blocks.
pub(super) fn block_gradient<E: Real>(mut gram: Vec<f64>, blocks: &[E], sizes: Sizes) -> Vec<E> {
    let Sizes { m, b, span: s, .. } = sizes;
    let per_span = s / b;
    let task = sizes.spans_per_task();
    let arch = Arch::new();
    let gradients: Vec<Vec<f64>> = gram
        .par_chunks_mut(task * s * s)
        .enumerate()
        .map(|(index, gram)| {
            arch.dispatch(BlockGradient {
                gram,
                blocks,
                sizes,
                first: index * task,
            })
        })
        .collect();
    let mut output = vec![E::default(); blocks.len()];
    let spans = gradients
        .iter()
        .flat_map(|task| task.chunks_exact(m * s * b));
    for (span, gradients) in spans.enumerate() {
        for (stage, gradients) in gradients.chunks_exact(s * b).enumerate() {
            let target = &mut output[sizes.offset(stage, span * per_span)..][..gradients.len()];
            for (target, &gradient) in target.iter_mut().zip(gradients) {
                *target = E::rounded(gradient);
            }
        }
    }
    output
}

/// Some spans of [`block_gradient`]. Its output lists the blocks of each span and factor, a `[spans, m, s/b, b, b]` tensor.
///
/// Of `G·F_i` it forms only the entries that a block couples, `b·s` of `s²`. The whole of `F_iᵀ·G·F_i` is needed only
/// for factors that are still to come, so `F_0`, the last of them, ends the loop without it.
struct BlockGradient<'a, E> {
    gram: &'a mut [f64],
    blocks: &'a [E],
    sizes: Sizes,
    /// The first of the spans.
    first: usize,
}

impl<E: Real> WithSimd for BlockGradient<'_, E> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f64> {
        let Self {
            gram,
            blocks,
            sizes,
            first,
        } = self;
        let Sizes { m, b, span: s, .. } = sizes;
        let mut gradients = vec![0.0; gram.len() / s * m * b];
        let (mut scratch, mut coupled) = (Scratch::new(b), vec![0.0; b * b]);
        let spans = gram
            .chunks_exact_mut(s * s)
            .zip(gradients.chunks_exact_mut(m * s * b));
        for (index, (gram, gradients)) in spans.enumerate() {
            let span = first + index;
            for (stage, gradients) in gradients.chunks_exact_mut(s * b).enumerate().rev() {
                for (local, gradient) in gradients.chunks_exact_mut(b * b).enumerate() {
                    scratch.take(blocks, sizes, (stage, span, local), Direction::Forward);
                    let Scratch { block, places, .. } = &scratch;
                    for (row, place) in coupled.chunks_exact_mut(b).zip(places) {
                        for (value, column) in row.iter_mut().zip(places) {
                            *value = gram[place * s + column];
                        }
                    }
                    multiply(gradient, &coupled, block, b);
                }
                if stage > 0 {
                    // Fᵀ·G·F = (Fᵀ·(Fᵀ·G)ᵀ)ᵀ.
                    for _ in 0..2 {
                        let (place, back) = ((stage, span), Direction::Back);
                        multiply_by_stage(gram, blocks, sizes, place, back, &mut scratch);
                        transpose(gram, s);
                    }
                }
            }
        }
        gradients
    }
}
