//! The running statistics of batch norms.

use burn::module::{Module, Param};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{Adapter, BoftConfig, BoftLinear, Init, inject, summary};

use crate::common::host;
use crate::common::models::{linear, numbers, rows};

#[derive(Module, Debug)]
struct Tower {
    hidden: BoftLinear,
    norm: BatchNorm,
    output: BoftLinear,
}

impl Tower {
    /// Every call makes tensors of its own: clones of a model share their running statistics.
    fn new() -> Self {
        let device = Device::flex().autodiff();
        let layer = |sizes, seed| BoftLinear::from(linear(sizes, seed, DType::F32, &device));
        let mut norm = BatchNormConfig::new(16).init(&device);
        norm.gamma = Param::from_tensor(rows([16], 5, &device) + 2.0);
        Self {
            hidden: layer([24, 16], 1),
            norm,
            output: layer([16, 5], 2),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(self.hidden.forward(input));
        self.output.forward(hidden)
    }
}

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_target_modules(["hidden"])
        .with_init(Init::Random { seed: 9 })
}

/// What some forward passes in training leave.
fn used(model: Tower) -> Tower {
    let device = Device::flex().autodiff();
    for seed in 0..5 {
        model.forward(rows([8, 24], seed, &device) + 1.5);
    }
    model
}

fn validated(model: &Tower) -> Vec<f64> {
    host(model.valid().forward(rows([6, 24], 77, &Device::flex())))
}

#[test]
fn inject_freezes_the_running_statistics_of_batch_norms() {
    let model = used(inject(Tower::new(), config()).unwrap());
    for statistic in ["norm.running_mean", "norm.running_var"] {
        assert_eq!(
            numbers(&model)[statistic],
            numbers(&Tower::new())[statistic]
        );
    }
    let adapter = Adapter::extract(&model).unwrap();
    assert!(adapter.tensors().is_empty());
    // The base that the adapter meets is another than the one it was trained on.
    let attached = adapter.attach(Tower::new()).unwrap();
    assert_eq!(validated(&attached), validated(&model));
    assert_eq!(
        validated(&used(attached)),
        validated(&model),
        "an attached adapter keeps them frozen too"
    );
}

/// They are buffers, which PEFT does not count.
#[test]
fn the_summary_does_not_count_running_statistics() {
    let adapter = 2 * 6 * 6 + 16;
    let (hidden, norm, output) = (24 * 16 + 16, 2 * 16, 16 * 5 + 5);
    for (config, trainable) in [
        (config(), adapter),
        (config().with_modules_to_save(["norm"]), adapter + norm),
    ] {
        let counts = summary(&inject(Tower::new(), config).unwrap());
        assert_eq!(counts.trainable, trainable);
        assert_eq!(counts.total, hidden + norm + output + adapter);
    }
}

#[test]
fn a_batch_norm_in_modules_to_save_is_trained_and_travels_with_the_adapter() {
    let config = config().with_modules_to_save(["norm"]);
    let model = used(inject(Tower::new(), &config).unwrap());
    for statistic in ["norm.running_mean", "norm.running_var"] {
        assert_ne!(
            numbers(&model)[statistic],
            numbers(&Tower::new())[statistic]
        );
    }
    let adapter = Adapter::extract(&model).unwrap();
    assert_eq!(adapter.config().selection().modules_to_save, ["norm"]);
    let attached = adapter.attach(Tower::new()).unwrap();
    assert_eq!(validated(&attached), validated(&model));
    let before = validated(&attached);
    assert_ne!(validated(&used(attached)), before, "it is trained on");
}
