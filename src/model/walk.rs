//! What a model has: its layers, parameters and modules, with their paths.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use crate::model::plan::LayerKind;

/// Burn's container type for the parameters that a reparameterization adds.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

/// Normalisation layers of Burn; their `beta` is what PyTorch calls a bias.
const NORMS: [&str; 5] = [
    "Struct:LayerNorm",
    "Struct:BatchNorm",
    "Struct:GroupNorm",
    "Struct:InstanceNorm",
    "Struct:RmsNorm",
];

/// The dotted path of a traversal, with the container type of each level.
#[derive(Default)]
pub(crate) struct Path {
    levels: Vec<(String, String)>,
}

impl Path {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        self.levels.push((name.to_string(), container.to_string()));
    }

    pub(crate) fn exit(&mut self) {
        self.levels.pop();
    }

    fn join(levels: &[(String, String)]) -> String {
        levels
            .iter()
            .map(|(name, _)| name.as_str())
            .collect::<Vec<_>>()
            .join(".")
    }

    /// The whole path.
    pub(crate) fn full(&self) -> String {
        Self::join(&self.levels)
    }

    /// The path without its last component: the module that owns the parameter.
    pub(crate) fn owner(&self) -> String {
        Self::join(&self.levels[..self.levels.len().saturating_sub(1)])
    }

    /// The path of the layer whose weight carries the reparameterization around this level.
    pub(crate) fn adapted_layer(&self) -> Option<String> {
        let level = self
            .levels
            .iter()
            .position(|(_, container)| container == REPARAMETERIZATION)?;
        Some(Self::join(&self.levels[..level.saturating_sub(1)]))
    }

    /// The parameter's name and its owner's type.
    pub(crate) fn last(&self) -> (&str, &str) {
        self.levels
            .last()
            .map_or(("", ""), |(name, container)| (name, container))
    }

    pub(crate) fn in_reparameterization(&self) -> bool {
        self.levels
            .iter()
            .any(|(_, container)| container == REPARAMETERIZATION)
    }

    /// The kind of layer whose weight this is.
    pub(crate) fn layer_kind<const D: usize>(&self) -> Option<LayerKind> {
        match (self.last(), D) {
            (("weight", "Struct:Linear"), 2) => Some(LayerKind::Linear),
            (("weight", "Struct:Conv2d"), 4) => Some(LayerKind::Conv2d),
            _ => None,
        }
    }

    fn is_bias(&self) -> bool {
        let (name, container) = self.last();
        name == "bias" || (name == "beta" && NORMS.contains(&container))
    }
}

/// A layer that could carry an adapter.
pub(crate) struct Layer {
    pub(crate) path: String,
    pub(crate) kind: LayerKind,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
}

/// A float parameter, or a buffer that the model visits like one.
pub(crate) struct Parameter {
    pub(crate) path: String,
    /// The path of the module that owns it.
    pub(crate) owner: String,
    /// The type of that module.
    pub(crate) container: String,
    pub(crate) is_bias: bool,
    /// Whether training changes it.
    pub(crate) is_trainable: bool,
}

impl Parameter {
    /// Its name in the module.
    pub(crate) fn name(&self) -> &str {
        self.path
            .rsplit_once('.')
            .map_or(&self.path, |(_, name)| name)
    }

    /// Its name in PyTorch's module.
    pub(crate) fn torch_name(&self) -> &str {
        let container = self.container.as_str();
        match self.name() {
            "gamma" if NORMS.contains(&container) => "weight",
            "beta" if NORMS.contains(&container) => "bias",
            "alpha" if container == "Struct:PRelu" => "weight",
            name => name,
        }
    }

    /// Whether PyTorch's tensor is the transpose.
    pub(crate) fn is_transposed(&self) -> bool {
        self.container == "Struct:Linear" && self.name() == "weight"
    }

    /// Whether it is a running statistic, which is a buffer.
    pub(crate) fn is_statistic(&self) -> bool {
        self.container == "Struct:BatchNorm"
            && matches!(self.name(), "running_mean" | "running_var")
    }

    /// Whether it is the running mean of a norm that PyTorch counts the batches of.
    pub(crate) fn counts_batches(&self) -> bool {
        self.is_statistic() && self.name() == "running_mean"
    }
}

/// Whether training changes a parameter, also where it lives on a device without autodiff.
pub(crate) fn is_trainable<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    match param.lazy_device().is_autodiff() {
        true => param.base().is_require_grad(),
        false => param.clone().train().base().is_require_grad(),
    }
}

/// What the model has.
#[derive(Default)]
pub(crate) struct Survey {
    path: Path,
    pub(crate) layers: Vec<Layer>,
    /// Every float parameter outside of reparameterizations.
    pub(crate) parameters: Vec<Parameter>,
    /// Every module path, parents before children.
    pub(crate) modules: Vec<String>,
    /// Parameters with a reparameterization, and its name.
    pub(crate) adapted: Vec<(String, String)>,
}

impl ModuleVisitor for Survey {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION {
            self.adapted.push((self.path.full(), name.to_string()));
        }
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.path.in_reparameterization() {
            return;
        }
        let owner = self.path.owner();
        for end in owner
            .match_indices('.')
            .map(|(dot, _)| dot)
            .chain([owner.len()])
        {
            if end > 0
                && !self
                    .modules
                    .iter()
                    .rev()
                    .any(|module| module == &owner[..end])
            {
                self.modules.push(owner[..end].to_string());
            }
        }
        self.parameters.push(Parameter {
            path: self.path.full(),
            owner: owner.clone(),
            container: self.path.last().1.to_string(),
            is_bias: self.path.is_bias(),
            is_trainable: is_trainable(param),
        });
        if let Some(kind) = self.path.layer_kind::<D>() {
            let base = param.base();
            let (shape, dtype) = (base.dims().to_vec(), base.dtype());
            self.layers.push(Layer {
                path: owner,
                kind,
                shape,
                dtype,
            });
        }
    }
}
