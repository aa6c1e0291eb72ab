//! [`merge`], [`unload`], [`project`]: what becomes of an adapted model.

use std::collections::{HashMap, HashSet};

use burn::backend::DispatchTensor;
use burn::module::Module;

use super::walk::{Edit, Numbers, Path, rewrite, walk};
use crate::rotation::named;

/// Why [`merge`] refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is nothing to merge.
    #[error("the model carries no adapter; inject one, or use the model as it is")]
    NotAdapted,
    /// Merged weights are not finite.
    #[error(
        "merging makes weights that are not finite in {}; the base or the adapter holds NaN or infinity",
        listed(paths)
    )]
    NotFinite {
        /// The layers.
        paths: Vec<String>,
    },
}

fn listed(paths: &[String]) -> String {
    let named: Vec<_> = paths.iter().map(|path| named(path)).collect();
    named.join(", ")
}

/// Folds every adapter into its base weight: `W ← R·W·diag(s)`.
///
/// The result is a plain model. Merging ignores multiplicative dropout but applies the COFT radius. A quantized base
/// becomes dense.
///
/// # Errors
///
/// [`MergeError::NotAdapted`] without adapters, [`MergeError::NotFinite`] where a merged weight holds NaN or
/// infinity.
pub fn merge<M: Module>(model: M) -> Result<M, MergeError> {
    let walked = walk(&model);
    let adapted: HashSet<_> = walked
        .adapted()
        .map(|(weight, ..)| weight.path().to_string())
        .collect();
    if adapted.is_empty() {
        return Err(MergeError::NotAdapted);
    }
    // Multiplicative dropout off, so that a training model merges what it means.
    let merged = rewrite(
        model,
        |_| Edit::default(),
        |path| path.in_reparameterization().then_some(false),
    )
    .materialize();
    let walked = walk(&merged);
    let weights = walked
        .parameters
        .iter()
        .filter(|weight| adapted.contains(weight.path()));
    let broken = weights.filter(|weight| !weight.stored.is_finite());
    let paths: Vec<_> = broken.map(|weight| weight.owner().to_string()).collect();
    match paths.is_empty() {
        true => Ok(merged),
        false => Err(MergeError::NotFinite { paths }),
    }
}

/// Removes every adapter; the base weights are those from before the injection.
///
/// What was frozen stays frozen, and trained biases and modules to save keep their trained values.
pub fn unload<M: Module>(model: M) -> M {
    let walked = walk(&model);
    let bases = walked
        .adapted()
        .map(|(weight, ..)| (weight.path().to_string(), weight.stored.base()));
    let bases: HashMap<_, _> = bases.collect();
    drop(walked);
    set_tensors(model.materialize(), bases)
}

/// Scales every `Q` of a COFT adapter back to the radius, as PEFT does before each forward pass.
///
/// Call it after an optimizer step. The forward pass never leaves the radius either way; this keeps the
/// stored numbers inside it too. Adapters without a radius are left alone.
pub fn project<M: Module>(model: M) -> M {
    let walked = walk(&model);
    let bounded = walked
        .adapted()
        .filter(|(_, _, rotation)| rotation.is_bounded());
    let projected = bounded.filter_map(|(_, attached, rotation)| {
        let (path, skew) = attached.part("skew")?;
        let projected = rotation.project(skew.tensor());
        Some((path.to_string(), projected.into_dispatch()))
    });
    let projected: HashMap<_, _> = projected.collect();
    drop(walked);
    set_tensors(model, projected)
}

/// Sets tensors by path; nothing else changes.
fn set_tensors<M: Module>(model: M, mut tensors: HashMap<String, DispatchTensor>) -> M {
    let edit = |path: &Path| Edit {
        numbers: tensors.remove(path.full()).map(Numbers::Tensor),
        ..Edit::default()
    };
    rewrite(model, edit, |_| None)
}
