//! Whether a scale is trained, which PEFT's format cannot say: its BOFT always has one.
//!
//! An adapter without scales is written with ones, as PEFT would make them, and one line of text beside the tensors says that
//! they are not trained. PEFT does not read that text, and leaves it out when it saves in its turn.

use std::collections::BTreeMap;

use super::keys::Format;
use crate::value::layer::AdapterLayer;

const KEY: &str = "burn_boft.scale";
const UNTRAINED: &str = "untrained";

/// The line for an adapter of BOFT whose layers have no scale.
pub(super) fn note(format: Format, layers: &[AdapterLayer]) -> Option<(String, String)> {
    let is_scaled = |layer: &AdapterLayer| layer.scale.is_some();
    let is_noted = format == Format::Boft && !layers.is_empty() && !layers.iter().any(is_scaled);
    is_noted.then(|| (KEY.to_string(), UNTRAINED.to_string()))
}

/// Takes the scales out again where the line says so and all of them are ones.
pub(super) fn restore(layers: &mut [AdapterLayer], metadata: &BTreeMap<String, String>) {
    let is_noted = metadata.get(KEY).is_some_and(|text| text == UNTRAINED);
    if is_noted && !layers.iter().any(AdapterLayer::scales) {
        layers.iter_mut().for_each(|layer| layer.scale = None);
    }
}
