//! The folder of a run: what it was asked for, its checkpoints, its journal, and what came out.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::files;
use crate::settings::Settings;
use crate::training::{Checkpoints, Folder};

const SETTINGS: &str = "settings.toml";
const TASK: &str = "task.json";
const PROBE: &str = "probe";
const PROBE_SCORES: &str = "probe.json";
const CHECKPOINTS: &str = "checkpoints";
const JOURNAL: &str = "journal.jsonl";
const ADAPTER: &str = "adapter";
const PREDICTIONS: &str = "predictions.jsonl";
const RESULTS: &str = "results.json";
const LOCK: &str = ".lock";

/// The folder of a run, which no other process trains in meanwhile.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    settings: Settings,
    _lock: Option<File>,
}

/// What a run was trained on, so that it is not continued with something else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    pub classes: Vec<String>,
    /// Images for training, validation and test.
    pub images: [usize; 3],
    /// A fingerprint of their names and of their order.
    pub fingerprint: String,
}

/// How the linear probe does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProbeScores {
    pub valid_loss: f64,
    pub valid_accuracy: f64,
    pub test_accuracy: f64,
}

/// What a run achieved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub method: String,
    pub trainable_parameters: usize,
    pub best_epoch: usize,
    pub valid_loss: f64,
    pub valid_accuracy: f64,
    pub test_accuracy: f64,
    pub seconds: f64,
}

impl RunFolder {
    /// Checks that a folder can be that of a new run.
    ///
    /// # Errors
    ///
    /// The folder holds something already.
    pub fn check_free(path: &Path, overwrite: bool) -> Result<(), Error> {
        if path.join(SETTINGS).exists() {
            if !overwrite {
                return Err(Error::RunExists {
                    path: path.to_path_buf(),
                });
            }
        } else if fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Error::Settings(format!(
                "{} is not empty and holds no run; choose another --output",
                path.display()
            )));
        }
        Ok(())
    }

    /// Makes the folder of a new run.
    ///
    /// # Errors
    ///
    /// The folder holds something already, or cannot be written.
    pub fn create(path: &Path, settings: Settings, overwrite: bool) -> Result<Self, Error> {
        Self::check_free(path, overwrite)?;
        fs::create_dir_all(path).map_err(|source| unusable(path, source))?;
        let lock = lock(path)?;
        let settings_file = path.join(SETTINGS);
        if settings_file.exists() {
            clear(path)?;
        }
        let checkpoints = path.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints).map_err(|source| unusable(&checkpoints, source))?;
        // The settings come last: a folder with settings is a run.
        let table = settings.to_options().to_table()?;
        write_whole(&settings_file, table.to_string().as_bytes())?;
        Ok(Self {
            path: path.to_path_buf(),
            settings,
            _lock: Some(lock),
        })
    }

    /// Opens the folder of a run to go on with it.
    ///
    /// # Errors
    ///
    /// The folder is no run, or another process trains in it.
    pub fn resume(path: &Path) -> Result<Self, Error> {
        let run = Self::open(path)?;
        let checkpoints = path.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints).map_err(|source| unusable(&checkpoints, source))?;
        Ok(Self {
            _lock: Some(lock(path)?),
            ..run
        })
    }

    /// Opens the folder of a run to read from it.
    ///
    /// # Errors
    ///
    /// The folder is no run.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let settings = path.join(SETTINGS);
        if !settings.is_file() {
            return Err(Error::Settings(format!(
                "{} is not the folder of a run: it has no {SETTINGS}",
                path.display()
            )));
        }
        Ok(Self {
            path: path.to_path_buf(),
            settings: Settings::read(&settings)?,
            _lock: None,
        })
    }

    /// The first of `base`, `base-2`, `base-3` and so on that does not exist.
    pub fn free(base: &str) -> PathBuf {
        let numbered = (2..).map(|number| PathBuf::from(format!("{base}-{number}")));
        std::iter::once(PathBuf::from(base))
            .chain(numbered)
            .find(|path| !path.exists())
            .expect("one of endlessly many names is free")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where the training leaves its files.
    pub fn training(&self) -> Folder {
        Folder {
            checkpoints: Checkpoints::new(self.path.join(CHECKPOINTS)),
            journal: self.journal(),
            every: self.settings.checkpoint_every,
        }
    }

    pub fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL)
    }

    /// The folder of the trained adapter.
    pub fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    /// The folder of the linear probe.
    pub fn probe(&self) -> PathBuf {
        self.path.join(PROBE)
    }

    /// The file with the logits of every test image.
    pub fn predictions(&self) -> PathBuf {
        self.path.join(PREDICTIONS)
    }

    /// Notes what the run is trained on, or checks that it is the same as before.
    ///
    /// # Errors
    ///
    /// The images are not those that the run began with, or the file cannot be used.
    pub fn check_task(&self, task: &TaskRecord) -> Result<(), Error> {
        let path = self.path.join(TASK);
        match read_json::<TaskRecord>(&path)? {
            None => write_json(&path, task),
            Some(before) if before == *task => Ok(()),
            Some(before) => Err(Error::Settings(format!(
                "the images have changed since {} began: {} classes and {:?} images then, {} and {:?} now",
                self.path.display(),
                before.classes.len(),
                before.images,
                task.classes.len(),
                task.images,
            ))),
        }
    }

    /// How the linear probe of this run does, if it was trained.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn probe_scores(&self) -> Result<Option<ProbeScores>, Error> {
        read_json(&self.path.join(PROBE_SCORES))
    }

    /// Saves how the linear probe does.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save_probe_scores(&self, scores: &ProbeScores) -> Result<(), Error> {
        write_json(&self.path.join(PROBE_SCORES), scores)
    }

    /// What the run achieved, if it is done.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn results(&self) -> Result<Option<Results>, Error> {
        read_json(&self.path.join(RESULTS))
    }

    /// Saves what the run achieved.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save_results(&self, results: &Results) -> Result<(), Error> {
        write_json(&self.path.join(RESULTS), results)
    }
}

/// Deletes what a run left, and nothing else.
fn clear(path: &Path) -> Result<(), Error> {
    // The settings go last: as long as they are there, the folder counts as a run.
    for name in [
        RESULTS,
        PREDICTIONS,
        ADAPTER,
        PROBE,
        PROBE_SCORES,
        JOURNAL,
        CHECKPOINTS,
        TASK,
        SETTINGS,
    ] {
        let entry = path.join(name);
        let removed = match entry.is_dir() {
            true => fs::remove_dir_all(&entry),
            false => fs::remove_file(&entry),
        };
        match removed {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(unusable(&entry, source));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Locks the folder until the process ends.
fn lock(path: &Path) -> Result<File, Error> {
    let file = path.join(LOCK);
    let lock = File::create(&file).map_err(|source| unusable(&file, source))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::Settings(format!(
            "another process trains in {}",
            path.display()
        ))),
        Err(TryLockError::Error(source)) => Err(unusable(&file, source)),
    }
}

fn unusable(path: &Path, source: std::io::Error) -> Error {
    Error::Path {
        path: path.to_path_buf(),
        source,
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(unusable(path, source)),
    };
    let value = serde_json::from_str(&text).map_err(|error| Error::SettingsFile {
        path: path.to_path_buf(),
        reason: error.to_string(),
    })?;
    Ok(Some(value))
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::Write {
        path: path.to_path_buf(),
        reason: error.to_string(),
    })?;
    write_whole(path, &text)
}

/// Writes a file that appears whole or not at all.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    files::write_whole(path, bytes).map_err(|source| Error::Write {
        path: path.to_path_buf(),
        reason: source.to_string(),
    })
}
