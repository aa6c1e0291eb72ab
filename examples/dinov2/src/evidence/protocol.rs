//! The rules of a comparison: what all runs share, which methods take part, and with which learning rates and seeds.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::error::EvidenceError;
use crate::method::Method;

/// The fewest learning rates that a method may choose from.
const LEAST_RATES: usize = 3;

/// The rules of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    pub name: String,
    pub conditions: Conditions,
    pub design: Design,
    /// The methods and their learning rates, in the order of the tables.
    pub entries: Vec<Entry>,
    /// The seeds with which learning rates are tried out; none are needed for a sweep.
    pub search_seeds: Vec<u64>,
    /// The seeds of the final runs.
    pub seeds: Vec<u64>,
}

/// What a comparison finds out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Design {
    /// Each method chooses a learning rate by validation loss, and is then tested at that rate alone.
    Choose,
    /// Every method is tested at every learning rate, and nothing is chosen.
    Sweep,
}

/// A method and the learning rates that it may choose from.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub method: Method,
    /// From the lowest to the highest.
    pub rates: Vec<f64>,
}

/// Everything that all results in one file must share. Seeds, methods and learning rates are not among them, so that a
/// finished comparison can be extended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conditions {
    /// The pretrained model, by name or folder, with something that changes with its weights.
    pub model: String,
    /// Where the numbers were computed.
    pub device: String,
    pub dtype: String,
    /// Pixels along each side of the images that the model reads.
    pub image_size: usize,
    /// The tasks by name, each with something that changes with its images or their split.
    pub tasks: BTreeMap<String, String>,
    /// The second data set, on which forgetting is measured.
    pub forgetting: Option<String>,
    /// How many of a task's images are used at most, evenly from every class; all of them if there is no number.
    pub train_images: Option<usize>,
    pub validation_images: Option<usize>,
    pub epochs: usize,
    /// Images per optimizer step.
    pub batch_size: usize,
    pub max_steps: Option<usize>,
    /// AdamW's decay of everything but scales, biases and norms.
    pub weight_decay: f64,
    /// The share of the steps in which the learning rate rises to its full height, before it falls along a cosine.
    pub warm_up: f64,
    /// The learning rate of the head; that of the run if there is none.
    pub head_rate: Option<f64>,
    pub label_smoothing: f64,
    /// Whether training images are cropped and flipped at random.
    pub augment: bool,
    /// The norm to which the gradient is clipped.
    pub clip_norm: Option<f64>,
}

impl Protocol {
    /// Names the conditions: the name of the protocol and a hash of what all results must share.
    pub fn identity(&self) -> String {
        self.conditions.identity(&self.name)
    }

    /// The names of the tasks.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.conditions.tasks.keys().map(String::as_str)
    }

    /// Checks that the protocol can be run and its results told apart.
    ///
    /// # Errors
    ///
    /// - There is no task, no method or no seed.
    /// - A method has fewer than three learning rates, or rates that are not positive numbers in rising order.
    /// - Two methods have the same label, or a seed occurs twice.
    pub fn check(&self) -> Result<(), EvidenceError> {
        let twice = |seeds: &[u64]| seeds.iter().collect::<BTreeSet<_>>().len() < seeds.len();
        let searches = self.design == Design::Choose;
        let mut labels = BTreeSet::new();
        let mut reason = None;
        if self.conditions.tasks.is_empty() {
            reason = Some("it has no task".to_string());
        } else if self.entries.is_empty() {
            reason = Some("it has no method".to_string());
        } else if self.seeds.is_empty() || searches && self.search_seeds.is_empty() {
            reason = Some("it has no seed".to_string());
        } else if twice(&self.seeds) || twice(&self.search_seeds) {
            reason = Some("a seed is listed twice".to_string());
        }
        for entry in &self.entries {
            let label = entry.method.to_string();
            let rising = entry.rates.is_sorted_by(|low, high| low < high);
            let usable = |rate: &f64| rate.is_finite() && *rate > 0.0;
            if entry.rates.len() < LEAST_RATES {
                reason.get_or_insert(format!(
                    "{label} has {} learning rates, and a fair choice needs at least {LEAST_RATES}",
                    entry.rates.len()
                ));
            } else if !rising || !entry.rates.iter().all(usable) {
                reason.get_or_insert(format!(
                    "the learning rates of {label} must be above 0 and rise"
                ));
            }
            if !labels.insert(label.clone()) {
                reason.get_or_insert(format!("two methods have the label {label}"));
            }
        }
        match reason {
            Some(reason) => Err(EvidenceError::Protocol {
                name: self.name.clone(),
                reason,
            }),
            None => Ok(()),
        }
    }
}

impl Conditions {
    pub(super) fn identity(&self, name: &str) -> String {
        // A struct without maps that have other keys than text always becomes JSON.
        let settings = serde_json::to_string(self).unwrap_or_default();
        format!("{name}-{:016x}", xxh3_64(settings.as_bytes()))
    }

    /// The settings in which two protocols differ, such as `epochs 30 there and 10 here`.
    pub(super) fn differences(there: &Self, here: &Self) -> String {
        let settings = |conditions: &Self| match serde_json::to_value(conditions) {
            Ok(Value::Object(settings)) => settings,
            _ => serde_json::Map::new(),
        };
        let (there, here) = (settings(there), settings(here));
        let differences: Vec<String> = there
            .iter()
            .filter(|(name, value)| here.get(*name) != Some(value))
            .map(|(name, value)| match here.get(name) {
                Some(other) if !value.is_object() => {
                    format!("{name} {value} there and {other} here")
                }
                _ => format!("other {name}"),
            })
            .collect();
        match differences.is_empty() {
            true => "another name".to_string(),
            false => differences.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Preset, Setting};

    fn protocol() -> Protocol {
        Preset::Quick.protocol(Setting::example(&["textiles"]))
    }

    #[test]
    fn the_identity_changes_with_every_condition_and_with_nothing_else() {
        let base = protocol();
        let identity = |change: fn(&mut Protocol)| {
            let mut changed = base.clone();
            change(&mut changed);
            changed.identity()
        };
        let same = base.identity();
        assert!(same.starts_with("quick-"), "{same}");
        assert_eq!(identity(|p| p.seeds = vec![7]), same);
        assert_eq!(identity(|p| p.entries.truncate(1)), same);

        let changes: [fn(&mut Protocol); 6] = [
            |p| p.conditions.epochs += 1,
            |p| p.conditions.weight_decay = 0.3,
            |p| p.conditions.model.push('x'),
            |p| p.conditions.clip_norm = Some(1.0),
            |p| {
                p.conditions.tasks.insert("textiles".into(), "other".into());
            },
            |p| p.name.push('x'),
        ];
        let all: BTreeSet<String> = changes.into_iter().map(identity).chain([same]).collect();
        assert_eq!(all.len(), 7);
    }

    #[test]
    fn differences_name_both_values() {
        let there = protocol().conditions;
        let mut here = there.clone();
        here.epochs = 99;
        here.tasks.clear();
        assert_eq!(
            Conditions::differences(&there, &here),
            format!("epochs {} there and 99 here, other tasks", there.epochs)
        );
    }

    #[test]
    fn a_protocol_that_cannot_be_run_says_why() {
        assert!(protocol().check().is_ok());
        type Change = fn(&mut Protocol);
        let cases: [(Change, &str); 7] = [
            (|p| p.conditions.tasks.clear(), "no task"),
            (|p| p.entries.clear(), "no method"),
            (|p| p.search_seeds.clear(), "no seed"),
            (|p| p.seeds = vec![1, 1], "twice"),
            (|p| p.entries[1].rates.truncate(2), "at least 3"),
            (|p| p.entries[1].rates.reverse(), "rise"),
            (
                |p| p.entries[1].method = p.entries[0].method.clone(),
                "label linear probe",
            ),
        ];
        for (change, named) in cases {
            let mut broken = protocol();
            change(&mut broken);
            let message = broken.check().unwrap_err().to_string();
            assert!(message.contains(named), "{named}: {message}");
        }
    }
}
