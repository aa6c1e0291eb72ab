//! Nemotron's Sortformer, which tells speakers apart.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::sortformer::blocks::{NemotronDiarizationConfig, Sortformer};
use burn_boft::Bias;

use super::rows;
use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

const LAYERS: usize = 2;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<Sortformer> {
        name: "Nemotron Sortformer",
        package: "bunsen",
        build: |device| {
            NemotronDiarizationConfig::new()
                .with_n_mels(24)
                .with_d_model(32)
                .with_n_layers(LAYERS)
                .with_n_heads(2)
                .with_ff_expansion(2)
                .with_d_hidden(16)
                .with_n_speakers(3)
                .init(device)
        },
        forward: |model, device| rows(model.forward(noise([2, 40, 24], 1, device), None).output),
        targets: &[
            "query",
            "key",
            "value",
            "output",
            "linear1",
            "linear2",
            "projection",
            "dense",
        ],
        // The stacking and the projection behind the encoder have the same name.
        layers: 6 * LAYERS + 2 + 1,
        saved: &["head.out"],
        bias: Bias::AdapterOnly,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}
