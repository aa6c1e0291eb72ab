//! Adapters of Python.

use std::fs;

use dinov2::weights::{AdapterFolder, LabelOrigin};
use serde_json::json;

use crate::common::*;

#[test]
fn adapters_of_both_generations_answer_as_peft_does() {
    for (name, base) in [
        ("lora_5", "mlp"),
        ("lora_swiglu_5", "swiglu"),
        ("lora_registers_5", "registers"),
        ("boft_5", "mlp"),
        ("boft_registers_4", "registers"),
        ("oft_swiglu_4", "swiglu"),
    ] {
        let name = &format!("weights/{name}");
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let (labels, origin) = adapter.labels_for(&open(base)).unwrap();

        assert_eq!(origin, LabelOrigin::Numbered, "{name}");
        assert_eq!(labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert_eq!(
            (adapter.num_labels(), adapter.base()),
            (Some(3), Some(base))
        );
        assert!(adapter.labels().is_none() && adapter.preprocessor().is_none());
        let model = attached(&adapter, base, &labels, &device());
        check(name, "logits", model.forward(answer(name, "pixels")));
    }
}

#[test]
fn an_adapter_without_a_head_uses_the_head_of_the_base() {
    let name = "weights/lora_4";
    let adapter = AdapterFolder::open(&fixture(name)).unwrap();
    let (labels, origin) = adapter.labels_for(&open("mlp")).unwrap();

    assert_eq!(origin, LabelOrigin::Checkpoint);
    assert_eq!((adapter.num_labels(), labels), (None, strings(&LABELS)));
    let model = attached(&adapter, "mlp", &strings(&LABELS), &device());
    check(name, "logits", model.forward(answer(name, "pixels")));
}

#[test]
fn an_adapter_of_a_bare_model_fits_the_model_under_a_head() {
    let name = "weights/lora_backbone_5";
    let adapter = AdapterFolder::open(&fixture(name)).unwrap();
    complains(adapter.labels_for(&open("backbone")), &["saves no head"]);

    let model = attached(&adapter, "backbone", &strings(&["a", "b"]), &device());
    check(name, "features", model.features(answer(name, "pixels")));
}

#[test]
fn an_adapter_trains_what_its_method_trains() {
    let device = device().autodiff();
    let trained = |name: &str| {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let labels = strings(&["a", "b", "c"]);
        let model = attached(&adapter, "mlp", &labels, &device);
        let gradients = model
            .forward(answer_on(name, "pixels", &device))
            .sum()
            .backward();
        let layer = &model.dinov2.encoder.layer[0];
        let query = &layer.attention.attention.query;
        let lora = query
            .weight
            .adapter()
            .map(|adapter| adapter.b.val().grad(&gradients).is_some());
        (
            lora,
            query.weight.base().grad(&gradients).is_some(),
            query
                .bias
                .as_ref()
                .unwrap()
                .val()
                .grad(&gradients)
                .is_some(),
            layer.norm1.gamma.val().grad(&gradients).is_some(),
            model.classifier.weight.val().grad(&gradients).is_some(),
        )
    };
    assert_eq!(
        trained("weights/lora_5"),
        (Some(true), false, true, false, true)
    );
    assert_eq!(trained("weights/boft_5"), (None, false, true, false, true));
}

#[test]
fn an_adapter_for_a_model_of_another_size_is_one_sentence() {
    for name in ["weights/lora_5", "weights/boft_5"] {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let model = open("backbone")
            .load(&strings(&["a", "b", "c"]), &device())
            .unwrap()
            .0;
        complains(
            adapter.attach(model),
            &[
                "this adapter is for a model 32 wide with 2 layers, but the model is 24 wide with 1 layer",
            ],
        );
    }
}

#[test]
fn a_head_with_another_number_of_classes_is_refused() {
    for name in ["weights/lora_5", "weights/boft_5"] {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let model = open("mlp")
            .load(&strings(&["a", "b"]), &device())
            .unwrap()
            .0;
        complains(
            adapter.attach(model),
            &["the adapter's head has 3 classes, and the model's 2"],
        );
    }
}

#[test]
fn an_adapter_is_not_put_on_another() {
    let adapter = AdapterFolder::open(&fixture("weights/lora_5")).unwrap();
    let labels = strings(&["a", "b", "c"]);
    let model = attached(&adapter, "mlp", &labels, &device());
    complains(adapter.attach(model), &["still carries adapters"]);
}

#[test]
fn variants_of_lora_that_are_not_computed_are_refused_by_name() {
    for (setting, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("layer_replication", json!([[0, 1]])),
        ("alpha_pattern", json!({"layer\\.[01].*": 4})),
        ("lora_alpha", json!("four")),
        ("peft_type", json!("LOKR")),
    ] {
        let folder = copy("weights/lora_5");
        edit_json(folder.path(), "adapter_config.json", |config| {
            config[setting] = value.clone()
        });
        let opened = AdapterFolder::open(folder.path());
        complains(
            opened,
            &["adapter_config.json", &format!("{setting} is {value}")],
        );
    }
}

#[test]
fn tensors_that_do_not_belong_to_a_lora_are_named() {
    let prefix = "base_model.model.dinov2.encoder.layer.0.attention.q_proj";
    for (edit, complaint) in [
        (
            ".lora_C.weight",
            format!("unexpected: {prefix}.lora_C.weight"),
        ),
        (
            ".lora_magnitude_vector",
            format!("unexpected: {prefix}.lora_magnitude_vector"),
        ),
        ("", format!("missing: {prefix}.lora_A.weight")),
    ] {
        let folder = copy("weights/lora_5");
        edit_file(
            &folder.path().join("adapter_model.safetensors"),
            |tensors| {
                let name = format!("{prefix}.lora_A.weight");
                let index = tensors.iter().position(|tensor| tensor.0 == name).unwrap();
                match edit {
                    "" => drop(tensors.remove(index)),
                    edit => {
                        let (_, shape, bytes) = tensors[index].clone();
                        tensors.push((format!("{prefix}{edit}"), shape, bytes));
                    }
                }
            },
        );
        complains(AdapterFolder::open(folder.path()), &[&complaint]);
    }
    let folder = copy("weights/lora_5");
    edit_file(
        &folder.path().join("adapter_model.safetensors"),
        |tensors| {
            for tensor in tensors.iter_mut() {
                tensor.0 = tensor.0.replace("layer.1", "layer.one");
            }
        },
    );
    let adapter = AdapterFolder::open(folder.path()).unwrap();
    let model = open("mlp")
        .load(&strings(&["a", "b", "c"]), &device())
        .unwrap()
        .0;
    complains(
        adapter.attach(model),
        &["unexpected: dinov2.encoder.layer.one."],
    );
}

#[test]
fn a_folder_without_an_adapter_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    complains(
        AdapterFolder::open(folder.path()),
        &["holds no adapter", "adapter_config.json"],
    );
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    complains(AdapterFolder::open(&file), &["is a file"]);
    let adapter = copy("weights/boft_5");
    fs::remove_file(adapter.path().join("adapter_model.safetensors")).unwrap();
    complains(
        AdapterFolder::open(adapter.path()),
        &["adapter_model.safetensors cannot be read: no such file or directory"],
    );
    let absent = folder.path().join("absent");
    complains(
        AdapterFolder::open(&absent),
        &["cannot be read: no such file or directory"],
    );
}
