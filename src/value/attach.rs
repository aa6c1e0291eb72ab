//! [`Adapter::attach`]: an adapter into a model.
//!
//! Three questions are answered from the model before anything changes: which layer each rotation belongs to, which
//! parameter each saved tensor replaces, and what the settings of the file name without the file having it.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, Reparameterization};
use burn::tensor::TensorData;

use super::Adapter;
use super::keymap::{KeyMap, KeyMapError, join};
use super::layer::{AdapterLayer, SavedTensor};
use super::mismatch::{Mismatch, Missing, Unexpected, Wrong};
use super::report::LoadReport;
use crate::adapter::BoftAdapter;
use crate::config::{Bias, LayerKind};
use crate::model::{
    InjectError, Misfit, Parameter, Placement, Unsupported, Walk, nearest, quantized, trained,
    unload, verdicts, walk,
};
use crate::ops::is_quantized;
use crate::rotation::{Method, Rotation, Values};
use crate::select::{Decision, Selector};
use crate::tensors::{is_float, is_same, transposed};

/// Why [`Adapter::attach`](crate::Adapter::attach) refuses. The model passed in is unchanged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Parts of the adapter and of the model do not fit each other.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The settings do not work in any model, or the model cannot be adapted.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
}

impl Adapter {
    /// Attaches the adapter to a model: its rotations to the layers, its biases and saved modules in place.
    ///
    /// The model keeps its type and its base weights, which are shared, not copied. What is trainable afterwards is
    /// what [`inject`](crate::inject()) would leave trainable.
    ///
    /// The model may be fresh, or adapted by this crate: then the new adapter takes the place of the old one, and what
    /// the old one trained beside it stays unless the new one has it too. To switch between adapters, attach each to a
    /// clone of the base.
    ///
    /// On a device with autodiff, Burn's clones of a model share the running statistics of its batch norms, and those
    /// that an adapter carries show in every clone. On a plain device they do not.
    ///
    /// # Numerics
    ///
    /// Saved tensors get the precision of the parameter that they replace. Where that rounds them,
    /// [`Adapter::attach_partial`] reports it.
    ///
    /// # Errors
    ///
    /// - [`AttachError::Mismatch`]: every layer, bias and saved tensor that the file promises and has not, that the
    ///   model has no place for, or whose shape does not fit.
    /// - [`AttachError::Inject`]: the settings work in no model, a parameter to be trained is quantized, or one carries a
    ///   reparameterization of another kind.
    /// - [`AttachError::KeyMap`]: a pattern of the key map that the file was read with has no answer for a name.
    ///
    /// The model passed in is consumed, so keep a clone where it is needed after an error.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::module::Module;
    /// use burn::nn::{Linear, LinearConfig};
    /// use burn_boft::{Adapter, OftConfig, inject};
    ///
    /// #[derive(Module, Debug)]
    /// struct Model {
    ///     query: Linear,
    /// }
    ///
    /// # let device = burn::tensor::Device::flex().autodiff();
    /// let base = Model { query: LinearConfig::new(64, 32).init(&device) };
    /// let config = OftConfig::new().with_target_modules(["query"]);
    /// let trained = inject(base.clone(), &config)?;
    /// // ... training ...
    /// let adapter = Adapter::extract(&trained)?;
    /// // One base serves many adapters.
    /// let served = adapter.attach(base.clone())?;
    /// # drop(served);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attach<M: Module>(&self, model: M) -> Result<M, AttachError> {
        let walk = walk(&model);
        let fit = self.fit(&walk)?;
        if !fit.mismatch.is_empty() {
            return Err(fit.mismatch.into());
        }
        Ok(fit.attach(walk, model))
    }

    /// Attaches what fits: [`Adapter::attach`] where missing and unexpected parts are reported and left.
    ///
    /// PEFT attaches like this: `set_peft_model_state_dict` in `src/peft/utils/save_and_load.py` loads with
    /// `strict=False`.
    ///
    /// # Errors
    ///
    /// As [`Adapter::attach`] for what is there and does not fit.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::nn::{Linear, LinearConfig};
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::AdapterLayer;
    /// use burn_boft::{Adapter, LayerKind, OftConfig};
    ///
    /// # let device = burn::tensor::Device::flex();
    /// # #[derive(burn::module::Module, Debug)]
    /// # struct Model { query: Linear }
    /// let layer = |path: &str| {
    ///     let skew = TensorData::new(vec![0.1f32; 16 * 6], [1, 16, 6]);
    ///     AdapterLayer::new(path, Some(LayerKind::Linear), skew, None)
    /// };
    /// let layers = vec![layer("query")?, layer("value")?];
    /// let config = OftConfig::new().with_target_modules(["query", "value"]);
    /// let adapter = Adapter::from_parts(config, layers, Vec::new())?;
    /// let model = Model { query: LinearConfig::new(64, 32).init(&device) };
    /// assert!(adapter.attach(model.clone()).is_err());
    /// let (model, report) = adapter.attach_partial(model)?;
    /// assert_eq!(report.applied, ["the adapter of `query`"]);
    /// assert_eq!(report.unexpected.len(), 1); // the model has no `value`
    /// # drop(model);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attach_partial<M: Module>(&self, model: M) -> Result<(M, LoadReport), AttachError> {
        let walk = walk(&model);
        let fit = self.fit(&walk)?;
        if !fit.mismatch.wrong.is_empty() {
            return Err(fit.mismatch.into());
        }
        let mut report = fit.report();
        report.missing = fit.mismatch.missing.clone();
        report.unexpected = fit.mismatch.unexpected.clone();
        Ok((fit.attach(walk, model), report))
    }

    /// What goes where, and what does not.
    ///
    /// The targets of the settings are not asked which layers to adapt: the adapter has them by path. A layer that is
    /// the identity by its sizes has no numbers to attach, and is passed over.
    ///
    /// # Errors
    ///
    /// - [`AttachError::Inject`]: settings and other reparameterizations, all at once, or else quantized parameters that
    ///   are to be trained.
    /// - [`AttachError::KeyMap`]: a pattern has no answer.
    pub(super) fn fit(&self, walk: &Walk) -> Result<Fit, AttachError> {
        // The file says which layers there are, so it need not say how they are targeted.
        let method = Method::new(&self.config).map_err(refused)?;
        let others = walk.parameters.iter().filter_map(|parameter| {
            let attached = parameter.attached.as_ref()?;
            (attached.name != BoftAdapter::NAME).then(|| Misfit::AlreadyAdapted {
                path: parameter.path().to_string(),
                name: attached.name.clone(),
            })
        });
        let misfits: Vec<_> = others.collect();
        let selection = self.config.selection();
        let verdicts = verdicts(walk, &selection.layer_kinds, Some(&method));
        let layers = verdicts.filter(|(parameter, _)| parameter.name() == "weight");
        let layers: HashMap<_, _> = layers
            .map(|(parameter, verdict)| (parameter.owner(), (parameter, verdict)))
            .collect();
        let mut fit = Fit::default();
        for layer in self.layers.iter().filter(|layer| !layer.is_identity()) {
            match layers.get(layer.path.as_str()) {
                Some((parameter, Ok(kind))) => {
                    fit.layer(layer, &method, *kind, &parameter.stored.shape());
                }
                Some((_, Err(reason))) => {
                    fit.no_layer(&layer.path, Some(reason.clone()), Vec::new());
                }
                None => {
                    let paths = layers.iter().filter(|(_, (_, verdict))| verdict.is_ok());
                    let nearest = match fit.mismatch.unexpected.len() < SUGGESTIONS {
                        true => nearest(&layer.path, paths.map(|(path, _)| *path)),
                        false => Vec::new(),
                    };
                    fit.no_layer(&layer.path, None, nearest);
                }
            }
        }
        if !misfits.is_empty() {
            return Err(InjectError::new(misfits).into());
        }
        self.fit_tensors(walk, &mut fit);
        self.find_missing(walk, &method, &mut fit)?;
        let selector = Selector::new(selection).map_err(refused)?;
        let adapted = fit.layers.keys().map(String::as_str).collect();
        let trained: Vec<_> = trained(&selector, walk, &adapted).collect();
        // What the file has numbers for was reported with them.
        let silent = trained.iter().filter(|p| !fit.unusable.contains(p.path()));
        let misfits: Vec<_> = quantized(silent.copied()).collect();
        if !misfits.is_empty() {
            return Err(InjectError::new(misfits).into());
        }
        let trained = trained.iter().map(|parameter| parameter.path().to_string());
        fit.trained = trained.collect();
        fit.trained.extend(fit.tensors.keys().cloned());
        Ok(fit)
    }

    /// Finds the place of every bias and saved tensor, by its module and PyTorch's name.
    ///
    /// # Shapes
    ///
    /// - a weight of a linear layer: `[d_output, d_input]` in the adapter, `[d_input, d_output]` in the model
    /// - any other tensor: the same in both
    fn fit_tensors(&self, walk: &Walk, fit: &mut Fit) {
        let layer_kinds = &self.config.selection().layer_kinds;
        let places: HashMap<_, _> = walk
            .parameters
            .iter()
            .map(|parameter| ((parameter.owner(), parameter.torch_name()), parameter))
            .collect();
        for tensor in &self.tensors {
            let Some(parameter) = places.get(&(tensor.module.as_str(), tensor.name.as_str()))
            else {
                // Burn's norms do not count batches.
                if tensor.name != "num_batches_tracked" {
                    fit.mismatch.unexpected.push(Unexpected::Parameter {
                        path: join(&tensor.module, &tensor.name),
                    });
                }
                continue;
            };
            let path = parameter.path();
            let (shape, dtype) = (parameter.stored.shape(), parameter.stored.dtype());
            let data = match parameter.is_transposed(layer_kinds) {
                true => transposed(&tensor.data),
                false => Some(tensor.data.clone()),
            };
            match data {
                _ if is_quantized(dtype) => {
                    let path = path.to_string();
                    fit.unusable(Wrong::Quantized { path: path.clone() }, path);
                }
                Some(data) if **data.shape() == shape => {
                    if data.dtype().size() > dtype.size() {
                        fit.warnings.push(format!(
                            "`{path}` is {} in the model, and rounded from {}",
                            dtype.name(),
                            data.dtype().name()
                        ));
                    }
                    fit.tensors.insert(path.to_string(), data);
                }
                _ => {
                    let wrong = Wrong::Parameter {
                        path: path.to_string(),
                        model: shape,
                        file: tensor.data.shape().to_vec(),
                    };
                    fit.unusable(wrong, path.to_string());
                }
            }
        }
        for tensor in &self.copies {
            let path = join(&tensor.module, &tensor.name);
            match places.get(&(tensor.module.as_str(), tensor.name.as_str())) {
                None => fit.mismatch.unexpected.push(Unexpected::Parameter { path }),
                Some(parameter) if !is_copy(parameter, tensor, layer_kinds) => {
                    fit.mismatch.wrong.push(Wrong::Copy { path });
                }
                Some(_) => {}
            }
        }
        fit.mismatch.sort_wrong();
    }

    /// Finds what the configuration promises and the file has not.
    ///
    /// An adapter from a file promises what the file said, in the names of the file. One that was extracted or built
    /// promises what its configuration says, in the model's names. The kinds of layers have the model's names in either.
    fn find_missing(&self, walk: &Walk, method: &Method, fit: &mut Fit) -> Result<(), AttachError> {
        let own = KeyMap::new();
        let (selection, names) = match &self.promised {
            Some(promise) => (&promise.selection, &promise.names),
            None => (self.config.selection(), &own),
        };
        let selector = Selector::new(selection).map_err(refused)?;
        let layers = self.layers.iter().map(|layer| layer.path.as_str());
        let present: HashSet<_> = layers.collect();
        let layer_kinds = self.config.selection().layer_kinds.as_slice();
        let rules = (&selector, method, layer_kinds);
        for path in missing_layers(rules, names, walk, &present)? {
            fit.mismatch.missing.push(Missing::Layer { path });
        }
        for parameter in &walk.parameters {
            let path = parameter.path();
            // What cannot be used was reported.
            if fit.tensors.contains_key(path) || fit.unusable.contains(path) {
                continue;
            }
            let owner = parameter.owner();
            let is_bias = parameter.is_bias() && selection.bias != Bias::None;
            if is_bias && selector.trains(owner, true, present.contains(owner)) {
                let path = path.to_string();
                fit.mismatch.missing.push(Missing::Bias { path });
                continue;
            }
            let owners = names.file_names(owner)?;
            if owners.iter().any(|owner| selector.saves(owner)) {
                let path = path.to_string();
                fit.mismatch.missing.push(Missing::Saved { path });
            }
        }
        Ok(())
    }
}

/// Whether a parameter of the model has the numbers of this copy, as far as the coarser of their precisions tells.
fn is_copy(
    parameter: &Parameter,
    copy: &SavedTensor,
    layer_kinds: &[(String, Option<LayerKind>)],
) -> bool {
    if !is_float(parameter.stored.dtype()) || !is_float(copy.data.dtype()) {
        return false;
    }
    let data = match parameter.is_transposed(layer_kinds) {
        true => transposed(&copy.data),
        false => Some(copy.data.clone()),
    };
    data.is_some_and(|data| is_same(&parameter.stored.data(), &data))
}

/// Missing layers of which as many are told with similar names.
const SUGGESTIONS: usize = 20;

fn refused<E: Into<Misfit>>(errors: Vec<E>) -> InjectError {
    InjectError::new(errors.into_iter().map(Into::into).collect())
}

/// The layers that the settings of a file name and the file has not.
///
/// A layer has every name that it may have in a file of either generation, and one name that is a target is enough. A
/// fused layer is missing where a target names one of its parts.
fn missing_layers(
    (selector, method, layer_kinds): (&Selector, &Method, &[(String, Option<LayerKind>)]),
    names: &KeyMap,
    walk: &Walk,
    present: &HashSet<&str>,
) -> Result<Vec<String>, AttachError> {
    let mut missing = Vec::new();
    for (parameter, verdict) in verdicts(walk, layer_kinds, Some(method)) {
        let path = parameter.owner();
        let Ok(kind) = verdict else { continue };
        if present.contains(path) {
            continue;
        }
        for name in names.file_names(path)? {
            let decision = selector.decide(&name, kind == LayerKind::Linear);
            if decision.map_err(|error| refused(vec![error]))? == Decision::Target {
                missing.push(path.to_string());
                break;
            }
        }
    }
    Ok(missing)
}

/// What goes where.
#[derive(Default)]
pub(super) struct Fit {
    /// What is attached, by the path of the layer.
    pub(super) layers: HashMap<String, (Rotation, Values)>,
    /// New numbers by the path of the parameter, in Burn's orientation.
    pub(super) tensors: HashMap<String, TensorData>,
    /// Paths of the parameters that are trainable afterwards, beside the adapters.
    trained: HashSet<String>,
    /// Parameters whose tensors are there and cannot be used.
    unusable: HashSet<String>,
    /// Where numbers are rounded.
    warnings: Vec<String>,
    /// What has no place, or does not fit.
    pub(super) mismatch: Mismatch,
}

impl Fit {
    /// Notes the rotation of a layer of this kind with a weight of this shape, or why it does not fit.
    fn layer(&mut self, layer: &AdapterLayer, method: &Method, kind: LayerKind, shape: &[usize]) {
        let path = &layer.path;
        let (d_input, d_output) = kind.axes(shape);
        let fits = layer.check_axis().and_then(|()| layer.check_kind(kind));
        match fits.and_then(|()| layer.butterfly(d_input, d_output)) {
            Ok(butterfly) => {
                let rotation = method.with_sizes(kind, butterfly, layer.scale.is_some());
                let values = Values {
                    skew: layer.skew.clone(),
                    scale: layer.scale.clone(),
                };
                self.layers.insert(path.clone(), (rotation, values));
            }
            Err(reason) => {
                let path = path.clone();
                self.mismatch.wrong.push(Wrong::Fit { path, reason });
            }
        }
    }

    /// Notes that the model has no layer at this path that can carry an adapter.
    fn no_layer(&mut self, path: &str, reason: Option<Unsupported>, nearest: Vec<String>) {
        self.mismatch.unexpected.push(Unexpected::Layer {
            path: path.to_string(),
            reason,
            nearest,
        });
    }

    /// Notes a tensor that does not fit the parameter at this path.
    fn unusable(&mut self, wrong: Wrong, path: String) {
        self.unusable.insert(path);
        self.mismatch.wrong.push(wrong);
    }

    /// What is going to be applied, sorted, and the warnings.
    fn report(&self) -> LoadReport {
        let layers = self
            .layers
            .keys()
            .map(|path| format!("the adapter of `{path}`"));
        let tensors = self.tensors.keys().map(|path| format!("`{path}`"));
        let mut applied: Vec<_> = layers.chain(tensors).collect();
        applied.sort();
        LoadReport {
            applied,
            warnings: self.warnings.clone(),
            ..LoadReport::default()
        }
    }

    /// Changes the model. Nothing can fail from here on.
    ///
    /// The walk is dropped first, because it shares every tensor of the model. An older adapter is removed, since Burn
    /// keeps one reparameterization per parameter.
    fn attach<M: Module>(self, walk: Walk, model: M) -> M {
        let is_adapted = walk.adapted().next().is_some();
        let mut parameters = walk.parameters.iter();
        let statistics =
            parameters.any(|p| p.is_statistic() && self.tensors.contains_key(p.path()));
        drop(walk);
        let model = match is_adapted {
            true => unload(model),
            false => model,
        };
        let plain = model.devices().iter().all(|device| !device.is_autodiff());
        // Clones share running statistics. A model for validation has its own, and on a plain device it is the same
        // model otherwise.
        let model = match statistics && plain {
            true => model.valid(),
            false => model,
        };
        let placement = Placement {
            layers: self.layers,
            trained: self.trained,
            tensors: self.tensors,
        };
        placement.place(model)
    }
}
