//! Weights that are rotated once for a forward pass that reads them in every time step.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::{Gru, GruConfig, Lstm, LstmConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_boft::{AdapterConfig, BoftConfig, Init, OftConfig, inject, rotate_once};

use crate::common::by_hand::{flat, relative};
use crate::common::models::{gradients, numbers, rows};
use crate::common::{devices, host};

const STEPS: usize = 5;

fn configs() -> [AdapterConfig; 2] {
    let boft = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_target_modules("all-linear");
    let oft = OftConfig::new()
        .with_block_size(8)
        .with_target_modules("all-linear");
    [
        boft.with_init(Init::Random { seed: 3 }).into(),
        oft.with_init(Init::Random { seed: 4 }).into(),
    ]
}

fn sequences(device: &Device) -> Tensor<3> {
    rows([3, STEPS, 16], 1, device)
}

fn lstm(model: &Lstm, device: &Device) -> Tensor<1> {
    let (output, state) = model.forward(sequences(device), None);
    flat(output) + flat(state.cell).sum()
}

fn gru(model: &Gru, device: &Device) -> Tensor<1> {
    flat(model.forward(sequences(device), None))
}

/// The output, and the gradients of the adapters of `model`, when `computed` computes.
fn run<M: Module>(
    model: &M,
    computed: &M,
    device: &Device,
    forward: fn(&M, &Device) -> Tensor<1>,
) -> (Vec<f64>, BTreeMap<String, Vec<f64>>) {
    let output = forward(computed, device);
    let loss = output.clone().powi_scalar(2).sum();
    (host(output), gradients(model, &loss.backward()))
}

fn agrees<M: Module>(base: &M, device: &Device, forward: fn(&M, &Device) -> Tensor<1>) {
    for config in configs() {
        let model = inject(base.clone(), config).unwrap();
        let (expected, expected_gradients) = run(&model, &model, device, forward);
        let (output, gradients) = run(&model, &rotate_once(&model), device, forward);
        assert!(relative(&expected, &host(forward(base, device))) > 0.05);
        assert!(relative(&output, &expected) <= 1e-6);
        assert!(gradients.len() >= 4 && gradients.keys().eq(expected_gradients.keys()));
        for (path, gradient) in &gradients {
            let drift = relative(gradient, &expected_gradients[path]);
            assert!(drift <= 1e-5, "{path}: {drift:.1e}");
        }
    }
}

#[test]
fn a_recurrent_layer_computes_and_learns_the_same_with_weights_that_were_rotated_once() {
    for (_, device) in devices() {
        for device in [
            device.clone().autodiff(),
            device.autodiff().gradient_checkpointing(),
        ] {
            agrees(&LstmConfig::new(16, 8, true).init(&device), &device, lstm);
            agrees(&GruConfig::new(16, 8, true).init(&device), &device, gru);
        }
    }
}

#[test]
fn several_steps_train_the_model_that_the_copies_were_made_of() {
    let device = Device::flex().autodiff();
    let base = LstmConfig::new(16, 8, true).init(&device);
    let start = inject(base, configs()[0].clone()).unwrap();
    let train = |copies: bool| {
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
        let mut model = start.clone();
        for _ in 0..4 {
            let output = match copies {
                true => lstm(&rotate_once(&model), &device),
                false => lstm(&model, &device),
            };
            let loss = output.powi_scalar(2).sum();
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-2, model, gradients);
        }
        numbers(&model)
    };
    let (found, expected) = (train(true), train(false));
    let before = numbers(&start);
    for (path, values) in &found {
        let is_adapter = path.contains(".boft.");
        assert_eq!(*values != before[path], is_adapter, "{path}");
        assert!(relative(values, &expected[path]) <= 1e-4, "{path}");
    }
}

#[test]
fn a_copy_keeps_the_blocks_that_were_dropped_for_it_and_drops_none_in_inference() {
    let device = Device::flex().autodiff();
    let base = LstmConfig::new(16, 8, true).init(&device);
    let config = BoftConfig::new()
        .with_dropout(0.5)
        .with_init(Init::Random { seed: 3 })
        .with_target_modules("all-linear");
    let model = inject(base, config).unwrap();
    let output = |model: &Lstm, device: &Device| host(lstm(model, device));
    let copy = rotate_once(&model);
    assert_eq!(output(&copy, &device), output(&copy, &device));
    assert_ne!(output(&model, &device), output(&model, &device));
    let plain = Device::flex();
    let valid = model.valid();
    let expected = output(&valid, &plain);
    assert_ne!(output(&copy, &device), expected);
    assert_eq!(output(&rotate_once(&valid), &plain), expected);
}

#[test]
fn a_model_without_adapters_is_copied_as_it_is() {
    let device = Device::flex();
    let base = LstmConfig::new(16, 8, true).init(&device);
    assert_eq!(numbers(&rotate_once(&base)), numbers(&base));
}
