//! Models of Python, as files of every kind.

use std::fs;

use burn::tensor::{DType, Tensor};
use dinov2::weights::HeadOrigin;
use serde_json::json;

use crate::common::*;

#[test]
fn every_kind_of_file_answers_as_transformers_does() {
    for name in [
        "weights/sharded",
        "weights/half",
        "weights/bin",
        "weights/sharded_bin",
    ] {
        let checkpoint = open(name);
        let (model, head) = checkpoint.load(&strings(&LABELS), &device()).unwrap();

        assert_eq!(checkpoint.labels().unwrap(), LABELS);
        assert_eq!(head, HeadOrigin::Checkpoint, "{name}");
        check(name, "logits", model.forward(answer(name, "pixels")));
        assert_eq!(model.dinov2.layernorm.gamma.val().dtype(), DType::F32);
    }
}

#[test]
fn what_pytorch_saved_of_transformers_5_in_memory_answers_alike() {
    let name = "weights/state_dict";
    let labels: Vec<String> = (0..5).map(|index| format!("LABEL_{index}")).collect();
    let (model, head) = open(name).load(&labels, &device()).unwrap();

    assert_eq!(head, HeadOrigin::Checkpoint);
    check(name, "logits", model.forward(answer(name, "pixels")));
}

#[test]
fn a_backbone_without_a_mask_token_gets_a_fresh_head() {
    let name = "weights/unmasked";
    let checkpoint = open(name);
    let (model, head) = checkpoint.load(&strings(&["a", "b"]), &device()).unwrap();

    assert_eq!(checkpoint.labels(), None);
    assert!(matches!(head, HeadOrigin::Fresh { reason } if reason.contains("has no head")));
    check(name, "features", model.features(answer(name, "pixels")));
}

#[test]
fn the_head_follows_the_order_of_the_classes() {
    let name = "weights/sharded";
    let mut sorted = strings(&LABELS);
    sorted.sort();
    let (model, head) = open(name).load(&sorted, &device()).unwrap();

    assert_eq!(head, HeadOrigin::Checkpoint);
    let logits = model.forward(answer(name, "pixels"));
    let expected: Tensor<2> = answer(name, "logits");
    let columns = sorted.iter().map(|label| {
        let column = LABELS.iter().position(|other| other == label).unwrap();
        expected.clone().narrow(1, column, 1)
    });
    close(logits, Tensor::cat(columns.collect(), 1), name);
}

#[test]
fn a_head_for_other_classes_starts_afresh_and_says_why() {
    for (labels, why) in [
        (vec!["eel", "ant"], "has 5 classes, and 2 are needed"),
        (
            vec!["eel", "ant", "cat", "dog", "fox"],
            "knows no class `fox`",
        ),
    ] {
        let (model, head) = open("mlp").load(&strings(&labels), &device()).unwrap();
        assert_eq!(model.classifier.weight.dims(), [64, labels.len()]);
        assert!(
            matches!(&head, HeadOrigin::Fresh { reason } if reason.contains(why)),
            "{head:?}"
        );
    }
}

#[test]
fn safetensors_are_preferred_to_pickles() {
    let folder = copy("mlp");
    fs::write(folder.path().join("pytorch_model.bin"), "no pickle").unwrap();
    open_path(folder.path())
        .unwrap()
        .load(&strings(&LABELS), &device())
        .unwrap();
}

#[test]
fn the_preprocessing_of_a_folder_is_read() {
    let folder = copy("mlp");
    assert_eq!(open_path(folder.path()).unwrap().preprocessor(), None);

    let path = folder.path().join("preprocessor_config.json");
    fs::write(&path, r#"{"do_resize": true}"#).unwrap();
    let checkpoint = open_path(folder.path()).unwrap();
    assert_eq!(checkpoint.preprocessor(), Some(&json!({"do_resize": true})));
    fs::write(&path, "{").unwrap();
    complains(
        open_path(folder.path()),
        &["preprocessor_config.json is not a JSON object"],
    );
}
