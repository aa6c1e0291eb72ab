//! [`inject`]: attaches adapters to a model.

use std::collections::{HashMap, HashSet};

use burn::module::Module;
use burn::tensor::TensorData;

use super::misfit::InjectError;
use super::plan::Preparation;
use super::walk::{Edit, Numbers, Path, rewrite, walk};
use crate::config::AdapterConfig;
use crate::rotation::{Rotation, Values};

/// Attaches an adapter to every layer that the configuration targets, and freezes the rest of the model.
///
/// The model keeps its type, and with [`Init::Identity`](crate::Init::Identity) it computes exactly what it did before.
/// Afterwards only the adapters, the chosen biases and the modules to save are trainable. Adapters are attached to
/// `Linear` and `Conv2d` layers, wherever the model holds them, by OFT also to `Embedding` layers, and never to norms.
///
/// The running statistics of batch norms are frozen as well: even in training, a frozen batch norm normalises with them
/// and does not change them. Name a batch norm in `modules_to_save` to train it. Dropout layers are not changed.
///
/// The model stays on its device. If that is a device without autodiff, call [`Module::train`] on the result before the
/// first backward pass, which would panic in Burn otherwise. The table of [`plan`](crate::plan()) reminds you.
///
/// # Errors
///
/// Every misfit of the settings and the model at once; see [`Misfit`](super::Misfit). The model passed in is consumed, so
/// keep a clone if you need it after an error. Clones share their tensors.
///
/// # Examples
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn_boft::{BoftConfig, inject, summary};
///
/// # #[derive(burn::module::Module, Debug)]
/// # struct Model { query: Linear, head: Linear }
/// # let device = burn::tensor::Device::flex().autodiff();
/// # let model = Model {
/// #     query: LinearConfig::new(64, 64).init(&device),
/// #     head: LinearConfig::new(64, 10).init(&device),
/// # };
/// let config = BoftConfig::new().with_target_modules(["query"]).with_modules_to_save(["head"]);
/// let model = inject(model, &config)?;
/// assert_eq!(summary(&model).trainable, 16 * 6 + 64 + 64 * 10 + 10);
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
pub fn inject<M: Module>(model: M, config: impl Into<AdapterConfig>) -> Result<M, InjectError> {
    let Preparation { plan, rotations } = Preparation::new(&walk(&model), &config.into())?;
    let layers = plan.layers.into_iter().zip(rotations);
    let layers = layers.map(|(layer, rotation)| {
        let values = rotation.initial(&layer.path);
        (layer.path, (rotation, values))
    });
    let placement = Placement {
        layers: layers.collect(),
        trained: plan.trained.into_iter().collect(),
        tensors: HashMap::new(),
    };
    Ok(placement.place(model))
}

/// What a model gets. Whoever makes one has checked that everything fits.
///
/// [`inject`] and [`Adapter::attach`](crate::Adapter::attach) both end here, so that what they leave trainable is the
/// same.
pub(crate) struct Placement {
    /// Adapters by the path of their layer.
    pub(crate) layers: HashMap<String, (Rotation, Values)>,
    /// Paths of the parameters that are trained in addition; all others are frozen.
    pub(crate) trained: HashSet<String>,
    /// New numbers of parameters by path.
    pub(crate) tensors: HashMap<String, TensorData>,
}

impl Placement {
    /// Attaches the adapters, sets the new numbers, and freezes or unfreezes every parameter.
    pub(crate) fn place<M: Module>(self, model: M) -> M {
        let Self {
            mut layers,
            trained,
            mut tensors,
        } = self;
        let edit = |path: &Path| {
            let adapter = match path.name() {
                "weight" => layers.remove(path.owner()),
                _ => None,
            };
            Edit {
                trainable: Some(adapter.is_none() && trained.contains(path.full())),
                numbers: tensors.remove(path.full()).map(Numbers::Data),
                adapter,
                batch: None,
            }
        };
        rewrite(model, edit, |path| statistics_move(path, &trained))
    }
}

/// Whether the flag at this path, if it is the one of a batch norm, lets training change the running statistics: only if
/// these are trained. None for every other flag.
fn statistics_move(path: &Path, trained: &HashSet<String>) -> Option<bool> {
    if path.owner_type() != "BatchNorm" || path.name() != "training" {
        return None;
    }
    let statistic = match path.owner() {
        "" => "running_mean".to_string(),
        owner => format!("{owner}.running_mean"),
    };
    Some(trained.contains(&statistic))
}
