//! The scale of a layer in PEFT's files of BOFT and of old OFT.

use burn::tensor::TensorData;

use crate::config::LayerKind;
use crate::tensors::values;
use crate::value::mismatch::{SizeError, Wrong};

/// A scale, and the kind of layer that its shape means: (out, 1) is linear, (1, out) a convolution.
///
/// PEFT keeps the two shapes apart since it added BOFT, so that old files load. One output has the same shape in both,
/// and then the kind stays open.
///
/// # Shapes
///
/// - `s`: `[d_output, 1]` or `[1, d_output]`
///
/// # Errors
///
/// [`Wrong::Tensor`]: any other shape, and a scale without numbers.
///
/// # References
///
/// `reset_boft_parameters` and the two `update_layer` in `src/peft/tuners/boft/layer.py` of PEFT 0.21.2.
pub(super) fn read(key: String, s: &TensorData) -> Result<(Vec<f64>, Option<LayerKind>), Wrong> {
    let kind = match **s.shape() {
        [1, 1] => None,
        [o, 1] if o > 0 => Some(LayerKind::Linear),
        [1, o] if o > 0 => Some(LayerKind::Conv2d),
        _ => {
            let expected = "(outputs, 1) or (1, outputs) expected";
            return Err(Wrong::Tensor {
                key,
                shape: s.shape().to_vec(),
                reason: SizeError::Axes { expected },
            });
        }
    };
    Ok((values(s), kind))
}
