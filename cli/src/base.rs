//! A model on disk: one safetensors file, or a folder with one or with shards and their index.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use burn_boft::input::{self, LONGEST_HEADER, LONGEST_SETTINGS};
use burn_boft::peft::{CONFIG_FILE, TENSORS_FILE};
use same_file::is_same_file;
use serde_json::{Map, Value};

use crate::attention::projections;
use crate::error::Error;
use crate::header::{self, Entry, Header};

const EXTENSION: &str = ".safetensors";
const INDEX: &str = ".safetensors.index.json";
/// The file extensions of weights in other formats.
const OTHER_FORMATS: [&str; 9] = [
    "bin", "ckpt", "gguf", "h5", "msgpack", "onnx", "ot", "pt", "pth",
];
/// Where sentence-transformers lists the modules of a model.
const MODULES: &str = "modules.json";
/// The files of adapters, which training folders keep beside the model.
const ADAPTER: [&str; 2] = [TENSORS_FILE, CONFIG_FILE];

/// A model on disk, open for reading.
pub struct Base {
    /// The file or the folder, as given.
    pub path: PathBuf,
    pub shards: Vec<Shard>,
    /// The name and the content of the index of the shards.
    pub index: Option<(String, Map<String, Value>)>,
    is_folder: bool,
    places: HashMap<String, (usize, usize)>,
}

/// One file of a model.
pub struct Shard {
    pub path: PathBuf,
    /// Its name in the folder.
    pub name: String,
    pub header: Header,
    /// One reader at a time, since each moves to its place first.
    file: Mutex<File>,
}

impl Base {
    /// Opens a model and checks every header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let is_folder = fs::metadata(path).map_err(Error::read(path))?.is_dir();
        let (folder, names, index) = match is_folder {
            true => weights(path)?,
            false => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let folder = path.parent().unwrap_or(Path::new(""));
                (folder.to_path_buf(), vec![name.into_owned()], None)
            }
        };
        let mut base = Self {
            path: path.to_path_buf(),
            shards: Vec::new(),
            index,
            is_folder,
            places: HashMap::new(),
        };
        for name in names {
            let path = match is_folder {
                true => folder.join(&name),
                false => path.to_path_buf(),
            };
            base.add(path, name)?;
        }
        base.check_index()?;
        Ok(base)
    }

    fn add(&mut self, path: PathBuf, name: String) -> Result<(), Error> {
        let mut file = input::open(&path).map_err(Error::read(&path))?;
        if !file.metadata().map_err(Error::read(&path))?.is_file() {
            return Err(Error::malformed(&path, "not a file"));
        }
        let header = header::read(&path, &mut file)?;
        for (place, entry) in header.entries.iter().enumerate() {
            let place = (self.shards.len(), place);
            if let Some((first, _)) = self.places.insert(entry.key.clone(), place) {
                let first = &self.shards[first].name;
                return Err(Error::tensor(
                    &path,
                    &entry.key,
                    format!("is in `{first}` too"),
                ));
            }
        }
        self.shards.push(Shard {
            path,
            name,
            header,
            file: Mutex::new(file),
        });
        Ok(())
    }

    /// Refuses an index that names tensors which its shards do not have.
    fn check_index(&self) -> Result<(), Error> {
        let Some((name, index)) = &self.index else {
            return Ok(());
        };
        for (key, shard) in weight_map(&self.path.join(name), index)? {
            let place = self
                .places
                .get(&key)
                .map(|(shard, _)| &self.shards[*shard].name);
            if place != Some(&shard) {
                let path = self.path.join(&shard);
                return Err(Error::tensor(
                    &path,
                    &key,
                    format!("is not there, and `{name}` says it is"),
                ));
            }
        }
        Ok(())
    }

    pub fn is_folder(&self) -> bool {
        self.is_folder
    }

    /// The tensor of this name.
    pub fn entry(&self, key: &str) -> Option<(&Shard, &Entry)> {
        let (shard, place) = self.places.get(key)?;
        let shard = &self.shards[*shard];
        Some((shard, &shard.header.entries[*place]))
    }

    /// The names of all tensors.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The modules that have a weight, with its shape, and the projections that one tensor holds together.
    pub fn weighted_modules(&self) -> BTreeMap<String, Vec<usize>> {
        let shards = self.shards.iter();
        let entries = shards.flat_map(|shard| &shard.header.entries);
        let mut modules = projections(entries.clone());
        let module = |entry: &Entry| {
            let module = entry.key.strip_suffix(".weight")?;
            Some((module.to_string(), entry.shape.clone()))
        };
        modules.extend(entries.filter_map(module));
        modules
    }

    /// The files of the folder beside the weights.
    ///
    /// Weights in other formats, copies of the weights in folders below, adapters, and what Git and downloads keep for
    /// themselves are left behind, except in the folders of modules that `modules.json` names: those are parts of the model.
    /// So are links that lead nowhere, or to a folder that they are in.
    pub fn other_files(&self) -> Result<OtherFiles, Error> {
        let mut files = OtherFiles::default();
        if self.is_folder {
            self.walk(Path::new(""), &self.modules()?, &mut files)?;
        }
        files.copied.sort();
        files.unchanged.sort();
        files.left.sort();
        Ok(files)
    }

    /// The folders of modules that a model of sentence-transformers has beside its transformer, such as `2_Dense`.
    fn modules(&self) -> Result<Vec<String>, Error> {
        let path = self.path.join(MODULES);
        let bytes = match input::read(&path, LONGEST_SETTINGS) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::read(&path)(error)),
        };
        let modules: Vec<Value> = serde_json::from_slice(&bytes).unwrap_or_default();
        let paths = modules
            .iter()
            .filter_map(|module| module.get("path")?.as_str());
        Ok(paths
            .filter(|path| !path.is_empty())
            .map(str::to_string)
            .collect())
    }

    fn walk(&self, folder: &Path, modules: &[String], files: &mut OtherFiles) -> Result<(), Error> {
        let path = self.path.join(folder);
        let is_module = modules.iter().any(|module| folder.starts_with(module));
        for entry in fs::read_dir(&path).map_err(Error::read(&path))? {
            let name = entry.map_err(Error::read(&path))?.file_name();
            let relative = folder.join(&name);
            let name = name.to_string_lossy();
            let top = folder.as_os_str().is_empty();
            let is_ours = top
                && (self.shards.iter().any(|shard| shard.name == name)
                    || self.index.as_ref().is_some_and(|(index, _)| *index == name));
            if is_ours {
                continue;
            }
            if is_private(&name) || (!is_module && is_left_out(&name)) {
                files.left.push(relative);
                continue;
            }
            let path = self.path.join(&relative);
            // Links are followed: a download keeps its files behind links.
            let kind = match fs::metadata(&path) {
                Ok(kind) => kind,
                Err(error) if error.kind() == ErrorKind::NotFound && path.is_symlink() => {
                    files.left.push(relative);
                    continue;
                }
                Err(error) => return Err(Error::read(&path)(error)),
            };
            if kind.is_dir() {
                match self.is_around(&path, folder) {
                    true => files.left.push(relative),
                    false => self.walk(&relative, modules, files)?,
                }
            } else if !kind.is_file() || (!is_module && self.has_tensors_of(&path)) {
                files.left.push(relative);
            } else {
                if !is_module && name.ends_with(EXTENSION) {
                    files.unchanged.push(relative.clone());
                }
                files.copied.push(relative);
            }
        }
        Ok(())
    }

    /// Whether a folder, as which a link may serve, is the same as this folder of the model or one that it is in.
    fn is_around(&self, path: &Path, folder: &Path) -> bool {
        let mut around = folder.ancestors().map(|above| self.path.join(above));
        around.any(|above| is_same_file(path, above).unwrap_or(false))
    }

    /// Whether a file has tensors with names of this model, as a copy of its weights has, or is the index of such a copy. One
    /// that is neither a safetensors file nor an index has none.
    fn has_tensors_of(&self, path: &Path) -> bool {
        let name = path.to_string_lossy();
        if name.ends_with(EXTENSION) {
            let file = input::open(path).map_err(Error::read(path));
            let header = file.and_then(|mut file| header::read(path, &mut file));
            return header.is_ok_and(|header| {
                let mut entries = header.entries.iter();
                entries.any(|entry| self.places.contains_key(&entry.key))
            });
        }
        let map = || weight_map(path, &read_index(path)?);
        let is_ours =
            |map: BTreeMap<String, String>| map.keys().any(|key| self.places.contains_key(key));
        name.ends_with(INDEX) && map().is_ok_and(is_ours)
    }
}

/// The files of a model's folder beside its weights, with their paths in it.
#[derive(Debug, Default)]
pub struct OtherFiles {
    /// What a copy of the model needs.
    pub copied: Vec<PathBuf>,
    /// What of it are weights of other modules, which no adapter changes here.
    unchanged: Vec<PathBuf>,
    /// What a merged model must not carry along, or cannot.
    pub left: Vec<PathBuf>,
}

impl OtherFiles {
    /// The paths of what is left behind.
    pub fn left_names(&self) -> Vec<String> {
        let paths = self.left.iter();
        paths.map(|path| path.display().to_string()).collect()
    }

    /// The lines that say what is left behind, and which weights are copied as they are.
    pub fn notes(&self) -> Vec<String> {
        let left = some_of(&self.left).map(|names| {
            format!(
                "note: left behind, as weights from before the merge, adapters or no files of a model: {names}; copy by \
                 hand what you need"
            )
        });
        let unchanged = some_of(&self.unchanged)
            .map(|names| format!("note: copied as they are, since only weights of the folder itself are changed: {names}"));
        left.into_iter().chain(unchanged).collect()
    }
}

/// The first of these paths, and how many more there are; none without any.
fn some_of(paths: &[PathBuf]) -> Option<String> {
    const SHOWN: usize = 8;
    let shown = paths.iter().take(SHOWN);
    let names: Vec<_> = shown.map(|path| path.display().to_string()).collect();
    let more = match paths.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!names.is_empty()).then(|| names.join(", ") + &more)
}

/// What Git and downloads keep for themselves.
fn is_private(name: &str) -> bool {
    name == ".git" || name == ".cache"
}

/// Whether a merged model must not carry this file along: weights from before the merge in another format, and an
/// adapter, which transformers would apply once more.
fn is_left_out(name: &str) -> bool {
    let file = name.strip_suffix(".index.json").unwrap_or(name);
    let extension = file.rsplit_once('.').map_or("", |(_, extension)| extension);
    OTHER_FORMATS.contains(&extension) || ADAPTER.contains(&name)
}

impl Shard {
    /// Refuses a tensor without numbers: an axis of length zero lets its other axes claim any length.
    pub fn check_numbers(&self, entry: &Entry) -> Result<(), Error> {
        match entry.bytes {
            0 => {
                let why = format!("has the shape {:?}, which holds no numbers", entry.shape);
                Err(Error::tensor(&self.path, &entry.key, why))
            }
            _ => Ok(()),
        }
    }

    /// Reads bytes of a tensor.
    pub fn read(&self, entry: &Entry, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(entry.start + offset))
            .and_then(|_| file.read_exact(bytes))
            .map_err(Error::read(&self.path))
    }
}

/// Whether two tensors have the same precision, shape and bytes.
pub fn is_same(
    (shard_a, a): (&Shard, &Entry),
    (shard_b, b): (&Shard, &Entry),
) -> Result<bool, Error> {
    const READ: u64 = 1 << 20;
    if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
        return Ok(false);
    }
    let mut offset = 0;
    while offset < a.bytes {
        let count = READ.min(a.bytes - offset) as usize;
        let (mut left, mut right) = (vec![0; count], vec![0; count]);
        shard_a.read(a, offset, &mut left)?;
        shard_b.read(b, offset, &mut right)?;
        if left != right {
            return Ok(false);
        }
        offset += count as u64;
    }
    Ok(true)
}

type Weights = (PathBuf, Vec<String>, Option<(String, Map<String, Value>)>);

/// The files of a folder that hold its weights.
fn weights(folder: &Path) -> Result<Weights, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
        let name = entry.map_err(Error::read(folder))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    let index: Vec<_> = names.iter().filter(|name| name.ends_with(INDEX)).collect();
    let files: Vec<_> = names
        .iter()
        .filter(|name| name.ends_with(EXTENSION) && !ADAPTER.contains(&name.as_str()))
        .collect();
    let (names, index) = match (&index[..], &files[..]) {
        ([], [file]) => (vec![file.to_string()], None),
        ([], []) => {
            let reason = match names.iter().find(|name| ADAPTER.contains(&name.as_str())) {
                Some(name) => format!("the folder has `{name}` of an adapter and no model"),
                None => "the folder has no safetensors file; pickles run code, so save the model as safetensors first"
                    .to_string(),
            };
            return Err(Error::malformed(folder, reason));
        }
        ([index], _) => {
            let path = folder.join(index);
            let map = read_index(&path)?;
            let mut shards: Vec<_> = weight_map(&path, &map)?.into_values().collect();
            shards.sort();
            shards.dedup();
            if let Some(other) = files.iter().find(|file| !shards.contains(file)) {
                return Err(Error::malformed(
                    folder,
                    format!(
                        "`{other}` is not in `{index}`, and may be the same model; keep one of them"
                    ),
                ));
            }
            (shards, Some((index.to_string(), map)))
        }
        _ => {
            let found: Vec<_> = files
                .iter()
                .chain(&index)
                .map(|name| format!("`{name}`"))
                .collect();
            let found = found.join(", ");
            return Err(Error::malformed(
                folder,
                format!("the folder has {found} and not a single index; name the file to use"),
            ));
        }
    };
    Ok((folder.to_path_buf(), names, index))
}

fn read_index(path: &Path) -> Result<Map<String, Value>, Error> {
    let bytes = input::read(path, LONGEST_HEADER).map_err(Error::read(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::malformed(path, format!("not a JSON object: {error}")))
}

/// Which file of the folder holds which tensor.
fn weight_map(path: &Path, index: &Map<String, Value>) -> Result<BTreeMap<String, String>, Error> {
    let Some(Value::Object(map)) = index.get("weight_map") else {
        return Err(Error::malformed(path, "it has no object `weight_map`"));
    };
    map.iter()
        .map(|(key, name)| {
            let name = name
                .as_str()
                .filter(|name| is_file_name(name))
                .ok_or_else(|| {
                    Error::tensor(
                        path,
                        key,
                        format!("is in {name}, which is not the name of a file beside it"),
                    )
                })?;
            Ok((key.clone(), name.to_string()))
        })
        .collect()
}

/// Whether this is the name of a file in a folder, and cannot lead out of it.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    )
}
