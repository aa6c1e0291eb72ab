//! [`Adapter`]: a trained adapter as a value, in and out of PEFT's files.

mod attach;
#[cfg(feature = "train")]
mod checkpoint;
mod config_json;
mod extract;
mod files;
mod fused;
mod keymap;
mod layer;
mod layout;
mod measure;
mod report;
mod write;

use std::path::Path;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use serde_json::{Map, Value};

#[cfg(feature = "train")]
pub use checkpoint::AdapterCheckpointer;
pub use keymap::{KeyMap, Place, Transformers};
pub use layer::{AdapterLayer, SavedTensor};
pub use measure::LayerMeasure;
pub use report::LoadReport;

use crate::adapter::AdapterSettings;
use crate::config::{AdapterConfig, Selection, TargetModules};
use crate::error::{LoadError, Mismatch, SaveError};
use crate::ops::Blocks;
use crate::plan::LayerKind;

/// A trained adapter as a value: its settings, and the numbers of every layer on the host.
///
/// It needs no model: [`Adapter::load`] and [`Adapter::save`] read and write PEFT's folder,
/// `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Debug, Clone)]
pub struct Adapter {
    config: AdapterConfig,
    layers: Vec<AdapterLayer>,
    tensors: Vec<SavedTensor>,
    /// Where it comes from, as PEFT's settings say it.
    about: Map<String, Value>,
    /// What the file promised, in its own names.
    promised: Option<Promise>,
}

/// What a file says it adapts and saves, in its own names.
#[derive(Debug, Clone)]
struct Promise {
    selection: Selection,
    names: KeyMap,
}

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
    /// Makes an adapter of settings and numbers that are in no file of PEFT's.
    ///
    /// The numbers say how many factors and which block sizes there are, and the settings follow.
    ///
    /// # Errors
    ///
    /// [`Mismatch`]: layers that the kind of adapter does not have, biases that do not fit their layer, and tensors
    /// that no file keeps.
    pub fn from_parts(
        config: impl Into<AdapterConfig>,
        mut layers: Vec<AdapterLayer>,
        tensors: Vec<SavedTensor>,
    ) -> Result<Self, Mismatch> {
        let mut config = config.into();
        let mut mismatch = Mismatch::default();
        if let AdapterConfig::Oft(oft) = &config {
            for layer in &mut layers {
                let [m, rows, _] = layer.skew.shape().dims::<3>();
                if m != 1 || layer.scale.is_some() || (oft.block_share && rows != 1) {
                    mismatch.wrong.push(format!(
                        "the adapter of `{}` has a scale, several factors or blocks that are not shared, and the \
                         settings say OFT without",
                        layer.path
                    ));
                }
                layer.block_share = oft.block_share;
            }
        }
        for tensor in &tensors {
            let (module, name, dtype) = (&tensor.module, &tensor.name, tensor.data.dtype());
            if !layer::is_float(dtype) && dtype != DType::I64 {
                let why = format!("`{module}.{name}` is {dtype:?}, which no file keeps");
                mismatch.wrong.push(why);
            }
        }
        layout::check_biases(&layers, &tensors, &mut mismatch);
        if !mismatch.is_empty() {
            return Err(mismatch);
        }
        layout::reconcile(&mut config, &layers, &mut LoadReport::default());
        let mut adapter = Self {
            config,
            layers,
            tensors,
            about: Map::new(),
            promised: None,
        };
        adapter.sort();
        Ok(adapter)
    }

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
        let folder = files::folder(folder.as_ref(), options.name.as_deref())?;
        let files::Folder {
            config: json,
            tensors,
            unreadable,
        } = files::read(&folder)?;
        let config_json::Read { config, warnings } =
            config_json::read(&json).map_err(|reason| LoadError::Config {
                path: folder.join(files::CONFIG),
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
        let parsed = layout::parse(config, &json, tensors, &options.names, found)?;
        let strict = !options.allow_partial || !mismatch.wrong.is_empty();
        if strict && !mismatch.is_empty() {
            let path = folder.join(files::TENSORS);
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
    /// Only the adapter is written, never a base weight. What the folder had is replaced as one: a crash leaves
    /// the old adapter or the new one for [`Adapter::load`]. Other files in the folder are left alone.
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
        let folder = files::folder(folder.as_ref(), options.name.as_deref())?;
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
        let tensors = files::to_safetensors(&tensors).map_err(unrepresentable)?;
        files::write(&folder, json.as_bytes(), &tensors)
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

    /// Orders layers and tensors by path.
    fn sort(&mut self) {
        self.layers.sort_by(|a, b| a.path.cmp(&b.path));
        self.tensors
            .sort_by(|a, b| (&a.module, &a.name).cmp(&(&b.module, &b.name)));
    }

    /// The settings, with the model's names.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The adapted layers, by path.
    pub fn layers(&self) -> &[AdapterLayer] {
        &self.layers
    }

    /// What travels beside: trained biases and modules to save.
    pub fn tensors(&self) -> &[SavedTensor] {
        &self.tensors
    }

    /// The settings as PEFT's `adapter_config.json` says them.
    pub fn settings(&self) -> Map<String, Value> {
        let settings = config_json::write(&self.config, &self.about).into_iter();
        settings
            .map(|(key, value)| (key.to_string(), value))
            .collect()
    }

    /// Where it comes from, as PEFT's settings say it: the model that it is for, its revision, the task.
    pub fn about(&self) -> &Map<String, Value> {
        &self.about
    }

    /// Takes over from PEFT's settings where it comes from; other settings are left out.
    pub fn with_about(mut self, settings: &Map<String, Value>) -> Self {
        let about = config_json::ABOUT
            .iter()
            .filter_map(|key| Some((key.to_string(), settings.get(*key)?.clone())));
        self.about = about.collect();
        self
    }

    /// PEFT's `base_model_name_or_path`: the model that the adapter is for.
    pub fn base_model(&self) -> Option<&str> {
        self.about.get("base_model_name_or_path")?.as_str()
    }

    /// Sets the model that the adapter is for, which PEFT looks up.
    pub fn with_base_model(mut self, name: impl Into<String>) -> Self {
        let key = "base_model_name_or_path".to_string();
        self.about.insert(key, Value::String(name.into()));
        self
    }

    /// The rotation of one of the layers, for a weight of `d_input` by `d_output`; none where blocks of one
    /// channel do not rotate.
    ///
    /// # Errors
    ///
    /// [`Mismatch`] where the adapter does not fit these widths.
    pub fn rotation(
        &self,
        layer: &AdapterLayer,
        [d_input, d_output]: [usize; 2],
        device: &Device,
    ) -> Result<Option<Blocks>, Mismatch> {
        if !layer.rotates() {
            return Ok(None);
        }
        let butterfly = layer.butterfly(d_input, d_output).map_err(|why| Mismatch {
            wrong: vec![format!("the adapter of `{}`: {why}", layer.path)],
            ..Mismatch::default()
        })?;
        let kind = layer.kind.unwrap_or(LayerKind::Linear);
        let settings = AdapterSettings::new(kind, butterfly, &self.config);
        let skew = Tensor::<3>::from_data(layer.skew.clone(), (device, layer.skew.dtype()));
        Ok(Some(settings.blocks(skew)))
    }
}
