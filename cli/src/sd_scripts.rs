//! An adapter as sd-scripts stores it.

use std::path::Path;

use burn_boft::Adapter;
use burn_boft::tensors::{encode, to_file};

use crate::error::Error;
use crate::header;

/// The bytes of the file, with names of modules that start so.
pub fn to_bytes(adapter: &Adapter, start: &str, output: &Path) -> Result<Vec<u8>, Error> {
    let tensors = adapter.to_sd_scripts(start)?;
    let mut parts = Vec::new();
    for (key, data) in &tensors {
        let refuse = || Error::tensor(output, key, format!("is {}", data.dtype().name()));
        let tensor = to_file(data.dtype()).zip(encode(data.clone()));
        let (dtype, bytes) = tensor.ok_or_else(refuse)?;
        parts.push((key.as_str(), dtype, data.shape().to_vec(), bytes));
    }
    let entries = parts
        .iter()
        .map(|(key, dtype, shape, _)| (*key, *dtype, shape.as_slice()));
    let mut file = header::to_bytes(None, entries)
        .ok_or_else(|| Error::malformed(output, "would have a tensor larger than any file"))?;
    for (.., bytes) in &parts {
        file.extend_from_slice(bytes);
    }
    Ok(file)
}
