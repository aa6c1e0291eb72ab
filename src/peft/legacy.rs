//! Layouts of older versions of PEFT: OFT's squares of PEFT 0.14 to 0.15.2, BOFT's permutations of 0.11 and 0.12.
//!
//! | written by | tensors | here |
//! |---|---|---|
//! | BOFT of PEFT 0.11, 0.12 | `boft_P` `[m, d, d]` beside `boft_R`, `boft_s` | the permutations are left out |
//! | OFT of PEFT 0.13 and older | `oft_r` without `oft_s` | refused: the rotation is another |
//! | OFT of PEFT 0.14 to 0.15.2 | `oft_r` `[n, b, b]`, `oft_s` `[d_output, 1]` | read as BOFT with one factor |
//! | OFT of PEFT 0.16, 0.17 | `oft_R.weight`, as today | read as today, with the Neumann series of that time |
//!
//! PEFT 0.16 and later do not read the squares. What is converted or left out is an entry of
//! `LoadReport::converted`.

use burn::tensor::TensorData;
use serde_json::{Map, Value};

use super::config_json::{self, ConfigError};
use super::keys::{Layout, key};
use super::scale;
use crate::config::{Block, BoftConfig};
use crate::tensors::{from_values, values, widened};
use crate::value::layer::{AdapterLayer, Axis, check_sizes, pack};
use crate::value::mismatch::{SizeError, Wrong};

/// What the report says of a stored permutation.
pub(super) fn permutation_note(key: &str) -> String {
    format!(
        "`{key}` is left out: PEFT 0.12 and older stored the permutation, which follows from the sizes"
    )
}

/// OFT as PEFT 0.14 to 0.15.2 stored it: full squares `A` of which only the skew-symmetric part `Q = ½(A − Aᵀ)` counts, the
/// exact Cayley map, and a scale. That is BOFT with one factor.
///
/// COFT of that time bounded the square itself, `‖A‖_F ≤ eps·⌈o/n⌉² / √rows` for `o` outputs and `n` blocks, and did so before
/// each forward pass. The numbers of a file are scaled back once, which gives the same rotation.
///
/// # References
///
/// `src/peft/tuners/oft/layer.py` of PEFT 0.15.2.
pub(super) struct Squares {
    /// How the settings cut the axis. Only the radius needs it: the shape of the tensor has the block size.
    block: Block,
    /// Whether one square serves all blocks of a layer.
    block_share: bool,
    /// PEFT's `eps`, where `coft` is set.
    coft_radius: Option<f64>,
}

/// The settings of a file with squares, as BOFT's.
///
/// `module_dropout` becomes BOFT's dropout, because PEFT 0.14 to 0.15.2 still applied it. The Cayley map is the exact
/// one: `use_cayley_neumann` came with PEFT 0.16.
///
/// # Errors
///
/// [`ConfigError`], as for OFT of today.
pub(super) fn settings(json: &Map<String, Value>) -> Result<(BoftConfig, Squares), ConfigError> {
    let fields = config_json::Fields(json);
    let oft = config_json::read_oft(&fields)?;
    let squares = Squares {
        block: oft.block,
        block_share: oft.block_share,
        coft_radius: oft.coft_radius,
    };
    let mut boft = BoftConfig::new().with_dropout(fields.number("module_dropout", 0.0)?);
    (boft.block, boft.init, boft.selection) = (oft.block, oft.init, oft.selection);
    Ok((boft, squares))
}

impl Squares {
    /// Reads the layer of these tensors.
    ///
    /// # Shapes
    ///
    /// - `r`: `[n, b, b]`, or `[1, b, b]` where the blocks share their numbers
    /// - `s`: `[d_output, 1]`
    ///
    /// # Errors
    ///
    /// [`Wrong::Tensor`]: shapes that this layout does not have, or a shared block whose radius is not certain.
    pub(super) fn read(
        &self,
        path: &str,
        r: &TensorData,
        s: &TensorData,
    ) -> Result<AdapterLayer, Wrong> {
        let shape = r.shape().to_vec();
        let wrong = |reason| Wrong::Tensor {
            key: key(path, Layout::Squares.rotation()),
            shape: shape.clone(),
            reason,
        };
        let [rows, b] = self.sizes(&shape).map_err(wrong)?;
        let (scale, _) = scale::read(key(path, "oft_s"), s)?;
        let mut squares = values(r);
        if let Some(radius) = self.radius([rows, b], scale.len()).map_err(wrong)? {
            project(&mut squares, rows, b, radius);
        }
        let dtype = widened(r.dtype());
        Ok(AdapterLayer {
            path: path.to_string(),
            // That version wrote (out, 1) for convolutions as well.
            kind: None,
            axis: Axis::Input,
            block_size: b,
            block_share: self.block_share,
            d_output: Some(scale.len()),
            skew: from_values(pack(&squares, b), [1, rows, b * (b - 1) / 2], dtype),
            scale: Some(from_values(scale.clone(), [scale.len()], dtype)),
        })
    }

    /// The rows of blocks and the block size of a shape.
    ///
    /// # Errors
    ///
    /// - [`SizeError::Axes`]: not three axes.
    /// - [`SizeError::Squares`]: the two last axes differ, or there are no blocks.
    /// - [`SizeError::Blocks`]: several blocks where the settings say that one is shared.
    /// - [`SizeError::Width`]: more channels than any layer has.
    fn sizes(&self, shape: &[usize]) -> Result<[usize; 2], SizeError> {
        let [rows, b, columns] = shape[..] else {
            let expected = "blocks of rows and columns are three axes";
            return Err(SizeError::Axes { expected });
        };
        if b != columns || b == 0 || rows == 0 {
            let expected = "blocks must be squares";
            return Err(SizeError::Squares { expected });
        }
        if self.block_share && rows != 1 {
            let expected = "one block";
            return Err(SizeError::Blocks {
                expected,
                found: rows,
            });
        }
        check_sizes([1, rows, b])?;
        Ok([rows, b])
    }

    /// COFT's radius of that time, `eps·⌈o/n⌉²`, which grew with the outputs per block. None without COFT, and for blocks of
    /// one channel, whose numbers have no effect.
    ///
    /// Of a shared block the file does not hold `n`. PEFT replaced a count `r` that does not divide the width `n·b` by its
    /// nearest divisor. A count that divides `b` divides every such width, so it is `n`. Of any other one, `r` blocks of `b`
    /// channels and `r − 1` of them have the same settings and the same tensor, and different radii.
    ///
    /// # Errors
    ///
    /// [`SizeError::SharedRadius`]: one block is shared, and the settings give its size, or a count that does not divide it.
    fn radius(&self, [rows, b]: [usize; 2], d_output: usize) -> Result<Option<f64>, SizeError> {
        let Some(eps) = self.coft_radius.filter(|_| b > 1) else {
            return Ok(None);
        };
        let blocks = match (self.block_share, self.block) {
            (false, _) => rows,
            (true, Block::Count(count)) if b.is_multiple_of(count) => count,
            (true, _) => return Err(SizeError::SharedRadius),
        };
        Ok(Some(eps * (d_output.div_ceil(blocks) as f64).powi(2)))
    }

    /// What the report says of a layer that was read.
    pub(super) fn note(&self, path: &str) -> String {
        let rest = match self.coft_radius {
            Some(_) => ", its numbers scaled back to the radius of that time",
            None => "",
        };
        format!("`{path}` has the squares of PEFT 0.14 to 0.15.2: it is BOFT with one factor{rest}")
    }
}

/// COFT of PEFT 0.14 to 0.15.2: every square within the radius, its symmetric part counted.
///
/// Today's COFT bounds `‖Q‖_F` instead, so it must not be applied to these numbers.
fn project(squares: &mut [f64], rows: usize, b: usize, radius: f64) {
    let radius = radius / (rows as f64).sqrt();
    for square in squares.chunks_exact_mut(b * b) {
        let norm = square.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > radius {
            square.iter_mut().for_each(|x| *x *= radius / norm);
        }
    }
}
