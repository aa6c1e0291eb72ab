//! Sums per output channel, whose order does not depend on the number of threads.
//!
//! The gradient of the scale needs `Σ gradient ⊙ output` and that of the bias needs `Σ gradient`. Both read the
//! gradient, so one pass computes both.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::Real;
use super::tile::{LANES, ROWS, line};

/// A dot product of two slices of one length.
struct Dot<'a, E>(&'a [E], &'a [E]);

impl<E: Real> WithSimd for Dot<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        dot(self.0, self.1)
    }
}

/// `Σ lhs ⊙ rhs`, in lanes.
///
/// # Numerics
///
/// Lane `k` adds the products `k`, `k + 16`, `k + 32`, … by fused multiply-adds in the operands' precision. The 16
/// lanes are added to one another in the same precision, half of them to the other half each time, and the products left over
/// in f64. A lane of a row of 4096 numbers has 256 terms, so an f32 sum loses far less than it would in one chain.
#[inline(always)]
pub(super) fn dot<E: Real>(lhs: &[E], rhs: &[E]) -> f64 {
    let mut sum = [E::default(); LANES];
    let (lhs, rhs) = (lhs.chunks_exact(LANES), rhs.chunks_exact(LANES));
    let rest = lhs.remainder().iter().zip(rhs.remainder());
    let rest: f64 = rest.map(|(&lhs, &rhs)| (lhs * rhs).into()).sum();
    for (lhs, rhs) in lhs.zip(rhs) {
        for lane in 0..LANES {
            sum[lane] = lhs[lane].mul_add(rhs[lane], sum[lane]);
        }
    }
    let sum: f64 = across(sum).into();
    sum + rest
}

/// The sum of the lanes: of the two halves, then of the halves of these, so that few additions wait for another one.
#[inline(always)]
fn across<E: Real>(mut lanes: [E; LANES]) -> E {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `Σ gradient ⊙ output` and `Σ gradient` per column, from partial sums of a fixed size.
///
/// For activations, whose output channels are columns. Each task takes [`ROWS`] rows, contiguous in memory, and adds
/// them to two rows of sums of its own; [`total`] adds these up.
///
/// # Shapes
///
/// - gradient, output: `[rows, columns]`
/// - results: `[columns]` each
///
/// # Numerics
///
/// Partial sums of [`ROWS`] rows run in the operands' precision, with one rounding for each product and its addition.
/// Partial sums are added in f64 and rounded once.
pub(super) fn column_sums<E: Real>(gradient: &[E], output: &[E], columns: usize) -> [Vec<E>; 2] {
    if output.is_empty() {
        return [(); 2].map(|()| vec![E::default(); columns]);
    }
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

/// A partial sum of [`column_sums`].
struct ColumnSums<'a, E> {
    /// `2·columns` numbers: the sums of the products, then those of the gradient alone.
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

/// Sums the rows of a task, [`LANES`] columns at a time.
///
/// The loop over rows is inside the loop over columns, so that both sums of 16 columns stay in registers from the
/// first row to the last and are written once. In f32, 16 numbers are one cache line, so that walking down the rows
/// uses all that it reads. Columns beyond the last full tile are summed one by one.
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
///
/// For an `[o, d]` weight, whose output channels are rows. Every sum belongs to one row, so there are no partial
/// sums; a task takes at least [`ROWS`] rows.
///
/// # Shapes
///
/// - gradient, output: `[rows, columns]`
/// - results: `[rows]` each
///
/// # Numerics
///
/// The products are summed as [`dot`] sums them, the gradient alone in f64 throughout. Each is rounded once.
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

/// Sums that one task of [`total`] computes: 32 KiB of f64, which stay in a small cache while every partial sum
/// passes by.
const SUMMED: usize = 1 << 12;

/// Adds partial sums, in f64 and always in the same order.
///
/// Tasks divide the sums among themselves, not the partial sums, so that the order of additions is the order of the
/// rows for any number of threads.
///
/// # Shapes
///
/// - partial: slices of `len` numbers each, in the order of their rows
/// - result: `[len]`
pub(super) fn total<E: Real>(partial: &[Vec<E>], len: usize) -> Vec<f64> {
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
