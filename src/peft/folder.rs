//! The two files of an adapter: read with all checks, replaced as one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use burn::tensor::TensorData;
use safetensors::tensor::{SafeTensors, TensorView};
use same_file::Handle;
use serde_json::{Map, Value};
use xxhash_rust::xxh3::xxh3_128;

use super::keys::{CONFIG_FILE, PICKLE_FILE, TENSORS_FILE};
use super::load::LoadError;
use super::save::{SaveError, Unrepresentable};
use crate::tensors::{decode, encode, file_name, to_file};
use crate::value::mismatch::{Mismatch, Wrong};

/// How often a folder is read that somebody else is writing, and how long to wait in between.
const ATTEMPTS: usize = 200;
const PAUSE: Duration = Duration::from_millis(2);

/// The name of an adapter is not the name of a folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` cannot name an adapter: it must be the name of one folder, without `.` and separators"
)]
pub struct NameError {
    /// The name given.
    pub name: String,
}

/// The pieces of an adapter's folder as they are in PEFT's two files, understood by nobody yet.
///
/// [`Adapter::load`](crate::Adapter::load) and [`Adapter::save`](crate::Adapter::save) understand them; this is for
/// adapters of other kinds, and for tools that look at the files themselves.
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
    /// [`LoadError`]: files that are not there or are malformed, and tensors of a precision that is not read: those that
    /// are neither floats nor i64.
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
    /// # Errors
    ///
    /// [`SaveError`]: files that cannot be written, and tensors that are neither floats nor i64.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), SaveError> {
        let path = path.as_ref();
        // Sorted, as PEFT sorts them.
        let settings: BTreeMap<_, _> = self.settings.iter().collect();
        let json = serde_json::to_string_pretty(&settings).map_err(|source| SaveError::Json {
            path: path.join(CONFIG_FILE),
            source,
        })?;
        let tensors = to_safetensors(&self.tensors, &self.metadata, path)?;
        write(path, json.as_bytes(), &tensors)
    }
}

/// The folder of a named adapter: PEFT keeps `default` in the folder itself.
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
/// # Errors
///
/// [`LoadError::Io`] and [`LoadError::Json`]: a file that is not there or is not a JSON object.
pub fn read_settings(path: impl AsRef<Path>) -> Result<Map<String, Value>, LoadError> {
    let path = path.as_ref();
    let path = match path.is_dir() {
        true => path.join(CONFIG_FILE),
        false => path.to_path_buf(),
    };
    match fs::read(&path) {
        Ok(bytes) => parse_settings(path, &bytes),
        Err(source) => Err(LoadError::Io { path, source }),
    }
}

fn parse_settings(path: PathBuf, bytes: &[u8]) -> Result<Map<String, Value>, LoadError> {
    serde_json::from_slice(bytes).map_err(|source| LoadError::Json { path, source })
}

/// Reads a folder, and which of its tensors have a precision that is not read.
pub(super) fn read(folder: &Path) -> Result<(Folder, Vec<Wrong>), LoadError> {
    let (config, bytes) = read_pair(folder)?;
    let settings = parse_settings(folder.join(CONFIG_FILE), &config)?;
    let malformed = |source| LoadError::Safetensors {
        path: folder.join(TENSORS_FILE),
        source,
    };
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

/// Settings and tensors, as bytes.
type Pair = (Vec<u8>, Vec<u8>);

/// The bytes of settings and tensors that one save wrote.
fn read_pair(folder: &Path) -> Result<Pair, LoadError> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        if let Some(pair) = try_read_pair(folder)? {
            return Ok(pair);
        }
    }
    let folder = folder.to_path_buf();
    Err(LoadError::Busy { folder })
}

/// The pair, unless somebody replaced the adapter meanwhile.
///
/// A save replaces the tensors before the settings, and the settings wait under the tensors' name in between. So the
/// settings of these tensors are those that wait, or, where none do, the ones in place for as long as the tensors
/// are not replaced.
fn try_read_pair(folder: &Path) -> Result<Option<Pair>, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| LoadError::Io { path, source }
    };
    let (config_path, tensors_path) = (folder.join(CONFIG_FILE), folder.join(TENSORS_FILE));
    let config = || fs::read(&config_path).map_err(failed(&config_path));
    let mut file = match File::open(&tensors_path) {
        Ok(file) => file,
        Err(error) => {
            // A folder that is no adapter at all lacks its settings first.
            config()?;
            let folder = folder.to_path_buf();
            return Err(match folder.join(PICKLE_FILE).exists() {
                true => LoadError::Pickle { folder },
                false => failed(&tensors_path)(error),
            });
        }
    };
    let mut tensors = Vec::new();
    file.read_to_end(&mut tensors)
        .map_err(failed(&tensors_path))?;
    let waiting = pending(folder, &tensors);
    match fs::read(&waiting) {
        Ok(config) => return Ok(Some((config, tensors))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&waiting)(error)),
    }
    let found = config()?;
    // PEFT rewrites its files where they are, so they are also compared. An open file shares its identity with no
    // other, even if the path comes to hold the same bytes again.
    let is_same = Handle::from_file(file)
        .and_then(|file| Ok(file == Handle::from_path(&tensors_path)?))
        .map_err(failed(&tensors_path))?;
    Ok((is_same && config()? == found).then_some((found, tensors)))
}

/// The bytes of a safetensors file, those that PEFT would write for these tensors.
fn to_safetensors(
    tensors: &BTreeMap<String, TensorData>,
    metadata: &BTreeMap<String, String>,
    folder: &Path,
) -> Result<Vec<u8>, SaveError> {
    let path = || folder.join(TENSORS_FILE);
    let mut encoded = Vec::new();
    for (key, data) in tensors {
        let tensor = to_file(data.dtype()).zip(encode(data));
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

/// Replaces the adapter in a folder.
///
/// The new tensors are in place with one rename, and from then on they name the new settings, which are
/// moved into place next. Whenever this stops, a reader finds the old pair or the new one. Writers take turns, also
/// those of other processes.
fn write(folder: &Path, config: &[u8], tensors: &[u8]) -> Result<(), SaveError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SaveError::Io { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let lock = Lock::take(folder).map_err(failed(folder))?;
    finish(folder, &lock).map_err(failed(folder))?;
    let pending = pending(folder, tensors);
    let (config_path, tensors_path) = (folder.join(CONFIG_FILE), folder.join(TENSORS_FILE));
    let tensors = staged(&tensors_path, tensors).map_err(failed(&tensors_path))?;
    staged(&config_path, config)
        .and_then(|file| file.persist(&pending).map_err(|error| error.error))
        .and_then(|_| sync(folder))
        .map_err(failed(&config_path))?;
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
fn finish(folder: &Path, lock: &Lock) -> io::Result<()> {
    let current = match fs::read(folder.join(TENSORS_FILE)) {
        Ok(tensors) => Some(pending(folder, &tensors)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is = |prefix, suffix| name.starts_with(prefix) && name.ends_with(suffix);
        if current.as_ref() == Some(&path) {
            fs::rename(&path, folder.join(CONFIG_FILE))?;
        } else if lock.is_held && (is(PENDING, JSON) || is(STAGED, TEMPORARY)) {
            fs::remove_file(&path)?;
        }
    }
    sync(folder)
}

/// The turn of one writer, which ends when this is dropped or its process ends.
struct Lock {
    path: PathBuf,
    /// The file that is locked, which unlocks when it is closed.
    _file: Handle,
    /// Whether the file system has locks. Without them, two writers at once may mix their files.
    is_held: bool,
}

impl Lock {
    /// Waits for the turn.
    fn take(folder: &Path) -> io::Result<Self> {
        let path = folder.join(LOCK);
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)?;
            let is_held = match file.lock() {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => false,
                Err(error) => return Err(error),
            };
            // The writer before removed the file that this one waited for, and a third may have made another.
            let file = Handle::from_file(file)?;
            match Handle::from_path(&path) {
                Ok(current) if current == file => {
                    return Ok(Self {
                        path,
                        _file: file,
                        is_held,
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that stays is no harm: the next writer locks it.
        _ = fs::remove_file(&self.path);
    }
}

const LOCK: &str = ".adapter.lock";
const PENDING: &str = ".adapter_config.";
const JSON: &str = ".json";
const STAGED: &str = ".adapter_model.";
const TEMPORARY: &str = ".tmp";

/// Where the settings of these tensors wait.
fn pending(folder: &Path, tensors: &[u8]) -> PathBuf {
    let hash = xxh3_128(tensors);
    folder.join(format!("{PENDING}{hash:032x}{JSON}"))
}

/// What a file is going to be, on the disk under another name.
fn staged(path: &Path, content: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(STAGED).suffix(TEMPORARY);
    // As open as any other file, not for the owner alone as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(path.parent().unwrap_or(Path::new(".")))?;
    // Through the file itself: an error of the temporary one names its path.
    file.as_file_mut().write_all(content)?;
    // A file that somebody closed stays closed.
    if let Ok(metadata) = fs::metadata(path) {
        file.as_file().set_permissions(metadata.permissions())?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn state(folder: &Path) -> (String, String) {
        let (config, tensors) = read_pair(folder).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(config), text(tensors))
    }

    fn pair(config: &str, tensors: &str) -> (String, String) {
        (config.to_string(), tensors.to_string())
    }

    fn save(folder: &Path, config: &str, tensors: &str) {
        write(folder, config.as_bytes(), tensors.as_bytes()).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn wherever_a_save_stops_a_reader_finds_one_pair() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        save(folder, "old settings", "old tensors");

        // Before the first rename: files under other names.
        fs::write(folder.join(".adapter_model.x7Yz.tmp"), "new ten").unwrap();
        assert_eq!(state(folder), pair("old settings", "old tensors"));

        // The new settings wait for tensors that are not there yet.
        let waiting = pending(folder, b"new tensors");
        fs::write(&waiting, "new settings").unwrap();
        assert_eq!(state(folder), pair("old settings", "old tensors"));

        // The tensors are in place, the settings are not.
        fs::write(folder.join(TENSORS_FILE), "new tensors").unwrap();
        assert_eq!(state(folder), pair("new settings", "new tensors"));

        // The next save finishes that one first, and leaves nothing else.
        fs::write(pending(folder, b"lost tensors"), "lost settings").unwrap();
        fs::write(folder.join(LOCK), "").unwrap();
        finish(folder, &Lock::take(folder).unwrap()).unwrap();
        assert_eq!(state(folder), pair("new settings", "new tensors"));
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
        save(folder, "third settings", "third tensors");
        assert_eq!(state(folder), pair("third settings", "third tensors"));
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
    }

    #[test]
    fn new_settings_for_the_same_tensors_are_the_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), "old", "tensors");
        save(folder.path(), "new", "tensors");
        assert_eq!(state(folder.path()), pair("new", "tensors"));
    }

    #[test]
    fn a_save_that_cannot_place_its_tensors_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // A folder of that name cannot be replaced.
        fs::create_dir_all(folder.join(TENSORS_FILE).join("full")).unwrap();
        fs::write(folder.join(CONFIG_FILE), "old").unwrap();
        assert!(write(folder, b"new", b"tensors").is_err());
        assert_eq!(fs::read(folder.join(CONFIG_FILE)).unwrap(), b"old");
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_as_open_as_others_and_a_closed_one_stays_closed() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TENSORS_FILE);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(folder.path().join("other"), "").unwrap();
        save(folder.path(), "settings", "tensors");
        assert_eq!(mode(&path), mode(&folder.path().join("other")));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        save(folder.path(), "settings", "more tensors");
        assert_eq!(mode(&path), 0o600);
    }

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
