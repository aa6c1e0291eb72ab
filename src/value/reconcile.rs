//! What the numbers of an adapter say against its configuration: the numbers decide.
//!
//! PEFT's configuration does not say what is in the file: without its CUDA kernel, PEFT trains one factor whatever
//! `boft_n_butterfly_factor` is, and its OFT adjusts the block size to each layer. The shapes of the tensors are what was
//! trained, so the configuration follows them, and the report has a line for each layer where it did.
//!
//! PEFT's files: `update_layer` in `src/peft/tuners/boft/layer.py`, which sets the factors to 1 where the kernel does
//! not load and leaves the configuration as it was, and `adjust_oft_parameters` in `src/peft/tuners/oft/layer.py`, both
//! of PEFT 0.21.2.

use std::collections::HashMap;

use super::layer::{AdapterLayer, SavedTensor};
use super::mismatch::{Mismatch, Wrong};
use super::report::LoadReport;
use crate::config::{AdapterConfig, Block};
use crate::rotation::{Method, factors};

/// Refuses biases that do not have as many numbers as their layer has outputs, as far as its scale says how many.
///
/// A layer of OFT has no scale, so its biases are compared with the model when the adapter is attached.
///
/// # Shapes
///
/// - a bias: `[d_output]`
pub(crate) fn check_biases(
    layers: &[AdapterLayer],
    tensors: &[SavedTensor],
    mismatch: &mut Mismatch,
) {
    let outputs = layers.iter().map(|layer| (&layer.path, layer.d_output));
    let outputs: HashMap<_, _> = outputs.collect();
    for tensor in tensors {
        if let Some(Some(o)) = outputs.get(&tensor.module).copied()
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
///
/// | the layers | the configuration afterwards |
/// |---|---|
/// | all have `m` factors | has `m` factors |
/// | have different numbers of factors | keeps its own |
/// | none has a scale | has none; otherwise it has one |
/// | all have the blocks that it means | keeps its size or count |
/// | do not, and all have one block size | has that size |
/// | do not, and have several block sizes | keeps its own |
///
/// A count of blocks that does not divide the width of a layer is not what the layer has: PEFT's BOFT refuses it. Such a count
/// comes from OFT, which replaces it by a divisor: the squares of PEFT 0.14 to 0.15.2 are read as BOFT.
///
/// OFT's block size is compared after the adjustment to the width of the layer, so a file of PEFT's with adjusted
/// blocks needs no line in the report. Without layers, nothing changes.
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
        let Some(meant) = other_blocks(&method, layer) else {
            continue;
        };
        differ = true;
        let (path, b) = (&layer.path, layer.block_size);
        report.converted.push(match meant {
            Block::Size(size) => format!(
                "`{path}` has blocks of {b}, not those of {size} that the configuration means"
            ),
            Block::Count(count) => format!(
                "`{path}` has {} blocks of {b}, not the {count} blocks of the configuration, which do not divide its channels",
                layer.skew.shape()[1]
            ),
        });
    }
    if differ && let Some(b) = same(layers.iter().map(|layer| layer.block_size)) {
        config.set_block(Block::Size(b));
    }
}

/// The blocks that the configuration means for a layer that has others: their size after PEFT's adjustment, or their count where
/// that does not divide the width of the layer, so that PEFT refuses it. None where the layer has the blocks that are meant, or
/// its width is not known.
pub(crate) fn other_blocks(method: &Method, layer: &AdapterLayer) -> Option<Block> {
    let other = |size: usize| (size != layer.block_size).then_some(Block::Size(size));
    match layer.d_input() {
        None => method.fixed_block_size().and_then(other),
        Some(d) => match method.block_size(d) {
            Some(size) => other(size),
            None => method.block_num().map(Block::Count),
        },
    }
}

/// The value that all are equal to. None where two differ, or where there are none.
fn same<T: PartialEq>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
