//! What every adapted model has to do, from `inject` to `merge`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, Tensor};
use burn_boft::{Adapter, AdapterConfig, inject, merge, summary};
use burn_boft_onnx_example::digits::Digits;
use burn_boft_onnx_example::{Classifier, loss, train};
use safetensors::SafeTensors;

use crate::common::models::{distance, numbers, trainable};
use crate::common::{assert_close, host};

/// What training must change, and how many numbers that are.
pub struct Learnt<'a> {
    pub paths: &'a [&'a str],
    pub count: usize,
}

/// Adapts a model to digits that are turned by a quarter, and follows the adapter into a file, a fresh model and the
/// weights.
pub fn walk<M: Classifier>(
    base: &M,
    config: impl Into<AdapterConfig>,
    learnt: Learnt,
    device: &Device,
) {
    let digits = Digits::training(device).turned().first(448);
    let held_out = Digits::test(device).turned().first(37).images;
    let original = base.logits(held_out.clone());

    let fresh = inject(base.clone(), config).unwrap();
    assert_same_bits(fresh.logits(held_out.clone()), original.clone());
    let paths: BTreeSet<_> = learnt.paths.iter().map(|path| path.to_string()).collect();
    assert_eq!(trainable(&fresh), paths);
    assert_eq!(summary(&fresh).trainable, learnt.count);

    let trained = train(fresh.clone(), &digits, 4, 2e-2);
    let [before, after]: [f32; 2] =
        [&fresh, &trained].map(|model| loss(model, digits.clone()).into_scalar());
    assert!(
        after < 0.7 * before,
        "the loss went from {before} to {after}"
    );
    assert_eq!(changed(&numbers(&fresh), &numbers(&trained)), paths);

    let trained = trained.valid();
    let output = trained.logits(held_out.clone());
    assert!(distance(output.clone(), original) > 1.0);

    let folder = tempfile::tempdir().unwrap();
    Adapter::extract(&trained)
        .unwrap()
        .save(folder.path())
        .unwrap();
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    let attached = adapter.attach(base.clone()).unwrap().valid();
    assert_same_bits(attached.logits(held_out.clone()), output.clone());

    let merged = merge(trained).unwrap();
    assert!(numbers(&merged).keys().eq(numbers(base).keys()));
    assert_close(
        "merged",
        &host(merged.logits(held_out)),
        &host(output),
        1e-5,
    );
}

/// The paths of the numbers that differ.
fn changed(
    before: &BTreeMap<String, Vec<f64>>,
    after: &BTreeMap<String, Vec<f64>>,
) -> BTreeSet<String> {
    assert!(before.keys().eq(after.keys()));
    let changed = before
        .iter()
        .filter(|(path, values)| **values != after[*path]);
    changed.map(|(path, _)| path.clone()).collect()
}

#[track_caller]
fn assert_same_bits(a: Tensor<2>, b: Tensor<2>) {
    assert_eq!(distance(a, b), 0.0);
}

/// The model computes what PyTorch computed for the first images that are kept for testing.
pub fn computes_what_pytorch_computed<M: Classifier>(model: &M, name: &str, device: &Device) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference.safetensors");
    let file = std::fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let read = |name: &str| -> Vec<f64> {
        let (numbers, _) = file.tensor(name).unwrap().data().as_chunks();
        numbers
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes).into())
            .collect()
    };
    let images = Digits::test(device).first(5).images;
    assert_eq!(host(images.clone()), read("images"));
    assert_close(name, &host(model.logits(images)), &read(name), 1e-5);
}
