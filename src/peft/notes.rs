//! What PEFT's format cannot say, as lines of text beside the tensors.
//!
//! - PEFT's BOFT always has a scale. An adapter without scales is written with ones, as PEFT would make them, and a line says
//!   that they are not trained.
//! - PEFT trains the numbers of `Q`. An adapter with a scaled skew is written with the numbers of `Q` too, which compute the same,
//!   and a line says that a multiple of them was trained.
//! - PEFT takes layers for what their types are. What a configuration declares of layers of other types is a line, with the names
//!   of the model.
//!
//! PEFT does not read these lines, and leaves them out when it saves in its turn.

use std::collections::BTreeMap;

use serde_json::json;

use super::keys::Format;
use crate::config::AdapterConfig;
use crate::value::LoadReport;
use crate::value::layer::AdapterLayer;

/// Entries of the metadata of the safetensors file, each with its only text.
const UNTRAINED_SCALE: (&str, &str) = ("burn_boft.scale", "untrained");
const SCALED_SKEW: (&str, &str) = ("burn_boft.skew", "scaled");
/// The entry of the kinds of layers, whose text is JSON: `[["Scaled","Linear"],["decoder.output",null]]`.
const LAYER_KINDS: &str = "burn_boft.layer_kinds";

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
    let kinds = &config.selection().layer_kinds;
    let kinds = (!kinds.is_empty()).then(|| (LAYER_KINDS.to_string(), json!(kinds).to_string()));
    lines
        .into_iter()
        .filter(|(applies, _)| *applies)
        .map(|(_, (key, text))| (key.to_string(), text.to_string()))
        .chain(kinds)
}

/// Does what the lines say: takes scales out again that are not trained, and tells the configuration of a scaled skew and of
/// the kinds of layers.
///
/// The scales are looked at as well, because other tools copy metadata along when they change tensors: a scale that
/// somebody has trained since is kept. Kinds that cannot be read are left out with a warning.
pub(super) fn restore(
    metadata: &BTreeMap<String, String>,
    config: &mut AdapterConfig,
    layers: &mut [AdapterLayer],
    report: &mut LoadReport,
) {
    let has = |(key, text): (&str, &str)| metadata.get(key).is_some_and(|found| found == text);
    if has(UNTRAINED_SCALE) && !layers.iter().any(AdapterLayer::scales) {
        layers.iter_mut().for_each(|layer| layer.scale = None);
    }
    config.set_scaled_skew(has(SCALED_SKEW));
    let kinds = metadata.get(LAYER_KINDS);
    match kinds.map(|text| serde_json::from_str(text)).transpose() {
        Ok(kinds) => config.selection_mut().layer_kinds = kinds.unwrap_or_default(),
        Err(_) => report.warnings.push(format!(
            "`{LAYER_KINDS}` in the metadata of the tensors cannot be read, so layers are taken for what their types say"
        )),
    }
}
