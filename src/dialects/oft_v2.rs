//! OneTrainer's OFT, plain and scaled, and sd-scripts' `networks.oft_v2`.
//!
//! Both store PEFT's packed triangles and compute PEFT's Neumann polynomial of five terms, whatever the numbers are. A linear
//! layer rotates its input by `R`, so its weight becomes `W·Rᵀ`. Of a convolution they rotate the weight to `W·R`: its rotation
//! is that of `−Q` here, because a polynomial of `−Q` is the transpose of that of `Q`.
//!
//! Scaled OFT, which the tensor `oft_R.scaled_oft` marks, divides the numbers by `2√(b−1)` first. It is trained here with
//! [`with_scaled_skew`](crate::OftConfig::with_scaled_skew).
//!
//! sd-scripts bounds the numbers (COFT) only while its own arguments ask for it, which a file does not carry, so none is
//! computed.
//!
//! Files: `modules/module/oft_utils.py` and `OFTModule` in `modules/module/LoRAModule.py` of OneTrainer at commit 23df3832, and
//! `networks/oft_v2.py` of sd-scripts at commit 091ece99.

use burn::tensor::TensorData;

use super::parts::{Parts, Read};
use super::table::{Dialect, SCALED};
use crate::config::Cayley;
use crate::tensors::{from_values, values, widened};
use crate::value::AdapterLayer;
use crate::value::layer::{block_size, check_sizes};
use crate::value::mismatch::{Mismatch, SizeError};

/// The polynomial of both programs, which no setting changes.
pub(super) const MAP: Cayley = Cayley::Neumann { terms: 5 };

/// Reads a layer.
///
/// # Shapes
///
/// - `oft_R.weight`: `[n, b(b−1)/2]`
///
/// # Errors
///
/// [`Mismatch`]: the tensor has other sizes, or the mark of scaled OFT says that it is none.
pub(super) fn read(parts: &Parts, dialect: Dialect) -> Result<Read, Mismatch> {
    let (name, _) = dialect.rotation();
    let data = parts.required(name)?;
    let [n, packed] = **data.shape() else {
        let expected = "blocks and packed numbers are two axes";
        return Err(parts.wrong(name, SizeError::Axes { expected }));
    };
    let b = block_size(packed).ok_or(SizeError::Packed { numbers: packed });
    let b = b.map_err(|reason| parts.wrong(name, reason))?;
    check_sizes([1, n, b]).map_err(|reason| parts.wrong(name, reason))?;
    let numbers = parts.floats(name, data)?;
    let numbers = from_values(numbers, [1, n, packed], widened(data.dtype()));
    let layer = match dialect {
        Dialect::ScaledOft => {
            let is_set = values(parts.required(SCALED)?) == [1.0];
            if !is_set {
                let expected = "one mark, which is set, expected";
                return Err(parts.wrong(SCALED, SizeError::Axes { expected }));
            }
            AdapterLayer::from_scaled_skew(parts.module, None, numbers, None)?
        }
        _ => AdapterLayer::new(parts.module, None, numbers, None)?,
    };
    Ok(Read {
        layer,
        alpha: None,
        is_bounded: false,
        exceeds_alpha: false,
    })
}

/// The numbers of the rotation of a convolution, `−Q`.
pub(super) fn reversed(skew: &TensorData) -> TensorData {
    let negated = values(skew).into_iter().map(|number| -number).collect();
    from_values(negated, skew.shape().to_vec(), skew.dtype())
}
