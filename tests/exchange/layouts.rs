//! Where a file's tensors decide and its configuration does not: sizes, and the layouts of older PEFT versions.

use std::path::Path;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::TensorData;
use burn_boft::value::AdapterLayer;
use burn_boft::{Adapter, AdapterConfig, BoftConfig, BoftLinear, LayerKind};
use serde_json::json;

use super::support::*;
use crate::common::models::{Layer, distance};
use crate::common::noise;

#[test]
fn loading_takes_the_number_of_factors_from_the_tensor() {
    let folder = write(&boft_json(json!({"boft_n_butterfly_factor": 2})), &hidden());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.layers()[0].n_butterfly_factor(), 1);
    assert_eq!(
        report.converted,
        [
            "`hidden` has 1 factor, not the 2 of the configuration: PEFT without its CUDA kernel trains one and does \
             not say so"
        ]
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    let adapter = Adapter::extract_as(&model, adapter.config()).unwrap();
    let folder = saved(&adapter);
    assert_eq!(settings(folder.path())["boft_n_butterfly_factor"], 1);
}

#[test]
fn loading_takes_the_block_size_from_the_tensor() {
    let folder = write(
        &boft_json(json!({"boft_block_size": 8, "target_modules": ["hidden"]})),
        &hidden(),
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.converted,
        ["`hidden` has blocks of 4, not those of 8 that the configuration means"]
    );
    assert_eq!(settings(saved(&adapter).path())["boft_block_size"], 4);
}

#[test]
fn layers_with_different_numbers_of_factors_load_but_cannot_be_saved() {
    let folder = write(
        &boft_json(json!({"boft_n_butterfly_factor": 2, "target_modules": ["hidden", "output"]})),
        &[
            ("hidden.boft_R", vec![2, 6, 4, 4]),
            ("hidden.boft_s", vec![16, 1]),
            ("output.boft_R", vec![1, 4, 4, 4]),
            ("output.boft_s", vec![12, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(report.converted.len(), 1, "{report}");
    adapter.attach(base::<BoftLinear>()).unwrap();
    let error = adapter.save(folder.path().join("new")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `output`: it has 1 factor where the configuration says 2, and PEFT has one \
         number for all layers"
    );
    assert!(!folder.path().join("new").exists());
}

#[test]
fn blocks_of_one_channel_load_but_are_not_attached() {
    let json = json!({"peft_type": "OFT", "oft_block_size": 3, "target_modules": ["hidden", "output"],
        "peft_version": "0.21.2"});
    let folder = write(
        &json,
        &[
            ("hidden.oft_R.weight", vec![24, 0]),
            ("output.oft_R.weight", vec![4, 6]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["`hidden` has blocks of one channel, which do not rotate; nothing is attached there"]
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    assert!(model.hidden.adapter().is_none() && model.output.adapter().is_some());
}

#[test]
fn a_scale_beside_blocks_of_one_channel_is_reported_but_not_attached() {
    let folder = write(
        &boft_json(json!({"boft_block_size": 1})),
        &[
            ("hidden.boft_R", vec![1, 24, 1, 1]),
            ("hidden.boft_s", vec![16, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "`hidden` has blocks of one channel, which do not rotate; its scale can be merged, and not attached"
        ]
    );
    assert!(!adapter.layers()[0].is_identity());
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden`: its blocks of one channel do not rotate, and a scale alone is not attached; \
         merge it with the tool `burn-boft`, or in PEFT"
    );
}

#[test]
fn loading_warns_of_the_old_neumann_series_only_where_it_is_computed() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/old");
    let warnings = |name: &str| Adapter::load(fixtures.join(name)).unwrap().1.warnings;
    assert_eq!(
        warnings("oft-neumann-4"),
        [
            "the Neumann series of PEFT 0.16 and 0.17 is used with 4 terms (peft_version: none); PEFT 0.18 and later \
             would compute another from the same numbers"
        ]
    );
    for name in [
        "oft-square",
        "oft-square-coft",
        "oft-square-mlp",
        "oft-square-share",
    ] {
        assert_eq!(warnings(name), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn an_adapter_of_peft_0_14_can_be_saved_once_it_was_attached_to_its_model() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/old");
    let (adapter, _) = Adapter::load(fixtures.join("oft-square-conv")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = adapter.save(folder.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `conv1`: its file does not tell a linear layer from a convolution, whose scales PEFT \
         stores differently; attach the adapter to its model and extract it there"
    );

    #[derive(Module, Debug)]
    struct Model {
        conv1: Conv2d,
    }
    let model = Model {
        conv1: Conv2dConfig::new([4, 6], [3, 3]).init(&device()),
    };
    let model = adapter.attach(model).unwrap();
    let adapter = Adapter::extract_as(&model, adapter.config()).unwrap();
    let folder = saved(&adapter);
    assert_eq!(
        shapes(folder.path())[1],
        ("conv1.boft_s".to_string(), vec![1, 6])
    );
}

/// PEFT replaces a count of blocks that does not divide the width by its nearest divisor, and its BOFT refuses such a count.
#[test]
fn an_adjusted_count_of_blocks_of_peft_0_14_is_saved_as_their_size() {
    // 24 channels: the divisors next to 5 are 4 and 6, and the smaller one is taken.
    let folder = write(
        &json!({"peft_type": "OFT", "r": 5, "oft_block_size": 0, "target_modules": ["hidden"]}),
        &[
            ("hidden.oft_r", vec![4, 6, 6]),
            ("hidden.oft_s", vec![16, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.converted,
        [
            "`hidden` has the squares of PEFT 0.14 to 0.15.2: it is BOFT with one factor",
            "`hidden` has 4 blocks of 6, not the 5 blocks of the configuration, which do not divide its channels",
        ]
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    let adapter = Adapter::extract_as(&model, adapter.config()).unwrap();
    let settings = settings(saved(&adapter).path());
    assert_eq!(
        (&settings["boft_block_size"], &settings["boft_block_num"]),
        (&json!(6), &json!(0))
    );

    // Of two sizes the settings can say neither.
    let layer = |path: &str, shape: [usize; 3]| {
        let [m, n, packed] = shape;
        let skew = TensorData::new(vec![0.1f32; m * n * packed], shape);
        let scale = TensorData::new(vec![1.0f32; 16], [16]);
        AdapterLayer::new(path, Some(LayerKind::Linear), skew, Some(scale)).unwrap()
    };
    let layers = vec![layer("hidden", [1, 4, 15]), layer("output", [1, 4, 6])];
    let config = BoftConfig::new().with_block_num(5);
    let adapter = Adapter::from_parts(config, layers, Vec::new()).unwrap();
    let error = adapter.save(folder.path().join("new")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `hidden`: it has 4 blocks, and PEFT refuses the 5 blocks of the configuration, which do \
         not divide its channels"
    );
}

/// The radius of COFT at that time depended on the number of blocks, which the tensor of a shared block does not tell. With `r`
/// blocks of a size that `r` does not divide, the same file may be of a layer with fewer blocks.
#[test]
fn the_radius_of_a_shared_block_of_peft_0_14_is_computed_where_the_number_of_blocks_is_certain() {
    let eps = 1e-3;
    let shared = |r: usize, b: usize| {
        write(
            &json!({"peft_type": "OFT", "r": r, "oft_block_size": 0, "block_share": true, "coft": true, "eps": eps,
                "target_modules": ["hidden"]}),
            &[
                ("hidden.oft_r", vec![1, b, b]),
                ("hidden.oft_s", vec![16, 1]),
            ],
        )
    };
    // Every width of blocks of 4 is divided into 2.
    let (adapter, _) = Adapter::load(shared(2, 4).path()).unwrap();
    let square: Vec<_> = noise(16, 1, 0.4)
        .into_iter()
        .map(|x| f64::from(x as f32))
        .collect();
    let norm = square.iter().map(|x| x * x).sum::<f64>().sqrt();
    let radius = eps * (16.0f64 / 2.0).powi(2);
    assert!(norm > 2.0 * radius, "{norm} is bounded");
    let mut stored = adapter.layers()[0].skew().iter::<f64>();
    for (i, j) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] {
        let expected = 0.5 * (square[i * 4 + j] - square[j * 4 + i]) * radius / norm;
        let found = stored.next().unwrap();
        assert!((found - expected).abs() < 1e-7, "{found} for {expected}");
    }
    for (r, b) in [(3, 4), (8, 4), (2, 3)] {
        assert_eq!(
            amiss(shared(r, b).path()),
            format!(
                "wrong: `base_model.model.hidden.oft_r` is [1, {b}, {b}]: the radius of a shared block depends on the number \
                 of blocks, which the file does not hold"
            )
        );
    }
    // One channel does not rotate, whatever the radius is.
    assert!(Adapter::load(shared(16, 1).path()).is_ok());
}

#[test]
fn a_shared_block_of_peft_0_14_is_repeated_when_it_is_attached() {
    let folder = write(
        &json!({"peft_type": "OFT", "r": 0, "oft_block_size": 4, "block_share": true, "module_dropout": 0.1,
            "target_modules": ["hidden"]}),
        &[
            ("hidden.oft_r", vec![1, 4, 4]),
            ("hidden.oft_s", vec![16, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.converted,
        ["`hidden` has the squares of PEFT 0.14 to 0.15.2: it is BOFT with one factor"]
    );
    let AdapterConfig::Boft(config) = adapter.config() else {
        panic!("{:?}", adapter.config());
    };
    assert_eq!((config.dropout, config.n_butterfly_factor), (0.1, 1));
    let error = adapter.save(folder.path().join("new")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `hidden`: its blocks share their numbers, and BOFT's have their own; attach the \
         adapter to its model and extract it there"
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    let whole = Adapter::extract_as(&model, adapter.config()).unwrap();
    let folder = saved(&whole);
    let again = Adapter::load(folder.path()).unwrap().0;
    assert_eq!(again.layers()[0].skew().shape().to_vec(), [1, 6, 6]);
    let again = again.attach(base::<BoftLinear>()).unwrap();
    assert_eq!(distance(outputs(&again), outputs(&model)), 0.0);
}
