//! PEFT's files: an [`Adapter`] out of a folder and into one.

mod config_json;
mod folder;
mod fused;
mod read;
mod write;

use std::path::Path;

use burn::tensor::FloatDType;
use serde_json::{Map, Value};

use crate::config::{Selection, TargetModules};
use crate::error::{LoadError, Mismatch, SaveError};
use crate::value::{Adapter, KeyMap, LoadReport, Promise};

/// How [`Adapter::load_with`] reads.
///
/// # Examples
///
/// ```no_run
/// use burn_boft::{Adapter, KeyMap, LoadOptions, Transformers};
///
/// let options = LoadOptions::new()
///     .with_name("digits")
///     .with_key_map(KeyMap::dinov2(Transformers::V5));
/// let (adapter, report) = Adapter::load_with("adapters", &options)?;
/// println!("{report}");
/// # drop(adapter);
/// # Ok::<(), burn_boft::LoadError>(())
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

/// How [`Adapter::save_with`] writes.
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    name: Option<String>,
    names: KeyMap,
    dtype: Option<FloatDType>,
}

impl SaveOptions {
    /// Names are as they are, numbers as precise as they are: PEFT too writes f32 by default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes an adapter of this name, which is a folder in the folder; `default` is the folder itself.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Renames modules of the model to those of the file.
    pub fn with_key_map(mut self, names: KeyMap) -> Self {
        self.names = names;
        self
    }

    /// Rounds the numbers of the adapter to this precision; biases and saved modules keep theirs.
    pub fn with_dtype(mut self, dtype: FloatDType) -> Self {
        self.dtype = Some(dtype);
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
        let folder::Folder {
            config: json,
            tensors,
            unreadable,
        } = folder::read(&folder)?;
        let config_json::Read { config, warnings } =
            config_json::read(&json).map_err(|reason| LoadError::Config {
                path: folder.join(folder::CONFIG),
                reason,
            })?;
        let mut report = LoadReport {
            warnings,
            ..LoadReport::default()
        };
        let mut mismatch = Mismatch {
            wrong: unreadable,
            ..Mismatch::default()
        };
        let selection = config.selection().clone();
        let found = (&mut report, &mut mismatch);
        let parsed = read::parse(config, &json, tensors, &options.names, found)?;
        let strict = !options.allow_partial || !mismatch.wrong.is_empty();
        if strict && !mismatch.is_empty() {
            let path = folder.join(folder::TENSORS);
            return Err(LoadError::Mismatch { path, mismatch });
        }
        report.missing = mismatch.missing;
        report.unexpected = mismatch.unexpected;
        let mut adapter = Self {
            config: parsed.config,
            layers: parsed.layers,
            tensors: parsed.tensors,
            about: Map::new(),
            promised: Some(Promise {
                selection,
                names: options.names.clone(),
            }),
        };
        adapter.sort();
        Ok((adapter.with_about(&json), report))
    }

    /// Writes the folder of an adapter for PEFT 0.18 and later.
    ///
    /// Only the adapter is written, never a base weight. The two files of the folder are replaced as one: readers find
    /// the old adapter or the new one, also after a crash, and several writers take turns, in one process or in many.
    /// Writers take turns by a lock on the file `.adapter.lock`, which exists only while they write; on a file system
    /// without locks, let one process write at a time. Other files in the folder are left alone.
    ///
    /// PEFT's BOFT always has a scale, so one that was not trained is written as ones; more than one factor
    /// needs PEFT's CUDA kernel there, which says so. [`Cayley::Neumann016`](crate::Cayley::Neumann016) is
    /// written as PEFT 0.17 did, and only that version and this crate compute it.
    ///
    /// # Errors
    ///
    /// [`SaveError`]: files that cannot be written, and sizes or names that PEFT could not read back. What was
    /// there before is untouched.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), SaveError> {
        self.save_with(folder, &SaveOptions::new())
    }

    /// Writes the folder of an adapter: [`Adapter::save`] with options.
    ///
    /// # Errors
    ///
    /// As [`Adapter::save`], and where names cannot be mapped there and back.
    pub fn save_with(
        &self,
        folder: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<(), SaveError> {
        let folder = folder::folder(folder.as_ref(), options.name.as_deref())?;
        config_json::check(&self.config)?;
        write::check_sizes(&self.config, &self.layers)?;
        let names = &options.names;
        let tensors = write::tensors(
            &self.config,
            &self.layers,
            &self.tensors,
            names,
            options.dtype,
        )?;
        let mut config = self.config.clone();
        self.name_in_file(config.selection_mut(), names)?;
        let json = config_json::write(&config, &self.about);
        let unrepresentable = |reason: String| SaveError::Unrepresentable {
            path: folder.display().to_string(),
            reason,
        };
        let json = serde_json::to_string_pretty(&json)
            .map_err(|error| unrepresentable(error.to_string()))?;
        let tensors = folder::to_safetensors(&tensors).map_err(unrepresentable)?;
        folder::write(&folder, json.as_bytes(), &tensors)
    }

    /// Says in the file's names which layers are adapted and which modules are saved.
    fn name_in_file(&self, selection: &mut Selection, names: &KeyMap) -> Result<(), SaveError> {
        let all_linear = matches!(selection.target_modules, Some(TargetModules::AllLinear));
        // PEFT writes the names that "all-linear" stood for, and so do names that are mapped.
        if all_linear || !names.is_identity() {
            let mut targets = Vec::new();
            for layer in &self.layers {
                targets.extend(names.file_paths(&layer.path)?);
            }
            selection.target_modules = Some(TargetModules::Names(targets));
            selection.exclude_modules = None;
            selection.layers_to_transform = Vec::new();
            selection.layers_pattern = Vec::new();
        }
        if !names.is_identity() {
            let mut modules = Vec::new();
            for name in &selection.modules_to_save {
                modules.extend(names.file_paths(name)?);
            }
            selection.modules_to_save = modules;
        }
        Ok(())
    }

    /// The settings as PEFT's `adapter_config.json` says them.
    pub fn settings(&self) -> Map<String, Value> {
        let settings = config_json::write(&self.config, &self.about).into_iter();
        settings
            .map(|(key, value)| (key.to_string(), value))
            .collect()
    }

    /// Takes over from PEFT's settings where it comes from; other settings are left out.
    pub fn with_about(mut self, settings: &Map<String, Value>) -> Self {
        let about = config_json::ABOUT
            .iter()
            .filter_map(|key| Some((key.to_string(), settings.get(*key)?.clone())));
        self.about = about.collect();
        self
    }
}
