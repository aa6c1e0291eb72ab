//! Functions of single numbers, written so that loops over them become vector instructions.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Numbers that one task maps.
const CHUNK: usize = 1 << 14;

/// `f` of every pair of numbers.
pub(super) fn map(
    lhs: &[f32],
    rhs: &[f32],
    f: impl Fn(f32, f32) -> f32 + Copy + Send + Sync,
) -> Vec<f32> {
    let arch = Arch::new();
    let mut output = vec![0.0; lhs.len()];
    output
        .par_chunks_mut(CHUNK)
        .zip(lhs.par_chunks(CHUNK).zip(rhs.par_chunks(CHUNK)))
        .for_each(|(output, (lhs, rhs))| {
            arch.dispatch(Map {
                output,
                lhs,
                rhs,
                f,
            })
        });
    output
}

/// A chunk of [`map`].
struct Map<'a, F> {
    output: &'a mut [f32],
    lhs: &'a [f32],
    rhs: &'a [f32],
    f: F,
}

impl<F: Fn(f32, f32) -> f32> WithSimd for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for ((output, &lhs), &rhs) in self.output.iter_mut().zip(self.lhs).zip(self.rhs) {
            *output = (self.f)(lhs, rhs);
        }
    }
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
