//! The model against `transformers`, on the fixtures that `fixtures/make.py` wrote.

use std::path::PathBuf;

use burn::store::{ModuleStore, SafetensorsStore, bridge};
use burn::tensor::kind::Basic;
use burn::tensor::{DType, Device, Tensor};
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::{Checkpoint, HeadOrigin};

/// Largest difference allowed, relative to the largest expected value. Measured on flex: up to
/// 5e-7.
const TOLERANCE: f32 = 1e-4;

#[test]
fn the_mlp_model_answers_as_transformers_does() {
    check("mlp", &["native", "larger", "smaller", "uneven"]);
}

#[test]
fn the_swiglu_model_answers_as_transformers_does() {
    check("swiglu", &["native"]);
}

#[test]
fn the_model_with_registers_answers_as_transformers_does() {
    let cases = ["native", "larger", "smaller", "uneven"];
    check("registers", &cases);
}

#[test]
fn masked_patches_are_hidden_as_transformers_hides_them() {
    let device = Device::default();
    let model = load("mlp", &device);
    let mut answers = Answers::open("mlp", "masked", &device);

    let masked = answers.tensor("masked");
    let states = model
        .dinov2
        .hidden_states(answers.tensor("pixels"), Some(masked));

    answers.check_hidden_states(&states);
}

#[test]
fn a_backbone_in_half_precision_answers_as_transformers_does() {
    let device = Device::default();
    let (model, _) = open("backbone")
        .load(&["a".to_string()], &device)
        .expect("the backbone fits");
    let mut answers = Answers::open("backbone", "native", &device);

    let pixels = answers.tensor("pixels");
    let states = model.dinov2.hidden_states(pixels.clone(), None);
    let last = model.dinov2.forward(pixels);

    answers.check_hidden_states(&states);
    answers.check("last_hidden_state", last);
    assert_eq!(model.dinov2.layernorm.gamma.val().dtype(), DType::F32);
}

#[test]
fn transposing_one_weight_changes_the_output() {
    let device = Device::default();
    let mut model = load("mlp", &device);
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
    let model = load("registers", &device);
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
    load("mlp", &device).forward(Tensor::zeros([1, 1, 16, 16], &device));
}

/// Compares everything that a model computes in all `cases`, with and without autodiff.
fn check(name: &str, cases: &[&str]) {
    for device in [Device::default(), Device::default().autodiff()] {
        let model = load(name, &device);
        for case in cases {
            let mut answers = Answers::open(name, case, &device);
            let pixels = answers.tensor("pixels");

            answers.check_hidden_states(&model.dinov2.hidden_states(pixels.clone(), None));
            answers.check("last_hidden_state", model.dinov2.forward(pixels.clone()));
            answers.check("logits", model.forward(pixels));
        }
    }
}

/// The model in a fixture, with the classes of its head.
fn load(name: &str, device: &Device) -> Dinov2ForImageClassification {
    let checkpoint = open(name);
    let labels = checkpoint
        .labels()
        .expect("the fixture is a classifier")
        .to_vec();
    let (model, head) = checkpoint.load(&labels, device).expect("the fixture fits");
    assert_eq!(head, HeadOrigin::Checkpoint);
    model
}

fn open(name: &str) -> Checkpoint {
    let path = fixtures().join(name);
    Checkpoint::open(&path.to_string_lossy()).expect("the fixture is a model")
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
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
            store: SafetensorsStore::from_file(fixtures().join(name).join("io.safetensors")),
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
