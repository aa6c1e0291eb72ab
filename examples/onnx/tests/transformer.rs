//! A block of a transformer, whose attention is wider than its tokens. It is generated with Burn's linear layer, and once
//! more with the one of burn-boft.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_boft::model::Misfit;
use burn_boft::{Adapter, BoftConfig, Init, inject};
use burn_boft_onnx_example::digits::Digits;
use burn_boft_onnx_example::{Classifier, loss, vit};

use crate::common::models::gradients;
use crate::common::{assert_close, host};
use crate::lifecycle::{Learnt, computes_what_pytorch_computed, walk};

#[allow(clippy::all, dead_code)]
mod plain {
    include!(concat!(env!("OUT_DIR"), "/block.rs"));
}

#[allow(clippy::all, dead_code)]
mod fast {
    include!(concat!(env!("OUT_DIR"), "/block_fast.rs"));
}

impl Classifier for plain::Model {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self.forward(images)
    }
}

impl Classifier for fast::Model {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self.forward(images)
    }
}

/// Query, key, value and output of the attention, and the two layers of the perceptron.
fn config() -> BoftConfig {
    BoftConfig::new()
        .with_block_size(2)
        .with_n_butterfly_factor(2)
        .with_target_modules([
            "linear2", "linear3", "linear4", "linear5", "linear6", "linear7",
        ])
}

const LEARNT: Learnt = Learnt {
    paths: &[
        "linear2.weight.boft.scale",
        "linear2.weight.boft.skew",
        "linear3.weight.boft.scale",
        "linear3.weight.boft.skew",
        "linear4.weight.boft.scale",
        "linear4.weight.boft.skew",
        "linear5.weight.boft.scale",
        "linear5.weight.boft.skew",
        "linear6.weight.boft.scale",
        "linear6.weight.boft.skew",
        "linear7.weight.boft.scale",
        "linear7.weight.boft.skew",
    ],
    // Two factors of one number a block, and the scales.
    count: 2 * (3 * 24 + 40 + 24 + 60) / 2 + (3 * 40 + 24 + 60 + 24),
};

#[test]
fn the_importer_keeps_what_pytorch_computes() {
    let device = Device::flex();
    computes_what_pytorch_computed(&plain::Model::from_embedded(&device), "block", &device);
    computes_what_pytorch_computed(&fast::Model::from_embedded(&device), "block", &device);
    computes_what_pytorch_computed(&vit::Model::from_embedded(&device), "vit", &device);
}

#[test]
fn layers_of_burn_train_travel_and_merge() {
    let device = Device::flex().autodiff();
    walk(
        &plain::Model::from_embedded(&device),
        config(),
        LEARNT,
        &device,
    );
}

#[test]
fn layers_of_burn_boft_train_travel_and_merge() {
    let device = Device::flex().autodiff();
    walk(
        &fast::Model::from_embedded(&device),
        config(),
        LEARNT,
        &device,
    );
}

/// The line of `build.rs` changes which layer is used, and nothing that is computed or saved.
#[test]
fn both_layers_compute_the_same() {
    const PLAIN: &str = include_str!(concat!(env!("OUT_DIR"), "/block.rs"));
    const FAST: &str = include_str!(concat!(env!("OUT_DIR"), "/block_fast.rs"));
    assert!(PLAIN.contains("burn::nn::Linear") && !PLAIN.contains("BoftLinear"));
    assert!(FAST.contains("BoftLinear") && !FAST.contains("burn::nn::Linear"));

    let device = Device::flex().autodiff();
    let config = config().with_init(Init::Random { seed: 5 });
    let plain = inject(plain::Model::from_embedded(&device), config).unwrap();
    let adapter = Adapter::extract(&plain).unwrap();
    let fast = adapter.attach(fast::Model::from_embedded(&device)).unwrap();

    // One image takes the route over the activations, and a whole batch that over the weight.
    for count in [1, 64] {
        let digits = Digits::training(&device).first(count);
        let (outputs, expected) = (
            output_and_gradients(&fast, &digits),
            output_and_gradients(&plain, &digits),
        );
        assert!(outputs.keys().eq(expected.keys()));
        assert_eq!(outputs.len(), 1 + LEARNT.paths.len());
        for (name, values) in &outputs {
            assert!(values.iter().any(|&value| value != 0.0), "{name}");
            assert_close(name, values, &expected[name], 1e-5);
        }
    }
}

fn output_and_gradients<M: Classifier + Module>(
    model: &M,
    digits: &Digits,
) -> BTreeMap<String, Vec<f64>> {
    let mut found = gradients(model, &loss(model, digits.clone()).backward());
    found.insert(
        "logits".to_string(),
        host(model.logits(digits.images.clone())),
    );
    found
}

#[test]
fn norms_are_refused_by_name() {
    let config = BoftConfig::new().with_target_modules(["linear2", "layernormalization1"]);
    let error = inject(plain::Model::from_embedded(&Device::flex()), config).unwrap_err();
    let [Misfit::UnsupportedTarget { path, .. }] = error.misfits() else {
        panic!("{error}");
    };
    assert_eq!(path, "layernormalization1");
}
