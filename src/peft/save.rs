//! [`Adapter::save`]: an adapter into PEFT's folder.

use std::path::Path;

use burn::tensor::FloatDType;

use super::error::{SaveError, Unrepresentable};
use super::folder::{self, Folder};
use super::{config_json, notes, write};
use crate::config::{Selection, TargetModules};
use crate::value::keymap::KeyMap;
use crate::value::{Adapter, SavedToo};

/// How [`Adapter::save_with`] writes.
///
/// # Examples
///
/// ```no_run
/// use burn::tensor::FloatDType;
/// use burn_boft::peft::SaveOptions;
/// # use burn_boft::peft::SaveError;
/// # fn save(adapter: &burn_boft::Adapter) -> Result<(), SaveError> {
/// let options = SaveOptions::new().with_name("digits").with_dtype(FloatDType::BF16);
/// adapter.save_with("adapters", &options)?; // into adapters/digits
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct SaveOptions {
    /// The adapter's name; none for `default`.
    name: Option<String>,
    /// From the model's names to the file's.
    names: KeyMap,
    /// The precision of the adapter's numbers in the file; none keeps theirs.
    dtype: Option<FloatDType>,
}

impl SaveOptions {
    /// Keeps the names of modules and the precision of the numbers, which is f32 unless the model is f64: PEFT too
    /// writes f32 by default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes an adapter of this name, which is a folder in the folder; `default` is the folder itself.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Translates the names of modules in the model to those in the file.
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
    /// Writes the folder of an adapter for PEFT 0.18 and later.
    ///
    /// Only the adapter is written, never a base weight. The two files of the folder are replaced as one: readers find
    /// the old adapter or the new one, also after a crash, and several writers take turns, in one process or in many.
    /// Writers take turns by a lock on the file `.adapter.lock`, which exists only while they write; on a file system
    /// without locks, let one process write at a time. Other files in the folder are left alone.
    ///
    /// PEFT's BOFT always has a scale. Where none is trained, ones are written, and a line of text beside the tensors
    /// lets [`Adapter::load`] leave them out again. Another such line says that a scaled skew was trained. More than
    /// one factor needs PEFT's CUDA kernel; without it, PEFT refuses the file.
    /// [`Cayley::Neumann016`](crate::Cayley::Neumann016) is written as PEFT 0.16 and 0.17 wrote it, and only those
    /// versions and this crate compute it.
    ///
    /// # Errors
    ///
    /// - [`SaveError::Config`]: the settings could not be read back.
    /// - [`SaveError::Unrepresentable`]: a layer has sizes that PEFT would not make of the settings, or that its format
    ///   has no place for; or PEFT would save more modules by a name in `modules_to_save`, such as `lm_head` by `head`.
    /// - [`SaveError::KeyMap`]: a name could not be read back.
    /// - [`SaveError::Io`]: a file cannot be written.
    /// - [`SaveError::Json`], [`SaveError::Safetensors`]: the settings or the tensors cannot be encoded.
    ///
    /// The folder then still has the adapter that it had, unless the error is about the last step, the settings that
    /// are moved into place after the tensors: then readers find the new adapter, and the next save completes this one.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::AdapterLayer;
    /// use burn_boft::{Adapter, LayerKind, OftConfig};
    ///
    /// let skew = TensorData::new(vec![0.1f32; 3 * 6], [1, 3, 6]);
    /// let layer = AdapterLayer::new("query", Some(LayerKind::Linear), skew.clone(), None)?;
    /// let config = OftConfig::new().with_block_size(4).with_target_modules(["query"]);
    /// let adapter = Adapter::from_parts(config, vec![layer], Vec::new())?;
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let folder = folder.path();
    /// adapter.save(folder)?;
    /// let (loaded, _) = Adapter::load(folder)?;
    /// assert_eq!(loaded.layers()[0].skew(), &skew); // bit for bit
    /// assert_eq!(loaded.config(), adapter.config());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), SaveError> {
        self.save_with(folder, &SaveOptions::new())
    }

    /// Writes the folder of an adapter: [`Adapter::save`] with options.
    ///
    /// # Errors
    ///
    /// - [`SaveError::Name`]: the name of the adapter cannot be the name of a folder.
    /// - [`SaveError::KeyMap`]: a pattern has no answer for a name, gives two modules the same one, or writes a name
    ///   that is read as another.
    /// - All others as [`Adapter::save`].
    pub fn save_with(
        &self,
        folder: impl AsRef<Path>,
        options: &SaveOptions,
    ) -> Result<(), SaveError> {
        let folder = folder::folder(folder.as_ref(), options.name.as_deref())?;
        let names = &options.names;
        let mut config = self.config.clone();
        self.name_in_file(config.selection_mut(), names)?;
        config_json::check(&config)?;
        let format = config_json::format(&config);
        write::check_sizes(&self.config, &self.layers)?;
        self.check_saved(names)?;
        let tensors = write::tensors(format, self, names, options.dtype)?;
        let mut files = Folder::new(config_json::write(&config, &self.about), tensors);
        let notes = notes::write(format, &self.config, &self.layers);
        files.metadata.extend(notes);
        files.write(folder)
    }

    /// Says in the file's names which layers are adapted and which modules are saved.
    ///
    /// Names that are mapped, and `all-linear`, become the full paths of the adapted layers. A suffix or a regular
    /// expression of the model's names would not select the layers of the Python model, whose names are others, and PEFT would
    /// take an `all-linear` that is excluded for a regular expression. The
    /// settings that restrict a selection go with it. Where there were any, a list could select what they left out, since one
    /// path may end another, and the paths become a regular expression.
    fn name_in_file(&self, selection: &mut Selection, names: &KeyMap) -> Result<(), SaveError> {
        let is_all = |modules: &Option<TargetModules>| *modules == Some(TargetModules::AllLinear);
        let all_linear = is_all(&selection.target_modules) || is_all(&selection.exclude_modules);
        // PEFT writes the names that "all-linear" stood for, and so do names that are mapped.
        if all_linear || !names.is_identity() {
            let mut targets = Vec::new();
            for layer in &self.layers {
                targets.extend(names.file_paths(&layer.path)?);
            }
            let is_restricted = selection.exclude_modules.is_some()
                || !selection.layers_to_transform.is_empty()
                || matches!(selection.target_modules, Some(TargetModules::Regex(_)));
            selection.target_modules = Some(match is_restricted {
                true => TargetModules::whole_paths(targets.iter().map(String::as_str)),
                false => TargetModules::Names(targets),
            });
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

    /// Refuses a name in `modules_to_save` by which PEFT would save a module that this adapter does not save: it compares
    /// endings without regard to dots, and then fails to find the tensors of that module in the file.
    ///
    /// # Errors
    ///
    /// - [`SaveError::Unrepresentable`] for the first such name.
    /// - [`SaveError::KeyMap`]: the name of one of the two modules could not be read back.
    fn check_saved(&self, names: &KeyMap) -> Result<(), SaveError> {
        for SavedToo { entry, module } in &self.saved_too {
            let (entries, modules) = (names.file_paths(entry)?, names.file_paths(module)?);
            let ends =
                |other: &&String| entries.iter().any(|entry| other.ends_with(entry.as_str()));
            if let Some(other) = modules.iter().find(ends) {
                return Err(SaveError::Unrepresentable {
                    path: entry.clone(),
                    reason: Unrepresentable::SavedToo {
                        other: other.clone(),
                    },
                });
            }
        }
        Ok(())
    }
}
