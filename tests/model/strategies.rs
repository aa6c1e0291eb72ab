//! Burn's strategies of training on several devices.

use std::collections::BTreeMap;

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataset::InMemDataset;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn::train::metric::LossMetric;
use burn::train::renderer::CliMetricsRenderer;
use burn::train::{
    ExecutionStrategy, Learner, MultiDeviceOptim, SupervisedTraining, TrainingStrategy,
};
use burn_boft::{BoftConfig, BoftLinear, Init, inject, summary};

use crate::common::models::{INPUT, Net, OUTPUT, numbers, rows};
use crate::common::noise;
use crate::common::training::{Item, Rows};

const BATCH: usize = 5;
const BATCHES: usize = 4;

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(Init::Random { seed: 3 })
        .with_target_modules(["hidden", "output"])
        .with_modules_to_save(["head"])
}

fn model(device: &Device) -> Net<BoftLinear> {
    inject(Net::new(1, device), config()).unwrap()
}

/// Batches of rows of noise.
fn batches() -> Vec<Vec<Item>> {
    let single = |values: Vec<f64>| values.iter().map(|x| *x as f32).collect();
    let item = |row: u64| {
        let input = single(noise(INPUT, 900 + row, 1.0));
        (input, single(noise(OUTPUT, 300 + row, 1.0)))
    };
    let rows: Vec<_> = (0..(BATCH * BATCHES) as u64).map(item).collect();
    rows.chunks(BATCH).map(<[_]>::to_vec).collect()
}

/// Trains for two epochs, and returns every number.
fn train(
    items: Vec<Vec<Item>>,
    strategy: ExecutionStrategy,
    accumulation: usize,
) -> BTreeMap<String, Vec<f64>> {
    let folder = tempfile::tempdir().unwrap();
    let items = items.concat();
    let loader = || {
        DataLoaderBuilder::new(Rows)
            .batch_size(BATCH)
            .build(InMemDataset::new(items.clone()))
    };
    let model = model(strategy.main_device());
    let training = SupervisedTraining::new(folder.path(), loader(), loader())
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .renderer(Box::new(CliMetricsRenderer::new()))
        .with_training_strategy(TrainingStrategy::Default(strategy))
        .grads_accumulation(accumulation)
        .num_epochs(2);
    let optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let result = training.launch(Learner::new(model, optimizer, 1e-2));
    assert!(result.error.is_none(), "{:?}", result.error);
    numbers(&result.model)
}

/// Two devices take the batches of a step that one device takes one after the other.
#[test]
fn several_devices_learn_what_one_device_learns() {
    #[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
    let (flex, ndarray) = (Device::flex().autodiff(), Device::ndarray().autodiff());
    let [a, b, c, d] = <[_; BATCHES]>::try_from(batches()).unwrap();
    let expected = train(
        vec![a.clone(), c.clone(), b.clone(), d.clone()],
        ExecutionStrategy::single(flex.clone()),
        2,
    );
    let start = numbers(&model(&flex));
    // Burn gives each device a half of the data.
    let halves = [a, b, c, d];
    for second in [&flex, &ndarray] {
        for optim in [
            MultiDeviceOptim::OptimMainDevice,
            MultiDeviceOptim::OptimSharded,
        ] {
            let devices = vec![flex.clone(), second.clone()];
            let what = format!("{devices:?}, {optim:?}");
            let strategy = ExecutionStrategy::multi(devices, optim);
            let found = train(halves.to_vec(), strategy, 1);
            let mut moved = Vec::new();
            for (path, values) in &found {
                let pairs = values.iter().zip(&expected[path]);
                let drift = pairs.fold(0.0, |max: f64, (a, b)| max.max((a - b).abs()));
                // The devices finish in any order, and AdamW divides by small numbers: up to 2e-5.
                assert!(drift <= 2e-4, "{path} drifts by {drift} on {what}");
                let pairs = values.iter().zip(&start[path]);
                let step = pairs.fold(0.0, |max: f64, (a, b)| max.max((a - b).abs()));
                if step > 0.0 {
                    assert!(step > 1e-2, "{path} moved by {step} on {what}");
                    moved.push(path.as_str());
                }
            }
            assert_eq!(
                moved,
                [
                    "head.bias",
                    "head.weight",
                    "hidden.weight.boft.scale",
                    "hidden.weight.boft.skew",
                    "output.weight.boft.scale",
                    "output.weight.boft.skew",
                ],
                "{what}"
            );
        }
    }
}

/// What a step sends to the device that updates the model.
#[test]
fn the_gradients_of_a_step_are_those_of_what_is_trained() {
    struct Bytes<'a> {
        gradients: &'a GradientsParams,
        sum: usize,
    }

    impl ModuleVisitor for Bytes<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.sum += gradient.into_data().as_bytes().len();
            }
        }
    }

    let device = Device::flex().autodiff();
    let model = model(&device);
    let output = model.forward(rows([7, INPUT], 4, &device));
    let gradients = GradientsParams::from_grads(output.square().mean().backward(), &model);
    let mut bytes = Bytes {
        gradients: &gradients,
        sum: 0,
    };
    model.visit(&mut bytes);
    let counts = summary(&model);
    assert_eq!(bytes.sum, 4 * counts.trainable);
    // The base has 24·16 + 16 + 2·16 + 16·12 + 12 numbers beside the head.
    assert_eq!(counts.total - counts.trainable, 636);
}
