//! What the fuzz targets share: the two files of an adapter, made of the bytes that the fuzzer gives.

use std::fs;
use std::path::{Path, PathBuf};

use burn_boft::peft::{CONFIG_FILE, TENSORS_FILE};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Folders for the files of one target. They are made once, since a fuzzer runs a target some thousand times a second.
pub struct Scratch {
    root: TempDir,
}

impl Scratch {
    /// Makes the folders where `TMPDIR` says. A file system in memory is by far the fastest.
    #[expect(clippy::new_without_default, reason = "it creates folders")]
    pub fn new() -> Self {
        let root = tempfile::tempdir().expect("a folder for temporary files");
        for folder in ["read", "written", "again"] {
            fs::create_dir(root.path().join(folder)).expect("a new folder");
        }
        Self { root }
    }

    /// The folder of this name.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The folder `read`, with these files in it.
    pub fn adapter(&self, settings: &[u8], tensors: &[u8]) -> PathBuf {
        let folder = self.folder("read");
        fs::write(folder.join(CONFIG_FILE), settings).expect("room for the settings");
        fs::write(folder.join(TENSORS_FILE), tensors).expect("room for the tensors");
        folder
    }
}

/// The bytes before the first zero byte, and those after it. JSON has no zero bytes.
pub fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[]),
    }
}

/// A safetensors file with this header. Its length is always right, so that a change of the header reaches the code
/// behind it.
pub fn safetensors_file(header: &[u8], numbers: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, numbers].concat()
}

/// A safetensors file with the tensors of this header, whose numbers are these bytes over and over.
///
/// A change of a shape would hardly ever be made to fit the length of the numbers by chance, so the offsets are computed
/// here. A header that cannot be understood is taken as it is.
pub fn fitted_safetensors_file(header: &[u8], numbers: &[u8]) -> Vec<u8> {
    match fitted(header) {
        Some((header, length)) => {
            let numbers: Vec<u8> = numbers.iter().copied().cycle().take(length).collect();
            // Without any numbers to repeat, they are zeros.
            let padding = vec![0; length - numbers.len()];
            safetensors_file(header.as_bytes(), &[numbers, padding].concat())
        }
        None => safetensors_file(header, numbers),
    }
}

/// The header with offsets that follow from its shapes, and how many bytes its tensors take.
fn fitted(header: &[u8]) -> Option<(String, usize)> {
    // Enough for every kind of layer, and soon read.
    const LARGEST: usize = 1 << 13;
    let mut header: Map<String, Value> = serde_json::from_slice(header).ok()?;
    let mut end = 0usize;
    for (_, entry) in header.iter_mut().filter(|(key, _)| *key != "__metadata__") {
        let entry = entry.as_object_mut()?;
        let dtype: Dtype = serde_json::from_value(entry.get("dtype")?.clone()).ok()?;
        let shape: Vec<usize> = serde_json::from_value(entry.get("shape")?.clone()).ok()?;
        let bits = shape
            .iter()
            .try_fold(dtype.bitsize(), |bits, axis| bits.checked_mul(*axis))?;
        let start = end;
        end = end.checked_add(bits / 8).filter(|end| *end <= LARGEST)?;
        entry.insert("data_offsets".into(), json!([start, end]));
    }
    Some((Value::Object(header).to_string(), end))
}

/// The files of two folders are the same, byte by byte.
pub fn assert_same_files(one: &Path, other: &Path) {
    for file in [CONFIG_FILE, TENSORS_FILE] {
        let read = |folder: &Path| fs::read(folder.join(file)).expect("a file that was written");
        assert_eq!(read(one), read(other), "{file} changes on its way");
    }
}
