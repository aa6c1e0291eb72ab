//! Training: one way for every method and every command.
//!
//! `recipe` is what is chosen, `steps` the loop, `checkpoint` and `journal` what a run leaves behind, `head` the linear
//! probe.

mod checkpoint;
mod gradients;
pub mod head;
pub mod journal;
mod optimizer;
pub mod progress;
mod readings;
mod recipe;
mod schedule;
mod steps;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use burn::prelude::*;
use burn::store::ModuleRecord;
use burn::train::checkpoint::{Checkpointer, CheckpointerError};
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::{AccuracyMetric, LearningRateMetric, LossMetric};
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};
use thiserror::Error;

pub use checkpoint::{Best, Checkpoints, Position};
use checkpoint::{Discard, InMemory, Keep};
use journal::Journal;
use progress::Progress;
pub use readings::Rotations;
use readings::{Angle, Defect, Gauge, PeakMemory, Speed};
pub use recipe::Recipe;
use steps::{End, Files, Steps};

use crate::files::in_words;
use crate::images::{Loader, LoaderError};
use crate::model::Dinov2ForImageClassification;

/// Why a training run ended early.
#[derive(Debug, Error)]
pub enum TrainError {
    /// A file of the run cannot be read.
    #[error("{path}: {}", in_words(source), path = path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },

    /// A file of the run cannot be written.
    #[error("cannot write {path}: {}", in_words(source), path = path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },

    /// The position of a checkpoint is not readable.
    #[error("{path} is not the position of a run: {source}", path = path.display())]
    Position {
        path: PathBuf,
        source: serde_json::Error,
    },

    /// A line of the journal is not readable.
    #[error("{path}, line {line}, is no entry of a journal: {source}", path = path.display())]
    Journal {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },

    /// A checkpoint cannot be read or written.
    #[error("the checkpoint cannot be used: {0}")]
    Checkpoint(CheckpointerError),

    /// An image cannot be read.
    #[error(transparent)]
    Loader(#[from] LoaderError),

    /// The device failed, or the loss is not a number.
    #[error("{0}")]
    Device(String),
}

/// What a run trains on, and what it validates on.
#[derive(Clone)]
pub struct Loaders {
    pub train: Loader,
    pub valid: Loader,
}

/// Where a run leaves its files.
#[derive(Clone, Debug)]
pub struct Folder {
    pub checkpoints: Checkpoints,
    pub journal: PathBuf,
    /// Optimizer steps between checkpoints within an epoch; 0 for none.
    pub every: usize,
}

/// A trained model: its best epoch by validation loss.
pub struct Trained {
    /// The model in inference mode.
    pub model: Dinov2ForImageClassification,
    /// The best epoch; none if the run was stopped before it completed one, in which case the model is the last one.
    pub best: Option<Best>,
    /// Where the run stands.
    pub position: Position,
    /// Whether the run was stopped before it was done.
    pub stopped: bool,
    /// The median time of an optimizer step, without loading images.
    pub step_seconds: f64,
}

/// Trains a prepared model, which must be on a device with autodiff.
///
/// With a folder, the run goes on from the newest checkpoint in it.
///
/// # Errors
///
/// The device failed, an image cannot be read, or a file of the run cannot be used.
pub fn train(
    mut model: Dinov2ForImageClassification,
    loaders: &Loaders,
    recipe: &Recipe,
    folder: Option<&Folder>,
    label: &str,
    progress: Progress,
    interrupter: &Interrupter,
) -> Result<Trained, TrainError> {
    let device = model.device();
    let start = match folder {
        Some(folder) => folder.checkpoints.newest()?,
        None => None,
    };
    let start = start.unwrap_or_else(Position::start);
    let keep = Keep::new(&start);

    // Checkpoints are told apart from the base by what the model was before any of them was loaded.
    let on_disk = match folder {
        Some(folder) => Some(folder.checkpoints.of_model(&model)?),
        None => None,
    };
    if let Some(on_disk) = on_disk.as_ref().filter(|_| start.step > 0) {
        let record = on_disk
            .restore(start.step)
            .map_err(TrainError::Checkpoint)?;
        model = load(model, record)?;
    }
    let steps = recipe.steps(loaders.train.len());
    let schedule = optimizer::schedule(recipe, steps);
    let mut learner = Learner::new(
        model.clone(),
        optimizer::optimizer(recipe, &model),
        schedule,
    );
    if let Some(folder) = folder.filter(|_| start.step > 0) {
        let [optimizer, schedule] = folder.checkpoints.of_states();
        let record = optimizer.restore(start.step);
        learner.load_optim(record.map_err(TrainError::Checkpoint)?);
        let record = schedule.restore(start.step);
        learner.load_scheduler(record.map_err(TrainError::Checkpoint)?);
    }
    let files = match folder {
        Some(folder) => {
            folder.checkpoints.keep_only(&keep.steps())?;
            Some(Files {
                checkpoints: folder.checkpoints.clone(),
                journal: Journal::resume(folder.journal.clone(), start.step, start.epoch)?,
                every: folder.every,
            })
        }
        None => None,
    };

    let memory = InMemory::default();
    let end = Arc::new(Mutex::new(None));
    let strategy = Steps {
        recipe: recipe.clone(),
        train: loaders.train.clone(),
        valid: loaders.valid.clone(),
        device: device.clone(),
        start,
        keep: keep.clone(),
        files,
        end: end.clone(),
    };
    // Burn asks for a folder, but nothing is written there: metrics stay in memory, and checkpoints have their own.
    let mut training = SupervisedTraining::new(
        std::env::temp_dir(),
        Arc::new(loaders.train.on(&device)),
        Arc::new(loaders.valid.on(&device.clone().inner())),
    )
    .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
    .metrics((AccuracyMetric::new(), LossMetric::new()))
    .metric_train_numeric(LearningRateMetric::new())
    .metric_train_numeric(Gauge::<Speed>::new())
    .metric_train_numeric(Gauge::<PeakMemory>::new())
    .metric_valid_numeric(Gauge::<Defect>::new())
    .metric_valid_numeric(Gauge::<Angle>::new())
    .with_metric_logger(InMemoryMetricLogger::new())
    .with_application_logger(None)
    .with_checkpointing_strategy(keep)
    .with_interrupter(interrupter.clone())
    .renderer(progress.renderer(interrupter.clone()))
    .num_epochs(recipe.epochs_needed(loaders.train.len()))
    .label(label);
    training = match (folder, &on_disk) {
        (Some(folder), Some(model)) => {
            let [optimizer, schedule] = folder.checkpoints.of_states();
            training.with_custom_checkpointers(model.clone(), optimizer, schedule)
        }
        _ => training.with_custom_checkpointers(memory.clone(), Discard, Discard),
    };
    drop(model);
    let result = training.launch(learner);

    let end = end.lock().unwrap_or_else(PoisonError::into_inner).take();
    let End {
        position,
        stopped,
        failure,
        step_seconds,
    } = end.ok_or_else(|| TrainError::Device("the training did not start".to_string()))?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if let Some(error) = result.error {
        return Err(TrainError::Device(error.to_string()));
    }
    let mut model = result.model;
    if let Some(best) = position.best {
        let record = match &on_disk {
            Some(on_disk) => Some(on_disk.restore(best.step).map_err(TrainError::Checkpoint)?),
            None => memory.take().map(|(_, record)| record),
        };
        if let Some(record) = record {
            model = load(model, record)?;
        }
    }
    Ok(Trained {
        model,
        best: position.best,
        position,
        stopped,
        step_seconds,
    })
}

fn load(
    model: Dinov2ForImageClassification,
    record: ModuleRecord,
) -> Result<Dinov2ForImageClassification, TrainError> {
    let loaded = model.try_load_record(record);
    loaded.map_err(|error| TrainError::Device(error.to_string()))
}
