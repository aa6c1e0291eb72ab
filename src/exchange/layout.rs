//! PEFT's tensors: their keys, their shapes, and those of older versions.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{DType, FloatDType, TensorData};
use serde_json::{Map, Value};

use super::keymap::{KeyMap, join, split};
use super::layer::{AdapterLayer, SavedTensor, data, pack, unpack, values, wide};
use super::report::LoadReport;
use crate::config::{AdapterConfig, Bias, Block, BoftConfig, OftConfig, Selection, TargetModules};
use crate::error::{KeyMapError, Mismatch, SaveError};
use crate::plan::{LayerKind, adjust, fits};
use crate::target::is_saved;

/// What every key starts with.
const PREFIX: &str = "base_model.model.";

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
    let mut layers: Vec<_> = sorted
        .slots
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
    check_biases(&layers, &mut sorted.tensors, mismatch);
    reconcile(&mut config, &layers, report);
    let mut tensors = sorted.tensors;
    to_model_names(names, &mut layers, &mut tensors, mismatch)?;
    name_in_model(config.selection_mut(), names, &layers, &sorted.saved)?;
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

/// Biases of layers that are not adapted belong to `Bias::All`.
fn check_biases(layers: &[AdapterLayer], tensors: &mut [SavedTensor], mismatch: &mut Mismatch) {
    for tensor in tensors {
        let layer = layers.iter().find(|layer| layer.path == tensor.module);
        if let Some(o) = layer.and_then(|layer| layer.d_output)
            && tensor.name == "bias"
            && **tensor.data.shape() != [o]
        {
            let (module, shape) = (&tensor.module, &**tensor.data.shape());
            mismatch.wrong.push(format!(
                "the bias of `{module}` is {shape:?}, where its adapter has {o} outputs"
            ));
        }
    }
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
        if layer.is_identity() {
            self.report.warnings.push(format!(
                "`{path}` has blocks of one channel, which do not rotate; nothing is attached there"
            ));
        }
        let numbers = [Some(&layer.skew), layer.scale.as_ref()];
        if numbers
            .into_iter()
            .flatten()
            .any(|data| data.iter::<f64>().any(|value| !value.is_finite()))
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
        let dtype = wide(r.dtype());
        Ok(AdapterLayer {
            path,
            kind: None,
            block_size: b,
            block_share: share,
            d_output: None,
            skew: data(values(&r), vec![1, rows, packed], dtype),
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
        let dtype = wide(r.dtype());
        Ok(AdapterLayer {
            path: path.to_string(),
            // That version wrote (out, 1) for convolutions as well.
            kind: None,
            block_size: b,
            block_share: oft.block_share,
            d_output: Some(o),
            skew: data(pack(&squares, b), vec![1, rows, b * (b - 1) / 2], dtype),
            scale: Some(data(scale, vec![o], dtype)),
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
    if b > 1 && !n.checked_mul(b).is_some_and(|d| fits(d, b, m)) {
        return Err(wrong(format!(
            "{m} factors of block size {b} do not fit {n} blocks"
        )));
    }
    let scale = s.map(|s| read_scale(&path, "boft_s", &s)).transpose()?;
    let dtype = wide(r.dtype());
    Ok(AdapterLayer {
        path,
        kind: scale.as_ref().and_then(|(_, kind)| *kind),
        block_size: b,
        block_share: false,
        d_output: scale.as_ref().map(|(scale, _)| scale.len()),
        skew: data(pack(&values(&r), b), vec![m, n, b * (b - 1) / 2], dtype),
        scale: scale.map(|(scale, _)| {
            let shape = vec![scale.len()];
            data(scale, shape, dtype)
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

/// The block size whose strict upper triangle has this many numbers; no numbers are blocks of one.
fn block_size(packed: usize) -> Option<usize> {
    let root = packed.checked_mul(8)?.checked_add(1)?.isqrt();
    let b = root.div_ceil(2);
    (b > 0 && b.checked_mul(b - 1)? / 2 == packed).then_some(b)
}

/// Lets the configuration say what the tensors are: they decide, and the report tells.
fn reconcile(config: &mut AdapterConfig, layers: &[AdapterLayer], report: &mut LoadReport) {
    if let AdapterConfig::Boft(boft) = config {
        let said = boft.n_butterfly_factor;
        let differ = layers
            .iter()
            .filter(|layer| layer.n_butterfly_factor() != said);
        for layer in differ {
            let (path, m) = (&layer.path, layer.n_butterfly_factor());
            report.converted.push(format!(
                "`{path}` has {m} {}, not the {said} of the configuration: PEFT without its CUDA kernel trains one \
                 and does not say so",
                if m == 1 { "factor" } else { "factors" }
            ));
        }
        if let Some(m) = same(layers.iter().map(AdapterLayer::n_butterfly_factor)) {
            boft.n_butterfly_factor = m;
        }
    }
    let mut differ = false;
    for layer in layers {
        let (b, d) = (layer.block_size, layer.d_input());
        let expected = expected_block_size(config, d);
        if expected.is_some_and(|expected| expected != b) {
            differ = true;
            let path = &layer.path;
            report.converted.push(format!(
                "`{path}` has blocks of {b}, not those of {} that the configuration means",
                expected.unwrap_or_default()
            ));
        }
    }
    if differ && let Some(b) = same(layers.iter().map(|layer| layer.block_size)) {
        match config {
            AdapterConfig::Boft(config) => config.block = Block::Size(b),
            AdapterConfig::Oft(config) => config.block = Block::Size(b),
        }
    }
}

/// The block size that PEFT makes of the configuration for an axis, as far as it is known.
fn expected_block_size(config: &AdapterConfig, d_input: Option<usize>) -> Option<usize> {
    match (config, d_input) {
        (AdapterConfig::Boft(config), d) => match (config.block, d) {
            (Block::Size(b), _) => Some(b),
            (Block::Count(n), Some(d)) if d.is_multiple_of(n) => Some(d / n),
            (Block::Count(_), _) => None,
        },
        // A search for divisors, as long as PEFT's: not for the width of a layer that rotates nothing.
        (AdapterConfig::Oft(_), None) => None,
        (AdapterConfig::Oft(_), Some(d)) if d > MAX_WIDTH => None,
        (AdapterConfig::Oft(config), Some(d)) => Some(match config.block {
            Block::Size(b) => adjust(d, b),
            Block::Count(n) => d / adjust(d, n),
        }),
    }
}

/// Wider than any layer; an empty tensor can claim any width.
const MAX_WIDTH: usize = 1 << 26;

fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

/// Renames everything to the model's names, and joins the parts of fused layers.
fn to_model_names(
    names: &KeyMap,
    layers: &mut Vec<AdapterLayer>,
    tensors: &mut Vec<SavedTensor>,
    mismatch: &mut Mismatch,
) -> Result<(), KeyMapError> {
    let mut seen = BTreeMap::new();
    let mut claim = |file: &str, model: &str| match seen.insert(model.to_string(), file.to_string())
    {
        Some(first) if first != file => Err(KeyMapError::Collision {
            first,
            second: file.to_string(),
            name: model.to_string(),
        }),
        _ => Ok(()),
    };
    let mut parts: BTreeMap<String, Parts<AdapterLayer>> = BTreeMap::new();
    for mut layer in std::mem::take(layers) {
        if let Some(part) = names.part(&layer.path) {
            parts
                .entry(part.whole.clone())
                .or_default()
                .add(part, layer);
            continue;
        }
        let path = names.model_path(&layer.path)?;
        claim(&layer.path, &path)?;
        layer.path = path;
        layers.push(layer);
    }
    for (whole, parts) in parts {
        let path = names.model_path(&whole)?;
        claim(&whole, &path)?;
        match parts.join(&whole, |parts| fuse_layers(parts, path)) {
            Ok(layer) => layers.push(layer),
            Err(why) => mismatch.wrong.push(why),
        }
    }
    let mut parts: BTreeMap<(String, String), Parts<SavedTensor>> = BTreeMap::new();
    for mut tensor in std::mem::take(tensors) {
        if let Some(part) = names.part(&tensor.module) {
            let key = (part.whole.clone(), tensor.name.clone());
            parts.entry(key).or_default().add(part, tensor);
            continue;
        }
        let module = names.model_path(&tensor.module)?;
        claim(&tensor.module, &module)?;
        tensor.module = module;
        tensors.push(tensor);
    }
    for ((whole, name), parts) in parts {
        let module = names.model_path(&whole)?;
        claim(&whole, &module)?;
        match parts.join(&whole, |parts| {
            let data = parts.iter().map(|part| &part.data);
            Ok(SavedTensor {
                module,
                name,
                data: concatenate(data).ok_or("their shapes differ")?,
            })
        }) {
            Ok(tensor) => tensors.push(tensor),
            Err(why) => mismatch.wrong.push(why),
        }
    }
    Ok(())
}

/// Parts of one fused layer.
struct Parts<T> {
    names: Vec<String>,
    found: BTreeMap<usize, T>,
}

impl<T> Default for Parts<T> {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            found: BTreeMap::new(),
        }
    }
}

impl<T> Parts<T> {
    fn add(&mut self, part: super::keymap::Part, value: T) {
        self.names = part.parts;
        self.found.insert(part.index, value);
    }

    fn join<U>(
        self,
        whole: &str,
        join: impl FnOnce(Vec<T>) -> Result<U, &'static str>,
    ) -> Result<U, String> {
        let Self { names, found } = self;
        let absent: Vec<_> = (0..names.len())
            .filter(|index| !found.contains_key(index))
            .map(|index| format!("`{}`", names[index]))
            .collect();
        if !absent.is_empty() {
            let absent = absent.join(", ");
            return Err(format!(
                "`{whole}` is one layer here and {} in the file, which has nothing for {absent}",
                names.len()
            ));
        }
        let listed: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        let listed = listed.join(" and ");
        join(found.into_values().collect())
            .map_err(|why| format!("{listed} are one layer here, `{whole}`, and {why}"))
    }
}

/// The adapter of a fused layer: one rotation, and the scales one after the other.
fn fuse_layers(parts: Vec<AdapterLayer>, path: String) -> Result<AdapterLayer, &'static str> {
    let first = &parts[0];
    let alike = |part: &AdapterLayer| {
        (part.block_size, part.block_share, &part.skew)
            == (first.block_size, first.block_share, &first.skew)
    };
    if !parts.iter().all(alike) {
        return Err(
            "one layer has one rotation where theirs differ; merge the adapter in PEFT instead",
        );
    }
    let scales: Option<Vec<_>> = parts.iter().map(|part| part.scale.as_ref()).collect();
    let scale = match scales {
        Some(scales) => {
            Some(concatenate(scales.into_iter()).ok_or("their scales differ in precision")?)
        }
        None => None,
    };
    Ok(AdapterLayer {
        path,
        kind: first.kind,
        d_output: parts.iter().map(|part| part.d_output).sum(),
        scale,
        ..first.clone()
    })
}

/// Joins tensors along their first axis.
fn concatenate<'a>(parts: impl Iterator<Item = &'a TensorData>) -> Option<TensorData> {
    let parts: Vec<_> = parts.collect();
    let (dtype, shape) = (parts.first()?.dtype(), parts.first()?.shape().to_vec());
    let alike = |part: &&TensorData| {
        part.dtype() == dtype && part.rank() > 0 && part.shape()[1..] == shape[1..]
    };
    if shape.is_empty() || !parts.iter().all(alike) {
        return None;
    }
    let mut shape = shape;
    shape[0] = parts.iter().map(|part| part.shape()[0]).sum();
    let values = parts.iter().flat_map(|part| part.iter::<f64>()).collect();
    Some(data(values, shape, dtype))
}

/// Says in the model's names which layers are adapted and which modules are saved.
fn name_in_model(
    selection: &mut Selection,
    names: &KeyMap,
    layers: &[AdapterLayer],
    saved: &BTreeSet<String>,
) -> Result<(), KeyMapError> {
    selection.modules_to_save = saved
        .iter()
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

/// The tensors of an adapter as PEFT writes them.
pub(crate) fn write(
    config: &AdapterConfig,
    layers: &[AdapterLayer],
    tensors: &[SavedTensor],
    names: &KeyMap,
    dtype: Option<FloatDType>,
) -> Result<BTreeMap<String, TensorData>, SaveError> {
    let mut file = BTreeMap::new();
    for layer in layers {
        let paths = names.file_paths(&layer.path)?;
        let unrepresentable = |reason: String| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        };
        let entries = match config {
            AdapterConfig::Boft(_) => write_boft(layer, paths.len()),
            AdapterConfig::Oft(_) => write_oft(layer),
        };
        let (name, rotation, scales) = entries.map_err(unrepresentable)?;
        let stored = |data: TensorData| match dtype {
            Some(dtype) => data.convert_dtype(dtype.into()),
            None => data,
        };
        for (index, path) in paths.iter().enumerate() {
            let key = |name: &str| format!("{PREFIX}{}", join(path, name));
            let mut entries = vec![(key(name), stored(rotation.clone()))];
            if let Some(scale) = scales.get(index) {
                entries.push((key("boft_s"), stored(scale.clone())));
            }
            insert(&mut file, entries, &layer.path)?;
        }
    }
    let adapted: BTreeSet<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
    for tensor in tensors {
        let paths = names.file_paths(&tensor.module)?;
        let parts =
            split_rows(&tensor.data, paths.len()).ok_or_else(|| SaveError::Unrepresentable {
                path: join(&tensor.module, &tensor.name),
                reason: format!(
                    "its {:?} do not split into {}",
                    &**tensor.data.shape(),
                    paths.len()
                ),
            })?;
        let base_layer = match adapted.contains(tensor.module.as_str()) {
            true => "base_layer",
            false => "",
        };
        for (path, data) in paths.iter().zip(parts) {
            let name = join(&join(path, base_layer), &tensor.name);
            insert(
                &mut file,
                vec![(format!("{PREFIX}{name}"), data)],
                &tensor.module,
            )?;
        }
    }
    Ok(file)
}

fn insert(
    file: &mut BTreeMap<String, TensorData>,
    entries: Vec<(String, TensorData)>,
    path: &str,
) -> Result<(), SaveError> {
    for (key, data) in entries {
        if file.contains_key(&key) {
            return Err(SaveError::KeyMap(KeyMapError::Collision {
                first: path.to_string(),
                second: "another module".to_string(),
                name: key,
            }));
        }
        file.insert(key, data);
    }
    Ok(())
}

type Entries = (&'static str, TensorData, Vec<TensorData>);

fn write_boft(layer: &AdapterLayer, parts: usize) -> Result<Entries, String> {
    if layer.block_share {
        return Err(
            "its blocks share their numbers, and BOFT's have their own; attach the adapter to its \
             model and extract it there"
                .to_string(),
        );
    }
    let (b, dtype) = (layer.block_size, layer.skew.dtype());
    let (m, n) = (layer.n_butterfly_factor(), layer.skew.shape()[1]);
    let squares = match b {
        1 => vec![0.0; m * n],
        _ => unpack(&values(&layer.skew), b),
    };
    let rotation = data(squares, vec![m, n, b, b], dtype);
    let scale = match (&layer.scale, layer.d_output) {
        (Some(scale), _) => values(scale),
        (None, Some(o)) => vec![1.0; o],
        (None, None) => return Err("it has no scale, and BOFT has one".to_string()),
    };
    if !scale.len().is_multiple_of(parts) {
        return Err(format!(
            "its {} outputs do not split into {parts}",
            scale.len()
        ));
    }
    let each = scale.len() / parts;
    let scales = scale.chunks(each.max(1)).map(|scale| {
        let shape = match layer.kind {
            Some(LayerKind::Conv2d) => vec![1, each],
            Some(LayerKind::Linear) | None => vec![each, 1],
        };
        data(scale.to_vec(), shape, dtype)
    });
    Ok(("boft_R", rotation, scales.collect()))
}

fn write_oft(layer: &AdapterLayer) -> Result<Entries, String> {
    let [m, rows, packed] = layer.skew.shape().dims::<3>();
    if m != 1 || layer.scale.is_some() {
        return Err("OFT has one factor and no scale".to_string());
    }
    let numbers = data(values(&layer.skew), vec![rows, packed], layer.skew.dtype());
    Ok(("oft_R.weight", numbers, Vec::new()))
}

/// Splits a tensor along its first axis into equal parts.
fn split_rows(tensor: &TensorData, parts: usize) -> Option<Vec<TensorData>> {
    if parts == 1 {
        return Some(vec![tensor.clone()]);
    }
    let mut shape = tensor.shape().to_vec();
    let rows = *shape.first()?;
    if !rows.is_multiple_of(parts) {
        return None;
    }
    shape[0] = rows / parts;
    let values = values(tensor);
    let each = (values.len() / parts).max(1);
    let split = values.chunks(each);
    Some(
        split
            .map(|part| data(part.to_vec(), shape.clone(), tensor.dtype()))
            .collect(),
    )
}

/// Refuses sizes that PEFT would not make of the configuration: it could not read them back.
pub(crate) fn check_sizes(
    config: &AdapterConfig,
    layers: &[AdapterLayer],
) -> Result<(), SaveError> {
    for layer in layers {
        let unrepresentable = |reason: String| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        };
        let (b, m) = (layer.block_size, layer.n_butterfly_factor());
        if let AdapterConfig::Boft(config) = config
            && config.n_butterfly_factor != m
        {
            let said = config.n_butterfly_factor;
            return Err(unrepresentable(format!(
                "it has {m} factors where the configuration says {said}, and PEFT has one number for all layers"
            )));
        }
        let expected = expected_block_size(config, layer.d_input());
        if let Some(expected) = expected.filter(|expected| *expected != b) {
            return Err(unrepresentable(format!(
                "it has blocks of {b}, and PEFT makes blocks of {expected} of the configuration"
            )));
        }
    }
    Ok(())
}
