//! Qwen3-ASR: an encoder of sounds whose outputs take the places of tokens in a Qwen3.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::gpts::qwen3::Qwen3Config;
use bunsen::kits::speech::qwen3_asr::blocks::{
    Qwen3Asr, Qwen3AsrAudioEncoderConfig, Qwen3AsrAudioEncoderMeta, Qwen3AsrConfig,
};
use burn_boft::Bias;

use super::rows;
use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

const AUDIO_LAYERS: usize = 1;
const TEXT_LAYERS: usize = 2;
/// The token that stands for a part of the sound.
const AUDIO: usize = 39;
/// The length of the sound.
const FRAMES: usize = 20;

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<Qwen3Asr> {
        name: "Qwen3-ASR",
        package: "bunsen",
        build: |device| {
            let audio = Qwen3AsrAudioEncoderConfig::new(16, 16, 2, 32, AUDIO_LAYERS, 8)
                .with_n_window(4)
                .with_n_window_infer(16);
            let text = Qwen3Config::new(40, 24, TEXT_LAYERS, 4, 2, 8, 48);
            Qwen3AsrConfig::new(audio, text)
                .with_audio_token(AUDIO)
                .init(device)
        },
        forward: |model, device| {
            let audio = model.encode_audio(noise([16, FRAMES], 1, device), FRAMES);
            let sounds = model.audio_tower.output_len(FRAMES);
            let prompt = [&[3, 1][..], &vec![AUDIO; sounds], &[7, 9, 2]].concat();
            let embedded = model
                .prompt_embeds(&prompt, audio)
                .expect("a place for each sound");
            let text = &model.language_model;
            let rotary = text.rotary(prompt.len(), device);
            rows(text.logits(text.forward_hidden(embedded, &rotary, None)))
        },
        targets: &["all-linear"],
        // The layer after the convolutions, the encoder's blocks, the two layers between the halves, and Qwen3.
        layers: 1 + 6 * AUDIO_LAYERS + 2 + 7 * TEXT_LAYERS,
        saved: &[],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}
