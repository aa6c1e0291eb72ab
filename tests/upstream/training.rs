//! Optimizers, metrics and data loaders.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoaderBuilder, Progress};
use burn::data::dataset::InMemDataset;
use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Int, Tensor};
use burn::train::ClassificationOutput;
use burn::train::metric::{
    Adaptor, LearningRateMetric, LossMetric, Metric, MetricMetadata, Numeric, NumericEntry,
};

use super::{INPUTS, OUTPUTS, pin, weight};
use crate::common::models::{linear, numbers};
use crate::common::{noise, tensor};

const RATE: f64 = 0.25;

/// How far one step moves weight and bias, with gradients of these sizes.
fn moves(optimizer: &mut burn::optim::ModuleOptimizer, [weight, bias]: [f64; 2]) -> [Vec<f64>; 2] {
    let device = Device::flex().autodiff();
    let layer = linear([INPUTS, OUTPUTS], 2, DType::F32, &device);
    let before = numbers(&layer);
    let mut gradients = GradientsParams::new();
    let values = noise(INPUTS * OUTPUTS, 4, weight);
    let gradient = tensor(&values, [INPUTS, OUTPUTS], DType::F32, &Device::flex());
    gradients.register(layer.weight.id, gradient);
    let values = vec![bias; OUTPUTS];
    let gradient = tensor(&values, [OUTPUTS], DType::F32, &Device::flex());
    gradients.register(layer.bias.as_ref().unwrap().id, gradient);
    let after = numbers(&optimizer.step(RATE, layer, gradients));
    ["weight", "bias"].map(|name| {
        let pairs = before[name].iter().zip(&after[name]);
        pairs.map(|(old, new)| old - new).collect()
    })
}

#[test]
fn clipping_limits_the_norm_of_each_parameter_by_itself() {
    let mut optimizer = SgdConfig::new()
        .with_gradient_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let moves = moves(&mut optimizer, [30.0, 20.0]);
    // In hundredths of the limit. The norm of both together would be at it.
    let norms = moves.map(|moves| {
        let norm = moves.iter().map(|x| x * x).sum::<f64>().sqrt();
        (100.0 * norm / RATE).round()
    });
    let name = "clipping_limits_the_norm_of_each_parameter_by_itself";
    pin(name, norms, [100.0, 100.0]);
}

#[test]
fn adamw_has_an_epsilon_a_thousand_times_that_of_pytorch() {
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    // The first step of Adam is `rate·g / (|g| + epsilon)`: half of the rate where the two are equal.
    let [_, bias] = moves(&mut optimizer, [1.0, 1e-5]);
    let shares = bias.iter().map(|x| (10.0 * x / RATE).round());
    let name = "adamw_has_an_epsilon_a_thousand_times_that_of_pytorch";
    pin(name, shares.collect(), vec![5.0; OUTPUTS]);
}

#[test]
fn an_optimizer_steps_a_shared_parameter_at_its_first_place_only() {
    #[derive(Module, Debug)]
    struct Shared {
        first: Param<Tensor<2>>,
        second: Param<Tensor<2>>,
    }

    let first = weight(&Device::flex().autodiff());
    let shared = Shared {
        second: first.clone(),
        first,
    };
    let before = numbers(&shared);
    let mut gradients = GradientsParams::new();
    let values = noise(INPUTS * OUTPUTS, 4, 1.0);
    let gradient = tensor(&values, [INPUTS, OUTPUTS], DType::F32, &Device::flex());
    gradients.register(shared.first.id, gradient);
    let after = numbers(&SgdConfig::new().init().step(RATE, shared, gradients));
    let moved = ["first", "second"].map(|name| before[name] != after[name]);
    let name = "an_optimizer_steps_a_shared_parameter_at_its_first_place_only";
    pin(name, moved, [true, false]);
}

fn metadata(rate: f64) -> MetricMetadata {
    MetricMetadata {
        progress: Progress {
            items_processed: 1,
            items_total: 2,
            unit: None,
        },
        iteration: Some(1),
        lr: Some(rate.into()),
    }
}

/// The number that a metric shows for an epoch, in thousandths.
fn shown(metric: &impl Numeric) -> f64 {
    match metric.final_value() {
        NumericEntry::Final(value) => (1000.0 * value).round(),
        entry => panic!("a final value is expected, and not {entry:?}"),
    }
}

#[test]
fn the_metric_of_the_learning_rate_shows_the_mean_of_an_epoch() {
    let mut metric = LearningRateMetric::new();
    for rate in [0.1, 0.1, 0.4] {
        metric.update(&(), &metadata(rate)).unwrap();
    }
    let name = "the_metric_of_the_learning_rate_shows_the_mean_of_an_epoch";
    pin(name, shown(&metric), 200.0);
}

#[test]
fn the_metric_of_the_loss_gives_every_batch_the_same_weight() {
    let device = Device::flex();
    let mut metric = LossMetric::new();
    for (loss, rows) in [(1.0, 3), (4.0, 1)] {
        let output = ClassificationOutput::new(
            tensor(&[loss], [1], DType::F32, &device),
            tensor(&noise(rows * 2, 1, 1.0), [rows, 2], DType::F32, &device),
            Tensor::<1, Int>::ones([rows], &device),
        );
        metric.update(&output.adapt(), &metadata(0.1)).unwrap();
    }
    // By the number of rows it would be 1.75.
    let name = "the_metric_of_the_loss_gives_every_batch_the_same_weight";
    pin(name, shown(&metric), 2500.0);
}

#[test]
fn a_data_loader_makes_a_hundred_batches_that_nobody_has_asked_for() {
    /// Counts the batches that it makes.
    struct Counting(Arc<AtomicUsize>);

    impl Batcher<f32, usize> for Counting {
        fn batch(&self, items: Vec<f32>, _: &Device) -> usize {
            self.0.fetch_add(1, Ordering::SeqCst);
            items.len()
        }
    }

    let made = Arc::new(AtomicUsize::new(0));
    let loader = DataLoaderBuilder::new(Counting(made.clone()))
        .batch_size(1)
        .num_workers(1)
        .set_device(Device::flex())
        .build(InMemDataset::new(vec![0.5; 150]));
    let batches = loader.iter();
    let start = Instant::now();
    while made.load(Ordering::SeqCst) < 100 && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(2));
    }
    // The queue, and one that waits for its place in it.
    let made = made.load(Ordering::SeqCst);
    let name = "a_data_loader_makes_a_hundred_batches_that_nobody_has_asked_for";
    pin(name, (100..=101).contains(&made), true);
    drop(batches);
}
