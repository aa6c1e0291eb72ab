//! Everything that can end the program.

use std::io;
use std::path::{Path, PathBuf};

use burn_boft::dialects::{DialectError, WriteError};
use burn_boft::peft::{LoadError, SaveError};
use burn_boft::value::Mismatch;
use thiserror::Error;

/// The exit code that shells report for a program that an interrupt ended.
pub const INTERRUPTED: u8 = 130;

/// How many problems a message lists.
pub const LINE_PARTS: usize = 3;
/// How many characters a message has at most.
const LINE_LENGTH: usize = 1000;

/// Everything that can end the program.
#[derive(Debug, Error)]
pub enum Error {
    /// Options that contradict each other or the files.
    #[error("{0}")]
    Settings(String),

    /// A file or folder that is not there or cannot be read.
    #[error("{path} cannot be read: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },

    /// A file or folder that is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    Malformed { path: PathBuf, reason: String },

    /// An adapter that cannot be loaded.
    #[error(transparent)]
    Adapter(#[from] LoadError),

    /// An adapter in a file of another program that cannot be read or placed.
    #[error(transparent)]
    Dialect(#[from] DialectError),

    /// An adapter and a model that do not fit each other, with each reason on a line of its own.
    #[error("{}", .0.join("\n"))]
    Fit(Vec<String>),

    /// A tensor of a file that cannot be used.
    #[error("{path}: `{key}` {reason}", path = path.display())]
    Tensor {
        path: PathBuf,
        key: String,
        reason: String,
    },

    /// A path that a result cannot be written to.
    #[error("{path} {reason}", path = path.display())]
    Output { path: PathBuf, reason: String },

    /// A result that cannot be written.
    #[error("{path} cannot be written: {source}", path = path.display())]
    Write { path: PathBuf, source: io::Error },

    /// Somebody asked the program to stop before the result was complete.
    #[error("interrupted before the output was complete; nothing was written")]
    Interrupted,

    /// Somebody asked the program to stop while it compared its result.
    #[error(
        "interrupted: {output} is complete, and was not compared with {base}",
        output = output.display(),
        base = base.display()
    )]
    NotCompared { output: PathBuf, base: PathBuf },

    /// Tensors that do not make an adapter.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),

    /// An adapter that sd-scripts cannot compute.
    #[error(transparent)]
    SdScripts(#[from] WriteError),

    /// An adapter that PEFT's format cannot hold.
    #[error(transparent)]
    Save(SaveError),
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Io { path, source } => Self::write(&path)(source),
            error => Self::Save(error),
        }
    }
}

impl Error {
    /// The error of reading this path.
    pub fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Read { path, source }
    }

    /// The error of writing this path.
    pub fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Write {
            path,
            source: plain(source),
        }
    }

    /// The error of a file with this fault.
    pub fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        let (path, reason) = (path.to_path_buf(), reason.into());
        Self::Malformed { path, reason }
    }

    /// The error of a tensor with this fault.
    pub fn tensor(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self::Tensor {
            path: path.to_path_buf(),
            key: key.to_string(),
            reason: reason.into(),
        }
    }

    /// The exit code: 2 where the input is at fault, 130 after an interrupt, 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Write { .. } => 1,
            Self::Interrupted | Self::NotCompared { .. } => INTERRUPTED,
            _ => 2,
        }
    }

    /// The message as one line of readable length, even where its parts have line breaks.
    pub fn line(&self) -> String {
        let text = self.to_string();
        let parts: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .collect();
        let mut line = parts[..parts.len().min(LINE_PARTS)].join("; ");
        if let Some((end, _)) = line.char_indices().nth(LINE_LENGTH) {
            line.truncate(end);
            line.push('…');
        }
        if parts.len() > LINE_PARTS {
            line.push_str(&format!("; and {} more", parts.len() - LINE_PARTS));
        }
        line
    }
}

/// The system's error, without the temporary path that `tempfile` adds to it.
fn plain(error: io::Error) -> io::Error {
    match error.get_ref() {
        Some(_) => error.kind().into(),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_several_lines_becomes_one() {
        let line = |text: &str| Error::Settings(text.to_string()).line();
        assert_eq!(line("first\n  second\n\n"), "first; second");
        assert_eq!(line("a\nb\nc\nd\ne"), "a; b; c; and 2 more");
        assert_eq!(line(&"é".repeat(2000)).chars().count(), LINE_LENGTH + 1);
    }
}
