//! What the numbers of an adapter say against its configuration: the numbers decide.

use super::layer::{AdapterLayer, SavedTensor};
use super::mismatch::{Mismatch, Wrong};
use super::report::LoadReport;
use crate::config::{AdapterConfig, Block};
use crate::rotation::{Method, factors};

/// Biases of layers that are not adapted belong to `Bias::All`.
pub(crate) fn check_biases(
    layers: &[AdapterLayer],
    tensors: &[SavedTensor],
    mismatch: &mut Mismatch,
) {
    for tensor in tensors {
        let layer = layers.iter().find(|layer| layer.path == tensor.module);
        if let Some(o) = layer.and_then(|layer| layer.d_output)
            && tensor.name == "bias"
            && **tensor.data.shape() != [o]
        {
            mismatch.wrong.push(Wrong::Bias {
                path: tensor.module.clone(),
                shape: tensor.data.shape().to_vec(),
                d_output: o,
            });
        }
    }
}

/// Lets the configuration say what the tensors are: they decide, and the report tells.
pub(crate) fn reconcile(
    config: &mut AdapterConfig,
    layers: &[AdapterLayer],
    report: &mut LoadReport,
) {
    let said = Method::unchecked(config).n_butterfly_factor();
    let differ = layers
        .iter()
        .filter(|layer| layer.n_butterfly_factor() != said);
    for layer in differ {
        let (path, m) = (&layer.path, layer.n_butterfly_factor());
        report.converted.push(format!(
            "`{path}` has {}, not the {said} of the configuration: PEFT without its CUDA kernel trains one and does not \
             say so",
            factors(m)
        ));
    }
    if !layers.is_empty() {
        let m = same(layers.iter().map(AdapterLayer::n_butterfly_factor)).unwrap_or(said);
        let is_scaled = layers.iter().any(|layer| layer.scale.is_some());
        config.set_factors_and_scale(m, is_scaled);
    }
    let method = Method::unchecked(config);
    let mut differ = false;
    for layer in layers {
        let (b, d) = (layer.block_size, layer.d_input());
        if let Some(expected) = expected_block_size(&method, d).filter(|expected| *expected != b) {
            differ = true;
            let path = &layer.path;
            report.converted.push(format!(
                "`{path}` has blocks of {b}, not those of {expected} that the configuration means"
            ));
        }
    }
    if differ && let Some(b) = same(layers.iter().map(|layer| layer.block_size)) {
        config.set_block(Block::Size(b));
    }
}

/// The block size that PEFT makes of the configuration for an axis, as far as it is known.
pub(crate) fn expected_block_size(method: &Method, d_input: Option<usize>) -> Option<usize> {
    match d_input {
        Some(d) => method.block_size(d),
        None => method.fixed_block_size(),
    }
}

fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
