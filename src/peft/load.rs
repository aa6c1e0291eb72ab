//! [`Adapter::load`]: an adapter out of PEFT's folder.

use std::io;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;
use serde_json::Map;

use super::config_json::ConfigError;
use super::folder::{self, NameError};
use super::keys::{CONFIG_FILE, TENSORS_FILE};
use super::read::{Findings, Parsed, Reader};
use crate::value::keymap::{KeyMap, KeyMapError};
use crate::value::mismatch::Mismatch;
use crate::value::{Adapter, LoadReport, Promise};

/// Why [`Adapter::load`](crate::Adapter::load) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder has tensors in Python's pickle format only.
    #[error(
        "{} has adapter_model.bin and no adapter_model.safetensors; pickles run code, so load it in PEFT and \
         save it there as safetensors",
        folder.display()
    )]
    Pickle {
        /// The folder.
        folder: PathBuf,
    },
    /// The name of an adapter is not the name of a folder.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The settings are not JSON.
    #[error("{} is not a JSON object: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The settings are refused.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        reason: ConfigError,
    },
    /// The tensors are not safetensors.
    #[error("{} is not a safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SafeTensorError,
    },
    /// Somebody replaced the files each time that they were read.
    #[error("{} is being written; load it again when that is done", folder.display())]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// Tensors are missing, unexpected or wrong.
    #[error("{}: {mismatch}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Which tensors, and why.
        #[source]
        mismatch: Mismatch,
    },
}

/// How [`Adapter::load_with`] reads.
///
/// # Examples
///
/// ```no_run
/// use burn_boft::peft::LoadOptions;
/// use burn_boft::{Adapter, KeyMap, Transformers};
///
/// let options = LoadOptions::new()
///     .with_name("digits")
///     .with_key_map(KeyMap::dinov2(Transformers::V5));
/// let (adapter, report) = Adapter::load_with("adapters", &options)?;
/// println!("{report}");
/// # drop(adapter);
/// # Ok::<(), burn_boft::peft::LoadError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    name: Option<String>,
    names: KeyMap,
    allow_partial: bool,
}

impl LoadOptions {
    /// Everything must fit, names are as they are.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads the adapter of this name, which is a folder in the folder; `default` is the folder itself.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Renames modules of the file to those of the model.
    pub fn with_key_map(mut self, names: KeyMap) -> Self {
        self.names = names;
        self
    }

    /// Loads what fits where something is missing or unexpected; the report names the rest. Wrong tensors are
    /// errors all the same.
    pub fn allow_partial(mut self, allow: bool) -> Self {
        self.allow_partial = allow;
        self
    }
}

impl Adapter {
    /// Reads the folder of an adapter that PEFT or [`Adapter::save`] wrote.
    ///
    /// The tensors say how many factors and which block sizes there are; where the configuration says
    /// otherwise, the report tells. Files of older versions are converted where that is exact:
    ///
    /// | written by | what is done |
    /// |---|---|
    /// | PEFT 0.11, 0.12: BOFT with `boft_P` | the permutations are left out |
    /// | PEFT 0.13 and older: OFT | refused: its rotation is another |
    /// | PEFT 0.14 to 0.15.2: OFT with `oft_r`, `oft_s` | read as BOFT with one factor |
    /// | PEFT 0.16, 0.17: OFT with the Neumann polynomial | computed with the series of that time |
    ///
    /// # Errors
    ///
    /// [`LoadError`]: files that are not there or are malformed, settings that are not supported, and every
    /// tensor that is missing, unexpected or wrong. [`Adapter::load_with`] can allow the first two.
    pub fn load(folder: impl AsRef<Path>) -> Result<(Self, LoadReport), LoadError> {
        Self::load_with(folder, &LoadOptions::new())
    }

    /// Reads the folder of an adapter: [`Adapter::load`] with options.
    ///
    /// # Errors
    ///
    /// As [`Adapter::load`], and where names cannot be mapped.
    pub fn load_with(
        folder: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<(Self, LoadReport), LoadError> {
        let folder = folder::folder(folder.as_ref(), options.name.as_deref())?;
        let (files, unreadable) = folder::read(&folder)?;
        let settings = files.settings.clone();
        let mut findings = Findings::default();
        findings.mismatch.wrong = unreadable;
        let keys = files.tensors.keys();
        let reader = Reader::new(&files.settings, keys, &mut findings.report);
        let reader = reader.map_err(|reason| LoadError::Config {
            path: folder.join(CONFIG_FILE),
            reason,
        })?;
        let promise = Promise {
            selection: reader.selection().clone(),
            names: options.names.clone(),
        };
        let Parsed {
            config,
            layers,
            tensors,
        } = reader.read(files, &options.names, &mut findings)?;
        let Findings { report, mismatch } = findings;
        let is_strict = !options.allow_partial || !mismatch.wrong.is_empty();
        if is_strict && !mismatch.is_empty() {
            let path = folder.join(TENSORS_FILE);
            return Err(LoadError::Mismatch { path, mismatch });
        }
        let report = LoadReport {
            missing: mismatch.missing,
            unexpected: mismatch.unexpected,
            ..report
        };
        let mut adapter = Self {
            config,
            layers,
            tensors,
            about: Map::new(),
            promised: Some(promise),
        };
        adapter.sort();
        Ok((adapter.with_about(&settings), report))
    }
}
