//! What a model has: its layers, parameters and modules, with their paths.

use burn::module::{ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use crate::plan::LayerKind;

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

/// What the model has.
#[derive(Default)]
pub(crate) struct Survey {
    path: Path,
    pub(crate) layers: Vec<Layer>,
    /// Every float parameter: path, owner's path, whether it is a bias.
    pub(crate) parameters: Vec<(String, String, bool)>,
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
        self.parameters
            .push((self.path.full(), owner.clone(), self.path.is_bias()));
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
