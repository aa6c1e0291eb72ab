//! The journal of a run: a line of JSON for each step and each epoch, which the report reads.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::files::{beside, put};

/// The journal that a run writes.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
}

/// A line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Entry {
    Step(StepEntry),
    Epoch(EpochEntry),
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepEntry {
    /// The first step is 1.
    pub step: usize,
    pub epoch: usize,
    /// The mean loss of the batch before the step.
    pub loss: f64,
    pub learning_rate: f64,
    /// Without loading images.
    pub images_per_second: f64,
}

/// One epoch, with the validation after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochEntry {
    pub epoch: usize,
    /// The step at its end.
    pub step: usize,
    pub train_loss: f64,
    pub train_accuracy: f64,
    pub valid_loss: f64,
    pub valid_accuracy: f64,
    /// The largest orthogonality defect, if the model has rotations.
    pub defect: Option<f64>,
    /// The largest angle of rotation, in radians, if the model has rotations.
    pub angle: Option<f64>,
}

impl Entry {
    fn step(&self) -> usize {
        match self {
            Self::Step(entry) => entry.step,
            Self::Epoch(entry) => entry.step,
        }
    }
}

impl Journal {
    /// Opens a journal to go on after a step. What stands in it about later steps was written by a run that was killed
    /// before its next checkpoint, and is dropped.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written.
    pub fn resume(path: PathBuf, step: usize, epoch: usize) -> Result<Self, TrainError> {
        let failed = |source| TrainError::Write {
            path: path.clone(),
            source,
        };
        let kept = match fs::exists(&path).map_err(failed)? {
            true => read(&path)?,
            false => Vec::new(),
        };
        let kept = kept.into_iter().filter(|entry| match entry {
            Entry::Step(_) => entry.step() <= step,
            // The last step of an epoch comes before its validation.
            Entry::Epoch(entry) => entry.epoch < epoch,
        });
        let mut file = beside(&path).map_err(failed)?;
        for entry in kept {
            file.write_all(&line(&entry)).map_err(failed)?;
        }
        let file = put(file, &path).map_err(failed)?;
        Ok(Self {
            path,
            file: Mutex::new(file),
        })
    }

    /// Adds a step.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn step(&self, entry: &StepEntry) -> Result<(), TrainError> {
        self.write(&Entry::Step(entry.clone()))
    }

    /// Adds an epoch.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn epoch(&self, entry: &EpochEntry) -> Result<(), TrainError> {
        self.write(&Entry::Epoch(entry.clone()))
    }

    fn write(&self, entry: &Entry) -> Result<(), TrainError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line(entry))
            .map_err(|source| TrainError::Write {
                path: self.path.clone(),
                source,
            })
    }
}

/// The entries of a journal. A last line that was cut off by a kill is left out.
///
/// # Errors
///
/// The file cannot be read, or another line is no entry.
pub fn read(path: &Path) -> Result<Vec<Entry>, TrainError> {
    let text = fs::read_to_string(path).map_err(|source| TrainError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let entries = whole.lines().enumerate().map(|(index, line)| {
        serde_json::from_str(line).map_err(|source| TrainError::Journal {
            path: path.to_path_buf(),
            line: index + 1,
            source,
        })
    });
    entries.collect()
}

fn line(entry: &Entry) -> Vec<u8> {
    let mut line = serde_json::to_vec(entry).expect("numbers and names are valid JSON");
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> StepEntry {
        StepEntry {
            step,
            epoch: 1,
            loss: 0.1 * step as f64,
            learning_rate: 1e-3,
            images_per_second: 50.0,
        }
    }

    #[test]
    fn a_resumed_journal_drops_what_came_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let journal = Journal::resume(path.clone(), 0, 1).unwrap();
        (1..=5).for_each(|number| journal.step(&step(number)).unwrap());
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"kind\":\"st");
        fs::write(&path, text).unwrap();

        let journal = Journal::resume(path.clone(), 3, 1).unwrap();
        journal.step(&step(4)).unwrap();
        let found = read(&path).unwrap();
        assert_eq!(
            found,
            (1..=4).map(|n| Entry::Step(step(n))).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_line_that_is_no_entry_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let journal = Journal::resume(path.clone(), 0, 1).unwrap();
        journal.step(&step(1)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}nonsense\n{text}")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("journal.jsonl, line 2"), "{error}");
    }

    #[test]
    fn an_epoch_that_was_not_validated_before_the_checkpoint_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let epoch = |epoch| EpochEntry {
            epoch,
            step: 5 * epoch,
            train_loss: 1.0,
            train_accuracy: 0.5,
            valid_loss: 1.5,
            valid_accuracy: 0.25,
            defect: Some(1e-7),
            angle: None,
        };
        let journal = Journal::resume(path.clone(), 0, 1).unwrap();
        journal.epoch(&epoch(1)).unwrap();
        journal.epoch(&epoch(2)).unwrap();
        Journal::resume(path.clone(), 10, 2).unwrap();
        assert_eq!(read(&path).unwrap(), [Entry::Epoch(epoch(1))]);
    }
}
