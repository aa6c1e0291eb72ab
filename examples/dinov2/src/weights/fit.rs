//! Tensors of a file into the parameters of a model: names, shapes, and what does not fit.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{ModuleVisitor, Param};
use burn::prelude::*;
use burn::store::{
    FloatCastAdapter, ModuleAdapter, ModuleSnapshot, PyTorchToBurnAdapter, bridge,
    burn_pack::Tensor as Stored,
};
use burn::tensor::DType;
use burn_boft::value::join;
use burn_boft::{KeyMap, Transformers};

use super::config::Family;
use super::error::{WeightsError, one_line};
use super::files::Tensors;
use crate::model::Dinov2ForImageClassification;

/// The start of the names of the head's parameters.
pub(super) const HEAD: &str = "classifier.";
/// Only pre-training uses this parameter, and some models have it not.
pub(super) const MASK_TOKEN: &str = "dinov2.embeddings.mask_token";

/// A parameter as PyTorch has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slot {
    /// Its path in the model.
    pub(super) path: String,
    /// Its name, which differs from the path in norms only.
    pub(super) name: String,
    /// Its shape; the weight of a linear layer is `[d_output, d_input]`.
    pub(super) shape: Vec<usize>,
    /// Whether it is the weight of a linear layer.
    pub(super) is_linear: bool,
}

/// The parameters of a model. Reads no numbers, so that none are drawn for a model that is to be filled.
pub(super) fn slots(model: &Dinov2ForImageClassification) -> Vec<Slot> {
    #[derive(Default)]
    struct Slots {
        path: Vec<String>,
        owners: Vec<String>,
        found: Vec<Slot>,
    }

    impl ModuleVisitor for Slots {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.push(name.to_string());
            self.owners.push(container_type.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
            self.owners.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let owner = self.owners.last().map(String::as_str);
            let mut shape = param.lazy_shape().to_vec();
            let mut path = self.path.clone();
            let name = path.pop().unwrap_or_default();
            let is_linear = owner == Some("Struct:Linear") && name == "weight";
            if is_linear {
                shape.reverse();
            }
            let name = match (owner, name.as_str()) {
                (Some("Struct:LayerNorm"), "gamma") => "weight",
                (Some("Struct:LayerNorm"), "beta") => "bias",
                (_, name) => name,
            };
            self.found.push(Slot {
                path: self.path.join("."),
                name: join(&path.join("."), name),
                shape,
                is_linear,
            });
        }
    }

    let mut slots = Slots::default();
    model.visit(&mut slots);
    slots.found
}

/// Tensors under the names of the model, and where they come from.
pub(super) struct Named<'a> {
    /// The file, for messages.
    pub(super) path: &'a Path,
    pub(super) tensors: Tensors,
    /// The names in the file by the names of the model, where they differ.
    file_names: BTreeMap<String, String>,
    /// The start of names in the file, for messages about tensors that it lacks.
    prefix: &'static str,
}

impl<'a> Named<'a> {
    /// Translates the names of a file, which may be a classifier's or a backbone's, of transformers 4 or 5.
    pub(super) fn new(path: &'a Path, file: Tensors) -> Result<Self, WeightsError> {
        let prefix = [Family::Registers.prefix(), Family::Plain.prefix()]
            .into_iter()
            .find(|prefix| file.keys().any(|name| name.starts_with(prefix)))
            .unwrap_or_default();
        let mut named = Self {
            path,
            tensors: Tensors::new(),
            file_names: BTreeMap::new(),
            prefix,
        };
        let names = KeyMap::dinov2(Transformers::V4);
        for (file_name, mut tensor) in file {
            let (module, parameter) = match file_name.rsplit_once('.') {
                Some((module, parameter)) => (model_path(module), parameter),
                None => (String::new(), file_name.as_str()),
            };
            let name = join(&names.model_path(&module)?, parameter);
            // Of two names for one parameter, the second stays as it is and is reported as unexpected.
            let name = match named.tensors.contains_key(&name) {
                true => file_name.clone(),
                false => name,
            };
            tensor.name = name.clone();
            named.tensors.insert(name.clone(), tensor);
            if name != file_name {
                named.file_names.insert(name, file_name);
            }
        }
        named.join_gates();
        Ok(named)
    }

    /// Tensors that already have the names of the model.
    pub(super) fn of_model(path: &'a Path, tensors: Tensors) -> Self {
        Self {
            path,
            tensors,
            file_names: BTreeMap::new(),
            prefix: Family::Plain.prefix(),
        }
    }

    /// Joins the two halves of SwiGLU's first layer, which are layers of their own in the memory of transformers 5 and
    /// so in what PyTorch itself saves of it.
    fn join_gates(&mut self) {
        let gates: Vec<(String, String, String)> = self
            .tensors
            .keys()
            .filter_map(|gate| {
                let (front, parameter) = gate.rsplit_once(".mlp.gate_proj.")?;
                let name = |layer: &str| format!("{front}.mlp.{layer}.{parameter}");
                Some((gate.clone(), name("up_proj"), name("weights_in")))
            })
            .collect();
        for (gate, up, whole) in gates {
            let halves = self.tensors.get(&gate).zip(self.tensors.get(&up));
            if let Some(joined) = halves.and_then(|(gate, up)| stacked(gate, up, &whole)) {
                self.tensors.remove(&gate);
                self.tensors.remove(&up);
                self.tensors.insert(whole, joined);
            }
        }
    }

    /// The name of a parameter in the file.
    fn file_name(&self, name: &str) -> String {
        match (self.file_names.get(name), name.strip_prefix("dinov2.")) {
            (Some(file), _) => file.clone(),
            (None, Some(rest)) => format!("{}{rest}", self.prefix),
            (None, None) => name.to_string(),
        }
    }

    /// Puts the tensors into the model. They must be the parameters that are `wanted`, no more and no fewer.
    ///
    /// All floats become f32.
    pub(super) fn place(
        self,
        mut model: Dinov2ForImageClassification,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Dinov2ForImageClassification, WeightsError> {
        let slots: BTreeMap<String, Slot> = slots(&model)
            .into_iter()
            .filter(|slot| wanted(&slot.name))
            .map(|slot| (slot.name.clone(), slot))
            .collect();
        self.check(&slots)?;
        let adapter = PyTorchToBurnAdapter.chain(FloatCastAdapter::to(DType::F32));
        let tensors = self.tensors.into_values().collect();
        let result = model.apply(tensors, None, Some(Box::new(adapter)), false);
        // Names and shapes are known to fit, so what is left are numbers that cannot be read.
        match result.errors.first() {
            None => Ok(model),
            Some(error) => Err(WeightsError::Malformed {
                path: self.path.to_path_buf(),
                reason: one_line(&error.to_string()),
            }),
        }
    }

    fn check(&self, slots: &BTreeMap<String, Slot>) -> Result<(), WeightsError> {
        let names = |found: Vec<&String>| -> Vec<String> {
            found.into_iter().map(|name| self.file_name(name)).collect()
        };
        let missing = slots
            .keys()
            .filter(|name| !self.tensors.contains_key(*name));
        let unexpected = self
            .tensors
            .keys()
            .filter(|name| !slots.contains_key(*name));
        let wrong = self.tensors.iter().filter_map(|(name, tensor)| {
            let slot = slots.get(name)?;
            let found = tensor.shape.to_vec();
            if !tensor.dtype.is_float() {
                let kind = tensor.dtype.name();
                return Some(format!(
                    "{} holds {kind} and no floats",
                    self.file_name(name)
                ));
            }
            (found != slot.shape).then(|| {
                let name = self.file_name(name);
                format!("{name} is {found:?} where {:?} is needed", slot.shape)
            })
        });
        let (missing, unexpected) = (names(missing.collect()), names(unexpected.collect()));
        let wrong: Vec<String> = wrong.collect();
        if missing.is_empty() && unexpected.is_empty() && wrong.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Misfit {
            path: self.path.to_path_buf(),
            missing,
            unexpected,
            wrong,
        })
    }

    /// Refuses weights of another size with one sentence, where [`place`](Self::place) would list every tensor.
    pub(super) fn check_size(
        &self,
        model: &Dinov2ForImageClassification,
    ) -> Result<(), WeightsError> {
        let slots = slots(model);
        let needed = Size::of(
            slots
                .iter()
                .map(|slot| (slot.name.as_str(), slot.shape.clone())),
        );
        let found = self.tensors.iter();
        let found = Size::of(found.map(|(name, tensor)| (name.as_str(), tensor.shape.to_vec())));
        match found.differences(&needed) {
            None => Ok(()),
            Some((found, said)) => Err(WeightsError::Size {
                path: self.path.to_path_buf(),
                what: "checkpoint",
                found,
                said_by: "config.json says",
                said,
            }),
        }
    }
}

/// The path in the model of a module of a classifier or of a backbone.
pub(super) fn model_path(module: &str) -> String {
    let families = [Family::Registers, Family::Plain];
    let rest = families
        .iter()
        .find_map(|family| module.strip_prefix(family.prefix()))
        .unwrap_or(module);
    let root = rest.split('.').next();
    match root {
        Some("embeddings" | "encoder" | "layernorm") => format!("dinov2.{rest}"),
        _ => module.to_string(),
    }
}

/// Two tensors one below the other. None where they do not fit.
fn stacked(upper: &Stored, lower: &Stored, name: &str) -> Option<Stored> {
    let mut shape = upper.shape.to_vec();
    let rest = lower.shape.to_vec();
    if upper.dtype != lower.dtype || shape.is_empty() || shape.get(1..) != rest.get(1..) {
        return None;
    }
    shape[0] += rest[0];
    let (dtype, parts) = (upper.dtype, [upper.clone(), lower.clone()]);
    let numbers = shape.clone();
    let read = move || {
        let mut bytes = Vec::new();
        for part in &parts {
            bytes.extend_from_slice(&part.to_bytes()?);
        }
        Ok(TensorData::from_bytes_vec(bytes, numbers.clone(), dtype))
    };
    Some(bridge::deferred(
        name.to_string(),
        dtype,
        shape.into(),
        None,
        read,
    ))
}

/// The rows of a tensor in another order.
pub(super) fn reordered(tensor: Stored, order: Vec<usize>) -> Stored {
    let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
    let rows = shape.to_vec();
    bridge::map_data(tensor, name, dtype, shape, move |data| {
        let bytes = data.as_bytes();
        let width = bytes.len() / order.len().max(1);
        let moved = order
            .iter()
            .flat_map(|row| bytes[row * width..(row + 1) * width].iter().copied());
        TensorData::from_bytes_vec(moved.collect(), rows.clone(), dtype)
    })
}

/// What distinguishes models of different sizes, as far as tensors tell it.
#[derive(Debug, Default, PartialEq)]
struct Size {
    width: Option<usize>,
    layers: usize,
    registers: usize,
    /// Channels and side of a patch.
    patch: Option<[usize; 2]>,
    positions: Option<usize>,
    /// Whether the MLP is gated, and the rows of its first layer.
    mlp: Option<(bool, usize)>,
}

impl Size {
    fn of<'a>(shapes: impl Iterator<Item = (&'a str, Vec<usize>)>) -> Self {
        let mut size = Self::default();
        for (name, shape) in shapes {
            let Some(name) = name.strip_prefix("dinov2.") else {
                continue;
            };
            match (name, shape.as_slice()) {
                ("embeddings.cls_token", &[_, _, width]) => size.width = Some(width),
                ("embeddings.register_tokens", &[_, count, _]) => size.registers = count,
                ("embeddings.position_embeddings", &[_, count, _]) => size.positions = Some(count),
                ("embeddings.patch_embeddings.projection.weight", &[_, channels, side, _]) => {
                    size.patch = Some([channels, side]);
                }
                _ => {}
            }
            let Some((layer, rest)) = layer(name) else {
                continue;
            };
            size.layers = size.layers.max(layer + 1);
            match (rest, shape.as_slice()) {
                ("mlp.fc1.weight", &[rows, _]) => size.mlp = Some((false, rows)),
                ("mlp.weights_in.weight", &[rows, _]) => size.mlp = Some((true, rows)),
                _ => {}
            }
        }
        size
    }

    /// What differs: how it is here, and how it is there. None where nothing does, and where this is no model at all.
    fn differences(&self, other: &Self) -> Option<(String, String)> {
        let (width, other_width) = self.width.zip(other.width)?;
        let mut found = Vec::new();
        let mut said = Vec::new();
        if (width, self.layers) != (other_width, other.layers) {
            found.push(format!("is {}", extent(width, self.layers)));
            said.push(extent(other_width, other.layers));
        }
        let mut add = |here: Option<String>, there: Option<String>| {
            if let (Some(here), Some(there)) = (here, there)
                && here != there
            {
                found.push(format!("has {here}"));
                said.push(there);
            }
        };
        let patch = |size: &Self| {
            let [channels, side] = size.patch?;
            Some(format!("patches of {side} pixels in {channels} channels"))
        };
        let positions = |size: &Self| Some(format!("{} positions", size.positions?));
        let registers = |size: &Self| Some(format!("{} register tokens", size.registers));
        let mlp = |size: &Self| {
            let (is_gated, rows) = size.mlp?;
            let kind = if is_gated { "SwiGLU" } else { "GELU" };
            let hidden = if is_gated { rows / 2 } else { rows };
            Some(format!("a {kind} MLP of width {hidden}"))
        };
        add(patch(self), patch(other));
        add(positions(self), positions(other));
        add(registers(self), registers(other));
        // The width of the MLP follows from the width of the model.
        if width == other_width {
            add(mlp(self), mlp(other));
        }
        (!found.is_empty()).then(|| (found.join(" and "), said.join(" and ")))
    }
}

/// The size of a model in words.
pub(super) fn extent(width: usize, layers: usize) -> String {
    let noun = if layers == 1 { "layer" } else { "layers" };
    format!("{width} wide with {layers} {noun}")
}

/// The number of a transformer layer, and the name within it.
pub(super) fn layer(name: &str) -> Option<(usize, &str)> {
    let (index, rest) = name.strip_prefix("encoder.layer.")?.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dinov2Config;

    #[test]
    fn parameters_have_the_names_and_shapes_of_pytorch() {
        let config = Dinov2Config::new(32, 4, 1).with_num_labels(5);
        let slots = slots(&config.init(&Device::flex()));
        let slot = |name: &str| slots.iter().find(|slot| slot.name == name).unwrap().clone();

        assert_eq!(slot("classifier.weight").shape, [5, 64]);
        assert!(slot("classifier.weight").is_linear);
        let fc1 = slot("dinov2.encoder.layer.0.mlp.fc1.weight");
        assert_eq!((fc1.shape, fc1.is_linear), (vec![128, 32], true));
        assert_eq!(slot("dinov2.encoder.layer.0.norm1.weight").shape, [32]);
        assert!(!slot("dinov2.layernorm.bias").is_linear);
    }

    #[test]
    fn modules_of_every_family_lead_to_one_path() {
        for module in [
            "encoder.layer.0.mlp.fc1",
            "dinov2.encoder.layer.0.mlp.fc1",
            "dinov2_with_registers.encoder.layer.0.mlp.fc1",
        ] {
            assert_eq!(model_path(module), "dinov2.encoder.layer.0.mlp.fc1");
        }
        assert_eq!(model_path("classifier"), "classifier");
        assert_eq!(model_path("vit.encoder"), "vit.encoder");
    }

    #[test]
    fn a_size_says_what_differs_and_nothing_else() {
        let size = |config: Dinov2Config| {
            let slots = slots(&config.init(&Device::flex()));
            Size::of(
                slots
                    .iter()
                    .map(|slot| (slot.name.as_str(), slot.shape.clone())),
            )
        };
        let small = size(Dinov2Config::new(32, 4, 2));
        let differences = |config| size(config).differences(&small);

        let (found, said) = differences(Dinov2Config::new(64, 4, 3)).unwrap();
        assert_eq!(
            (found.as_str(), said.as_str()),
            ("is 64 wide with 3 layers", "32 wide with 2 layers")
        );
        let (found, said) =
            differences(Dinov2Config::new(32, 4, 2).with_use_swiglu_ffn(true)).unwrap();
        assert_eq!(found, "has a SwiGLU MLP of width 88");
        assert_eq!(said, "a GELU MLP of width 128");
        let config = Dinov2Config::new(32, 4, 2)
            .with_num_register_tokens(4)
            .with_image_size(28);
        let (found, said) = differences(config).unwrap();
        assert_eq!(found, "has 5 positions and has 4 register tokens");
        assert_eq!(said, "1370 positions and 0 register tokens");
        assert_eq!(differences(Dinov2Config::new(32, 8, 2)), None);
    }
}
