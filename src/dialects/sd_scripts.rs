//! kohya's sd-scripts: `networks.oft`, which rotates outputs, and `networks.boft`, which rotates inputs as PEFT does.
//!
//! `networks.oft` computes the same blocks as LyCORIS's `diag-oft` from `q = A − Aᵀ`, and always bounds their norm: with
//! `c = alpha·outputs`, `q` becomes `q·(min(‖q‖, c) + 1e-8)/(‖q‖ + 1e-8)`. A bound of zero leaves nothing of them, where
//! LyCORIS has no bound.
//!
//! `networks.boft` is PEFT's BOFT: squares of which `½(A − Aᵀ)` counts, and a scale of `[outputs, 1]`, also for
//! convolutions.
//!
//! Files: `networks/oft.py` at commit 48d368fa, and `networks/boft.py` at commit 070e3cd2.

use super::parts::{EPSILON, Parts, Read, norm, scaled};
use super::table::Dialect;
use crate::value::mismatch::{Mismatch, SizeError};

/// Reads a layer of `networks.oft`.
///
/// # Errors
///
/// [`Mismatch`]: tensors are missing or have other sizes.
pub(super) fn oft(parts: &Parts) -> Result<Read, Mismatch> {
    let squares = parts.squares(Dialect::SdScriptsOft)?;
    let alpha = parts.alpha()?;
    let [_, n, b] = squares.sizes;
    let bound = alpha * (n * b) as f64;
    let q = squares.differences();
    let length = norm(&q);
    let factor = (length.min(bound) + EPSILON) / (length + EPSILON);
    let layer = squares.layer(parts.module, &scaled(q, factor), None)?;
    Ok(Read {
        layer: layer.with_output_axis()?,
        alpha: Some(alpha),
        is_bounded: length > bound,
        exceeds_alpha: false,
    })
}

/// Reads a layer of `networks.boft`.
///
/// # Errors
///
/// [`Mismatch`]: tensors are missing or have other sizes.
pub(super) fn boft(parts: &Parts) -> Result<Read, Mismatch> {
    let squares = parts.squares(Dialect::SdScriptsBoft)?;
    let scale = parts.required("boft_s")?;
    if !matches!(**scale.shape(), [_, 1] | [1, _]) {
        let expected = "(outputs, 1) or (1, outputs) expected";
        return Err(parts.wrong("boft_s", SizeError::Axes { expected }));
    }
    Ok(Read {
        layer: squares.layer(
            parts.module,
            &scaled(squares.differences(), 0.5),
            parts.per_output("boft_s")?,
        )?,
        alpha: None,
        is_bounded: false,
        exceeds_alpha: false,
    })
}
