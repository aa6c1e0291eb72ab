//! Settings go through JSON, and through a model, without a change of their last digit.

use crate::common::models::Net;
use burn::tensor::Device;
use burn_boft::{Adapter, AdapterConfig, BoftConfig, BoftLinear, OftConfig, inject};
use proptest::prelude::*;

/// A double that a parser without exact rounding reads as its neighbour.
const AWKWARD: f64 = 0.38188967174211724;

fn boft(dropout: f64) -> BoftConfig {
    BoftConfig::new()
        .with_target_modules(["hidden"])
        .with_dropout(dropout)
}

fn oft(radius: f64) -> OftConfig {
    OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["hidden"])
        .with_coft_radius(radius)
}

fn extracted(config: &AdapterConfig) -> Adapter {
    let device = Device::flex().autodiff();
    let model = inject(Net::<BoftLinear>::new(3, &device), config).unwrap();
    Adapter::extract_as(&model, config).unwrap()
}

#[test]
fn an_awkward_double_survives_saving_and_loading_an_adapter() {
    for config in [
        AdapterConfig::from(boft(AWKWARD)),
        AdapterConfig::from(oft(AWKWARD)),
    ] {
        let folder = tempfile::tempdir().unwrap();
        extracted(&config).save(folder.path()).unwrap();
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        assert_eq!(loaded.config(), &config);
    }
}

#[test]
fn an_adapter_with_an_awkward_radius_is_extracted_again() {
    let adapter = extracted(&oft(AWKWARD).into());
    assert_eq!(adapter.config(), &oft(AWKWARD).into());
}

/// Positive finite doubles of every magnitude, the subnormal ones included.
fn positive() -> impl Strategy<Value = f64> {
    (1..f64::INFINITY.to_bits()).prop_map(f64::from_bits)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_double_survives_the_json_of_the_settings(radius in positive(), dropout in 0.0..1.0) {
        let oft = oft(radius);
        let json = serde_json::to_string(&oft).unwrap();
        prop_assert_eq!(serde_json::from_str::<OftConfig>(&json).unwrap(), oft);
        let boft = boft(dropout);
        let json = serde_json::to_string_pretty(&boft).unwrap();
        prop_assert_eq!(serde_json::from_str::<BoftConfig>(&json).unwrap(), boft);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_radius_is_extracted_as_it_was_injected(radius in 1e-6..1e3) {
        let adapter = extracted(&oft(radius).into());
        prop_assert_eq!(adapter.config(), &oft(radius).into());
    }
}
