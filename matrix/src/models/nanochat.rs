//! The GPT of nanochat: squared activations, one head for keys and values, and logits with a soft cap.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::gpts::nanochat::{NanoChatGpt, NanoChatGptContractConfig};
use burn_boft::Bias;

use super::{rows, tokens};
use crate::check::{Failure, Method, Row, Subject, check};

const LAYERS: usize = 2;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<NanoChatGpt> {
        name: "nanochat GPT",
        package: "bunsen",
        build: |device| {
            NanoChatGptContractConfig::new()
                .with_init_seq_len(16)
                .with_vocab_size(48)
                .with_n_layer(LAYERS)
                .with_n_head(2)
                .with_n_kv_head(1)
                .with_n_embed(32)
                .init(device)
        },
        forward: |model, device| rows(model.forward(tokens([2, 9], 48, device), &mut None)),
        targets: &["c_q", "c_k", "c_v", "c_proj", "linear1", "linear2"],
        layers: 6 * LAYERS,
        saved: &["lm_head"],
        bias: Bias::None,
        block_sizes: [8, 16],
    };
    check(&subject, method)
}
