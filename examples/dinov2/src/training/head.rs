//! The linear probe: a head that is trained on the features of the frozen backbone.
//!
//! Frozen features do not change, so they are computed once and kept, and training the head on them takes seconds.

use burn::module::Param;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::checkpoint::Score;
use crate::model::Dinov2ForImageClassification;

/// The learning rates that a probe chooses from by validation loss.
const RATES: [f64; 4] = [3e-4, 1e-3, 3e-3, 1e-2];
/// Passes over the features, and the rows of a step.
const EPOCHS: usize = 100;
const BATCH: usize = 256;
/// Decay of the weights, as in the recipe of fine-tuning.
const DECAY: f32 = 0.02;

/// Features of images, and their classes.
#[derive(Clone, Debug)]
pub struct Rows {
    /// `[images, width]`.
    pub features: Tensor<2>,
    /// `[images]`.
    pub labels: Vec<usize>,
}

/// A trained head.
#[derive(Clone, Debug)]
pub struct Probe {
    layer: Linear,
    pub learning_rate: f64,
    pub epoch: usize,
    pub valid: Score,
}

impl Probe {
    /// Trains a head on features. Learning rate and epoch are those with the lowest validation loss.
    pub fn train(train: &Rows, valid: &Rows, classes: usize, seed: u64) -> Self {
        let runs = RATES.map(|rate| Self::train_at(rate, train, valid, classes, seed));
        let best = runs
            .into_iter()
            .min_by(|a, b| a.valid.loss.total_cmp(&b.valid.loss));
        best.expect("there are rates to choose from")
    }

    fn train_at(rate: f64, train: &Rows, valid: &Rows, classes: usize, seed: u64) -> Self {
        let device = train.features.device();
        let training = device.clone().autodiff();
        let [images, width] = train.features.dims();
        device.seed(seed);
        let mut layer = LinearConfig::new(width, classes).init(&training);
        let mut optimizer = AdamWConfig::new()
            .with_epsilon(1e-8)
            .with_weight_decay(DECAY)
            .init();
        let loss = CrossEntropyLossConfig::new().init(&training);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..images).collect();

        let mut best: Option<Self> = None;
        for epoch in 1..=EPOCHS {
            order.shuffle(&mut rng);
            let cosine = (std::f64::consts::PI * (epoch - 1) as f64 / EPOCHS as f64).cos();
            for rows in order.chunks(BATCH) {
                let (features, labels) = train.select(rows, &device);
                let logits = layer.forward(Tensor::from_inner(features));
                let gradients = loss.forward(logits, Tensor::from_inner(labels)).backward();
                let gradients = GradientsParams::from_grads(gradients, &layer);
                layer = optimizer.step(0.5 * rate * (1.0 + cosine), layer, gradients);
            }
            let probe = Self {
                layer: layer.valid(),
                learning_rate: rate,
                epoch,
                valid: Score {
                    loss: f64::INFINITY,
                    accuracy: 0.0,
                },
            };
            let score = probe.score(valid);
            let better = best
                .as_ref()
                .is_none_or(|best| score.loss < best.valid.loss);
            if better {
                best = Some(Self {
                    valid: score,
                    ..probe
                });
            }
        }
        best.expect("a probe has epochs")
    }

    /// Loss and accuracy on other features.
    pub fn score(&self, rows: &Rows) -> Score {
        let all: Vec<usize> = (0..rows.labels.len()).collect();
        let (features, labels) = rows.select(&all, &rows.features.device());
        let logits = self.logits(features);
        let loss = CrossEntropyLossConfig::new()
            .init(&logits.device())
            .forward(logits.clone(), labels.clone());
        let answers: Tensor<1, Int> = logits.argmax(1).squeeze_dim(1);
        let correct = answers.equal(labels).float().mean();
        Score {
            loss: loss.into_scalar::<f64>(),
            accuracy: correct.into_scalar::<f64>(),
        }
    }

    /// `[images, classes]` logits of `[images, width]` features.
    pub fn logits(&self, features: Tensor<2>) -> Tensor<2> {
        self.layer.forward(features)
    }

    /// The model with this head. Parameters keep their identities.
    pub fn put_into(
        &self,
        mut model: Dinov2ForImageClassification,
    ) -> Dinov2ForImageClassification {
        let head = &mut model.classifier;
        let weight = self.layer.weight.val();
        head.weight = replaced(&head.weight, weight);
        if let (Some(bias), Some(trained)) = (&head.bias, &self.layer.bias) {
            head.bias = Some(replaced(bias, trained.val()));
        }
        model
    }
}

/// A parameter with another value, on the device that it was on.
fn replaced<const D: usize>(param: &Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let trains = param.is_require_grad();
    let value = value.into_data();
    let device = param.base().device();
    let value = Tensor::from_data(value, (&device, param.base().dtype()));
    Param::initialized(param.id, value.set_require_grad(trains))
}

impl Rows {
    fn select(&self, rows: &[usize], device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
        let count = rows.len();
        let labels: Vec<i64> = rows.iter().map(|&row| self.labels[row] as i64).collect();
        let labels = Tensor::from_data(TensorData::new(labels, [count]), device);
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), device);
        (self.features.clone().select(0, rows), labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three classes around three corners, the third near the second.
    fn rows(count: usize, shift: usize) -> Rows {
        let corners = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.5, 2.0]];
        let labels: Vec<usize> = (0..count).map(|index| index % 3).collect();
        let values: Vec<f32> = labels
            .iter()
            .enumerate()
            .flat_map(|(index, &label)| {
                let noise = (((index + shift) * 7919) % 101) as f32 / 101.0 - 0.5;
                corners[label].map(|corner| corner + noise)
            })
            .collect();
        let features = TensorData::new(values, [count, 3]);
        Rows {
            features: Tensor::from_data(features, &Device::flex()),
            labels,
        }
    }

    #[test]
    fn a_probe_learns_what_is_linearly_separable() {
        let probe = Probe::train(&rows(90, 0), &rows(30, 5), 3, 7);
        assert_eq!(probe.score(&rows(60, 11)).accuracy, 1.0);
        assert!(probe.valid.loss < 0.5, "{probe:?}");
    }

    #[test]
    fn the_same_seed_trains_the_same_head() {
        let train = |seed| {
            let probe = Probe::train(&rows(90, 0), &rows(30, 5), 3, seed);
            probe.logits(rows(9, 2).features).into_data()
        };
        assert_eq!(train(3), train(3));
        assert_ne!(train(3), train(4));
    }
}
