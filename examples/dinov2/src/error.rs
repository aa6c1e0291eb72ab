use std::path::PathBuf;

use burn_boft::model::{InjectError, MergeError};
use thiserror::Error;

use crate::model::LoadError;

/// How many misfits a message lists, and how long it may be.
const LINE_PARTS: usize = 3;
const LINE_LENGTH: usize = 600;

/// Everything that can end the program.
#[derive(Debug, Error)]
pub enum Error {
    /// Options that contradict each other or the model.
    #[error("{0}")]
    Settings(String),

    /// A folder or a file that does not exist or cannot be used.
    #[error("{path}: {source}", path = path.display())]
    Path {
        path: PathBuf,
        source: std::io::Error,
    },

    /// A file that is not a readable image.
    #[error("{path} is not a readable image: {source}", path = path.display())]
    Image {
        path: PathBuf,
        source: image::ImageError,
    },

    /// An image folder without enough images to learn from.
    #[error("{path}: {reason}", path = path.display())]
    Folder { path: PathBuf, reason: String },

    /// A checkpoint that does not fit the model.
    #[error(
        "{path} is not loaded as the model of --size and --registers: {source}",
        path = path.display()
    )]
    Backbone { path: PathBuf, source: LoadError },

    /// Adapter sizes that do not fit the model.
    #[error("the adapter does not fit the backbone: {0}")]
    Inject(#[from] InjectError),

    /// An adapter that cannot be folded into its base weights.
    #[error("the adapter cannot be merged: {0}")]
    Merge(#[from] MergeError),

    /// A merged model whose predictions differ from those of the adapted one.
    #[error("merging changed {differing} predictions, logits by up to {difference:.1e}")]
    Merged { differing: usize, difference: f64 },

    /// A training run that failed.
    #[error("training stopped: {0}")]
    Training(String),

    /// A result that cannot be written.
    #[error("cannot write {path}: {reason}", path = path.display())]
    Write { path: PathBuf, reason: String },
}

impl Error {
    /// The exit code: 2 if the input is wrong, 1 for any other failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_)
            | Self::Path { .. }
            | Self::Image { .. }
            | Self::Folder { .. }
            | Self::Backbone { .. }
            | Self::Inject(_) => 2,
            Self::Merge(_) | Self::Merged { .. } | Self::Training(_) | Self::Write { .. } => 1,
        }
    }

    /// The message as one line of readable length, even if its parts have several lines.
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
