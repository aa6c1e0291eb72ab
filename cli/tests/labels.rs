//! Merged models whose head comes from the adapter: what their `config.json` says of it.

use std::path::Path;

use serde_json::{Value, json};

use crate::files::*;

const LAYER: &str = "encoder.layer.0.mlp.fc1";

/// Merges an adapter that saved the head `head` of five classes into a model, and returns the standard error and the
/// configuration of the result.
fn merge(config: &str, head: &str, with_head: Option<usize>) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut model: Tensors = [(format!("{LAYER}.weight"), Tensor::random(&[6, 8], 1))].into();
    if let Some(rows) = with_head {
        model.insert(format!("{head}.weight"), Tensor::random(&[rows, 8], 2));
        model.insert(format!("{head}.bias"), Tensor::random(&[rows], 3));
    }
    std::fs::create_dir(path.join("model")).unwrap();
    write(&path.join("model/model.safetensors"), &model);
    std::fs::write(path.join("model/config.json"), config).unwrap();
    write_head_adapter(&path.join("adapter"), head);
    let run = run(path, &merge_command("model", "adapter", "out"));
    assert_eq!(run.code, 0, "{}", run.stderr);
    let written = std::fs::read_to_string(path.join("out/config.json")).unwrap();
    // A dry run says the same.
    let dry = [
        "merge",
        "--base",
        "model",
        "--adapter",
        "adapter",
        "--dry-run",
    ];
    assert_eq!(crate::files::run(path, &dry).stderr, run.stderr);
    (run.stderr, written)
}

fn write_head_adapter(folder: &Path, head: &str) {
    let key = |name: &str| format!("base_model.model.{name}");
    let tensors = [
        (
            key(&format!("{LAYER}.oft_R.weight")),
            Tensor::random(&[2, 6], 4),
        ),
        (key(&format!("{head}.weight")), Tensor::random(&[5, 8], 5)),
        (key(&format!("{head}.bias")), Tensor::random(&[5], 6)),
    ];
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["fc1"],
        "modules_to_save": [head]
    });
    write_adapter(folder, &config, &tensors.into());
}

fn object(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_bare_dinov2_with_a_saved_head_becomes_a_classifier_with_its_labels() {
    for family in ["Dinov2", "Dinov2WithRegisters"] {
        let config = json!({"architectures": [format!("{family}Model")], "layer_norm_eps": 1e-6, "hidden_size": 8});
        let (stderr, written) = merge(&config.to_string(), "classifier", None);
        let classifier = format!("{family}ForImageClassification");
        assert_eq!(
            stderr,
            format!(
                "note: the adapter brings a head for 5 classes; the config.json of the merged model has 5 labels, LABEL_0 \
                 to LABEL_4 and names {classifier} as its architecture\n"
            )
        );
        let labels = ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"];
        let numbered = labels.iter().enumerate();
        let names: Value = numbered
            .clone()
            .map(|(i, name)| (i.to_string(), json!(name)))
            .collect();
        let numbers: Value = numbered
            .map(|(i, name)| (name.to_string(), json!(i)))
            .collect();
        assert_eq!(
            object(&written),
            json!({
                "architectures": [classifier], "layer_norm_eps": 1e-6, "hidden_size": 8,
                "id2label": names, "label2id": numbers
            })
        );
    }
}

#[test]
fn a_head_for_other_classes_gets_their_number_and_one_for_as_many_keeps_its_names() {
    let config = |labels: usize| {
        let names: Value = (0..labels)
            .map(|i| (i.to_string(), json!(format!("class {i}"))))
            .collect();
        json!({"architectures": ["BertForSequenceClassification"], "id2label": names, "num_labels": labels}).to_string()
    };
    let (stderr, written) = merge(&config(3), "classifier", Some(3));
    assert!(
        stderr.ends_with("has 5 labels, LABEL_0 to LABEL_4\n"),
        "{stderr}"
    );
    let written = object(&written);
    assert_eq!(written["id2label"]["4"], "LABEL_4");
    assert_eq!(written["num_labels"], 5);
    assert_eq!(
        written["architectures"],
        json!(["BertForSequenceClassification"])
    );

    let same = config(5);
    assert_eq!(
        merge(&same, "classifier", Some(5)),
        (String::new(), same.clone())
    );
}

#[test]
fn a_configuration_of_which_it_is_not_certain_what_it_should_say_stays_as_it_is() {
    for (config, head) in [
        // Whose rows are not labels, or who knows what.
        (
            r#"{"architectures": ["BertForMultipleChoice"]}"#,
            "classifier",
        ),
        (
            r#"{"architectures": ["Dinov2Model"], "x": 0.10}"#,
            "decoder_head",
        ),
        (r#"{"architectures": ["A", "B"]}"#, "classifier"),
        (r#"{"hidden_size":8}"#, "classifier"),
    ] {
        assert_eq!(merge(config, head, None), (String::new(), config.into()));
    }
    // Python writes `NaN`, which is no JSON.
    let (stderr, written) = merge(r#"{"beta": NaN}"#, "classifier", None);
    assert_eq!(
        stderr,
        "note: the adapter brings a head for 5 classes; the config.json of the merged model is copied as it is, since it is no \
         JSON: expected value at line 1 column 10\n"
    );
    assert_eq!(written, r#"{"beta": NaN}"#);
    // A bare BERT may become one of several classifiers, all with as many labels.
    let (_, written) = merge(r#"{"architectures": ["BertModel"]}"#, "classifier", None);
    assert_eq!(object(&written)["architectures"], json!(["BertModel"]));
    assert_eq!(object(&written)["id2label"]["4"], "LABEL_4");
}
