use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::Run;
use crate::files::in_words;

/// What can go wrong with a protocol, a results file or a plot.
#[derive(Debug, Error)]
pub enum EvidenceError {
    /// A protocol that cannot be run or whose results could not be told apart.
    #[error("the protocol {name} cannot be run: {reason}")]
    Protocol { name: String, reason: String },

    /// A results file that cannot be opened, read or written.
    #[error("{path}: {}", in_words(source), path = path.display())]
    File { path: PathBuf, source: io::Error },

    /// Another process appends to the same results file.
    #[error(
        "{path} is in use by another comparison; wait until it ends or choose another file",
        path = path.display()
    )]
    InUse { path: PathBuf },

    /// A file that holds something else than results.
    #[error(
        "{path}, line {line}: {reason}; mend the line or choose another file",
        path = path.display()
    )]
    Line {
        path: PathBuf,
        line: usize,
        reason: String,
    },

    /// Results that were obtained under other conditions.
    #[error(
        "{path} holds results of protocol {found}, not of {wanted} ({differences}); choose another file or the same settings",
        path = path.display()
    )]
    OtherProtocol {
        path: PathBuf,
        found: String,
        wanted: String,
        /// The settings that differ, with both values.
        differences: String,
    },

    /// An outcome that does not belong into the file.
    #[error("{path} does not take the outcome of {run}: {reason}", path = path.display())]
    Outcome {
        path: PathBuf,
        run: Box<Run>,
        reason: String,
    },

    /// Runs of one task that were tested on different numbers of images.
    #[error(
        "{run} was tested on {found} images and other runs of the task on {expected}; paired differences need the same images"
    )]
    TestImages {
        run: Box<Run>,
        found: usize,
        expected: usize,
    },

    /// A figure that could not be drawn.
    #[error("the figure was not drawn: {reason}")]
    Plot { reason: String },
}
