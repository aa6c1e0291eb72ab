//! PEFT's files from parts: for adapters that no file holds as they are.

use std::env;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use burn_boft::{Adapter, LayerKind, SavedTensor};
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::header;
use crate::interrupt;
use crate::names::join;
use crate::numbers::{encode, file_dtype};
use crate::output::OutputFile;
use crate::settings;

const PREFIX: &str = "base_model.model.";
const TENSORS: &str = "adapter_model.safetensors";

/// The tensors of an adapter by their keys in PEFT's file.
#[derive(Default)]
pub struct Tensors(Vec<(String, TensorData)>);

impl Tensors {
    /// Adds a tensor of a module.
    pub fn push(&mut self, module: &str, name: &str, data: TensorData) {
        let key = format!("{PREFIX}{}", join(module, name));
        self.0.push((key, data));
    }

    /// Adds a trained bias, or a part of a saved module.
    pub fn push_saved(&mut self, tensor: &SavedTensor, is_adapted: bool) {
        let name = match is_adapted {
            true => format!("base_layer.{}", tensor.name()),
            false => tensor.name().to_string(),
        };
        self.push(tensor.module(), &name, tensor.data().clone());
    }

    /// Adds packed numbers as OFT's.
    pub fn push_oft(&mut self, path: &str, skew: &TensorData) {
        let [_, rows, packed] = skew.shape().dims::<3>();
        self.push(path, "oft_R.weight", reshaped(skew, vec![rows, packed]));
    }

    /// Adds packed numbers as BOFT's squares, with a scale.
    pub fn push_boft(&mut self, path: &str, skew: &TensorData, scale: TensorData, kind: LayerKind) {
        let [m, n, packed] = skew.shape().dims::<3>();
        let b = (8 * packed + 1).isqrt().div_ceil(2);
        let mut squares = Vec::with_capacity(m * n * b * b);
        let numbers: Vec<f64> = skew.iter::<f64>().collect();
        // Blocks of one channel have no numbers, and are there all the same.
        for block in (0..m * n).map(|block| &numbers[block * packed..][..packed]) {
            let start = squares.len();
            squares.resize(start + b * b, 0.0);
            let pairs = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
            for (value, (i, j)) in block.iter().zip(pairs) {
                squares[start + i * b + j] = *value;
                squares[start + j * b + i] = -value;
            }
        }
        let squares = TensorData::new(squares, [m, n, b, b]).convert_dtype(skew.dtype());
        let o = scale.num_elements();
        let scale = reshaped(
            &scale,
            match kind {
                LayerKind::Linear => vec![o, 1],
                LayerKind::Conv2d => vec![1, o],
            },
        );
        self.push(path, "boft_R", squares);
        self.push(path, "boft_s", scale);
    }

    /// Writes the two files.
    pub fn write(&self, folder: &Path, config: &Map<String, Value>) -> Result<(), Error> {
        let path = folder.join(TENSORS);
        let too_large = || Error::malformed(&path, "no size that a file can have");
        let layout = self.0.iter().map(|(key, data)| {
            let dtype = file_dtype(data.dtype());
            dtype.map(|dtype| (key.as_str(), dtype, &**data.shape()))
        });
        let layout: Vec<_> = layout.collect::<Option<_>>().ok_or_else(too_large)?;
        let metadata = json!({"format": "pt"});
        let header = header::to_bytes(Some(&metadata), layout.into_iter()).ok_or_else(too_large)?;
        let mut file = OutputFile::create(&path)?;
        file.write(&header)?;
        for (_, data) in &self.0 {
            file.write(&encode(data).ok_or_else(too_large)?)?;
        }
        file.finish()?;
        let mut file = OutputFile::create(&folder.join(settings::FILE))?;
        file.write(format!("{:#}\n", Value::Object(config.clone())).as_bytes())?;
        file.finish()
    }

    /// The adapter that these files are.
    pub fn into_adapter(self, config: &Map<String, Value>) -> Result<Adapter, Error> {
        let place = env::temp_dir();
        let folder = tempfile::tempdir_in(&place).map_err(Error::write(&place))?;
        interrupt::register(folder.path());
        self.write(folder.path(), config)
            .map_err(|error| match error {
                Error::Write { source, .. } => Error::write(&place)(source),
                error => error,
            })?;
        match Adapter::load(folder.path()) {
            Ok((adapter, _)) => Ok(adapter),
            Err(error) => Err(Error::Settings(format!(
                "the converted adapter is none: {error}"
            ))),
        }
    }
}

fn reshaped(data: &TensorData, shape: Vec<usize>) -> TensorData {
    TensorData::from_bytes(data.bytes().clone(), shape, data.dtype())
}

/// Data of ones.
pub fn ones(count: usize, dtype: DType) -> TensorData {
    TensorData::new(vec![1.0f32; count], [count]).convert_dtype(dtype)
}
