//! Burn's records of adapters: the parameters that `inject` adds to a model, under their paths in it.
//!
//! Records of Burn do not hold settings or the types of layers, so the records that are written here carry them as
//! metadata.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Bytes, DType, TensorData};
use burn_boft::input;
use burn_boft::tensors::to_file;
use burn_boft::value::{AdapterLayer, SavedTensor, TensorOwner, join};
use burn_boft::{Adapter, AdapterConfig, Bias, LayerKind};
use burn_pack::{Reader, Tensor, Writer};
use serde_json::{Map, Value, json};

use crate::base::Base;
use crate::conv1d;
use crate::error::Error;
use crate::output::OutputFile;

/// Where a record keeps PEFT's settings and the kinds of its layers.
const CONFIG: &str = "adapter_config";
const KINDS: &str = "layer_kinds";
/// Where a record keeps the counts of batches, which PyTorch's norms have and Burn's do not.
const BATCHES: &str = "num_batches_tracked";

/// Writes an adapter as the record of its model.
pub fn write(adapter: &Adapter, base: Option<&Base>, output: &Path) -> Result<(), Error> {
    let mut tensors = Vec::new();
    let mut kinds = Map::new();
    for layer in adapter.layers().iter().filter(|layer| !layer.is_identity()) {
        let path = layer.path();
        if layer.block_size() == 1 {
            return Err(Error::Settings(format!(
                "`{path}` has blocks of one channel, which do not rotate, and a scale, which Burn's adapters do not have \
                 alone; merge it"
            )));
        }
        if layer.block_share() && !adapter.config().block_share() {
            return Err(Error::Settings(format!(
                "`{path}` has one block for all its channels, as PEFT 0.14 and 0.15 shared it, and BOFT's settings \
                 cannot say that; convert it with --to peft --base first"
            )));
        }
        let (name, numbers) = match adapter.config().scaled_skew() {
            false => (AdapterLayer::SKEW, layer.skew().clone()),
            true => (AdapterLayer::SCALED_SKEW, layer.scaled_skew()),
        };
        tensors.push(tensor(join(path, name), numbers));
        if let Some(scale) = layer.scale() {
            tensors.push(tensor(join(path, AdapterLayer::SCALE), scale.clone()));
        }
        if let Some(kind) = layer.kind().or_else(|| kind_in(base?, path)) {
            kinds.insert(path.to_string(), json!(kind));
        }
    }
    check_idle(adapter)?;
    tensors.extend(saved(adapter, base)?);
    let config = Value::Object(adapter.settings()).to_string();
    let bytes = Writer::new(tensors)
        .with_metadata(CONFIG, &config)
        .with_metadata(KINDS, &Value::Object(kinds).to_string())
        .with_metadata(BATCHES, &Value::Object(batches(adapter)).to_string())
        .into_bytes()
        .map_err(|error| Error::malformed(output, error.to_string()))?;
    let mut file = OutputFile::create(output)?;
    file.write(&bytes)?;
    file.finish()
}

/// Refuses the bias of a layer that does not rotate, where biases are those of adapted layers: a record has nothing of such a
/// layer, so that its bias would not be read back.
fn check_idle(adapter: &Adapter) -> Result<(), Error> {
    if adapter.config().selection().bias != Bias::AdapterOnly {
        return Ok(());
    }
    let idle = adapter.layers().iter().filter(|layer| layer.is_identity());
    let idle: BTreeSet<_> = idle.map(AdapterLayer::path).collect();
    let tensors = adapter.tensors().iter();
    match tensors
        .map(SavedTensor::module)
        .find(|module| idle.contains(module))
    {
        Some(path) => Err(Error::Settings(format!(
            "`{path}` has blocks of one channel, which do not rotate, and a bias of its own, which a record cannot say; keep \
             the adapter in PEFT's folder, or merge it"
        ))),
        None => Ok(()),
    }
}

/// The counts of batches, by module.
fn batches(adapter: &Adapter) -> Map<String, Value> {
    let counts = adapter
        .tensors()
        .iter()
        .filter(|tensor| tensor.name() == BATCHES);
    let counts = counts.map(|tensor| {
        let count = tensor.data().iter::<i64>().next();
        (tensor.module().to_string(), json!(count))
    });
    counts.collect()
}

fn tensor(name: String, data: TensorData) -> Tensor {
    let (bytes, shape, dtype) = data.into_parts();
    Tensor::new(name, dtype, shape, None, bytes)
}

/// The biases and saved modules, with Burn's names and orientation.
fn saved(adapter: &Adapter, base: Option<&Base>) -> Result<Vec<Tensor>, Error> {
    let adapted: BTreeSet<_> = adapter.layers().iter().map(|layer| layer.path()).collect();
    let weights: BTreeMap<_, _> = adapter
        .tensors()
        .iter()
        .filter(|tensor| tensor.name() == "weight")
        .map(|tensor| (tensor.module(), tensor.data().rank()))
        .collect();
    let biases: BTreeSet<_> = adapter
        .tensors()
        .iter()
        .filter(|tensor| tensor.name() == "bias")
        .map(|tensor| tensor.module())
        .collect();
    let mut tensors = Vec::new();
    for saved in adapter.tensors() {
        let (module, name) = (saved.module(), saved.name());
        // Burn's norms do not count batches.
        if saved.data().dtype() == DType::I64 {
            continue;
        }
        let path = join(module, name);
        let torch = torch_name(name);
        if torch != name {
            return Err(Error::Settings(format!(
                "`{path}` has a name that means `{torch}` in Burn's norms, and would be read back as that; keep the \
                 adapter in PEFT's folder"
            )));
        }
        let rank = weights.get(module).copied().or_else(|| {
            let (_, entry) = base?.entry(&join(module, "weight"))?;
            Some(entry.shape.len())
        });
        let rank = match adapted.contains(module) {
            true => Some(2),
            false => rank,
        };
        let owner = match (name, rank) {
            ("weight", Some(1)) if !biases.contains(module) && is_activation(module) => {
                return Err(Error::Settings(format!(
                    "`{path}` may belong to a PReLU, whose weight Burn calls `alpha`, and a record cannot say so; attach the \
                     adapter to its model in Rust and save that"
                )));
            }
            (_, Some(1)) => TensorOwner::Norm,
            ("weight", Some(2)) if !biases.contains(module) => {
                return Err(Error::Settings(format!(
                    "`{path}` belongs to a linear layer or an embedding, whose weights Burn stores differently; attach \
                     the adapter to its model in Rust and save that"
                )));
            }
            ("weight", Some(2)) if conv1d::is_named(module) => {
                return Err(Error::Settings(format!(
                    "`{path}` has a name of GPT-2's layers, whose weights are stored the other way round; attach the adapter \
                     to its model in Rust and save that"
                )));
            }
            (_, Some(2)) => TensorOwner::Linear,
            ("bias", None) => {
                return Err(Error::Settings(format!(
                    "`{path}` belongs to a linear layer or a norm, whose biases Burn names differently; pass --base so that \
                     the layer type can be looked up"
                )));
            }
            _ => TensorOwner::Other,
        };
        let (name, data) = saved.to_burn(owner);
        tensors.push(tensor(join(module, name), data));
    }
    Ok(tensors)
}

/// Whether a module has a name of activation functions. With a weight for each channel it is a PReLU, and a norm without a bias
/// has the same tensors; only the name tells them apart.
fn is_activation(module: &str) -> bool {
    let name = module.rsplit('.').next().unwrap_or(module).to_lowercase();
    (name.contains("relu") || name.starts_with("act")) && !name.contains("norm")
}

/// PyTorch's name of a tensor that Burn calls this. Only the tensors of norms have other names in Burn.
fn torch_name(name: &str) -> String {
    let empty = TensorData::new(Vec::<f32>::new(), [0]);
    let tensor = SavedTensor::from_burn("", name, empty, TensorOwner::Norm);
    tensor.name().to_string()
}

/// The layer whose tensor has this name in a record, where tensors of its kind are called `own`.
fn layer_of<'a>(name: &'a str, own: &str) -> Option<&'a str> {
    match name.strip_suffix(own)? {
        "" => Some(""),
        path => path.strip_suffix('.'),
    }
}

/// The kind of a layer by its weight's axes.
pub fn kind_in(base: &Base, path: &str) -> Option<LayerKind> {
    let (_, entry) = base.entry(&join(path, "weight"))?;
    LayerKind::of_rank(entry.shape.len())
}

/// The error where nothing says which kind a layer is.
pub fn unknown_kind(path: &str) -> Error {
    Error::Settings(format!(
        "PEFT stores linear layers and convolutions differently, and nothing says which of them `{path}` is; pass --base \
         so that the layer type can be looked up"
    ))
}

/// Reads the adapter of a record, with these settings or else those of the record.
pub fn read(
    path: &Path,
    settings: Option<Map<String, Value>>,
    base: Option<&Base>,
) -> Result<Adapter, Error> {
    let malformed = |reason: String| Error::malformed(path, format!("not a Burn record: {reason}"));
    let bytes = input::read(path, u64::MAX).map_err(Error::read(path))?;
    let reader = Reader::from_bytes(Bytes::from_bytes_vec(bytes))
        .map_err(|error| malformed(error.to_string()))?;
    let object = |key: &str| -> Result<Option<Map<String, Value>>, Error> {
        let Some(text) = reader.metadata().get(key) else {
            return Ok(None);
        };
        let refuse = |error| {
            malformed(format!(
                "`{key}` of its metadata is not a JSON object: {error}"
            ))
        };
        serde_json::from_str(text).map(Some).map_err(refuse)
    };
    let kinds = object(KINDS)?.unwrap_or_default();
    let batches = object(BATCHES)?.unwrap_or_default();
    let settings = match settings {
        Some(settings) => Some(settings),
        None => object(CONFIG)?,
    };
    let settings = settings.ok_or_else(|| {
        Error::malformed(path, "it does not hold the settings of the adapter; pass --config with its adapter_config.json")
    })?;
    let config: AdapterConfig = serde_json::from_value(Value::Object(settings.clone()))
        .map_err(|error| Error::malformed(path, format!("its settings are refused: {error}")))?;
    let mut tensors = BTreeMap::new();
    for tensor in reader
        .into_tensors()
        .map_err(|error| malformed(error.to_string()))?
    {
        let (name, dtype, shape, _, bytes) = tensor
            .into_parts()
            .map_err(|error| malformed(error.to_string()))?;
        let data = TensorData::try_from_bytes(bytes, shape, dtype)
            .map_err(|error| Error::tensor(path, &name, format!("cannot be read: {error}")))?;
        tensors.insert(name, data);
    }
    let reader = RecordReader {
        path,
        config,
        kinds,
        batches,
        base,
        tensors,
    };
    Ok(reader.read()?.with_about(&settings))
}

struct RecordReader<'a> {
    path: &'a Path,
    config: AdapterConfig,
    kinds: Map<String, Value>,
    batches: Map<String, Value>,
    base: Option<&'a Base>,
    tensors: BTreeMap<String, TensorData>,
}

impl RecordReader<'_> {
    fn read(mut self) -> Result<Adapter, Error> {
        let (plain, scaled) = (
            self.rotations(AdapterLayer::SKEW),
            self.rotations(AdapterLayer::SCALED_SKEW),
        );
        let refuse = |why: String| Err(Error::malformed(self.path, why));
        let is_scaled = match (plain.first_key_value(), scaled.first_key_value()) {
            (Some(_), None) => false,
            (None, Some(_)) => true,
            (None, None) => {
                let end = AdapterLayer::SKEW;
                return refuse(format!(
                    "it holds no adapter: no tensor has a name that ends with `{end}`"
                ));
            }
            (Some((plain, _)), Some((scaled, _))) => {
                return refuse(format!(
                    "`{scaled}` has a scaled skew and `{plain}` a plain one, and one adapter has one kind"
                ));
            }
        };
        let rotations = if is_scaled { scaled } else { plain };
        let layers = rotations.iter();
        let layers = layers.map(|(path, numbers)| self.layer(path, numbers, is_scaled));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let mut saved = Vec::new();
        for (name, data) in &self.tensors {
            saved.extend(self.saved(name, data, |module| rotations.contains_key(module))?);
        }
        for (module, count) in &self.batches {
            let count = count.as_i64().ok_or_else(|| {
                let why =
                    format!("the count of batches of `{module}` is {count}, not a whole number");
                Error::malformed(self.path, why)
            })?;
            let count = TensorData::new(vec![count], Vec::<usize>::new());
            saved.push(SavedTensor::new(module, BATCHES, count));
        }
        self.config.set_scaled_skew(is_scaled);
        Adapter::from_parts(self.config, layers, saved)
            .map_err(|mismatch| Error::malformed(self.path, mismatch.to_string()))
    }

    /// The numbers of the rotations that have this name, by layer.
    fn rotations(&self, name: &str) -> BTreeMap<&str, &TensorData> {
        let tensors = self.tensors.iter();
        tensors
            .filter_map(|(full, numbers)| Some((layer_of(full, name)?, numbers)))
            .collect()
    }

    fn layer(
        &self,
        layer: &str,
        numbers: &TensorData,
        is_scaled: bool,
    ) -> Result<AdapterLayer, Error> {
        let scale = self.tensors.get(&join(layer, AdapterLayer::SCALE));
        let told = self
            .kinds
            .get(layer)
            .and_then(|kind| serde_json::from_value(kind.clone()).ok());
        let kind = match (self.config.scale(), scale) {
            // Without a scale, only an embedding is stored in another way than other layers.
            (false, _) => told.filter(|kind| *kind == LayerKind::Embedding),
            (_, Some(_)) => {
                let kind = told.or_else(|| kind_in(self.base?, layer));
                Some(kind.ok_or_else(|| unknown_kind(layer))?)
            }
            (_, None) => {
                let why = "has no scale, and PEFT's BOFT has one";
                return Err(Error::tensor(self.path, layer, why));
            }
        };
        let (numbers, scale) = (numbers.clone(), scale.cloned());
        let layer = match is_scaled {
            true => AdapterLayer::from_scaled_skew(layer, kind, numbers, scale),
            false => AdapterLayer::new(layer, kind, numbers, scale),
        };
        layer.map_err(|mismatch| Error::malformed(self.path, mismatch.to_string()))
    }

    /// Whether a module has no tensors but those of a norm in Burn, nor modules with tensors. A `gamma` among others is a
    /// number of the model's own, as for the scale of a layer, and has the same name in PyTorch.
    fn is_norm(&self, module: &str) -> bool {
        const NORM: [&str; 4] = ["gamma", "beta", "running_mean", "running_var"];
        let start = match module {
            "" => String::new(),
            module => format!("{module}."),
        };
        let names = self.tensors.range(start.clone()..).map(|(name, _)| name);
        let mut own = names.map_while(|name| name.strip_prefix(&start));
        own.all(|name| NORM.contains(&name))
    }

    /// A bias or a part of a saved module, with PyTorch's name and orientation.
    fn saved(
        &self,
        name: &str,
        data: &TensorData,
        is_adapted: impl Fn(&str) -> bool,
    ) -> Result<Option<SavedTensor>, Error> {
        let (module, own) = name.rsplit_once('.').unwrap_or(("", name));
        let selection = self.config.selection();
        let is_norm = self.is_norm(module);
        let is_bias = (own == "bias" || own == "beta" && is_norm)
            && match selection.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::AdapterOnly => is_adapted(module),
            };
        let parts = [
            AdapterLayer::SKEW,
            AdapterLayer::SCALED_SKEW,
            AdapterLayer::SCALE,
        ];
        let is_rotation = parts.iter().any(|end| name.ends_with(end));
        if is_rotation || !(is_bias || selection.saves(module)) {
            return Ok(None);
        }
        if to_file(data.dtype()).is_none() {
            let why = format!("is {}, which no file keeps", data.dtype().name());
            return Err(Error::tensor(self.path, name, why));
        }
        let has_bias = self.tensors.contains_key(&join(module, "bias"));
        let owner = match (own, data.rank()) {
            ("weight", 2) if !has_bias => {
                return Err(Error::tensor(
                    self.path,
                    name,
                    "belongs to a linear layer or an embedding, whose weights Burn stores differently; extract the adapter \
                     from its model in Rust",
                ));
            }
            ("weight", 2) => TensorOwner::Linear,
            _ if is_norm => TensorOwner::Norm,
            _ => TensorOwner::Other,
        };
        let tensor = SavedTensor::from_burn(module, own, data.clone(), owner);
        Ok(Some(tensor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_skew_says_its_layer_also_where_the_layer_is_the_whole_model() {
        let layer = |name| layer_of(name, AdapterLayer::SKEW);
        assert_eq!(layer("block.fc.weight.boft.skew"), Some("block.fc"));
        assert_eq!(layer("weight.boft.skew"), Some(""));
        assert_eq!(layer("my_weight.boft.skew"), None);
        assert_eq!(layer("block.fc.weight.boft.scale"), None);
        assert_eq!(layer("block.fc.weight.boft.scaled_skew"), None);
    }

    #[test]
    fn only_the_tensors_of_norms_have_other_names_in_pytorch() {
        assert_eq!(
            [torch_name("gamma"), torch_name("beta")],
            ["weight", "bias"]
        );
        assert_eq!(torch_name("running_mean"), "running_mean");
    }
}
