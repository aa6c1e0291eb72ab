//! PEFT's files of tensors that the library has no type for: those of a LoRA.

use std::path::Path;

use burn::tensor::TensorData;
use burn_boft::peft::{key, saved_key};
use burn_boft::value::SavedTensor;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::header;
use crate::numbers::{encode, file_dtype};
use crate::output::OutputFolder;
use crate::settings;

const TENSORS: &str = "adapter_model.safetensors";

/// The tensors of an adapter by their keys in PEFT's file.
#[derive(Default)]
pub struct Tensors(Vec<(String, TensorData)>);

impl Tensors {
    /// Adds a tensor of a module.
    pub fn push(&mut self, module: &str, name: &str, data: TensorData) {
        self.0.push((key(module, name), data));
    }

    /// Adds a trained bias, or a part of a saved module.
    pub fn push_saved(&mut self, tensor: &SavedTensor, is_adapted: bool) {
        let key = saved_key(tensor.module(), tensor.name(), is_adapted);
        self.0.push((key, tensor.data().clone()));
    }

    /// Writes the two files.
    pub fn write(&self, folder: &OutputFolder, config: &Map<String, Value>) -> Result<(), Error> {
        let path = Path::new(TENSORS);
        let too_large = || Error::malformed(path, "no size that a file can have");
        let layout = self.0.iter().map(|(key, data)| {
            let dtype = file_dtype(data.dtype());
            dtype.map(|dtype| (key.as_str(), dtype, &**data.shape()))
        });
        let layout: Vec<_> = layout.collect::<Option<_>>().ok_or_else(too_large)?;
        let metadata = json!({"format": "pt"});
        let header = header::to_bytes(Some(&metadata), layout.into_iter()).ok_or_else(too_large)?;
        let mut file = folder.file(path)?;
        file.write(&header)?;
        for (_, data) in &self.0 {
            file.write(&encode(data).ok_or_else(too_large)?)?;
        }
        file.finish()?;
        let mut file = folder.file(Path::new(settings::FILE))?;
        file.write(format!("{:#}\n", Value::Object(config.clone())).as_bytes())?;
        file.finish()
    }
}
