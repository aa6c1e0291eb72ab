//! The checkpoints of a run, from which it goes on as if it had never stopped.
//!
//! A checkpoint consists of four files, named by the optimizer step after which they were written: what is trained, the
//! states of the optimizer and of the schedule, and the position of the run. Each file appears whole. An older checkpoint
//! is deleted when a newer one is complete, so at every moment there is a complete one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::store::ModuleRecord;
use burn::train::checkpoint::{
    Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction, CheckpointingStrategy,
    FileCheckpointer,
};
use burn::train::metric::store::EventStoreClient;
use burn_boft::AdapterCheckpointer;
use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::files::write_whole;
use crate::model::Dinov2ForImageClassification;

/// The parts of a checkpoint, by the beginnings of their names.
const PARTS: [&str; 3] = ["adapter", "optim", "scheduler"];
const POSITION: &str = "position";

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Optimizer steps done.
    pub step: usize,
    /// The epoch of the next step; the first epoch is 1.
    pub epoch: usize,
    /// Optimizer steps of that epoch that are done.
    pub step_of_epoch: usize,
    /// What its steps have added up to.
    pub sums: Sums,
    /// The best epoch so far.
    pub best: Option<Best>,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// The epoch with the lowest validation loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub epoch: usize,
    /// The optimizer step at its end, which names its checkpoint.
    pub step: usize,
    pub loss: f64,
    pub accuracy: f64,
}

/// Mean loss and share of correct answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    pub loss: f64,
    pub accuracy: f64,
}

/// The losses and the correct answers of some images, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    pub loss: f64,
    pub correct: f64,
    pub images: usize,
}

impl Sums {
    /// Adds a batch with this mean loss and so many correct answers.
    pub fn add(&mut self, mean_loss: f64, correct: f64, images: usize) {
        self.loss += mean_loss * images as f64;
        self.correct += correct;
        self.images += images;
    }

    /// The means.
    pub fn score(&self) -> Score {
        let count = self.images.max(1) as f64;
        Score {
            loss: self.loss / count,
            accuracy: self.correct / count,
        }
    }
}

impl Position {
    /// The start of a run.
    pub fn start() -> Self {
        Self {
            epoch: 1,
            ..Self::default()
        }
    }
}

/// The folder of a run's checkpoints.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// The checkpoints in a folder, which is created with the first of them.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The position of the newest complete checkpoint, if there is one.
    ///
    /// # Errors
    ///
    /// The folder or a file cannot be read.
    pub fn newest(&self) -> Result<Option<Position>, TrainError> {
        for step in self.steps()?.into_iter().rev() {
            let complete = PARTS.iter().all(|part| self.file(part, step).is_file());
            let path = self.position_file(step);
            if complete && path.is_file() {
                let text = fs::read_to_string(&path).map_err(|source| unreadable(&path, source))?;
                let position =
                    serde_json::from_str(&text).map_err(|source| TrainError::Position {
                        path: path.clone(),
                        source,
                    })?;
                return Ok(Some(position));
            }
        }
        Ok(None)
    }

    /// Writes the position before the other parts, which make the checkpoint complete.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_position(&self, position: &Position) -> Result<(), TrainError> {
        let path = self.position_file(position.step);
        let failed = |source| TrainError::Write {
            path: path.clone(),
            source,
        };
        let text = serde_json::to_vec(position).map_err(|error| failed(error.into()))?;
        write_whole(&path, &text).map_err(failed)
    }

    /// Deletes what belongs to no checkpoint in use: leftovers of a run that was killed while it wrote.
    ///
    /// # Errors
    ///
    /// The folder cannot be read, or a file cannot be deleted.
    pub fn keep_only(&self, steps: &[usize]) -> Result<(), TrainError> {
        for step in self.steps()? {
            if !steps.contains(&step) {
                self.delete(step)?;
            }
        }
        Ok(())
    }

    /// Deletes every file of a checkpoint.
    fn delete(&self, step: usize) -> Result<(), TrainError> {
        let parts = PARTS.iter().map(|part| self.file(part, step));
        for path in parts.chain([self.position_file(step)]) {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(TrainError::Write { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The steps that have a file, in order.
    fn steps(&self) -> Result<BTreeSet<usize>, TrainError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(BTreeSet::new());
            }
            Err(source) => return Err(unreadable(&self.folder, source)),
        };
        let mut steps = BTreeSet::new();
        for entry in entries {
            let entry = entry.map_err(|source| unreadable(&self.folder, source))?;
            let name = entry.file_name();
            let stem = Path::new(&name).file_stem().unwrap_or_default();
            let number = stem.to_string_lossy();
            let number = number.rsplit_once('-').map(|(_, number)| number);
            steps.extend(number.and_then(|number| number.parse::<usize>().ok()));
        }
        Ok(steps)
    }

    fn file(&self, part: &str, step: usize) -> PathBuf {
        self.folder.join(format!("{part}-{step}.bpk"))
    }

    fn position_file(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{POSITION}-{step}.json"))
    }

    /// The checkpointer of what is trained, for a run that starts from this model.
    ///
    /// # Errors
    ///
    /// The folder cannot be created.
    pub fn of_model(&self, model: &Dinov2ForImageClassification) -> Result<OnDisk, TrainError> {
        let checkpointer = AdapterCheckpointer::new(&self.folder, model);
        let checkpointer = checkpointer.map_err(TrainError::Checkpoint)?;
        Ok(OnDisk(Arc::new(checkpointer)))
    }

    /// The checkpointers of the optimizer and of the schedule.
    pub fn of_states(&self) -> [FileCheckpointer; 2] {
        [PARTS[1], PARTS[2]].map(|part| FileCheckpointer::new(&self.folder, part))
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> TrainError {
    TrainError::Read {
        path: path.to_path_buf(),
        source,
    }
}

/// Which checkpoint is written and which are deleted. The training loop decides it, since Burn's strategies know epochs
/// only and a checkpoint can fall in the middle of one.
#[derive(Clone, Debug, Default)]
pub struct Keep(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    written: BTreeSet<usize>,
    best: Option<usize>,
}

impl Keep {
    /// Continues from checkpoints that exist already.
    pub fn new(position: &Position) -> Self {
        let best = position.best.map(|best| best.step);
        let written = [Some(position.step), best].into_iter().flatten();
        Self(Arc::new(Mutex::new(Kept {
            written: written.filter(|step| *step > 0).collect(),
            best,
        })))
    }

    /// Says which checkpoint must stay.
    pub fn best(&self, step: usize) {
        self.kept().best = Some(step);
    }

    /// The checkpoints that exist.
    pub fn steps(&self) -> Vec<usize> {
        self.kept().written.iter().copied().collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CheckpointingStrategy for Keep {
    fn checkpointing(
        &mut self,
        step: usize,
        _store: &EventStoreClient,
    ) -> Vec<CheckpointingAction> {
        let deletions = self.write(step).into_iter();
        let deletions = deletions.map(CheckpointingAction::Delete);
        [CheckpointingAction::Save]
            .into_iter()
            .chain(deletions)
            .collect()
    }
}

impl Keep {
    /// Notes a checkpoint, and says which ones are not needed any more.
    fn write(&self, step: usize) -> Vec<usize> {
        let mut kept = self.kept();
        kept.written.insert(step);
        // Burn writes in other threads, which take an order only when they have carried out the one before. Once they
        // have taken this one, the checkpoint before it is complete, and those before that are not needed any more.
        let (best, last) = (kept.best, kept.written.iter().rev().nth(1).copied());
        let needless: Vec<usize> = kept
            .written
            .iter()
            .copied()
            .filter(|&old| old != step && Some(old) != last && Some(old) != best)
            .collect();
        needless.iter().for_each(|old| {
            kept.written.remove(old);
        });
        needless
    }
}

/// The checkpoints of what is trained. Clones share the fingerprints of the base, which take a while to make.
#[derive(Clone)]
pub struct OnDisk(Arc<AdapterCheckpointer>);

impl Checkpointer<ModuleRecord> for OnDisk {
    fn save(&self, step: usize, record: ModuleRecord) -> Result<(), CheckpointerError> {
        self.0.save(step, record)
    }

    fn delete(&self, step: usize) -> Result<(), CheckpointerError> {
        self.0.delete(step)
    }

    fn restore(&self, step: usize) -> Result<ModuleRecord, CheckpointerError> {
        self.0.restore(step)
    }
}

/// Keeps in memory the model that was saved last: the best epoch of a run that leaves no files.
#[derive(Clone, Debug, Default)]
pub struct InMemory(Arc<Mutex<Option<(usize, ModuleRecord)>>>);

impl InMemory {
    /// The model and its step, if one was saved.
    pub fn take(&self) -> Option<(usize, ModuleRecord)> {
        self.kept().take()
    }

    fn kept(&self) -> MutexGuard<'_, Option<(usize, ModuleRecord)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Checkpointer<ModuleRecord> for InMemory {
    fn save(&self, step: usize, record: ModuleRecord) -> Result<(), CheckpointerError> {
        *self.kept() = Some((step, record));
        Ok(())
    }

    fn delete(&self, step: usize) -> Result<(), CheckpointerError> {
        self.kept().take_if(|(kept, _)| *kept == step);
        Ok(())
    }

    fn restore(&self, step: usize) -> Result<ModuleRecord, CheckpointerError> {
        let kept = self.kept().take_if(|(kept, _)| *kept == step);
        kept.map(|(_, record)| record).ok_or_else(|| not_kept(step))
    }
}

/// Keeps nothing: a run without files is never resumed, so nobody needs the states of its optimizer and schedule.
#[derive(Clone, Debug)]
pub struct Discard;

impl<R: Checkpoint> Checkpointer<R> for Discard {
    fn save(&self, _step: usize, _record: R) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn delete(&self, _step: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, step: usize) -> Result<R, CheckpointerError> {
        Err(not_kept(step))
    }
}

fn not_kept(step: usize) -> CheckpointerError {
    CheckpointerError::Unknown(format!("step {step} was not kept"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_two_checkpoints_and_the_best_one_are_kept() {
        let keep = Keep::new(&Position::start());
        let none: Vec<usize> = Vec::new();
        assert_eq!(keep.write(10), none);
        assert_eq!(keep.write(20), none);
        keep.best(20);
        assert_eq!(keep.write(30), [10]);
        assert_eq!(keep.write(40), none);
        assert_eq!(keep.write(50), [30]);
        assert_eq!(keep.steps(), [20, 40, 50]);
    }

    #[test]
    fn a_checkpoint_with_a_missing_part_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().to_path_buf());
        let position = |step| Position {
            step,
            ..Position::start()
        };
        for step in [8, 12] {
            checkpoints.write_position(&position(step)).unwrap();
            for part in PARTS {
                fs::write(checkpoints.file(part, step), b"").unwrap();
            }
        }
        assert_eq!(checkpoints.newest().unwrap(), Some(position(12)));
        fs::remove_file(checkpoints.file("scheduler", 12)).unwrap();
        assert_eq!(checkpoints.newest().unwrap(), Some(position(8)));

        checkpoints.keep_only(&[8]).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
        let none = Checkpoints::new(folder.path().join("none"));
        assert_eq!(none.newest().unwrap(), None);
    }
}
