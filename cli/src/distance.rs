//! How far two models are apart.

use std::ops::{AddAssign, Mul, Range, Sub};

use burn::tensor::{DType, Element, TensorData, bf16, f16};
use burn_boft::tensors::{decode, file_name, from_file, is_float, values};
use multiversion::multiversion;

use crate::base::Base;
use crate::error::Error;
use crate::pieces::COMPUTED;

/// How many numbers are compared at a time.
const CHUNK: usize = 2048;
/// How many sums are kept side by side.
const LANES: usize = 16;

/// How far weights are from others, over all rows that were compared.
#[derive(Debug, Default, Clone, Copy)]
pub struct Difference {
    /// The largest difference between two numbers.
    absolute: f64,
    /// `‖A − B‖ / ‖B‖` of the worst weight before this one, in Frobenius norms.
    relative: f64,
    /// The squares of both norms over the rows of this weight so far.
    squares: [f64; 2],
}

impl Difference {
    pub fn absolute(&self) -> f64 {
        self.absolute
    }

    /// The difference of the worst weight, relative to its norm.
    pub fn relative(&self) -> f64 {
        match self.of_weight() {
            Some(relative) => larger(self.relative, relative),
            None => self.relative,
        }
    }

    /// The difference of this weight, relative to its norm. None where that is zero.
    pub fn of_weight(&self) -> Option<f64> {
        let [difference, expected] = self.squares;
        (expected != 0.0).then(|| (difference / expected).sqrt())
    }

    /// Begins another weight.
    pub fn next(&mut self) {
        (self.relative, self.squares) = (self.relative(), [0.0; 2]);
    }

    /// Adds what other rows of this weight have shown.
    pub fn include(&mut self, rows: &Self) {
        self.absolute = larger(self.absolute, rows.absolute);
        for (square, other) in self.squares.iter_mut().zip(rows.squares) {
            *square += other;
        }
    }

    /// Compares rows of a weight with those that are expected.
    pub fn widen(&mut self, found: &TensorData, expected: &TensorData) {
        match (found.dtype(), expected.dtype()) {
            (DType::F32, DType::F32) => {
                self.widen_slices(found, expected, <f64 as From<f32>>::from)
            }
            (DType::F16, DType::F16) => self.widen_slices(found, expected, f16::to_f32),
            (DType::BF16, DType::BF16) => {
                // `bf16::to_f32` does the same, and looks at every number whether it is NaN.
                let wide = |number: bf16| f32::from_bits(u32::from(number.to_bits()) << 16);
                self.widen_slices(found, expected, wide);
            }
            _ => self.add(Sums::of(&values(found), &values(expected))),
        }
    }

    /// Compares numbers in `A`, where its sums are neither too large nor too small, and in f64 elsewhere.
    fn widen_slices<T: Element, A: Sum>(
        &mut self,
        found: &TensorData,
        expected: &TensorData,
        widened: impl Fn(T) -> A + Copy,
    ) {
        const KEPT: Range<f64> = 1e-30..1e30;
        let (Ok(found), Ok(expected)) = (found.as_slice::<T>(), expected.as_slice::<T>()) else {
            return self.add(Sums::of(&values(found), &values(expected)));
        };
        for (found, expected) in found.chunks(CHUNK).zip(expected.chunks(CHUNK)) {
            let sums = sums_of_chunk(found, expected, widened);
            let [difference, norm] = sums.squares;
            let is_kept = |square| KEPT.contains(square);
            let is_same = sums.largest == 0.0 && difference == 0.0;
            self.add(match is_kept(&norm) && (is_same || is_kept(&difference)) {
                true => sums,
                false => sums_of_chunk(found, expected, |number| -> f64 { widened(number).into() }),
            });
        }
    }

    fn add(&mut self, Sums { largest, squares }: Sums) {
        // `f64::max` ignores NaN, and a sum does not.
        let absolute = match squares[0].is_nan() {
            true => f64::NAN,
            false => largest,
        };
        self.include(&Self {
            absolute,
            squares,
            ..Self::default()
        });
    }
}

/// What some numbers add to a [`Difference`].
#[derive(Debug, Default, Clone, Copy)]
struct Sums {
    largest: f64,
    squares: [f64; 2],
}

/// What sums are taken in: f32 or f64.
trait Sum: Copy + Default + Into<f64> + Sub<Output = Self> + Mul<Output = Self> + AddAssign {
    /// The larger of this number and the size of another.
    fn or_size(self, number: Self) -> Self;
}

impl Sum for f32 {
    fn or_size(self, number: Self) -> Self {
        self.max(number.abs())
    }
}

impl Sum for f64 {
    fn or_size(self, number: Self) -> Self {
        self.max(number.abs())
    }
}

impl Sums {
    /// Compares numbers, a few of them at a time.
    #[inline(always)]
    fn of<A: Sum>(found: &[A], expected: &[A]) -> Self {
        // Sums that do not wait for each other.
        let zero = A::default();
        let (mut largest, mut squares) = ([zero; LANES], [[zero; LANES]; 2]);
        let mut add = |lane: usize, found: A, expected: A| {
            let difference = found - expected;
            largest[lane] = largest[lane].or_size(difference);
            squares[0][lane] += difference * difference;
            squares[1][lane] += expected * expected;
        };
        let ((found, found_rest), (expected, expected_rest)) =
            (found.as_chunks::<LANES>(), expected.as_chunks::<LANES>());
        for (found, expected) in found.iter().zip(expected) {
            (0..LANES).for_each(|lane| add(lane, found[lane], expected[lane]));
        }
        for (lane, (found, expected)) in found_rest.iter().zip(expected_rest).enumerate() {
            add(lane, *found, *expected);
        }
        Self {
            largest: largest.into_iter().map(Into::into).fold(0.0, f64::max),
            squares: squares.map(|lanes| lanes.into_iter().map(Into::into).sum()),
        }
    }
}

/// Compares as many numbers as a chunk has at most, with the instructions that this processor has.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn sums_of_chunk<T: Element, A: Sum>(
    found: &[T],
    expected: &[T],
    widened: impl Fn(T) -> A,
) -> Sums {
    let mut wide = [[A::default(); CHUNK]; 2];
    for (wide, numbers) in wide.iter_mut().zip([found, expected]) {
        for (wide, &number) in wide.iter_mut().zip(numbers) {
            *wide = widened(number);
        }
    }
    Sums::of(&wide[0][..found.len()], &wide[1][..expected.len()])
}

/// The larger of two numbers, and NaN where one is, which `f64::max` would ignore.
fn larger(a: f64, b: f64) -> f64 {
    match b > a || b.is_nan() {
        true => b,
        false => a,
    }
}

/// Refuses a model that has one of these tensors not at all, in another shape, or not as floats.
pub fn check<'a>(
    base: &Base,
    like: &Base,
    keys: impl Iterator<Item = &'a String>,
) -> Result<(), Error> {
    for key in keys {
        let refuse = |why: String| Err(Error::tensor(&base.path, key, why));
        let (Some((_, found)), Some((_, expected))) = (base.entry(key), like.entry(key)) else {
            return refuse("is not there".into());
        };
        if found.shape != expected.shape {
            let (found, expected, path) = (&found.shape, &expected.shape, like.path.display());
            return refuse(format!("is {found:?}, and {expected:?} in {path}"));
        }
        if !from_file(found.dtype).is_some_and(is_float) {
            let dtype = file_name(found.dtype);
            return refuse(format!("is {dtype}, and only floats are compared"));
        }
    }
    Ok(())
}

/// Compares tensors of a model with those of another, which has them in the same shapes.
pub fn between<'a>(
    found: &Base,
    expected: &Base,
    keys: impl Iterator<Item = &'a String>,
) -> Result<Difference, Error> {
    let mut difference = Difference::default();
    for key in keys {
        difference.next();
        let Some((_, entry)) = expected.entry(key) else {
            continue;
        };
        let count: usize = entry.shape.iter().product();
        for start in (0..count).step_by(COMPUTED) {
            let numbers = start..count.min(start + COMPUTED);
            let part = |model: &Base| -> Result<TensorData, Error> {
                let refuse = || Error::tensor(&model.path, key, "cannot be compared");
                let (shard, entry) = model.entry(key).ok_or_else(refuse)?;
                let width = entry.bytes / count as u64;
                let mut bytes = vec![0; numbers.len() * width as usize];
                shard.read(entry, numbers.start as u64 * width, &mut bytes)?;
                decode(entry.dtype, &bytes, vec![numbers.len()]).ok_or_else(refuse)
            };
            difference.widen(&part(found)?, &part(expected)?);
        }
    }
    Ok(difference)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_whose_squares_f32_does_not_hold_are_counted() {
        let numbers = |last: f32| {
            let numbers = [1.0, last].map(bf16::from_f32);
            TensorData::new(numbers.to_vec(), [2])
        };
        let (found, expected) = (numbers(1.5e-30), numbers(1e-30));
        let apart = bf16::from_f32(1.5e-30).to_f64() - bf16::from_f32(1e-30).to_f64();
        let mut difference = Difference::default();
        difference.widen(&found, &expected);
        for found in [difference.absolute(), difference.relative()] {
            assert!((found / apart - 1.0).abs() < 1e-6, "{found} for {apart}");
        }
    }
}
