//! `convert`: an adapter in another form.

use std::path::Path;

use burn::tensor::{Device, TensorData};
use burn_boft::dialects::{AdapterFile, DialectError, Misplaced};
use burn_boft::peft::read_settings;
use burn_boft::tensors::{from_values, values};
use burn_boft::value::{AdapterLayer, Axis, join};
use burn_boft::{Adapter, AdapterConfig, BoftConfig, Cayley, KeyMap, LayerKind, OftConfig};
use serde_json::json;

use crate::attention;
use crate::base::Base;
use crate::cli::{Convert, To};
use crate::conv1d::Orientation;
use crate::error::Error;
use crate::load::{Given, Loaded, Share, load, place};
use crate::names::Names;
use crate::output::{Form, OutputFile, OutputFolder, check_free, check_outside};
use crate::terminal::{plural, report};
use crate::tie::Head;
use crate::{lora, record, sd_scripts};

pub fn run(options: &Convert, json: bool) -> Result<(), Error> {
    let names = Names::parse(&options.maps)?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    let form = match options.to {
        Some(To::Record | To::SdScripts) => Form::File,
        _ => Form::Folder,
    };
    check_free(&options.output, form)?;
    check_outside(&options.output, &options.input)?;
    let given = is_tensors(&options.input).then(|| Given::open(&options.input));
    let input = match given.transpose()? {
        Some(Given::File(file)) => return of_file(options, file, base.as_ref(), names, json),
        Some(Given::Folder(folder)) => folder,
        None => options.input.clone(),
    };
    if options.part.is_some() && options.to != Some(To::SdScripts) {
        let refused = "--part is for files of other programs".to_string();
        return Err(Error::Settings(refused));
    }
    if let Some(rank) = options.to_lora {
        let adapter = read(options, &input, Names::default(), base.as_ref())?;
        let base = base.ok_or_else(|| needs_base("--to-lora"))?;
        return to_lora(options, adapter, &base, names, rank, json);
    }
    let adapter = read(options, &input, names, base.as_ref())?;
    if options.to == Some(To::SdScripts) {
        let base = base.ok_or_else(|| needs_base("--to sd-scripts"))?;
        return to_sd_scripts(options, &adapter, &base, json);
    }
    let adapter = write(options, adapter, base.as_ref())?;
    tell(options, &adapter, None, json)
}

/// Converts a file of another program.
fn of_file(
    options: &Convert,
    file: AdapterFile,
    base: Option<&Base>,
    names: Names,
    json: bool,
) -> Result<(), Error> {
    let base = base.ok_or_else(|| needs_base("a file of another program"))?;
    if options.config.is_some() {
        let refused = "--config is for a record; the file has no use for it".to_string();
        return Err(Error::Settings(refused));
    }
    let adapter = place(file, options.part.as_deref(), base, &names)?;
    refuse_projections(&adapter, base)?;
    let adapter = share(options).of(adapter, &options.input)?;
    if let Some(rank) = options.to_lora {
        return to_lora(options, adapter, base, Names::default(), rank, json);
    }
    let mut layers = adapter.layers().iter();
    if let Some(layer) = layers.find(|layer| layer.axis() == Axis::Output) {
        return Err(Error::Settings(format!(
            "`{}` rotates its outputs, and every form but a LoRA rotates inputs: no rotation of the inputs does the same; merge \
             it, or convert it with --to-lora",
            layer.path()
        )));
    }
    if options.to == Some(To::SdScripts) {
        let refused = "--to sd-scripts takes PEFT's folder; convert the file to PEFT first";
        return Err(Error::Settings(refused.into()));
    }
    let written = write(options, adapter.clone(), Some(base))?;
    let error = match options.to {
        Some(To::Record) => None,
        _ => {
            let (after, _) = Adapter::load(&options.output)?;
            Some(difference(&adapter, &after, base)?)
        }
    };
    tell(options, &written, error, json)
}

/// Refuses a third of a tensor that holds three projections: every form but a merged model has adapters of modules alone.
fn refuse_projections(adapter: &Adapter, base: &Base) -> Result<(), Error> {
    let has = |key: &str| base.entry(key).is_some();
    let layers = adapter.layers().iter().map(AdapterLayer::path);
    let mut others = layers.filter(|path| !has(&join(path, "weight")));
    let third = others.find_map(|path| Some((path, attention::place(path, "weight", has)?)));
    match third {
        None => Ok(()),
        Some((path, place)) => Err(Error::Settings(format!(
            "`{path}` is a third of the rows of `{}`, which only a merged model can say; merge it, or convert it for \
             the same model in diffusers' layout",
            attention::key(&place, "weight")
        ))),
    }
}

/// Writes the nearest LoRA.
fn to_lora(
    options: &Convert,
    adapter: Adapter,
    base: &Base,
    names: Names,
    rank: u32,
    json: bool,
) -> Result<(), Error> {
    let head = Head::of(base)?;
    let of = Loaded {
        path: options.input.clone(),
        share: share(options),
        adapter,
        names: names.for_model(&head),
    };
    lora::write(&of, base, &head, rank as usize, &options.output, json)
}

/// How much of the adapter is written.
fn share(options: &Convert) -> Share {
    Share {
        strength: options.strength,
        factors: options.factors,
    }
}

/// Writes an adapter as sd-scripts stores it. The exact map is that of BOFT there, also for OFT.
fn to_sd_scripts(
    options: &Convert,
    adapter: &Adapter,
    base: &Base,
    json: bool,
) -> Result<(), Error> {
    let head = Head::of(base)?;
    let orientation = Orientation::of(base, &head);
    let config = || adapter.config().clone();
    let known = match adapter.config() {
        AdapterConfig::Oft(oft) if oft.cayley == Cayley::Exact => to_boft(adapter, Some(base))?,
        AdapterConfig::Oft(_) => assemble(adapter, config(), |layer| {
            let kind = Some(Place::find(layer, base, &orientation)?.kind);
            let skew = layer.skew().clone();
            Ok(AdapterLayer::new(layer.path(), kind, skew, None)?)
        })?,
        _ => assemble(adapter, config(), |layer| {
            Place::find(layer, base, &orientation)?.layer(layer)
        })?,
    };
    let start = options.part.as_deref().unwrap_or("lora_unet_");
    let bytes = sd_scripts::to_bytes(&known, start, &options.output)?;
    // Read back before anything is written.
    let file = AdapterFile::from_bytes(&options.output, &bytes)?;
    let after = file.adapter(&base.weighted_modules(), &KeyMap::new());
    let after = after.map_err(|error| misnamed(error, start))?;
    let error = difference(adapter, &after, base)?;
    let mut output = OutputFile::create(&options.output)?;
    output.write(&bytes)?;
    output.finish()?;
    tell(options, &known, Some(error), json)
}

/// The error of names that start so, of which one would find no module.
fn misnamed(error: DialectError, start: &str) -> Error {
    let DialectError::Misplaced { path, misplaced } = &error else {
        return error.into();
    };
    let lost = misplaced.iter().find_map(|misplaced| match misplaced {
        Misplaced::Nowhere { module, .. } => Some(module),
        _ => None,
    });
    match lost {
        None => error.into(),
        Some(module) => Error::malformed(
            path,
            format!(
                "with --part {start:?} a layer would be called `{module}`, which is not how a file names any module of the model; \
                 start names as sd-scripts does, with lora_unet_ or lora_te_"
            ),
        ),
    }
}

/// The largest difference between two numbers of the rotations or the scales of two adapters for one model. Where there is no
/// scale, it is ones.
fn difference(before: &Adapter, after: &Adapter, base: &Base) -> Result<f64, Error> {
    let head = Head::of(base)?;
    let orientation = Orientation::of(base, &head);
    let mut largest = 0.0f64;
    for (a, b) in before.layers().iter().zip(after.layers()) {
        let place = Place::find(a, base, &orientation)?;
        let widths = [place.d_input, place.d_output];
        let numbers = |adapter: &Adapter, layer: &AdapterLayer| -> Result<Vec<f64>, Error> {
            let blocks = adapter.rotation(layer, widths, &Device::flex())?;
            let mut all = blocks.map_or(Vec::new(), |blocks| values(&blocks.values().into_data()));
            let ones = || vec![1.0; place.d_output];
            all.extend(layer.scale().map_or_else(ones, values));
            Ok(all)
        };
        let (one, other) = (numbers(before, a)?, numbers(after, b)?);
        if a.path() != b.path() || one.len() != other.len() {
            let reason = "was written and is read back as another layer";
            return Err(Error::malformed(Path::new(b.path()), reason));
        }
        let differences = one.iter().zip(&other).map(|(x, y)| (x - y).abs());
        largest = differences.fold(largest, f64::max);
    }
    Ok(largest)
}

/// Says what has been written, and how far it is from the input where that was measured.
fn tell(
    options: &Convert,
    adapter: &Adapter,
    difference: Option<f64>,
    json: bool,
) -> Result<(), Error> {
    let (output, layers) = (options.output.display(), adapter.layers().len());
    let mut text = format!("{output}: {}", plural(layers, "layer"));
    if let Some(difference) = difference {
        text.push_str(&format!(
            "; their rotations and scales differ from those of the input by {difference:.1e}"
        ));
    }
    let value = json!({
        "output": output.to_string(),
        "method": adapter.config().to_string(),
        "layers": layers,
        "saved_tensors": adapter.tensors().len(),
        "difference": difference,
    });
    report(json, &format!("{text}\n"), &value)
}

/// Writes an adapter in the form that is asked for, and returns it in that form.
fn write(options: &Convert, adapter: Adapter, base: Option<&Base>) -> Result<Adapter, Error> {
    let adapter = match options.to {
        Some(To::Oft) => to_oft(&adapter)?,
        Some(To::Boft) => to_boft(&adapter, base)?,
        Some(To::Peft) => with_kinds(adapter, base)?,
        _ => adapter,
    };
    if options.to == Some(To::Record) {
        record::write(&adapter, base, &options.output)?;
        return Ok(adapter);
    }
    let folder = OutputFolder::create(&options.output)?;
    adapter
        .save(folder.temporary())
        .map_err(|error| folder.named(error.into()))?;
    folder.finish()?;
    Ok(adapter)
}

/// Whether a path is named as a file of tensors. A file of any other name is a record.
fn is_tensors(path: &Path) -> bool {
    let is_named = path
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    is_named && path.is_file()
}

fn needs_base(what: &str) -> Error {
    Error::Settings(format!(
        "{what} needs --base, the model that the adapter is for"
    ))
}

/// Reads the adapter, which is a folder or a record.
fn read(
    options: &Convert,
    input: &Path,
    names: Names,
    base: Option<&Base>,
) -> Result<Adapter, Error> {
    if input.is_file() {
        let settings = options.config.as_deref().map(read_settings).transpose()?;
        return share(options).of(record::read(input, settings, base)?, input);
    }
    if options.config.is_some() {
        let refused = "--config is for a record; a folder has its own settings".to_string();
        return Err(Error::Settings(refused));
    }
    let adapter = load(input, names.into_key_map(), options.reading)?;
    share(options).of(adapter, input)
}

/// The adapter with the kind of every layer that has a scale. Files of old versions do not say it.
fn with_kinds(adapter: Adapter, base: Option<&Base>) -> Result<Adapter, Error> {
    let is_unknown = |layer: &AdapterLayer| layer.kind().is_none() && layer.d_output() > Some(1);
    let Some(unknown) = adapter.layers().iter().find(|layer| is_unknown(layer)) else {
        return Ok(adapter);
    };
    let base = base.ok_or_else(|| record::unknown_kind(unknown.path()))?;
    let head = Head::of(base)?;
    let orientation = Orientation::of(base, &head);
    assemble(&adapter, adapter.config().clone(), |layer| {
        Place::find(layer, base, &orientation)?.layer(layer)
    })
}

/// The layer of the model that an adapter's layer is for.
struct Place {
    kind: LayerKind,
    d_input: usize,
    d_output: usize,
}

impl Place {
    fn find(layer: &AdapterLayer, base: &Base, orientation: &Orientation) -> Result<Self, Error> {
        let key = join(layer.path(), "weight");
        let refuse = |why: String| Error::tensor(&base.path, &key, why);
        let (shard, entry) = base.entry(&key).ok_or_else(|| {
            refuse(
                "is not there, and the adapter has a layer of that name; use --map to rename modules"
                    .into(),
            )
        })?;
        if let Some(why) = orientation.refusal(layer.path()) {
            return Err(refuse(why.into()));
        }
        let shape = &entry.shape;
        let kind = layer.check_fit(shape).map_err(|why| {
            Error::malformed(
                &shard.path,
                format!(
                    "the adapter of `{}`{why}; `{key}` is {shape:?}",
                    layer.path()
                ),
            )
        })?;
        shard.check_numbers(entry)?;
        Ok(Self {
            kind,
            d_input: shape[1..].iter().product(),
            d_output: shape[0],
        })
    }

    /// The layer as BOFT has it: with its kind, a scale, and a copy of a shared block for each of its blocks.
    fn layer(&self, layer: &AdapterLayer) -> Result<AdapterLayer, Error> {
        let (skew, dtype) = (layer.skew().clone(), layer.skew().dtype());
        let skew = match layer.block_share() {
            false => skew,
            true => {
                let numbers = values(&skew);
                let blocks = self.d_input / layer.block_size();
                from_values(numbers.repeat(blocks), [1, blocks, numbers.len()], dtype)
            }
        };
        let ones = || TensorData::new(vec![1.0f32; self.d_output], [self.d_output]);
        let scale = layer.scale().cloned().unwrap_or_else(ones);
        Ok(AdapterLayer::new(
            layer.path(),
            Some(self.kind),
            skew,
            Some(scale),
        )?)
    }
}

/// BOFT with one factor and a scale of ones is OFT with the exact map.
fn to_oft(adapter: &Adapter) -> Result<Adapter, Error> {
    let AdapterConfig::Boft(config) = adapter.config() else {
        return Err(Error::Settings(
            "the adapter is an OFT adapter already".into(),
        ));
    };
    let mut oft = OftConfig::new();
    (oft.block, oft.init, oft.selection) = (config.block, config.init, config.selection.clone());
    oft.scaled_skew = config.scaled_skew;
    // The squares of PEFT 0.14 and 0.15 are read as BOFT, and in them one block may serve a whole layer.
    oft.block_share = adapter.layers().iter().any(AdapterLayer::block_share);
    assemble(adapter, oft.into(), |layer| {
        let refuse = |why: String| Error::Settings(format!("`{}` {why}", layer.path()));
        if layer.n_butterfly_factor() != 1 {
            let m = layer.n_butterfly_factor();
            return Err(refuse(format!(
                "has {m} factors, and OFT has one; convert it with --to-lora, or merge it"
            )));
        }
        let mut scales = layer
            .scale()
            .into_iter()
            .flat_map(|scale| scale.iter::<f64>());
        if let Some(scale) = scales.find(|scale| *scale != 1.0) {
            return Err(refuse(format!(
                "has a scale of {scale}, and OFT has none; convert it with --to-lora, or merge it"
            )));
        }
        let skew = layer.skew().clone();
        Ok(AdapterLayer::new(layer.path(), None, skew, None)?)
    })
}

/// OFT with the exact map is BOFT with one factor and a scale of ones.
fn to_boft(adapter: &Adapter, base: Option<&Base>) -> Result<Adapter, Error> {
    let AdapterConfig::Oft(config) = adapter.config() else {
        return Err(Error::Settings(
            "the adapter is a BOFT adapter already".into(),
        ));
    };
    let refuse = |why: String| {
        Err(Error::Settings(format!(
            "{why}; convert it with --to-lora, or merge it"
        )))
    };
    if config.cayley != Cayley::Exact {
        let map = config.cayley;
        return refuse(format!("the adapter uses {map}, and BOFT the exact one"));
    }
    if config.coft_radius.is_some() {
        return refuse("the adapter is bound to a COFT radius, and BOFT has none".into());
    }
    let base = base.ok_or_else(|| needs_base("--to boft"))?;
    let head = Head::of(base)?;
    let orientation = Orientation::of(base, &head);
    let mut boft = BoftConfig::new();
    (boft.block, boft.init, boft.selection) = (config.block, config.init, config.selection.clone());
    boft.scaled_skew = config.scaled_skew;
    assemble(adapter, boft.into(), |layer| {
        if layer.kind() == Some(LayerKind::Embedding) {
            let path = layer.path();
            return Err(Error::Settings(format!(
                "`{path}` is an embedding, and BOFT adapts none; merge the adapter instead"
            )));
        }
        Place::find(layer, base, &orientation)?.layer(layer)
    })
}

/// The adapter with other settings and layers, and everything else unchanged.
fn assemble(
    adapter: &Adapter,
    config: AdapterConfig,
    layer: impl FnMut(&AdapterLayer) -> Result<AdapterLayer, Error>,
) -> Result<Adapter, Error> {
    let layers = adapter.layers().iter().map(layer);
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let tensors = adapter.tensors().to_vec();
    let assembled = Adapter::from_parts(config, layers, tensors)?.with_about(adapter.about());
    Ok(assembled.with_base_copies(adapter.base_copies().to_vec()))
}
