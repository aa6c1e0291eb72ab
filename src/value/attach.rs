//! [`Adapter::attach`]: an adapter into a model.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{DType, Tensor, TensorData};

use super::Adapter;
use super::keymap::{KeyMap, KeyMapError, join};
use super::layer::AdapterLayer;
use super::mismatch::{Mismatch, Missing, Unexpected, Wrong};
use super::report::LoadReport;
use crate::adapter::{AdapterSettings, BoftAdapter, Values};
use crate::config::{Bias, Selection};
use crate::error::{InjectError, Misfit};
use crate::model::inject::{check_settings, nearest, place, trained_parameters, unload};
use crate::model::plan::LayerKind;
use crate::model::walk::{Layer, Parameter, Path, Survey};
use crate::select::{Decision, TargetMatcher, is_saved};
use crate::tensors::transposed;

/// Why [`Adapter::attach`](crate::Adapter::attach) refuses. The model passed in is unchanged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The adapter and the model do not fit.
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
    /// The model keeps its type and its base weights, which are shared, not copied. What is trainable
    /// afterwards is what [`inject`](crate::inject()) would leave trainable.
    ///
    /// The model may be fresh, or adapted by this crate: then the new adapter takes the place of the old one,
    /// and what the old one trained beside it stays unless the new one has it too. To switch between adapters,
    /// attach each to a clone of the base.
    ///
    /// On a device with autodiff, Burn's clones of a model share the running statistics of its batch norms, and
    /// those that an adapter carries show in every clone. On a plain device they do not.
    ///
    /// # Errors
    ///
    /// [`AttachError`]: every layer, bias and saved tensor that the file promises and has not, that the model
    /// has no place for, or whose shape does not fit. The model passed in is consumed, so keep a clone where it
    /// is needed after an error.
    pub fn attach<M: Module>(&self, model: M) -> Result<M, AttachError> {
        let (survey, fit) = self.fit(&model)?;
        if !fit.mismatch.is_empty() {
            return Err(fit.mismatch.into());
        }
        Ok(fit.attach(&survey, model))
    }

    /// Attaches what fits: [`Adapter::attach`] where missing and unexpected parts are reported and left.
    ///
    /// # Errors
    ///
    /// As [`Adapter::attach`] for what is there and does not fit.
    pub fn attach_partial<M: Module>(&self, model: M) -> Result<(M, LoadReport), AttachError> {
        let (survey, fit) = self.fit(&model)?;
        if !fit.mismatch.wrong.is_empty() {
            return Err(fit.mismatch.into());
        }
        let mut report = fit.report();
        report.missing = fit.mismatch.missing.clone();
        report.unexpected = fit.mismatch.unexpected.clone();
        Ok((fit.attach(&survey, model), report))
    }

    /// What goes where, and what does not.
    fn fit<M: Module>(&self, model: &M) -> Result<(Survey, Fit), AttachError> {
        let mut survey = Survey::default();
        model.visit(&mut survey);
        let mut misfits = check_settings(&self.config);
        // The file says which layers there are.
        misfits.retain(|misfit| *misfit != Misfit::NoTargetSetting);
        let others = survey
            .adapted
            .iter()
            .filter(|(_, name)| name != BoftAdapter::NAME);
        misfits.extend(others.map(|(path, name)| Misfit::AlreadyAdapted {
            path: path.clone(),
            name: name.clone(),
        }));
        let mut fit = Fit::default();
        for layer in self.layers.iter().filter(|layer| !layer.is_identity()) {
            self.fit_layer(layer, &survey, &mut fit, &mut misfits);
        }
        if !misfits.is_empty() {
            return Err(InjectError::new(misfits).into());
        }
        self.fit_tensors(model, &survey, &mut fit);
        self.find_missing(&survey, &mut fit)?;
        let adapted = fit.layers.keys().map(String::as_str).collect();
        fit.trained = trained_parameters(self.config.selection(), &survey, &adapted)
            .map(|parameter| parameter.path.clone())
            .collect();
        fit.trained.extend(fit.tensors.keys().cloned());
        Ok((survey, fit))
    }

    fn fit_layer(
        &self,
        layer: &AdapterLayer,
        survey: &Survey,
        fit: &mut Fit,
        misfits: &mut Vec<Misfit>,
    ) {
        let path = &layer.path;
        let Some(target) = survey.layers.iter().find(|target| target.path == *path) else {
            let paths = survey.layers.iter().map(|layer| layer.path.as_str());
            let nearest = nearest(path, paths);
            fit.mismatch.unexpected.push(Unexpected::Layer {
                path: path.clone(),
                nearest,
            });
            return;
        };
        let Layer {
            kind, shape, dtype, ..
        } = target;
        if matches!(dtype, DType::QFloat(_)) {
            misfits.push(Misfit::Quantized {
                path: path.clone(),
                dtype: *dtype,
            });
            return;
        }
        let (d_input, d_output) = kind.axes(shape);
        let butterfly = layer.check_kind(*kind);
        match butterfly.and_then(|()| layer.butterfly(d_input, d_output)) {
            Ok(butterfly) => {
                let settings = AdapterSettings::new(*kind, butterfly, &self.config);
                let values = Values {
                    skew: layer.skew.clone(),
                    scale: layer.scale.clone(),
                };
                fit.layers.insert(path.clone(), (settings, values));
            }
            Err(reason) => fit.mismatch.wrong.push(Wrong::Fit {
                path: path.clone(),
                reason,
            }),
        }
    }

    /// Finds the place of every bias and saved tensor.
    fn fit_tensors<M: Module>(&self, model: &M, survey: &Survey, fit: &mut Fit) {
        let places: HashMap<_, _> = survey
            .parameters
            .iter()
            .map(|parameter| {
                (
                    (parameter.owner.as_str(), parameter.torch_name()),
                    parameter,
                )
            })
            .collect();
        let mut wanted = HashMap::new();
        for tensor in &self.tensors {
            match places.get(&(tensor.module.as_str(), tensor.name.as_str())) {
                Some(parameter) => _ = wanted.insert(parameter.path.as_str(), (tensor, *parameter)),
                // Burn's norms do not count batches.
                None if tensor.name == "num_batches_tracked" => {}
                None => fit.mismatch.unexpected.push(Unexpected::Parameter {
                    path: join(&tensor.module, &tensor.name),
                }),
            }
        }
        let mut shapes = Shapes {
            path: Path::default(),
            wanted: wanted.keys().copied().collect(),
            found: HashMap::new(),
        };
        model.visit(&mut shapes);
        for (path, (tensor, parameter)) in wanted {
            let Some((shape, dtype)) = shapes.found.remove(path) else {
                continue;
            };
            let data = match parameter.is_transposed() {
                true => transposed(&tensor.data),
                false => Some(tensor.data.clone()),
            };
            match data {
                _ if matches!(dtype, DType::QFloat(_)) => fit.refuse(Wrong::Quantized {
                    path: path.to_string(),
                }),
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
                _ => fit.refuse(Wrong::Parameter {
                    path: path.to_string(),
                    model: shape,
                    file: tensor.data.shape().to_vec(),
                }),
            }
        }
        fit.mismatch.sort_wrong();
    }

    /// Finds what the configuration promises and the file has not.
    fn find_missing(&self, survey: &Survey, fit: &mut Fit) -> Result<(), AttachError> {
        let own = KeyMap::new();
        let (selection, names) = match &self.promised {
            Some(promise) => (&promise.selection, &promise.names),
            None => (self.config.selection(), &own),
        };
        let present: HashSet<_> = self
            .layers
            .iter()
            .map(|layer| layer.path.as_str())
            .collect();
        for path in missing_layers(selection, names, survey, &present)? {
            fit.mismatch.missing.push(Missing::Layer { path });
        }
        for parameter in &survey.parameters {
            if fit.tensors.contains_key(&parameter.path)
                || fit.refused.contains(&parameter.path)
                || !fit.expects(parameter, &present, selection, names)?
            {
                continue;
            }
            let path = parameter.path.clone();
            fit.mismatch
                .missing
                .push(match parameter.is_bias && selection.bias != Bias::None {
                    true => Missing::Bias { path },
                    false => Missing::Saved { path },
                });
        }
        Ok(())
    }
}

/// The layers that the settings of a file name and the file has not.
fn missing_layers(
    selection: &Selection,
    names: &KeyMap,
    survey: &Survey,
    present: &HashSet<&str>,
) -> Result<Vec<String>, AttachError> {
    let refused =
        |errors: Vec<_>| InjectError::new(errors.into_iter().map(Misfit::Pattern).collect());
    let matcher = TargetMatcher::new(selection).map_err(refused)?;
    let mut missing = Vec::new();
    for layer in &survey.layers {
        if present.contains(layer.path.as_str()) {
            continue;
        }
        for name in names.file_names(&layer.path)? {
            let decision = matcher.decide(&name, layer.kind == LayerKind::Linear);
            if decision.map_err(|error| refused(vec![error]))? == Decision::Target {
                missing.push(layer.path.clone());
                break;
            }
        }
    }
    Ok(missing)
}

/// What goes where.
#[derive(Default)]
struct Fit {
    layers: HashMap<String, (AdapterSettings, Values)>,
    tensors: HashMap<String, TensorData>,
    trained: HashSet<String>,
    warnings: Vec<String>,
    mismatch: Mismatch,
    /// Parameters for which the adapter has a tensor that does not fit.
    refused: HashSet<String>,
}

impl Fit {
    /// Notes a tensor that does not fit its parameter.
    fn refuse(&mut self, wrong: Wrong) {
        if let Wrong::Parameter { path, .. } | Wrong::Quantized { path } = &wrong {
            self.refused.insert(path.clone());
        }
        self.mismatch.wrong.push(wrong);
    }

    /// Whether a tensor for this parameter belongs to the adapter.
    fn expects(
        &self,
        parameter: &Parameter,
        present: &HashSet<&str>,
        selection: &Selection,
        names: &KeyMap,
    ) -> Result<bool, KeyMapError> {
        let bias = parameter.is_bias
            && match selection.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::AdapterOnly => present.contains(parameter.owner.as_str()),
            };
        if bias {
            return Ok(true);
        }
        let owners = names.file_names(&parameter.owner)?;
        Ok(owners
            .iter()
            .any(|owner| is_saved(&selection.modules_to_save, owner)))
    }

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

    fn attach<M: Module>(self, survey: &Survey, model: M) -> M {
        let model = match survey.adapted.is_empty() {
            true => model,
            false => unload(model),
        };
        let statistics = survey.parameters.iter().any(|parameter| {
            parameter.is_statistic() && self.tensors.contains_key(&parameter.path)
        });
        let plain = model.devices().iter().all(|device| !device.is_autodiff());
        // Clones share running statistics. A model for validation has its own, and on a plain device it is
        // no other model.
        let model = match statistics && plain {
            true => model.valid(),
            false => model,
        };
        place(model, self.layers, self.trained, self.tensors)
    }
}

/// Reads shapes and precisions of chosen parameters.
struct Shapes<'a> {
    path: Path,
    wanted: HashSet<&'a str>,
    found: HashMap<String, (Vec<usize>, DType)>,
}

impl ModuleVisitor for Shapes<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.full();
        if self.wanted.contains(path.as_str()) {
            let base = param.base();
            self.found
                .insert(path, (base.dims().to_vec(), base.dtype()));
        }
    }
}
