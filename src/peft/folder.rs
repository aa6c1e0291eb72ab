//! [`Folder`]: what an adapter's folder holds, before anybody understands it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::{Map, Value};

use super::error::{LoadError, NameError, SaveError, Unrepresentable};
use super::keys::{CONFIG_FILE, TENSORS_FILE};
use super::pair;
use crate::input::{self, LONGEST_HEADER, LONGEST_SETTINGS};
use crate::tensors::{decode, encode, file_name, to_file};
use crate::value::mismatch::{Mismatch, Wrong};

/// The pieces of an adapter's folder as they are in PEFT's two files, understood by nobody yet.
///
/// [`Adapter::load`](crate::Adapter::load) and [`Adapter::save`](crate::Adapter::save) understand them; this is for
/// adapters of other kinds, and for tools that look at the files themselves. No name is translated and no key is
/// checked.
///
/// # Examples
///
/// ```
/// use std::collections::BTreeMap;
///
/// use burn::tensor::TensorData;
/// use burn_boft::peft::{Folder, key};
/// use serde_json::json;
///
/// let settings = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]});
/// let tensors = BTreeMap::from([
///     (key("query", "lora_A.weight"), TensorData::new(vec![0.5f32; 16], [2, 8])),
///     (key("query", "lora_B.weight"), TensorData::new(vec![0.5f32; 8], [4, 2])),
/// ]);
/// let folder = Folder::new(settings.as_object().unwrap().clone(), tensors);
/// # let path = tempfile::tempdir()?;
/// # let path = path.path();
/// folder.write(path)?;
/// assert_eq!(Folder::read(path)?, folder);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Folder {
    /// The settings, `adapter_config.json`.
    pub settings: Map<String, Value>,
    /// The tensors by their keys, `adapter_model.safetensors`.
    pub tensors: BTreeMap<String, TensorData>,
    /// The text that the file of the tensors carries beside them. PEFT writes `format`, and reads none of it.
    pub metadata: BTreeMap<String, String>,
}

impl Folder {
    /// A folder of these settings and tensors, with the metadata that PEFT writes.
    pub fn new(settings: Map<String, Value>, tensors: BTreeMap<String, TensorData>) -> Self {
        Self {
            settings,
            tensors,
            metadata: [("format".to_string(), "pt".to_string())].into(),
        }
    }

    /// Reads the two files of a folder, as one save wrote them.
    ///
    /// # Errors
    ///
    /// - [`LoadError::Io`]: a file is not there or cannot be read.
    /// - [`LoadError::Pickle`]: the tensors are in `adapter_model.bin` only.
    /// - [`LoadError::Json`], [`LoadError::Safetensors`]: a file is malformed.
    /// - [`LoadError::Mismatch`]: tensors have a precision that is not read: they are neither floats nor i64.
    /// - [`LoadError::Busy`]: the folder was being written during every attempt.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let (folder, unreadable) = read(path.as_ref())?;
        match unreadable.is_empty() {
            true => Ok(folder),
            false => Err(LoadError::Mismatch {
                path: path.as_ref().join(TENSORS_FILE),
                mismatch: Mismatch {
                    wrong: unreadable,
                    ..Mismatch::default()
                },
            }),
        }
    }

    /// Replaces the two files of a folder as one: readers find the old pair or this one.
    ///
    /// The settings are written as PEFT writes them: sorted, with two spaces for each level.
    ///
    /// # Errors
    ///
    /// - [`SaveError::Io`]: a file cannot be written, or the folder cannot be created.
    /// - [`SaveError::Unrepresentable`]: a tensor is neither of floats nor of i64.
    /// - [`SaveError::Json`], [`SaveError::Safetensors`]: the settings or the tensors cannot be encoded.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), SaveError> {
        let path = path.as_ref();
        // Sorted, as PEFT sorts them.
        let settings: BTreeMap<_, _> = self.settings.iter().collect();
        let json = serde_json::to_string_pretty(&settings).map_err(|source| SaveError::Json {
            path: path.join(CONFIG_FILE),
            source,
        })?;
        let tensors = to_safetensors(&self.tensors, &self.metadata, path)?;
        pair::write(path, json.as_bytes(), &tensors)
    }
}

/// The folder of a named adapter: PEFT keeps `default` in the folder itself, and any other name in a folder of that
/// name (`save_pretrained` in `src/peft/peft_model.py`).
///
/// # Errors
///
/// [`NameError`]: the name would lead out of the folder, or PyTorch could not have it as the name of a module.
pub(super) fn folder(dir: &Path, name: Option<&str>) -> Result<PathBuf, NameError> {
    match name {
        None | Some("default") => Ok(dir.to_path_buf()),
        // PyTorch has no dots in names, and nothing may leave the folder.
        Some(name) if name.is_empty() || name.contains(['.', '/', '\\', ':', '\0']) => {
            Err(NameError {
                name: name.to_string(),
            })
        }
        Some(name) => Ok(dir.join(name)),
    }
}

/// Reads the settings in a file, or in an adapter's folder.
///
/// They are read as they are, of any method and without the tensors: enough to say what kind of adapter it is.
///
/// # Errors
///
/// - [`LoadError::Io`]: the file is not there or cannot be read.
/// - [`LoadError::Json`]: it is not a JSON object.
///
/// # Examples
///
/// ```
/// use burn_boft::peft::read_settings;
///
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// std::fs::write(folder.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 8}"#)?;
/// assert_eq!(read_settings(folder)?["peft_type"], "LORA");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_settings(path: impl AsRef<Path>) -> Result<Map<String, Value>, LoadError> {
    let path = path.as_ref();
    let path = match path.is_dir() {
        true => path.join(CONFIG_FILE),
        false => path.to_path_buf(),
    };
    match input::read(&path, LONGEST_SETTINGS) {
        Ok(bytes) => parse_settings(path, &bytes),
        Err(source) => Err(LoadError::Io { path, source }),
    }
}

/// The JSON object in these bytes; the path is for the message.
fn parse_settings(path: PathBuf, bytes: &[u8]) -> Result<Map<String, Value>, LoadError> {
    serde_json::from_slice(bytes).map_err(|source| LoadError::Json { path, source })
}

/// Reads a folder, and which of its tensors have a precision that is not read.
///
/// Those are a finding and no error, so that [`Adapter::load`](crate::Adapter::load) reports them together with the
/// others.
///
/// # Errors
///
/// [`LoadError`], except for the tensors that are returned beside the folder.
pub(super) fn read(folder: &Path) -> Result<(Folder, Vec<Wrong>), LoadError> {
    let (config, bytes) = pair::read(folder)?;
    let settings = parse_settings(folder.join(CONFIG_FILE), &config)?;
    let path = || folder.join(TENSORS_FILE);
    let malformed = |source| LoadError::Safetensors {
        path: path(),
        source,
    };
    if let Some(length) = bytes.first_chunk() {
        // A length beyond the file is a header that is not there, which the crate reports.
        let length = u64::from_le_bytes(*length).min(bytes.len() as u64);
        input::check_length("its header", length, LONGEST_HEADER).map_err(|source| {
            LoadError::Io {
                path: path(),
                source,
            }
        })?;
    }
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(malformed)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).map_err(malformed)?;
    let (mut tensors, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
    for (key, view) in file.iter() {
        match decode(view.dtype(), view.data(), view.shape()) {
            Some(data) => _ = tensors.insert(key.to_string(), data),
            None => _ = unreadable.insert(key.to_string(), file_name(view.dtype())),
        }
    }
    let unreadable = unreadable.into_iter();
    let unreadable = unreadable.map(|(key, dtype)| Wrong::Precision { key, dtype });
    let folder = Folder {
        settings,
        tensors,
        metadata: metadata.into_iter().collect(),
    };
    Ok((folder, unreadable.collect()))
}

/// The bytes of a safetensors file, those that PEFT would write for these tensors.
///
/// # Errors
///
/// - [`SaveError::Unrepresentable`] for the first tensor that is neither of floats nor of i64; its path is the key.
/// - [`SaveError::Safetensors`], [`SaveError::Json`]: the tensors or the metadata cannot be encoded.
fn to_safetensors(
    tensors: &BTreeMap<String, TensorData>,
    metadata: &BTreeMap<String, String>,
    folder: &Path,
) -> Result<Vec<u8>, SaveError> {
    let path = || folder.join(TENSORS_FILE);
    let mut encoded = Vec::new();
    for (key, data) in tensors {
        let tensor = to_file(data.dtype()).zip(encode(data.clone()));
        let (dtype, bytes) = tensor.ok_or_else(|| SaveError::Unrepresentable {
            path: key.clone(),
            reason: Unrepresentable::Precision {
                dtype: data.dtype().name(),
            },
        })?;
        encoded.push((key, dtype, data.shape().to_vec(), bytes));
    }
    let views = encoded
        .iter()
        .map(|(key, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (key, view))
        })
        .collect::<Result<Vec<_>, _>>();
    let bytes = views.and_then(|views| safetensors::serialize(views, None));
    let bytes = bytes.map_err(|source| SaveError::Safetensors {
        path: path(),
        source,
    })?;
    let metadata = serde_json::to_string(metadata).map_err(|source| SaveError::Json {
        path: path(),
        source,
    })?;
    Ok(with_metadata(&bytes, &metadata))
}

/// A safetensors file with metadata, which the crate would write in an order that changes from run to run.
///
/// A file is the length of its header in eight bytes, little endian, the header in JSON, padded with spaces to a
/// multiple of eight, and the numbers. The entry `__metadata__` goes first in the header, where the crate puts it too.
/// The offsets in the header count from its end, so they stay right.
fn with_metadata(file: &[u8], metadata: &str) -> Vec<u8> {
    const LENGTH: usize = size_of::<u64>();
    let (length, rest) = file.split_at(LENGTH);
    let length = length.try_into().map_or(0, u64::from_le_bytes) as usize;
    let (header, numbers) = rest.split_at(length);
    // Behind the opening brace.
    let entries = header[1..].trim_ascii_end();
    let separator: &[u8] = if entries == b"}" { b"" } else { b"," };
    let start = format!("{{\"__metadata__\":{metadata}");
    let mut header = [start.as_bytes(), separator, entries].concat();
    header.resize(header.len().next_multiple_of(LENGTH), b' ');
    [&(header.len() as u64).to_le_bytes(), &header[..], numbers].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_its_folder() {
        let dir = Path::new("adapters");
        assert_eq!(folder(dir, None).unwrap(), dir);
        assert_eq!(folder(dir, Some("default")).unwrap(), dir);
        assert_eq!(folder(dir, Some("digits")).unwrap(), dir.join("digits"));
        for name in ["", ".", "..", "a/b", "/etc", r"a\b", "c:", "v1.2"] {
            let error = folder(dir, Some(name)).unwrap_err();
            assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
        }
    }
    #[test]
    fn metadata_is_written_as_the_crate_writes_it() {
        let tensors = BTreeMap::from([
            ("a".to_string(), TensorData::new(vec![0.5f32; 6], [2, 3])),
            ("b".to_string(), TensorData::new(vec![7i64], [1])),
        ]);
        for tensors in [tensors, BTreeMap::new()] {
            let folder = Folder::new(Map::new(), tensors);
            let own = to_safetensors(&folder.tensors, &folder.metadata, Path::new("")).unwrap();
            let metadata = folder.metadata.clone().into_iter().collect();
            let file = SafeTensors::deserialize(&own).unwrap();
            let theirs = safetensors::serialize(file.iter(), Some(metadata)).unwrap();
            assert_eq!(own, theirs);
        }
    }
}
