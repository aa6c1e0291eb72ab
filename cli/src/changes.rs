//! What an adapter changes in a model: which tensors, and how.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use burn_boft::Adapter;
use burn_boft::value::{AdapterLayer, Axis, SavedTensor};

use crate::base::Base;
use crate::error::Error;

/// One rotation of a tensor: a layer of an adapter, and the rows that it is for.
#[derive(Debug, Clone)]
pub struct Step<'a> {
    /// Where the adapter was read from.
    pub path: &'a Path,
    pub adapter: &'a Adapter,
    pub layer: &'a AdapterLayer,
    pub rows: Range<usize>,
}

/// Rows that are rotated together, and by what, in this order.
pub type RotatedRows<'a> = (Range<usize>, Vec<Step<'a>>);

/// What happens to one tensor of the model.
#[derive(Debug)]
pub enum Change<'a> {
    /// Rows of the weight are rotated.
    Rotate(Vec<RotatedRows<'a>>),
    /// Rows take the numbers of saved tensors.
    Replace(Vec<(Range<usize>, &'a SavedTensor)>),
    /// A saved tensor of another shape replaces the whole tensor.
    New(&'a SavedTensor),
}

impl Change<'_> {
    /// The participle in a message.
    fn verb(&self) -> &'static str {
        match self {
            Self::Rotate(_) => "rotated",
            Self::Replace(_) | Self::New(_) => "replaced",
        }
    }
}

/// Where the numbers of a new tensor come from.
#[derive(Debug, Clone, Copy)]
pub enum Added<'a> {
    /// From the adapter.
    Saved(&'a SavedTensor),
    /// From another tensor of the model, as it is before the merge.
    Copy(&'static str),
}

/// What adapters change in a model, by the model's keys.
#[derive(Debug, Default)]
pub struct Changes<'a> {
    pub of: BTreeMap<String, Change<'a>>,
    /// The adapter that changes or adds a tensor, and of several that rotate it the last.
    pub by: BTreeMap<String, &'a Path>,
    /// The tensors that the model does not have yet.
    pub added: BTreeMap<String, Added<'a>>,
    /// The text of the model's `config.json`, where it changes.
    pub config: Option<String>,
    /// Layers that change nothing, because their blocks have one channel and their scale, if any, is ones.
    pub idle: Vec<String>,
}

impl<'a> Changes<'a> {
    /// How many layers are rotated, each once for every adapter that does so.
    pub fn rotations(&self) -> usize {
        let count = |change: &Change| match change {
            Change::Rotate(parts) => steps(parts).count(),
            _ => 0,
        };
        self.of.values().map(count).sum()
    }

    /// How many tensors are replaced, in part or as a whole.
    pub fn replacements(&self) -> usize {
        let replaces = |change: &&Change| !matches!(change, Change::Rotate(_));
        self.of.values().filter(replaces).count()
    }

    /// These changes, and then those of another adapter, which rotates what these have made.
    ///
    /// # Errors
    ///
    /// Every tensor that both change, except where both rotate it: only one of them could be kept.
    pub fn then(mut self, next: Self, base: &Base) -> Result<Self, Error> {
        let mut problems = Vec::new();
        let (before, after) = (self.by.clone(), next.by.clone());
        let clash = |key: &str, [first, second]: [&str; 2]| {
            let path =
                |by: &BTreeMap<String, &Path>| by.get(key).map(|path| path.display().to_string());
            let (one, other) = (path(&before), path(&after));
            format!(
                "{}: `{key}` is {first} by {} and {second} by {}, and only one of the two can be kept; merge one after the \
                 other, through a file, if the later is meant to decide",
                base.path.display(),
                one.unwrap_or_default(),
                other.unwrap_or_default()
            )
        };
        for (key, change) in next.of {
            let Some(first) = self.of.remove(&key) else {
                self.of.insert(key, change);
                continue;
            };
            let verbs = [first.verb(), change.verb()];
            let joined = match (first, change) {
                (Change::Rotate(first), Change::Rotate(then)) => match rotated(&first, &then) {
                    Some(parts) => Change::Rotate(parts),
                    None => {
                        problems.push(format!(
                            "{}: the adapters rotate the outputs of different parts of `{key}`; merge one after the other, \
                             through a file",
                            base.path.display()
                        ));
                        continue;
                    }
                },
                (first, _) => {
                    problems.push(clash(&key, verbs));
                    first
                }
            };
            self.of.insert(key, joined);
        }
        for (key, added) in next.added {
            if self.added.contains_key(&key) {
                problems.push(clash(&key, ["added"; 2]));
            }
            self.added.insert(key, added);
        }
        self.by.extend(next.by);
        self.idle.extend(next.idle);
        match problems.is_empty() {
            true => Ok(self),
            false => Err(Error::Fit(problems)),
        }
    }
}

/// Every rotation of these rows once, also where its rows are in several parts.
pub fn steps<'a, 'b>(parts: &'b [RotatedRows<'a>]) -> impl Iterator<Item = &'b Step<'a>> {
    let starts = |(rows, steps): &'b RotatedRows<'a>| {
        let start = rows.start;
        steps.iter().filter(move |step| step.rows.start == start)
    };
    parts.iter().flat_map(starts)
}

/// Rotations, and then others of the same tensor, in parts of rows that are rotated by the same ones. None where that would
/// part rows that are rotated among themselves.
fn rotated<'a>(
    first: &[RotatedRows<'a>],
    then: &[RotatedRows<'a>],
) -> Option<Vec<RotatedRows<'a>>> {
    let all = || first.iter().chain(then);
    let ends: BTreeSet<_> = all().flat_map(|(rows, _)| [rows.start, rows.end]).collect();
    let ends: Vec<_> = ends.into_iter().collect();
    let mut parts = Vec::new();
    for pair in ends.windows(2) {
        let rows = pair[0]..pair[1];
        let covers = |(other, _): &&RotatedRows| other.start <= rows.start && rows.end <= other.end;
        let steps: Vec<_> = all()
            .filter(covers)
            .flat_map(|(_, steps)| steps.iter().cloned())
            .collect();
        let is_parted = |step: &Step| step.layer.axis() == Axis::Output && step.rows != rows;
        if steps.iter().any(is_parted) {
            return None;
        }
        if !steps.is_empty() {
            parts.push((rows, steps));
        }
    }
    Some(parts)
}

/// How many neighbouring rows have to be turned at once: those that rotations of the outputs mix among themselves.
pub fn together(steps: &[Step]) -> usize {
    let spans = steps.iter().map(|step| match step.layer.axis() {
        Axis::Input => 1,
        Axis::Output => step.layer.span(),
    });
    // Both divide the rows, and so does this.
    spans.fold(1, least_common_multiple)
}

/// The least number that both divide.
pub fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a / divisor * b
}
