//! Qwen3: grouped queries, norms of queries and keys, and a head that is the embedding.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::gpts::qwen3::{Qwen3Config, Qwen3Model};
use burn_boft::Bias;

use super::{rows, tokens};
use crate::check::{Failure, Method, Row, Subject, check};

const LAYERS: usize = 2;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<Qwen3Model> {
        name: "Qwen3",
        package: "bunsen",
        build: |device| Qwen3Config::new(40, 24, LAYERS, 4, 2, 8, 48).init(device),
        forward: |model, device| {
            let embedded = model.embed(tokens([2, 7], 40, device));
            let hidden = model.forward_hidden(embedded, &model.rotary(7, device), None);
            rows(model.logits(hidden))
        },
        targets: &["all-linear"],
        // Four layers of attention and three of the gated network.
        layers: 7 * LAYERS,
        saved: &[],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}
