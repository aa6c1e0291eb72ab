//! LyCORIS's `diag-oft` and `boft`, which rotate the outputs of a layer.
//!
//! With `A` a block of `oft_blocks` and `q = A − Aᵀ`, without the half that PEFT has, LyCORIS computes
//! `r = (I + q)(I − q)⁻¹`, the transpose of this crate's block of `q`. `diag-oft` multiplies the rows of a weight by `rᵀ`
//! and `boft` by `r`, so that `Q = q` for one and `Q = −q` for the other.
//!
//! `alpha` bounds the norm of all blocks of a layer together: where `‖q‖ + 1e-8` is beyond `alpha` times the outputs, `q` is
//! scaled back to that. Zero is no bound. `rescale` multiplies the rotated rows.
//!
//! The factors of `boft` join the same halves of blocks as the ones here, but number a block's channels by pairs, the first
//! of each half and then the second, where here one half follows the other.
//!
//! Files: `lycoris/modules/diag_oft.py`, `lycoris/modules/boft.py`, `lycoris/functional/diag_oft.py` and
//! `lycoris/functional/boft.py` of LyCORIS 4.1.3; their formulas are those of 3.2 (commit f49d30d6).

use super::parts::{EPSILON, Parts, Read, Squares, norm, scaled};
use super::table::Dialect;
use crate::value::mismatch::{Mismatch, SizeError};

/// Reads a layer of `diag-oft`.
///
/// # Errors
///
/// [`Mismatch`]: tensors are missing or have other sizes.
pub(super) fn diag_oft(parts: &Parts) -> Result<Read, Mismatch> {
    let squares = parts.squares(Dialect::LycorisDiagOft)?;
    let q = squares.differences();
    read(parts, &squares, q)
}

/// Reads a layer of `boft`.
///
/// # Errors
///
/// [`Mismatch`]: tensors are missing or have other sizes.
pub(super) fn boft(parts: &Parts) -> Result<Read, Mismatch> {
    let squares = parts.squares(Dialect::LycorisBoft)?;
    let b = squares.sizes[2];
    if !b.is_multiple_of(2) {
        let expected = "blocks of an even size expected, which LyCORIS makes";
        let (name, _) = Dialect::LycorisBoft.rotation();
        return Err(parts.wrong(name, SizeError::Squares { expected }));
    }
    let q = scaled(squares.differences(), -1.0);
    read(parts, &squares, halves(&q, b))
}

fn read(parts: &Parts, squares: &Squares, q: Vec<f64>) -> Result<Read, Mismatch> {
    let alpha = parts.alpha()?;
    let [_, n, b] = squares.sizes;
    let bound = alpha * (n * b) as f64;
    let length = norm(&q) + EPSILON;
    let is_bounded = bound > 0.0 && length > bound;
    let q = match is_bounded {
        true => scaled(q, bound / length),
        false => q,
    };
    let layer = squares.layer(parts.module, &q, parts.per_output("rescale")?)?;
    Ok(Read {
        layer: layer.with_output_axis()?,
        alpha: Some(alpha),
        is_bounded,
        exceeds_alpha: alpha > 0.0 && length > alpha,
    })
}

/// Square blocks of an even size whose channels are numbered by halves instead of by pairs: channel `(half, i)` is number
/// `half·b/2 + i` and was number `2i + half`.
fn halves(squares: &[f64], b: usize) -> Vec<f64> {
    let pair = |channel: usize| channel % (b / 2) * 2 + channel / (b / 2);
    let blocks = squares.chunks_exact(b * b);
    let block = |square: &[f64]| {
        let at = |place: usize| square[pair(place / b) * b + pair(place % b)];
        (0..b * b).map(at).collect::<Vec<_>>()
    };
    blocks.flat_map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_channels_become_two_halves() {
        // Number `4·row + column`, of channels 0, 1 of the first pair and 2, 3 of the second.
        let numbers: Vec<_> = (0..16).map(f64::from).collect();
        let expected =
            [0, 2, 1, 3].map(|row| [0, 2, 1, 3].map(|column| f64::from(row * 4 + column)));
        assert_eq!(halves(&numbers, 4), expected.concat());
    }
}
