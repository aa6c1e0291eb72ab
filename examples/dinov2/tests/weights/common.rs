//! What these tests share.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::{ModuleStore, SafetensorsStore, bridge};
use burn::tensor::{Device, Tensor};
use dinov2::method::Method;
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::{AdapterFolder, Checkpoint, WeightsError};
use serde_json::Value;
use tempfile::TempDir;

/// Largest difference allowed, relative to the largest expected value. Measured on flex: up to 7e-7.
pub const TOLERANCE: f32 = 1e-4;
/// The classes of the fixtures, in the order of the files.
pub const LABELS: [&str; 5] = ["eel", "ant", "cat", "dog", "bee"];

pub fn device() -> Device {
    Device::flex()
}

pub fn strings(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|label| label.to_string()).collect()
}

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A copy of the files of a fixture.
pub fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

pub fn open(name: &str) -> Checkpoint {
    open_path(&fixture(name)).unwrap()
}

pub fn open_path(path: &Path) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(path.to_str().unwrap())
}

/// Loads the model in a folder with its own classes.
pub fn load(folder: &Path) -> Result<Dinov2ForImageClassification, WeightsError> {
    let checkpoint = open_path(folder)?;
    let labels = checkpoint.labels().unwrap().to_vec();
    Ok(checkpoint.load(&labels, &device())?.0)
}

/// The error's message, which has all `parts` and is one line.
#[track_caller]
pub fn complains<T>(result: Result<T, WeightsError>, parts: &[&str]) {
    let error = result.err().expect("the input is wrong");
    let text = error.to_string();
    println!("{text}");
    assert!(!text.contains('\n') && !text.contains("os error"), "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in `{text}`");
    }
}

pub fn attached(
    adapter: &AdapterFolder,
    base: &str,
    labels: &[String],
    device: &Device,
) -> Dinov2ForImageClassification {
    let (model, _) = open(base).load(labels, device).unwrap();
    adapter.attach(model).unwrap()
}

pub fn methods() -> [Method; 5] {
    [
        Method::Boft {
            block_size: 4,
            factors: 1,
            dropout: 0.0,
        },
        Method::oft(4),
        Method::Lora { rank: 2 },
        Method::Linear,
        Method::Full,
    ]
}

/// A model with everything that its method trains moved away from where it starts.
pub fn trained(
    method: &Method,
    checkpoint: &Checkpoint,
    labels: &[&str],
    device: &Device,
) -> Dinov2ForImageClassification {
    use burn::module::{ModuleMapper, Param};
    use burn::tensor::Distribution;

    struct Move;

    impl ModuleMapper for Move {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match param.is_require_grad() {
                false => param,
                true => param.map(|tensor| {
                    let noise = Distribution::Normal(0.0, 0.05);
                    let noise = Tensor::random(tensor.dims(), noise, &tensor.device());
                    (tensor + noise).detach().require_grad()
                }),
            }
        }
    }

    let plain = device.clone().autodiff();
    plain.seed(5);
    let (model, _) = checkpoint.load(&strings(labels), &plain).unwrap();
    let model = method.prepare(model).unwrap().map(&mut Move);
    match device.is_autodiff() {
        true => model,
        false => model.valid(),
    }
}

/// Pixels of three images that are unlike each other.
pub fn pixels(checkpoint: &Checkpoint, device: &Device) -> Tensor<4> {
    let (size, channels) = (
        checkpoint.config().image_size.min(56),
        checkpoint.config().num_channels,
    );
    let count = (3 * channels * size * size) as i64;
    let numbers = Tensor::<1, burn::tensor::Int>::arange(0..count, device).float();
    (numbers * 0.7).sin().reshape([3, channels, size, size])
}

pub fn answer<const D: usize>(name: &str, key: &str) -> Tensor<D> {
    answer_on(name, key, &device())
}

pub fn answer_on<const D: usize>(name: &str, key: &str, device: &Device) -> Tensor<D> {
    tensor_of(&fixture(name).join("io.safetensors"), key, device)
}

pub fn tensor_of<const D: usize>(path: &Path, key: &str, device: &Device) -> Tensor<D> {
    let mut store = SafetensorsStore::from_file(path);
    let tensor = store.get_tensor(key).unwrap();
    let tensor = tensor.unwrap_or_else(|| panic!("{} has no {key}", path.display()));
    Tensor::from_data(bridge::to_data(tensor).unwrap(), device)
}

pub fn check(name: &str, key: &str, found: Tensor<2>) {
    close(found, answer(name, key), name);
}

#[track_caller]
pub fn close(found: Tensor<2>, expected: Tensor<2>, name: &str) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let largest: f32 = expected.clone().abs().max().into_scalar();
    let difference: f32 = (found - expected).abs().max().into_scalar();
    let drift = difference / largest;
    println!("{name}: drift {drift:.1e}");
    // The comparison is this way round so that a NaN fails.
    assert!(drift < TOLERANCE, "{name} drifts by {drift}");
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub fn edit_json(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let mut json = read_json(&folder.join(file));
    edit(&mut json);
    fs::write(folder.join(file), json.to_string()).unwrap();
}

/// Name, shape and bytes of a tensor in f32.
pub type Named = (String, Vec<usize>, Vec<u8>);

pub fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Vec<Named>)) {
    edit_file(&folder.join("model.safetensors"), edit);
}

pub fn edit_file(path: &Path, edit: impl FnOnce(&mut Vec<Named>)) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<Named> = file
        .iter()
        .map(|(name, view)| {
            (
                name.to_string(),
                view.shape().to_vec(),
                view.data().to_vec(),
            )
        })
        .collect();
    edit(&mut tensors);
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

pub fn tensor_names(path: &Path) -> Vec<String> {
    SafetensorsStore::from_file(path).keys().unwrap()
}

pub fn write_answer(path: &Path, tensors: &[(&str, burn::tensor::TensorData)]) {
    let views = tensors.iter().map(|(name, data)| {
        let shape = data.shape().to_vec();
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, data.as_bytes());
        (*name, view.unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
