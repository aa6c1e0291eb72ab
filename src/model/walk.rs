//! The only traversal of a module: [`walk`] reads a model into a list, [`rewrite`] changes one by path.
//!
//! Burn shows a traversal one parameter after the other, each with its rank as a constant, and the parts of an adapter
//! after the weight that carries it. The list puts together what belongs together, so that every verb on a model is a
//! function of this list.
//!
//! Burn knows modules by the names of their fields and types only. `Struct:Linear` is all that is said of a linear
//! layer, so whether it is Burn's is decided in `candidates`.

use std::collections::{HashMap, HashSet};

use burn::backend::DispatchTensor;
use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter::{Attach, BoftAdapter, rotation_of_level};
use crate::batch::BatchAdapter;
use crate::config::LayerKind;
use crate::rotation::{Rotation, Values};

/// Burn's container type for the parameters that a reparameterization adds.
const REPARAMETERIZATION: &str = "Reparameterization";

/// The normalisation layers of Burn. What they call `beta` is a bias in PyTorch.
const NORMS: [&str; 5] = [
    "LayerNorm",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "RmsNorm",
];

/// Reads a model: one pass over its parameters, whose numbers are not copied.
///
/// The list shares the tensors of the model. Drop it before the model is changed: it would keep the old tensors alive.
pub(crate) fn walk<M: Module>(model: &M) -> Walk {
    let mut walker = Walker::default();
    model.visit(&mut walker);
    walker.walk
}

/// Everything that a model holds, in the order in which it holds it.
#[derive(Default)]
pub(crate) struct Walk {
    /// Every float parameter and buffer, without the parameters of adapters, which are with the weight that carries them.
    pub(crate) parameters: Vec<Parameter>,
    /// Every module, parents before their children, without adapters. The model itself has the path `""`.
    pub(crate) modules: Vec<ModuleInfo>,
}

impl Walk {
    /// The parameters that carry an adapter of this crate, with the adapter and what it computes, in the model's order.
    /// They are the weights of the adapted layers.
    pub(crate) fn adapted(&self) -> impl Iterator<Item = (&Parameter, &Attached, &Rotation)> {
        self.parameters.iter().filter_map(|parameter| {
            let attached = parameter.attached.as_ref()?;
            Some((parameter, attached, attached.rotation.as_ref()?))
        })
    }

    /// The parameters by path.
    pub(crate) fn by_path(&self) -> HashMap<&str, &Parameter> {
        let parameters = self.parameters.iter();
        parameters
            .map(|parameter| (parameter.path(), parameter))
            .collect()
    }

    /// The modules by path.
    pub(crate) fn modules_by_path(&self) -> HashMap<&str, &ModuleInfo> {
        let modules = self.modules.iter();
        modules
            .map(|module| (module.path.as_str(), module))
            .collect()
    }
}

/// One module of a model.
///
/// Lists are modules too: Burn shows the elements of a `Vec` as its fields `0`, `1` and so on.
pub(crate) struct ModuleInfo {
    /// The dotted path, which is empty for the model itself.
    pub(crate) path: String,
    /// The name of its type, such as `Linear` or `Vec`.
    pub(crate) type_name: String,
    /// The names of its fields that are modules or parameters.
    pub(crate) fields: Vec<String>,
    /// Whether the module, or one that it contains, has a float parameter.
    pub(crate) holds_parameters: bool,
}

/// A float parameter, or a buffer, which Burn shows like one.
///
/// It has two names: Burn's, by which it is found in the model, and PyTorch's, by which it is kept in files.
pub(crate) struct Parameter {
    /// The dotted path, such as `encoder.layer.0.query.weight`.
    path: String,
    /// How much of `path` is the path of the module that owns the parameter.
    owner_end: usize,
    /// The type of the module that owns it, such as `Linear`.
    owner_type: String,
    /// The tensor of the base, whatever is attached to it.
    pub(crate) stored: Stored,
    /// What is attached to it.
    pub(crate) attached: Option<Attached>,
}

impl Parameter {
    /// The dotted path.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The dotted path of the module that owns it.
    pub(crate) fn owner(&self) -> &str {
        &self.path[..self.owner_end]
    }

    /// The type of the module that owns it.
    pub(crate) fn owner_type(&self) -> &str {
        &self.owner_type
    }

    /// The name in the module that owns it: the last component of the path.
    pub(crate) fn name(&self) -> &str {
        last_component(&self.path)
    }

    /// Whether a normalisation layer of Burn owns it, as far as the name of the type says.
    fn is_of_norm(&self) -> bool {
        NORMS.contains(&self.owner_type())
    }

    /// Whether PyTorch would call it a bias.
    ///
    /// PEFT trains every parameter of that name where `bias` is `all`, those of norms as well.
    pub(crate) fn is_bias(&self) -> bool {
        self.name() == "bias" || (self.name() == "beta" && self.is_of_norm())
    }

    /// The name that PyTorch has for it.
    ///
    /// | Burn | PyTorch |
    /// |---|---|
    /// | `gamma`, `beta` of a norm | `weight`, `bias` |
    /// | `alpha` of a `PRelu` | `weight` |
    /// | any other | the same |
    pub(crate) fn torch_name(&self) -> &str {
        match self.name() {
            "gamma" if self.is_of_norm() => "weight",
            "beta" if self.is_of_norm() => "bias",
            "alpha" if self.owner_type() == "PRelu" => "weight",
            name => name,
        }
    }

    /// What these entries of `layer_kinds` declare the layer that owns it to be, the inner `None` for a layer that is not to be
    /// adapted.
    ///
    /// Names are full paths or types; where several are meant, the last one counts.
    pub(crate) fn declared(
        &self,
        layer_kinds: &[(String, Option<LayerKind>)],
    ) -> Option<Option<LayerKind>> {
        let is_meant = |name: &str| name == self.owner() || name == self.owner_type();
        let mut entries = layer_kinds.iter().rev();
        let (_, kind) = entries.find(|(name, _)| is_meant(name))?;
        Some(*kind)
    }

    /// Whether PyTorch stores the transpose of it, as it does for the weight of a linear layer. The type says whether it is
    /// one, unless `layer_kinds` declares a kind.
    ///
    /// # Shapes
    ///
    /// - in Burn: `[d_input, d_output]`
    /// - in PyTorch: `[d_output, d_input]`
    pub(crate) fn is_transposed(&self, layer_kinds: &[(String, Option<LayerKind>)]) -> bool {
        let is_linear = match self.declared(layer_kinds) {
            Some(Some(kind)) => kind == LayerKind::Linear,
            // A layer that is taken out is still of its type.
            Some(None) | None => self.owner_type() == "Linear",
        };
        is_linear && self.name() == "weight"
    }

    /// Whether it is a running statistic of a batch norm, which is a buffer and not a parameter.
    pub(crate) fn is_statistic(&self) -> bool {
        self.owner_type() == "BatchNorm" && matches!(self.name(), "running_mean" | "running_var")
    }

    /// Whether it is the running mean of a batch norm. PyTorch has a count of batches beside it, `num_batches_tracked`,
    /// which Burn does not have.
    pub(crate) fn counts_batches(&self) -> bool {
        self.is_statistic() && self.name() == "running_mean"
    }
}

/// What is attached to a parameter, which Burn calls a reparameterization: an adapter of this crate, or another one.
pub(crate) struct Attached {
    /// Its name in Burn, such as `boft` or `lora`. It is a component of the paths of its parameters.
    pub(crate) name: String,
    /// What it computes; none if it is not an adapter of this crate.
    pub(crate) rotation: Option<Rotation>,
    /// Its own parameters, with their full paths.
    pub(crate) parts: Vec<(String, Stored)>,
    /// Whether it drops blocks, as it does in training.
    drops: bool,
}

impl Attached {
    /// The numbers of the rotation that are trained, with their path: those of the skew, or of the scaled skew.
    pub(crate) fn trained_skew(&self) -> Option<(&str, &Stored)> {
        self.part("skew").or_else(|| self.part("scaled_skew"))
    }

    /// The adapter itself, put together again from what the traversal showed of it. Its tensors are shared.
    pub(crate) fn adapter(&self, rotation: &Rotation) -> Option<BoftAdapter> {
        let (_, trained) = self.trained_skew()?;
        let scale = self.part("scale").map(|(_, scale)| scale.tensor());
        let rotation = rotation.clone();
        Some(BoftAdapter::of_parts(
            rotation,
            trained.tensor(),
            scale,
            self.drops,
        ))
    }

    /// One of its own parameters by name, with its path.
    pub(crate) fn part(&self, name: &str) -> Option<(&str, &Stored)> {
        let mut parts = self.parts.iter();
        let (path, stored) = parts.find(|(path, _)| last_component(path) == name)?;
        Some((path, stored))
    }
}

/// The tensor of a parameter, whatever its rank. It is shared with the model. A parameter that Burn initializes lazily
/// is not initialized before somebody asks for its numbers.
///
/// Of a parameter with an adapter it is the base. The rotated weight is not computed.
pub(crate) struct Stored(Box<dyn AnyParam>);

impl Stored {
    /// Burn's name for the parameter, by which optimizers find its gradient. A clone has the same one.
    pub(crate) fn id(&self) -> ParamId {
        self.0.id()
    }

    /// The shape in Burn, without initializing the parameter.
    pub(crate) fn shape(&self) -> Vec<usize> {
        self.0.shape()
    }

    /// The precision, which for a quantized tensor is its quantization.
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    /// Whether the tensor is on a device with autodiff.
    pub(crate) fn is_autodiff(&self) -> bool {
        self.0.is_autodiff()
    }

    /// Whether training changes it, or would after `train()` if the model is on a device without autodiff.
    pub(crate) fn is_trainable(&self) -> bool {
        self.0.is_trainable()
    }

    /// The stored tensor.
    ///
    /// # Panics
    ///
    /// - If its rank is not `D`.
    pub(crate) fn tensor<const D: usize>(&self) -> Tensor<D> {
        Tensor::from_dispatch(self.0.base())
    }

    /// The stored tensor without its rank.
    pub(crate) fn base(&self) -> DispatchTensor {
        self.0.base()
    }

    /// What an adapter makes of the stored tensor. It is part of the graph of the adapter's numbers.
    pub(crate) fn rotated(&self, adapter: &BoftAdapter) -> DispatchTensor {
        self.0.rotated(adapter)
    }

    /// Whether it holds neither NaN nor infinity. It is computed on the device of the tensor, and one number is read
    /// back.
    pub(crate) fn is_finite(&self) -> bool {
        self.0.is_finite()
    }

    /// The numbers, copied to the host, in their precision and in Burn's orientation.
    pub(crate) fn data(&self) -> TensorData {
        self.0.data()
    }
}

/// What the [`Param`] of a tensor can do whatever the rank of the tensor.
trait AnyParam {
    fn id(&self) -> ParamId;
    fn shape(&self) -> Vec<usize>;
    fn dtype(&self) -> DType;
    fn is_autodiff(&self) -> bool;
    fn is_trainable(&self) -> bool;
    fn base(&self) -> DispatchTensor;
    fn rotated(&self, adapter: &BoftAdapter) -> DispatchTensor;
    fn is_finite(&self) -> bool;
    fn data(&self) -> TensorData;
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
    fn id(&self) -> ParamId {
        self.id
    }

    fn shape(&self) -> Vec<usize> {
        self.lazy_shape().to_vec()
    }

    fn dtype(&self) -> DType {
        Param::base(self).dtype()
    }

    fn is_autodiff(&self) -> bool {
        self.lazy_device().is_autodiff()
    }

    fn is_trainable(&self) -> bool {
        match self.is_autodiff() {
            true => Param::base(self).is_require_grad(),
            // On a plain device only Burn knows what training would change, so it is asked by way of `train`.
            false => Param::base(&self.clone().train()).is_require_grad(),
        }
    }

    fn base(&self) -> DispatchTensor {
        Param::base(self).into_dispatch()
    }

    fn rotated(&self, adapter: &BoftAdapter) -> DispatchTensor {
        adapter.apply(Param::base(self)).into_dispatch()
    }

    fn is_finite(&self) -> bool {
        // Zero times a finite number is zero, and times NaN or infinity it is NaN. So one sum answers for all.
        let sum: f64 = (Param::base(self) * 0.0).sum().into_scalar();
        sum == 0.0
    }

    fn data(&self) -> TensorData {
        Param::base(self).into_data()
    }
}

/// `c` of `a.b.c`.
fn last_component(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

/// A container type of Burn without its kind: `Linear` of `Struct:Linear`.
fn type_name(container: &str) -> &str {
    container
        .rsplit_once(':')
        .map_or(container, |(_, name)| name)
}

/// Where a traversal is: the dotted path, and the types around it.
#[derive(Default)]
pub(crate) struct Path {
    /// The dotted path.
    text: String,
    /// One level per component of the path.
    levels: Vec<Level>,
}

struct Level {
    /// The length of the path of the level above.
    parent_end: usize,
    /// The type of the module that this level is a field of.
    container: String,
    /// The place of the module at this level in [`Walk::modules`], once something in it was met.
    module: Option<usize>,
}

impl Path {
    /// Goes down to a field of this name, of a module of this type.
    fn enter(&mut self, name: &str, container: &str) {
        let parent_end = self.text.len();
        if !self.text.is_empty() {
            self.text.push('.');
        }
        self.text.push_str(name);
        self.levels.push(Level {
            parent_end,
            container: container.to_string(),
            module: None,
        });
    }

    fn exit(&mut self) {
        if let Some(level) = self.levels.pop() {
            self.text.truncate(level.parent_end);
        }
    }

    /// The whole path.
    pub(crate) fn full(&self) -> &str {
        &self.text
    }

    /// The path of the module that owns the parameter: the path without its last component.
    pub(crate) fn owner(&self) -> &str {
        &self.text[..self.owner_end()]
    }

    /// How much of the path is the path of the module that owns the last component.
    fn owner_end(&self) -> usize {
        self.levels.last().map_or(0, |level| level.parent_end)
    }

    /// The last component.
    pub(crate) fn name(&self) -> &str {
        let end = self.owner_end();
        self.text[end..].trim_start_matches('.')
    }

    /// The type of the module that owns the parameter.
    pub(crate) fn owner_type(&self) -> &str {
        let container = self.levels.last().map(|level| level.container.as_str());
        container.map_or("", type_name)
    }

    /// Whether this is one of the parameters that an adapter, or another reparameterization, has added.
    pub(crate) fn in_reparameterization(&self) -> bool {
        let mut levels = self.levels.iter().rev();
        levels.any(|level| level.container == REPARAMETERIZATION)
    }
}

/// Fills a [`Walk`].
#[derive(Default)]
struct Walker {
    path: Path,
    /// The place of the model itself in [`Walk::modules`], once something in it was met.
    root: Option<usize>,
    walk: Walk,
}

impl Walker {
    /// The module that owns the level that was entered last. The modules around it were noted when it was entered.
    fn owner(&mut self) -> &mut ModuleInfo {
        let depth = self.path.levels.len();
        let known = match depth.checked_sub(2) {
            Some(above) => &mut self.path.levels[above].module,
            None => &mut self.root,
        };
        let modules = &mut self.walk.modules;
        let index = *known.get_or_insert(modules.len());
        if index == modules.len() {
            modules.push(ModuleInfo {
                path: self.path.owner().to_string(),
                type_name: self.path.owner_type().to_string(),
                fields: Vec::new(),
                holds_parameters: false,
            });
        }
        &mut modules[index]
    }

    /// Notes in every module around the current parameter that it has one.
    fn mark_holders(&mut self) {
        let around = self.path.levels.iter().rev().skip(1);
        let around = around.map(|level| level.module).chain([self.root]);
        for index in around.flatten() {
            let module = &mut self.walk.modules[index];
            if std::mem::replace(&mut module.holds_parameters, true) {
                break;
            }
        }
    }
}

impl ModuleVisitor for Walker {
    fn enter_module(&mut self, name: &str, container: &str) {
        let in_reparameterization = self.path.in_reparameterization();
        if !in_reparameterization && container == REPARAMETERIZATION {
            // Burn shows a parameter, and directly after it what is attached to it.
            if let Some(parameter) = self.walk.parameters.last_mut() {
                parameter.attached = Some(Attached {
                    name: name.to_string(),
                    rotation: None,
                    parts: Vec::new(),
                    drops: false,
                });
            }
        } else if in_reparameterization
            && let Some(rotation) = rotation_of_level(name, container)
            && let Some(parameter) = self.walk.parameters.last_mut()
            && let Some(attached) = &mut parameter.attached
            && attached.name == BoftAdapter::NAME
        {
            attached.rotation = Some(rotation);
        }
        self.path.enter(name, container);
        if !in_reparameterization && container != REPARAMETERIZATION {
            self.owner().fields.push(name.to_string());
        }
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        if self.path.in_reparameterization()
            && let Some(parameter) = self.walk.parameters.last_mut()
            && let Some(attached) = &mut parameter.attached
        {
            attached.drops = flag.is_enabled();
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let stored = Stored(Box::new(param.clone()));
        if self.path.in_reparameterization() {
            let last = self.walk.parameters.last_mut();
            if let Some(attached) = last.and_then(|parameter| parameter.attached.as_mut()) {
                attached.parts.push((self.path.full().to_string(), stored));
            }
            return;
        }
        self.mark_holders();
        self.walk.parameters.push(Parameter {
            path: self.path.full().to_string(),
            owner_end: self.path.owner_end(),
            owner_type: self.path.owner_type().to_string(),
            stored,
            attached: None,
        });
    }
}

/// What [`rewrite`] does to one parameter. Whatever is none stays as it is.
#[derive(Default)]
pub(crate) struct Edit {
    /// Whether training changes it.
    pub(crate) trainable: Option<bool>,
    /// New numbers. Those that come from the host get the precision and the device of the old ones.
    pub(crate) numbers: Option<Numbers>,
    /// The adapter that is attached: what it computes, and the numbers that it starts with.
    pub(crate) adapter: Option<(Rotation, Values)>,
    /// The adapters of a batch that are attached instead of one.
    pub(crate) batch: Option<BatchAdapter>,
}

/// New numbers of a parameter.
pub(crate) enum Numbers {
    /// Numbers on the host.
    Data(TensorData),
    /// A tensor of the same rank, which is shared and not copied.
    Tensor(DispatchTensor),
    /// A tensor of the same rank that was computed from other parameters, and whose gradient goes on to them.
    Computed(DispatchTensor),
}

/// Changes every parameter as `edit` says for its path, and sets every flag for which `switch` has a value.
///
/// Both are asked once for each path, in the model's order, the parameters of adapters included. Nothing here can fail:
/// whoever calls it has checked that shapes fit. A parameter that is to be trained and stands in another place before gets a
/// parameter of its own.
///
/// # Panics
///
/// If new numbers have another rank than the parameter.
pub(crate) fn rewrite<M: Module>(
    model: M,
    edit: impl FnMut(&Path) -> Edit,
    switch: impl FnMut(&Path) -> Option<bool>,
) -> M {
    model.map(&mut Rewriter {
        path: Path::default(),
        seen: HashSet::new(),
        edit,
        switch,
    })
}

/// Applies the edits of [`rewrite`].
struct Rewriter<E, S> {
    path: Path,
    /// The parameters so far.
    seen: HashSet<ParamId>,
    edit: E,
    switch: S,
}

impl<E: FnMut(&Path) -> Edit, S: FnMut(&Path) -> Option<bool>> ModuleMapper for Rewriter<E, S> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Edit {
            trainable,
            numbers,
            adapter,
            batch,
        } = (self.edit)(&self.path);
        let is_first = self.seen.insert(param.id);
        let param = match numbers {
            // Burn's `map` would make a leaf of it.
            Some(Numbers::Computed(tensor)) => {
                Param::initialized(param.id, Tensor::from_dispatch(tensor))
            }
            Some(Numbers::Tensor(tensor)) => {
                param.map(|old| leaf_like(&old, Tensor::from_dispatch(tensor)))
            }
            Some(Numbers::Data(data)) => param.map(|old| leaf_like(&old, stored_like(&old, data))),
            None => param,
        };
        let param = match trainable {
            Some(true) if !is_first => with_own_id(param).set_require_grad(true),
            Some(trainable) => param.set_require_grad(trainable),
            None => param,
        };
        if let Some(batch) = batch {
            return param.apply_reparameterization(Attach(Some(batch)));
        }
        let Some((rotation, values)) = adapter else {
            return param;
        };
        let base = param.base();
        let adapter = BoftAdapter::new(rotation, values, (&base.device(), base.dtype()));
        param.apply_reparameterization(Attach(Some(adapter)))
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match (self.switch)(&self.path) {
            Some(on) => flag.with_value(on),
            None => flag,
        }
    }
}

/// The parameter as one of its own, as PEFT copies the modules that it trains. An optimizer steps a parameter that stands in several
/// places at the first of them, and may not even train that one.
fn with_own_id<const D: usize>(param: Param<Tensor<D>>) -> Param<Tensor<D>> {
    let (_, tensor, mapper) = param.consume();
    Param::from_mapped_value(ParamId::new(), tensor.detach(), mapper)
}

/// Numbers from the host in the precision and on the device of a tensor.
fn stored_like<const D: usize>(old: &Tensor<D>, data: TensorData) -> Tensor<D> {
    let (device, dtype) = (old.device(), old.dtype());
    device.memory_persistent_allocations(data, |data| {
        Tensor::from_data(data.convert_dtype(dtype), (&device as &Device, dtype))
    })
}

/// A tensor that takes the place of an old one, and is trained if the old one was.
fn leaf_like<const D: usize>(old: &Tensor<D>, new: Tensor<D>) -> Tensor<D> {
    // A detached tensor still requires a gradient if it did before, so the flag is set after detaching.
    new.detach().set_require_grad(old.is_require_grad())
}
