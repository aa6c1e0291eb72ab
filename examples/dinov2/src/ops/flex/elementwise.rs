//! Functions of numbers and of rows of numbers, written so that loops over them become vector instructions.

use std::mem::MaybeUninit;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Numbers that one task computes, about.
const TASK: usize = 1 << 14;

/// `f` of the numbers at each place of tensors of one shape.
pub(super) fn map<const N: usize>(
    inputs: [&[f32]; N],
    f: impl Fn([f32; N]) -> f32 + Sync,
) -> Vec<f32> {
    map_rows(inputs, [], TASK, |_, []| (), |(), numbers, []| f(numbers))
}

/// Computes every number of a row from what a first look at the whole row found, from the numbers at its place in each
/// input, and from those of its column.
///
/// # Shapes
///
/// - inputs: `[rows, width]`, where the last row may be shorter if there are no columns; so is the result
/// - columns: `[width]`
pub(super) fn map_rows<const N: usize, const C: usize, L>(
    inputs: [&[f32]; N],
    columns: [&[f32]; C],
    width: usize,
    look: impl Fn([&[f32]; N], [&[f32]; C]) -> L + Sync,
    f: impl Fn(&L, [f32; N], [f32; C]) -> f32 + Sync,
) -> Vec<f32> {
    let len = inputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == len));
    assert!(columns.iter().all(|column| column.len() == width));
    assert!(C == 0 || len.is_multiple_of(width.max(1)), "whole rows");
    let width = width.max(1);
    let task = width * (TASK / width).max(1);

    let arch = Arch::new();
    let mut output = Vec::with_capacity(len);
    output.spare_capacity_mut()[..len]
        .par_chunks_mut(task)
        .enumerate()
        .for_each(|(index, output)| {
            let start = index * task;
            arch.dispatch(Rows {
                inputs: inputs.map(|input| &input[start..start + output.len()]),
                output,
                columns,
                width,
                look: &look,
                f: &f,
            });
        });
    // SAFETY: the tasks are all chunks of the `len` numbers, and each wrote every number of its chunk.
    unsafe { output.set_len(len) };
    output
}

/// A task of [`map_rows`].
struct Rows<'a, const N: usize, const C: usize, K, F> {
    inputs: [&'a [f32]; N],
    output: &'a mut [MaybeUninit<f32>],
    columns: [&'a [f32]; C],
    width: usize,
    look: &'a K,
    f: &'a F,
}

impl<const N: usize, const C: usize, L, K, F> WithSimd for Rows<'_, N, C, K, F>
where
    K: Fn([&[f32]; N], [&[f32]; C]) -> L,
    F: Fn(&L, [f32; N], [f32; C]) -> f32,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, output) in self.output.chunks_mut(self.width).enumerate() {
            let start = row * self.width;
            let inputs = self.inputs.map(|input| &input[start..][..output.len()]);
            let columns = self.columns.map(|column| &column[..output.len()]);
            let found = (self.look)(inputs, columns);
            for (place, output) in output.iter_mut().enumerate() {
                let numbers = inputs.map(|input| input[place]);
                output.write((self.f)(
                    &found,
                    numbers,
                    columns.map(|column| column[place]),
                ));
            }
        }
    }
}

/// Sums `f` of the numbers at each place of a row, in lanes of a fixed number, and then the lanes.
#[inline(always)]
pub(super) fn sum<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    const LANES: usize = 32;
    let len = rows[0].len();
    let whole = len - len % LANES;
    let mut lanes = [0.0; LANES];
    for start in (0..whole).step_by(LANES) {
        let rows = rows.map(|row| &row[start..][..LANES]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(rows.map(|row| row[lane]));
        }
    }
    let rest = (whole..len).map(|place| f(rows.map(|row| row[place])));
    lanes.into_iter().chain(rest).sum()
}

/// The distribution function of the standard normal distribution.
#[inline(always)]
pub(super) fn normal_distribution(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2)
}

/// The density of the standard normal distribution.
#[inline(always)]
pub(super) fn normal_density(x: f32) -> f32 {
    const FACTOR: f32 = 0.398_942_3;
    FACTOR * exp(-0.5 * x * x)
}

/// The error function, to a few units in the last place: Eigen's rational approximation.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const NUMERATOR: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_5e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const DENOMINATOR: [f32; 5] = [
        -1.456_607_2e-5,
        -2.133_740_6e-4,
        -1.682_827e-3,
        -7.373_329e-3,
        -1.426_473_9e-2,
    ];
    /// From here on, rounding leaves one.
    const END: f32 = 4.0;
    let bounded = bounded(x, -END, END);
    let square = bounded * bounded;
    let value = bounded * polynomial(square, &NUMERATOR) / polynomial(square, &DENOMINATOR);
    let value = if x >= END { 1.0 } else { value };
    if x <= -END { -1.0 } else { value }
}

/// The exponential function, to a few units in the last place: that of Cephes.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 6] = [
        1.987_569_2e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5e-1,
    ];
    /// Its last bits count ones.
    const COUNTER: f32 = 12_582_912.0;
    let x = bounded(x, -87.0, 88.0);
    let counter = x * std::f32::consts::LOG2_E + COUNTER;
    let power = counter - COUNTER;
    let rest = x - power * 0.693_359_4 + power * 2.121_944_4e-4;
    let mantissa = polynomial(rest, &COEFFICIENTS) * rest * rest + rest + 1.0;
    let exponent = (counter.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    mantissa * f32::from_bits(exponent)
}

/// The highest coefficient first.
#[inline(always)]
fn polynomial(x: f32, coefficients: &[f32]) -> f32 {
    let mut sum = 0.0;
    for coefficient in coefficients {
        sum = sum * x + coefficient;
    }
    sum
}

/// Keeps what is not a number.
#[inline(always)]
fn bounded(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}
