//! Folders for Python.

use std::path::Path;

use burn::tensor::DType;
use burn_boft::Transformers;
use burn_boft::peft::TENSORS_FILE;
use serde_json::{Map, Value, json};

use super::adapter::{
    AdapterFolder, PREPROCESSOR, check_labels, check_plain, size, write_json, write_tensors,
};
use super::checkpoint::{CONFIG, Checkpoint};
use super::error::WeightsError;
use super::files::SAFETENSORS;
use super::fit::MASK_TOKEN;
use super::whole;
use crate::model::Dinov2ForImageClassification;

/// Writes a whole model with plain weights into a folder that `transformers` loads without an argument and without a
/// missing key, and returns the size of the weights in bytes.
///
/// The settings are those of the checkpoint, with the architecture of a classifier and the names of the classes. The
/// folder appears complete or not at all, and replaces one that holds nothing else.
///
/// # Numerics
///
/// The weights keep their precision.
///
/// # Errors
///
/// - [`WeightsError::NotMerged`]: the model carries adapters.
/// - [`WeightsError::Labels`]: the names do not fit the head.
/// - [`WeightsError::Occupied`], [`WeightsError::NoName`], [`WeightsError::IsFile`]: the folder cannot be replaced.
/// - [`WeightsError::Write`]: a file cannot be written.
pub fn export_merged(
    model: &Dinov2ForImageClassification,
    checkpoint: &Checkpoint,
    labels: &[String],
    preprocessor: &Value,
    folder: &Path,
) -> Result<u64, WeightsError> {
    check_labels(model, labels)?;
    check_plain(model)?;
    whole::write(folder, |folder| {
        write_model(model, checkpoint, labels, preprocessor, folder)?;
        size(&folder.join(SAFETENSORS))
    })
}

/// Writes an adapter of BOFT, OFT or LoRA into a folder that PEFT loads, with the names of a generation of transformers,
/// and returns the size of the weights in bytes.
///
/// # Errors
///
/// - [`WeightsError::NoPeftLayout`]: it is a linear probe or a whole model.
/// - [`WeightsError::Occupied`], [`WeightsError::NoName`], [`WeightsError::IsFile`]: the folder cannot be replaced.
/// - [`WeightsError::Save`], [`WeightsError::Write`]: a file cannot be written.
pub fn export_adapter(
    adapter: &AdapterFolder,
    names: Transformers,
    folder: &Path,
) -> Result<u64, WeightsError> {
    whole::write(folder, |folder| {
        adapter.write_peft(names, folder)?;
        size(&folder.join(TENSORS_FILE))
    })
}

/// The files of a whole model, in a folder that is there.
pub(super) fn write_model(
    model: &Dinov2ForImageClassification,
    checkpoint: &Checkpoint,
    labels: &[String],
    preprocessor: &Value,
    folder: &Path,
) -> Result<(), WeightsError> {
    check_plain(model)?;
    let dtype = model.classifier.weight.val().dtype();
    let settings = Value::Object(settings(checkpoint, labels, dtype));
    write_json(&folder.join(CONFIG), &settings)?;
    write_json(&folder.join(PREPROCESSOR), preprocessor)?;
    let has_mask_token = checkpoint.has_mask_token();
    write_tensors(model, &folder.join(SAFETENSORS), |store| {
        let store = match has_mask_token {
            true => store,
            false => store.with_predicate(|path, _| path != MASK_TOKEN),
        };
        store.with_key_remapping(r"^dinov2\.", checkpoint.family().prefix())
    })
}

/// The `config.json` of a classifier.
fn settings(checkpoint: &Checkpoint, labels: &[String], dtype: DType) -> Map<String, Value> {
    let mut json = checkpoint.json().clone();
    let ids = labels.iter().enumerate();
    let id2label = ids
        .clone()
        .map(|(id, label)| (id.to_string(), json!(label)));
    let label2id = ids.map(|(id, label)| (label.clone(), json!(id)));
    json.insert("id2label".into(), Value::Object(id2label.collect()));
    json.insert("label2id".into(), Value::Object(label2id.collect()));
    json.insert("num_labels".into(), json!(labels.len()));
    json.insert(
        "architectures".into(),
        json!([checkpoint.family().classifier()]),
    );
    // Transformers 5 writes `dtype` and reads both; older versions know `torch_dtype` only.
    json.remove("dtype");
    let dtype = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F64 => "float64",
        _ => "float32",
    };
    json.insert("torch_dtype".into(), json!(dtype));
    // Where the base came from is not where this model is.
    json.remove("_name_or_path");
    json
}
