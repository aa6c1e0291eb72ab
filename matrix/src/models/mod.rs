//! The models, a file each.

#[cfg(feature = "llama")]
pub mod llama;
pub mod nanochat;
pub mod parakeet;
pub mod qwen3;
pub mod qwen3_asr;
pub mod resnet;
pub mod silero;
pub mod sortformer;
pub mod swin;
pub mod whisper;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::check::{Failure, Method, Row};

/// A model that can be checked.
#[derive(Clone, Copy)]
pub struct Entry {
    /// The name of the model.
    pub name: &'static str,
    /// Checks it with a method.
    pub run: fn(Method) -> Result<Row, Failure>,
}

/// All models.
pub fn entries() -> Vec<Entry> {
    let entry = |name, run: fn(Method) -> Result<Row, Failure>| Entry { name, run };
    let entries = [
        entry("SwinV2", swin::run),
        entry("ResNet", resnet::basic),
        entry("ResNet, bottlenecks", resnet::bottleneck),
        entry("Whisper", whisper::run),
        entry("Qwen3", qwen3::run),
        entry("Qwen3-ASR", qwen3_asr::run),
        entry("nanochat GPT", nanochat::run),
        entry("Parakeet TDT", parakeet::run),
        entry("Nemotron Sortformer", sortformer::run),
        entry("Silero VAD", silero::run),
    ];
    #[cfg(feature = "llama")]
    let entries = [&entries[..], &[entry("Llama 3", llama::run)]].concat();
    entries.to_vec()
}

/// Token numbers that look random.
fn tokens(shape: [usize; 2], vocabulary: usize, device: &Device) -> Tensor<2, Int> {
    let numbers: Vec<i64> = (0..shape[0] * shape[1])
        .map(|i| ((i * i * 7 + 3 * i + 1) % vocabulary) as i64)
        .collect();
    Tensor::from_data(TensorData::new(numbers, shape), device)
}

/// An output of a token model, a row for each token.
fn rows(output: Tensor<3>) -> Tensor<2> {
    output.flatten(0, 1)
}
