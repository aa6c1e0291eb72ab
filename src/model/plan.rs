//! [`plan`]: the dry run of an injection.
//!
//! [`inject`](crate::inject()) makes the same [`Preparation`] and then acts on it, so a plan that succeeds is an
//! injection that succeeds.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display, Formatter};

use burn::module::Module;

use super::candidates::{Unsupported, verdicts};
use super::misfit::{InjectError, Misfit, nearest};
use super::walk::{Parameter, Walk, walk};
use crate::config::{AdapterConfig, LayerKind, Selection, TargetModules};
use crate::ops::is_quantized;
use crate::rotation::{ButterflyPlan, Method, Rotation};
use crate::select::{Decision, Selector, endings, longest};

/// Shows what [`inject`](crate::inject()) would do, without doing it.
///
/// The result lists every layer with the sizes that it would get, and prints as a table.
///
/// # Errors
///
/// The same as [`inject`](crate::inject()): every misfit of the settings and the model at once.
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
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
pub fn plan<M: Module>(
    model: &M,
    config: impl Into<AdapterConfig>,
) -> Result<InjectPlan, InjectError> {
    Preparation::new(&walk(model), &config.into()).map(|preparation| preparation.plan)
}

/// One layer of an [`InjectPlan`]: what its adapter would be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerPlan {
    /// The dotted path of the layer, which is empty if the model itself is the layer.
    pub path: String,
    /// Whether it is linear, a convolution or an embedding.
    pub kind: LayerKind,
    /// The shape of its weight in Burn.
    pub shape: Vec<usize>,
    /// The sizes of the rotation.
    pub butterfly: ButterflyPlan,
    /// Whether a scale per output channel is trained.
    pub scale: bool,
    /// The block size that the configuration asks for, if OFT adjusts it to another one.
    pub adjusted_from: Option<usize>,
}

impl LayerPlan {
    fn new(path: &str, shape: Vec<usize>, rotation: &Rotation) -> Self {
        Self {
            path: path.to_string(),
            kind: rotation.kind(),
            shape,
            butterfly: rotation.sizes(),
            scale: rotation.scale(),
            adjusted_from: rotation.adjusted_from(),
        }
    }

    /// How many numbers of the adapter are trained: those of the skew and those of the scale.
    ///
    /// PEFT counts more for BOFT, whose squares it stores whole: [`summary`](crate::summary()) has both counts.
    pub fn parameters(&self) -> usize {
        let skew: usize = self.butterfly.skew_shape().iter().product();
        match self.scale {
            true => skew + self.butterfly.d_output(),
            false => skew,
        }
    }
}

/// What [`inject`](crate::inject()) would do, as [`plan`] found it. `Display` prints a table.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{OftConfig, plan};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(45, 10).init(&device);
/// let plan = plan(&layer, OftConfig::new().with_block_size(32).with_target_modules("all-linear"))?;
/// // OFT takes the divisor of 45 that is nearest to 32, as PEFT does, and the table says so.
/// assert_eq!(plan.layers[0].butterfly.block_size(), 45);
/// assert_eq!(plan.layers[0].adjusted_from, Some(32));
/// assert!(plan.to_string().contains("(block size adjusted from 32)"));
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InjectPlan {
    /// The layers that would be adapted, in the model's order.
    pub layers: Vec<LayerPlan>,
    /// Paths of the parameters that would be trained in addition: biases, and parts of modules to save.
    pub trained: Vec<String>,
    /// Whether the model is on a device with autodiff. If not, call [`Module::train`] on the injected model before
    /// the first backward pass.
    pub is_autodiff: bool,
}

impl InjectPlan {
    /// How many numbers of all adapters are trained.
    pub fn parameters(&self) -> usize {
        self.layers.iter().map(LayerPlan::parameters).sum()
    }
}

impl Display for InjectPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let name = |layer: &LayerPlan| match layer.path.as_str() {
            "" => "(the model itself)".to_string(),
            path => path.to_string(),
        };
        let names: Vec<_> = self.layers.iter().map(name).collect();
        let shapes: Vec<_> = self
            .layers
            .iter()
            .map(|layer| format!("{:?}", layer.shape))
            .collect();
        let width = |column: &[String]| column.iter().map(String::len).max().unwrap_or(0).max(5);
        let (name_width, shape_width) = (width(&names), width(&shapes));
        writeln!(
            f,
            "{:name_width$}  {:shape_width$}  {:>5}  {:>6}  {:>7}  {:>10}",
            "layer", "shape", "block", "blocks", "factors", "parameters"
        )?;
        for ((layer, name), shape) in self.layers.iter().zip(&names).zip(&shapes) {
            let sizes = layer.butterfly;
            write!(
                f,
                "{name:name_width$}  {shape:shape_width$}  {:>5}  {:>6}  {:>7}  {:>10}",
                sizes.block_size(),
                sizes.block_num(),
                sizes.n_butterfly_factor(),
                layer.parameters(),
            )?;
            match layer.adjusted_from {
                Some(size) => writeln!(f, "  (block size adjusted from {size})")?,
                None => writeln!(f)?,
            }
        }
        let (layers, parameters) = (self.layers.len(), self.parameters());
        write!(f, "{layers} layers, {parameters} parameters")?;
        if !self.trained.is_empty() {
            write!(f, "; also trained: {}", self.trained.join(", "))?;
        }
        if !self.is_autodiff {
            write!(
                f,
                "\nThe model is on a device without autodiff: call `train()` on the injected model before the \
                 first backward pass."
            )?;
        }
        Ok(())
    }
}

/// A plan, and the rotation of each of its layers.
pub(crate) struct Preparation {
    pub(crate) plan: InjectPlan,
    /// The rotation of each layer of the plan, in the same order.
    pub(crate) rotations: Vec<Rotation>,
}

impl Preparation {
    /// Finds the layers that a configuration means in a model, and their rotations.
    ///
    /// Misfits come in this order: settings that work in no model, what the model already carries, `modules_to_save`,
    /// patterns, targets, and sizes that do not fit a layer. Only a pattern that cannot be used, or has no answer, ends
    /// the search early, since without it the targets are not known.
    ///
    /// # Errors
    ///
    /// Every misfit at once.
    pub(crate) fn new(walk: &Walk, config: &AdapterConfig) -> Result<Self, InjectError> {
        let selection = config.selection();
        let method = Method::unchecked(config);
        let mut misfits: Vec<_> = into_misfits(method.errors()).collect();
        if selection.target_modules.is_none() {
            misfits.push(Misfit::NoTargetSetting);
        }
        misfits.extend(already_adapted(walk));
        misfits.extend(unknown_modules_to_save(selection, walk));
        let selector = match Selector::new(selection) {
            Ok(selector) => selector,
            Err(errors) => {
                misfits.extend(into_misfits(errors));
                return Err(InjectError::new(misfits));
            }
        };
        let mut targets = Targets::new(selection, &selector);
        let found = targets.find(walk, &method);
        let layers = match found {
            Ok(layers) => layers,
            Err(error) => {
                misfits.push(error.into());
                return Err(InjectError::new(misfits));
            }
        };
        misfits.extend(targets.misfits(walk));
        misfits.extend(tied(&layers));
        let mut rotations = Vec::new();
        for (parameter, kind) in layers.iter().filter(|_| method.has_sizes()) {
            let axes = kind.axes(&parameter.stored.shape());
            match method.rotation(parameter.owner(), *kind, axes) {
                Ok(rotation) => rotations.push(rotation),
                Err(error) => misfits.push(error.into()),
            }
        }
        let adapted = layers.iter().map(|(parameter, _)| parameter.owner());
        let adapted = adapted.collect();
        let trained: Vec<_> = trained(&selector, walk, &adapted).collect();
        misfits.extend(quantized(trained.iter().copied()));
        if !misfits.is_empty() {
            return Err(InjectError::new(misfits));
        }
        let planned = layers
            .iter()
            .zip(&rotations)
            .map(|((parameter, _), rotation)| {
                LayerPlan::new(parameter.owner(), parameter.stored.shape(), rotation)
            });
        let plan = InjectPlan {
            layers: planned.collect(),
            trained: trained
                .into_iter()
                .map(|parameter| parameter.path().to_string())
                .collect(),
            is_autodiff: walk.parameters.iter().any(|p| p.stored.is_autodiff()),
        };
        Ok(Self { plan, rotations })
    }
}

fn into_misfits<E: Into<Misfit>>(errors: Vec<E>) -> impl Iterator<Item = Misfit> {
    errors.into_iter().map(Into::into)
}

/// The parameters that already carry something.
///
/// They are refused even where the configuration selects other layers: one adapter has one configuration, and a model
/// with two could not be extracted.
fn already_adapted(walk: &Walk) -> impl Iterator<Item = Misfit> {
    walk.parameters.iter().filter_map(|parameter| {
        let attached = parameter.attached.as_ref()?;
        Some(Misfit::AlreadyAdapted {
            path: parameter.path().to_string(),
            name: attached.name.clone(),
        })
    })
}

/// The targets that share their weight with an earlier one.
///
/// Burn ties weights by cloning a parameter, and a clone keeps the id. Loading a record restores ids, so that two models
/// from one record have the same ones, and only weights with the same numbers are tied.
fn tied(layers: &[(&Parameter, LayerKind)]) -> Vec<Misfit> {
    let mut firsts: HashMap<_, Vec<&Parameter>> = HashMap::new();
    let mut misfits = Vec::new();
    for (parameter, _) in layers {
        let alike = firsts.entry(parameter.stored.id()).or_default();
        let is_shared = |first: &&&Parameter| {
            first.stored.shape() == parameter.stored.shape()
                && first.stored.data() == parameter.stored.data()
        };
        match alike.iter().find(is_shared) {
            Some(first) => misfits.push(Misfit::Tied {
                path: parameter.owner().to_string(),
                first: first.owner().to_string(),
            }),
            None => alike.push(parameter),
        }
    }
    misfits
}

/// The entries of `modules_to_save` that no module with parameters ends with.
///
/// PEFT passes over such an entry, and the classifier that somebody misspelt stays frozen. `allow_absent_targets` does
/// not allow it either.
fn unknown_modules_to_save(selection: &Selection, walk: &Walk) -> Vec<Misfit> {
    if selection.modules_to_save.is_empty() {
        return Vec::new();
    }
    let modules = || {
        let holders = walk.modules.iter().filter(|module| module.holds_parameters);
        holders.map(|module| module.path.as_str())
    };
    let longest = longest(&selection.modules_to_save);
    let known: HashSet<_> = modules().flat_map(|path| endings(path, longest)).collect();
    let names = selection.modules_to_save.iter();
    let unknown = names.filter(|name| name.is_empty() || !known.contains(name.as_str()));
    let misfit = |name: &String| Misfit::UnknownModuleToSave {
        name: name.clone(),
        nearest: nearest(name, modules()),
    };
    unknown.map(misfit).collect()
}

/// The biases and parts of modules that are trained in addition to adapters of these layers, in the model's order.
pub(crate) fn trained<'a>(
    selector: &Selector,
    walk: &'a Walk,
    adapted: &HashSet<&str>,
) -> impl Iterator<Item = &'a Parameter> {
    walk.parameters.iter().filter(|parameter| {
        let owner = parameter.owner();
        selector.trains(owner, parameter.is_bias(), adapted.contains(owner))
    })
}

/// Those of the parameters to be trained that are quantized, so that an optimizer could not change them.
pub(crate) fn quantized<'a>(
    trained: impl Iterator<Item = &'a Parameter>,
) -> impl Iterator<Item = Misfit> {
    let quantized = trained.filter(|parameter| is_quantized(parameter.stored.dtype()));
    quantized.map(|parameter| Misfit::Quantized {
        path: parameter.path().to_string(),
    })
}

/// The search for the layers that a configuration means.
///
/// Beside the layers, it collects what every name selects, so that a name which selects nothing is refused even if
/// others select something. PEFT is silent about it.
struct Targets<'a> {
    selection: &'a Selection,
    selector: &'a Selector,
    /// What the names in `target_modules` have selected so far.
    uses: HashMap<&'a str, Uses>,
    /// Layers that can carry an adapter.
    layers: Vec<String>,
    /// How many of them are targets.
    targets: usize,
    /// How many of them are excluded.
    excluded: usize,
    /// Targets that cannot be adapted.
    misfits: Vec<Misfit>,
}

/// What one name in `target_modules` selects.
#[derive(Default)]
struct Uses {
    /// How many layers are adapted, or excluded on purpose.
    selected: usize,
    /// How many layers `layers_to_transform` leaves out.
    outside: usize,
    /// The first module that cannot be adapted, with the reason.
    unsupported: Option<(String, Unsupported)>,
}

impl<'a> Targets<'a> {
    fn new(selection: &'a Selection, selector: &'a Selector) -> Self {
        let names = match &selection.target_modules {
            Some(TargetModules::Names(names)) => &names[..],
            _ => &[],
        };
        let uses = names.iter().map(|name| (name.as_str(), Uses::default()));
        Self {
            selection,
            selector,
            uses: uses.collect(),
            layers: Vec::new(),
            targets: 0,
            excluded: 0,
            misfits: Vec::new(),
        }
    }

    /// The layers to adapt, in the model's order.
    ///
    /// A target that cannot be adapted is a misfit only if its type is one that could be: a layer called `Linear` that
    /// is laid out in another way. A norm among the targets of a regular expression is passed over, and is a misfit only
    /// for a name that selects nothing else. So is an embedding where the method adapts none.
    ///
    /// # Errors
    ///
    /// A pattern that has no answer for a path.
    fn find<'w>(
        &mut self,
        walk: &'w Walk,
        method: &Method,
    ) -> Result<Vec<(&'w Parameter, LayerKind)>, crate::select::PatternError> {
        let mut found = Vec::new();
        for (parameter, verdict) in verdicts(walk, &self.selection.layer_kinds, Some(method)) {
            let path = parameter.owner();
            self.note(parameter.path(), || Unsupported::NoLayer {
                type_name: parameter.owner_type().to_string(),
            });
            let reason = match verdict {
                Ok(kind) => {
                    self.layers.push(path.to_string());
                    let decision = self.selector.decide(path, kind == LayerKind::Linear)?;
                    self.count(path, decision);
                    if decision == Decision::Target {
                        found.push((parameter, kind));
                    }
                    continue;
                }
                Err(reason) => reason,
            };
            match reason {
                // What is to be said about the layer is said for its weight.
                Unsupported::NotTheWeight { .. } => {}
                Unsupported::TakenOut => self.count(path, Decision::Excluded),
                Unsupported::Type { .. } | Unsupported::OnlyOft { .. } => {
                    self.note(path, || reason.clone());
                }
                reason => {
                    let is_linear = parameter.owner_type() == "Linear";
                    let decision = self.selector.decide(path, is_linear)?;
                    self.count(path, decision);
                    if decision == Decision::Target {
                        let path = path.to_string();
                        self.misfits
                            .push(Misfit::UnsupportedTarget { path, reason });
                    }
                }
            }
        }
        Ok(found)
    }

    /// Counts a layer, and notes that the names which select it have done so.
    fn count(&mut self, path: &str, decision: Decision) {
        match decision {
            Decision::Target => self.targets += 1,
            Decision::Excluded => self.excluded += 1,
            Decision::Unmatched => {}
        }
        for name in self.selector.names_of(path) {
            if let Some(uses) = self.uses.get_mut(name) {
                match decision {
                    Decision::Target | Decision::Excluded => uses.selected += 1,
                    Decision::Unmatched => uses.outside += 1,
                }
            }
        }
    }

    /// Notes that what is at `path` cannot be adapted, for every name that selects it.
    fn note(&mut self, path: &str, reason: impl Fn() -> Unsupported) {
        for name in self.selector.names_of(path) {
            if let Some(uses) = self.uses.get_mut(name) {
                let first = || (path.to_string(), reason());
                uses.unsupported.get_or_insert_with(first);
            }
        }
    }

    /// What is wrong with the targets as a whole.
    ///
    /// Each name that selects no layer gets the most telling of these reasons:
    ///
    /// 1. It selects layers that `layers_to_transform` leaves out.
    /// 2. It selects a module that cannot be adapted.
    /// 3. It selects nothing, which is no misfit with `allow_absent_targets`.
    ///
    /// If there is no target at all and no name has a reason, that is one misfit.
    fn misfits(mut self, walk: &Walk) -> Vec<Misfit> {
        for module in walk.modules.iter().filter(|module| module.holds_parameters) {
            self.note(&module.path, || Unsupported::Holder {
                type_name: module.type_name.clone(),
            });
        }
        let nearest = |name: &str| nearest(name, self.layers.iter().map(String::as_str));
        let names = match &self.selection.target_modules {
            Some(TargetModules::Names(names)) => &names[..],
            _ => &[],
        };
        let mut misfits = std::mem::take(&mut self.misfits);
        let before = misfits.len();
        for name in names {
            let Some(uses) = self.uses.remove(name.as_str()) else {
                continue; // The list has this name twice.
            };
            match uses {
                Uses { selected: 1.., .. } => {}
                Uses { outside, .. } if outside > 0 => misfits.push(Misfit::NotInLayers {
                    name: name.clone(),
                    layers: outside,
                }),
                Uses {
                    unsupported: Some((path, reason)),
                    ..
                } => misfits.push(Misfit::UnsupportedTarget { path, reason }),
                Uses { .. } if self.selection.allow_absent_targets => {}
                Uses { .. } => misfits.push(Misfit::UnknownTarget {
                    name: name.clone(),
                    nearest: nearest(name),
                }),
            }
        }
        if let (0, Some(modules)) = (self.targets, &self.selection.target_modules)
            && misfits.len() == before
        {
            let targets = modules.to_string();
            misfits.push(Misfit::NoTarget {
                nearest: nearest(&targets),
                targets,
                layers: self.layers.len(),
                excluded: self.excluded,
            });
        }
        misfits
    }
}
