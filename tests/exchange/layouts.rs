//! Where a file's tensors decide and its configuration does not: sizes, and the layouts of older PEFT versions.

use std::path::Path;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn_boft::{Adapter, AdapterConfig, BoftLinear};
use serde_json::json;

use super::support::*;
use crate::common::models::{Layer, distance};

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
