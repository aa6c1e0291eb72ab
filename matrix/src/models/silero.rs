//! Silero VAD: an LSTM of two linear layers that runs over a sound step by step.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::silero_vad::{SileroVad, SileroVadSignalConfig};
use burn_boft::Bias;

use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<SileroVad> {
        name: "Silero VAD",
        package: "bunsen",
        build: |device| {
            SileroVadSignalConfig::new(8000, 17)
                .with_d_hidden(32)
                .with_d_bottleneck(16)
                .init(device)
        },
        forward: |model, device| {
            let sound = noise([6, 3, 144], 1, device);
            let (probabilities, _) = model.forward_sequence(sound, model.init_state(3, device));
            probabilities
        },
        targets: &["lstm.features", "lstm.hidden"],
        layers: 2,
        saved: &[],
        bias: Bias::AdapterOnly,
        block_sizes: [8, 16],
    };
    check(&subject, method)
}
