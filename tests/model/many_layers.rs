//! Models of ten thousand layers.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_boft::{Adapter, BoftConfig, Init, inject, merge, summary, unload};

use crate::common::models::numbers;

const LAYERS: usize = 10_000;

#[derive(Module, Debug)]
struct Wide {
    layers: Vec<Linear>,
}

/// What is quadratic in the number of layers takes minutes here and is seen at once; time itself is measured in the
/// benchmarks.
#[test]
fn ten_thousand_layers_named_one_by_one_go_through_every_verb() {
    let device = Device::flex();
    let layers = (0..LAYERS).map(|_| LinearConfig::new(4, 3).init(&device));
    let base = Wide {
        layers: layers.collect(),
    };
    let names = (0..LAYERS - 1).map(|index| format!("layers.{index}"));
    let config = BoftConfig::new()
        .with_target_modules(names.collect::<Vec<_>>())
        .with_modules_to_save([format!("layers.{}", LAYERS - 1)])
        .with_init(Init::Random { seed: 2 });
    let model = inject(base.clone(), &config).unwrap();
    let counts = summary(&model);
    assert_eq!(counts.layers.len(), LAYERS - 1);
    assert_eq!(counts.trainable, (LAYERS - 1) * (6 + 3) + 4 * 3 + 3);
    let adapter = Adapter::extract(&model).unwrap();
    assert_eq!(
        adapter.config().selection().modules_to_save,
        ["layers.9999"]
    );
    let again = Adapter::extract_as(&model, &config).unwrap();
    assert_eq!(adapter.layers(), again.layers());
    let attached = adapter.attach(base.clone()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
    assert_eq!(numbers(&unload(attached)), numbers(&base));
    assert_ne!(numbers(&merge(model).unwrap()), numbers(&base));
}
