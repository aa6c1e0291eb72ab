//! OFT and BOFT adapters (orthogonal fine-tuning) for [Burn](burn) models.
//!
//! An adapter rotates the input of a layer by a learned orthogonal matrix. [`inject`] attaches adapters to the layers
//! that a [`BoftConfig`] or an [`OftConfig`] targets, and leaves the model computing exactly what it did before. Any Burn
//! training loop trains them, and [`merge`] folds them into the weights, where they cost nothing.
//!
//! ```
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn_boft::{Adapter, Bias, BoftConfig, inject, merge};
//!
//! #[derive(Module, Debug)]
//! struct Model {
//!     query: Linear,
//!     classifier: Linear,
//! }
//!
//! # let device = burn::tensor::Device::flex().autodiff();
//! let model = Model {
//!     query: LinearConfig::new(64, 32).init(&device),
//!     classifier: LinearConfig::new(32, 10).init(&device),
//! };
//! let config = BoftConfig::new()
//!     .with_block_size(4)
//!     .with_n_butterfly_factor(2)
//!     .with_target_modules(["query"])
//!     .with_bias(Bias::AdapterOnly)
//!     .with_modules_to_save(["classifier"]);
//! let model = inject(model, &config)?; // same type as before
//! // ... any Burn training loop or Learner ...
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! Adapter::extract(&model)?.save(folder)?; // PEFT's files, a few kilobytes
//! let merged = merge(model.valid())?; // plain weights, no adapter
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Mathematics
//!
//! `d = d_input`, `o = d_output`, `b` block size, `m` factors, `n = d/b` blocks.
//!
//! ```text
//! W  : [d, o]                  Burn's Linear weight
//! y  = (x · R · W) ⊙ s + bias       W' = R · W · diag(s)       the bias is never scaled
//! R  = F_{m-1} ··· F_1 · F_0        activations meet F_{m-1} first, weights meet F_0 first
//! F_i = P_i · blockdiag(C_{i,0..n-1}) · P_iᵀ
//! C  = (I − Q)(I + Q)⁻¹             Q skew-symmetric, so C is orthogonal
//! ```
//!
//! `R` is the rotation, a product of `m` *factors*. A factor rotates groups of `b` channels by orthogonal *blocks* `C`.
//! The groups of factor 0 are neighbours. Those of factor `i` join two halves of `b/2` neighbours at a distance of `2^i`
//! halves, which the permutation `P_i` stands for. Together, the factors mix *spans* of `b·2^(m−1)` channels.
//!
//! A layer stores the *skew*, the numbers above the diagonals of all `Q`, a `[m, n, b(b−1)/2]` tensor, and the *scale*
//! `s`, a `[o]` tensor. OFT is BOFT with one factor and no scale. [`ops`] explains the backward pass.
//!
//! OFT also adapts embeddings, of which it rotates what they look up: `W' = W · R` for a `[n_embedding, d]` weight.
//!
//! # Files
//!
//! An [`Adapter`] is a trained adapter as a value. [`Adapter::extract`] takes it out of a model, [`Adapter::attach`] puts
//! it into one, and [`Adapter::save`] and [`Adapter::load`] write and read it in the format of Hugging Face PEFT.
//!
//! # Backends
//!
//! Since Burn 0.22, tensors have no backend parameter. The backend is a property of the [`Device`](burn::tensor::Device)
//! at run time, so nothing here has a `<B: Backend>` either, and one binary serves every backend whose feature is on. Only
//! the operations that backends replace by kernels, [`ops::BoftBackend`], still have one.

#![warn(missing_docs)]
// The pages of docs.rs say which feature an item needs.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapter;
mod batch;
mod cached;
mod config;
mod conv;
pub mod dialects;
pub mod input;
mod linear;
pub mod model;
pub mod ops;
pub mod peft;
mod rotation;
mod select;
pub mod tensors;
pub mod value;

pub use adapter::BoftAdapter;
pub use config::{
    AdapterConfig, Bias, Block, BoftConfig, Cayley, Init, LayerKind, OftConfig, Selection,
    TargetModules,
};
pub use conv::{Conv2d as BoftConv2d, Conv2dConfig as BoftConv2dConfig};
pub use linear::{Linear as BoftLinear, LinearConfig as BoftLinearConfig};
#[cfg(feature = "train")]
pub use model::AdapterCheckpointer;
pub use model::{
    candidates, diagnose, inject, merge, merge_quantized, plan, project, rotate_once, summary,
    unload,
};
pub use rotation::{ButterflyPlan, RotationError};
pub use select::PatternError;
pub use value::{Adapter, AdapterBank, KeyMap, Transformers};

/// The README's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
