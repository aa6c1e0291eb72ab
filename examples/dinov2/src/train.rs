//! The training that every method and every job shares: Burn's `Learner`, which keeps the best epoch.

use std::time::{Duration, Instant};

use burn::data::dataloader::{DataLoaderBuilder, batcher::Batcher};
use burn::data::dataset::InMemDataset;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn::train::checkpoint::MetricCheckpointingStrategy;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::store::{Aggregate, Direction, Split as Part};
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    ClassificationOutput, InferenceStep, Interrupter, Learner, SupervisedTraining, TrainOutput,
    TrainStep,
};

use crate::best::{BestEpoch, Discard};
use crate::error::Error;
use crate::images::{Format, Image, ImageBatch, Task};
use crate::knn::Features;
use crate::model::Dinov2ForImageClassification;
use crate::progress::Progress;

/// How many images a model reads at once when it is not trained.
const INFERENCE_BATCH: usize = 128;
/// How many steps run before a time measurement, and how many are measured.
const WARM_UP_STEPS: usize = 3;
const TIMED_STEPS: usize = 15;
const TIMED_RATE: f64 = 1e-4;

/// How a model is trained.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub epochs: usize,
    pub batch_size: usize,
    /// At most this many optimizer steps: whole epochs if at least one fits, otherwise one short epoch.
    pub max_steps: Option<usize>,
    /// Orders the images.
    pub seed: u64,
}

impl Recipe {
    /// The epochs to run and the images of each, out of `images`.
    fn limited(&self, images: usize) -> (usize, usize) {
        let Some(steps) = self.max_steps else {
            return (self.epochs, images);
        };
        let whole_epochs = steps / images.div_ceil(self.batch_size);
        match whole_epochs {
            0 => (1, steps * self.batch_size),
            _ => (whole_epochs.min(self.epochs), images),
        }
    }

    /// AdamW with the moments and the epsilon of PyTorch, and without weight decay. Decay would pull a rotation towards the
    /// identity but a LoRA factor towards zero, so the methods would not be compared on the same terms.
    fn optimizer(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_beta_1(0.9)
            .with_beta_2(0.999)
            .with_epsilon(1e-8)
            .with_weight_decay(0.0)
            .init()
    }
}

/// A trained model: its best epoch by validation loss.
pub struct Trained {
    /// The model in inference mode.
    pub model: Dinov2ForImageClassification,
    /// The epoch kept; none if the run was stopped before it completed one.
    pub epoch: Option<usize>,
    /// How the model does on the validation images.
    pub valid: Score,
}

/// Loss and share of correct answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    pub loss: f64,
    pub accuracy: f64,
}

impl TrainStep for Dinov2ForImageClassification {
    type Input = ImageBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: ImageBatch) -> TrainOutput<ClassificationOutput> {
        let output = classify(self, batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Dinov2ForImageClassification {
    type Input = ImageBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: ImageBatch) -> ClassificationOutput {
        classify(self, batch)
    }
}

fn classify(model: &Dinov2ForImageClassification, batch: ImageBatch) -> ClassificationOutput {
    let logits = model.forward(batch.pixels);
    let loss = CrossEntropyLossConfig::new()
        .init(&logits.device())
        .forward(logits.clone(), batch.labels.clone());
    ClassificationOutput::new(loss, logits, batch.labels)
}

/// Trains a prepared model, which must be on a device with autodiff, and returns its best epoch. The learning rate falls
/// to zero along a cosine.
///
/// # Errors
///
/// The training failed because of the device.
pub fn train(
    model: Dinov2ForImageClassification,
    Task { split, format, .. }: &Task,
    recipe: &Recipe,
    learning_rate: f64,
    label: &str,
    progress: Progress,
) -> Result<Trained, Error> {
    let (epochs, count) = recipe.limited(split.train.len());
    let images = spread(&split.train, count);
    let steps = epochs * images.len().div_ceil(recipe.batch_size);
    let schedule = CosineAnnealingLrSchedulerConfig::new(learning_rate, steps)
        .init()
        .map_err(Error::Settings)?;

    let train = DataLoaderBuilder::new(format.clone())
        .batch_size(recipe.batch_size)
        .shuffle(recipe.seed)
        .build(InMemDataset::new(images));
    let valid = DataLoaderBuilder::new(format.clone())
        .batch_size(even_batch(split.valid.len()))
        .build(InMemDataset::new(split.valid.clone()));

    let best = BestEpoch::default();
    let interrupter = Interrupter::new();
    // Burn asks for a folder. Nothing is written there, since metrics and checkpoints stay in memory.
    let result = SupervisedTraining::new(std::env::temp_dir(), train, valid)
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_metric_logger(InMemoryMetricLogger::new())
        .with_application_logger(None)
        .with_custom_checkpointers(best.clone(), Discard, Discard)
        .with_checkpointing_strategy(MetricCheckpointingStrategy::new(
            &LossMetric::new(),
            Aggregate::Mean,
            Direction::Lowest,
            Part::Valid,
        ))
        .with_interrupter(interrupter.clone())
        .renderer(progress.renderer(interrupter))
        .num_epochs(epochs)
        .label(label)
        .launch(Learner::new(model, recipe.optimizer(), schedule));
    if let Some(error) = result.error {
        return Err(Error::Training(error.to_string()));
    }

    let (model, epoch) = match best.take() {
        Some((epoch, record)) => {
            let model = result.model.try_load_record(record);
            (
                model.map_err(|error| Error::Training(error.to_string()))?,
                Some(epoch),
            )
        }
        None => (result.model, None),
    };
    let valid = score(&logits(&model, &split.valid, format), &split.valid);
    Ok(Trained {
        model,
        epoch,
        valid,
    })
}

/// At most `count` images, evenly spaced. The images are sorted by class, and a short epoch needs all classes.
fn spread(images: &[Image], count: usize) -> Vec<Image> {
    let count = count.min(images.len());
    (0..count)
        .map(|index| images[index * images.len() / count].clone())
        .collect()
}

/// A batch size that cuts the images into batches of nearly equal size. Burn's metric of the loss gives every batch the
/// same weight, so a small last batch would count too much.
fn even_batch(images: usize) -> usize {
    images.div_ceil(images.div_ceil(INFERENCE_BATCH))
}

/// The median time of an optimizer step, forward and backward pass included.
pub fn step_time(
    mut model: Dinov2ForImageClassification,
    Task { split, format, .. }: &Task,
    recipe: &Recipe,
) -> Duration {
    let device = device_of(&model);
    let images = &split.train[..recipe.batch_size.min(split.train.len())];
    let batch = format.batch(images.to_vec(), &device);
    let mut optimizer = recipe.optimizer();
    let mut times = Vec::with_capacity(TIMED_STEPS);
    for step in 0..WARM_UP_STEPS + TIMED_STEPS {
        let start = Instant::now();
        let output = TrainStep::step(&model, batch.clone());
        model = model.optimize(&mut optimizer, TIMED_RATE.into(), output.grads);
        // A failure of the device is reported by the training run. Checking for it here would distort the times.
        device.sync().ok();
        if step >= WARM_UP_STEPS {
            times.push(start.elapsed());
        }
    }
    times.sort();
    times[TIMED_STEPS / 2]
}

/// How a model does on the test images.
pub fn test(model: &Dinov2ForImageClassification, Task { split, format, .. }: &Task) -> Score {
    score(&logits(model, &split.test, format), &split.test)
}

/// A model's `[images, classes]` logits.
pub fn logits(
    model: &Dinov2ForImageClassification,
    images: &[Image],
    format: &Format,
) -> Tensor<2> {
    infer(images, format, &device_of(model), |pixels| {
        model.forward(pixels)
    })
}

/// The vectors that a model's head reads.
pub fn features(
    model: &Dinov2ForImageClassification,
    images: &[Image],
    format: &Format,
) -> Features {
    let features = infer(images, format, &device_of(model), |pixels| {
        model.features(pixels)
    });
    Features {
        width: features.dims()[1],
        values: features.into_data().iter::<f32>().collect(),
        labels: images.iter().map(|image| image.label).collect(),
    }
}

/// Loss and accuracy of `[images, classes]` logits.
fn score(logits: &Tensor<2>, images: &[Image]) -> Score {
    let labels: Vec<i64> = images.iter().map(|image| image.label as i64).collect();
    let targets =
        Tensor::<1, Int>::from_data(TensorData::new(labels, [images.len()]), &logits.device());
    let loss = CrossEntropyLossConfig::new()
        .init(&logits.device())
        .forward(logits.clone(), targets)
        .into_scalar::<f64>();
    let correct = predictions(logits)
        .iter()
        .zip(images)
        .filter(|(prediction, image)| **prediction == image.label)
        .count();
    Score {
        loss,
        accuracy: correct as f64 / images.len() as f64,
    }
}

/// The class of the largest logit of each row.
pub fn predictions(logits: &Tensor<2>) -> Vec<usize> {
    let classes = logits.clone().argmax(1).into_data();
    classes.iter::<i64>().map(|class| class as usize).collect()
}

fn infer(
    images: &[Image],
    format: &Format,
    device: &Device,
    forward: impl Fn(Tensor<4>) -> Tensor<2>,
) -> Tensor<2> {
    let batches = images.chunks(INFERENCE_BATCH);
    let outputs = batches.map(|chunk| forward(format.batch(chunk.to_vec(), device).pixels));
    Tensor::cat(outputs.collect(), 0)
}

fn device_of(model: &Dinov2ForImageClassification) -> Device {
    model.classifier.weight.base().device()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(max_steps: Option<usize>) -> Recipe {
        Recipe {
            epochs: 5,
            batch_size: 10,
            max_steps,
            seed: 0,
        }
    }

    #[test]
    fn the_step_limit_cuts_epochs_and_then_images() {
        assert_eq!(recipe(None).limited(95), (5, 95));
        assert_eq!(recipe(Some(100)).limited(95), (5, 95));
        assert_eq!(recipe(Some(29)).limited(95), (2, 95));
        assert_eq!(recipe(Some(4)).limited(95), (1, 40));
    }

    #[test]
    fn a_short_epoch_has_every_class() {
        let images: Vec<Image> = (0..30)
            .map(|index| Image {
                pixels: [index].as_slice().into(),
                label: index as usize / 10,
            })
            .collect();
        let labels = |count| -> Vec<usize> {
            let spread = spread(&images, count);
            spread.iter().map(|image| image.label).collect()
        };
        assert_eq!(labels(6), [0, 0, 1, 1, 2, 2]);
        assert_eq!(spread(&images, 30), images);
        assert_eq!(spread(&images, 31), images);
    }

    #[test]
    fn batches_of_validation_images_are_even() {
        assert_eq!(
            [1, 128, 129, 133, 400].map(even_batch),
            [1, 128, 65, 67, 100]
        );
    }

    #[test]
    fn a_score_counts_the_largest_logits() {
        let logits = Tensor::from_data([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], &Device::flex());
        let images: Vec<Image> = [0, 1, 1]
            .map(|label| Image {
                pixels: [0].as_slice().into(),
                label,
            })
            .to_vec();
        assert_eq!(predictions(&logits), [0, 1, 0]);
        assert_eq!(score(&logits, &images).accuracy, 2.0 / 3.0);
    }
}
