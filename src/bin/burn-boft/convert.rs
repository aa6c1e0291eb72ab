//! `convert`: an adapter in another form.

use burn::tensor::TensorData;
use burn_boft::{
    Adapter, AdapterConfig, AdapterLayer, BoftConfig, Cayley, LayerKind, LoadOptions, OftConfig,
};
use serde_json::{Map, Value};

use crate::base::Base;
use crate::cli::{Convert, Form};
use crate::error::Error;
use crate::merge::load;
use crate::names::{Names, join};
use crate::output::{check_free, check_outside};
use crate::peft::{Tensors, ones};
use crate::{lora, record, settings};

pub fn run(options: &Convert) -> Result<(), Error> {
    let names = Names::parse(&options.maps)?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    check_free(&options.output)?;
    check_outside(&options.output, &options.input)?;
    if let Some(rank) = options.to_lora {
        let (adapter, settings) = read(options, &Names::default(), base.as_ref())?;
        let base = base.ok_or_else(|| needs_base("--to-lora"))?;
        return lora::write(
            &adapter,
            &settings,
            &base,
            &names,
            rank as usize,
            &options.output,
        );
    }
    let (adapter, settings) = read(options, &names, base.as_ref())?;
    let adapter = match options.to {
        Some(Form::Oft) => to_oft(&adapter, &settings)?,
        Some(Form::Boft) => to_boft(&adapter, &settings, base.as_ref())?,
        Some(Form::Peft) => with_kinds(adapter, &settings, base.as_ref())?,
        _ => adapter,
    };
    match options.to {
        Some(Form::Record) => {
            let settings = settings_of(adapter.config(), &settings)?;
            record::write(&adapter, &settings, base.as_ref(), &options.output)?;
        }
        _ => adapter.save(&options.output)?,
    }
    println!(
        "{}: {} layers",
        options.output.display(),
        adapter.layers().len()
    );
    Ok(())
}

fn needs_base(what: &str) -> Error {
    Error::Settings(format!(
        "{what} needs --base, the model that the adapter is for"
    ))
}

/// Reads the adapter, which is a folder or a record.
fn read(
    options: &Convert,
    names: &Names,
    base: Option<&Base>,
) -> Result<(Adapter, Map<String, Value>), Error> {
    let input = &options.input;
    if input.is_file() {
        let settings = options
            .config
            .as_deref()
            .map(settings::read_file)
            .transpose()?;
        return record::read(input, settings, base);
    }
    if options.config.is_some() {
        let refused = "--config is for a record; a folder has its own settings".to_string();
        return Err(Error::Settings(refused));
    }
    let load_options = LoadOptions::new().with_key_map(names.to_key_map()?);
    Ok((load(input, &load_options)?, settings::read(input)?))
}

/// The settings as PEFT writes them, with where the adapter comes from.
fn settings_of(
    config: &AdapterConfig,
    from: &Map<String, Value>,
) -> Result<Map<String, Value>, Error> {
    let json = serde_json::to_value(config).map_err(|error| Error::Settings(error.to_string()))?;
    let Value::Object(mut json) = json else {
        return Err(Error::Settings("the settings are no JSON object".into()));
    };
    for key in settings::ABOUT {
        if let Some(value) = from.get(key) {
            json.insert(key.to_string(), value.clone());
        }
    }
    Ok(json)
}

/// The adapter with the kind of every layer that has a scale: of old versions the file does not tell.
fn with_kinds(
    adapter: Adapter,
    settings: &Map<String, Value>,
    base: Option<&Base>,
) -> Result<Adapter, Error> {
    let is_unknown = |layer: &AdapterLayer| layer.kind().is_none() && layer.d_output() > Some(1);
    let Some(unknown) = adapter.layers().iter().find(|layer| is_unknown(layer)) else {
        return Ok(adapter);
    };
    let base = base.ok_or_else(|| record::unknown_kind(unknown.path()))?;
    let mut tensors = Tensors::default();
    for layer in adapter.layers() {
        let place = Place::find(layer, base)?;
        let scale = layer.scale().cloned();
        let scale = scale.unwrap_or_else(|| ones(place.d_output, layer.skew().dtype()));
        tensors.push_boft(layer.path(), &place.skew(layer), scale, place.kind);
    }
    assemble(&adapter, tensors, adapter.config(), settings)
}

/// The layer of the model that an adapter's layer is for.
struct Place {
    kind: LayerKind,
    d_input: usize,
    d_output: usize,
}

impl Place {
    fn find(layer: &AdapterLayer, base: &Base) -> Result<Self, Error> {
        let key = join(layer.path(), "weight");
        let refuse = |why: String| Error::tensor(&base.path, &key, why);
        let (_, entry) = base.entry(&key).ok_or_else(|| {
            refuse(
                "is not there, and the adapter has a layer of that name; --map bridges names"
                    .into(),
            )
        })?;
        let kind = record::kind_in(base, layer.path())
            .ok_or_else(|| refuse("is neither a matrix nor a convolution".into()))?;
        let d_input: usize = entry.shape[1..].iter().product();
        let b = layer.block_size();
        if layer.d_input().is_some_and(|d| d != d_input) || !d_input.is_multiple_of(b) {
            let why = format!(
                "is {:?}, and the adapter rotates blocks of {b}",
                entry.shape
            );
            return Err(refuse(why));
        }
        Ok(Self {
            kind,
            d_input,
            d_output: entry.shape[0],
        })
    }

    /// The numbers of a layer, those of a shared block as often as there are blocks.
    fn skew(&self, layer: &AdapterLayer) -> TensorData {
        let skew = layer.skew();
        if !layer.block_share() {
            return skew.clone();
        }
        let numbers: Vec<f64> = skew.iter::<f64>().collect();
        let blocks = self.d_input / layer.block_size();
        TensorData::new(numbers.repeat(blocks), [1, blocks, numbers.len()])
            .convert_dtype(skew.dtype())
    }
}

/// BOFT with one factor and a scale of ones is OFT with the exact map.
fn to_oft(adapter: &Adapter, settings: &Map<String, Value>) -> Result<Adapter, Error> {
    let AdapterConfig::Boft(config) = adapter.config() else {
        return Err(Error::Settings("the adapter is OFT already".into()));
    };
    let mut tensors = Tensors::default();
    for layer in adapter.layers() {
        let refuse = |why: String| Error::Settings(format!("`{}` {why}", layer.path()));
        if layer.n_butterfly_factor() != 1 {
            let m = layer.n_butterfly_factor();
            return Err(refuse(format!(
                "has {m} factors, and OFT has one; convert it with --to-lora, or merge it"
            )));
        }
        let scales = layer
            .scale()
            .into_iter()
            .flat_map(|scale| scale.iter::<f64>());
        if let Some(scale) = scales.into_iter().find(|scale| *scale != 1.0) {
            return Err(refuse(format!(
                "has a scale of {scale}, and OFT has none; convert it with --to-lora, or merge it"
            )));
        }
        tensors.push_oft(layer.path(), layer.skew());
    }
    let mut oft = OftConfig::new();
    (oft.block, oft.init, oft.selection) = (config.block, config.init, config.selection.clone());
    // Of PEFT 0.14 and 0.15, whose squares are read as BOFT, one block may serve a layer.
    oft.block_share = adapter.layers().iter().any(AdapterLayer::block_share);
    assemble(adapter, tensors, &oft.into(), settings)
}

/// OFT with the exact map is BOFT with one factor and a scale of ones.
fn to_boft(
    adapter: &Adapter,
    settings: &Map<String, Value>,
    base: Option<&Base>,
) -> Result<Adapter, Error> {
    let AdapterConfig::Oft(config) = adapter.config() else {
        return Err(Error::Settings("the adapter is BOFT already".into()));
    };
    let refuse = |why: &str| {
        Err(Error::Settings(format!(
            "{why}; convert it with --to-lora, or merge it"
        )))
    };
    if config.cayley != Cayley::Exact {
        return refuse(
            "the adapter's Neumann polynomial is not orthogonal, and BOFT's map is exact",
        );
    }
    if config.coft_radius.is_some() {
        return refuse("the adapter is bound to a COFT radius, and BOFT has none");
    }
    let base = base.ok_or_else(|| needs_base("--to boft"))?;
    let mut tensors = Tensors::default();
    for layer in adapter.layers() {
        let place = Place::find(layer, base)?;
        let scale = ones(place.d_output, layer.skew().dtype());
        tensors.push_boft(layer.path(), &place.skew(layer), scale, place.kind);
    }
    let mut boft = BoftConfig::new();
    (boft.block, boft.init, boft.selection) = (config.block, config.init, config.selection.clone());
    assemble(adapter, tensors, &boft.into(), settings)
}

fn assemble(
    adapter: &Adapter,
    mut tensors: Tensors,
    config: &AdapterConfig,
    settings: &Map<String, Value>,
) -> Result<Adapter, Error> {
    for tensor in adapter.tensors() {
        let is_adapted = adapter
            .layers()
            .iter()
            .any(|layer| layer.path() == tensor.module());
        tensors.push_saved(tensor, is_adapted);
    }
    tensors.into_adapter(&settings_of(config, settings)?)
}
