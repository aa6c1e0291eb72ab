//! The model against `transformers`, on the fixtures that `fixtures/make.py` wrote.

use std::path::PathBuf;

use burn::module::Param;
use burn::store::{ModuleStore, SafetensorsStore, bridge};
use burn::tensor::kind::Basic;
use burn::tensor::{DType, Device, Tensor};
use dinov2::model::{
    Dinov2Config, Dinov2ForImageClassification, Head, LoadError, load_safetensors,
    load_safetensors_bytes,
};

/// Largest difference allowed, relative to the largest expected value. Measured on flex: up to
/// 5e-7.
const TOLERANCE: f32 = 1e-4;

#[test]
fn the_mlp_model_answers_as_transformers_does() {
    check("mlp", &mlp(), &["native", "larger", "smaller", "uneven"]);
}

#[test]
fn the_swiglu_model_answers_as_transformers_does() {
    check("swiglu", &mlp().with_use_swiglu_ffn(true), &["native"]);
}

#[test]
fn the_model_with_registers_answers_as_transformers_does() {
    let cases = ["native", "larger", "smaller", "uneven"];
    check("registers", &registers(), &cases);
}

#[test]
fn masked_patches_are_hidden_as_transformers_hides_them() {
    let device = Device::default();
    let model = load("mlp", &mlp(), Head::FromFile, &device);
    let mut answers = Answers::open("mlp", "masked", &device);

    let masked = answers.tensor("masked");
    let states = model
        .dinov2
        .hidden_states(answers.tensor("pixels"), Some(masked));

    answers.check_hidden_states(&states);
}

#[test]
fn a_half_precision_backbone_becomes_f32_under_the_head_of_the_model() {
    let device = Device::default();
    let head = backbone().init(&device).classifier.weight.val();
    let mut model = backbone().init(&device);
    model.classifier.weight = Param::from_tensor(head.clone());
    let model = load_safetensors(model, fixture("backbone", "model"), Head::New)
        .expect("the backbone fits");
    let mut answers = Answers::open("backbone", "native", &device);

    let pixels = answers.tensor("pixels");
    let states = model.dinov2.hidden_states(pixels.clone(), None);
    let last = model.dinov2.forward(pixels);

    answers.check_hidden_states(&states);
    answers.check("last_hidden_state", last);
    assert_eq!(model.dinov2.layernorm.gamma.val().dtype(), DType::F32);
    assert_eq!(model.classifier.weight.val().into_data(), head.into_data());
}

#[test]
fn transposing_one_weight_changes_the_output() {
    let device = Device::default();
    let mut model = load("mlp", &mlp(), Head::FromFile, &device);
    let mut answers = Answers::open("mlp", "native", &device);
    let expected: Tensor<2> = answers.tensor("logits");

    // The weight is square, so that only its numbers can reveal the transposition.
    let query = &mut model.dinov2.encoder.layer[1].attention.attention.query;
    query.weight = query.weight.clone().map(Tensor::transpose);
    let drift = drift(model.forward(answers.tensor("pixels")), expected);

    assert!(drift > 100.0 * TOLERANCE, "a drift of only {drift}");
}

#[test]
fn positions_learn_at_other_image_sizes_too() {
    let device = Device::default().autodiff();
    let model = load("registers", &registers(), Head::FromFile, &device);
    let mut answers = Answers::open("registers", "smaller", &device);

    let gradients = model.forward(answers.tensor("pixels")).sum().backward();

    let positions = &model.dinov2.embeddings.position_embeddings;
    let gradient = positions.grad(&gradients).expect("positions are trained");
    assert!(gradient.abs().min_dim(2).max().into_scalar::<f32>() > 0.0);
}

#[test]
#[should_panic(expected = "expected [batch, 3, ≥ 4, ≥ 4] pixels, found [1, 1, 16, 16]")]
fn images_with_another_number_of_channels_are_refused() {
    let device = Device::default();
    mlp()
        .init(&device)
        .forward(Tensor::zeros([1, 1, 16, 16], &device));
}

#[test]
fn a_file_in_memory_loads_like_one_on_disk() {
    let device = Device::default();
    let bytes = std::fs::read(fixture("mlp", "model")).expect("the fixture is readable");
    let model =
        load_safetensors_bytes(mlp().init(&device), bytes, Head::FromFile).expect("the file fits");

    let other = load("mlp", &mlp(), Head::FromFile, &device);
    let [here, there] = [model, other].map(|model| model.classifier.weight.val().into_data());
    assert_eq!(here, there);
}

#[test]
fn a_new_head_ignores_the_head_of_the_file() {
    let device = Device::default();
    let model = load("mlp", &mlp().with_num_labels(7), Head::New, &device);

    assert_eq!(model.classifier.weight.dims(), [64, 7]);
}

#[test]
fn a_head_that_the_file_lacks_is_reported() {
    let (missing, unused, wrong) = misfits("backbone", &backbone());

    assert_eq!(missing, ["classifier.bias", "classifier.weight"]);
    assert!(unused.is_empty() && wrong.is_empty());
}

#[test]
fn layers_that_the_file_lacks_are_reported() {
    let mut three_layers = mlp();
    three_layers.num_hidden_layers = 3;
    let (missing, unused, wrong) = misfits("mlp", &three_layers);

    assert_eq!(missing.len(), 18);
    assert!(
        missing
            .iter()
            .all(|path| path.starts_with("dinov2.encoder.layer.2."))
    );
    assert!(unused.is_empty() && wrong.is_empty());
}

#[test]
fn tensors_that_the_model_has_no_parameter_for_are_reported() {
    let config = registers().with_num_register_tokens(0);
    let (missing, unused, wrong) = misfits("registers", &config);

    assert_eq!(unused, ["dinov2.embeddings.register_tokens"]);
    assert!(missing.is_empty() && wrong.is_empty());
}

#[test]
fn shapes_that_differ_are_reported() {
    let (missing, unused, wrong) = misfits("mlp", &mlp().with_num_labels(7));

    assert_eq!(wrong.len(), 2);
    assert!(wrong.iter().all(|reason| reason.contains("classifier.")));
    assert!(missing.is_empty() && unused.is_empty());
}

#[test]
fn an_error_names_every_tensor_that_does_not_fit() {
    let error = load_safetensors(
        mlp().with_use_swiglu_ffn(true).init(&Device::default()),
        fixture("mlp", "model"),
        Head::FromFile,
    )
    .expect_err("the file is of another model");

    let text = error.to_string();
    for name in ["layer.0.mlp.weights_in.weight", "layer.1.mlp.fc2.bias"] {
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let mut bytes = std::fs::read(fixture("mlp", "model")).expect("the fixture is readable");
    bytes.truncate(bytes.len() - 4);

    let model = mlp().init(&Device::default());
    let error =
        load_safetensors_bytes(model, bytes, Head::FromFile).expect_err("bytes are missing");

    assert!(matches!(error, LoadError::Read(_)), "{error}");
}

#[test]
fn a_file_that_is_not_safetensors_is_refused() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for path in [path.join("Cargo.toml"), path.join("no-such-file")] {
        let model = mlp().init(&Device::default());
        let error = load_safetensors(model, &path, Head::FromFile).expect_err("no weights here");
        assert!(matches!(error, LoadError::Read(_)), "{error}");
    }
}

/// The settings that `make.py` gives the GELU and, but for that, the SwiGLU model.
fn mlp() -> Dinov2Config {
    Dinov2Config::new(32, 4, 2)
        .with_patch_size(4)
        .with_image_size(16)
        .with_num_labels(5)
}

/// The settings that `make.py` gives the model with registers.
fn registers() -> Dinov2Config {
    Dinov2Config::new(32, 4, 1)
        .with_patch_size(4)
        .with_image_size(16)
        .with_mlp_ratio(2)
        .with_num_register_tokens(3)
        .with_num_labels(5)
}

/// The settings that `make.py` gives the model without a head.
fn backbone() -> Dinov2Config {
    Dinov2Config::new(24, 3, 1)
        .with_patch_size(4)
        .with_image_size(16)
        .with_num_labels(5)
        .with_layer_norm_eps(0.01)
}

/// Compares everything that a model computes in all `cases`, with and without autodiff.
fn check(name: &str, config: &Dinov2Config, cases: &[&str]) {
    for device in [Device::default(), Device::default().autodiff()] {
        let model = load(name, config, Head::FromFile, &device);
        for case in cases {
            let mut answers = Answers::open(name, case, &device);
            let pixels = answers.tensor("pixels");

            answers.check_hidden_states(&model.dinov2.hidden_states(pixels.clone(), None));
            answers.check("last_hidden_state", model.dinov2.forward(pixels.clone()));
            answers.check("logits", model.forward(pixels));
        }
    }
}

fn load(
    name: &str,
    config: &Dinov2Config,
    head: Head,
    device: &Device,
) -> Dinov2ForImageClassification {
    load_safetensors(config.init(device), fixture(name, "model"), head).expect("the fixture fits")
}

/// What does not fit when the fixture `name` is loaded with its head: missing, unused, wrong.
fn misfits(name: &str, config: &Dinov2Config) -> (Vec<String>, Vec<String>, Vec<String>) {
    let model = config.init(&Device::default());
    match load_safetensors(model, fixture(name, "model"), Head::FromFile) {
        Err(LoadError::Mismatch {
            missing,
            unused,
            wrong,
        }) => (missing, unused, wrong),
        other => panic!("expected a mismatch, found {other:?}"),
    }
}

fn fixture(name: &str, file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
        .join(file)
        .with_extension("safetensors")
}

/// The largest difference, relative to the largest expected value.
fn drift<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let largest: f32 = expected.clone().abs().max().into_scalar();
    let difference: f32 = (found - expected).abs().max().into_scalar();
    difference / largest
}

/// What `transformers` computed in one case.
struct Answers {
    name: String,
    case: String,
    device: Device,
    store: SafetensorsStore,
}

impl Answers {
    fn open(name: &str, case: &str, device: &Device) -> Self {
        Self {
            name: name.into(),
            case: case.into(),
            device: device.clone(),
            store: SafetensorsStore::from_file(fixture(name, "io")),
        }
    }

    fn tensor<const D: usize, K: Basic>(&mut self, key: &str) -> Tensor<D, K> {
        let key = format!("{}.{key}", self.case);
        let tensor = self
            .store
            .get_tensor(&key)
            .expect("the fixture is readable");
        let tensor = tensor.unwrap_or_else(|| panic!("the fixture has no {key}"));
        let data = bridge::to_data(tensor).expect("the tensor is readable");
        Tensor::from_data(data, &self.device)
    }

    fn check<const D: usize>(&mut self, key: &str, found: Tensor<D>) {
        let expected = self.tensor(key);
        let drift = drift(found, expected);
        println!("{}/{}.{key}: drift {drift:.1e}", self.name, self.case);
        // The comparison is this way round so that a NaN fails.
        assert!(
            drift < TOLERANCE,
            "{}/{}.{key} drifts by {drift}",
            self.name,
            self.case
        );
    }

    fn check_hidden_states(&mut self, states: &[Tensor<3>]) {
        for (i, state) in states.iter().enumerate() {
            self.check(&format!("hidden_states.{i}"), state.clone());
        }
        let next = format!("{}.hidden_states.{}", self.case, states.len());
        assert!(
            !self
                .store
                .keys()
                .expect("the fixture is readable")
                .contains(&next)
        );
    }
}
