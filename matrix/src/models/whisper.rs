//! Whisper: an encoder of sounds and a decoder of text, with attention between them.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::whisper::blocks::{Whisper, WhisperApiConfig};
use burn_boft::Bias;

use super::{rows, tokens};
use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

const LAYERS: [usize; 2] = [2, 2];

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<Whisper> {
        name: "Whisper",
        package: "bunsen",
        build: |device| {
            let [encoder, decoder] = LAYERS;
            WhisperApiConfig::new(8, 40, 32, 24, encoder, 12, decoder)
                .with_d_head(16)
                .init(device)
        },
        forward: |model, device| {
            rows(model.forward(noise([2, 8, 24], 1, device), tokens([2, 7], 40, device)))
        },
        targets: &["query", "key", "value", "output", "linear1", "linear2"],
        // The decoder attends to itself and to the encoder.
        layers: 6 * LAYERS[0] + 10 * LAYERS[1],
        saved: &[],
        bias: Bias::AdapterOnly,
        block_sizes: [8, 16],
    };
    check(&subject, method)
}
