//! Llama 3, whose forward pass writes into a cache of keys and values.

use burn_boft::Bias;
use maolan_llama::llama::{Llama, LlamaConfig};
use maolan_llama::tokenizer::Tokenizer;

use burn::tensor::Device;

use super::{rows, tokens};
use crate::check::{Failure, Method, Row, Subject, check};

const LAYERS: usize = 2;
const VOCABULARY: usize = 40;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject {
        name: "Llama 3",
        package: "maolan-llama",
        build: |device| llama(device).model,
        forward: |model, device| {
            // The cache and the rotary encoding are no parts of the model.
            let Llama {
                mut cache, rope, ..
            } = llama(device);
            rows(model.forward(tokens([2, 7], VOCABULARY, device), &mut cache, &rope))
        },
        targets: &["wq", "wk", "wv", "wo", "linear_inner", "linear_outer", "w2"],
        layers: 7 * LAYERS,
        saved: &["output"],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}

fn llama(device: &Device) -> Llama<Bytes> {
    LlamaConfig::new(48, VOCABULARY, String::new())
        .with_d_model(32)
        .with_num_hidden_layers(LAYERS)
        .with_num_attention_heads(4)
        .with_num_key_value_heads(Some(2))
        .with_max_seq_len(16)
        .with_max_batch_size(2)
        .init(device)
        .expect("a tokenizer without a file")
}

/// A token for each byte. The package asks for a tokenizer, and nothing here is made of text.
struct Bytes;

impl Tokenizer for Bytes {
    fn new(_: &str) -> Result<Self, String> {
        Ok(Self)
    }

    fn encode(&self, text: &str, _: bool, _: bool) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn decode(&self, tokens: Vec<u32>) -> String {
        let bytes = tokens
            .into_iter()
            .filter_map(|token| u8::try_from(token).ok());
        String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
    }

    fn bos_id(&self) -> u32 {
        1
    }

    fn eos_id(&self) -> u32 {
        2
    }

    fn stop_ids(&self) -> Vec<u32> {
        vec![2]
    }
}
