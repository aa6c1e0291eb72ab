//! DINOv2 (Oquab et al., 2023) as Hugging Face's `transformers` computes it.
//!
//! Fields are named after the keys of Hugging Face's checkpoint files, so the path of every
//! parameter *is* its key: `dinov2.encoder.layer.0.attention.attention.query.weight`. (In memory,
//! transformers 5 calls that `attention.q_proj` and keeps the two halves of `weights_in` as two layers; it reads and
//! writes files with the names used here.)

mod attention;
mod classifier;
mod config;
mod embeddings;
mod encoder;
mod layer;
mod linear;
mod mlp;
mod resample;

pub use attention::{Dinov2Attention, Dinov2SelfAttention, Dinov2SelfOutput};
pub use classifier::{Dinov2ForImageClassification, Dinov2Model};
pub use config::Dinov2Config;
pub use embeddings::{Dinov2Embeddings, Dinov2PatchEmbeddings};
pub use encoder::Dinov2Encoder;
pub use layer::{Dinov2Layer, Dinov2LayerScale};
pub use linear::LinearLayer;
pub use mlp::Dinov2Mlp;

// The model is made of `BoftLinear`, which takes the fast route. This is the only place that says so.
// It could be made of Burn's layers as well, with which the benchmarks compare it.
use burn_boft::BoftLinear;
