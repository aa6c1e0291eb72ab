//! Tiles of matrices that stay in registers, and the number of rows that a task takes.

use super::real::Real;

/// Independent sums that a dot product or a column sum runs in.
pub(super) const LANES: usize = 16;

/// Rows that one task rotates, and that one partial sum covers.
///
/// Fixed, so that sums do not depend on the number of threads.
pub(super) const ROWS: usize = 128;

/// Rows processed per span before moving to the next span, as many as a small cache holds.
pub(super) const PASSING_ROWS: usize = 16;

/// Runs a kernel with the sides of the tile that stays in registers as constants: `$lines` by `$line`.
///
/// The sides divide the span, and are lengths for which the compiler uses vector instructions.
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

/// `N` numbers, from index `start` on.
#[inline(always)]
pub(super) fn line<E, const N: usize>(values: &[E], start: usize) -> &[E; N] {
    values[start..start + N]
        .try_into()
        .expect("the range is N long")
}

/// `sums += factor·line`.
#[inline(always)]
pub(super) fn add_scaled<E: Real, const N: usize>(sums: &mut [E; N], factor: E, line: &[E; N]) {
    for (sum, &value) in sums.iter_mut().zip(line) {
        *sum = factor.mul_add(value, *sum);
    }
}
