//! What an adapter changes in a model: which tensors, and how.

use std::collections::BTreeMap;
use std::ops::Range;

use burn_boft::value::{AdapterLayer, SavedTensor};

/// What happens to one tensor of the model.
#[derive(Debug)]
pub enum Change<'a> {
    /// Rows of the weight are rotated.
    Rotate(Vec<(Range<usize>, &'a AdapterLayer)>),
    /// Rows take the numbers of saved tensors.
    Replace(Vec<(Range<usize>, &'a SavedTensor)>),
    /// A saved tensor of another shape replaces the whole tensor.
    New(&'a SavedTensor),
}

/// Where the numbers of a new tensor come from.
#[derive(Debug, Clone, Copy)]
pub enum Added<'a> {
    /// From the adapter.
    Saved(&'a SavedTensor),
    /// From another tensor of the model, as it is before the merge.
    Copy(&'static str),
}

/// What an adapter changes in a model, by the model's keys.
#[derive(Debug, Default)]
pub struct Changes<'a> {
    pub of: BTreeMap<String, Change<'a>>,
    /// The tensors that the model does not have yet.
    pub added: BTreeMap<String, Added<'a>>,
    /// The text of the model's `config.json`, where it changes.
    pub config: Option<String>,
    /// Layers that change nothing, because their blocks have one channel and their scale, if any, is ones.
    pub idle: Vec<String>,
}

impl Changes<'_> {
    /// How many layers are rotated.
    pub fn rotations(&self) -> usize {
        let count = |change: &Change| match change {
            Change::Rotate(layers) => layers.len(),
            _ => 0,
        };
        self.of.values().map(count).sum()
    }

    /// How many tensors are replaced, in part or as a whole.
    pub fn replacements(&self) -> usize {
        let replaces = |change: &&Change| !matches!(change, Change::Rotate(_));
        self.of.values().filter(replaces).count()
    }
}
