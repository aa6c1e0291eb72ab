//! [`Adapter::extract`]: an adapter out of a model.
//!
//! A model does not keep the configuration that it was adapted with. The rotation of each layer has its method, and the
//! rest follows from what is trainable: a selection is sought that means exactly these parameters, or the model is
//! refused.

use std::collections::{HashMap, HashSet};

use burn::module::Module;
use burn::tensor::TensorData;
use serde_json::Map;

use super::keymap::split;
use super::layer::{AdapterLayer, Axis, SavedTensor};
use super::{Adapter, SavedToo};
use crate::config::{AdapterConfig, Bias, LayerKind, Selection, TargetModules};
use crate::model::{InjectError, Misfit, Parameter, Stored, Walk, trained, verdicts, walk};
use crate::rotation::{Method, Rotation, named};
use crate::select::{Decision, PatternError, Saved, SavedByPeft, Selector};
use crate::tensors::{from_values, is_float, transposed, values, widened};

/// Why [`Adapter::extract`] refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// There is nothing to extract.
    #[error("the model carries no adapter; inject one first")]
    NotAdapted,
    /// Layers were adapted with different settings.
    #[error(
        "{} was adapted with {found}, and other layers with {expected}; one adapter has one configuration, so extract \
         each part of the model by itself",
        named(path)
    )]
    Mixed {
        /// The layer.
        path: String,
        /// How it was adapted.
        found: String,
        /// How the layers before it were.
        expected: String,
    },
    /// The configuration is not the one that the model was adapted with.
    #[error(
        "the model was adapted with {found}, but the configuration says {expected}; extract without a configuration, or \
         give the one that the model was adapted with"
    )]
    Settings {
        /// What the model has.
        found: String,
        /// What the configuration says.
        expected: String,
    },
    /// The configuration selects other layers than those that are adapted.
    #[error(
        "the configuration and the adapted layers differ:{}{}",
        differ("adapted and not selected", not_selected),
        differ("selected and not adapted", not_adapted)
    )]
    Targets {
        /// Adapted layers that the configuration does not select.
        not_selected: Vec<String>,
        /// Layers that the configuration selects and the model has without an adapter.
        not_adapted: Vec<String>,
    },
    /// Parameters that are trained and that the adapter would leave behind.
    #[error(
        "{} would be left behind: {} trained, and no adapter can say so unless whole modules are trained, the biases \
         of all adapted layers, or all biases; name modules in modules_to_save, or freeze what is not meant",
        listed(paths),
        if paths.len() == 1 { "it is" } else { "they are" }
    )]
    LeftBehind {
        /// The parameters.
        paths: Vec<String>,
    },
    /// Parameters that the configuration trains and the model has frozen. Without a configuration, they are in modules
    /// that the name of a trained module selects too.
    #[error(
        "the configuration trains {}, which the model has frozen",
        listed(paths)
    )]
    Frozen {
        /// The parameters.
        paths: Vec<String>,
    },
    /// The configuration works in no model, or one of its patterns has no answer.
    #[error(transparent)]
    Config(#[from] InjectError),
    /// A tensor that cannot be kept, since it is quantized: a part of an adapter, a bias, or a part of a module to save.
    #[error(
        "`{path}` is quantized, and an adapter keeps float numbers only; leave it out of the quantization"
    )]
    Quantized {
        /// The parameter.
        path: String,
    },
}

fn listed(paths: &[String]) -> String {
    let named: Vec<_> = paths.iter().map(|path| named(path)).collect();
    named.join(", ")
}

/// The part of a message about the layers that one side has and the other has not; empty if there are none.
fn differ(what: &str, paths: &[String]) -> String {
    match paths {
        [] => String::new(),
        paths => format!(" {what}: {}.", listed(paths)),
    }
}

impl From<PatternError> for ExtractError {
    fn from(error: PatternError) -> Self {
        InjectError::new(vec![error.into()]).into()
    }
}

impl Adapter {
    /// Reads the adapter out of a model that [`inject`](crate::inject()) or [`Adapter::attach`] adapted.
    ///
    /// The model knows its configuration: the settings are those of its adapters, the targets are the adapted layers by
    /// their full paths, and the biases and modules to save are what is trainable beside them. The numbers are copied
    /// to the host; the base weights are neither needed nor read.
    ///
    /// The model does not know what [`with_layer_kind`](crate::BoftConfig::with_layer_kind) says of modules to save. If one of
    /// them was declared to be a linear layer, use [`Adapter::extract_as`], which turns its weight as PyTorch has it.
    ///
    /// # Numerics
    ///
    /// Skew and scale are in f32, or in f64 for an f64 base, and are copied bit for bit; a scaled skew is divided, which
    /// rounds it. Biases and saved modules keep their precision.
    ///
    /// # Errors
    ///
    /// - [`ExtractError::NotAdapted`]: the model carries no adapter.
    /// - [`ExtractError::Mixed`]: its layers were adapted with different settings.
    /// - [`ExtractError::LeftBehind`]: it trains parameters that no configuration can name.
    /// - [`ExtractError::Frozen`]: it trains `head` and not `aux.head`, which `modules_to_save` cannot tell apart.
    /// - [`ExtractError::Quantized`]: the adapter itself was quantized, or a bias or saved module.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::nn::LinearConfig;
    /// use burn_boft::{Adapter, OftConfig, inject};
    ///
    /// # let device = burn::tensor::Device::flex();
    /// # #[derive(burn::module::Module, Debug)]
    /// # struct Model { query: burn::nn::Linear }
    /// let model = Model { query: LinearConfig::new(64, 32).init(&device) };
    /// let model = inject(model, OftConfig::new().with_target_modules(["query"]))?;
    /// let adapter = Adapter::extract(&model)?;
    /// assert_eq!(adapter.layers()[0].path(), "query");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn extract<M: Module>(model: &M) -> Result<Self, ExtractError> {
        let found = Found::new(current(model))?;
        let selection = found.selection()?;
        let config = found.method.config(selection);
        found.adapter(config)
    }

    /// Reads the adapter out of a model as [`Adapter::extract`] does, and keeps the names that a configuration has.
    ///
    /// PEFT's file then says `target_modules: ["query"]` where the model was injected with that, and not the full paths
    /// of all queries.
    ///
    /// # Errors
    ///
    /// As [`Adapter::extract`], and:
    ///
    /// - [`ExtractError::Settings`]: the model was adapted with other settings.
    /// - [`ExtractError::Targets`]: the configuration selects other layers than those that are adapted.
    /// - [`ExtractError::Frozen`]: the configuration trains parameters that are frozen in the model.
    /// - [`ExtractError::Config`]: the configuration works in no model.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::nn::{Linear, LinearConfig};
    /// use burn_boft::value::ExtractError;
    /// use burn_boft::{Adapter, OftConfig, TargetModules, inject};
    ///
    /// # let device = burn::tensor::Device::flex();
    /// # #[derive(burn::module::Module, Debug)]
    /// # struct Model { layers: Vec<Linear>, head: Linear }
    /// let model = Model {
    ///     layers: vec![LinearConfig::new(64, 64).init(&device)],
    ///     head: LinearConfig::new(64, 10).init(&device),
    /// };
    /// let config = OftConfig::new().with_target_modules(r"layers\.\d+");
    /// let model = inject(model, &config)?;
    /// let by_paths = Adapter::extract(&model)?;
    /// assert_eq!(by_paths.config().selection().target_modules, Some(["layers.0"].into()));
    /// let as_written = Adapter::extract_as(&model, &config)?;
    /// assert_eq!(as_written.config().selection().target_modules, Some(r"layers\.\d+".into()));
    ///
    /// let other = OftConfig::new().with_target_modules(["head"]);
    /// let error = Adapter::extract_as(&model, other).unwrap_err();
    /// assert!(matches!(error, ExtractError::Targets { .. }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn extract_as<M: Module>(
        model: &M,
        config: impl Into<AdapterConfig>,
    ) -> Result<Self, ExtractError> {
        let config = config.into();
        let found = Found::new(current(model))?;
        let method = Method::new(&config).map_err(|errors| {
            let misfits = errors.into_iter().map(Misfit::from);
            InjectError::new(misfits.collect())
        })?;
        if let Some((found, expected)) = found.method.difference(&method) {
            return Err(ExtractError::Settings { found, expected });
        }
        found.check_targets(config.selection())?;
        found.adapter(config)
    }
}

/// Reads a model with running statistics as they are after the last forward pass.
fn current<M: Module>(model: &M) -> Walk {
    let found = walk(model);
    if !found.parameters.iter().any(Parameter::is_statistic) {
        return found;
    }
    // Burn keeps the last update of a running statistic aside until it is asked for the value, and a traversal does
    // not ask; taking a validation model does.
    drop(model.valid());
    walk(model)
}

/// The adapters of a model.
struct Found {
    /// The model, with running statistics as they are now.
    walk: Walk,
    /// The method that all adapters have in common.
    method: Method,
    /// Paths of the adapted layers.
    adapted: HashSet<String>,
}

impl Found {
    /// Finds the adapters and the method that they share.
    ///
    /// # Errors
    ///
    /// - [`ExtractError::NotAdapted`]: there are none.
    /// - [`ExtractError::Mixed`]: two methods differ; sizes may.
    fn new(walk: Walk) -> Result<Self, ExtractError> {
        let mut method: Option<Method> = None;
        let mut adapted = HashSet::new();
        for (weight, _, rotation) in walk.adapted() {
            let path = weight.owner().to_string();
            let first = method.get_or_insert_with(|| rotation.method().clone());
            if let Some((found, expected)) = rotation.method().difference(first) {
                return Err(ExtractError::Mixed {
                    path,
                    found,
                    expected,
                });
            }
            adapted.insert(path);
        }
        Ok(Self {
            method: method.ok_or(ExtractError::NotAdapted)?,
            adapted,
            walk,
        })
    }

    /// Whether the layer that owns the parameter carries an adapter.
    fn is_adapted(&self, parameter: &Parameter) -> bool {
        self.adapted.contains(parameter.owner())
    }

    /// What is trained beside the adapters.
    fn trained(&self) -> impl Iterator<Item = &Parameter> {
        let parameters = self.walk.parameters.iter();
        parameters.filter(|parameter| parameter.stored.is_trainable())
    }

    /// The adapter, with everything that the configuration trains.
    ///
    /// # Errors
    ///
    /// - As [`tensors`](Self::tensors).
    /// - [`ExtractError::Quantized`]: the numbers of an adapter are quantized.
    fn adapter(self, config: AdapterConfig) -> Result<Adapter, ExtractError> {
        let tensors = self.tensors(config.selection())?;
        let saved_too = self.saved_too(&config.selection().modules_to_save);
        let layers = self
            .walk
            .adapted()
            .filter_map(|(weight, attached, rotation)| {
                let (path, trained) = attached.trained_skew()?;
                let trained = numbers(path, trained);
                let scale = attached.part("scale");
                let scale = scale.map(|(path, scale)| numbers(path, scale)).transpose();
                Some(trained.and_then(|trained| {
                    let skew = rotation.skew_numbers(trained);
                    Ok(layer(weight.owner(), rotation, skew, scale?))
                }))
            });
        let mut adapter = Adapter {
            config,
            layers: layers.collect::<Result<_, ExtractError>>()?,
            tensors,
            copies: Vec::new(),
            about: Map::new(),
            promised: None,
            saved_too,
        };
        adapter.sort();
        Ok(adapter)
    }

    /// The modules that PEFT would save by these entries of `modules_to_save`, and that are not saved.
    fn saved_too(&self, modules_to_save: &[String]) -> Vec<SavedToo> {
        let (saved, by_peft) = (
            Saved::new(modules_to_save),
            SavedByPeft::new(modules_to_save),
        );
        // A module without parameters has no tensors that PEFT could miss.
        let modules = self.walk.modules.iter().filter(|m| m.holds_parameters);
        let others = modules.filter(|module| !saved.contains(&module.path));
        let saved_too = others.filter_map(|module| {
            Some(SavedToo {
                entry: by_peft.of(&module.path)?.to_string(),
                module: module.path.clone(),
            })
        });
        saved_too.collect()
    }

    /// The biases and saved modules, which are all that is trained.
    ///
    /// The running statistics of a saved batch norm are among them, although training does not change them by
    /// gradients: PEFT's copy of a module has its buffers too.
    ///
    /// # Errors
    ///
    /// - [`ExtractError::LeftBehind`]: something is trained that the selection does not mean.
    /// - [`ExtractError::Frozen`]: the selection means something that is not trained.
    /// - [`ExtractError::Quantized`]: the numbers of a parameter are quantized.
    /// - [`ExtractError::Config`]: a pattern of the selection cannot be used.
    fn tensors(&self, selection: &Selection) -> Result<Vec<SavedTensor>, ExtractError> {
        let selector = compiled(selection)?;
        let adapted = self.adapted.iter().map(String::as_str).collect();
        let kept: Vec<_> = trained(&selector, &self.walk, &adapted).collect();
        let kept_paths: HashSet<_> = kept.iter().map(|parameter| parameter.path()).collect();
        let left = self.trained().filter(|p| !kept_paths.contains(p.path()));
        let left: Vec<_> = left.map(|parameter| parameter.path().to_string()).collect();
        if !left.is_empty() {
            return Err(ExtractError::LeftBehind { paths: left });
        }
        let frozen = kept
            .iter()
            .filter(|p| !p.is_statistic() && !p.stored.is_trainable());
        let frozen: Vec<_> = frozen
            .map(|parameter| parameter.path().to_string())
            .collect();
        if !frozen.is_empty() {
            return Err(ExtractError::Frozen { paths: frozen });
        }
        let mut tensors = Vec::with_capacity(kept.len());
        for parameter in kept {
            tensors.push(saved(parameter, &selection.layer_kinds)?);
            if parameter.counts_batches() {
                // PyTorch's buffer beside the mean; its norms do not load without it.
                tensors.push(SavedTensor {
                    module: parameter.owner().to_string(),
                    name: "num_batches_tracked".to_string(),
                    data: TensorData::new(vec![0i64], Vec::<usize>::new()),
                });
            }
        }
        Ok(tensors)
    }

    /// Compares the layers that a configuration selects with those that are adapted.
    ///
    /// # Errors
    ///
    /// - [`ExtractError::Targets`]: they differ, with both differences.
    /// - [`ExtractError::Config`]: there are no targets, or a pattern cannot be used.
    fn check_targets(&self, selection: &Selection) -> Result<(), ExtractError> {
        if selection.target_modules.is_none() {
            return Err(InjectError::new(vec![Misfit::NoTargetSetting]).into());
        }
        let selector = compiled(selection)?;
        let (mut not_selected, mut not_adapted) = (Vec::new(), Vec::new());
        let verdicts = verdicts(&self.walk, &selection.layer_kinds, Some(&self.method));
        for (parameter, verdict) in verdicts {
            let path = parameter.owner();
            let is_adapted = parameter.name() == "weight" && self.is_adapted(parameter);
            let Ok(kind) = verdict else {
                if is_adapted {
                    not_selected.push(path.to_string());
                }
                continue;
            };
            let decision = selector.decide(path, kind == LayerKind::Linear)?;
            match (decision == Decision::Target, is_adapted) {
                (true, false) => not_adapted.push(path.to_string()),
                (false, true) => not_selected.push(path.to_string()),
                _ => {}
            }
        }
        match not_selected.is_empty() && not_adapted.is_empty() {
            true => Ok(()),
            false => Err(ExtractError::Targets {
                not_selected,
                not_adapted,
            }),
        }
    }

    /// What a configuration must select for this model.
    ///
    /// Whole modules that are trained are modules to save. Of what is left, PEFT can only name the biases of the
    /// adapted layers, or all biases of the model.
    ///
    /// # Errors
    ///
    /// [`ExtractError::LeftBehind`]: neither of the two is exactly what is trained.
    fn selection(&self) -> Result<Selection, ExtractError> {
        let saving = Selection {
            modules_to_save: self.trained_modules(),
            ..Selection::default()
        };
        let saved = compiled(&saving)?;
        let beside = self.trained().filter(|p| !saved.saves(p.owner()));
        let beside: Vec<_> = beside.collect();
        let bias = match beside.iter().all(|parameter| self.is_adapted(parameter)) {
            true if beside.is_empty() => Bias::None,
            true => Bias::AdapterOnly,
            false => Bias::All,
        };
        let means = |parameter: &&Parameter| match bias {
            Bias::None => false,
            Bias::AdapterOnly => parameter.is_bias() && self.is_adapted(parameter),
            Bias::All => parameter.is_bias(),
        };
        let mut meant = self.walk.parameters.iter().filter(means);
        if !meant.all(|parameter| parameter.stored.is_trainable()) {
            let paths = beside.iter().map(|parameter| parameter.path().to_string());
            return Err(ExtractError::LeftBehind {
                paths: paths.collect(),
            });
        }
        Ok(Selection {
            target_modules: Some(self.targets(&saved)),
            bias,
            layer_kinds: self.layer_kinds(),
            ..saving
        })
    }

    /// The adapted layers by their full paths, as a list where it selects no other module.
    ///
    /// The path `query` also ends `encoder.query`, so a list would adapt both. A regular expression must match whole
    /// paths.
    fn targets(&self, saved: &Selector) -> TargetModules {
        let adapted = self
            .walk
            .adapted()
            .map(|(weight, ..)| weight.owner().to_string());
        let names: Vec<_> = adapted.collect();
        // A name selects every path that ends with it, a regular expression the paths that it spells.
        match self.selects_others(saved) {
            false => TargetModules::Names(names),
            true => TargetModules::whole_paths(names.iter().map(String::as_str)),
        }
    }

    /// Whether the path of an adapted layer ends the path of a module that is neither adapted nor saved.
    ///
    /// Read backwards, it then starts that path, and what starts a path comes before it in their order, with nothing in
    /// between that it does not start.
    fn selects_others(&self, saved: &Selector) -> bool {
        let modules = self.walk.modules.iter().map(|module| module.path.as_str());
        let backwards = |path: &str| path.chars().rev().chain(['.']).collect::<String>();
        let mut paths: Vec<_> = modules.map(|path| (backwards(path), path)).collect();
        paths.sort();
        let mut starts: Vec<&str> = Vec::new();
        for (backwards, path) in &paths {
            while starts
                .pop_if(|start| !backwards.starts_with(*start))
                .is_some()
            {}
            match self.adapted.contains(*path) {
                true => starts.push(backwards),
                false if !starts.is_empty() && !saved.saves(path) => return true,
                false => {}
            }
        }
        false
    }

    /// The adapted layers whose type does not say what they are: those that were adapted by way of
    /// [`with_layer_kind`](crate::BoftConfig::with_layer_kind).
    fn layer_kinds(&self) -> Vec<(String, Option<LayerKind>)> {
        let verdicts = verdicts(&self.walk, &[], None);
        let adapted = verdicts.filter(|(parameter, verdict)| {
            parameter.attached.is_some() && verdict.is_err() && parameter.name() == "weight"
        });
        let kind = |parameter: &Parameter| {
            let rotation = parameter.attached.as_ref()?.rotation.as_ref()?;
            Some((parameter.owner().to_string(), Some(rotation.kind())))
        };
        adapted
            .filter_map(|(parameter, _)| kind(parameter))
            .collect()
    }

    /// The largest modules of which every parameter is trained.
    ///
    /// Running statistics are not counted, since they are no parameters, and a module without any has nothing to save.
    /// The model itself and lists of modules are never among them: `modules_to_save` cannot name the first, and PEFT
    /// does not wrap the second.
    fn trained_modules(&self) -> Vec<String> {
        let mut counts: HashMap<&str, (usize, usize)> = HashMap::new();
        let mut count = |path, (more, more_trained)| {
            let (total, trained) = counts.entry(path).or_default();
            *total += more;
            *trained += more_trained;
            (*total, *trained)
        };
        for parameter in self.walk.parameters.iter().filter(|p| !p.is_statistic()) {
            let trained = usize::from(parameter.stored.is_trainable());
            count(parameter.owner(), (1, trained));
        }
        // Children come after their parents.
        for module in self.walk.modules.iter().rev() {
            let path = module.path.as_str();
            let of_module = count(path, (0, 0));
            if !path.is_empty() {
                count(split(path).0, of_module);
            }
        }
        let mut chosen: Vec<String> = Vec::new();
        for module in &self.walk.modules {
            let path = module.path.as_str();
            let whole = counts
                .get(path)
                .is_some_and(|(total, trained)| total == trained && *total > 0);
            // PEFT wraps modules, and no lists of them.
            let is_list = matches!(module.type_name.as_str(), "Vec" | "Array" | "Tuple");
            let is_inside = chosen.last().is_some_and(|holder| {
                path.strip_prefix(holder.as_str())
                    .is_some_and(|rest| rest.starts_with('.'))
            });
            if whole && !path.is_empty() && !is_list && !is_inside {
                chosen.push(path.to_string());
            }
        }
        chosen
    }
}

/// The rules of a selection.
///
/// # Errors
///
/// [`ExtractError::Config`]: a pattern cannot be used.
fn compiled(selection: &Selection) -> Result<Selector, ExtractError> {
    Selector::new(selection).map_err(|errors| {
        let misfits = errors.into_iter().map(Misfit::from);
        InjectError::new(misfits.collect()).into()
    })
}

/// The numbers of a parameter, copied to the host.
///
/// # Errors
///
/// [`ExtractError::Quantized`]: they are not floats.
fn numbers(path: &str, stored: &Stored) -> Result<TensorData, ExtractError> {
    match is_float(stored.dtype()) {
        true => Ok(stored.data()),
        false => Err(ExtractError::Quantized {
            path: path.to_string(),
        }),
    }
}

/// The numbers of a parameter, with PyTorch's name and orientation.
///
/// # Errors
///
/// [`ExtractError::Quantized`]: they are not floats.
fn saved(
    parameter: &Parameter,
    layer_kinds: &[(String, Option<LayerKind>)],
) -> Result<SavedTensor, ExtractError> {
    let data = numbers(parameter.path(), &parameter.stored)?;
    let turned = parameter
        .is_transposed(layer_kinds)
        .then(|| transposed(&data))
        .flatten();
    Ok(SavedTensor {
        module: parameter.owner().to_string(),
        name: parameter.torch_name().to_string(),
        data: turned.unwrap_or(data),
    })
}

/// The layer of these numbers, as the adapter keeps it.
///
/// # Shapes
///
/// - `skew`: `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` where one block is shared
/// - `scale`: `[d_output]`
fn layer(
    path: &str,
    rotation: &Rotation,
    skew: TensorData,
    scale: Option<TensorData>,
) -> AdapterLayer {
    let sizes = rotation.sizes();
    let dtype = widened(skew.dtype());
    let [m, mut stored, packed] = sizes.skew_shape();
    let mut numbers = values(&skew);
    let share = rotation.method().block_share();
    if sizes.block_share() && !share {
        // BOFT has no shared blocks, and a file of an old OFT, which is read as BOFT, may have.
        numbers = numbers.repeat(sizes.block_num());
        stored = sizes.block_num();
    }
    AdapterLayer {
        path: path.to_string(),
        kind: Some(rotation.kind()),
        axis: Axis::Input,
        block_size: sizes.block_size(),
        block_share: sizes.block_share() && share,
        d_output: Some(sizes.d_output()),
        skew: from_values(numbers, vec![m, stored, packed], dtype),
        scale: scale.map(|scale| from_values(values(&scale), vec![sizes.d_output()], dtype)),
    }
}
