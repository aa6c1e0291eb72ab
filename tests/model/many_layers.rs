//! Models of ten thousand layers, and of modules that are nested two thousand deep.

use std::time::Instant;

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

/// A layer, and the next module below it.
#[derive(Module, Debug)]
struct Nest {
    layer: Linear,
    below: Vec<Nest>,
}

/// The path of a module is as long as its depth, so what looks at each ending of each path takes minutes, and otherwise it is two
/// seconds. Burn itself goes through the modules by calls within calls, for which a thread of its own has room.
#[test]
fn modules_nested_two_thousand_deep_are_adapted_in_seconds() {
    const DEPTH: usize = 2000;
    let nest = || {
        let device = Device::flex();
        let layer = || LinearConfig::new(4, 3).init(&device);
        let mut nest = Nest {
            layer: layer(),
            below: Vec::new(),
        };
        for _ in 1..DEPTH {
            nest = Nest {
                layer: layer(),
                below: vec![nest],
            };
        }
        let config = BoftConfig::new()
            .with_target_modules(["layer"])
            .with_init(Init::Random { seed: 2 });
        let start = Instant::now();
        let model = inject(nest.clone(), &config).unwrap();
        let adapter = Adapter::extract(&model).unwrap();
        assert_eq!(adapter.layers().len(), DEPTH);
        let attached = adapter.attach(nest).unwrap();
        assert_eq!(numbers(&attached), numbers(&model));
        let time = start.elapsed();
        assert!(time.as_secs() < 60, "{time:?}");
        // Dropping is recursive too.
        drop((model, attached));
    };
    let thread = std::thread::Builder::new().stack_size(1 << 30);
    thread.spawn(nest).unwrap().join().unwrap();
}
