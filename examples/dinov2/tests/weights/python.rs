//! Exchange with Python by hand.

use std::fs;
use std::path::PathBuf;

use burn::tensor::Tensor;
use burn_boft::Transformers;
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::{AdapterFolder, Checkpoint, Saved, export_merged, save};
use serde_json::json;

use crate::common::*;

/// Writes adapters and merged models for `fixtures/weights/check.py`, which says how to call this.
#[test]
#[ignore = "writes for a script of Python; see fixtures/weights/check.py"]
fn writes_for_python() {
    let (place, checkpoint) = exchange();
    let labels = strings(&["cat", "ant", "bee"]);
    let preprocessor = match checkpoint.preprocessor() {
        Some(preprocessor) => preprocessor.clone(),
        None => json!({"image_processor_type": "BitImageProcessor"}),
    };
    for method in methods() {
        let name = method.to_string().replace([' ', '='], "-");
        let model = trained(&method, &checkpoint, &["cat", "ant", "bee"], &device());
        let pixels = pixels(&checkpoint, &device());
        let merged = match method.merged(model.clone()).unwrap() {
            Some(merged) => merged,
            None => model.clone(),
        };
        let written = |folder: PathBuf, model: &Dinov2ForImageClassification| {
            let logits = model.forward(pixels.clone()).into_data();
            let tensors = [("pixels", pixels.clone().into_data()), ("logits", logits)];
            write_answer(&folder.join("io.safetensors"), &tensors);
        };
        let folder = place.join(format!("merged-{name}"));
        export_merged(&merged, &checkpoint, &labels, &preprocessor, &folder).unwrap();
        written(folder, &model);
        for (version, generation) in [(Transformers::V4, 4), (Transformers::V5, 5)] {
            let folder = place.join(format!("adapter-{generation}-{name}"));
            let saved = Saved {
                model: &model,
                method: &method,
                checkpoint: &checkpoint,
                labels: &labels,
                preprocessor: &preprocessor,
                names: version,
            };
            save(&saved, &folder).unwrap();
            written(folder, &model);
        }
    }
}

/// Compares the logits of adapters that `fixtures/weights/check.py` made.
#[test]
#[ignore = "reads what a script of Python wrote; see fixtures/weights/check.py"]
fn reads_from_python() {
    let (place, checkpoint) = exchange();
    let mut read = 0;
    for entry in fs::read_dir(&place).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("python-") {
            continue;
        }
        let adapter = AdapterFolder::open(&folder).unwrap();
        let (labels, _) = adapter.labels_for(&checkpoint).unwrap();
        let model = adapter
            .attach(checkpoint.load(&labels, &device()).unwrap().0)
            .unwrap();
        let tensor = |key: &str| tensor_of(&folder.join("io.safetensors"), key, &device());
        let pixels: Tensor<4> = tensor_of(&folder.join("io.safetensors"), "pixels", &device());
        close(model.forward(pixels), tensor("logits"), &name);
        read += 1;
    }
    assert!(read > 0, "{} has no folder python-*", place.display());
}

/// The folder to exchange with Python, and the model.
fn exchange() -> (PathBuf, Checkpoint) {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("set {name}"));
    let checkpoint = Checkpoint::open(&variable("DINOV2_MODEL")).unwrap();
    (PathBuf::from(variable("DINOV2_EXCHANGE")), checkpoint)
}
