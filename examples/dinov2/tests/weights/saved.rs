//! What is saved here.

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn_boft::Transformers;
use dinov2::method::Method;
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::{
    AdapterFolder, Checkpoint, HeadOrigin, LabelOrigin, Saved, export_adapter, export_merged, save,
};
use serde_json::json;

use crate::common::*;

#[test]
fn every_method_is_read_back_to_the_same_logits() {
    let base = [
        open("mlp"),
        open("swiglu"),
        open("registers"),
        Checkpoint::embedded(),
    ];
    let preprocessor = json!({"crop_size": {"height": 16, "width": 16}});
    let butterfly = Method::Boft {
        block_size: 4,
        factors: 2,
        dropout: 0.1,
    };
    let methods = [methods().as_slice(), &[butterfly]].concat();
    for (checkpoint, method) in base
        .iter()
        .flat_map(|base| methods.iter().map(move |method| (base, method)))
    {
        let name = format!("{} with {method}", checkpoint.name());
        let device = device().autodiff();
        let model = trained(method, checkpoint, &["b", "a", "c"], &device);
        let expected = model.valid().forward(pixels(checkpoint, &self::device()));
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("run");
        let labels = strings(&["b", "a", "c"]);
        let saved = Saved {
            model: &model.valid(),
            method,
            checkpoint,
            labels: &labels,
            preprocessor: &preprocessor,
            names: Transformers::V5,
        };
        let bytes = save(&saved, &folder).unwrap();

        assert!(
            bytes > 0 && fs::read_dir(&folder).unwrap().count() >= 3,
            "{name}"
        );
        let adapter = AdapterFolder::open(&folder).unwrap();
        assert_eq!(adapter.method(), *method, "{name}");
        let (labels, origin) = adapter.labels_for(checkpoint).unwrap();
        assert_eq!(
            (labels.concat().as_str(), origin),
            ("bac", LabelOrigin::Adapter)
        );
        assert_eq!(adapter.preprocessor(), Some(&preprocessor));
        let base = (*method != Method::Full).then(|| checkpoint.name());
        assert_eq!(adapter.base(), base, "{name}");
        let plain = checkpoint.load(&labels, &device).unwrap().0;
        let model = adapter.attach(plain).unwrap();
        let logits = model.valid().forward(pixels(checkpoint, &self::device()));
        assert_eq!(logits.into_data(), expected.into_data(), "{name}");
    }
}

#[test]
fn a_fully_trained_model_is_a_model() {
    let checkpoint = open("registers");
    let device = device().autodiff();
    let model = trained(&Method::Full, &checkpoint, &["b", "a"], &device);
    let folder = tempfile::tempdir().unwrap();
    let labels = strings(&["b", "a"]);
    write(&model, &Method::Full, &checkpoint, &labels, folder.path());

    let checkpoint = open_path(folder.path()).unwrap();
    assert_eq!(checkpoint.labels().unwrap(), ["b", "a"]);
    let (read, head) = checkpoint.load(&labels, &device).unwrap();
    assert_eq!(head, HeadOrigin::Checkpoint);
    let pixels = pixels(&checkpoint, &device);
    assert_eq!(
        read.forward(pixels.clone()).into_data(),
        model.forward(pixels).into_data()
    );
}

#[test]
fn a_merged_model_has_the_settings_that_transformers_needs() {
    let checkpoint = open("registers");
    let method = Method::Lora { rank: 2 };
    let model = trained(&method, &checkpoint, &["b", "a"], &device());
    let (labels, folder) = (strings(&["b", "a"]), tempfile::tempdir().unwrap());
    let export = |model| {
        export_merged(
            model,
            &checkpoint,
            &labels,
            &json!({"size": 1}),
            folder.path(),
        )
    };
    complains(export(&model), &["merge them first"]);

    let merged = model.clone().materialize();
    export(&merged).unwrap();
    let config = read_json(&folder.path().join("config.json"));
    assert_eq!(
        config["architectures"],
        json!(["Dinov2WithRegistersForImageClassification"])
    );
    assert_eq!(config["id2label"], json!({"0": "b", "1": "a"}));
    assert_eq!(config["label2id"], json!({"a": 1, "b": 0}));
    assert_eq!(
        (&config["num_labels"], &config["torch_dtype"]),
        (&json!(2), &json!("float32"))
    );
    assert_eq!(config["num_register_tokens"], 3);
    let size = read_json(&folder.path().join("preprocessor_config.json"));
    assert_eq!(size, json!({"size": 1}));
    let names = tensor_names(&folder.path().join("model.safetensors"));
    assert_eq!(
        names,
        tensor_names(&fixture("registers").join("model.safetensors"))
    );
    let read = open_path(folder.path())
        .unwrap()
        .load(&labels, &device())
        .unwrap()
        .0;
    close(
        read.forward(pixels(&checkpoint, &device())),
        model.forward(pixels(&checkpoint, &device())),
        "merged",
    );
}

#[test]
fn a_model_without_a_mask_token_is_written_without_one() {
    let checkpoint = open("weights/unmasked");
    let labels = strings(&["a", "b"]);
    let model = checkpoint.load(&labels, &device()).unwrap().0;
    let folder = tempfile::tempdir().unwrap();
    export_merged(&model, &checkpoint, &labels, &json!({}), folder.path()).unwrap();

    let names = tensor_names(&folder.path().join("model.safetensors"));
    assert!(
        !names.iter().any(|name| name.contains("mask_token")),
        "{names:?}"
    );
    open_path(folder.path())
        .unwrap()
        .load(&labels, &device())
        .unwrap();
}

#[test]
fn an_adapter_is_exported_with_the_names_of_either_generation() {
    for (name, base, query) in [
        ("lora_5", "mlp", "dinov2."),
        ("lora_swiglu_5", "swiglu", "dinov2."),
        ("boft_5", "mlp", "dinov2."),
        ("boft_registers_4", "registers", "dinov2_with_registers."),
        ("lora_backbone_5", "backbone", ""),
    ] {
        let adapter = AdapterFolder::open(&fixture(&format!("weights/{name}"))).unwrap();
        let labels = strings(&["a", "b", "c"]);
        let expected = attached(&adapter, base, &labels, &device())
            .features(answer(&format!("weights/{name}"), "pixels"));
        for (version, ending) in [
            (Transformers::V4, "attention.attention.query"),
            (Transformers::V5, "attention.q_proj"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            export_adapter(&adapter, version, folder.path()).unwrap();
            let names = tensor_names(&folder.path().join("adapter_model.safetensors"));
            let start = format!("base_model.model.{query}encoder.layer.0.{ending}.");
            assert!(
                names.iter().any(|name| name.starts_with(&start)),
                "{start}: {names:?}"
            );

            let again = AdapterFolder::open(folder.path()).unwrap();
            let features = attached(&again, base, &labels, &device())
                .features(answer(&format!("weights/{name}"), "pixels"));
            close(features, expected.clone(), name);
        }
    }
}

#[test]
fn a_probe_has_no_layout_of_peft() {
    let checkpoint = open("mlp");
    let model = trained(&Method::Linear, &checkpoint, &["b", "a"], &device());
    let (labels, place) = (strings(&["b", "a"]), tempfile::tempdir().unwrap());
    let folder = place.path().join("probe");
    write(&model, &Method::Linear, &checkpoint, &labels, &folder);
    let adapter = AdapterFolder::open(&folder).unwrap();
    let target = place.path().join("peft");
    complains(
        export_adapter(&adapter, Transformers::V5, &target),
        &["holds a linear probe", "export the merged model"],
    );
    assert!(!target.exists());
    complains(open_path(&folder), &["holds an adapter"]);
}

#[test]
fn names_of_classes_must_fit_the_head() {
    let checkpoint = open("mlp");
    let model = trained(&Method::Linear, &checkpoint, &["b", "a"], &device());
    let (labels, folder) = (strings(&["b", "a", "c"]), tempfile::tempdir().unwrap());
    let saved = Saved {
        model: &model,
        method: &Method::Linear,
        checkpoint: &checkpoint,
        labels: &labels,
        preprocessor: &json!({}),
        names: Transformers::V5,
    };
    complains(
        save(&saved, folder.path()),
        &["3 class names do not fit a head with 2 classes"],
    );

    let saved = Saved {
        labels: &labels[..2],
        method: &Method::Lora { rank: 2 },
        ..saved
    };
    complains(save(&saved, folder.path()), &["carries no LoRA"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    save(
        &Saved {
            method: &Method::Linear,
            ..saved
        },
        folder.path(),
    )
    .unwrap();
    for (text, why) in [
        ("{}", "not a list of class names"),
        ("[\"a\"]", "1 names for a head with 2"),
    ] {
        fs::write(folder.path().join("classes.json"), text).unwrap();
        complains(AdapterFolder::open(folder.path()), &["classes.json", why]);
    }
}

/// Saves what was trained, with the names of the classes and nothing else beside it.
fn write(
    model: &Dinov2ForImageClassification,
    method: &Method,
    checkpoint: &Checkpoint,
    labels: &[String],
    folder: &Path,
) {
    let saved = Saved {
        model,
        method,
        checkpoint,
        labels,
        preprocessor: &json!({}),
        names: Transformers::V5,
    };
    save(&saved, folder).unwrap();
}
