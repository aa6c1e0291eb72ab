//! A scaled skew: what is trained is `2√(b−1)` times the numbers of `Q`.

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::DType;
use burn_boft::{
    Adapter, AdapterConfig, BoftConfig, BoftLinear, Cayley, Init, OftConfig, diagnose, inject,
    merge, project,
};

use crate::common::models::{distance, gradients, linear, numbers, rows, set, trainable};
use crate::common::{assert_close, devices, host, noise};

const SKEW: &str = "weight.boft.skew";
const SCALED: &str = "weight.boft.scaled_skew";

/// `2√(b−1)` for blocks of this many channels.
fn factor(b: usize) -> f64 {
    2.0 * (b as f64 - 1.0).sqrt()
}

fn times(factor: f64, numbers: &[f64]) -> Vec<f64> {
    numbers.iter().map(|number| factor * number).collect()
}

/// Configurations of every map, by block size, without a scaled skew.
fn configs() -> [(usize, AdapterConfig); 3] {
    let init = Init::Random { seed: 5 };
    let boft = BoftConfig::new()
        .with_block_size(6)
        .with_n_butterfly_factor(2)
        .with_init(init)
        .with_target_modules(".*");
    let oft = OftConfig::new().with_init(init).with_target_modules(".*");
    let neumann = Cayley::Neumann { terms: 5 };
    [
        (6, boft.into()),
        (8, oft.clone().with_block_size(8).into()),
        (3, oft.with_block_size(3).with_cayley(neumann).into()),
    ]
}

fn scaled(mut config: AdapterConfig) -> AdapterConfig {
    config.set_scaled_skew(true);
    config
}

#[test]
fn a_scaled_skew_computes_the_same_and_its_gradient_is_smaller() {
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = BoftLinear::from(linear([24, 10], 3, DType::F32, &device));
        let input = rows([7, 24], 4, &device);
        for (b, config) in configs() {
            let plain = inject(base.clone(), config.clone()).unwrap();
            let model = inject(base.clone(), scaled(config)).unwrap();
            let what = format!("{backend}, blocks of {b}");
            let expected = times(factor(b), &numbers(&plain)[SKEW]);
            assert_close(&what, &numbers(&model)[SCALED], &expected, 1e-7);
            assert!(trainable(&model).contains(SCALED));
            assert!(!numbers(&model).contains_key(SKEW));

            let outputs = [&plain, &model].map(|model| model.forward(input.clone()));
            assert_close(
                &what,
                &host(outputs[1].clone()),
                &host(outputs[0].clone()),
                1e-6,
            );
            let [before, after] =
                [(&plain, &outputs[0]), (&model, &outputs[1])].map(|(model, output)| {
                    gradients(model, &output.clone().powi_scalar(3).sum().backward())
                });
            let expected = times(1.0 / factor(b), &before[SKEW]);
            assert_close(&what, &after[SCALED], &expected, 1e-5);

            let [before, after] = [&plain, &model].map(|model| diagnose(model).layers.remove(0));
            assert!(
                (before.largest_angle - after.largest_angle).abs() < 1e-5,
                "{what}"
            );
            let merged = [plain, model].map(|model| host(merge(model).unwrap().weight.val()));
            assert_close(&what, &merged[1], &merged[0], 1e-6);
        }
    }
}

/// The first step of Adam moves every number by the learning rate, and `Q` by as much less as its blocks are larger.
#[test]
fn one_learning_rate_moves_blocks_of_every_size_alike() {
    const RATE: f64 = 1e-2;
    for (backend, device) in devices() {
        let device = device.autodiff();
        for b in [4, 12] {
            let config = BoftConfig::new()
                .with_block_size(b)
                .with_scaled_skew(true)
                .with_target_modules(".*");
            let base = BoftLinear::from(linear([24, 10], 3, DType::F32, &device));
            let model = inject(base, config).unwrap();
            let output = model.forward(rows([64, 24], 4, &device));
            let gradients = output.powi_scalar(3).sum().backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
            let model = optimizer.step(RATE, model, gradients);
            let what = format!("{backend}, blocks of {b}");
            let adapter = Adapter::extract(&model).unwrap();
            let skew: Vec<f64> = adapter.layers()[0].skew().iter::<f64>().collect();
            let moved: Vec<_> = skew.iter().map(|number| number.abs()).collect();
            assert_close(&what, &moved, &vec![RATE / factor(b); skew.len()], 1e-5);
        }
    }
}

#[test]
fn an_extracted_adapter_has_the_numbers_of_q_and_is_trained_scaled_again() {
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = BoftLinear::from(linear([24, 10], 3, DType::F32, &device));
        let input = rows([7, 24], 4, &device);
        for (b, config) in configs() {
            let model = inject(base.clone(), scaled(config.clone())).unwrap();
            let model = set(model, SCALED, |values| noise(values.len(), 9, 0.7));
            let adapter = Adapter::extract(&model).unwrap();
            let what = format!("{backend}, blocks of {b}");
            assert!(adapter.config().scaled_skew(), "{what}");
            let skew: Vec<f64> = adapter.layers()[0].skew().iter::<f64>().collect();
            let trained = &numbers(&model)[SCALED];
            assert_close(&what, &skew, &times(1.0 / factor(b), trained), 1e-7);

            let attached = adapter.attach(base.clone()).unwrap();
            assert_close(&what, &numbers(&attached)[SCALED], trained, 1e-7);
            let drift = distance(
                attached.forward(input.clone()),
                model.forward(input.clone()),
            );
            assert!(drift <= 1e-6, "{what}: {drift}");

            // The settings belong to the model: others are refused.
            let error = Adapter::extract_as(&model, config.clone())
                .unwrap_err()
                .to_string();
            assert!(error.contains("a scaled skew"), "{what}: {error}");
            // A record of one kind is not taken for one of the other.
            let plain = inject(base.clone(), config).unwrap();
            assert!(
                plain.try_load_record(model.into_record()).is_err(),
                "{what}"
            );
        }
    }
}

#[test]
fn a_radius_bounds_q_and_not_the_numbers_that_are_trained() {
    const RADIUS: f64 = 0.3;
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = BoftLinear::from(linear([24, 10], 3, DType::F32, &device));
        let config = OftConfig::new()
            .with_block_size(4)
            .with_coft_radius(RADIUS)
            .with_init(Init::Random { seed: 5 })
            .with_target_modules(".*");
        let plain = inject(base.clone(), config.clone()).unwrap();
        let model = inject(base, config.with_scaled_skew(true)).unwrap();
        let input = rows([7, 24], 4, &device);
        let drift = distance(plain.forward(input.clone()), model.forward(input.clone()));
        assert!(drift <= 1e-6, "{backend}: {drift}");
        let [plain, model] = [plain, model].map(project);
        let expected = times(factor(4), &numbers(&plain)[SKEW]);
        assert_close(backend, &numbers(&model)[SCALED], &expected, 1e-6);
        let bound = RADIUS / 6f64.sqrt() * factor(4);
        let norm = |packed: &[f64]| (2.0 * packed.iter().map(|v| v * v).sum::<f64>()).sqrt();
        let largest = numbers(&model)[SCALED]
            .chunks(6)
            .map(norm)
            .fold(0.0, f64::max);
        assert!(
            (largest - bound).abs() < 1e-5 * bound,
            "{backend}: {largest}"
        );
    }
}
