//! [`Adapter::save`]: an adapter into PEFT's folder.

use std::io;
use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use safetensors::SafeTensorError;

use super::config_json::{self, ConfigError};
use super::folder::{self, Folder, NameError};
use super::{scale, write};
use crate::config::{Selection, TargetModules};
use crate::rotation::factors;
use crate::value::Adapter;
use crate::value::keymap::{KeyMap, KeyMapError};

/// Why [`Adapter::save`](crate::Adapter::save) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A file cannot be written.
    #[error("{} cannot be written: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name of an adapter is not the name of a folder.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// The settings could not be read back.
    #[error("the settings cannot be written: {0}")]
    Config(#[from] ConfigError),
    /// PEFT's file has no place for it.
    #[error("PEFT's format cannot hold `{path}`: {reason}")]
    Unrepresentable {
        /// The layer, or the tensor.
        path: String,
        /// Why.
        reason: Unrepresentable,
    },
    /// The settings cannot be put into JSON.
    #[error("{} cannot be written: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The tensors make no safetensors file.
    #[error("{} cannot be written: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SafeTensorError,
    },
}

/// Why PEFT's format has no place for a part of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unrepresentable {
    /// One block for all channels, in BOFT.
    #[error(
        "its blocks share their numbers, and BOFT's have their own; attach the adapter to its model and extract it there"
    )]
    SharedBlocks,
    /// BOFT without a scale for outputs whose number is not known.
    #[error("it has no scale, and BOFT has one")]
    NoScale,
    /// A scale of a layer that may be of either kind.
    #[error(
        "its file does not tell a linear layer from a convolution, whose scales PEFT stores differently; attach the \
         adapter to its model and extract it there"
    )]
    UnknownKind,
    /// OFT with more than OFT has.
    #[error("OFT has one factor and no scale")]
    NotOft,
    /// A scale that does not split into the layers that the file has for one of the model.
    #[error("its {outputs} outputs do not split into {parts}")]
    Outputs {
        /// The outputs of the layer.
        outputs: usize,
        /// The layers in the file.
        parts: usize,
    },
    /// A tensor that does not split into the layers that the file has for one of the model.
    #[error("its {shape:?} do not split into {parts}")]
    Rows {
        /// The shape of the tensor.
        shape: Vec<usize>,
        /// The layers in the file.
        parts: usize,
    },
    /// A layer with factors of its own.
    #[error(
        "it has {} where the configuration says {settings}, and PEFT has one number for all layers",
        factors(*layer)
    )]
    Factors {
        /// The factors of the layer.
        layer: usize,
        /// Those of the configuration.
        settings: usize,
    },
    /// A layer with blocks that the configuration does not mean.
    #[error("it has blocks of {layer}, and PEFT makes blocks of {settings} of the configuration")]
    BlockSize {
        /// The block size of the layer.
        layer: usize,
        /// The one that PEFT would make.
        settings: usize,
    },
    /// A precision that the file does not have.
    #[error("it is {dtype}; f64, f32, f16, bf16 and i64 are written")]
    Precision {
        /// The precision.
        dtype: &'static str,
    },
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
        let format = config_json::format(&self.config);
        write::check_sizes(&self.config, &self.layers)?;
        let names = &options.names;
        let tensors = write::tensors(format, self, names, options.dtype)?;
        let mut config = self.config.clone();
        self.name_in_file(config.selection_mut(), names)?;
        let mut files = Folder::new(config_json::write(&config, &self.about), tensors);
        files.metadata.extend(scale::note(format, &self.layers));
        files.write(folder)
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
}
