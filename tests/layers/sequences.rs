//! Attention, transformers and recurrent layers.

use burn::module::Module;
use burn::nn::attention::{CrossAttentionConfig, MhaInput, MultiHeadAttentionConfig};
use burn::nn::transformer::{
    PositionWiseFeedForwardConfig, TransformerDecoderConfig, TransformerDecoderInput,
    TransformerEncoderConfig, TransformerEncoderInput,
};
use burn::nn::{
    BiGruConfig, BiLstmConfig, BiRnnConfig, GruConfig, LstmConfig, RnnConfig, SwiGluConfig,
};
use burn::tensor::Tensor;

use crate::check::{Verdict, adapted, boft, device, flat, oft};
use crate::common::models::rows;
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("MultiHeadAttention", multi_head_attention),
    ("CrossAttention", cross_attention),
    ("PositionWiseFeedForward", feed_forward),
    ("SwiGlu", swiglu),
    ("TransformerEncoder", encoder),
    ("TransformerDecoder", decoder),
    ("Rnn", rnn),
    ("BiRnn", bi_rnn),
    ("Lstm", lstm),
    ("BiLstm", bi_lstm),
    ("Gru", gru),
    ("BiGru", bi_gru),
];

fn check<M: Module>(base: M, forward: impl Fn(&M) -> Vec<Tensor<1>>) -> Verdict {
    adapted(base, &[boft(), oft()], forward)
}

/// Three sequences of five tokens with `width` numbers each.
fn tokens(width: usize, seed: u64) -> Tensor<3> {
    rows([3, 5, width], seed, &device())
}

fn multi_head_attention() -> Verdict {
    let config = MultiHeadAttentionConfig::new(16, 2).with_dropout(0.0);
    check(config.init(&device()), |layer| {
        let (query, key) = (rows([3, 4, 16], 1, &device()), tokens(16, 2));
        vec![flat(
            layer
                .forward(MhaInput::new(query, key.clone(), key))
                .context,
        )]
    })
}

/// Grouped queries: four heads share two keys and values.
fn cross_attention() -> Verdict {
    let config = CrossAttentionConfig::new(16, 24, 4, 2, 8).with_dropout(0.0);
    check(config.init(&device()), |layer| {
        let query = rows([3, 4, 16], 1, &device());
        vec![flat(layer.forward(query, tokens(24, 2), None))]
    })
}

fn feed_forward() -> Verdict {
    let config = PositionWiseFeedForwardConfig::new(16, 24).with_dropout(0.0);
    check(config.init(&device()), |layer| {
        vec![flat(layer.forward(tokens(16, 1)))]
    })
}

fn swiglu() -> Verdict {
    let config = SwiGluConfig::new(16, 10).with_bias(true);
    check(config.init(&device()), |layer| {
        vec![flat(layer.forward(tokens(16, 1)))]
    })
}

fn encoder() -> Verdict {
    let config = TransformerEncoderConfig::new(16, 24, 2, 2).with_dropout(0.0);
    check(config.init(&device()), |model| {
        vec![flat(
            model.forward(TransformerEncoderInput::new(tokens(16, 1))),
        )]
    })
}

fn decoder() -> Verdict {
    let config = TransformerDecoderConfig::new(16, 24, 2, 2).with_dropout(0.0);
    check(config.init(&device()), |model| {
        let memory = rows([3, 4, 16], 2, &device());
        vec![flat(model.forward(TransformerDecoderInput::new(
            tokens(16, 1),
            memory,
        )))]
    })
}

fn rnn() -> Verdict {
    check(RnnConfig::new(16, 8, true).init(&device()), |model| {
        vec![flat(model.forward(tokens(16, 1), None).0)]
    })
}

fn bi_rnn() -> Verdict {
    check(BiRnnConfig::new(16, 8, true).init(&device()), |model| {
        vec![flat(model.forward(tokens(16, 1), None).0)]
    })
}

fn lstm() -> Verdict {
    check(LstmConfig::new(16, 8, true).init(&device()), |model| {
        let (output, state) = model.forward(tokens(16, 1), None);
        vec![flat(output), flat(state.cell)]
    })
}

fn bi_lstm() -> Verdict {
    check(BiLstmConfig::new(16, 8, true).init(&device()), |model| {
        let (output, state) = model.forward(tokens(16, 1), None);
        vec![flat(output), flat(state.cell)]
    })
}

fn gru() -> Verdict {
    check(GruConfig::new(16, 8, true).init(&device()), |model| {
        vec![flat(model.forward(tokens(16, 1), None))]
    })
}

fn bi_gru() -> Verdict {
    check(BiGruConfig::new(16, 8, true).init(&device()), |model| {
        vec![flat(model.forward(tokens(16, 1), None).0)]
    })
}
