//! What has to run, in which order, and which learning rate the searches lead to.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::outcome::Outcome;
use super::protocol::{Design, Entry, Protocol};
use crate::method::Method;

/// One training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub task: String,
    pub method: Method,
    pub learning_rate: f64,
    /// Fixes the new head, the order of the images, augmentation and dropout, but not which images are test images.
    pub seed: u64,
    pub stage: Stage,
}

/// Why a training is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// To choose a learning rate by validation data; test images are not looked at.
    Search,
    /// To be reported, test images included.
    Final,
}

/// The learning rate that the searches led to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub learning_rate: f64,
    /// The mean over the search seeds of the validation loss at this rate; infinite if every rate diverged.
    pub loss: f64,
    /// The side of the grid on which the rate lies. A better rate may then lie outside.
    pub edge: Option<Edge>,
}

/// A side of a grid of learning rates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    Lowest,
    Highest,
}

/// One run in a few words, such as `BOFT b=8 m=2 on textiles at 1e-3, seed 4`.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            task,
            method,
            learning_rate,
            seed,
            stage,
        } = self;
        write!(f, "{method} on {task} at {learning_rate:e}, seed {seed}")?;
        match stage {
            Stage::Search => write!(f, " (search)"),
            Stage::Final => Ok(()),
        }
    }
}

impl Protocol {
    /// The first run that has no outcome yet; none once everything is done.
    pub fn next(&self, outcomes: &[Outcome]) -> Option<Run> {
        self.plan(outcomes)
            .into_iter()
            .find(|run| !outcomes.iter().any(|outcome| outcome.run == *run))
    }

    /// How many runs of this protocol have an outcome, and how many there are.
    pub fn progress(&self, outcomes: &[Outcome]) -> (usize, usize) {
        let done = self.plan(outcomes).iter().fold(0, |done, run| {
            done + usize::from(outcomes.iter().any(|outcome| outcome.run == *run))
        });
        let per_task = self.entries.iter().map(|entry| match self.design {
            Design::Choose => entry.rates.len() * self.search_seeds.len() + self.seeds.len(),
            Design::Sweep => entry.rates.len() * self.seeds.len(),
        });
        (done, self.tasks().count() * per_task.sum::<usize>())
    }

    /// Every run that is known by now, in order: the searches of a task before its final runs, and each seed with all
    /// methods before the next seed, so that a comparison that is stopped early has complete seeds.
    pub fn plan(&self, outcomes: &[Outcome]) -> Vec<Run> {
        let mut runs = Vec::new();
        for task in self.tasks() {
            if self.design == Design::Choose {
                for &seed in &self.search_seeds {
                    runs.extend(self.every_rate(task, seed, Stage::Search));
                }
            }
            for &seed in &self.seeds {
                match self.design {
                    Design::Choose => runs.extend(self.entries.iter().filter_map(|entry| {
                        let choice = self.choice(task, entry, outcomes)?;
                        Some(run(task, entry, choice.learning_rate, seed, Stage::Final))
                    })),
                    Design::Sweep => runs.extend(self.every_rate(task, seed, Stage::Final)),
                }
            }
        }
        runs
    }

    /// The learning rate of a method on a task: the one with the lowest mean validation loss over the search seeds, and of
    /// equal ones the lowest. A training that diverged counts as an infinite loss. None until every search is done, and in a
    /// sweep, which chooses nothing.
    pub fn choice(&self, task: &str, entry: &Entry, outcomes: &[Outcome]) -> Option<Choice> {
        if self.design == Design::Sweep {
            return None;
        }
        let losses: Vec<f64> = entry
            .rates
            .iter()
            .map(|&rate| self.search_loss(task, entry, rate, outcomes))
            .collect::<Option<_>>()?;
        let best = (0..losses.len()).min_by(|&a, &b| {
            let rates = entry.rates[a].total_cmp(&entry.rates[b]);
            losses[a].total_cmp(&losses[b]).then(rates)
        })?;
        let edge = |side: Ordering| {
            let beyond = |rate: &f64| rate.total_cmp(&entry.rates[best]) == side;
            !entry.rates.iter().any(beyond)
        };
        Some(Choice {
            learning_rate: entry.rates[best],
            loss: losses[best],
            edge: match (edge(Ordering::Less), edge(Ordering::Greater)) {
                (true, _) => Some(Edge::Lowest),
                (_, true) => Some(Edge::Highest),
                _ => None,
            },
        })
    }

    /// The mean validation loss of a learning rate over the search seeds, once all of them are done.
    pub fn search_loss(
        &self,
        task: &str,
        entry: &Entry,
        rate: f64,
        outcomes: &[Outcome],
    ) -> Option<f64> {
        let losses: Vec<f64> = self
            .search_seeds
            .iter()
            .map(|&seed| {
                let run = run(task, entry, rate, seed, Stage::Search);
                let outcome = outcomes.iter().find(|outcome| outcome.run == run)?;
                let loss = outcome.validation.loss;
                Some(if loss.is_nan() { f64::INFINITY } else { loss })
            })
            .collect::<Option<_>>()?;
        Some(losses.iter().sum::<f64>() / losses.len() as f64)
    }

    fn every_rate<'a>(
        &'a self,
        task: &'a str,
        seed: u64,
        stage: Stage,
    ) -> impl Iterator<Item = Run> + 'a {
        self.entries.iter().flat_map(move |entry| {
            let rates = entry.rates.iter();
            rates.map(move |&rate| run(task, entry, rate, seed, stage))
        })
    }
}

fn run(task: &str, entry: &Entry, learning_rate: f64, seed: u64, stage: Stage) -> Run {
    Run {
        task: task.to_string(),
        method: entry.method.clone(),
        learning_rate,
        seed,
        stage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Preset, Setting, examples};

    /// One method, three rates, two search seeds.
    fn protocol() -> Protocol {
        let mut protocol = Preset::Quick.protocol(Setting::example(&["textiles"]));
        protocol.entries = vec![Entry {
            method: Method::Full,
            rates: vec![1e-5, 1e-4, 1e-3],
        }];
        protocol.search_seeds = vec![0, 1];
        protocol.seeds = vec![0, 1, 2];
        protocol
    }

    /// Searches with these losses, by rate and seed.
    fn searches(protocol: &Protocol, losses: [[f64; 2]; 3]) -> Vec<Outcome> {
        let entry = &protocol.entries[0];
        (0..3)
            .flat_map(|rate| [(rate, 0), (rate, 1)])
            .map(|(rate, seed)| {
                let run = run("textiles", entry, entry.rates[rate], seed, Stage::Search);
                examples::search(run, losses[rate][seed as usize])
            })
            .collect()
    }

    fn chosen(losses: [[f64; 2]; 3]) -> Choice {
        let protocol = protocol();
        let outcomes = searches(&protocol, losses);
        protocol
            .choice("textiles", &protocol.entries[0], &outcomes)
            .unwrap()
    }

    #[test]
    fn the_lowest_mean_validation_loss_chooses_the_rate() {
        let choice = chosen([[0.1, 0.9], [0.4, 0.5], [0.9, 0.2]]);
        assert_eq!((choice.learning_rate, choice.edge), (1e-4, None));
        assert_eq!(choice.loss, 0.45);
    }

    #[test]
    fn the_lower_of_two_equal_rates_is_chosen_and_an_edge_is_reported() {
        let choice = chosen([[0.9, 0.9], [0.5, 0.5], [0.5, 0.5]]);
        assert_eq!((choice.learning_rate, choice.edge), (1e-4, None));
        let choice = chosen([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]);
        assert_eq!(
            (choice.learning_rate, choice.edge),
            (1e-5, Some(Edge::Lowest))
        );
        let choice = chosen([[0.5, 0.5], [0.5, 0.5], [0.5, 0.4]]);
        assert_eq!(choice.edge, Some(Edge::Highest));
    }

    #[test]
    fn a_rate_that_diverged_with_one_seed_is_not_chosen() {
        let choice = chosen([[0.1, f64::NAN], [2.0, 2.0], [3.0, 3.0]]);
        assert_eq!(choice.learning_rate, 1e-4);
        let choice = chosen([[f64::NAN; 2]; 3]);
        assert_eq!((choice.learning_rate, choice.loss), (1e-5, f64::INFINITY));
    }

    #[test]
    fn test_results_have_no_influence_on_the_choice() {
        let protocol = protocol();
        let entry = &protocol.entries[0];
        let mut outcomes = searches(&protocol, [[0.4, 0.4], [0.3, 0.3], [0.5, 0.5]]);
        for &rate in &entry.rates {
            let run = run("textiles", entry, rate, 0, Stage::Final);
            let mut final_run = examples::tested(run, &[rate < 2e-5; 9]);
            final_run.validation.loss = if rate < 2e-5 { 0.0 } else { 9.0 };
            outcomes.push(final_run);
        }
        let choice = protocol.choice("textiles", entry, &outcomes).unwrap();
        assert_eq!(choice.learning_rate, 1e-4);
    }

    #[test]
    fn the_plan_searches_first_then_tests_the_chosen_rate_and_ends() {
        let protocol = protocol();
        let mut outcomes = Vec::new();
        let mut stages = Vec::new();
        while let Some(run) = protocol.next(&outcomes) {
            assert_eq!(protocol.progress(&outcomes), (outcomes.len(), 9));
            stages.push((run.stage, run.learning_rate, run.seed));
            let loss = run.learning_rate;
            outcomes.push(match run.stage {
                Stage::Search => examples::search(run, loss),
                Stage::Final => examples::tested(run, &[true]),
            });
        }
        assert_eq!(protocol.progress(&outcomes), (9, 9));
        let (search, end) = stages.split_at(6);
        assert!(search.iter().all(|run| run.0 == Stage::Search));
        let last = [0, 1, 2].map(|seed| (Stage::Final, 1e-5, seed));
        assert_eq!(end, last);
    }

    #[test]
    fn nothing_is_chosen_before_the_last_search() {
        let protocol = protocol();
        let mut outcomes = searches(&protocol, [[0.4, 0.4], [0.3, 0.3], [0.5, 0.5]]);
        outcomes.remove(3);
        let choice = protocol.choice("textiles", &protocol.entries[0], &outcomes);
        assert_eq!(choice, None);
        let next = protocol.next(&outcomes).unwrap();
        assert_eq!((next.learning_rate, next.seed), (1e-4, 1));
    }

    #[test]
    fn a_sweep_tests_every_rate_with_every_seed() {
        let mut protocol = protocol();
        protocol.design = Design::Sweep;
        let plan = protocol.plan(&[]);
        assert_eq!(plan.len(), 9);
        assert_eq!(protocol.progress(&[]), (0, 9));
        assert!(plan.iter().all(|run| run.stage == Stage::Final));
        // Complete seeds, should it be stopped.
        assert!(plan[..3].iter().all(|run| run.seed == 0));
    }
}
