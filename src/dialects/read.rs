//! [`AdapterFile::read`]: from the bytes of a file to its layers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;

use burn::tensor::TensorData;
use safetensors::tensor::{Dtype, SafeTensors};

use super::error::DialectError;
use super::file::{AdapterFile, FileLayer};
use super::names::Style;
use super::parts::{Parts, Read};
use super::table::{Dialect, OTHER_METHODS, SCALED};
use super::{lycoris, oft_v2, sd_scripts};
use crate::input;
use crate::tensors::{decode, file_name, is_finite};
use crate::value::mismatch::{Mismatch, Unexpected, Wrong};

/// No adapter is larger. A whole model, passed by mistake, would be read into memory otherwise.
const LARGEST: u64 = 4 << 30;
/// How many keys of a file that is not known a message has.
const SHOWN: usize = 3;
/// How PEFT starts its keys.
const PEFT: &str = "base_model.model.";
/// Tensors that OneTrainer puts into the file beside the adapter: embeddings of a prompt.
const EMBEDDINGS: &str = "bundle_emb.";

impl AdapterFile {
    /// Reads a safetensors file.
    ///
    /// # Errors
    ///
    /// - [`DialectError::Io`], [`DialectError::NotAFile`], [`DialectError::TooLarge`], [`DialectError::Safetensors`]: the
    ///   file cannot be read.
    /// - [`DialectError::Unknown`], [`DialectError::Method`]: it is no OFT or BOFT adapter.
    /// - [`DialectError::Ambiguous`]: two programs would compute different weights from it.
    /// - [`DialectError::Mismatch`]: every tensor that is missing, unexpected or wrong.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, DialectError> {
        let path = path.as_ref();
        Self::from_bytes(path, &contents(path)?)
    }

    /// Reads the bytes of a safetensors file, of which messages say that they are at this path.
    ///
    /// # Errors
    ///
    /// Those of [`AdapterFile::read`] for a file that could be opened.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Self, DialectError> {
        let path = path.as_ref();
        let (tensors, metadata, unreadable) = tensors(path, bytes)?;
        refuse_other_methods(path, tensors.keys())?;
        let (mut modules, mut notes) = (BTreeMap::<_, Parts>::new(), Vec::new());
        let mut mismatch = Mismatch::default();
        let mut embeddings = 0;
        for (key, data) in &tensors {
            if key.starts_with(EMBEDDINGS) {
                embeddings += 1;
                continue;
            }
            match split(key) {
                Some((module, name)) => {
                    let parts = modules.entry(module).or_default();
                    parts.module = module;
                    parts.tensors.insert(name, data);
                }
                None => mismatch.unexpected.push(unexpected(key)),
            }
        }
        let has_rotation = |parts: &&Parts| dialect(parts).is_some();
        if !modules.values().any(|parts| has_rotation(&parts)) {
            let keys = tensors.keys().take(SHOWN).cloned().collect();
            let path = path.to_path_buf();
            return Err(DialectError::Unknown { path, keys });
        }
        mismatch.wrong.extend(unreadable);
        let layers = read_layers(modules.values(), &mut mismatch);
        if !mismatch.is_empty() {
            let path = path.to_path_buf();
            return Err(DialectError::Mismatch { path, mismatch });
        }
        refuse_ambiguous(path, &layers)?;
        if embeddings > 0 {
            notes.push(format!(
                "{embeddings} tensors of prompt embeddings, {EMBEDDINGS}*, are not part of a model's weights and are left out"
            ));
        }
        notes.extend(unusual(&layers, &tensors, &metadata));
        Ok(Self {
            path: path.to_path_buf(),
            layers,
            metadata,
            notes,
        })
    }
}

/// Whether a file with tensors of these names is an adapter and no model: one of them holds the rotation of a layer.
pub fn has_rotation<'a>(mut keys: impl Iterator<Item = &'a str>) -> bool {
    let is_rotation = |name: &str| {
        Dialect::ALL
            .iter()
            .any(|dialect| dialect.rotation().0 == name)
    };
    keys.any(|key| split(key).is_some_and(|(_, name)| is_rotation(name)))
}

type Contents = (
    BTreeMap<String, TensorData>,
    BTreeMap<String, String>,
    Vec<Wrong>,
);

/// The bytes of a file.
///
/// # Errors
///
/// [`DialectError::Io`], [`DialectError::NotAFile`], [`DialectError::TooLarge`]
fn contents(path: &Path) -> Result<Vec<u8>, DialectError> {
    let io = |source| DialectError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = input::open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        let path = path.to_path_buf();
        return Err(DialectError::NotAFile { path });
    }
    if about.len() > LARGEST {
        return Err(DialectError::TooLarge {
            path: path.to_path_buf(),
            bytes: about.len(),
        });
    }
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// The tensors of a file, its metadata, and the tensors of a precision that is not read.
///
/// # Errors
///
/// [`DialectError::Safetensors`]
fn tensors(path: &Path, bytes: &[u8]) -> Result<Contents, DialectError> {
    let malformed = |source| DialectError::Safetensors {
        path: path.to_path_buf(),
        source,
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
    let (mut tensors, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
    for (key, view) in file.iter() {
        let data = match view.dtype() {
            // The mark of scaled OFT.
            Dtype::BOOL | Dtype::U8 => {
                let flags = view.data().iter().map(|flag| i64::from(*flag)).collect();
                Some(TensorData::new::<i64, _>(flags, view.shape().to_vec()))
            }
            dtype => decode(dtype, view.data(), view.shape()),
        };
        match data {
            Some(data) => _ = tensors.insert(key.to_string(), data),
            None => _ = unreadable.insert(key.to_string(), file_name(view.dtype())),
        }
    }
    let unreadable = unreadable
        .into_iter()
        .map(|(key, dtype)| Wrong::Precision { key, dtype });
    Ok((
        tensors,
        metadata.into_iter().collect(),
        unreadable.collect(),
    ))
}

/// The module of a key, and the name of its tensor.
fn split(key: &str) -> Option<(&str, &str)> {
    let names = [
        "oft_R.weight",
        SCALED,
        "oft_blocks",
        "rescale",
        "alpha",
        "boft_R",
        "boft_s",
    ];
    names.iter().find_map(|name| {
        let module = key.strip_suffix(name)?.strip_suffix('.')?;
        Some((module, *name)).filter(|_| !module.is_empty())
    })
}

/// The dialect of a layer.
fn dialect(parts: &Parts) -> Option<Dialect> {
    let rank = |name: &str| parts.tensors.get(name).map(|data| data.rank());
    Dialect::of_layer(parts.module, rank, parts.tensors.keys().copied())
}

fn unexpected(key: &str) -> Unexpected {
    Unexpected::NoLayer {
        key: key.to_string(),
    }
}

/// Refuses tensors of methods that are not read, and folders of PEFT's without their settings.
///
/// A tensor of a layer that is read is none of another method, whatever its module is called: `blocks.diff.oft_blocks`.
///
/// # Errors
///
/// [`DialectError::Method`], [`DialectError::Ambiguous`]
fn refuse_other_methods<'a>(
    path: &Path,
    keys: impl Iterator<Item = &'a String>,
) -> Result<(), DialectError> {
    for key in keys {
        let method = other_method(key).filter(|_| split(key).is_none());
        if let Some(method) = method {
            return Err(DialectError::Method {
                path: path.to_path_buf(),
                key: key.clone(),
                method,
            });
        }
        if key.starts_with(PEFT) {
            return Err(DialectError::Ambiguous {
                path: path.to_path_buf(),
                first: format!("`{key}` is PEFT's, whose map its adapter_config.json says"),
                second: "sd-scripts reads the same keys with a map of its own".to_string(),
                remedy: "pass PEFT's folder with both files",
            });
        }
    }
    Ok(())
}

/// The method that is not read, where a key is of one. The name of the tensor ends the key, so parts are compared from there.
fn other_method(key: &str) -> Option<&'static str> {
    let method = |part: &str| {
        let mut methods = OTHER_METHODS.iter();
        let named = methods.find(|(name, _)| match name.ends_with('_') {
            true => part.starts_with(name),
            false => part == *name,
        });
        named.map(|(_, method)| *method)
    };
    let flux = "sd-scripts' networks.oft_flux, whose own merge fails";
    let is_flux = key.contains(".oft_blocks.");
    let named = key.rsplit('.').find_map(method);
    named.or(is_flux.then_some(flux))
}

/// Reads every layer, and collects what is wrong.
fn read_layers<'a>(
    modules: impl Iterator<Item = &'a Parts<'a>>,
    mismatch: &mut Mismatch,
) -> Vec<FileLayer> {
    let mut layers = Vec::new();
    for parts in modules {
        let Some(dialect) = dialect(parts) else {
            let keys = parts
                .tensors
                .keys()
                .map(|name| unexpected(&parts.key(name)));
            mismatch.unexpected.extend(keys);
            continue;
        };
        let strangers = parts.tensors.keys().filter(|name| !dialect.has(name));
        let strangers = strangers.map(|name| unexpected(&parts.key(name)));
        mismatch.unexpected.extend(strangers);
        let read = match dialect {
            Dialect::LycorisDiagOft => lycoris::diag_oft(parts),
            Dialect::LycorisBoft => lycoris::boft(parts),
            Dialect::SdScriptsOft => sd_scripts::oft(parts),
            Dialect::SdScriptsBoft => sd_scripts::boft(parts),
            _ => oft_v2::read(parts, dialect),
        };
        match read {
            Ok(Read {
                layer,
                alpha,
                is_bounded,
                exceeds_alpha,
            }) => layers.push(FileLayer {
                dialect,
                alpha,
                is_bounded,
                exceeds_alpha,
                stored: parts.tensors.values().map(|data| data.num_elements()).sum(),
                layer,
            }),
            Err(found) => {
                mismatch.missing.extend(found.missing);
                mismatch.unexpected.extend(found.unexpected);
                mismatch.wrong.extend(found.wrong);
            }
        }
    }
    layers
}

/// Refuses what programs would compute differently: layers of two programs; bounds of sd-scripts' `networks.oft` that differ,
/// of which it applies the first to all layers; and bounds that act in a file that ComfyUI may have trained, which takes
/// `alpha` without the outputs and, unlike LyCORIS, writes names with dots.
///
/// # Errors
///
/// [`DialectError::Ambiguous`]
fn refuse_ambiguous(path: &Path, layers: &[FileLayer]) -> Result<(), DialectError> {
    let Some(first) = layers.first() else {
        return Ok(());
    };
    let says = |layer: &FileLayer| format!("`{}` is {}", layer.module(), layer.dialect.name());
    let mut others = layers.iter();
    if let Some(other) = others.find(|layer| !first.dialect.goes_with(layer.dialect)) {
        return Err(DialectError::Ambiguous {
            path: path.to_path_buf(),
            first: says(first),
            second: format!("{}, and no program computes both", says(other)),
            remedy: "merge them one after the other, from a file for each",
        });
    }
    let mut others = layers
        .iter()
        .filter(|layer| layer.dialect == Dialect::SdScriptsOft);
    if let Some(other) = others.find(|layer| layer.alpha != first.alpha) {
        let bound = |layer: &FileLayer| {
            let alpha = layer.alpha.unwrap_or_default();
            format!("alpha {alpha} of `{}` holds for all layers", layer.module())
        };
        return Err(DialectError::Ambiguous {
            path: path.to_path_buf(),
            first: bound(first),
            second: bound(other),
            remedy: "networks.oft takes the first that it meets; write one alpha into all of them",
        });
    }
    let is_dotted =
        |layer: &&FileLayer| matches!(Style::of_module(layer.module()), Style::Dotted(_));
    let mut dotted = layers.iter().filter(is_dotted);
    if let Some(layer) = dotted.find(|layer| layer.exceeds_alpha) {
        let (alpha, module) = (layer.alpha.unwrap_or_default(), layer.module());
        return Err(DialectError::Ambiguous {
            path: path.to_path_buf(),
            first: format!(
                "alpha {alpha} of `{module}` bounds the norm at alpha times the outputs, as in LyCORIS"
            ),
            second: "at alpha itself, as in ComfyUI, which writes such names".to_string(),
            remedy: "set alpha to zero for no bound, or give modules LyCORIS's names, lycoris_… with `_` for dots",
        });
    }
    Ok(())
}

/// What a reader would not expect of a file, a line each.
fn unusual(
    layers: &[FileLayer],
    tensors: &BTreeMap<String, TensorData>,
    metadata: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut notes = Vec::new();
    let count = |is: fn(&FileLayer) -> bool| layers.iter().filter(|layer| is(layer)).count();
    let all = layers.len();
    let bounded = count(FileLayer::is_bounded);
    if bounded > 0 {
        notes.push(format!(
            "alpha bounds {bounded} of {all} layers, whose numbers are scaled back"
        ));
    }
    let idle = count(|layer| layer.layer.block_size() == 1);
    if idle > 0 {
        notes.push(format!(
            "{idle} of {all} layers have blocks of one channel, which do not rotate"
        ));
    }
    if layers
        .iter()
        .any(|layer| layer.dialect != layers[0].dialect)
    {
        let names: BTreeSet<_> = layers.iter().map(|layer| layer.dialect.name()).collect();
        let names: Vec<_> = names.into_iter().collect();
        notes.push(format!("layers of several dialects: {}", names.join(", ")));
    }
    let narrow = tensors
        .values()
        .filter(|data| data.dtype().size() == 2)
        .count();
    if narrow > 0 {
        notes.push(format!(
            "{narrow} tensors are in half precision, and are widened"
        ));
    }
    let infinite = tensors.values().filter(|data| !is_finite(data)).count();
    if infinite > 0 {
        notes.push(format!("{infinite} tensors hold NaN or infinity"));
    }
    let arguments = metadata.get("ss_network_args");
    let arguments = arguments.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let is_coft = |key: &str| {
        let value = arguments.as_ref()?.get(key)?;
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_string);
        Some(["1", "true", "yes", "y", "on"].contains(&text.to_lowercase().as_str()))
    };
    if is_coft("coft").or(is_coft("oft_coft")) == Some(true) {
        notes.push(
            "it was trained with COFT, which networks.oft_v2 applies while its own arguments ask for it and a merge does not"
                .to_string(),
        );
    }
    notes
}
