//! What the outcomes of a task say about its methods, and how sure that is.

use super::error::EvidenceError;
use super::outcome::{Forgetting, Measured, Outcome, Rotation};
use super::plan::{Choice, Stage};
use super::protocol::{Design, Protocol};
use super::statistics::{Bootstrap, Estimate, Interval, deviation, holm, mean};
use crate::method::Method;

/// The probability of any false claim among the paired differences of a task.
const SIGNIFICANCE: f64 = 0.05;

/// What the outcomes of a task say.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub task: String,
    /// How many test images there are.
    pub images: usize,
    /// One row for each method that has final runs, and in a sweep for each learning rate, in the order of the protocol.
    pub rows: Vec<Row>,
    /// All pairs of methods; in a sweep, the first method of the protocol against every other one at the same learning rate.
    pub pairs: Vec<Pair>,
}

/// The final runs of one method at one learning rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub method: Method,
    pub learning_rate: f64,
    /// How the learning rate was chosen; none in a sweep.
    pub choice: Option<Choice>,
    pub seeds: Vec<u64>,
    /// Test accuracies, one for each seed.
    pub accuracies: Vec<f64>,
    /// The mean accuracy over seeds and test images.
    pub accuracy: Estimate,
    /// The change of the accuracy of nearest neighbours on the second data set.
    pub forgetting: Option<Change>,
    pub trainable: usize,
    pub adapter_bytes: u64,
    /// The median over the seeds.
    pub step_ms: f64,
    /// The highest of all seeds.
    pub peak_bytes: Option<u64>,
    /// The largest defect and the largest angle of all seeds; a defect that is not a number stays one.
    pub rotation: Option<Rotation>,
    /// The mean time of a training.
    pub seconds: f64,
}

/// Accuracies of nearest neighbours on the second data set, as means over the seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    pub before: f64,
    pub after: f64,
    /// The standard deviation of the accuracy afterwards.
    pub deviation: Option<f64>,
    /// The interval of the accuracy afterwards, over the seeds.
    pub interval: Option<Interval>,
}

/// The difference in test accuracy between two methods, over the seeds that both have.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Places in [`Summary::rows`]. The difference is the first minus the second.
    pub rows: [usize; 2],
    pub seeds: usize,
    pub difference: Estimate,
    /// The p-value after Holm's correction for all pairs of the task.
    pub adjusted: f64,
    pub verdict: Verdict,
}

/// What may be said about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is not zero, also considering how many pairs there are.
    Distinguishable,
    /// Its interval excludes zero, but among so many pairs that may be chance.
    OnlyAlone,
    /// Zero lies within the interval.
    Not,
}

/// A row under construction: the final runs that it stands for.
struct Group<'a> {
    method: &'a Method,
    learning_rate: f64,
    choice: Option<Choice>,
    runs: Vec<(&'a Outcome, &'a Measured)>,
}

impl Summary {
    /// One summary for each task that has final runs.
    ///
    /// Final runs at a learning rate that the search would not choose, such as those of an earlier, smaller grid, are left
    /// out.
    ///
    /// # Errors
    ///
    /// Two runs of a task were tested on different numbers of images.
    pub fn of(
        protocol: &Protocol,
        outcomes: &[Outcome],
        bootstrap: &Bootstrap,
    ) -> Result<Vec<Self>, EvidenceError> {
        let mut summaries = Vec::new();
        for task in protocol.tasks() {
            let groups = groups(protocol, task, outcomes);
            let Some((_, first)) = groups.first().and_then(|group| group.runs.first()) else {
                continue;
            };
            let images = first.test.correct.len();
            for (outcome, measured) in groups.iter().flat_map(|group| &group.runs) {
                let found = measured.test.correct.len();
                if found != images {
                    return Err(EvidenceError::TestImages {
                        run: Box::new(outcome.run.clone()),
                        found,
                        expected: images,
                    });
                }
            }
            let rows = groups.iter().filter_map(|group| group.row(bootstrap));
            summaries.push(Self {
                task: task.to_string(),
                images,
                rows: rows.collect(),
                pairs: pairs(protocol.design, &groups, bootstrap),
            });
        }
        Ok(summaries)
    }
}

/// The final runs of a task, without empty groups.
fn groups<'a>(protocol: &'a Protocol, task: &str, outcomes: &'a [Outcome]) -> Vec<Group<'a>> {
    let mut groups = Vec::new();
    for entry in &protocol.entries {
        let choice = protocol.choice(task, entry, outcomes);
        let chosen = choice.map(|choice| choice.learning_rate);
        for &rate in &entry.rates {
            if protocol.design == Design::Choose && chosen != Some(rate) {
                continue;
            }
            let runs: Vec<_> = protocol
                .seeds
                .iter()
                .filter_map(|&seed| {
                    let outcome = outcomes.iter().find(|outcome| {
                        let run = &outcome.run;
                        run.task == task
                            && run.method == entry.method
                            && run.learning_rate == rate
                            && run.seed == seed
                            && run.stage == Stage::Final
                    })?;
                    Some((outcome, outcome.measured.as_ref()?))
                })
                .collect();
            if !runs.is_empty() {
                groups.push(Group {
                    method: &entry.method,
                    learning_rate: rate,
                    choice,
                    runs,
                });
            }
        }
    }
    groups
}

impl Group<'_> {
    fn row(&self, bootstrap: &Bootstrap) -> Option<Row> {
        let measured: Vec<&Measured> = self.runs.iter().map(|(_, measured)| *measured).collect();
        let marks: Vec<Vec<f64>> = measured.iter().map(|run| marks(run)).collect();
        let forgetting: Option<Vec<Forgetting>> =
            measured.iter().map(|run| run.forgetting).collect();
        let rotations: Option<Vec<Rotation>> =
            self.runs.iter().map(|(run, _)| run.rotation).collect();
        let mut steps: Vec<f64> = measured.iter().map(|run| run.cost.step_ms).collect();
        steps.sort_by(f64::total_cmp);
        let seconds: Vec<f64> = self.runs.iter().map(|(run, _)| run.seconds).collect();
        let cost = measured.first()?.cost;
        Some(Row {
            method: self.method.clone(),
            learning_rate: self.learning_rate,
            choice: self.choice,
            seeds: self.runs.iter().map(|(run, _)| run.run.seed).collect(),
            accuracies: measured.iter().map(|run| run.test.accuracy()).collect(),
            accuracy: bootstrap.crossed(&marks)?,
            forgetting: forgetting.map(|values| Change::of(&values, bootstrap)),
            trainable: cost.trainable,
            adapter_bytes: cost.adapter_bytes,
            step_ms: steps[steps.len() / 2],
            peak_bytes: measured.iter().filter_map(|run| run.cost.peak_bytes).max(),
            rotation: rotations.map(|rotations| worst(&rotations)),
            seconds: mean(&seconds),
        })
    }

    /// A `[seeds, images]` table: 1 where only this group is right, −1 where only the other one is, over common seeds.
    fn minus(&self, other: &Self) -> Vec<Vec<f64>> {
        let common = self.runs.iter().filter_map(|(run, measured)| {
            let seed = run.run.seed;
            let (_, other) = other.runs.iter().find(|(run, _)| run.run.seed == seed)?;
            let pairs = marks(measured).into_iter().zip(marks(other));
            Some(pairs.map(|(left, right)| left - right).collect())
        });
        common.collect()
    }
}

impl Change {
    fn of(values: &[Forgetting], bootstrap: &Bootstrap) -> Self {
        let before: Vec<f64> = values.iter().map(|value| value.before).collect();
        let after: Vec<f64> = values.iter().map(|value| value.after).collect();
        Self {
            before: mean(&before),
            after: mean(&after),
            deviation: deviation(&after),
            interval: bootstrap.mean(&after).map(|estimate| estimate.interval),
        }
    }
}

fn marks(measured: &Measured) -> Vec<f64> {
    let correct = measured.test.correct.iter();
    correct
        .map(|&correct| f64::from(u8::from(correct)))
        .collect()
}

fn worst(rotations: &[Rotation]) -> Rotation {
    // `f64::max` alone would prefer any number to one that is not a number.
    let largest = |value: fn(&Rotation) -> f64| {
        let larger = |a: f64, b: f64| {
            if a.is_nan() {
                a
            } else if b.is_nan() {
                b
            } else {
                a.max(b)
            }
        };
        rotations.iter().map(value).fold(0.0, larger)
    };
    Rotation {
        defect: largest(|rotation| rotation.defect),
        angle: largest(|rotation| rotation.angle),
    }
}

fn pairs(design: Design, groups: &[Group], bootstrap: &Bootstrap) -> Vec<Pair> {
    let compared = |left: usize, right: usize| match design {
        Design::Choose => left < right,
        Design::Sweep => {
            groups[left].method != groups[0].method
                && groups[right].method == groups[0].method
                && groups[left].learning_rate == groups[right].learning_rate
        }
    };
    let mut pairs: Vec<Pair> = Vec::new();
    for left in 0..groups.len() {
        for right in (0..groups.len()).filter(|&right| compared(left, right)) {
            let differences = groups[left].minus(&groups[right]);
            // The better one first, so that differences are positive. In a sweep the reference always comes second.
            let total: f64 = differences.iter().flatten().sum();
            let swapped = design == Design::Choose && total < 0.0;
            let (rows, differences) = match swapped {
                true => ([right, left], groups[right].minus(&groups[left])),
                false => ([left, right], differences),
            };
            pairs.extend(bootstrap.crossed(&differences).map(|difference| Pair {
                rows,
                seeds: differences.len(),
                difference,
                adjusted: difference.p_value,
                verdict: Verdict::Not,
            }));
        }
    }
    let p_values: Vec<f64> = pairs.iter().map(|pair| pair.adjusted).collect();
    for (pair, adjusted) in pairs.iter_mut().zip(holm(&p_values)) {
        pair.adjusted = adjusted;
        pair.verdict = Verdict::of(adjusted, pair.difference.interval);
    }
    pairs
}

impl Verdict {
    fn of(adjusted: f64, Interval { low, high }: Interval) -> Self {
        match (adjusted < SIGNIFICANCE, low > 0.0 || high < 0.0) {
            (true, _) => Self::Distinguishable,
            (false, true) => Self::OnlyAlone,
            (false, false) => Self::Not,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Preset, Setting, examples};

    fn bootstrap() -> Bootstrap {
        Bootstrap {
            resamples: 2_000,
            ..Bootstrap::default()
        }
    }

    fn pair<'a>(summary: &'a Summary, left: &str, right: &str) -> &'a Pair {
        let labels = |pair: &Pair| pair.rows.map(|row| summary.rows[row].method.to_string());
        let found = summary.pairs.iter().find(|pair| {
            let labels = labels(pair);
            labels == [left, right]
        });
        found.unwrap_or_else(|| panic!("{left} before {right}: {:?}", summary.pairs))
    }

    #[test]
    fn methods_with_the_same_accuracy_are_not_distinguishable_and_a_worse_one_is() {
        let protocol = examples::quick();
        let outcomes = examples::finished(&protocol, 400, examples::right);
        let summaries = Summary::of(&protocol, &outcomes, &bootstrap()).unwrap();
        assert_eq!(summaries.len(), 1);
        let summary = &summaries[0];
        assert_eq!((summary.rows.len(), summary.pairs.len()), (5, 10));
        assert_eq!(summary.images, 400);
        assert_eq!(summary.rows[0].accuracy.mean, 0.5);
        assert_eq!(summary.rows[3].seeds, [0, 1, 2, 3, 4]);

        let clear = pair(summary, "BOFT b=8 m=2", "linear probe");
        assert!((clear.difference.mean - 0.4).abs() < 1e-12);
        assert_eq!(clear.verdict, Verdict::Distinguishable);
        let tie = summary.pairs.iter().find(|pair| pair.rows == [2, 3]);
        assert_eq!(tie.unwrap().verdict, Verdict::Not);
    }

    #[test]
    fn the_correction_for_many_pairs_changes_the_verdict() {
        let interval = Interval {
            low: 0.001,
            high: 0.02,
        };
        assert_eq!(Verdict::of(0.3, interval), Verdict::OnlyAlone);
        assert_eq!(Verdict::of(0.01, interval), Verdict::Distinguishable);
        let around = Interval {
            low: -0.1,
            ..interval
        };
        assert_eq!(Verdict::of(0.3, around), Verdict::Not);
    }

    #[test]
    fn final_runs_of_a_rate_that_is_no_longer_chosen_are_left_out() {
        let mut protocol = examples::quick();
        let mut outcomes = examples::finished(&protocol, 40, examples::right);
        let before = Summary::of(&protocol, &outcomes, &bootstrap()).unwrap();
        // A larger grid has a better rate, whose final runs are not there yet.
        protocol.entries[4].rates.push(2e-3);
        let run = protocol.next(&outcomes).unwrap();
        outcomes.push(examples::search(run, -1.0));
        let after = Summary::of(&protocol, &outcomes, &bootstrap()).unwrap();
        assert_eq!(after[0].rows, before[0].rows[..4]);
        assert_eq!(after[0].pairs.len(), 6);
    }

    #[test]
    fn an_unfinished_comparison_pairs_common_seeds() {
        let protocol = examples::quick();
        let mut outcomes = examples::finished(&protocol, 40, examples::right);
        outcomes.truncate(outcomes.len() - 2);
        let summary = &Summary::of(&protocol, &outcomes, &bootstrap()).unwrap()[0];
        assert_eq!(summary.rows[4].seeds, [0, 1, 2, 3]);
        let last = summary.pairs.iter().find(|pair| pair.rows.contains(&4));
        assert_eq!(last.unwrap().seeds, 4);
    }

    #[test]
    fn different_numbers_of_test_images_are_an_error() {
        let protocol = examples::quick();
        let mut outcomes = examples::finished(&protocol, 40, examples::right);
        let last = outcomes.last_mut().unwrap();
        last.measured.as_mut().unwrap().test.correct.pop();
        let error = Summary::of(&protocol, &outcomes, &bootstrap()).unwrap_err();
        assert!(error.to_string().contains("39 images"), "{error}");
    }

    #[test]
    fn a_defect_that_is_not_a_number_is_not_hidden() {
        let rotation = |defect| Rotation { defect, angle: 0.1 };
        let worst = worst(&[rotation(1e-3), rotation(f64::NAN), rotation(1e-2)]);
        assert!(worst.defect.is_nan());
        assert_eq!(worst.angle, 0.1);
    }

    #[test]
    fn a_sweep_compares_each_polynomial_with_the_exact_map_at_each_rate() {
        let protocol = Preset::Cayley.protocol(Setting::example(&["textiles"]));
        let outcomes = examples::finished(&protocol, 40, examples::right);
        let summary = &Summary::of(&protocol, &outcomes, &bootstrap()).unwrap()[0];
        assert_eq!((summary.rows.len(), summary.pairs.len()), (20, 15));
        for pair in &summary.pairs {
            let [left, right] = pair.rows.map(|row| &summary.rows[row]);
            assert_eq!(right.method, protocol.entries[0].method);
            assert_ne!(left.method, right.method);
            assert_eq!(left.learning_rate, right.learning_rate);
        }
    }
}
