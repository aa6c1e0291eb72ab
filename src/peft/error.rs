//! Why an adapter's folder cannot be read or written. The verbs of this room return these errors, and so do the files below
//! them, which cannot import the verbs.

use std::io;
use std::path::PathBuf;

use safetensors::SafeTensorError;

use super::config_json::ConfigError;
use crate::rotation::factors;
use crate::value::keymap::KeyMapError;
use crate::value::mismatch::Mismatch;

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
    /// Somebody replaced the files each time that they were read. The adapter is whole; load it again.
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
        /// The layer, the tensor, or the name in `modules_to_save`.
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
    /// A rotation of the outputs.
    #[error(
        "it rotates the outputs of its layer, and PEFT rotates inputs; no rotation of the inputs does the same, so merge it"
    )]
    OutputAxis,
    /// An embedding in BOFT.
    #[error("BOFT adapts no embedding, and OFT does")]
    Embedding,
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
    /// A layer whose channels the count of blocks in the configuration does not divide.
    #[error(
        "it has {layer} blocks, and PEFT refuses the {settings} blocks of the configuration, which do not divide its channels"
    )]
    BlockCount {
        /// The blocks of the layer.
        layer: usize,
        /// Those of the configuration.
        settings: usize,
    },
    /// A name in `modules_to_save` that also ends the path of a module that is not saved.
    #[error(
        "PEFT saves every module whose path ends with a name in modules_to_save, with or without a dot before it, and would \
         look for `{other}` in the file; write more of the path, or save `{other}` too"
    )]
    SavedToo {
        /// The module that PEFT would look for.
        other: String,
    },
    /// A precision that the file does not have.
    #[error("it is {dtype}; f64, f32, f16, bf16 and i64 are written")]
    Precision {
        /// The precision.
        dtype: &'static str,
    },
}

/// The name of an adapter is not the name of a folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` cannot name an adapter: it must be the name of one folder, without `.` and separators"
)]
pub struct NameError {
    /// The name given.
    pub name: String,
}
