//! The two files of an adapter: read with all checks, replaced as one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData, bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value};

use crate::error::{LoadError, NameError, SaveError};

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const TENSORS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// How often a folder is read that somebody else is writing.
const ATTEMPTS: usize = 10;

/// What a folder holds.
pub(crate) struct Folder {
    pub(crate) config: Map<String, Value>,
    pub(crate) tensors: BTreeMap<String, TensorData>,
    /// Tensors of a precision that is not read, with the reason.
    pub(crate) unreadable: Vec<String>,
}

/// The folder of a named adapter: PEFT keeps `default` in the folder itself.
pub(crate) fn folder(dir: &Path, name: Option<&str>) -> Result<PathBuf, NameError> {
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

/// Reads a folder.
pub(crate) fn read(folder: &Path) -> Result<Folder, LoadError> {
    let (config, tensors) = read_pair(folder)?;
    let path = folder.join(CONFIG);
    let config: Value = serde_json::from_slice(&config).map_err(|error| LoadError::Json {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    let Value::Object(config) = config else {
        let reason = "it holds another kind of value".to_string();
        return Err(LoadError::Json { path, reason });
    };
    let path = folder.join(TENSORS);
    let file = SafeTensors::deserialize(&tensors).map_err(|error| LoadError::Safetensors {
        path,
        reason: error.to_string(),
    })?;
    let (mut tensors, mut unreadable) = (BTreeMap::new(), Vec::new());
    for (key, view) in file.iter() {
        match decode(&view) {
            Some(data) => _ = tensors.insert(key.to_string(), data),
            None => unreadable.push(format!(
                "`{key}` is {}; f64, f32, f16 and bf16 are read",
                view.dtype()
            )),
        }
    }
    unreadable.sort();
    Ok(Folder {
        config,
        tensors,
        unreadable,
    })
}

/// The bytes of settings and tensors that belong together.
fn read_pair(folder: &Path) -> Result<(Vec<u8>, Vec<u8>), LoadError> {
    let read = |path: PathBuf| fs::read(&path).map_err(|source| LoadError::Io { path, source });
    for _ in 0..ATTEMPTS {
        let config = read(folder.join(CONFIG));
        let tensors = match read(folder.join(TENSORS)) {
            Err(LoadError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && folder.join(PICKLE).exists() =>
            {
                let folder = folder.to_path_buf();
                return Err(LoadError::Pickle { folder });
            }
            result => result?,
        };
        // A save that replaced the tensors and not yet the settings left them under the tensors' name.
        if let Ok(pending) = fs::read(pending(folder, &tensors)) {
            return Ok((pending, tensors));
        }
        let config = config?;
        if read(folder.join(CONFIG))? == config {
            return Ok((config, tensors));
        }
    }
    let folder = folder.to_path_buf();
    Err(LoadError::Busy { folder })
}

fn decode(view: &TensorView) -> Option<TensorData> {
    let (bytes, shape) = (view.data(), view.shape().to_vec());
    Some(match view.dtype() {
        Dtype::F64 => TensorData::new(numbers(bytes, f64::from_le_bytes), shape),
        Dtype::F32 => TensorData::new(numbers(bytes, f32::from_le_bytes), shape),
        Dtype::F16 => TensorData::new(numbers(bytes, f16::from_le_bytes), shape),
        Dtype::BF16 => TensorData::new(numbers(bytes, bf16::from_le_bytes), shape),
        Dtype::I64 => TensorData::new(numbers(bytes, i64::from_le_bytes), shape),
        _ => return None,
    })
}

fn numbers<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().copied().map(from).collect()
}

fn encode(data: &TensorData) -> Option<(Dtype, Vec<u8>)> {
    Some(match data.dtype() {
        DType::F64 => (
            Dtype::F64,
            data.iter::<f64>().flat_map(f64::to_le_bytes).collect(),
        ),
        DType::F32 => (
            Dtype::F32,
            data.iter::<f32>().flat_map(f32::to_le_bytes).collect(),
        ),
        DType::F16 => (
            Dtype::F16,
            data.iter::<f16>().flat_map(f16::to_le_bytes).collect(),
        ),
        DType::BF16 => (
            Dtype::BF16,
            data.iter::<bf16>().flat_map(bf16::to_le_bytes).collect(),
        ),
        DType::I64 => (
            Dtype::I64,
            data.iter::<i64>().flat_map(i64::to_le_bytes).collect(),
        ),
        _ => return None,
    })
}

/// The bytes of a safetensors file, those that PEFT would write for these tensors.
pub(crate) fn to_safetensors(tensors: &BTreeMap<String, TensorData>) -> Result<Vec<u8>, String> {
    let encoded = tensors
        .iter()
        .map(|(key, data)| {
            let (dtype, bytes) = encode(data)
                .ok_or_else(|| format!("`{key}` is {:?}, which is not written", data.dtype()))?;
            Ok((key.as_str(), dtype, data.shape().to_vec(), bytes))
        })
        .collect::<Result<Vec<_>, String>>()?;
    let views = encoded
        .iter()
        .map(|(key, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes)
                .map(|view| (*key, view))
                .map_err(|error| error.to_string())
        })
        .collect::<Result<Vec<_>, String>>()?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(metadata)).map_err(|error| error.to_string())
}

/// Replaces the adapter in a folder.
///
/// The new tensors are in place with one rename, and from then on they name the new settings, which are
/// moved into place next. Whenever this stops, a reader finds the old pair or the new one.
pub(crate) fn write(folder: &Path, config: &[u8], tensors: &[u8]) -> Result<(), SaveError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SaveError::Io { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    finish(folder).map_err(failed(folder))?;
    let pending = pending(folder, tensors);
    let (config_path, tensors_path) = (folder.join(CONFIG), folder.join(TENSORS));
    let tensors = staged(folder, tensors).map_err(failed(&tensors_path))?;
    replace(&pending, config).map_err(failed(&config_path))?;
    let placed = tensors
        .persist(&tensors_path)
        .map_err(|error| error.error)
        .and_then(|_| sync(folder));
    if let Err(source) = placed {
        // Nothing refers to it.
        _ = fs::remove_file(&pending);
        return Err(failed(&tensors_path)(source));
    }
    fs::rename(&pending, &config_path)
        .and_then(|()| sync(folder))
        .map_err(failed(&config_path))
}

/// Finishes a save that stopped halfway, and removes what one left behind.
fn finish(folder: &Path) -> io::Result<()> {
    let current = match fs::read(folder.join(TENSORS)) {
        Ok(tensors) => Some(pending(folder, &tensors)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if current.as_ref() == Some(&path) {
            fs::rename(&path, folder.join(CONFIG))?;
        } else if name.starts_with(PENDING) && name.ends_with(JSON) {
            fs::remove_file(&path)?;
        }
    }
    sync(folder)
}

const PENDING: &str = ".adapter_config.";
const JSON: &str = ".json";

/// Where the settings of these tensors wait.
fn pending(folder: &Path, tensors: &[u8]) -> PathBuf {
    // FNV-1a: it tells two saves apart, and keeps no secret.
    let hash = tensors.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    folder.join(format!("{PENDING}{hash:016x}{JSON}"))
}

/// Replaces one file: the new content is on the disk before it has the name.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    staged(folder, content)?
        .persist(path)
        .map_err(|error| error.error)?;
    sync(folder)
}

/// A file without a name yet, on the disk.
fn staged(folder: &Path, content: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".adapter-");
    // Readable like any other file, not for the owner alone as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// Makes renames in a folder last, where the system can say so.
fn sync(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = (folder, File::open);
    Ok(())
}
