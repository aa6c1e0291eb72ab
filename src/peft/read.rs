//! PEFT's tensors read: their keys, their shapes, and those of older versions.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value};

use super::config_json::warn_of_old_series;
use super::fused::to_model_names;
use crate::config::{AdapterConfig, Bias, Block, BoftConfig, OftConfig, Selection, TargetModules};
use crate::error::{KeyMapError, Mismatch};
use crate::model::plan::LayerKind;
use crate::select::is_saved;
use crate::tensors::{from_values, is_finite, values, widened};
use crate::value::LoadReport;
use crate::value::keymap::{KeyMap, ends_with, join, split};
use crate::value::layer::{AdapterLayer, SavedTensor, block_size, check_sizes, pack};
use crate::value::reconcile::{check_biases, reconcile};

/// What every key starts with.
pub(super) const PREFIX: &str = "base_model.model.";

/// The tensors of a file, understood.
pub(crate) struct Parsed {
    pub(crate) config: AdapterConfig,
    pub(crate) layers: Vec<AdapterLayer>,
    pub(crate) tensors: Vec<SavedTensor>,
}

/// What a key says.
enum Leaf<'a> {
    BoftR,
    BoftS,
    /// The dense permutations of PEFT 0.11 and 0.12.
    BoftP,
    OftR,
    /// The squares and the scale of PEFT 0.14 to 0.15.2.
    SquareR,
    SquareS,
    Embedding,
    /// A parameter of an adapted layer.
    Base(&'a str),
    /// A parameter of another module.
    Other(&'a str),
}

/// The module and the tensor that a key without its prefix names.
fn leaf(key: &str) -> (&str, Leaf<'_>) {
    let (front, name) = split(key);
    let (outer, inner) = split(front);
    match (inner, name) {
        (_, "boft_R") => (front, Leaf::BoftR),
        (_, "boft_s") => (front, Leaf::BoftS),
        (_, "boft_P") => (front, Leaf::BoftP),
        (_, "oft_r") => (front, Leaf::SquareR),
        (_, "oft_s") => (front, Leaf::SquareS),
        ("oft_R", "weight") => (outer, Leaf::OftR),
        ("oft_embedding_R", "weight") => (outer, Leaf::Embedding),
        ("base_layer", name) => (outer, Leaf::Base(name)),
        (_, name) => (front, Leaf::Other(name)),
    }
}

/// The tensors of one adapted layer.
#[derive(Default)]
struct Slots {
    boft: (Option<TensorData>, Option<TensorData>),
    oft: Option<TensorData>,
    square: (Option<TensorData>, Option<TensorData>),
}

/// Reads the tensors of a file. What is amiss goes to `mismatch`.
pub(crate) fn parse(
    config: AdapterConfig,
    json: &Map<String, Value>,
    tensors: BTreeMap<String, TensorData>,
    names: &KeyMap,
    (report, mismatch): (&mut LoadReport, &mut Mismatch),
) -> Result<Parsed, KeyMapError> {
    let selection = config.selection().clone();
    let is_boft = matches!(config, AdapterConfig::Boft(_));
    let adapted = adapted(tensors.keys());
    let mut sorted = Sorted::default();
    for (key, data) in tensors {
        sorted.sort(key, data, is_boft, &selection, report, mismatch);
    }
    let mut reader = LayerReader {
        config,
        json,
        report,
        mismatch,
        squares: false,
    };
    let Sorted {
        slots,
        mut tensors,
        saved,
    } = sorted;
    let mut layers: Vec<_> = slots
        .into_iter()
        .filter_map(|(path, slots)| reader.read(path, slots))
        .collect();
    if layers.is_empty() && reader.mismatch.is_empty() {
        let what = if is_boft { "boft_R" } else { "oft_R.weight" };
        let missing = format!("the file holds no `{what}` at all");
        reader.mismatch.missing.push(missing);
    }
    if reader.squares {
        for layer in layers.iter().filter(|layer| layer.scale.is_none()) {
            let key = join(&layer.path, "oft_R.weight");
            let why = format!("`{PREFIX}{key}` beside layers of PEFT 0.14 to 0.15.2");
            reader.mismatch.wrong.push(why);
        }
    }
    let mut config = reader.config;
    let (report, mismatch) = (reader.report, reader.mismatch);
    // Of squares the map is exact, whatever a version that had no polynomial does not say.
    report.warnings.extend(warn_of_old_series(&config, json));
    // A file without any layer is told as that.
    if !adapted.is_empty() {
        warn_of_lost(&selection, &adapted, &tensors, &saved, report);
    }
    check_biases(&layers, &tensors, mismatch);
    reconcile(&mut config, &layers, report);
    to_model_names(names, &mut layers, &mut tensors, mismatch)?;
    let lost = lost_modules(&selection, &saved);
    name_in_model(
        config.selection_mut(),
        names,
        &layers,
        saved.iter().chain(lost),
    )?;
    Ok(Parsed {
        config,
        layers,
        tensors,
    })
}

/// Tensors by what they belong to.
#[derive(Default)]
struct Sorted {
    slots: BTreeMap<String, Slots>,
    tensors: Vec<SavedTensor>,
    /// Names of modules to save that have tensors.
    saved: BTreeSet<String>,
}

impl Sorted {
    fn sort(
        &mut self,
        key: String,
        data: TensorData,
        is_boft: bool,
        selection: &Selection,
        report: &mut LoadReport,
        mismatch: &mut Mismatch,
    ) {
        let mut refuse = |why: &str| mismatch.unexpected.push(format!("`{key}`: {why}"));
        let Some(rest) = key.strip_prefix(PREFIX) else {
            return refuse("keys of an adapter start with `base_model.model.`");
        };
        let (module, leaf) = leaf(rest);
        let integers = data.dtype() == DType::I64;
        if integers && !rest.ends_with("num_batches_tracked") {
            return refuse("it holds integers");
        }
        let mut slots = |slot: fn(&mut Slots) -> &mut Option<TensorData>| {
            *slot(self.slots.entry(module.to_string()).or_default()) = Some(data.clone());
        };
        match leaf {
            Leaf::BoftP => {
                return report.converted.push(format!(
                    "`{key}` is left out: PEFT 0.12 and older stored the permutation, which follows from the sizes"
                ));
            }
            Leaf::BoftR if is_boft => slots(|slots| &mut slots.boft.0),
            Leaf::BoftS if is_boft => slots(|slots| &mut slots.boft.1),
            Leaf::OftR if !is_boft => slots(|slots| &mut slots.oft),
            Leaf::SquareR if !is_boft => slots(|slots| &mut slots.square.0),
            Leaf::SquareS if !is_boft => slots(|slots| &mut slots.square.1),
            Leaf::BoftR | Leaf::BoftS => return refuse("a BOFT tensor in an OFT adapter"),
            Leaf::OftR | Leaf::SquareR | Leaf::SquareS => {
                return refuse("an OFT tensor in a BOFT adapter");
            }
            Leaf::Embedding => {
                return refuse(
                    "an adapter of an embedding; only linear layers and convolutions are adapted",
                );
            }
            Leaf::Base("bias") if selection.bias != Bias::None => self.save(module, "bias", data),
            Leaf::Base("bias") => {
                return refuse("the bias of an adapted layer, where the configuration trains none");
            }
            Leaf::Base(_) => return refuse("a base weight; only adapters and biases are read"),
            Leaf::Other("bias") if is_stray(module) && selection.bias == Bias::All => {
                return report.converted.push(format!(
                    "`{key}` is left out: a copy that PEFT keeps beside the module it saves"
                ));
            }
            Leaf::Other(name) => match saved_by(&selection.modules_to_save, module) {
                Some(entry) => {
                    self.saved.insert(entry);
                    self.save(module, name, data);
                }
                None if name == "bias" && selection.bias == Bias::All => {
                    self.save(module, name, data);
                }
                None => {
                    return refuse(
                        "neither an adapter, nor a trained bias, nor part of a module to save",
                    );
                }
            },
        }
        report.applied.push(key);
    }

    fn save(&mut self, module: &str, name: &str, data: TensorData) {
        self.tensors.push(SavedTensor {
            module: module.to_string(),
            name: name.to_string(),
            data,
        });
    }
}

/// The modules that the keys of a file adapt, whether or not their tensors can be used.
fn adapted<'a>(keys: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let module = |key: &'a String| match leaf(key.strip_prefix(PREFIX)?) {
        (_, Leaf::Base(_) | Leaf::Other(_)) => None,
        (module, _) => Some(module.to_string()),
    };
    keys.filter_map(module).collect()
}

/// Warns of what the settings name and the file has nothing of: PEFT passes over it.
fn warn_of_lost(
    selection: &Selection,
    adapted: &BTreeSet<String>,
    tensors: &[SavedTensor],
    saved: &BTreeSet<String>,
    report: &mut LoadReport,
) {
    let warnings = &mut report.warnings;
    if let Some(TargetModules::Names(names)) = &selection.target_modules {
        let is_lost = |name: &&String| {
            !adapted.iter().any(|path| ends_with(path, name))
                && saved_by(&selection.modules_to_save, name).is_none()
        };
        warnings.extend(names.iter().filter(is_lost).map(|name| {
            format!("`target_modules` names `{name}`, and the file has no adapter of it")
        }));
    }
    let lost = lost_modules(selection, saved);
    warnings.extend(
        lost.map(|name| {
            format!("`modules_to_save` names `{name}`, and the file has nothing of it")
        }),
    );
    let is_trained = |tensor: &SavedTensor| {
        tensor.name == "bias" && saved_by(&selection.modules_to_save, &tensor.module).is_none()
    };
    if selection.bias != Bias::None && !tensors.iter().any(is_trained) {
        warnings.push(
            "the configuration trains biases, and the file has none: the layers have none, or PEFT 0.20 or older \
             trained them and did not save them"
                .to_string(),
        );
    }
}

/// The modules to save that the file has nothing of.
fn lost_modules<'a>(
    selection: &'a Selection,
    saved: &BTreeSet<String>,
) -> impl Iterator<Item = &'a String> {
    /// PEFT names both where it trains a classifier, and a model has one.
    const HEADS: [&str; 2] = ["classifier", "score"];
    let is_found = |name: &str| saved.iter().any(|path| path.ends_with(name));
    let has_head = HEADS.into_iter().any(is_found);
    let names = selection.modules_to_save.iter();
    names.filter(move |name| !(is_found(name) || has_head && HEADS.contains(&name.as_str())))
}

/// Whether PEFT's wrapper of a saved module put this path into the file.
fn is_stray(module: &str) -> bool {
    matches!(split(module).1, "modules_to_save" | "original_module")
}

/// The entry of `modules_to_save` that a module of a file goes back to, spelt so that it matches at dots.
fn saved_by(modules_to_save: &[String], module: &str) -> Option<String> {
    if let Some(name) = modules_to_save
        .iter()
        .find(|name| is_saved(std::slice::from_ref(*name), module))
    {
        return Some(name.clone());
    }
    // PEFT saves whatever ends with an entry: `head` means `lm_head` too.
    let ends = module.match_indices('.').map(|(dot, _)| dot);
    ends.chain([module.len()])
        .map(|end| &module[..end])
        .find(|path| modules_to_save.iter().any(|name| path.ends_with(name)))
        .map(str::to_string)
}

/// Reads layers one by one.
struct LayerReader<'a> {
    config: AdapterConfig,
    json: &'a Map<String, Value>,
    report: &'a mut LoadReport,
    mismatch: &'a mut Mismatch,
    /// Whether the configuration was made BOFT for the squares of PEFT 0.14 to 0.15.2.
    squares: bool,
}

impl LayerReader<'_> {
    fn read(&mut self, path: String, slots: Slots) -> Option<AdapterLayer> {
        let key = |name: &str| format!("`{PREFIX}{}`", join(&path, name));
        let layer = match slots {
            Slots {
                square: (Some(r), Some(s)),
                oft: None,
                ..
            } => self.read_squares(&path, r, s),
            Slots {
                square: (Some(_), None),
                ..
            } => Err(format!(
                "{} without `oft_s`: PEFT 0.13 or older wrote it, whose rotation is another; merge it with that \
                 version, or train it anew",
                key("oft_r")
            )),
            Slots {
                square: (None, Some(_)),
                ..
            } => {
                self.mismatch.missing.push(key("oft_r"));
                return None;
            }
            Slots {
                square: (Some(_), Some(_)),
                oft: Some(_),
                ..
            } => Err(format!(
                "{} and {} in one layer",
                key("oft_r"),
                key("oft_R.weight")
            )),
            Slots { oft: Some(r), .. } => self.read_oft(path.clone(), r),
            Slots {
                boft: (Some(r), s), ..
            } => {
                if s.is_none() {
                    self.mismatch.missing.push(key("boft_s"));
                }
                read_boft(path.clone(), r, s)
            }
            Slots { .. } => {
                self.mismatch.missing.push(key("boft_R"));
                return None;
            }
        };
        let layer = layer.map_err(|why| self.mismatch.wrong.push(why)).ok()?;
        if !layer.rotates() {
            let rest = match layer.is_identity() {
                true => "nothing is attached there",
                false => "its scale can be merged, and not attached",
            };
            self.report.warnings.push(format!(
                "`{path}` has blocks of one channel, which do not rotate; {rest}"
            ));
        }
        let numbers = [Some(&layer.skew), layer.scale.as_ref()];
        if numbers
            .into_iter()
            .flatten()
            .any(|numbers| !is_finite(numbers))
        {
            let why = format!("the adapter of `{path}` holds NaN or infinity");
            self.report.warnings.push(why);
        }
        Some(layer)
    }

    fn read_oft(&mut self, path: String, r: TensorData) -> Result<AdapterLayer, String> {
        let share = matches!(&self.config, AdapterConfig::Oft(config) if config.block_share);
        let shape = r.shape().to_vec();
        let wrong = |why: String| {
            let key = join(&path, "oft_R.weight");
            format!("`{PREFIX}{key}` is {shape:?}: {why}")
        };
        let [rows, packed] = shape[..] else {
            return Err(wrong("blocks and packed numbers are two axes".into()));
        };
        let b = block_size(packed)
            .ok_or_else(|| wrong(format!("no block has {packed} numbers, b(b−1)/2")))?;
        if rows == 0 || (share && rows != 1) {
            let expected = if share { "one block" } else { "blocks" };
            return Err(wrong(format!("{expected} expected, {rows} found")));
        }
        check_sizes([1, rows, b]).map_err(wrong)?;
        let dtype = widened(r.dtype());
        Ok(AdapterLayer {
            path,
            kind: None,
            block_size: b,
            block_share: share,
            d_output: None,
            skew: from_values(values(&r), vec![1, rows, packed], dtype),
            scale: None,
        })
    }

    /// OFT of PEFT 0.14 to 0.15.2 is BOFT with one factor.
    fn read_squares(
        &mut self,
        path: &str,
        r: TensorData,
        s: TensorData,
    ) -> Result<AdapterLayer, String> {
        let oft = match &self.config {
            AdapterConfig::Oft(config) => config.clone(),
            AdapterConfig::Boft(_) => oft_of_squares(self.json, &self.config),
        };
        let shape = r.shape().to_vec();
        let wrong = |why: &str| {
            let key = join(path, "oft_r");
            format!("`{PREFIX}{key}` is {shape:?}: {why}")
        };
        let [rows, b, columns] = shape[..] else {
            return Err(wrong("blocks of rows and columns are three axes"));
        };
        if b != columns || b == 0 || rows == 0 {
            return Err(wrong("blocks must be squares"));
        }
        if oft.block_share && rows != 1 {
            return Err(wrong("a shared block is one"));
        }
        check_sizes([1, rows, b]).map_err(|why| wrong(&why))?;
        let (scale, _) = read_scale(path, "oft_s", &s)?;
        let o = scale.len();
        let mut squares = values(&r);
        if let Some(eps) = oft.coft_radius {
            let blocks = match (oft.block_share, oft.block) {
                (false, _) => rows,
                (true, Block::Count(count)) => count,
                (true, Block::Size(_)) => {
                    return Err(wrong(
                        "the radius of a shared block depends on the number of blocks, which the file does not hold",
                    ));
                }
            };
            project_squares(
                &mut squares,
                rows,
                b,
                eps * (o.div_ceil(blocks) as f64).powi(2),
            );
        }
        self.report.converted.push(format!(
            "`{path}` has the squares of PEFT 0.14 to 0.15.2: it is BOFT with one factor{}",
            match oft.coft_radius {
                Some(_) => ", its numbers scaled back to the radius of that time",
                None => "",
            }
        ));
        if !self.squares {
            self.squares = true;
            let dropout = self.json.get("module_dropout").and_then(Value::as_f64);
            let mut config = BoftConfig::new().with_dropout(dropout.unwrap_or(0.0));
            config.block = oft.block;
            config.init = oft.init;
            config.selection = oft.selection;
            self.config = config.into();
        }
        let dtype = widened(r.dtype());
        Ok(AdapterLayer {
            path: path.to_string(),
            // That version wrote (out, 1) for convolutions as well.
            kind: None,
            block_size: b,
            block_share: oft.block_share,
            d_output: Some(o),
            skew: from_values(pack(&squares, b), vec![1, rows, b * (b - 1) / 2], dtype),
            scale: Some(from_values(scale, vec![o], dtype)),
        })
    }
}

/// The settings of squares, read again after the configuration was made BOFT.
fn oft_of_squares(json: &Map<String, Value>, config: &AdapterConfig) -> OftConfig {
    super::config_json::read(json)
        .ok()
        .and_then(|read| match read.config {
            AdapterConfig::Oft(config) => Some(config),
            AdapterConfig::Boft(_) => None,
        })
        .unwrap_or_else(|| OftConfig {
            selection: config.selection().clone(),
            ..OftConfig::new()
        })
}

/// COFT of PEFT 0.14 to 0.15.2: every square within the radius, its symmetric part counted.
fn project_squares(squares: &mut [f64], rows: usize, b: usize, eps: f64) {
    let radius = eps / (rows as f64).sqrt();
    for square in squares.chunks_exact_mut(b * b) {
        let norm = square.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > radius {
            square.iter_mut().for_each(|x| *x *= radius / norm);
        }
    }
}

fn read_boft(path: String, r: TensorData, s: Option<TensorData>) -> Result<AdapterLayer, String> {
    let shape = r.shape().to_vec();
    let wrong = |why: String| {
        let key = join(&path, "boft_R");
        format!("`{PREFIX}{key}` is {shape:?}: {why}")
    };
    let [m, n, b, columns] = shape[..] else {
        return Err(wrong(
            "factors, blocks, rows and columns are four axes".into(),
        ));
    };
    if b != columns || b == 0 || m == 0 || n == 0 {
        return Err(wrong("factors and blocks of squares expected".into()));
    }
    check_sizes([m, n, b]).map_err(wrong)?;
    let scale = s.map(|s| read_scale(&path, "boft_s", &s)).transpose()?;
    let dtype = widened(r.dtype());
    Ok(AdapterLayer {
        path,
        kind: scale.as_ref().and_then(|(_, kind)| *kind),
        block_size: b,
        block_share: false,
        d_output: scale.as_ref().map(|(scale, _)| scale.len()),
        skew: from_values(pack(&values(&r), b), vec![m, n, b * (b - 1) / 2], dtype),
        scale: scale.map(|(scale, _)| {
            let shape = vec![scale.len()];
            from_values(scale, shape, dtype)
        }),
    })
}

/// A scale, and the kind of layer that its shape means: (out, 1) is linear, (1, out) a convolution.
fn read_scale(
    path: &str,
    name: &str,
    s: &TensorData,
) -> Result<(Vec<f64>, Option<LayerKind>), String> {
    let kind = match **s.shape() {
        [1, 1] => None,
        [o, 1] if o > 0 => Some(LayerKind::Linear),
        [1, o] if o > 0 => Some(LayerKind::Conv2d),
        ref shape => {
            let key = join(path, name);
            return Err(format!(
                "`{PREFIX}{key}` is {shape:?}: (outputs, 1) or (1, outputs) expected"
            ));
        }
    };
    Ok((values(s), kind))
}

/// Says in the model's names which layers are adapted and which modules are saved.
fn name_in_model<'a>(
    selection: &mut Selection,
    names: &KeyMap,
    layers: &[AdapterLayer],
    saved: impl Iterator<Item = &'a String>,
) -> Result<(), KeyMapError> {
    selection.modules_to_save = saved
        .map(|name| names.model_path(name))
        .collect::<Result<_, _>>()?;
    if !names.is_identity() {
        selection.target_modules = Some(TargetModules::Names(
            layers.iter().map(|layer| layer.path.clone()).collect(),
        ));
        selection.exclude_modules = None;
        selection.layers_to_transform = Vec::new();
        selection.layers_pattern = Vec::new();
    }
    Ok(())
}
