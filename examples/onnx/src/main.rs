//! Adapts a model that a program generated from an ONNX file. Not a line of the generated code is touched.
//!
//! `cargo run --release -p burn-boft-onnx-example`

use std::error::Error;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_boft::{Adapter, BoftConfig, candidates, inject, merge, summary, unload};
use burn_boft_onnx_example::digits::Digits;
use burn_boft_onnx_example::{Classifier, accuracy, train, vit};

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::flex();
    let training = device.clone().autodiff();

    // The generated model. It reads digits that stand upright.
    let pretrained = vit::Model::from_embedded(&training);
    println!("{}\n", candidates(&pretrained));
    let upright = Digits::test(&device);
    let turned = upright.clone().turned();
    let report = |name: &str, model: &vit::Model| {
        let [upright, turned] = [&upright, &turned].map(|digits| 100.0 * accuracy(model, digits));
        println!("{name:<28} {upright:5.1}% upright {turned:5.1}% turned");
    };

    // The importer numbers layers in the order of the graph: query, key, value and output of the attention, and the
    // two layers of the perceptron, for both blocks of the Vision Transformer.
    let paths = (1..=12).map(|number| format!("linear{number}"));
    let config = BoftConfig::new()
        .with_block_size(8)
        .with_n_butterfly_factor(2)
        .with_target_modules(paths.collect::<Vec<_>>());
    let model = inject(pretrained.clone(), &config)?;
    println!("{}", summary(&model));

    // It learns to read digits that are turned by a quarter.
    let model = train(model, &Digits::training(&training).turned(), 40, 2e-2).valid();
    report("as imported", &pretrained.valid());
    report("adapted", &model);
    report("adapted, adapter taken off", &unload(model.clone()));

    let folder = std::env::temp_dir().join("onnx-adapter");
    Adapter::extract(&model)?.save(&folder)?;
    println!("adapter saved to {}", folder.display());
    let (adapter, _) = Adapter::load(&folder)?;
    let reloaded = adapter.attach(pretrained)?.valid();
    let merged = merge(model.clone())?;
    // For one image, an adapter rotates the activations; for the many above, the weight, as `merge` does.
    for (name, other) in [("reloaded", &reloaded), ("merged", &merged)] {
        let difference = difference(&model, other, &turned.first(1));
        println!("{name} model differs by {difference:.1e}");
        if difference > 1e-5 {
            return Err(format!("the {name} model computes something else").into());
        }
    }
    Ok(())
}

/// The largest difference of two models' logits, relative to the largest logit.
fn difference(model: &vit::Model, other: &vit::Model, digits: &Digits) -> f32 {
    let largest = |logits: Tensor<2>| logits.abs().max().into_scalar::<f32>();
    let logits = model.logits(digits.images.clone());
    let other = other.logits(digits.images.clone());
    largest(logits.clone() - other) / largest(logits)
}
