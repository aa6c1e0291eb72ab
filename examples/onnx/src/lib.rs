//! What the example and its tests share: the generated model, the digits, and a training loop.

pub mod digits;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Int, Tensor};

use digits::Digits;

/// The Vision Transformer, as `build.rs` generated it from `models/vit.onnx`.
#[allow(clippy::all)]
pub mod vit {
    include!(concat!(env!("OUT_DIR"), "/vit.rs"));
}

/// What the generated models have in common, which is only the signature of a method.
pub trait Classifier: Module {
    /// The logits of images: `[count, 1, 8, 8]` to `[count, 10]`.
    fn logits(&self, images: Tensor<4>) -> Tensor<2>;
}

impl Classifier for vit::Model {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self.forward(images)
    }
}

/// The cross-entropy of a model on digits.
pub fn loss<M: Classifier>(model: &M, digits: Digits) -> Tensor<1> {
    let logits = model.logits(digits.images);
    CrossEntropyLossConfig::new()
        .init(&logits.device())
        .forward(logits, digits.labels)
}

/// Trains what is trainable in a model, with a learning rate that falls to zero.
pub fn train<M: Classifier>(mut model: M, digits: &Digits, epochs: usize, lr: f64) -> M {
    let mut optimizer = AdamConfig::new().init();
    for epoch in 0..epochs {
        let lr = lr * (1.0 - epoch as f64 / epochs as f64);
        for batch in digits.batches(64) {
            let gradients = loss(&model, batch).backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(lr, model, gradients);
        }
    }
    model
}

/// The share of digits that a model reads as what they are.
pub fn accuracy<M: Classifier>(model: &M, digits: &Digits) -> f64 {
    let read: Tensor<1, Int> = model.logits(digits.images.clone()).argmax(1).squeeze_dim(1);
    let right: i64 = read.equal(digits.labels.clone()).int().sum().into_scalar();
    right as f64 / digits.len() as f64
}
