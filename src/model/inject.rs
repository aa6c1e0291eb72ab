//! The verbs that change a model: [`plan`], [`inject`], [`merge`], [`unload`], [`project`].

use std::any::Any;
use std::collections::{HashMap, HashSet};

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{DType, Tensor, TensorData};

use crate::adapter::{AdapterSettings, Attach, BoftAdapter, Values};
use crate::config::{AdapterConfig, Bias, Block, Cayley, OftConfig, Selection};
use crate::error::{InjectError, MergeError, Misfit};
use crate::model::plan::{ButterflyPlan, InjectPlan, LayerKind, LayerPlan};
use crate::model::walk::{Layer, Parameter, Path, REPARAMETERIZATION, Survey};
use crate::select::{Decision, TargetMatcher, is_saved};

/// Shows what [`inject`] would do, without doing it.
///
/// # Errors
///
/// As [`inject`].
///
/// # Examples
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn::module::Module;
/// use burn_boft::{BoftConfig, plan};
///
/// #[derive(Module, Debug)]
/// struct Head { hidden: Linear, output: Linear }
///
/// # let device = burn::tensor::Device::flex();
/// let head = Head {
///     hidden: LinearConfig::new(64, 32).init(&device),
///     output: LinearConfig::new(32, 10).init(&device),
/// };
/// let plan = plan(&head, BoftConfig::new().with_block_size(8).with_target_modules(["hidden"]))?;
/// assert_eq!(plan.layers[0].path, "hidden");
/// assert_eq!(plan.parameters(), 8 * 28 + 32);
/// # Ok::<(), burn_boft::InjectError>(())
/// ```
pub fn plan<M: Module>(
    model: &M,
    config: impl Into<AdapterConfig>,
) -> Result<InjectPlan, InjectError> {
    Preparation::new(model, &config.into()).map(|preparation| preparation.plan)
}

/// Attaches an adapter to every layer that the configuration targets, and freezes the rest.
///
/// The model keeps its type, and with [`Init::Identity`](crate::Init::Identity) it computes what it did
/// before. Trainable afterwards: the adapters, the chosen biases, and the modules to save. Layers are
/// `Linear` and `Conv2d`, wherever the model holds them; embeddings and norms are never adapted. Control
/// flags, such as those of dropout layers, stay as they are.
///
/// # Errors
///
/// Every misfit of the settings and the model at once; see [`Misfit`]. The model passed in is consumed, so
/// keep a clone where it is needed after an error; clones share their tensors.
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
/// # Ok::<(), burn_boft::InjectError>(())
/// ```
pub fn inject<M: Module>(model: M, config: impl Into<AdapterConfig>) -> Result<M, InjectError> {
    let config = config.into();
    let Preparation { plan, trained } = Preparation::new(&model, &config)?;
    let layers = plan
        .layers
        .into_iter()
        .map(|layer| {
            let values = Values::initial(config.init(), &layer.path, layer.butterfly, layer.scale);
            let settings = AdapterSettings::new(layer.kind, layer.butterfly, &config);
            (layer.path, (settings, values))
        })
        .collect();
    Ok(place(model, layers, trained, HashMap::new()))
}

/// Attaches these adapters by the path of their layer, freezes what is not `trained`, and sets `tensors` by path.
///
/// Everything fits: this is checked before.
pub(crate) fn place<M: Module>(
    model: M,
    layers: HashMap<String, (AdapterSettings, Values)>,
    trained: HashSet<String>,
    tensors: HashMap<String, TensorData>,
) -> M {
    model.map(&mut Injector {
        path: Path::default(),
        layers,
        trained,
        tensors,
    })
}

/// Folds every adapter into its base weight: `W ← R·W·diag(s)`.
///
/// The result is a plain model. Multiplicative dropout does not act, COFT's radius does. A quantized base
/// becomes dense.
///
/// # Errors
///
/// [`MergeError::NotAdapted`] without adapters, [`MergeError::NotFinite`] where a merged weight holds NaN or
/// infinity.
pub fn merge<M: Module>(model: M) -> Result<M, MergeError> {
    let adapted = adapted_bases(&model);
    if adapted.is_empty() {
        return Err(MergeError::NotAdapted);
    }
    let merged = model
        .map(&mut DropoutOff {
            path: Path::default(),
        })
        .materialize();
    let mut check = FiniteCheck {
        path: Path::default(),
        merged: &adapted,
        paths: Vec::new(),
    };
    merged.visit(&mut check);
    match check.paths.is_empty() {
        true => Ok(merged),
        false => Err(MergeError::NotFinite { paths: check.paths }),
    }
}

/// Removes every adapter; the base weights are those from before the injection.
///
/// What was frozen stays frozen, and trained biases and modules to save keep their trained values.
pub fn unload<M: Module>(model: M) -> M {
    let bases = adapted_bases(&model);
    model.materialize().map(&mut Restore {
        path: Path::default(),
        bases,
    })
}

/// Scales every `Q` of a COFT adapter back to the radius, as PEFT does before each forward pass.
///
/// Call it after an optimizer step. The forward pass never leaves the radius either way; this keeps the
/// stored numbers inside it too. Adapters without a radius are left alone.
pub fn project<M: Module>(model: M) -> M {
    model.map(&mut Projector::default())
}

/// A plan that fits, and every parameter that stays trainable.
struct Preparation {
    plan: InjectPlan,
    trained: HashSet<String>,
}

impl Preparation {
    fn new<M: Module>(model: &M, config: &AdapterConfig) -> Result<Self, InjectError> {
        let mut survey = Survey::default();
        model.visit(&mut survey);
        let mut misfits = check_settings(config);
        misfits.extend(
            survey
                .adapted
                .iter()
                .map(|(path, name)| Misfit::AlreadyAdapted {
                    path: path.clone(),
                    name: name.clone(),
                }),
        );
        let selection = config.selection();
        check_modules_to_save(selection, &survey, &mut misfits);
        let matcher = match TargetMatcher::new(selection) {
            Ok(matcher) => matcher,
            Err(errors) => {
                misfits.extend(errors.into_iter().map(Misfit::Pattern));
                return Err(InjectError::new(misfits));
            }
        };
        let layers = plan_layers(config, &matcher, &survey, &mut misfits);
        if !misfits.is_empty() {
            return Err(InjectError::new(misfits));
        }
        let adapted = layers.iter().map(|layer| layer.path.as_str()).collect();
        let trained: Vec<_> = trained_parameters(selection, &survey, &adapted)
            .map(|parameter| parameter.path.clone())
            .collect();
        let plan = InjectPlan {
            layers,
            trained: trained.clone(),
        };
        Ok(Self {
            plan,
            trained: trained.into_iter().collect(),
        })
    }
}

/// The misfits that no model could mend.
pub(crate) fn check_settings(config: &AdapterConfig) -> Vec<Misfit> {
    let mut misfits = Vec::new();
    match config {
        AdapterConfig::Boft(config) => {
            if config.n_butterfly_factor == 0 {
                misfits.push(Misfit::NoFactors);
            }
            if !(0.0..1.0).contains(&config.dropout) {
                misfits.push(Misfit::Dropout {
                    dropout: config.dropout,
                });
            }
        }
        AdapterConfig::Oft(OftConfig {
            cayley,
            coft_radius,
            ..
        }) => {
            if let Cayley::Neumann {
                terms: terms @ 0..=1,
            }
            | Cayley::Neumann016 {
                terms: terms @ 0..=1,
            } = *cayley
            {
                misfits.push(Misfit::NeumannTerms { terms });
            }
            if let Some(radius) = coft_radius.filter(|r| !r.is_finite() || *r <= 0.0) {
                misfits.push(Misfit::CoftRadius { radius });
            }
        }
    }
    if config.selection().target_modules.is_none() {
        misfits.push(Misfit::NoTargetSetting);
    }
    misfits
}

fn check_modules_to_save(selection: &Selection, survey: &Survey, misfits: &mut Vec<Misfit>) {
    for name in &selection.modules_to_save {
        let ending = format!(".{name}");
        if !survey
            .modules
            .iter()
            .any(|path| path == name || path.ends_with(&ending))
        {
            let modules = survey.modules.iter().map(String::as_str);
            let nearest = nearest(name, modules);
            misfits.push(Misfit::UnknownModuleToSave {
                name: name.clone(),
                nearest,
            });
        }
    }
}

fn plan_layers(
    config: &AdapterConfig,
    matcher: &TargetMatcher,
    survey: &Survey,
    misfits: &mut Vec<Misfit>,
) -> Vec<LayerPlan> {
    let (mut layers, mut excluded, mut targets) = (Vec::new(), 0, 0);
    for layer in &survey.layers {
        match matcher.decide(&layer.path, layer.kind == LayerKind::Linear) {
            Ok(Decision::Target) => targets += 1,
            Ok(Decision::Excluded) => {
                excluded += 1;
                continue;
            }
            Ok(Decision::Unmatched) => continue,
            Err(error) => {
                misfits.push(Misfit::Pattern(error));
                return Vec::new();
            }
        }
        match plan_layer(config, layer) {
            Ok(layer) => layers.push(layer),
            // Reported once, with the settings.
            Err(Misfit::NoFactors) => {}
            Err(misfit) => misfits.push(misfit),
        }
    }
    let selection = config.selection();
    if let (0, Some(modules)) = (targets, &selection.target_modules) {
        let paths = survey.layers.iter().map(|layer| layer.path.as_str());
        let targets = format!("{modules:?}");
        let nearest = nearest(&targets, paths);
        let layers = survey.layers.len();
        misfits.push(Misfit::NoTarget {
            targets,
            layers,
            excluded,
            nearest,
        });
    }
    layers
}

fn plan_layer(config: &AdapterConfig, layer: &Layer) -> Result<LayerPlan, Misfit> {
    let Layer {
        path,
        kind,
        shape,
        dtype,
    } = layer;
    if matches!(dtype, DType::QFloat(_)) {
        return Err(Misfit::Quantized {
            path: path.clone(),
            dtype: *dtype,
        });
    }
    if matches!(config, AdapterConfig::Boft(config) if config.n_butterfly_factor == 0) {
        return Err(Misfit::NoFactors);
    }
    let butterfly = ButterflyPlan::new(config, path, kind.axes(shape))?;
    let (scale, block) = match config {
        AdapterConfig::Boft(config) => (config.scale, config.block),
        AdapterConfig::Oft(config) => (false, config.block),
    };
    let asked = match block {
        Block::Size(size) => size,
        Block::Count(count) => butterfly.d_input / count.clamp(1, butterfly.d_input),
    };
    Ok(LayerPlan {
        path: path.clone(),
        kind: *kind,
        shape: shape.clone(),
        butterfly,
        scale,
        adjusted_from: (asked != butterfly.block_size).then_some(asked),
    })
}

/// The biases and parts of modules that stay trainable, in the model's order.
pub(crate) fn trained_parameters<'a>(
    selection: &Selection,
    survey: &'a Survey,
    adapted: &HashSet<&str>,
) -> impl Iterator<Item = &'a Parameter> {
    survey.parameters.iter().filter(|parameter| {
        let bias = parameter.is_bias
            && match selection.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::AdapterOnly => adapted.contains(parameter.owner.as_str()),
            };
        bias || is_saved(&selection.modules_to_save, &parameter.owner)
    })
}

/// Up to three candidates that share the most letters' pairs with a name.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let pairs = |text: &str| -> HashSet<(char, char)> {
        text.chars()
            .zip(text.chars().skip(1))
            .filter(|(a, b)| a.is_alphanumeric() && b.is_alphanumeric())
            .collect()
    };
    let wanted = pairs(name);
    let mut scored: Vec<_> = candidates
        .map(|path| (pairs(path).intersection(&wanted).count(), path))
        .filter(|(score, _)| *score > 0)
        .collect();
    scored.sort_by_key(|(score, path)| (std::cmp::Reverse(*score), path.len()));
    scored.dedup_by_key(|(_, path)| *path);
    scored
        .into_iter()
        .take(3)
        .map(|(_, path)| format!("`{path}`"))
        .collect()
}

/// Attaches adapters, and sets what is trainable.
struct Injector {
    path: Path,
    layers: HashMap<String, (AdapterSettings, Values)>,
    trained: HashSet<String>,
    tensors: HashMap<String, TensorData>,
}

impl ModuleMapper for Injector {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.full();
        let param = match self.tensors.remove(&path) {
            Some(data) => param.map(|old| {
                let (device, dtype) = (old.device(), old.dtype());
                device.memory_persistent_allocations(data, |data| {
                    Tensor::from_data(data.convert_dtype(dtype), (&device, dtype))
                })
            }),
            None => param,
        };
        let layer = self
            .path
            .layer_kind::<D>()
            .and_then(|_| self.layers.remove(&self.path.owner()));
        let Some((settings, values)) = layer else {
            return param.set_require_grad(self.trained.contains(&path));
        };
        let base = param.base();
        let adapter = BoftAdapter::new(settings, values, (&base.device(), base.dtype()));
        param
            .set_require_grad(false)
            .apply_reparameterization(Attach(Some(adapter)))
    }
}

/// The base of every parameter with one of our adapters, by path: a `Tensor<D>` each.
fn adapted_bases<M: Module>(model: &M) -> HashMap<String, Box<dyn Any>> {
    let mut bases = Bases::default();
    model.visit(&mut bases);
    bases.bases
}

#[derive(Default)]
struct Bases {
    path: Path,
    last: Option<Box<dyn Any>>,
    bases: HashMap<String, Box<dyn Any>>,
}

impl ModuleVisitor for Bases {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION
            && name == BoftAdapter::NAME
            && let Some(base) = self.last.take()
        {
            self.bases.insert(self.path.full(), base);
        }
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Burn shows the base first and its reparameterization next.
        self.last = Some(Box::new(param.base()));
    }
}

/// Puts the bases back into a materialized model.
struct Restore {
    path: Path,
    bases: HashMap<String, Box<dyn Any>>,
}

impl ModuleMapper for Restore {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let base = self
            .bases
            .remove(&self.path.full())
            .map(|base| base.downcast::<Tensor<D>>());
        match base {
            Some(Ok(base)) => param.map(|_| *base),
            _ => param,
        }
    }
}

/// Turns multiplicative dropout off, so that a training model merges what it means.
struct DropoutOff {
    path: Path,
}

impl ModuleMapper for DropoutOff {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match self.path.in_reparameterization() {
            true => flag.with_value(false),
            false => flag,
        }
    }
}

/// Finds merged weights that are not finite.
struct FiniteCheck<'a> {
    path: Path,
    merged: &'a HashMap<String, Box<dyn Any>>,
    paths: Vec<String>,
}

impl ModuleVisitor for FiniteCheck<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.merged.contains_key(&self.path.full()) {
            // Zero times a number is zero; times NaN or infinity it is NaN.
            let sum: f64 = (param.base() * 0.0).sum().into_scalar();
            if sum != 0.0 {
                self.paths.push(self.path.owner());
            }
        }
    }
}

/// Projects the skew parameters of COFT adapters.
#[derive(Default)]
struct Projector {
    settings: Option<AdapterSettings>,
    name: String,
}

impl ModuleMapper for Projector {
    fn enter_module(&mut self, name: &str, container: &str) {
        if let Some(settings) = AdapterSettings::from_level(name, container) {
            self.settings = Some(settings);
        }
        self.name = name.to_string();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.settings.take_if(|_| self.name == "skew" && D == 3) {
            Some(settings) => param.map(|skew| {
                let (require_grad, shape) = (skew.is_require_grad(), skew.shape());
                let skew = skew.reshape(settings.butterfly().skew_shape());
                let skew = settings.project(skew).reshape(shape);
                // Detached last: a tensor that requires a gradient keeps that when it is detached.
                skew.detach().set_require_grad(require_grad)
            }),
            None => param,
        }
    }
}
