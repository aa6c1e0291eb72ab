//! Every error of the crate.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

use crate::model::InjectError;

/// Why PEFT's settings are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nothing says what kind of adapter it is.
    #[error("`peft_type` is missing; PEFT writes \"BOFT\" or \"OFT\" there")]
    NoPeftType,
    /// An adapter of another kind.
    #[error("`peft_type` is {peft_type}, and only BOFT and OFT are supported")]
    OtherPeftType {
        /// The kind found.
        peft_type: String,
    },
    /// A value that its field cannot have.
    #[error("`{field}` is {value}, not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// Neither a size nor a count of blocks.
    #[error(
        "`{size_field}` and `{count_field}` are both 0; one of them must say how blocks are cut"
    )]
    NoSize {
        /// The field of the size.
        size_field: &'static str,
        /// The field of the count.
        count_field: &'static str,
    },
    /// Both a size and a count of blocks.
    #[error("`{size_field}` is {size} and `{count_field}` is {count}; one of them must be 0")]
    TwoSizes {
        /// The field of the size.
        size_field: &'static str,
        /// The size.
        size: usize,
        /// The field of the count.
        count_field: &'static str,
        /// The count.
        count: usize,
    },
    /// OFT of PEFT 0.13 or older.
    #[error(
        "`oft_block_size` is missing, so PEFT 0.13 or older wrote this OFT adapter, whose rotation is another; \
         merge it with that version, or train it anew"
    )]
    OldOft,
}

/// Why a [`KeyMap`](crate::KeyMap) is refused, or has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyMapError {
    /// A pattern that does not compile.
    #[error("the key pattern `{pattern}` cannot be used: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// Why it is refused.
        reason: String,
    },
    /// A pattern without an answer for a path.
    #[error("the key pattern `{pattern}` has no answer for `{path}`: {reason}")]
    Undecided {
        /// The pattern as given.
        pattern: String,
        /// The module's path.
        path: String,
        /// Why there is none, such as a search that backtracks without end.
        reason: String,
    },
    /// Two modules would get one name.
    #[error("the key map gives `{first}` and `{second}` the same name, `{name}`")]
    Collision {
        /// The first path.
        first: String,
        /// The second path.
        second: String,
        /// The name of both.
        name: String,
    },
    /// What is written would not be read back.
    #[error("the key map writes `{path}` as `{written}`, and reads that as `{read}`")]
    OneWay {
        /// The path in the model.
        path: String,
        /// Its name in the file.
        written: String,
        /// What that name is read as.
        read: String,
    },
}

/// Everything that keeps tensors and a model apart. `Display` has one line per entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// What should be there and is not.
    pub missing: Vec<String>,
    /// What is there and has no place, with the reason.
    pub unexpected: Vec<String>,
    /// What is there and cannot be used, with the reason.
    pub wrong: Vec<String>,
}

impl Mismatch {
    /// Whether nothing is amiss.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong.is_empty()
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let lines = [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("wrong", &self.wrong),
        ];
        let lines = lines
            .into_iter()
            .flat_map(|(what, entries)| entries.iter().map(move |entry| (what, entry)));
        for (index, (what, entry)) in lines.enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{what}: {entry}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mismatch {}

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
    /// The name of an adapter is not a folder's name.
    #[error("{0}")]
    Name(#[from] NameError),
    /// The settings are not JSON.
    #[error("{} is not a JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
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
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file changed each time it was read.
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

/// The name of an adapter is not a folder's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` cannot name an adapter: it must be the name of one folder, without `.` and separators"
)]
pub struct NameError {
    /// The name given.
    pub name: String,
}

/// Why [`Adapter::save`](crate::Adapter::save) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A file cannot be written. What was there before is untouched.
    #[error("{} cannot be written: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name of an adapter is not a folder's name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// PEFT's file has no place for it.
    #[error("PEFT's format cannot hold `{path}`: {reason}")]
    Unrepresentable {
        /// The layer.
        path: String,
        /// Why.
        reason: String,
    },
}

/// Why [`Adapter::attach`](crate::Adapter::attach) refuses. The model passed in is unchanged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The adapter and the model do not fit.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The settings do not work in any model, or the model cannot be adapted.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
}
