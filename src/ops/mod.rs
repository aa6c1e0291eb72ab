//! The engine: pure functions on tensors.
//!
//! Everything is built from two operations, the Cayley map and the butterfly, and from one backward
//! chain. With `R` orthogonal, the gradient of a rotated product needs no gradient of the rotation
//! itself: per span of `b·2^(m−1)` neighbours,
//!
//! ```text
//! G = xᵀ·dx            (activations, y = x·R·W)
//! G = dW'·W'ᵀ          (weights, W' = R·W·diag(s))
//! ∂L/∂R = G·R,   and factor by factor   ∂L/∂C = G[L,L]·C,   G ← F_iᵀ·G·F_i
//! ```
//!
//! where `L` are the indices that a block couples. So the backward pass reads what it already has,
//! and finishes on matrices of span size.
//!
//! [`BoftBackend`] holds the operations that a backend may replace by kernels; the default bodies are
//! the portable versions. A backend outside its list takes the portable versions through Burn's own
//! differentiation, so nothing panics and nothing is computed differently.

mod autodiff;
mod backend;
mod blocks;
mod butterfly;
mod cayley;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
mod linear;
mod precision;
mod route;

pub use backend::{BoftBackend, OptionalTensor};
pub use blocks::Blocks;
pub use butterfly::{Direction, Side};
pub use linear::Channels;
pub use route::{Base, Pass, Route, route};

pub(crate) use cayley::{neumann_016_coefficients, neumann_coefficients, upper_triangle};
pub(crate) use precision::{widen, widened};
