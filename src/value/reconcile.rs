//! What the numbers of an adapter say against its configuration: the numbers decide.

use super::layer::{AdapterLayer, SavedTensor, factors};
use super::mismatch::{Mismatch, Wrong};
use super::report::LoadReport;
use crate::config::{AdapterConfig, Block};
use crate::model::plan::adjust;

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
    if let AdapterConfig::Boft(boft) = config {
        let said = boft.n_butterfly_factor;
        let differ = layers
            .iter()
            .filter(|layer| layer.n_butterfly_factor() != said);
        for layer in differ {
            let (path, m) = (&layer.path, layer.n_butterfly_factor());
            report.converted.push(format!(
                "`{path}` has {}, not the {said} of the configuration: PEFT without its CUDA kernel trains one \
                 and does not say so",
                factors(m)
            ));
        }
        let is_scaled = layers.iter().any(|layer| layer.scale.is_some());
        let m = same(layers.iter().map(AdapterLayer::n_butterfly_factor)).unwrap_or(said);
        if !layers.is_empty() {
            config.set_factors_and_scale(m, is_scaled);
        }
    }
    let mut differ = false;
    for layer in layers {
        let (b, d) = (layer.block_size, layer.d_input());
        if let Some(expected) = expected_block_size(config, d).filter(|expected| *expected != b) {
            differ = true;
            let path = &layer.path;
            report.converted.push(format!(
                "`{path}` has blocks of {b}, not those of {expected} that the configuration means"
            ));
        }
    }
    if differ && let Some(b) = same(layers.iter().map(|layer| layer.block_size)) {
        config.set_block_size(b);
    }
}

/// The block size that PEFT makes of the configuration for an axis, as far as it is known.
pub(crate) fn expected_block_size(config: &AdapterConfig, d_input: Option<usize>) -> Option<usize> {
    match (config, d_input) {
        (AdapterConfig::Boft(config), d) => match (config.block, d) {
            (Block::Size(b), _) => Some(b),
            (Block::Count(n), Some(d)) if d.is_multiple_of(n) => Some(d / n),
            (Block::Count(_), _) => None,
        },
        (AdapterConfig::Oft(_), None) => None,
        (AdapterConfig::Oft(config), Some(d)) => Some(match config.block {
            Block::Size(b) => adjust(d, b),
            Block::Count(n) => d / adjust(d, n),
        }),
    }
}

fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
