use std::path::PathBuf;

use burn_boft::model::{InjectError, MergeError};
use thiserror::Error;

use crate::evidence::EvidenceError;
use crate::files::in_words;
use crate::images::{FolderError, LoaderError, ProcessorError};
use crate::report::ReportError;
use crate::scores::ScoresError;
use crate::training::TrainError;
use crate::weights::WeightsError;

/// How many misfits a message lists, and how long it may be.
const LINE_PARTS: usize = 3;
const LINE_LENGTH: usize = 600;

/// Everything that can end the program.
#[derive(Debug, Error)]
pub enum Error {
    /// Options that contradict each other or the model.
    #[error("{0}")]
    Settings(String),

    /// A file of this program that holds something else than it should.
    #[error("{path}: {reason}", path = path.display())]
    SettingsFile { path: PathBuf, reason: String },

    /// A folder or a file that does not exist or cannot be used.
    #[error("{path}: {}", in_words(source), path = path.display())]
    Path {
        path: PathBuf,
        source: std::io::Error,
    },

    /// A folder that would be overwritten.
    #[error(
        "{path} holds a run already; go on with it by --resume {path}, choose another --output, or replace it with --overwrite",
        path = path.display()
    )]
    RunExists { path: PathBuf },

    /// A folder of images that cannot be learned.
    #[error(transparent)]
    Folder(#[from] FolderError),

    /// An image that cannot be read.
    #[error(transparent)]
    Loader(#[from] LoaderError),

    /// A preprocessing that this program does not do.
    #[error(transparent)]
    Processor(#[from] ProcessorError),

    /// A model or an adapter that cannot be read or written.
    #[error(transparent)]
    Weights(#[from] WeightsError),

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

    /// Scores that cannot be computed.
    #[error(transparent)]
    Scores(#[from] ScoresError),

    /// A comparison that cannot be carried out.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),

    /// A report that cannot be drawn.
    #[error(transparent)]
    Report(#[from] ReportError),

    /// A result that cannot be written.
    #[error("cannot write {path}: {reason}", path = path.display())]
    Write { path: PathBuf, reason: String },
}

impl From<TrainError> for Error {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Loader(error) => Self::Loader(error),
            TrainError::Read { path, source } => Self::Path { path, source },
            other => Self::Training(other.to_string()),
        }
    }
}

impl Error {
    /// The exit code: 2 if the input is wrong, 1 for any other failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_)
            | Self::SettingsFile { .. }
            | Self::Path { .. }
            | Self::RunExists { .. }
            | Self::Folder(_)
            | Self::Loader(_)
            | Self::Processor(_)
            | Self::Inject(_) => 2,
            Self::Weights(error) if error.is_input() => 2,
            Self::Evidence(EvidenceError::Plot { .. }) => 1,
            Self::Evidence(_) => 2,
            _ => 1,
        }
    }

    /// The message as it is shown. Misfits of layers, of which there may be hundreds, become one line of readable length;
    /// everything else is written to be read as it is.
    pub fn message(&self) -> String {
        let text = self.to_string();
        match self {
            Self::Inject(_) | Self::Settings(_) | Self::SettingsFile { .. } => Self::line(&text),
            _ => text,
        }
    }

    fn line(text: &str) -> String {
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
        let line = |text: &str| Error::Settings(text.to_string()).message();
        assert_eq!(line("first\n  second\n\n"), "first; second");
        assert_eq!(line("a\nb\nc\nd\ne"), "a; b; c; and 2 more");
        assert_eq!(line(&"é".repeat(2000)).chars().count(), LINE_LENGTH + 1);
    }
}
