//! Parakeet TDT: a Conformer with batch norms, an LSTM of two linear layers, and a layer that joins them.

use bunsen::blocks::signals::DwStridingSubsamplingConfig;
use bunsen::blocks::transformers::encoders::conformer::{
    ConformerBlockConfig, ConformerEncoderConfig,
};
use bunsen::burner::module::ModuleInit;
use bunsen::kits::speech::parakeet::blocks::{ParakeetTdt, ParakeetTdtConfig};
use burn_boft::Bias;

use super::tokens;
use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

const BLOCKS: usize = 2;
const LSTM_LAYERS: usize = 2;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<ParakeetTdt> {
        name: "Parakeet TDT",
        package: "bunsen",
        build: |device| {
            let encoder = ConformerEncoderConfig::new(
                DwStridingSubsamplingConfig::new(32, 4, 16),
                ConformerBlockConfig::new(16, 2, 32, 5)
                    .with_bias(false)
                    .with_conv_bias(false),
                BLOCKS,
            );
            ParakeetTdtConfig::new(encoder, 11, 24)
                .with_n_pred_layers(LSTM_LAYERS)
                .init(device)
        },
        forward: |model, device| {
            let (sounds, _) = model.encode(noise([2, 32, 40], 1, device), None);
            let words = model.decoder.forward(tokens([2, 4], 11, device));
            let joined = model
                .joint
                .forward(sounds.unsqueeze_dim::<4>(2), words.unsqueeze_dim(1));
            joined.flatten(0, 2)
        },
        targets: &["all-linear"],
        // The subsampling, five layers of attention and four of the feed-forward networks in each block, the projection of
        // the encoder, the LSTM, its projection, and the joint.
        layers: 1 + 9 * BLOCKS + 1 + 2 * LSTM_LAYERS + 1 + 1,
        saved: &[],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}
