//! The radius of constrained OFT.

use burn::module::Module;
use burn::tensor::DType;
use burn_boft::{BoftLinear, Init, OftConfig, inject, project};

use crate::common::models::{distance, gradients, linear, numbers, rows, trainable};
use crate::common::{assert_close, devices};

/// The Frobenius norm of the largest block of six packed numbers.
fn largest_block(skew: &[f64]) -> f64 {
    let norm = |packed: &[f64]| (2.0 * packed.iter().map(|v| v * v).sum::<f64>()).sqrt();
    skew.chunks(6).map(norm).fold(0.0, f64::max)
}

#[test]
fn coft_stays_within_its_radius_and_still_learns() {
    const RADIUS: f64 = 0.3;
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = BoftLinear::from(linear([24, 10], 3, DType::F32, &device));
        let config = || {
            let config = OftConfig::new().with_block_size(4);
            config
                .with_target_modules(".*")
                .with_init(Init::Random { seed: 5 })
        };
        let free = inject(base.clone(), config()).unwrap();
        let model = inject(base, config().with_coft_radius(RADIUS)).unwrap();
        let stored = |model: &BoftLinear| largest_block(&numbers(model)["weight.boft.skew"]);
        let bound = RADIUS / 6f64.sqrt();
        assert!(stored(&model) > 1.5 * bound);
        let projected = project(model.clone());
        assert!(stored(&projected) <= bound * (1.0 + 1e-6));
        assert_eq!(trainable(&projected), trainable(&model));
        assert_eq!(
            trainable(&project(model.valid()).train()),
            trainable(&model)
        );
        // Projecting again changes nothing, except that the length is rounded once more.
        let (once, twice) = (numbers(&projected), numbers(&project(projected.clone())));
        let path = "weight.boft.skew";
        assert_close(backend, &twice[path], &once[path], 1e-7);
        assert_eq!(numbers(&project(free.clone())), numbers(&free));

        let input = rows([7, 24], 4, &device);
        let output = projected.forward(input.clone());
        let drift = distance(model.forward(input.clone()), output.clone());
        assert!(drift <= 2e-6, "{backend}: {drift}");
        assert!(distance(free.forward(input.clone()), output) > 0.1);

        for model in [&model, &projected] {
            let loss = model.forward(input.clone()).powi_scalar(3).sum();
            let found = gradients(model, &loss.backward());
            let path = "weight.boft.skew";
            assert_eq!(Vec::from_iter(found.keys()), [path]);
            assert!(
                found[path].iter().all(|&value| value.abs() > 1e-6),
                "{backend}"
            );
        }
    }
}
