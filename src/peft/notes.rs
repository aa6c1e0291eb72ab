//! Scales in PEFT's files, and whether they are trained, which the format cannot say: PEFT's BOFT always has one.
//!
//! An adapter without scales is written with ones, as PEFT would make them, and one line of text beside the tensors says that
//! they are not trained. PEFT does not read that text, and leaves it out when it saves in its turn.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::keys::Format;
use crate::config::LayerKind;
use crate::tensors::values;
use crate::value::layer::AdapterLayer;
use crate::value::mismatch::{SizeError, Wrong};

/// The entry of the metadata of the safetensors file. A load that does not know it reads scales of ones, which compute
/// the same.
const KEY: &str = "burn_boft.scale";
/// The text of the entry where no layer has a scale. There is no other.
const UNTRAINED: &str = "untrained";

/// The line for an adapter of BOFT whose layers have no scale.
pub(super) fn note(format: Format, layers: &[AdapterLayer]) -> Option<(String, String)> {
    let is_scaled = |layer: &AdapterLayer| layer.scale.is_some();
    let is_noted = format == Format::Boft && !layers.is_empty() && !layers.iter().any(is_scaled);
    is_noted.then(|| (KEY.to_string(), UNTRAINED.to_string()))
}

/// Takes the scales out again where the line says so and all of them are ones.
///
/// The numbers are looked at as well, because other tools copy metadata along when they change tensors: a scale that
/// somebody has trained since is kept.
pub(super) fn restore(layers: &mut [AdapterLayer], metadata: &BTreeMap<String, String>) {
    let is_noted = metadata.get(KEY).is_some_and(|text| text == UNTRAINED);
    if is_noted && !layers.iter().any(AdapterLayer::scales) {
        layers.iter_mut().for_each(|layer| layer.scale = None);
    }
}

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
