//! Why a model or an adapter is not read or written.

use std::io;
use std::path::{Path, PathBuf};

use burn_boft::peft::{LoadError, SaveError};
use burn_boft::value::{AttachError, ExtractError, KeyMapError};
use thiserror::Error;

use crate::files::in_words;

/// How many names a message lists before it counts the rest.
const LISTED: usize = 4;

/// Why a model or an adapter is not read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file or a folder that cannot be read.
    #[error("{} cannot be read: {}", path.display(), in_words(source))]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A file or a folder that cannot be written.
    #[error("{} cannot be written: {}", path.display(), in_words(source))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// A folder to write to that holds files of somebody else.
    #[error(
        "{} holds other files ({}); writing there would delete them, so give a folder that is new or holds a saved model or adapter",
        path.display(),
        listed(files)
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// The files.
        files: Vec<String>,
    },

    /// A path to write to that names no folder of its own.
    #[error("{} cannot be replaced as a whole; give the name of a folder inside it", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },

    /// A JSON file that is not JSON, or has another kind of value at its top.
    #[error("{} is not {expected}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What it should be, such as `a JSON object`.
        expected: &'static str,
        /// Why it is not.
        reason: String,
    },

    /// A name that is neither a folder nor the name of a published model.
    #[error(
        "`{name}` is no folder, and not the name of a published model, such as facebook/dinov2-small"
    )]
    NoSuchModel {
        /// What was given.
        name: String,
    },

    /// A file where a folder is needed.
    #[error("{} is a file; give the folder that holds it", path.display())]
    IsFile {
        /// The file.
        path: PathBuf,
    },

    /// A folder without `config.json`.
    #[error("{} has no config.json, so it holds no model of Hugging Face", folder.display())]
    NoConfig {
        /// The folder.
        folder: PathBuf,
    },

    /// An adapter where a model is needed.
    #[error(
        "{} holds an adapter and no whole model; pass it as --adapter, and its base as --model",
        folder.display()
    )]
    IsAdapter {
        /// The folder.
        folder: PathBuf,
    },

    /// A model of another kind.
    #[error(
        "{} describes a model of type `{found}`; only `dinov2` and `dinov2_with_registers` are supported",
        path.display()
    )]
    Architecture {
        /// The `config.json`.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
    },

    /// A setting that this program does not support.
    #[error("{}: {setting} is {found}, but {expected}", path.display())]
    Setting {
        /// The file that says it.
        path: PathBuf,
        /// The setting's name.
        setting: String,
        /// Its value.
        found: String,
        /// What is supported.
        expected: String,
    },

    /// A folder with `config.json` and no weights.
    #[error(
        "{} has no weights: model.safetensors, pytorch_model.bin, or the .index.json of one in shards is needed beside config.json",
        folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },

    /// A shard that the index names and the folder lacks.
    #[error("{} names {shard}, which is not in its folder; the download is incomplete", index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file that is missing.
        shard: String,
    },

    /// A file of weights whose content cannot be understood.
    #[error("{} holds no usable weights: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// Weights of a model of another size than its settings.
    #[error("{}: this {what} {found}, but {said_by} {said}", path.display())]
    Size {
        /// The file of the weights.
        path: PathBuf,
        /// What the weights are of, `checkpoint` or `adapter`.
        what: &'static str,
        /// The size of the weights, such as `is 64 wide with 3 layers`.
        found: String,
        /// Who says otherwise.
        said_by: &'static str,
        /// The other size.
        said: String,
    },

    /// Tensors that do not fit the model. Every one is listed, under its name in the file.
    #[error("{} does not fit the model{}", path.display(), misfits(missing, unexpected, wrong))]
    Misfit {
        /// The file.
        path: PathBuf,
        /// Tensors that the model needs and the file lacks.
        missing: Vec<String>,
        /// Tensors that the model has no place for.
        unexpected: Vec<String>,
        /// Tensors of another shape or kind than the model needs, with both.
        wrong: Vec<String>,
    },

    /// A published model that is not in the local cache, without a connection.
    #[error(
        "{name} is no folder and not complete in the cache ({}), and {endpoint} cannot be reached: {reason}; give a folder, or try again online",
        cache.display()
    )]
    Offline {
        /// The model.
        name: String,
        /// The folder of the cache.
        cache: PathBuf,
        /// The server.
        endpoint: String,
        /// Why it cannot be reached.
        reason: String,
    },

    /// A published model that the server does not give out.
    #[error(
        "{name} is no folder, and {endpoint} does not give it out ({reason}); is the name right, and is it public?"
    )]
    Refused {
        /// The model.
        name: String,
        /// The server.
        endpoint: String,
        /// What it answered.
        reason: String,
    },

    /// A published model without the files that are needed.
    #[error("{name} on {endpoint} has no {needed}")]
    Unpublished {
        /// The model.
        name: String,
        /// The server.
        endpoint: String,
        /// The file that it lacks.
        needed: &'static str,
    },

    /// A folder that holds no adapter.
    #[error(
        "{} holds no adapter: it has neither adapter_config.json (of PEFT), head.json (a linear probe) nor config.json (a whole model)",
        folder.display()
    )]
    NoAdapter {
        /// The folder.
        folder: PathBuf,
    },

    /// An adapter whose head has other classes than the model's.
    #[error(
        "{}: the adapter's head has {adapter} classes, and the model's {model}; build the model with the adapter's classes",
        folder.display()
    )]
    Classes {
        /// The adapter's folder.
        folder: PathBuf,
        /// Classes of the adapter.
        adapter: usize,
        /// Classes of the model.
        model: usize,
    },

    /// Neither the adapter nor its base has a head.
    #[error(
        "{} saves no head, and {model} has none either, so there are no classes to predict",
        folder.display()
    )]
    NoHead {
        /// The adapter's folder.
        folder: PathBuf,
        /// The base.
        model: String,
    },

    /// A method without an adapter in PEFT's layout.
    #[error(
        "{} holds {found}, for which PEFT has no layout; export the merged model instead",
        folder.display()
    )]
    NoPeftLayout {
        /// The folder.
        folder: PathBuf,
        /// What it holds.
        found: &'static str,
    },

    /// A model with an adapter where plain weights are needed.
    #[error("the model still carries adapters; merge them first")]
    NotMerged,

    /// A model that does not carry the adapter that is to be saved.
    #[error("the model carries no LoRA, so there is nothing to save")]
    NotAdapted,

    /// Other names than the model has classes.
    #[error("{names} class names do not fit a head with {classes} classes")]
    Labels {
        /// How many names there are.
        names: usize,
        /// How many classes the head has.
        classes: usize,
    },

    /// An adapter of BOFT or OFT that cannot be read.
    #[error("{}", one_line(&.0.to_string()))]
    Load(#[source] LoadError),

    /// An adapter that cannot be written.
    #[error("{}", one_line(&.0.to_string()))]
    Save(#[source] SaveError),

    /// An adapter of BOFT or OFT that does not fit the model.
    #[error("{} does not fit the model: {}", folder.display(), one_line(&source.to_string()))]
    Attach {
        /// The adapter's folder.
        folder: PathBuf,
        /// Why.
        source: AttachError,
    },

    /// An adapter of BOFT or OFT that cannot be taken out of the model.
    #[error("{}", one_line(&.0.to_string()))]
    Extract(#[from] ExtractError),

    /// A name that cannot be translated to the names of transformers.
    #[error(transparent)]
    Names(#[from] KeyMapError),
}

impl WeightsError {
    /// Whether the input is wrong, as opposed to a failure of this program or of the machine.
    pub fn is_input(&self) -> bool {
        !matches!(
            self,
            Self::Write { .. }
                | Self::NotMerged
                | Self::NotAdapted
                | Self::Save(_)
                | Self::Extract(_)
                | Self::Names(_)
        )
    }
}

impl From<LoadError> for WeightsError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Io { path, source } => Self::Read { path, source },
            error => Self::Load(error),
        }
    }
}

impl From<SaveError> for WeightsError {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Io { path, source } => Self::Write { path, source },
            error => Self::Save(error),
        }
    }
}

/// A message of several lines as one.
pub(super) fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

/// For `map_err`: this file or folder cannot be read.
pub(super) fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> WeightsError {
    let path = path.to_path_buf();
    move |source| WeightsError::Read { path, source }
}

/// For `map_err`: this file or folder cannot be written.
pub(super) fn unwritable(path: &Path) -> impl FnOnce(io::Error) -> WeightsError {
    let path = path.to_path_buf();
    move |source| WeightsError::Write { path, source }
}

/// The first names, and how many more there are.
fn listed(names: &[String]) -> String {
    let shown = names[..names.len().min(LISTED)].join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The lists that are not empty.
fn misfits(missing: &[String], unexpected: &[String], wrong: &[String]) -> String {
    [
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrong", wrong),
    ]
    .into_iter()
    .filter(|(_, names)| !names.is_empty())
    .map(|(what, names)| format!("; {what}: {}", listed(names)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_no_number_of_the_system() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(in_words(&error), "no such file or directory");
        assert_eq!(in_words(&io::Error::other("Broken")), "broken");
    }

    #[test]
    fn a_long_list_is_cut_and_counted() {
        let names: Vec<String> = (0..6).map(|index| format!("n{index}")).collect();
        assert_eq!(listed(&names[..2]), "n0, n1");
        assert_eq!(listed(&names), "n0, n1, n2, n3 and 2 more");
        assert_eq!(
            misfits(&names[..1], &[], &names[1..2]),
            "; missing: n0; wrong: n1"
        );
    }
}
