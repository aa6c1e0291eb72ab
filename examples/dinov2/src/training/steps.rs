//! The training loop, as a strategy of Burn's `Learner`.
//!
//! Burn's own strategies write checkpoints at the end of an epoch only. This one can stop after any optimizer step and go
//! on from there with the same numbers: the order of images, augmentation and dropout are functions of the seed and of the
//! position, not of what happened before.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::data::dataloader::Progress;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::prelude::*;
use burn::train::{
    ClassificationOutput, EventProcessorTraining, InferenceStep, Learner, LearnerEvent,
    SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainOutput,
    TrainStep, TrainingComponents, TrainingItem, ValidLoader,
};

use super::checkpoint::{Best, Checkpoints, Keep, Position, Score, Sums};
use super::gradients::{Accumulator, clip};
use super::journal::{EpochEntry, Journal, StepEntry};
use super::readings::{Rotations, StepOutput};
use super::{Recipe, TrainError};
use crate::images::{ImageBatch, Loader};
use crate::model::Dinov2ForImageClassification;
use crate::seeds::mix;

type Model = Dinov2ForImageClassification;
type Processor = SupervisedTrainingEventProcessor<Model>;

/// One training run.
pub struct Steps {
    pub recipe: Recipe,
    pub train: Loader,
    pub valid: Loader,
    /// The device with autodiff.
    pub device: Device,
    pub start: Position,
    pub keep: Keep,
    /// Where the run leaves files; none if the best epoch stays in memory.
    pub files: Option<Files>,
    /// How the run ended.
    pub end: Arc<Mutex<Option<End>>>,
}

/// What a run writes while it trains.
pub struct Files {
    pub checkpoints: Checkpoints,
    pub journal: Journal,
    /// Optimizer steps between checkpoints within an epoch; 0 for none.
    pub every: usize,
}

/// How a run ended.
pub struct End {
    pub position: Position,
    /// Whether it was stopped before it was done.
    pub stopped: bool,
    /// What went wrong with its files, if something did.
    pub failure: Option<TrainError>,
    /// The median time of an optimizer step.
    pub step_seconds: f64,
}

impl TrainStep for Model {
    type Input = ImageBatch;
    type Output = StepOutput;

    fn step(&self, batch: ImageBatch) -> TrainOutput<StepOutput> {
        let output = classify(self, batch);
        TrainOutput::new(self, output.loss.backward(), output.into())
    }
}

impl InferenceStep for Model {
    type Input = ImageBatch;
    type Output = StepOutput;

    fn step(&self, batch: ImageBatch) -> StepOutput {
        classify(self, batch).into()
    }
}

/// Loss and logits of a batch.
fn classify(model: &Model, batch: ImageBatch) -> ClassificationOutput {
    let logits = model.forward(batch.pixels);
    let smoothing = (batch.label_smoothing > 0.0).then_some(batch.label_smoothing);
    let loss = CrossEntropyLossConfig::new()
        .with_smoothing(smoothing)
        .init(&logits.device())
        .forward(logits.clone(), batch.labels.clone());
    ClassificationOutput::new(loss, logits, batch.labels)
}

impl SupervisedLearningStrategy<Model> for Steps {
    fn fit(
        &self,
        mut components: TrainingComponents<Model>,
        learner: Learner<Model>,
        _train: TrainLoader<Model>,
        _valid: ValidLoader<Model>,
        _first_epoch: usize,
    ) -> (Model, Processor) {
        let mut run = Run {
            steps: self,
            position: self.start.clone(),
            begun: Instant::now(),
            learner,
            entries: Vec::new(),
            times: Vec::new(),
            finished: false,
        };
        let failure = run.epochs(&mut components).err();
        if let Some(error) = &failure {
            components.interrupter.stop(Some(&error.to_string()));
        }
        let end = End {
            position: run.position(),
            stopped: !run.finished,
            failure,
            step_seconds: median(&mut run.times),
        };
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        (run.learner.model(), components.event_processor)
    }
}

/// A run on its way.
struct Run<'a> {
    steps: &'a Steps,
    position: Position,
    begun: Instant,
    learner: Learner<Model>,
    /// Steps that are not in the journal yet. Their losses stay on the device, so that no step waits for the one before.
    entries: Vec<PendingStep>,
    /// Seconds of each step.
    times: Vec<f64>,
    finished: bool,
}

struct PendingStep {
    step: usize,
    epoch: usize,
    learning_rate: f64,
    images: usize,
    /// The mean loss and the number of correct answers.
    measured: Tensor<1>,
    seconds: f64,
}

impl Run<'_> {
    /// The position, with the seconds so far.
    fn position(&self) -> Position {
        Position {
            seconds: self.steps.start.seconds + self.begun.elapsed().as_secs_f64(),
            ..self.position.clone()
        }
    }

    fn epochs(&mut self, components: &mut TrainingComponents<Model>) -> Result<(), TrainError> {
        let recipe = &self.steps.recipe;
        let epochs = recipe.epochs_needed(self.steps.train.len());
        while self.position.epoch <= epochs {
            let epoch = self.position.epoch;
            self.train_epoch(components)?;
            if components.interrupter.should_stop() {
                return self.save(components);
            }
            let Some(score) = self.validate(components)? else {
                // Asked to stop meanwhile. The run will validate again when it goes on.
                return self.save(components);
            };
            // A loss that is not a number is not better than anything.
            let lower = self.position.best.is_none_or(|best| score.loss < best.loss);
            let better = lower && score.loss.is_finite();
            if better {
                self.position.best = Some(Best {
                    epoch,
                    step: self.position.step,
                    loss: score.loss,
                    accuracy: score.accuracy,
                });
                self.steps.keep.best(self.position.step);
            }
            self.position.epoch += 1;
            self.position.step_of_epoch = 0;
            self.position.sums = Sums::default();
            if self.steps.files.is_some() || better {
                self.save(components)?;
            }
            let waited = epoch - self.position.best.map_or(0, |best| best.epoch);
            if recipe.patience.is_some_and(|limit| waited >= limit) {
                break;
            }
        }
        self.finished = true;
        Ok(())
    }

    /// Trains from the position to the end of its epoch, or until the run is asked to stop.
    fn train_epoch(
        &mut self,
        components: &mut TrainingComponents<Model>,
    ) -> Result<(), TrainError> {
        let Steps {
            recipe,
            train,
            device,
            ..
        } = self.steps;
        let interrupter = components.interrupter.clone();
        let epoch = self.position.epoch;
        let images = train.len();
        let event = LearnerEvent::StartSplit {
            epoch_number: epoch,
            total_items: images,
        };
        interrupter.fail_on_error(components.event_processor.process_train(event));

        let left_of_epoch = recipe.steps_per_epoch(images) - self.position.step_of_epoch;
        let left = left_of_epoch.min(recipe.steps(images) - self.position.step);
        let mut start = Instant::now();
        let batches = train.epoch(epoch, self.position.step_of_epoch, device);
        for (index, batch) in batches.take(left).enumerate() {
            let batch = batch?;
            let size = batch.len();
            let classification = self.step(batch);
            // Without the wait, a step would only be counted and not computed when its time is taken.
            device.flush().ok();
            let seconds = std::mem::replace(&mut start, Instant::now()).elapsed();
            let item = StepOutput {
                classification,
                speed: Some(size as f64 / seconds.as_secs_f64()),
                rotations: None,
            };
            let done = (self.position.step_of_epoch * recipe.batch_size).min(images);
            let item = TrainingItem::new(
                item,
                Progress::new(done, images, Some("images".to_string())),
                Some(self.position.step),
                Some(self.learner.lr_current()),
            );
            let event = LearnerEvent::ProcessedItem(item);
            interrupter.fail_on_error(components.event_processor.process_train(event));
            if interrupter.should_stop() {
                return Ok(());
            }
            let every = self.steps.files.as_ref().map_or(0, |files| files.every);
            if index + 1 < left && every > 0 && self.position.step.is_multiple_of(every) {
                self.save(components)?;
            }
        }
        let event = LearnerEvent::EndSplit(epoch);
        interrupter.fail_on_error(components.event_processor.process_train(event));
        Ok(())
    }

    /// One optimizer step. A batch that is too large for the memory is computed in parts.
    fn step(&mut self, batch: ImageBatch) -> ClassificationOutput {
        let Steps { recipe, device, .. } = self.steps;
        let start = Instant::now();
        // Dropout depends on the run's seed and the step alone.
        device.seed(mix(recipe.seed, &[self.position.step as u64]));
        let model = self.learner.model();
        let images = batch.len();
        let mut sum = Accumulator::default();
        let mut outputs = Vec::new();
        for part in batch.parts(recipe.part_size()) {
            let share = part.len() as f64 / images as f64;
            let output = self.learner.train_step(part);
            sum.add(&model, output.grads, share);
            outputs.push((output.item.classification, share));
        }
        let mut gradients = sum.take();
        if recipe.clip_norm > 0.0 {
            gradients = clip(&model, gradients, recipe.clip_norm);
        }
        // The optimizer changes parameters in place if nobody else holds them.
        drop(model);
        self.learner.lr_step();
        self.learner.optimizer_step(gradients);
        self.position.step += 1;
        self.position.step_of_epoch += 1;

        let output = joined(outputs);
        self.entries.push(PendingStep {
            step: self.position.step,
            epoch: self.position.epoch,
            learning_rate: self.learner.lr_current().base(),
            images,
            measured: measured(&output),
            seconds: start.elapsed().as_secs_f64(),
        });
        self.times.push(start.elapsed().as_secs_f64());
        output
    }

    /// Validates, and writes the epoch into the journal. Returns nothing if the run was asked to stop meanwhile.
    fn validate(
        &mut self,
        components: &mut TrainingComponents<Model>,
    ) -> Result<Option<Score>, TrainError> {
        let epoch = self.position.epoch;
        let model = self.learner.model().valid();
        let rotations = Rotations::of(&model);
        let score = validate(
            &model.materialize(),
            &self.steps.valid,
            rotations,
            epoch,
            components,
        )?;
        let Some(score) = score else {
            return Ok(None);
        };
        self.write_steps()?;
        if let Some(files) = &self.steps.files {
            let training = self.position.sums.score();
            files.journal.epoch(&EpochEntry {
                epoch,
                step: self.position.step,
                train_loss: training.loss,
                train_accuracy: training.accuracy,
                valid_loss: score.loss,
                valid_accuracy: score.accuracy,
                defect: rotations.map(|rotations| rotations.defect),
                angle: rotations.map(|rotations| rotations.angle),
            })?;
        }
        let event = LearnerEvent::EndEpoch(epoch);
        let shown = components.event_processor.process_train(event);
        components.interrupter.fail_on_error(shown);
        Ok(Some(score))
    }

    /// Reads the losses of the steps since the last time, and writes them into the journal.
    fn write_steps(&mut self) -> Result<(), TrainError> {
        for entry in self.entries.drain(..) {
            let measured: Vec<f64> = entry.measured.into_data().iter::<f64>().collect();
            let [loss, correct] = measured[..] else {
                unreachable!("a step measures two numbers");
            };
            self.position.sums.add(loss, correct, entry.images);
            if let Some(files) = &self.steps.files {
                files.journal.step(&StepEntry {
                    step: entry.step,
                    epoch: entry.epoch,
                    loss,
                    learning_rate: entry.learning_rate,
                    images_per_second: entry.images as f64 / entry.seconds,
                })?;
            }
        }
        Ok(())
    }

    /// Writes a checkpoint of this moment.
    fn save(&mut self, components: &mut TrainingComponents<Model>) -> Result<(), TrainError> {
        self.write_steps()?;
        if let Some(files) = &self.steps.files {
            files.checkpoints.write_position(&self.position())?;
        }
        if let Some(checkpointer) = &mut components.checkpointer {
            let step = self.position.step;
            checkpointer.checkpoint(&self.learner, step, &components.event_store);
        }
        Ok(())
    }
}

/// Loss and accuracy on all validation images; nothing if the run was asked to stop meanwhile.
fn validate(
    model: &Model,
    images: &Loader,
    rotations: Option<Rotations>,
    epoch: usize,
    components: &mut TrainingComponents<Model>,
) -> Result<Option<Score>, TrainError> {
    let processor = &mut components.event_processor;
    let interrupter = &components.interrupter;
    let total = images.len();
    interrupter.fail_on_error(processor.process_valid(LearnerEvent::StartSplit {
        epoch_number: epoch,
        total_items: total,
    }));
    let mut sums = Sums::default();
    for batch in images.epoch(epoch, 0, &model.device().inner()) {
        let batch = batch?;
        let size = batch.len();
        let classification = classify(model, batch);
        let numbers = measured(&classification).into_data();
        let numbers: Vec<f64> = numbers.iter::<f64>().collect();
        sums.add(numbers[0], numbers[1], size);
        let item = StepOutput {
            classification,
            speed: None,
            rotations,
        };
        let progress = Progress::new(sums.images, total, Some("images".to_string()));
        let item = TrainingItem::new(item, progress, None, None);
        let event = LearnerEvent::ProcessedItem(item);
        interrupter.fail_on_error(processor.process_valid(event));
        if interrupter.should_stop() {
            return Ok(None);
        }
    }
    interrupter.fail_on_error(processor.process_valid(LearnerEvent::EndSplit(epoch)));
    Ok(Some(sums.score()))
}

/// The outputs of the parts of a batch as one.
fn joined(parts: Vec<(ClassificationOutput, f64)>) -> ClassificationOutput {
    let mut parts = parts.into_iter();
    let (mut all, share) = parts.next().expect("a batch has images");
    if share == 1.0 {
        return all;
    }
    all.loss = all.loss * share;
    for (part, share) in parts {
        all.loss = all.loss + part.loss * share;
        all.output = Tensor::cat(vec![all.output, part.output], 0);
        all.targets = Tensor::cat(vec![all.targets, part.targets], 0);
    }
    all
}

/// The mean loss and the number of correct answers, on the device.
fn measured(output: &ClassificationOutput) -> Tensor<1> {
    let answers: Tensor<1, Int> = output.output.clone().argmax(1).squeeze_dim(1);
    let correct = answers.equal(output.targets.clone()).float().sum();
    let loss = output.loss.clone().cast(correct.dtype());
    Tensor::cat(vec![loss, correct], 0).without_autodiff()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}
