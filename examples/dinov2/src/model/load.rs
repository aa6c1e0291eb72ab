//! Weights from Hugging Face's checkpoint files.

use std::path::Path;

use burn::store::{
    ApplyResult, FloatCastAdapter, ModuleAdapter, ModuleSnapshot, PyTorchToBurnAdapter,
    SafetensorsStore, SafetensorsStoreError,
};
use burn::tensor::DType;
use thiserror::Error;

use super::Dinov2ForImageClassification;

/// Where the head comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The file has one.
    FromFile,
    /// The model keeps its own, and one in the file is ignored.
    New,
}

/// Why a file was not loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be read, or is not a safetensors file.
    #[error(transparent)]
    Read(#[from] SafetensorsStoreError),

    /// The file was written for another model. Every misfit is listed, under the names of the
    /// model's parameters.
    #[error("the weights do not fit the model{}", misfits(missing, unused, wrong))]
    Mismatch {
        /// Parameters that the file lacks.
        missing: Vec<String>,
        /// Tensors that the model has no parameter for.
        unused: Vec<String>,
        /// Tensors of another shape or kind than their parameter, with both.
        wrong: Vec<String>,
    },
}

/// Loads the safetensors file at `path`, as `transformers` writes it, into `model`.
///
/// Reads files of classifiers and of backbones, which have no head and no prefix, with registers
/// and without.
///
/// # Numerics
///
/// All weights become f32, whatever the file holds.
///
/// # Errors
///
/// - [`LoadError::Read`]: the file cannot be read, or is not a safetensors file.
/// - [`LoadError::Mismatch`]: a parameter is missing in the file, a tensor of the file is unused,
///   or shapes differ.
pub fn load_safetensors(
    model: Dinov2ForImageClassification,
    path: impl AsRef<Path>,
    head: Head,
) -> Result<Dinov2ForImageClassification, LoadError> {
    load(model, SafetensorsStore::from_file(path.as_ref()), head)
}

/// Loads a safetensors file that is already in memory: [`load_safetensors`].
///
/// # Errors
///
/// As [`load_safetensors`].
pub fn load_safetensors_bytes(
    model: Dinov2ForImageClassification,
    bytes: Vec<u8>,
    head: Head,
) -> Result<Dinov2ForImageClassification, LoadError> {
    load(model, SafetensorsStore::from_bytes(Some(bytes)), head)
}

fn load(
    mut model: Dinov2ForImageClassification,
    store: SafetensorsStore,
    head: Head,
) -> Result<Dinov2ForImageClassification, LoadError> {
    // The store accepts everything here, so that all misfits can be reported at once.
    let mut store = store
        .with_from_adapter(PyTorchToBurnAdapter.chain(FloatCastAdapter::to(DType::F32)))
        .with_key_remapping(r"^dinov2_with_registers\.", "dinov2.")
        .with_key_remapping(r"^(embeddings|encoder|layernorm)\.", "dinov2.$1.")
        .allow_partial(true)
        .validate(false);
    if head == Head::New {
        store = store.with_predicate(|path, _| !is_head(path));
    }

    let result = model.load_from(&mut store)?;
    check(result, head)?;
    Ok(model)
}

/// Whether `path` names a parameter of the head.
fn is_head(path: &str) -> bool {
    path.starts_with("classifier.")
}

/// Refuses a file that does not fit the model completely.
fn check(result: ApplyResult, head: Head) -> Result<(), LoadError> {
    let missing: Vec<String> = result
        .missing
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| head == Head::FromFile || !is_head(path))
        .collect();
    let wrong: Vec<String> = result.errors.iter().map(ToString::to_string).collect();
    let unused = result.unused;
    if missing.is_empty() && unused.is_empty() && wrong.is_empty() {
        return Ok(());
    }
    Err(LoadError::Mismatch {
        missing,
        unused,
        wrong,
    })
}

/// The lists that are not empty, for a message.
fn misfits(missing: &[String], unused: &[String], wrong: &[String]) -> String {
    [("missing", missing), ("unused", unused), ("wrong", wrong)]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("; {what}: {}", names.join(", ")))
        .collect()
}
