//! PEFT's settings as JSON, for what the library does not keep.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Error;

/// The name of the file in PEFT's folder.
pub const FILE: &str = "adapter_config.json";

/// The settings in an adapter's folder.
pub fn read(folder: &Path) -> Result<Map<String, Value>, Error> {
    read_file(&folder.join(FILE))
}

/// The settings in a file.
pub fn read_file(path: &Path) -> Result<Map<String, Value>, Error> {
    let bytes = fs::read(path).map_err(Error::read(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::malformed(path, format!("not a JSON object: {error}")))
}
