//! Why a file is not read, and why its layers find no place in a model.

use std::io;
use std::path::PathBuf;

use safetensors::SafeTensorError;

use crate::value::keymap::KeyMapError;
use crate::value::mismatch::{FitError, Mismatch};

/// Why [`AdapterFile`](super::AdapterFile) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialectError {
    /// The file cannot be read, or is a pipe, a device or a socket.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is that of a folder.
    #[error("{} is not a file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file is larger than any adapter.
    #[error(
        "{} has {bytes} bytes, more than any adapter; if it is the model, pass it as the base",
        path.display()
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not a safetensors file.
    #[error("{} is not a safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SafeTensorError,
    },
    /// No tensor is one of an orthogonal adapter's.
    #[error(
        "{} holds no OFT or BOFT adapter that is known; its tensors are {}; `burn-boft formats` lists what is read",
        path.display(),
        list(keys)
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Some of its tensors.
        keys: Vec<String>,
    },
    /// A tensor is one of another method's.
    #[error(
        "{}: `{key}` is of {method}, and only OFT and BOFT are read; merge it with the program that wrote it",
        path.display()
    )]
    Method {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// What other programs call the method.
        method: &'static str,
    },
    /// Two programs would read the file differently.
    #[error("{}: {first}, or {second}; {remedy}", path.display())]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// One reading.
        first: String,
        /// The other.
        second: String,
        /// How to decide.
        remedy: &'static str,
    },
    /// Tensors are missing, unexpected or wrong.
    #[error("{}: {mismatch}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        #[source]
        mismatch: Mismatch,
    },
    /// A pattern has no answer for a name.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// Layers have no place in the model, or do not fit it.
    #[error("{}: {}", path.display(), lines(misplaced))]
    Misplaced {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        misplaced: Vec<Misplaced>,
    },
}

/// Why a layer of a file has no place in a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misplaced {
    /// No module of the model has this name, in any of the ways in which programs write it.
    #[error(
        "the model has no module that a file would call `{module}`{}{}",
        translated.as_ref().map_or(String::new(), |name| format!(", or `{name}` in the layout of its UNet")),
        match &nearest[..] { [] => String::new(), names => format!("; the nearest are {}", list(names)) }
    )]
    Nowhere {
        /// The module's name in the file.
        module: String,
        /// What the file would call it in the layout of the model's UNet, if the file has the other one.
        translated: Option<String>,
        /// Modules of the model whose names end alike.
        nearest: Vec<String>,
    },
    /// Several modules of the model have this name in a file.
    #[error(
        "a file would call {} of the model `{module}`; rename it to one of them",
        list(found)
    )]
    Several {
        /// The module's name in the file.
        module: String,
        /// The modules of the model.
        found: Vec<String>,
    },
    /// Two layers of the file are for one module.
    #[error("`{first}` and `{second}` are both for `{path}` of the model")]
    Taken {
        /// The module of the model.
        path: String,
        /// One name in the file.
        first: String,
        /// The other.
        second: String,
    },
    /// A layer that the program turns one way if it was trained as a linear layer, and the other way if it was trained as a
    /// convolution.
    #[error(
        "sd-scripts trains `{module}` of Stable Diffusion 2 as a convolution where it loads a checkpoint and as a linear layer \
         where it loads a folder of diffusers, and turns the two opposite ways; nothing says which was trained, so `{path}` \
         cannot be merged here; merge it with sd-scripts"
    )]
    EitherWay {
        /// The module's name in the file.
        module: String,
        /// Its path in the model.
        path: String,
    },
    /// A layer does not fit the weight of its module.
    #[error("the adapter of `{module}`{reason}; `{path}.weight` is {shape:?}")]
    Fit {
        /// The module's name in the file.
        module: String,
        /// Its path in the model.
        path: String,
        /// The shape of the weight.
        shape: Vec<usize>,
        /// Why.
        reason: FitError,
    },
}

fn list(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

fn lines(misplaced: &[Misplaced]) -> String {
    let lines: Vec<_> = misplaced.iter().map(ToString::to_string).collect();
    lines.join("\n")
}
