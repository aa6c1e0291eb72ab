//! Taking an adapter out of a model.

use std::fs;

use burn::module::Module;
use burn_boft::{Adapter, AdapterConfig, Bias, BoftLinear, Cayley, OftConfig, inject};

use super::support::*;

#[test]
fn extraction_wants_the_settings_of_the_injection() {
    let error = Adapter::extract(&base::<BoftLinear>(), boft()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model carries no adapter; inject one first"
    );

    let oft = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["hidden"]);
    let model = inject(base::<BoftLinear>(), oft.clone().with_coft_radius(0.5)).unwrap();
    let refused = |config: AdapterConfig| Adapter::extract(&model, config).unwrap_err().to_string();
    assert_eq!(
        refused(oft.clone().into()),
        "`hidden` was adapted with COFT radius 0.5, but the configuration says no COFT radius"
    );
    assert_eq!(
        refused(oft.clone().with_cayley(Cayley::Neumann { terms: 5 }).into()),
        "`hidden` was adapted with Exact, but the configuration says Neumann { terms: 5 }"
    );
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract(&model, &oft).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`hidden` was adapted with BOFT, but the configuration says OFT"
    );
    let wrong_size = boft().with_block_size(2);
    let adapter = Adapter::extract(&model, wrong_size).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = adapter.save(folder.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `hidden`: it has blocks of 4, and PEFT makes blocks of 2 of the configuration"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn nothing_that_was_trained_is_left_behind() {
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract(&model, boft().with_bias(Bias::None)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`hidden.bias`, `output.bias` would be left behind, being trained while the configuration keeps neither their \
         biases nor their modules; name those in modules_to_save, or freeze them"
    );
    // A model in validation is the same model.
    let adapter = Adapter::extract(&model.valid(), boft()).unwrap();
    assert_eq!(adapter.tensors().len(), 4);
    assert!(Adapter::extract(&model.valid(), boft().with_bias(Bias::None)).is_err());
}
