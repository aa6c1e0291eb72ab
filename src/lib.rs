//! OFT and BOFT adapters (orthogonal fine-tuning) for [Burn](burn) models.
//!
//! An adapter rotates the input of a layer by a learned orthogonal matrix, and a model that is adapted
//! starts as the model it was. [`inject`] attaches adapters to the layers that a [`BoftConfig`] or
//! [`OftConfig`] targets, any Burn training loop trains them, and [`merge`] folds them into the weights.
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
//! Factor `i` couples half-blocks at distance `2^i`; factor 0 is contiguous. Stored per layer: the strict
//! upper triangles of `Q`, `[m, n, b(b−1)/2]`, and the scale `s`, `[o]`. OFT is BOFT with one factor and
//! no scale. [`ops`] states the backward pass.
//!
//! # Files
//!
//! An [`Adapter`] is a trained adapter as a value: out of a model with [`Adapter::extract`], into one with
//! [`Adapter::attach`], and in PEFT's format with [`Adapter::save`] and [`Adapter::load`].
//!
//! # Backends
//!
//! Burn's tensors have no backend parameter since 0.22: the backend is a property of the
//! [`Device`](burn::tensor::Device) at run time, so nothing here has a `<B: Backend>` either, and one binary
//! serves every backend whose feature is on. The kernel layer, [`ops::BoftBackend`], keeps it.

#![warn(missing_docs)]

mod adapter;
mod config;
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
pub use linear::{Linear as BoftLinear, LinearConfig as BoftLinearConfig};
#[cfg(feature = "train")]
pub use model::AdapterCheckpointer;
pub use model::{candidates, diagnose, inject, merge, plan, project, summary, unload};
pub use rotation::{ButterflyPlan, RotationError};
pub use select::PatternError;
pub use value::{Adapter, KeyMap, Transformers};

/// The README's example, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
