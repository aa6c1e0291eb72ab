//! How sure a number is that was measured with a few seeds on a few hundred test images.
//!
//! All runs of a task are tested on the same images, so two things are drawn at random: the seeds, and the test images.
//! A bootstrap that only resamples the seeds asks how the numbers would change with other seeds *on these images*, and its
//! intervals are too narrow for a statement about the task. [`Bootstrap::crossed`] therefore resamples the seeds and,
//! independently, the images, each with replacement, and takes every combination (Owen, *The pigeonhole bootstrap*, Annals
//! of Applied Statistics 2007). For the difference of two methods it resamples the differences between runs with the same
//! seed on the same image, so that an image that is difficult for both does not widen the interval.
//!
//! With `n` seeds, a percentile bootstrap understates the variance between seeds by the factor `(n − 1)/n`, a fifth for five
//! seeds. With one seed, its intervals are about the test images alone.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The mean; not a number without values.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation of a sample, with `n − 1` in the denominator; none of fewer than two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let mean = mean(values);
    let squares = values.iter().map(|value| (value - mean).powi(2));
    Some((squares.sum::<f64>() / (values.len() - 1) as f64).sqrt())
}

/// The share `share` of sorted values lies below this one. It interpolates linearly between neighbours, as NumPy does by
/// default.
///
/// # Panics
///
/// There are no values, or the share is not within 0 and 1.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    assert!(
        !sorted.is_empty() && (0.0..=1.0).contains(&share),
        "a quantile is a share of values"
    );
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

/// Adjusts the p-values of several comparisons, so that a threshold on them bounds the probability of any false discovery.
///
/// # References
///
/// Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of Statistics 1979.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut adjusted = vec![0.0; p_values.len()];
    let mut highest = 0.0_f64;
    for (rank, &index) in order.iter().enumerate() {
        let factor = (p_values.len() - rank) as f64;
        highest = highest.max((factor * p_values[index]).min(1.0));
        adjusted[index] = highest;
    }
    adjusted
}

/// A range that covers the true value with the probability of [`Bootstrap::level`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

/// A mean and what the bootstrap says about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub mean: f64,
    pub interval: Interval,
    /// How often a mean as far from zero would come about if the true one were zero, to either side. It is never below
    /// `2/(resamples + 1)`.
    pub p_value: f64,
}

/// A percentile bootstrap. The same seed gives the same numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bootstrap {
    pub resamples: usize,
    /// The probability with which an interval is meant to cover the true value.
    pub level: f64,
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            resamples: 10_000,
            level: 0.95,
            seed: 0,
        }
    }
}

impl Bootstrap {
    /// The mean of one number for each seed, such as the forgetting. None of fewer than two values, which say nothing about
    /// others.
    pub fn mean(&self, values: &[f64]) -> Option<Estimate> {
        if values.len() < 2 {
            return None;
        }
        let mut rng = StdRng::seed_from_u64(self.seed);
        let draws = (0..self.resamples).map(|_| {
            let drawn = (0..values.len()).map(|_| values[rng.random_range(0..values.len())]);
            drawn.sum::<f64>() / values.len() as f64
        });
        Some(self.estimate(mean(values), draws.collect()))
    }

    /// The mean of a `[seeds, images]` table. It resamples the seeds and, independently, the images. None of an empty table.
    ///
    /// # Panics
    ///
    /// The rows have different lengths.
    pub fn crossed(&self, rows: &[Vec<f64>]) -> Option<Estimate> {
        let images = rows.first()?.len();
        assert!(
            rows.iter().all(|row| row.len() == images),
            "all seeds were tested on the same images"
        );
        if images == 0 {
            return None;
        }
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut column_sums = vec![0.0; images];
        let draws = (0..self.resamples).map(|_| {
            column_sums.fill(0.0);
            for _ in rows {
                let row = &rows[rng.random_range(0..rows.len())];
                let pairs = column_sums.iter_mut().zip(row);
                pairs.for_each(|(sum, value)| *sum += value);
            }
            let drawn = (0..images).map(|_| column_sums[rng.random_range(0..images)]);
            drawn.sum::<f64>() / (images * rows.len()) as f64
        });
        let draws = draws.collect();
        let row_means: Vec<f64> = rows.iter().map(|row| mean(row)).collect();
        Some(self.estimate(mean(&row_means), draws))
    }

    fn estimate(&self, mean: f64, mut draws: Vec<f64>) -> Estimate {
        draws.sort_by(f64::total_cmp);
        let tail = (1.0 - self.level) / 2.0;
        // Sums of the same values in another order differ in the last digits, and must count as zero if one of them does.
        let zero = 1e-12;
        let not_above = draws.iter().filter(|draw| **draw <= zero).count();
        let not_below = draws.iter().filter(|draw| **draw >= -zero).count();
        let rarer = not_above.min(not_below) + 1;
        Estimate {
            mean,
            interval: Interval {
                low: quantile(&draws, tail),
                high: quantile(&draws, 1.0 - tail),
            },
            p_value: (2.0 * rarer as f64 / (draws.len() + 1) as f64).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// What NumPy, SciPy and statsmodels make of the same numbers; see `make.py` beside the file.
    #[derive(Deserialize)]
    struct Reference {
        sample: Vec<f64>,
        mean: f64,
        deviation: f64,
        shares: Vec<f64>,
        quantiles: Vec<f64>,
        mean_interval: [f64; 2],
        three: Vec<f64>,
        three_interval: [f64; 2],
        p_values: Vec<f64>,
        holm: Vec<f64>,
        /// `[2 methods, 5 seeds, 60 images]`
        marks: Vec<Vec<Vec<f64>>>,
        difference: f64,
        crossed_interval: [f64; 2],
        crossed_p: f64,
        seeds_only_interval: [f64; 2],
    }

    fn reference() -> Reference {
        let text = include_str!("../../tests/fixtures/statistics/reference.json");
        serde_json::from_str(text).unwrap()
    }

    /// The second method minus the first.
    fn differences(reference: &Reference) -> Vec<Vec<f64>> {
        let [first, second] = [&reference.marks[0], &reference.marks[1]];
        let rows = second.iter().zip(first);
        rows.map(|(b, a)| b.iter().zip(a).map(|(b, a)| b - a).collect())
            .collect()
    }

    fn assert_close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance,
            "{found} is not within {tolerance} of {expected}"
        );
    }

    #[test]
    fn mean_deviation_and_quantiles_are_those_of_numpy() {
        let reference = reference();
        assert_close(mean(&reference.sample), reference.mean, 1e-15);
        let spread = deviation(&reference.sample).unwrap();
        assert_close(spread, reference.deviation, 1e-15);
        assert_eq!(deviation(&[0.5]), None);

        let mut sorted = reference.sample;
        sorted.sort_by(f64::total_cmp);
        for (share, expected) in reference.shares.into_iter().zip(reference.quantiles) {
            assert_close(quantile(&sorted, share), expected, 1e-15);
        }
    }

    #[test]
    fn holm_adjusts_as_statsmodels_does() {
        let reference = reference();
        let adjusted = holm(&reference.p_values);
        assert_eq!(adjusted.len(), reference.holm.len());
        for (found, expected) in adjusted.into_iter().zip(reference.holm) {
            assert_close(found, expected, 1e-15);
        }
        assert_eq!(holm(&[]), Vec::<f64>::new());
    }

    #[test]
    fn the_bootstrap_of_three_values_is_the_enumerated_one() {
        let reference = reference();
        let bootstrap = Bootstrap {
            level: 0.8,
            ..Bootstrap::default()
        };
        let interval = bootstrap.mean(&reference.three).unwrap().interval;
        assert_close(interval.low, reference.three_interval[0], 1e-12);
        assert_close(interval.high, reference.three_interval[1], 1e-12);
    }

    #[test]
    fn the_bootstrap_of_a_mean_is_that_of_scipy() {
        let reference = reference();
        let estimate = Bootstrap::default().mean(&reference.sample).unwrap();
        assert_close(estimate.mean, reference.mean, 1e-15);
        // Monte Carlo error: the interval is 0.02 wide.
        let [low, high] = reference.mean_interval;
        assert_close(estimate.interval.low, low, 5e-4);
        assert_close(estimate.interval.high, high, 5e-4);
        assert_eq!(Bootstrap::default().mean(&[0.9]), None);
    }

    #[test]
    fn the_crossed_bootstrap_is_that_of_numpy() {
        let reference = reference();
        let estimate = Bootstrap::default()
            .crossed(&differences(&reference))
            .unwrap();
        assert_close(estimate.mean, reference.difference, 1e-12);
        // Monte Carlo error, and steps of 1/300: the interval is 0.22 wide.
        let [low, high] = reference.crossed_interval;
        assert_close(estimate.interval.low, low, 7e-3);
        assert_close(estimate.interval.high, high, 7e-3);
        assert_close(estimate.p_value, reference.crossed_p, 2e-3);
    }

    #[test]
    fn resampling_the_seeds_alone_would_be_too_narrow() {
        let reference = reference();
        let rows = differences(&reference);
        let per_seed: Vec<f64> = rows.iter().map(|row| mean(row)).collect();
        let narrow = Bootstrap::default().mean(&per_seed).unwrap().interval;
        let [low, high] = reference.seeds_only_interval;
        assert_close(narrow.low, low, 7e-3);
        assert_close(narrow.high, high, 7e-3);
        let wide = Bootstrap::default().crossed(&rows).unwrap().interval;
        assert!(wide.high - wide.low > 1.5 * (narrow.high - narrow.low));
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let rows = differences(&reference());
        let estimate = |seed| {
            let bootstrap = Bootstrap {
                seed,
                resamples: 500,
                ..Bootstrap::default()
            };
            bootstrap.crossed(&rows)
        };
        assert_eq!(estimate(3), estimate(3));
        assert_ne!(estimate(3), estimate(4));
    }

    #[test]
    fn no_difference_at_all_is_certain_chance() {
        let rows = vec![vec![0.0; 20]; 3];
        let estimate = Bootstrap::default().crossed(&rows).unwrap();
        assert_eq!((estimate.mean, estimate.p_value), (0.0, 1.0));
        assert_eq!(Bootstrap::default().crossed(&[]), None);
        assert_eq!(Bootstrap::default().crossed(&[vec![], vec![]]), None);
    }
}
