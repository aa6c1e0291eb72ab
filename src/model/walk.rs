//! The only traversal of a module: [`walk`] reads a model into a list, [`rewrite`] changes one by path.
//!
//! Burn shows a traversal one parameter after the other, each with its rank as a constant, and an adapter's parts
//! after the weight that carries them. The list puts together what belongs together, so that every verb on a model
//! is a function of it.

use std::collections::HashMap;

use burn::backend::DispatchTensor;
use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter::{Attach, BoftAdapter, rotation_of_level};
use crate::rotation::{Rotation, Values};

/// Burn's container type for the parameters that a reparameterization adds.
const REPARAMETERIZATION: &str = "Reparameterization";

/// Normalisation layers of Burn; their `beta` is what PyTorch calls a bias.
const NORMS: [&str; 5] = [
    "LayerNorm",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "RmsNorm",
];

/// Reads a model.
pub(crate) fn walk<M: Module>(model: &M) -> Walk {
    let mut walker = Walker::default();
    model.visit(&mut walker);
    walker.walk
}

/// Everything that a model holds, in its own order.
#[derive(Default)]
pub(crate) struct Walk {
    /// Every float parameter and buffer outside of reparameterizations.
    pub(crate) parameters: Vec<Parameter>,
    /// Every module outside of reparameterizations, parents before children; the model itself has the path `""`.
    pub(crate) modules: Vec<ModuleInfo>,
}

impl Walk {
    /// The parameters that carry one of our adapters, with it.
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

/// A module of a model.
pub(crate) struct ModuleInfo {
    pub(crate) path: String,
    /// Its type as Burn names it, without the kind of container: `Linear`, `Vec`.
    pub(crate) type_name: String,
    /// The names of its fields that are modules or parameters.
    pub(crate) fields: Vec<String>,
    /// Whether it or a module in it has a float parameter.
    pub(crate) holds_parameters: bool,
}

/// A float parameter, or a buffer that the model shows like one.
pub(crate) struct Parameter {
    path: String,
    /// Where the owner's path ends in `path`.
    owner_end: usize,
    owner_type: String,
    pub(crate) stored: Stored,
    /// The reparameterization that it carries.
    pub(crate) attached: Option<Attached>,
}

impl Parameter {
    /// Its dotted path.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// The dotted path of the module that owns it.
    pub(crate) fn owner(&self) -> &str {
        &self.path[..self.owner_end]
    }

    /// The type of that module.
    pub(crate) fn owner_type(&self) -> &str {
        &self.owner_type
    }

    /// Its name in that module.
    pub(crate) fn name(&self) -> &str {
        last_component(&self.path)
    }

    fn is_of_norm(&self) -> bool {
        NORMS.contains(&self.owner_type())
    }

    /// Whether it is a bias, or what PyTorch calls one.
    pub(crate) fn is_bias(&self) -> bool {
        self.name() == "bias" || (self.name() == "beta" && self.is_of_norm())
    }

    /// Its name in PyTorch's module.
    pub(crate) fn torch_name(&self) -> &str {
        match self.name() {
            "gamma" if self.is_of_norm() => "weight",
            "beta" if self.is_of_norm() => "bias",
            "alpha" if self.owner_type() == "PRelu" => "weight",
            name => name,
        }
    }

    /// Whether PyTorch's tensor is the transpose.
    pub(crate) fn is_transposed(&self) -> bool {
        self.owner_type() == "Linear" && self.name() == "weight"
    }

    /// Whether it is a running statistic, which is a buffer.
    pub(crate) fn is_statistic(&self) -> bool {
        self.owner_type() == "BatchNorm" && matches!(self.name(), "running_mean" | "running_var")
    }

    /// Whether it is the running mean of a norm, beside which PyTorch counts the batches.
    pub(crate) fn counts_batches(&self) -> bool {
        self.is_statistic() && self.name() == "running_mean"
    }
}

/// The reparameterization of a parameter.
pub(crate) struct Attached {
    /// Its name in Burn, which is its level in the paths of its parts.
    pub(crate) name: String,
    /// What the adapter computes, where it is one of ours.
    pub(crate) rotation: Option<Rotation>,
    /// Its parameters with their full paths.
    pub(crate) parts: Vec<(String, Stored)>,
}

impl Attached {
    /// The stored skew-symmetric numbers.
    pub(crate) fn skew(&self) -> Option<&Stored> {
        self.part("skew").map(|(_, stored)| stored)
    }

    /// The stored scale.
    pub(crate) fn scale(&self) -> Option<&Stored> {
        self.part("scale").map(|(_, stored)| stored)
    }

    /// A part by its name, with its path.
    pub(crate) fn part(&self, name: &str) -> Option<(&str, &Stored)> {
        let mut parts = self.parts.iter();
        let (path, stored) = parts.find(|(path, _)| last_component(path) == name)?;
        Some((path, stored))
    }
}

/// A parameter of any rank, shared with the model and not initialized before it is asked for its numbers.
pub(crate) struct Stored(Box<dyn AnyParam>);

impl Stored {
    pub(crate) fn shape(&self) -> Vec<usize> {
        self.0.shape()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype()
    }

    pub(crate) fn is_autodiff(&self) -> bool {
        self.0.is_autodiff()
    }

    /// Whether training changes it, also where it lives on a device without autodiff.
    pub(crate) fn is_trainable(&self) -> bool {
        self.0.is_trainable()
    }

    /// The stored tensor, of the rank that the caller knows it has.
    pub(crate) fn tensor<const D: usize>(&self) -> Tensor<D> {
        Tensor::from_dispatch(self.0.base())
    }

    /// The stored tensor whatever its rank.
    pub(crate) fn base(&self) -> DispatchTensor {
        self.0.base()
    }

    /// Whether it holds neither NaN nor infinity.
    pub(crate) fn is_finite(&self) -> bool {
        self.0.is_finite()
    }

    /// Its numbers on the host.
    pub(crate) fn data(&self) -> TensorData {
        self.0.data()
    }
}

/// What a [`Param`] of a tensor offers whatever its rank.
trait AnyParam {
    fn shape(&self) -> Vec<usize>;
    fn dtype(&self) -> DType;
    fn is_autodiff(&self) -> bool;
    fn is_trainable(&self) -> bool;
    fn base(&self) -> DispatchTensor;
    fn is_finite(&self) -> bool;
    fn data(&self) -> TensorData;
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
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
            // What training will change is known to Burn alone on a plain device.
            false => Param::base(&self.clone().train()).is_require_grad(),
        }
    }

    fn base(&self) -> DispatchTensor {
        Param::base(self).into_dispatch()
    }

    fn is_finite(&self) -> bool {
        // Zero times a number is zero; times NaN or infinity it is NaN.
        let sum: f64 = (Param::base(self) * 0.0).sum().into_scalar();
        sum == 0.0
    }

    fn data(&self) -> TensorData {
        Param::base(self).into_data()
    }
}

fn last_component(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

/// A container type without its kind: `Linear` of `Struct:Linear`.
fn type_name(container: &str) -> &str {
    container
        .rsplit_once(':')
        .map_or(container, |(_, name)| name)
}

/// The dotted path of a traversal.
#[derive(Default)]
pub(crate) struct Path {
    text: String,
    levels: Vec<Level>,
}

struct Level {
    /// Where the path of the level above ends.
    parent_end: usize,
    /// The type of the module above.
    container: String,
    /// The module at this level, once it is known to hold anything.
    module: Option<usize>,
}

impl Path {
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

    /// The path without its last component: the module that owns the parameter.
    pub(crate) fn owner(&self) -> &str {
        &self.text[..self.owner_end()]
    }

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

    /// Whether this is inside the parameters that a reparameterization adds.
    pub(crate) fn in_reparameterization(&self) -> bool {
        let mut levels = self.levels.iter().rev();
        levels.any(|level| level.container == REPARAMETERIZATION)
    }
}

/// Fills a [`Walk`].
#[derive(Default)]
struct Walker {
    path: Path,
    /// The model itself, once it is known to hold anything.
    root: Option<usize>,
    walk: Walk,
}

impl Walker {
    /// The module that owns the level entered last; those around it are known from entering this one.
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

    /// Notes in every module around a parameter that it holds one.
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
            // Burn shows the parameter first and its reparameterization next.
            if let Some(parameter) = self.walk.parameters.last_mut() {
                parameter.attached = Some(Attached {
                    name: name.to_string(),
                    rotation: None,
                    parts: Vec::new(),
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

/// What [`rewrite`] does to one parameter. What is not set stays.
#[derive(Default)]
pub(crate) struct Edit {
    /// Whether training changes it.
    pub(crate) trainable: Option<bool>,
    /// New numbers, in the precision and on the device of the old ones where they come from the host.
    pub(crate) numbers: Option<Numbers>,
    /// The adapter that it gets.
    pub(crate) adapter: Option<(Rotation, Values)>,
}

/// New numbers of a parameter.
pub(crate) enum Numbers {
    /// From the host.
    Data(TensorData),
    /// A tensor of the same rank, shared.
    Tensor(DispatchTensor),
}

/// Changes every parameter as `edit` says of its path, and every flag that `switch` says something of.
pub(crate) fn rewrite<M: Module>(
    model: M,
    edit: impl FnMut(&Path) -> Edit,
    switch: impl FnMut(&Path) -> Option<bool>,
) -> M {
    model.map(&mut Rewriter {
        path: Path::default(),
        edit,
        switch,
    })
}

struct Rewriter<E, S> {
    path: Path,
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
        } = (self.edit)(&self.path);
        let param = match numbers {
            Some(numbers) => param.map(|old| replace(old, numbers)),
            None => param,
        };
        let param = match trainable {
            Some(trainable) => param.set_require_grad(trainable),
            None => param,
        };
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

fn replace<const D: usize>(old: Tensor<D>, numbers: Numbers) -> Tensor<D> {
    let require_grad = old.is_require_grad();
    let new = match numbers {
        Numbers::Data(data) => {
            let (device, dtype) = (old.device(), old.dtype());
            device.memory_persistent_allocations(data, |data| {
                Tensor::from_data(data.convert_dtype(dtype), (&device as &Device, dtype))
            })
        }
        Numbers::Tensor(tensor) => Tensor::from_dispatch(tensor),
    };
    // Detached last: a tensor that requires a gradient keeps that when it is detached.
    new.detach().set_require_grad(require_grad)
}
