//! Tiles of matrices that stay in registers, and the number of rows that a task takes.
//!
//! The kernels keep eight registers of sums where the span allows it, or sixteen where a processor has 32 registers. Eight
//! independent sums hide the latency of a fused multiply-add, and leave registers for the operands. With sixteen, each
//! number that is loaded meets more of them.

use std::mem::MaybeUninit;

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
use pulp::x86::V4;
use pulp::{Arch, Simd, WithSimd};

use super::real::{Real, lanes};

/// Independent sums that a dot product or a column sum runs in.
///
/// A single running sum would wait for each addition before it starts the next. In f32, 16 lanes are two registers of
/// AVX2.
pub(super) const LANES: usize = 16;

/// Rows that are worth a thread of their own where a matrix is rotated, and that one partial sum covers.
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

/// Bytes that come from memory at a time.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;

/// Asks for numbers that will be read soon, so that they are in a cache by then.
#[inline(always)]
pub(super) fn prefetch<E>(numbers: &[E]) {
    #[cfg(target_arch = "x86_64")]
    for number in numbers.iter().step_by(CACHE_LINE / size_of::<E>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every processor of this architecture has the instruction, and it changes no numbers.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(number).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}

/// Runs a kernel with the widest registers that pieces of this many neighbours fill.
///
/// The sixteen numbers of f32 that a register of AVX-512 holds are more than a span of eight has.
pub(super) fn dispatch<E: Real, K: WithSimd>(neighbours: usize, kernel: K) -> K::Output {
    let arch = Arch::new();
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Arch::V4(simd) = arch
        && !neighbours.is_multiple_of(lanes::<E, V4>())
    {
        return Simd::vectorize(*simd, kernel);
    }
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    let _ = neighbours;
    arch.dispatch(kernel)
}

/// Sums that stay in registers: `LINES` lines of `WIDTH` registers each.
///
/// Eight registers hide the latency of a fused multiply-add. An array of numbers in their place stays in memory where the
/// compiler does not unroll every loop over it, at an eighth of the speed.
pub(super) struct Tile<E: Real, S: Simd, const LINES: usize, const WIDTH: usize> {
    simd: S,
    sums: [[E::Register<S>; WIDTH]; LINES],
}

impl<E: Real, S: Simd, const LINES: usize, const WIDTH: usize> Tile<E, S, LINES, WIDTH> {
    /// How many numbers a line has.
    pub(super) const LINE: usize = WIDTH * lanes::<E, S>();

    #[inline(always)]
    pub(super) fn zero(simd: S) -> Self {
        let sums = [[E::splat(simd, E::default()); WIDTH]; LINES];
        Self { simd, sums }
    }

    /// Begins a line with these sums.
    #[inline(always)]
    pub(super) fn load(&mut self, line: usize, sums: &[E]) {
        self.sums[line].copy_from_slice(E::registers::<S>(&sums[..Self::LINE]));
    }

    /// Adds to every line the same registers times its factor, one fused multiply-add for each number.
    #[inline(always)]
    pub(super) fn add(&mut self, factors: [E; LINES], numbers: &[E::Register<S>; WIDTH]) {
        for (sums, factor) in self.sums.iter_mut().zip(factors) {
            let factor = E::splat(self.simd, factor);
            for (sum, &numbers) in sums.iter_mut().zip(numbers) {
                *sum = E::mul_add_registers(self.simd, factor, numbers, *sum);
            }
        }
    }

    /// Multiplies a line by a number.
    #[inline(always)]
    pub(super) fn scale(&mut self, line: usize, scale: E) {
        let scale = E::splat(self.simd, scale);
        for sum in &mut self.sums[line] {
            *sum = E::mul_registers(self.simd, *sum, scale);
        }
    }

    /// Multiplies every line by these numbers.
    #[inline(always)]
    pub(super) fn scale_columns(&mut self, scale: &[E]) {
        let scale = E::registers::<S>(&scale[..Self::LINE]);
        for (sum, &scale) in self
            .sums
            .iter_mut()
            .flat_map(|sums| sums.iter_mut().zip(scale))
        {
            *sum = E::mul_registers(self.simd, *sum, scale);
        }
    }

    /// Writes a line over other numbers.
    #[inline(always)]
    pub(super) fn write(&self, line: usize, place: &mut [E]) {
        E::registers_mut::<S>(&mut place[..Self::LINE]).copy_from_slice(&self.sums[line]);
    }

    /// Writes a line where nothing has been written.
    #[inline(always)]
    pub(super) fn store(&self, line: usize, place: &mut [MaybeUninit<E>]) {
        E::register_places::<S>(&mut place[..Self::LINE]).write_copy_of_slice(&self.sums[line]);
    }
}

/// The first numbers of a slice, as the registers of a line.
///
/// # Panics
///
/// - If there are fewer of them.
#[inline(always)]
pub(super) fn registers<E: Real, S: Simd, const WIDTH: usize>(
    numbers: &[E],
) -> &[E::Register<S>; WIDTH] {
    line(E::registers::<S>(&numbers[..WIDTH * lanes::<E, S>()]), 0)
}

/// Runs a kernel with the sides of a [`Tile`] for spans of this length as constants, `$lines` by `$width`, or another one
/// for spans that are not whole registers.
///
/// | span | processor | `$lines` | `$width` |
/// |---|---|---|---|
/// | two registers, or a multiple | 32 registers | 8 | 2 |
/// | two registers, or a multiple | 16 registers | 4 | 2 |
/// | one register, or a multiple | any | 8 | 1 |
///
/// The span is also a multiple of eight numbers, since eight lines, or parts of eight numbers, have to divide it.
macro_rules! with_registers {
    ($span:expr, $real:ty, $simd:ident, $lines:ident, $width:ident => $run:expr, else $other:expr) => {
        match ($span, lanes::<$real, $simd>()) {
            (span, lanes) if span % (2 * lanes) == 0 && span % 8 == 0 => {
                match $simd::REGISTER_COUNT >= 32 {
                    true => with_registers!(8, 2, $lines, $width => $run),
                    false => with_registers!(4, 2, $lines, $width => $run),
                }
            }
            (span, lanes) if span % lanes == 0 && span % 8 == 0 => {
                with_registers!(8, 1, $lines, $width => $run)
            }
            _ => $other,
        }
    };
    ($lines_value:literal, $width_value:literal, $lines:ident, $width:ident => $run:expr) => {{
        const $lines: usize = $lines_value;
        const $width: usize = $width_value;
        $run
    }};
}

pub(super) use with_registers;

/// Runs a kernel for spans that are not whole registers, with the sides of the tile that it computes at a time as constants:
/// `$lines` by `$line` numbers.
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
