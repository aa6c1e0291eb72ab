//! How far two models are apart.

use burn::tensor::TensorData;
use burn_boft::tensors::{decode, file_name, from_file, is_float};

use crate::base::Base;
use crate::error::Error;
use crate::interrupt;
use crate::pieces::COMPUTED;
use crate::sums::{Sums, compare};

/// How far weights are from others, over all rows that were compared.
#[derive(Debug, Default, Clone, Copy)]
pub struct Difference {
    /// The largest difference between two numbers.
    absolute: f64,
    relative: Relative,
}

/// How far weights are from others, relative to the norms of these, over all rows that were compared.
#[derive(Debug, Default, Clone, Copy)]
pub struct Relative {
    /// `‖A − B‖ / ‖B‖` of the worst weight before this one, in Frobenius norms.
    worst: f64,
    /// The squares of both norms over the rows of this weight so far.
    squares: [f64; 2],
}

impl Relative {
    /// The difference of the worst weight.
    pub fn worst(&self) -> f64 {
        match self.of_weight() {
            Some(relative) => larger(self.worst, relative),
            None => self.worst,
        }
    }

    /// The difference of this weight. None where its norm is zero.
    pub fn of_weight(&self) -> Option<f64> {
        let [difference, expected] = self.squares;
        (expected != 0.0).then(|| (difference / expected).sqrt())
    }

    /// Begins another weight.
    pub fn next(&mut self) {
        (self.worst, self.squares) = (self.worst(), [0.0; 2]);
    }

    /// Adds the squares of both norms over other rows of this weight.
    pub fn add(&mut self, squares: [f64; 2]) {
        for (sum, square) in self.squares.iter_mut().zip(squares) {
            *sum += square;
        }
    }
}

impl Difference {
    pub fn absolute(&self) -> f64 {
        self.absolute
    }

    /// The difference of the worst weight, relative to its norm.
    pub fn relative(&self) -> f64 {
        self.relative.worst()
    }

    /// The difference of this weight, relative to its norm. None where that is zero.
    pub fn of_weight(&self) -> Option<f64> {
        self.relative.of_weight()
    }

    /// Begins another weight.
    fn next(&mut self) {
        self.relative.next();
    }

    /// Compares rows of a weight with those that are expected.
    pub fn widen(&mut self, found: &TensorData, expected: &TensorData) {
        compare(found, expected, |sums| self.add(sums));
    }

    fn add(&mut self, Sums { largest, squares }: Sums) {
        // `f64::max` ignores NaN, and a sum does not.
        let absolute = match squares[0].is_nan() {
            true => f64::NAN,
            false => largest,
        };
        self.absolute = larger(self.absolute, absolute);
        self.relative.add(squares);
    }
}

/// The larger of two numbers, and NaN where one is, which `f64::max` would ignore.
pub fn larger(a: f64, b: f64) -> f64 {
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
///
/// # Errors
///
/// [`Error::Interrupted`], and what reading fails with.
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
            interrupt::check()?;
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
    use burn::tensor::bf16;

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
