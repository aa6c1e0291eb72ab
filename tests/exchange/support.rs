//! Adapters and folders that several modules use.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_boft::{Adapter, AdapterConfig, Bias, BoftConfig, Init, OftConfig, inject};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::common::models::{INPUT, Layer, Net, rows, set, trainable};
use crate::common::noise;

pub const INIT: Init = Init::Random { seed: 11 };
pub const CONFIG: &str = "adapter_config.json";
pub const TENSORS: &str = "adapter_model.safetensors";

pub fn device() -> Device {
    Device::flex().autodiff()
}

pub fn boft() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_target_modules(["hidden", "output"])
        .with_bias(Bias::AdapterOnly)
        .with_modules_to_save(["head"])
}

pub fn oft() -> OftConfig {
    OftConfig::new()
        .with_block_size(4)
        .with_init(INIT)
        .with_target_modules(["hidden", "output"])
        .with_bias(Bias::AdapterOnly)
        .with_modules_to_save(["head"])
}

/// A model in which everything that an adapter keeps differs from the base.
pub fn adapted<L: Layer>(config: impl Into<AdapterConfig>) -> Net<L> {
    let model = inject(Net::<L>::new(3, &device()), config).unwrap();
    trainable(&model)
        .into_iter()
        .filter(|path| !path.contains(".boft."))
        .fold(model, |model, path| {
            set(model, &path, |values| {
                let noise = noise(values.len(), 77, 0.25);
                values.iter().zip(noise).map(|(v, n)| v + n).collect()
            })
        })
}

pub fn base<L: Layer>() -> Net<L> {
    Net::new(3, &device())
}

pub fn outputs<L: Layer>(model: &Net<L>) -> Tensor<2> {
    let input = rows([6, INPUT], 5, &Device::flex());
    model.valid().forward(input)
}

pub fn saved(adapter: &Adapter) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    folder
}

/// A tensor of a file: its precision, shape and numbers.
pub type Stored = (Dtype, Vec<usize>, Vec<u8>);

pub fn stored(folder: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(folder.join(TENSORS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| {
        let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (key.to_string(), stored)
    });
    tensors.collect()
}

pub fn shapes(folder: &Path) -> Vec<(String, Vec<usize>)> {
    stored(folder)
        .into_iter()
        .map(|(key, (dtype, shape, _))| {
            assert!(matches!(dtype, Dtype::F32 | Dtype::I64), "{key}");
            (key.replace("base_model.model.", ""), shape)
        })
        .collect()
}

pub fn settings(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap()
}

pub fn single(stored: &Stored) -> Vec<f32> {
    assert_eq!(stored.0, Dtype::F32);
    let chunks = stored.2.as_chunks::<4>().0.iter();
    chunks.map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Writes an adapter folder with these settings, and with noise of these shapes.
pub fn write(json: &Value, tensors: &[(&str, Vec<usize>)]) -> tempfile::TempDir {
    let tensors: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(index, (key, shape))| {
            let count = shape.iter().product();
            let numbers = noise(count, index as u64 + 1, 0.4);
            let bytes = numbers.iter().flat_map(|x| (*x as f32).to_le_bytes());
            (*key, shape.clone(), bytes.collect::<Vec<u8>>())
        })
        .collect();
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let key = format!("base_model.model.{key}");
        (
            key,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(CONFIG), json.to_string()).unwrap();
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join(TENSORS), bytes).unwrap();
    folder
}

pub fn boft_json(fields: Value) -> Value {
    let mut json =
        json!({"peft_type": "BOFT", "peft_version": "0.21.2", "target_modules": ["hidden"]});
    let object = json.as_object_mut().unwrap();
    object.extend(fields.as_object().unwrap().clone());
    json
}

/// The tensors of an adapter for `hidden` only.
pub fn hidden() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("hidden.boft_R", vec![1, 6, 4, 4]),
        ("hidden.boft_s", vec![16, 1]),
    ]
}

pub fn refusal(folder: &Path) -> String {
    let error = Adapter::load(folder).unwrap_err().to_string();
    error.replace(&folder.display().to_string(), "…")
}

/// The error that loading gives about the tensors, without the file's name.
pub fn amiss(folder: &Path) -> String {
    let refusal = refusal(folder);
    let amiss = refusal.strip_prefix(&format!("…/{TENSORS}: "));
    amiss.unwrap_or_else(|| panic!("{refusal}")).to_string()
}
