//! Splitting samples into parts for training, validation and testing.

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::Sample;

/// Images for training, for choosing the best epoch, and for the reported accuracy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub train: Vec<Sample>,
    pub valid: Vec<Sample>,
    pub test: Vec<Sample>,
}

/// Which parts are split off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub valid: bool,
    pub test: bool,
}

impl Wanted {
    /// The images that a class needs, so that each part gets one.
    pub(super) fn least(self) -> usize {
        1 + usize::from(self.valid) + usize::from(self.test)
    }

    /// How many images of a class with `count` are for validation and for testing. Without a test part, validation has
    /// the same ratio to training, 15 : 60.
    fn counts(self, count: usize) -> [usize; 2] {
        let test = (count / 4).max(1);
        let valid = match self.test {
            true => (count * 3 / 20).max(1),
            false => (count / 5).max(1),
        };
        [
            valid * usize::from(self.valid),
            test * usize::from(self.test),
        ]
    }
}

/// Splits every class 60 : 15 : 25 into training, validation and test images, always in the same way for the same
/// samples and seed. A class with three images or more has at least one in each part.
pub fn split(samples: &[Sample], seed: u64) -> Parts {
    let wanted = Wanted {
        valid: true,
        test: true,
    };
    split_off(samples, wanted, seed)
}

pub(super) fn split_off(samples: &[Sample], wanted: Wanted, seed: u64) -> Parts {
    let mut rng = StdRng::seed_from_u64(seed);
    let classes = samples.iter().map(|sample| sample.label + 1).max();
    let mut members = vec![Vec::new(); classes.unwrap_or(0)];
    for sample in samples {
        members[sample.label].push(sample.clone());
    }
    let mut parts = Parts::default();
    for mut class in members {
        class.shuffle(&mut rng);
        let [valid, test] = wanted.counts(class.len());
        parts.test.extend(class.drain(..test.min(class.len())));
        parts.valid.extend(class.drain(..valid.min(class.len())));
        parts.train.extend(class);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Source;

    /// Samples that can be told apart, `count` in each class.
    fn samples(counts: &[usize]) -> Vec<Sample> {
        let mut samples = Vec::new();
        for (label, &count) in counts.iter().enumerate() {
            for index in 0..count {
                let source = Source::Grey([label as u8, index as u8].as_slice().into());
                samples.push(Sample { source, label });
            }
        }
        samples
    }

    fn count(samples: &[Sample], label: usize) -> usize {
        samples
            .iter()
            .filter(|sample| sample.label == label)
            .count()
    }

    fn sorted(parts: &Parts) -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = [&parts.train, &parts.valid, &parts.test]
            .into_iter()
            .flatten()
            .map(|sample| match &sample.source {
                Source::Grey(name) => name.to_vec(),
                Source::File(_) => unreachable!(),
            })
            .collect();
        all.sort();
        all
    }

    const ALL: Wanted = Wanted {
        valid: true,
        test: true,
    };

    #[test]
    fn every_class_has_its_share_in_every_part() {
        let parts = split(&samples(&[100, 40, 3]), 7);
        for (label, expected) in [(0, [60, 15, 25]), (1, [24, 6, 10]), (2, [1, 1, 1])] {
            let found = [&parts.train, &parts.valid, &parts.test].map(|part| count(part, label));
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn nothing_is_lost_and_nothing_is_there_twice() {
        for (round, counts) in [[1, 2, 3], [4, 7, 100], [0, 19, 20], [33, 6, 251]]
            .into_iter()
            .enumerate()
        {
            let samples = samples(&counts);
            for wanted in [(true, true), (true, false), (false, true), (false, false)] {
                let (valid, test) = wanted;
                let parts = split_off(&samples, Wanted { valid, test }, round as u64);
                let all = Parts {
                    train: samples.clone(),
                    ..Parts::default()
                };
                assert_eq!(sorted(&parts), sorted(&all));
                assert_eq!(parts.valid.is_empty(), !valid);
                assert_eq!(parts.test.is_empty(), !test);
            }
        }
    }

    #[test]
    fn a_seed_fixes_the_split() {
        let samples = samples(&[30, 30]);
        assert_eq!(split(&samples, 1), split(&samples, 1));
        assert_ne!(split(&samples, 1), split(&samples, 2));
    }

    #[test]
    fn a_class_with_the_least_images_has_one_in_each_part() {
        for wanted in [
            ALL,
            Wanted { test: false, ..ALL },
            Wanted {
                valid: false,
                ..ALL
            },
        ] {
            let parts = split_off(&samples(&[wanted.least()]), wanted, 3);
            let found = [parts.train.len(), parts.valid.len(), parts.test.len()];
            assert_eq!(
                found,
                [1, usize::from(wanted.valid), usize::from(wanted.test)]
            );
        }
    }
}
