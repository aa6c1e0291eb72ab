//! The files of a model's weights: one or several, safetensors or PyTorch's pickles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use burn::store::burn_pack::Tensor;
use burn::store::{ModuleStore, PytorchStore, SafetensorsStore};
use serde_json::{Map, Value};

use super::config::object;
use super::error::{WeightsError, one_line, unreadable};

/// The file of a whole model.
pub(super) const SAFETENSORS: &str = "model.safetensors";

/// Files of weights by the order in which they are preferred, and whether they are pickles. Each may also be in shards,
/// which an index of its name with `.index.json` lists.
pub(super) const NAMES: [(&str, bool); 2] = [(SAFETENSORS, false), ("pytorch_model.bin", true)];

/// How a file starts that Git LFS has not replaced by the real one.
const POINTER: &[u8] = b"version https://git-lfs";

/// Tensors by their names in a file. Their numbers are read when they are needed.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// The weights of a folder.
#[derive(Clone, Debug)]
pub(super) struct Files {
    /// The file for messages: the only one, or the index.
    pub(super) path: PathBuf,
    shards: Vec<PathBuf>,
    is_pickle: bool,
}

impl Files {
    /// Finds the weights of a folder; safetensors are preferred.
    pub(super) fn find(folder: &Path) -> Result<Self, WeightsError> {
        for (name, is_pickle) in NAMES {
            let path = folder.join(name);
            if path.is_file() {
                return Ok(Self::single(path, is_pickle));
            }
            let index = folder.join(index_of(name));
            if index.is_file() {
                let shards = existing_shards(&index)?;
                return Ok(Self {
                    path: index,
                    shards,
                    is_pickle,
                });
            }
        }
        Err(WeightsError::NoWeights {
            folder: folder.to_path_buf(),
        })
    }

    /// One file of safetensors.
    pub(super) fn safetensors(path: PathBuf) -> Self {
        Self::single(path, false)
    }

    fn single(path: PathBuf, is_pickle: bool) -> Self {
        Self {
            shards: vec![path.clone()],
            path,
            is_pickle,
        }
    }

    /// All tensors of all files.
    pub(super) fn read(&self) -> Result<Tensors, WeightsError> {
        let mut tensors = Tensors::new();
        for shard in &self.shards {
            for (name, tensor) in self.read_shard(shard)? {
                if tensors.contains_key(&name) {
                    return Err(WeightsError::Malformed {
                        path: shard.clone(),
                        reason: format!("{name} is in another shard too"),
                    });
                }
                tensors.insert(name, tensor);
            }
        }
        Ok(tensors)
    }

    fn read_shard(&self, path: &Path) -> Result<Tensors, WeightsError> {
        let malformed = |reason: String| WeightsError::Malformed {
            path: path.to_path_buf(),
            reason,
        };
        let mut start = Vec::new();
        File::open(path)
            .and_then(|file| file.take(POINTER.len() as u64).read_to_end(&mut start))
            .map_err(unreadable(path))?;
        if start == POINTER {
            let reason = "it is a pointer of Git LFS; run `git lfs pull` in its folder";
            return Err(malformed(reason.to_string()));
        }
        if start.is_empty() {
            return Err(malformed("the file is empty".to_string()));
        }
        if self.is_pickle {
            let mut store = PytorchStore::from_file(path);
            let tensors = store.get_all_tensors();
            let tensors = tensors.map_err(|error| malformed(damaged(&error)))?;
            return Ok(tensors.clone());
        }
        let mut store = SafetensorsStore::from_file(path);
        let tensors = store.get_all_tensors();
        let tensors = tensors.map_err(|error| malformed(damaged(&error)))?;
        Ok(tensors.clone())
    }
}

/// The tensors of a safetensors file in memory; `name` is for messages.
pub(super) fn read_bytes(bytes: &[u8], name: &Path) -> Result<Tensors, WeightsError> {
    let mut store = SafetensorsStore::from_bytes(Some(bytes.to_vec()));
    let tensors = store.get_all_tensors();
    let tensors = tensors.map_err(|error| WeightsError::Malformed {
        path: name.to_path_buf(),
        reason: damaged(&error),
    })?;
    Ok(tensors.clone())
}

/// The name of the index of a file that is in shards.
pub(super) fn index_of(name: &str) -> String {
    format!("{name}.index.json")
}

/// The files that an index names, sorted.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>, WeightsError> {
    let text = fs::read(index).map_err(unreadable(index))?;
    let json = object(&text, index)?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let names = map.and_then(file_names).filter(|names| !names.is_empty());
    names.ok_or_else(|| WeightsError::Json {
        path: index.to_path_buf(),
        expected: "an index of shards",
        reason: "it has no weight_map from tensors to files".to_string(),
    })
}

/// The values of a `weight_map`. None where one is not the plain name of a file.
fn file_names(map: &Map<String, Value>) -> Option<BTreeSet<String>> {
    let name = |value: &Value| {
        let name = value.as_str()?;
        let is_plain = Path::new(name).file_name().is_some_and(|last| last == name);
        is_plain.then(|| name.to_string())
    };
    map.values().map(name).collect()
}

fn existing_shards(index: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let folder = index.parent().unwrap_or(Path::new(""));
    let existing = |shard: String| {
        let path = folder.join(&shard);
        match path.is_file() {
            true => Ok(path),
            false => Err(WeightsError::MissingShard {
                index: index.to_path_buf(),
                shard,
            }),
        }
    };
    shards(index)?.into_iter().map(existing).collect()
}

/// What a reader found, and what it most likely means.
fn damaged(error: &impl ToString) -> String {
    let found = one_line(&error.to_string());
    format!("{found}; it is damaged, or its download is incomplete")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_index_cannot_lead_out_of_its_folder() {
        for shard in ["../model.safetensors", "/etc/passwd", "a/b", "", ".."] {
            let map = json!({"a": "one.safetensors", "b": shard});
            assert_eq!(file_names(map.as_object().unwrap()), None, "{shard}");
        }
        let map = json!({"a": "one", "b": "two", "c": "one"});
        let names = file_names(map.as_object().unwrap()).unwrap();
        assert_eq!(names, ["one", "two"].map(String::from).into());
    }
}
