//! Tiles of matrices that stay in registers, and the number of rows that a task takes.
//!
//! The kernels keep 64 sums in registers where the span allows it: in f32 these are eight registers of AVX2, sixteen
//! of Neon or four of AVX-512. That many independent sums hide the latency of a fused multiply-add, and leave
//! registers for the operands.

use super::real::Real;

/// Independent sums that a dot product or a column sum runs in.
///
/// A single running sum would wait for each addition before it starts the next. In f32, 16 lanes are two registers of
/// AVX2.
pub(super) const LANES: usize = 16;

/// Rows that one task rotates, and that one partial sum covers.
///
/// Fixed, so that sums do not depend on the number of threads. A sum over rows has at most this many terms in the
/// operand's precision, before it is added to the others in f64.
pub(super) const ROWS: usize = 128;

/// Rows processed per span before moving to the next span, as many as a small cache holds.
///
/// Every span needs only its own numbers of a row, so a kernel that finished one span over all rows would read the
/// operand from memory in pieces of a span. With 16 rows at a time the operand comes from memory once, in order, and
/// each span's matrix is read once for 16 rows instead of once for each tile. In f32, 16 rows of 1024 numbers are 64
/// KiB.
pub(super) const PASSING_ROWS: usize = 16;

/// Runs a kernel with the sides of the tile that stays in registers as constants: `$lines` by `$line`.
///
/// | span divisible by | `$lines` | `$line` |
/// |---|---|---|
/// | 16 | 4 | 16 |
/// | 8 | 8 | 8 |
/// | 4 | 4 | 4 |
/// | 2 | 2 | 2 |
/// | nothing above | 1 | 1 |
///
/// `$line` counts neighbours in memory, as many as make vector instructions. Both sides divide the span, so that no
/// tile crosses its end. An odd span, which is a single block of odd size, runs one number at a time.
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

pub(super) use with_tile;

/// `N` numbers, from index `start` on, as an array: one check of bounds for all of them, and a loop of constant
/// length.
///
/// # Panics
///
/// - If fewer than `N` numbers follow.
#[inline(always)]
pub(super) fn line<E, const N: usize>(values: &[E], start: usize) -> &[E; N] {
    values[start..start + N]
        .try_into()
        .expect("the range is N long")
}

/// `sums += factor·line`, one fused multiply-add for each number.
#[inline(always)]
pub(super) fn add_scaled<E: Real, const N: usize>(sums: &mut [E; N], factor: E, line: &[E; N]) {
    for (sum, &value) in sums.iter_mut().zip(line) {
        *sum = factor.mul_add(value, *sum);
    }
}

/// The product of two square matrices in f64, a tile of it at a time.
#[inline(always)]
pub(super) fn multiply(product: &mut [f64], lhs: &[f64], rhs: &[f64], size: usize) {
    with_tile!(size, LINES, LINE => multiply_tiles::<LINES, LINE>(product, lhs, rhs, size));
}

#[inline(always)]
fn multiply_tiles<const LINES: usize, const LINE: usize>(
    product: &mut [f64],
    lhs: &[f64],
    rhs: &[f64],
    size: usize,
) {
    for (row, column) in places(size, LINES, LINE) {
        let mut sums = [[0.0; LINE]; LINES];
        for inner in 0..size {
            let line = line::<f64, LINE>(rhs, inner * size + column);
            for (index, sums) in sums.iter_mut().enumerate() {
                add_scaled(sums, lhs[(row + index) * size + inner], line);
            }
        }
        for (index, sums) in sums.iter().enumerate() {
            product[(row + index) * size + column..][..LINE].copy_from_slice(sums);
        }
    }
}

/// The corners of the tiles of a square, row by row.
#[inline(always)]
pub(super) fn places(
    size: usize,
    rows: usize,
    columns: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let along = move |step| (0..size).step_by(step);
    along(rows).flat_map(move |row| along(columns).map(move |column| (row, column)))
}
