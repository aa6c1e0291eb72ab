//! What PEFT's format cannot say, as lines of text beside the tensors.
//!
//! - PEFT's BOFT always has a scale. An adapter without scales is written with ones, as PEFT would make them, and a line says
//!   that they are not trained.
//! - PEFT trains the numbers of `Q`. An adapter with a scaled skew is written with the numbers of `Q` too, which compute the same,
//!   and a line says that a multiple of them was trained.
//!
//! PEFT does not read these lines, and leaves them out when it saves in its turn.

use std::collections::BTreeMap;

use super::keys::Format;
use crate::config::AdapterConfig;
use crate::value::layer::AdapterLayer;

/// Entries of the metadata of the safetensors file, each with its only text.
const UNTRAINED_SCALE: (&str, &str) = ("burn_boft.scale", "untrained");
const SCALED_SKEW: (&str, &str) = ("burn_boft.skew", "scaled");

/// The lines for an adapter.
pub(super) fn write(
    format: Format,
    config: &AdapterConfig,
    layers: &[AdapterLayer],
) -> impl Iterator<Item = (String, String)> {
    let is_scaled = |layer: &AdapterLayer| layer.scale.is_some();
    let no_scale = format == Format::Boft && !layers.is_empty() && !layers.iter().any(is_scaled);
    let lines = [
        (no_scale, UNTRAINED_SCALE),
        (config.scaled_skew(), SCALED_SKEW),
    ];
    lines
        .into_iter()
        .filter(|(applies, _)| *applies)
        .map(|(_, (key, text))| (key.to_string(), text.to_string()))
}

/// Does what the lines say: takes scales out again that are not trained, and tells the configuration of a scaled skew.
///
/// The scales are looked at as well, because other tools copy metadata along when they change tensors: a scale that
/// somebody has trained since is kept.
pub(super) fn restore(
    metadata: &BTreeMap<String, String>,
    config: &mut AdapterConfig,
    layers: &mut [AdapterLayer],
) {
    let has = |(key, text): (&str, &str)| metadata.get(key).is_some_and(|found| found == text);
    if has(UNTRAINED_SCALE) && !layers.iter().any(AdapterLayer::scales) {
        layers.iter_mut().for_each(|layer| layer.scale = None);
    }
    config.set_scaled_skew(has(SCALED_SKEW));
}
