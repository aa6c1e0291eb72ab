//! What `diagnose` measures.

use burn_boft::{BoftConfig, BoftLinear, diagnose, inject};

use crate::common::devices;
use crate::common::models::{Net, set};

#[test]
fn a_number_that_is_none_shows_in_every_measurement() {
    let config = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_target_modules(["hidden", "output"]);
    for (backend, device) in devices() {
        let model = inject(Net::<BoftLinear>::new(1, &device), &config).unwrap();
        let model = set(model, "hidden.weight.boft.skew", |mut numbers| {
            numbers[3] = f64::NAN;
            numbers
        });
        let layer = &diagnose(&model).layers[0];
        for number in [
            layer.orthogonality_defect,
            layer.skew_norm,
            layer.largest_angle,
            layer.energy_after,
        ] {
            assert!(number.is_nan(), "{backend}: {layer:?}");
        }
        assert!(layer.energy_before.is_finite());
    }
}
