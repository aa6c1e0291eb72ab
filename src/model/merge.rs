//! [`merge`] folds adapters into the weights, [`unload`] removes them, [`project`] keeps COFT's numbers in their radius.

use std::collections::{HashMap, HashSet};

use burn::backend::DispatchTensor;
use burn::module::{Module, Reparameterization};

use super::walk::{Edit, Numbers, Path, rewrite, walk};
use crate::batch::BatchAdapter;
use crate::ops::is_quantized;
use crate::rotation::named;

/// Why [`merge`] refuses a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The model carries no adapter.
    #[error("the model carries no adapter; inject one, or use the model as it is")]
    NotAdapted,
    /// Some merged weights hold NaN or infinity.
    #[error(
        "merging makes weights that are not finite in {}; the base or the adapter holds NaN or infinity",
        listed(paths)
    )]
    NotFinite {
        /// The paths of the layers.
        paths: Vec<String>,
    },
}

fn listed(paths: &[String]) -> String {
    let named: Vec<_> = paths.iter().map(|path| named(path)).collect();
    named.join(", ")
}

/// Folds every adapter into its base weight: `W ← R·W·diag(s)`.
///
/// The result is a plain model that computes what the adapted one computes, without its cost. Merging ignores
/// multiplicative dropout but applies the COFT radius. A quantized base becomes a dense one.
///
/// # Numerics
///
/// The rotation is computed in f32, or in f64 for an f64 base, and is rounded to the precision of the base once.
///
/// # Errors
///
/// - [`MergeError::NotAdapted`] if the model carries no adapter.
/// - [`MergeError::NotFinite`] if a merged weight would hold NaN or infinity.
///
/// # Examples
///
/// ```
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn_boft::{OftConfig, inject, merge};
///
/// # let device = burn::tensor::Device::flex().autodiff();
/// let layer = LinearConfig::new(64, 32).init(&device);
/// let layer = inject(layer, OftConfig::new().with_target_modules("all-linear"))?;
/// // ... training ...
/// let plain = merge(layer.valid())?;
/// # drop(plain);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn merge<M: Module>(model: M) -> Result<M, MergeError> {
    let walked = walk(&model);
    let adapted: HashSet<_> = walked
        .adapted()
        .map(|(weight, ..)| weight.path().to_string())
        .collect();
    if adapted.is_empty() {
        return Err(MergeError::NotAdapted);
    }
    // Multiplicative dropout is turned off: a model in training would merge without the blocks that it happens to drop.
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

/// Removes every adapter, those of other kinds included, such as Burn's LoRA. The base weights are the ones from before the
/// injection, bit for bit. A model without an adapter is returned as it is, and so is the model that an
/// [`AdapterBank`](crate::AdapterBank) makes for a batch, since the bank has the base.
///
/// Parameters that were frozen stay frozen, and trained biases and modules to save keep what they have learned. To get
/// back the model as it was before training, keep a clone of it; clones share their tensors.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{OftConfig, inject, summary, unload};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(64, 32).init(&device);
/// let weight = layer.weight.val();
/// let adapted = inject(layer, OftConfig::new().with_target_modules("all-linear"))?;
/// assert_eq!(summary(&adapted).layers.len(), 1);
/// let plain = unload(adapted);
/// assert!(summary(&plain).layers.is_empty());
/// assert_eq!(plain.weight.val().into_data(), weight.into_data());
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
pub fn unload<M: Module>(model: M) -> M {
    let walked = walk(&model);
    let attached = walked.parameters.iter().filter_map(|parameter| {
        let attached = parameter.attached.as_ref()?;
        Some((attached.name.as_str(), parameter))
    });
    let attached: Vec<_> = attached.collect();
    if attached.iter().any(|(name, _)| *name == BatchAdapter::NAME) {
        return model;
    }
    let bases = attached
        .iter()
        .map(|(_, weight)| (weight.path().to_string(), weight.stored.base()));
    let bases: HashMap<_, _> = bases.collect();
    drop(attached);
    drop(walked);
    match bases.is_empty() {
        true => model,
        false => set_tensors(model.materialize(), bases),
    }
}

/// Scales every `Q` of a COFT adapter back to the radius, as PEFT does before each forward pass.
///
/// Call it after an optimizer step. The forward pass stays within the radius even without it; this keeps the stored
/// numbers within it as well. Adapters without a radius are not changed, and neither are quantized ones.
///
/// # Examples
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn_boft::{Adapter, Init, OftConfig, inject, project};
///
/// # let device = burn::tensor::Device::flex();
/// # #[derive(burn::module::Module, Debug)]
/// # struct Model { query: Linear }
/// let model = Model { query: LinearConfig::new(16, 8).init(&device) };
/// let config = OftConfig::new()
///     .with_block_size(4)
///     .with_coft_radius(0.1)
///     .with_init(Init::Random { seed: 7 })
///     .with_target_modules(["query"]);
/// let model = project(inject(model, config)?); // after each optimizer step
/// let adapter = Adapter::extract(&model)?;
/// // `‖Q‖_F` of the first of four blocks, from its six numbers above the diagonal.
/// let numbers = adapter.layers()[0].skew().iter::<f64>().take(6);
/// let norm = (2.0 * numbers.map(|x| x * x).sum::<f64>()).sqrt();
/// assert!(norm <= 0.1 / 4f64.sqrt() + 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # References
///
/// Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*: constrained orthogonal finetuning.
/// PEFT's `_project_batch` in `src/peft/tuners/oft/layer.py`.
pub fn project<M: Module>(model: M) -> M {
    let walked = walk(&model);
    let bounded = walked
        .adapted()
        .filter(|(_, _, rotation)| rotation.is_bounded());
    let projected = bounded.filter_map(|(_, attached, rotation)| {
        let (path, trained) = attached.trained_skew()?;
        if is_quantized(trained.dtype()) {
            return None;
        }
        let projected = rotation.project_trained(trained.tensor());
        Some((path.to_string(), projected.into_dispatch()))
    });
    let projected: HashMap<_, _> = projected.collect();
    drop(walked);
    set_tensors(model, projected)
}

/// Sets the tensors of the parameters at these paths. Nothing else changes.
fn set_tensors<M: Module>(model: M, mut tensors: HashMap<String, DispatchTensor>) -> M {
    let edit = |path: &Path| Edit {
        numbers: tensors.remove(path.full()).map(Numbers::Tensor),
        ..Edit::default()
    };
    rewrite(model, edit, |_| None)
}
