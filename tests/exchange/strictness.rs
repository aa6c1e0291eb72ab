//! Tensors that are missing, unexpected or of another shape are errors unless the caller allows a partial load.

use std::fs;

use burn::module::Module;
use burn::tensor::DType;
use burn_boft::peft::LoadOptions;
use burn_boft::value::Missing;
use burn_boft::{Adapter, Bias, BoftLinear};
use serde_json::json;

use super::support::*;
use crate::common::models::{Layer, linear, numbers};

#[test]
fn loading_lists_every_missing_and_unexpected_tensor() {
    let folder = write(
        &boft_json(json!({"target_modules": ["hidden", "output"]})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("output.boft_s", vec![12, 1]),
            ("output.lora_A.weight", vec![2, 16]),
            ("output.base_layer.bias", vec![12]),
            ("emb.oft_embedding_R.weight", vec![4, 6]),
            ("hidden.base_layer.weight", vec![16, 24]),
        ],
    );
    let tensors = fs::read(folder.path().join(TENSORS)).unwrap();
    assert_eq!(
        amiss(folder.path()),
        "missing: `base_model.model.hidden.boft_s`\n\
         missing: `base_model.model.output.boft_R`\n\
         unexpected: `base_model.model.emb.oft_embedding_R.weight`: an OFT tensor in a BOFT adapter\n\
         unexpected: `base_model.model.hidden.base_layer.weight`: a base weight; only adapters and biases are read\n\
         unexpected: `base_model.model.output.base_layer.bias`: the bias of an adapted layer, where the configuration \
         trains none\n\
         unexpected: `base_model.model.output.lora_A.weight`: neither an adapter, nor a trained bias, nor part of a \
         module to save"
    );
    let partial = LoadOptions::new().allow_partial(true);
    let (adapter, report) = Adapter::load_with(folder.path(), &partial).unwrap();
    assert_eq!((report.missing.len(), report.unexpected.len()), (2, 4));
    assert_eq!(adapter.layers().len(), 1);
    assert_eq!(adapter.layers()[0].path(), "hidden");
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: the adapter of `output`, which `target_modules` names"
    );
    let (model, report) = adapter.attach_partial(base::<BoftLinear>()).unwrap();
    assert_eq!(report.applied, ["the adapter of `hidden`"]);
    assert_eq!(report.missing.len(), 1);
    assert!(model.hidden.adapter().is_some() && model.output.adapter().is_none());
    assert_eq!(fs::read(folder.path().join(TENSORS)).unwrap(), tensors);
}

#[test]
fn attaching_lists_everything_that_does_not_fit_the_model() {
    let config = boft().with_bias(Bias::All);
    let adapter = Adapter::extract_as(&adapted::<BoftLinear>(&config), &config).unwrap();

    #[derive(Module, Debug)]
    struct Other {
        hidden: BoftLinear,
        out: BoftLinear,
        head: BoftLinear,
    }
    let layer = |sizes| BoftLinear::from(linear(sizes, 1, DType::F32, &device()));
    let other = Other {
        hidden: layer([32, 16]),
        out: layer([16, 12]),
        head: layer([12, 7]),
    };
    let before = numbers(&other);
    let error = adapter.attach(other.clone()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `out.bias`, a bias that the configuration trains; PEFT 0.20 and older trained some and did not save \
         them\n\
         unexpected: an adapter of `output`, where the model has no layer that can carry it; it has `out`\n\
         unexpected: `norm.bias`, which the model has no parameter for\n\
         unexpected: `output.bias`, which the model has no parameter for\n\
         wrong: `head.bias` is [7] in the model, [5] in the file\n\
         wrong: `head.weight` is [12, 7] in the model, [5, 12] in the file\n\
         wrong: the adapter of `hidden`: it rotates 24 input features, the layer has 32"
    );
    assert!(adapter.attach_partial(other.clone()).is_err());
    assert_eq!(numbers(&other), before);
}

#[test]
fn attaching_reports_trained_biases_that_an_old_file_lacks() {
    let json = boft_json(json!({"bias": "boft_only", "peft_version": "0.20.0"}));
    let folder = write(&json, &hidden());
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `hidden.bias`, a bias that the configuration trains; PEFT 0.20 and older trained some and did not \
         save them"
    );
    assert!(adapter.attach_partial(base::<BoftLinear>()).is_ok());
}

#[test]
fn attaching_reports_a_saved_module_without_tensors_if_the_model_has_it() {
    let json = boft_json(json!({"modules_to_save": ["head", "score"]}));
    let folder = write(&json, &hidden());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["head", "score"].map(|name| format!(
            "`modules_to_save` names `{name}`, and the file has nothing of it"
        ))
    );
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `head.weight`, a part of a module to save\n\
         missing: `head.bias`, a part of a module to save"
    );
    let saved = saved(&adapter);
    assert_eq!(
        settings(saved.path())["modules_to_save"],
        json!(["head", "score"])
    );
}

/// PEFT passes over a pattern beside an empty list.
#[test]
fn a_layers_pattern_beside_an_empty_list_of_layers_restricts_nothing() {
    let json = boft_json(json!({"layers_to_transform": [], "layers_pattern": "layers"}));
    let (adapter, report) = Adapter::load(write(&json, &hidden()).path()).unwrap();
    assert!(report.warnings.is_empty(), "{report}");
    adapter.attach(base::<BoftLinear>()).unwrap();
    let again = saved(&adapter);
    assert_eq!(settings(again.path())["layers_pattern"], json!(null));
}

#[test]
fn loading_warns_once_of_each_name_without_tensors() {
    let json = boft_json(json!({
        "bias": "all", "target_modules": ["hidden", "output", "head", "classifier"],
        "modules_to_save": ["head", "classifier", "score"]
    }));
    let classifier = [
        ("classifier.weight", vec![5, 12]),
        ("classifier.bias", vec![5]),
    ];
    let folder = write(&json, &[hidden(), classifier.to_vec()].concat());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "`target_modules` names `output`, and the file has no adapter of it",
            "`modules_to_save` names `head`, and the file has nothing of it",
            "the configuration trains biases, and the file has none: the layers have none, or PEFT 0.20 or older \
             trained them and did not save them",
        ]
    );
    assert_eq!(
        adapter.config().selection().modules_to_save,
        ["classifier", "head"],
        "PEFT names `score` beside `classifier` by itself"
    );
    let partial = LoadOptions::new().allow_partial(true);
    let nothing = write(&json, &classifier);
    let (_, report) = Adapter::load_with(nothing.path(), &partial).unwrap();
    assert_eq!(
        (report.missing, report.warnings),
        (vec![Missing::AllLayers { tensor: "boft_R" }], Vec::new())
    );
}

#[test]
fn loading_warns_of_settings_that_have_no_effect() {
    let json = json!({
        "peft_type": "OFT", "peft_version": "0.19.0", "oft_block_size": 4, "target_modules": ["hidden"],
        "use_cayley_neumann": false, "module_dropout": 0.1, "unheard_of": true
    });
    let folder = write(&json, &[("hidden.oft_R.weight", vec![6, 6])]);
    let (_, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "settings that are not known are ignored: `unheard_of`",
            "`module_dropout` has no effect in PEFT 0.16 and later, nor here",
        ]
    );
}

#[test]
fn the_adapter_of_a_convolution_does_not_attach_to_a_linear_layer() {
    let folder = write(
        &boft_json(json!({})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", vec![1, 16]),
        ],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden` is for a convolution, the model has a linear layer"
    );
}

#[test]
fn attaching_refuses_a_layer_that_carries_a_lora() {
    use burn::module::Lora;
    let model = base::<BoftLinear>().apply_lora(Lora::new(2, 4.0));
    let adapter = Adapter::extract_as(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let error = adapter.attach(model).unwrap_err().to_string();
    assert!(
        error.contains("`hidden.weight` already carries the reparameterization `lora`"),
        "{error}"
    );
}
