//! Keeping the best epoch.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::store::ModuleRecord;
use burn::train::checkpoint::{Checkpoint, Checkpointer, CheckpointerError};

/// Keeps the model of one epoch in memory: the one that the checkpointing strategy saved last.
#[derive(Clone, Debug, Default)]
pub struct BestEpoch(Arc<Mutex<Option<(usize, ModuleRecord)>>>);

impl BestEpoch {
    /// The epoch and its model, if one was saved.
    pub fn take(&self) -> Option<(usize, ModuleRecord)> {
        self.kept().take()
    }

    fn kept(&self) -> MutexGuard<'_, Option<(usize, ModuleRecord)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Checkpointer<ModuleRecord> for BestEpoch {
    fn save(&self, epoch: usize, record: ModuleRecord) -> Result<(), CheckpointerError> {
        *self.kept() = Some((epoch, record));
        Ok(())
    }

    fn delete(&self, epoch: usize) -> Result<(), CheckpointerError> {
        self.kept().take_if(|(kept, _)| *kept == epoch);
        Ok(())
    }

    fn restore(&self, epoch: usize) -> Result<ModuleRecord, CheckpointerError> {
        let kept = self.kept().take_if(|(kept, _)| *kept == epoch);
        kept.map(|(_, record)| record)
            .ok_or_else(|| not_kept(epoch))
    }
}

/// Keeps nothing. A run is never resumed, so nobody needs the states of the optimizer and the schedule.
#[derive(Clone, Debug)]
pub struct Discard;

impl<R: Checkpoint> Checkpointer<R> for Discard {
    fn save(&self, _epoch: usize, _record: R) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn delete(&self, _epoch: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, epoch: usize) -> Result<R, CheckpointerError> {
        Err(not_kept(epoch))
    }
}

fn not_kept(epoch: usize) -> CheckpointerError {
    CheckpointerError::Unknown(format!("epoch {epoch} was not kept"))
}
