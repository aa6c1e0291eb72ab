//! The checks on models that break what they assert.

use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, RunningState};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_boft::Bias;
use burn_boft_matrix::{Method, Subject, check};

/// A model that can be made to misbehave.
#[derive(Module, Debug)]
struct Model {
    hidden: Linear,
    output: Linear,
    statistic: RunningState<Tensor<1>>,
    /// What is added to the output.
    offset: f64,
}

fn build(device: &Device) -> Model {
    Model {
        hidden: LinearConfig::new(16, 24).init(device),
        output: LinearConfig::new(24, 5).init(device),
        statistic: RunningState::new(Tensor::ones([5], device)),
        offset: 0.0,
    }
}

fn forward(model: &Model, device: &Device) -> Tensor<2> {
    let numbers: Vec<f32> = (0..96).map(|i| (i as f32 * 1.7).sin()).collect();
    let input = Tensor::<1>::from_floats(numbers.as_slice(), device).reshape([6, 16]);
    model.output.forward(model.hidden.forward(input).tanh())
}

fn subject() -> Subject<Model> {
    Subject {
        name: "Model",
        package: "burn",
        build,
        forward,
        targets: &["hidden", "output"],
        layers: 2,
        saved: &[],
        bias: Bias::AdapterOnly,
        block_sizes: [4, 8],
    }
}

/// What the check says against a subject, with either method.
fn complaint(subject: &Subject<Model>) -> String {
    check(subject, Method::Oft).unwrap_err().to_string()
}

#[test]
fn a_model_without_tricks_passes() {
    let boft = check(&subject(), Method::Boft).unwrap();
    // Two factors of 4 and of 6 blocks with six numbers each, the scales, and the biases.
    assert_eq!(boft.trainable, 2 * (4 + 6) * 6 + (24 + 5) + (24 + 5));
    let oft = check(&subject(), Method::Oft).unwrap();
    assert_eq!(oft.trainable, (2 + 3) * 28 + (24 + 5));
    // Beside the adapters, both layers with their biases, and the statistic.
    assert_eq!(oft.total, (2 + 3) * 28 + 16 * 24 + 24 + 24 * 5 + 5 + 5);
}

#[test]
fn another_number_of_layers_is_noticed() {
    let subject = Subject {
        layers: 3,
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("2 layers have the names to adapt instead of 3"),
        "{complaint}"
    );
}

#[test]
fn an_output_that_changes_by_itself_is_noticed() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let subject = Subject {
        forward: |model: &Model, device| {
            forward(model, device) + CALLS.fetch_add(1, Ordering::Relaxed) as f32
        },
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("inject moved the output"),
        "{complaint}"
    );
}

#[test]
fn an_output_that_does_not_depend_on_the_adapters_is_noticed() {
    let subject = Subject {
        forward: |model: &Model, device| {
            let untouched = model.output.weight.base().slice([0..6, 0..5]);
            untouched + forward(model, device) * 0.0
        },
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("20 steps took the loss from"),
        "{complaint}"
    );
}

#[test]
fn a_statistic_that_moves_in_training_is_noticed() {
    let subject = Subject {
        forward: |model: &Model, device| {
            let output = forward(model, device);
            if device.is_autodiff() {
                let mean = output.clone().mean_dim(0).reshape([5]).detach();
                model
                    .statistic
                    .update(model.statistic.value_sync() * 0.9 + mean);
            }
            output
        },
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("training moved `statistic`: true"),
        "{complaint}"
    );
}

#[test]
fn a_forward_pass_that_reads_the_base_is_noticed_when_it_is_merged() {
    let subject = Subject {
        forward: |model: &Model, device| {
            // An adapted layer reads its base here, and after merging the base is another one.
            let base = model.output.weight.base().slice([0..6, 0..5]);
            forward(model, device) + base
        },
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("the merged model differs by"),
        "{complaint}"
    );
}

#[test]
fn a_model_that_is_another_when_it_is_built_anew_is_noticed_when_an_adapter_is_loaded() {
    static BUILT: AtomicUsize = AtomicUsize::new(0);
    let subject = Subject {
        build: |device| Model {
            offset: BUILT.fetch_add(1, Ordering::Relaxed) as f64 * 0.01,
            ..build(device)
        },
        forward: |model: &Model, device| forward(model, device) + model.offset,
        ..subject()
    };
    let complaint = complaint(&subject);
    assert!(
        complaint.starts_with("the loaded adapter differs by"),
        "{complaint}"
    );
}
