//! LoRA in PEFT's layout.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{LoraAdapter, Module, Param, ParamGroup, Reparameterizer};
use burn::prelude::*;
use burn::store::bridge;
use burn::tensor::DType;
use burn_boft::peft::{CONFIG_FILE, Folder, PREFIX, TENSORS_FILE, key, saved_key};
use burn_boft::tensors::{concatenate, from_values, is_float, split, transposed, values};
use burn_boft::value::join;
use burn_boft::{BoftLinear, KeyMap};
use serde_json::{Map, Value, json};

use super::config::refused;
use super::error::WeightsError;
use super::fit::{Named, Slot, slots};
use crate::model::Dinov2ForImageClassification;

/// Where PEFT keeps the parameters of an adapted layer itself.
const BASE_LAYER: &str = ".base_layer";
/// The factors of a layer, behind its path.
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
/// PEFT's name of a saved module's frozen original, and of its trained copy. With `bias = "all"`, the biases of both are
/// in the file a second time.
const COPIES: [&str; 2] = [".original_module", ".modules_to_save"];

/// Settings of variants that compute something else, beside `null`, `false` and what is empty.
const VARIANTS: [&str; 11] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// The low-rank update of a layer, `scale · B · A`, as PyTorch keeps it.
#[derive(Clone, Debug, PartialEq)]
struct Layer {
    /// `[rank, d_input]`
    a: TensorData,
    /// `[d_output, rank]`
    b: TensorData,
    scale: f64,
}

/// A LoRA with the names of the model.
#[derive(Clone, Debug)]
pub(super) struct Lora {
    /// By the path of the layer.
    layers: BTreeMap<String, Layer>,
    /// Biases and parts of saved modules by name, as PyTorch keeps them.
    saved: BTreeMap<String, TensorData>,
    modules_to_save: Vec<String>,
    /// PEFT's setting of this name.
    bias: String,
    base: Option<String>,
}

impl Lora {
    /// Takes the LoRA of Burn out of a model, with the biases of the adapted layers and the head.
    pub(super) fn extract(
        model: &Dinov2ForImageClassification,
        base: &str,
    ) -> Result<Self, WeightsError> {
        let (mut layers, mut saved) = (BTreeMap::new(), BTreeMap::new());
        for (path, linear) in linears(model) {
            let Some(adapter) = linear.weight.adapter() else {
                continue;
            };
            if let Some(bias) = &linear.bias {
                saved.insert(join(&path, "bias"), bias.val().into_data());
            }
            let layer = Layer {
                a: turned(adapter.a.val()),
                b: turned(adapter.b.val()),
                scale: adapter.scale,
            };
            layers.insert(path, layer);
        }
        if layers.is_empty() {
            return Err(WeightsError::NotAdapted);
        }
        let head = &model.classifier;
        saved.insert("classifier.weight".into(), turned(head.weight.val()));
        if let Some(bias) = &head.bias {
            saved.insert("classifier.bias".into(), bias.val().into_data());
        }
        Ok(Self {
            layers,
            saved,
            modules_to_save: vec!["classifier".into()],
            bias: "lora_only".into(),
            base: Some(base.to_string()),
        })
    }

    /// Understands PEFT's files; `folder` is for messages.
    pub(super) fn parse(
        files: Folder,
        names: &KeyMap,
        folder: &Path,
    ) -> Result<Self, WeightsError> {
        let settings = Settings {
            path: &folder.join(CONFIG_FILE),
            json: &files.settings,
        };
        settings.refuse_variants()?;
        let path = folder.join(TENSORS_FILE);
        let mut parts = Parts::default();
        for (key, data) in files.tensors {
            parts.sort(key, data, names)?;
        }
        parts.check(&path)?;
        let saved = parts.saved(&path)?;
        let layers = parts.layers(&settings, names, &path)?;
        let modules = settings.names("modules_to_save")?;
        let modules = modules.iter().map(|module| names.model_path(module));
        Ok(Self {
            layers,
            saved,
            modules_to_save: modules.collect::<Result<_, _>>()?,
            bias: settings.text("bias").unwrap_or("none").to_string(),
            base: settings.text("base_model_name_or_path").map(str::to_string),
        })
    }

    /// PEFT's files.
    pub(super) fn files(&self, names: &KeyMap) -> Result<Folder, WeightsError> {
        let mut tensors = BTreeMap::new();
        let (mut targets, mut ranks, mut alphas) = (Vec::new(), Map::new(), Map::new());
        let first = self.layers.values().next();
        let rank = first.map_or(1, |layer| layer.a.shape()[0]);
        let alpha = first.map_or(1.0, |layer| layer.scale * rank as f64);
        for (path, layer) in &self.layers {
            let files = names.file_paths(path)?;
            let rows = parts_of(&layer.b, files.len(), path)?;
            for (file, b) in files.into_iter().zip(rows) {
                let own_rank = layer.a.shape()[0];
                let own_alpha = layer.scale * own_rank as f64;
                if own_rank != rank {
                    ranks.insert(file.clone(), json!(own_rank));
                }
                if own_alpha != alpha {
                    alphas.insert(file.clone(), number(own_alpha));
                }
                tensors.insert(key(&file, A), layer.a.clone());
                tensors.insert(key(&file, B), b);
                targets.push(file);
            }
        }
        for (name, data) in &self.saved {
            let (module, parameter) = name.rsplit_once('.').unwrap_or(("", name));
            let files = names.file_paths(module)?;
            let rows = parts_of(data, files.len(), name)?;
            let is_adapted = self.layers.contains_key(module);
            for (file, data) in files.into_iter().zip(rows) {
                tensors.insert(saved_key(&file, parameter, is_adapted), data);
            }
        }
        let mut modules = Vec::new();
        for module in &self.modules_to_save {
            modules.extend(names.file_paths(module)?);
        }
        let settings = json!({
            "peft_type": "LORA",
            "task_type": null,
            "base_model_name_or_path": self.base,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": number(alpha),
            "lora_dropout": 0.0,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": targets,
            "modules_to_save": modules,
            "bias": self.bias,
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "use_dora": false,
            "use_rslora": false,
        });
        let settings = settings.as_object().cloned().unwrap_or_default();
        Ok(Folder::new(settings, tensors))
    }

    pub(super) fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// The weight of the head, if it is saved.
    pub(super) fn head(&self) -> Option<&TensorData> {
        self.saved.get("classifier.weight")
    }

    /// The rank of the first layer.
    pub(super) fn rank(&self) -> usize {
        self.layers
            .values()
            .next()
            .map_or(0, |layer| layer.a.shape()[0])
    }

    /// The adapted layers by path, with their input width.
    pub(super) fn widths(&self) -> impl Iterator<Item = (&str, usize)> {
        let layers = self.layers.iter();
        layers.map(|(path, layer)| (path.as_str(), layer.a.shape()[1]))
    }

    /// Puts the LoRA on a plain model. What it trains is trainable, and everything else is frozen.
    pub(super) fn attach(
        &self,
        model: Dinov2ForImageClassification,
        path: &Path,
    ) -> Result<Dinov2ForImageClassification, WeightsError> {
        let slots = slots(&model);
        self.check(&slots, path)?;
        let tensors = self.saved.iter().map(|(name, data)| {
            let tensor = bridge::from_data(data.clone(), name.clone(), None);
            (name.clone(), tensor)
        });
        let named = Named::of_model(path, tensors.collect());
        let model = named.place(model, |name| self.saved.contains_key(name))?;
        let trained = slots
            .iter()
            .filter(|slot| self.saved.contains_key(&slot.name));
        let trained = trained.map(|slot| slot.path.clone()).collect();
        let model = model.apply_reparameterization(Attach(self.layers.clone()));
        Ok(model.unfreeze_group(ParamGroup::from_paths(trained)))
    }

    fn check(&self, slots: &[Slot], path: &Path) -> Result<(), WeightsError> {
        let (mut unexpected, mut wrong) = (Vec::new(), Vec::new());
        for (layer, Layer { a, b, .. }) in &self.layers {
            let name = join(layer, "weight");
            let Some(slot) = slots
                .iter()
                .find(|slot| slot.name == name && slot.is_linear)
            else {
                unexpected.push(join(layer, A));
                continue;
            };
            let found = [b.shape()[0], a.shape()[1]];
            if slot.shape != found {
                let needed = &slot.shape;
                wrong.push(format!(
                    "{layer} is adapted as {found:?} where it is {needed:?}"
                ));
            }
        }
        if unexpected.is_empty() && wrong.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Misfit {
            path: path.to_path_buf(),
            missing: Vec::new(),
            unexpected,
            wrong,
        })
    }
}

/// Attaches the layers by path, and freezes every parameter of the base.
struct Attach(BTreeMap<String, Layer>);

impl Reparameterizer for Attach {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraAdapter>) {
        let device = param.lazy_device();
        let base = param.set_require_grad(false);
        let layer = path.strip_suffix(".weight");
        let Some(layer) = layer.and_then(|layer| self.0.remove(layer)) else {
            return (base, None);
        };
        // Parameters live as long as the model, and Burn keeps such allocations apart.
        let adapter = device.memory_persistent_allocations((), |_| {
            let factor = |data: &TensorData| {
                let data = data.clone().convert_dtype(DType::F32);
                let tensor = Tensor::<2>::from_data(data, (&device, DType::F32)).transpose();
                Param::from_tensor(tensor)
            };
            LoraAdapter {
                a: factor(&layer.a),
                b: factor(&layer.b),
                scale: layer.scale,
            }
        });
        (base, Some(adapter))
    }
}

/// The settings of PEFT's LoRA.
struct Settings<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl Settings<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.json.get(name)?.as_str()
    }

    fn refused(&self, setting: &str, expected: &str) -> WeightsError {
        refused(self.path, self.json, setting, expected)
    }

    /// A list of names; none where there is no such setting.
    fn names(&self, setting: &str) -> Result<Vec<String>, WeightsError> {
        match self.json.get(setting) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(names) => serde_json::from_value(names.clone())
                .map_err(|_| self.refused(setting, "a list of names is needed")),
        }
    }

    /// Refuses what is not `W + scale · B · A` with the base's own weights.
    fn refuse_variants(&self) -> Result<(), WeightsError> {
        for setting in VARIANTS {
            if self.json.get(setting).is_some_and(is_set) {
                return Err(self.refused(setting, "this variant of LoRA is not supported"));
            }
        }
        let keeps_base = match self.json.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => true,
            Some(value) => matches!(value.as_str(), Some("gaussian" | "eva" | "orthogonal")),
        };
        match keeps_base {
            true => Ok(()),
            // PiSSA, OLoRA and others change the base weights, and PEFT's file does not have those.
            false => Err(self.refused(
                "init_lora_weights",
                "it changes the base weights; convert the adapter in PEFT with path_initial_model_for_weight_conversion",
            )),
        }
    }

    /// The factor of a layer's update.
    fn scale(&self, module: &str, rank: usize) -> Result<f64, WeightsError> {
        let mut alpha = self.json.get("lora_alpha").and_then(Value::as_f64);
        let patterns = self.json.get("alpha_pattern").and_then(Value::as_object);
        for (pattern, value) in patterns.into_iter().flatten() {
            let is_plain = |letter: char| letter.is_alphanumeric() || "_.-".contains(letter);
            if !pattern.chars().all(is_plain) {
                return Err(self.refused("alpha_pattern", "only names of modules are supported"));
            }
            if module == pattern || module.ends_with(&format!(".{pattern}")) {
                alpha = value.as_f64();
                break;
            }
        }
        let alpha = alpha.ok_or_else(|| self.refused("lora_alpha", "a number is needed"))?;
        let is_stabilized = self.json.get("use_rslora") == Some(&Value::Bool(true));
        Ok(match is_stabilized {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        })
    }
}

/// Whether a setting says anything.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        _ => true,
    }
}

/// The tensors of a file by what they are.
#[derive(Default)]
struct Parts {
    /// The factors by the names of their modules in the file.
    a: BTreeMap<String, TensorData>,
    b: BTreeMap<String, TensorData>,
    /// Biases and parts of saved modules by their names in the model.
    whole: BTreeMap<String, TensorData>,
    /// Those of halves of a layer, by the name of the whole and by which half they are of.
    halves: BTreeMap<String, BTreeMap<usize, TensorData>>,
    /// Keys that are no part of a LoRA.
    unexpected: Vec<String>,
}

impl Parts {
    /// Puts one tensor where it belongs.
    fn sort(&mut self, key: String, data: TensorData, names: &KeyMap) -> Result<(), WeightsError> {
        let Some(rest) = key.strip_prefix(PREFIX).filter(|_| is_float(data.dtype())) else {
            self.unexpected.push(key);
            return Ok(());
        };
        let factor = |ending: &str| match data.rank() {
            2 => rest.strip_suffix(ending)?.strip_suffix('.'),
            _ => None,
        };
        if let Some(module) = factor(A) {
            self.a.insert(module.to_string(), data);
            return Ok(());
        }
        if let Some(module) = factor(B) {
            self.b.insert(module.to_string(), data);
            return Ok(());
        }
        let (module, parameter) = rest.rsplit_once('.').unwrap_or(("", rest));
        if COPIES.iter().any(|copy| module.ends_with(copy)) {
            return Ok(());
        }
        if rest.contains(".lora_") {
            self.unexpected.push(key);
            return Ok(());
        }
        let module = module.strip_suffix(BASE_LAYER).unwrap_or(module);
        match half(module, names)? {
            Some((whole, index)) => {
                let halves = self.halves.entry(join(&whole, parameter)).or_default();
                halves.insert(index, data);
            }
            None => {
                let name = join(&names.model_path(module)?, parameter);
                self.whole.insert(name, data);
            }
        }
        Ok(())
    }

    /// Refuses factors without their partner, and what is no part of a LoRA.
    fn check(&self, path: &Path) -> Result<(), WeightsError> {
        let lacking = |these: &BTreeMap<String, TensorData>, others: &BTreeMap<_, _>, name| {
            let modules = these.keys().filter(|module| !others.contains_key(*module));
            modules.map(|module| key(module, name)).collect::<Vec<_>>()
        };
        let mut missing = lacking(&self.a, &self.b, B);
        missing.extend(lacking(&self.b, &self.a, A));
        if self.a.is_empty() && self.b.is_empty() {
            missing.push(format!("any {A}"));
        }
        let ranks = self.a.iter().filter_map(|(module, a)| {
            let (a, b) = (a.shape()[0], self.b.get(module)?.shape()[1]);
            (a != b || a == 0).then(|| format!("{module} has factors of rank {a} and {b}"))
        });
        let wrong: Vec<String> = ranks.collect();
        let unexpected = self.unexpected.clone();
        match missing.is_empty() && unexpected.is_empty() && wrong.is_empty() {
            true => Ok(()),
            false => Err(WeightsError::Misfit {
                path: path.to_path_buf(),
                missing,
                unexpected,
                wrong,
            }),
        }
    }

    /// Biases and parts of saved modules, those of halves joined.
    fn saved(&mut self, path: &Path) -> Result<BTreeMap<String, TensorData>, WeightsError> {
        let mut saved = std::mem::take(&mut self.whole);
        for (name, halves) in std::mem::take(&mut self.halves) {
            let both = halves.get(&0).zip(halves.get(&1));
            let joined = both.and_then(|(gate, up)| concatenate([gate, up]));
            saved.insert(name.clone(), joined.ok_or_else(|| one_half(path, &name))?);
        }
        Ok(saved)
    }

    /// The layers of the model.
    fn layers(
        self,
        settings: &Settings,
        names: &KeyMap,
        path: &Path,
    ) -> Result<BTreeMap<String, Layer>, WeightsError> {
        let mut layers = BTreeMap::new();
        let mut wholes: BTreeMap<String, BTreeMap<usize, Layer>> = BTreeMap::new();
        for ((module, a), b) in self.a.into_iter().zip(self.b.into_values()) {
            let scale = settings.scale(&module, a.shape()[0])?;
            let layer = Layer { a, b, scale };
            match half(&module, names)? {
                Some((whole, index)) => _ = wholes.entry(whole).or_default().insert(index, layer),
                None => _ = layers.insert(names.model_path(&module)?, layer),
            }
        }
        for (whole, halves) in wholes {
            let both = halves.get(&0).zip(halves.get(&1));
            let joined = both.and_then(|(gate, up)| joined(gate, up));
            let layer = joined.ok_or_else(|| one_half(path, &whole))?;
            layers.insert(whole, layer);
        }
        Ok(layers)
    }
}

/// A layer of which the file has one half, or two that do not fit together.
fn one_half(path: &Path, name: &str) -> WeightsError {
    WeightsError::Misfit {
        path: path.to_path_buf(),
        missing: Vec::new(),
        unexpected: Vec::new(),
        wrong: vec![format!(
            "{name} needs gate_proj and up_proj, of one width and precision"
        )],
    }
}

/// The layer of the model that a module of the file is a half of, and which half.
fn half(module: &str, names: &KeyMap) -> Result<Option<(String, usize)>, WeightsError> {
    let places = names.places(module)?;
    let half = places.into_iter().find(|place| place.part.1 > 1);
    match half {
        Some(place) => Ok(Some((names.model_path(&place.module)?, place.part.0))),
        None => Ok(None),
    }
}

/// One layer of two with the same input. Where they share `A`, the rank stays; otherwise both ranks add up.
fn joined(gate: &Layer, up: &Layer) -> Option<Layer> {
    if gate.a == up.a && gate.scale == up.scale {
        return Some(Layer {
            a: gate.a.clone(),
            b: concatenate([&gate.b, &up.b])?,
            scale: gate.scale,
        });
    }
    let [upper, lower] = [gate, up].map(|layer| layer.b.shape().to_vec());
    let rank = upper[1] + lower[1];
    let mut b = vec![0.0; (upper[0] + lower[0]) * rank];
    let rescale = up.scale / gate.scale;
    for (index, value) in values(&gate.b).into_iter().enumerate() {
        b[index / upper[1] * rank + index % upper[1]] = value;
    }
    for (index, value) in values(&up.b).into_iter().enumerate() {
        let row = upper[0] + index / lower[1];
        b[row * rank + upper[1] + index % lower[1]] = value * rescale;
    }
    Some(Layer {
        a: concatenate([&gate.a, &up.a])?,
        b: from_values(b, [upper[0] + lower[0], rank], gate.b.dtype()),
        scale: gate.scale,
    })
}

/// A tensor in the parts that the file has for it.
fn parts_of(data: &TensorData, parts: usize, name: &str) -> Result<Vec<TensorData>, WeightsError> {
    split(data, parts).ok_or_else(|| {
        WeightsError::Save(burn_boft::peft::SaveError::Unrepresentable {
            path: name.to_string(),
            reason: burn_boft::peft::Unrepresentable::Rows {
                shape: data.shape().to_vec(),
                parts,
            },
        })
    })
}

/// A number without a decimal point where it has no fraction, as PEFT writes `lora_alpha`.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e9 {
        true => json!(value as i64),
        false => json!(value),
    }
}

/// A matrix as PyTorch keeps it.
fn turned(matrix: Tensor<2>) -> TensorData {
    let data = matrix.into_data();
    transposed(&data).unwrap_or(data)
}

/// The linear layers of the transformer by path.
fn linears(model: &Dinov2ForImageClassification) -> Vec<(String, &BoftLinear)> {
    let mut found = Vec::new();
    for (index, layer) in model.dinov2.encoder.layer.iter().enumerate() {
        let attention = &layer.attention.attention;
        let layers = [
            ("attention.attention.query", Some(&attention.query)),
            ("attention.attention.key", Some(&attention.key)),
            ("attention.attention.value", Some(&attention.value)),
            (
                "attention.output.dense",
                Some(&layer.attention.output.dense),
            ),
            ("mlp.fc1", layer.mlp.fc1.as_ref()),
            ("mlp.fc2", layer.mlp.fc2.as_ref()),
            ("mlp.weights_in", layer.mlp.weights_in.as_ref()),
            ("mlp.weights_out", layer.mlp.weights_out.as_ref()),
        ];
        for (name, linear) in layers {
            if let Some(linear) = linear {
                found.push((format!("dinov2.encoder.layer.{index}.{name}"), linear));
            }
        }
    }
    found
}
