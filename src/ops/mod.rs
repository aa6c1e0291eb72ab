//! The engine: pure functions on tensors, which know nothing of models, layers or files.
//!
//! [`Blocks`] is what the rest of the crate uses: it makes the blocks of a rotation `R` from the learned numbers,
//! rotates matrices and weights with them, and computes a whole linear layer by the [`Route`] that [`route()`]
//! chooses.
//!
//! # The Gram backward
//!
//! `R` is orthogonal, so the gradient of a rotation needs no gradient of a rotated weight. It follows from one
//! small matrix `G` per *span*, the `b·2^(m−1)` neighbours that `R` mixes:
//!
//! ```text
//! G = xᵀ·dx            (activations, y = x·R·W)
//! G = dW'·W'ᵀ          (weights, W' = R·W·diag(s))
//! ∂L/∂R = G·R,   and factor by factor   ∂L/∂C = G[L,L]·C,   G ← F_iᵀ·G·F_i
//! ```
//!
//! where `L` are the indices that a block couples, and `i` runs from the last factor to the first. The proof for
//! activations without a scale takes two lines:
//!
//! ```text
//! dx = dy·(R·W)ᵀ,   so   dx·R = dy·Wᵀ·Rᵀ·R = dy·Wᵀ
//! ∂L/∂R = xᵀ·dy·Wᵀ = (xᵀ·dx)·R = G·R
//! ```
//!
//! With a scale, `y = x·R·W·diag(s)`, the same two lines hold with `W·diag(s)` in place of `W`: `dx` carries the
//! scale already, so `G` and everything after it stay as they are. The scale only adds a gradient of its own,
//! `∂L/∂s = Σ dy ⊙ (y − bias) / s` over all rows, read from the output. It divides by `s`, which is why a scale
//! below 1e-30 is moved away from zero in the forward pass too.
//!
//! For weights, `W·diag(s) = Rᵀ·W'`, so `∂L/∂R = dW'·(W·diag(s))ᵀ = dW'·W'ᵀ·R = G·R`.
//!
//! The backward pass therefore reads matrices that it has anyway, and finishes on matrices of the size of a span.
//! Its last step is the Cayley map's own backward pass, `∂L/∂Q = −½ (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ`, which needs only
//! the blocks `C`.
//!
//! # Kernels
//!
//! [`BoftBackend`] holds the operations that a backend may replace by kernels; their default bodies are the
//! portable versions, written in Burn's tensor operations. A kernel changes the speed of a result and its
//! rounding, nothing else. Tensors of a backend that [`BoftBackend`] does not list take the portable versions
//! too, and Burn differentiates them.

mod autodiff;
mod backend;
mod blocks;
mod butterfly;
mod cayley;
mod conv;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
mod linear;
mod low_rank;
mod per_request;
mod precision;
mod product;
mod requests;
mod route;

pub use backend::{BoftBackend, OptionalTensor, Tensors};
pub use blocks::Blocks;
pub use butterfly::{Direction, Side};
pub use linear::Channels;
pub use low_rank::{largest_rank, low_rank};
pub use per_request::{PerRequest, linear_requests, rotate_requests};
pub use route::{Base, Pass, Route, route};

pub(crate) use cayley::{neumann_016_coefficients, neumann_coefficients, upper_triangle};
pub(crate) use precision::{dequantized, is_quantized, reshaped, widen, widened};
pub(crate) use product::product;
