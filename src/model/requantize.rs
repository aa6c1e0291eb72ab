//! [`merge_quantized`]: folds adapters into quantized weights, and reports what rounding them again costs.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};

use burn::module::{Module, ParamGroup, Quantizer};
use burn::tensor::quantization::{Calibration, QuantScheme, compute_q_params, compute_range};
use burn::tensor::{DType, Tensor};

use super::merge::{MergeError, merge};
use super::report::matrix;
use super::walk::{Parameter, walk};
use crate::config::LayerKind;
use crate::ops::{dequantized, largest_rank, low_rank};
use crate::rotation::Rotation;

/// What quantizing merged weights again costs, as [`merge_quantized`] measured it. `Display` prints a table.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Requantization {
    /// One row per adapted layer whose base was quantized, in the model's order.
    pub layers: Vec<LayerRequantization>,
}

/// One layer of a [`Requantization`].
///
/// Each error is `‖quantized − exact‖ / ‖exact‖` in Frobenius norms, so 0.01 is one percent.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerRequantization {
    /// The dotted path of the layer.
    pub path: String,
    /// How the base was quantized, and how the merged weight is.
    pub scheme: QuantScheme,
    /// How far the adapter moved the weight: `‖W' − W‖ / ‖W‖`.
    pub change: f64,
    /// The error of the merged weight.
    pub error: f64,
    /// The error that a LoRA of this rank would have, whose change is the nearest of its rank, made as large as the
    /// adapter's.
    pub lora_error: f64,
    /// The largest rank of a LoRA with no more numbers than the adapter, and at least 1.
    pub lora_rank: usize,
}

impl Display for Requantization {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let paths = self.layers.iter().map(|layer| layer.path.chars().count());
        let width = paths.max().unwrap_or(0).max(5);
        write!(
            f,
            "{:width$}  {:>9}  {:>9}  {:>9}  {:>15}",
            "layer", "numbers", "change", "error", "error of LoRA"
        )?;
        for layer in &self.layers {
            let bits = layer.scheme.size_bits_value();
            let lora = format!("{:.4} (r={})", layer.lora_error, layer.lora_rank);
            write!(
                f,
                "\n{:width$}  {:>9}  {:>9.4}  {:>9.4}  {lora:>15}",
                layer.path,
                format!("{bits} bits"),
                layer.change,
                layer.error,
            )?;
        }
        Ok(())
    }
}

/// Folds every adapter into its base weight as [`merge`] does, and quantizes the merged weights of quantized bases again.
///
/// Each weight gets the scheme that its base has. Weights of float bases are merged and stay floats. The report says what
/// the rounding costs in each layer, and what it would cost after merging a LoRA that changes the weight as much. With a
/// scale per tensor the LoRA costs more, since it widens the range of the numbers and a rotation keeps it. With a scale for
/// every few numbers the two cost about the same.
///
/// # Numerics
///
/// Ranges are calibrated by minimum and maximum, as in Burn's [`Calibration::MinMax`].
///
/// # Errors
///
/// As [`merge`].
///
/// # Examples
///
/// ```
/// use burn::module::{Module, ParamGroup, Quantizer};
/// use burn::nn::LinearConfig;
/// use burn::tensor::quantization::{Calibration, QuantValue};
/// use burn_boft::{BoftConfig, BoftLinear, Init, inject, merge_quantized};
///
/// # let device = burn::tensor::Device::flex();
/// let scheme = device.settings().quantization.scheme.with_value(QuantValue::Q8S);
/// let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
/// let layer = BoftLinear::from(LinearConfig::new(64, 32).init(&device));
/// let layer = layer.quantize_weights_group(&mut quantizer, ParamGroup::from_path("weight"));
/// let config = BoftConfig::new()
///     .with_target_modules("all-linear")
///     .with_init(Init::Random { seed: 7 });
/// let (merged, report) = merge_quantized(inject(layer, config)?)?;
/// assert_eq!(report.layers[0].scheme.value, QuantValue::Q8S);
/// assert!(report.layers[0].error < 0.01);
/// println!("{report}");
/// # drop(merged);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # References
///
/// Qiu et al., *Orthogonal Finetuning Made Scalable* (OFTv2), 2025.
pub fn merge_quantized<M: Module>(model: M) -> Result<(M, Requantization), MergeError> {
    let bases = walk(&model);
    let mut quantized = merge(model)?;
    let merged = walk(&quantized);
    let merged_weights = merged.by_path();
    let mut layers = Vec::new();
    let mut paths: HashMap<QuantScheme, Vec<String>> = HashMap::new();
    for (base, _, rotation) in bases.adapted() {
        let DType::QFloat(scheme) = base.stored.dtype() else {
            continue;
        };
        let merged = merged_weights[base.path()];
        let layer = match rotation.kind() {
            LayerKind::Linear | LayerKind::Embedding => {
                measured::<2>(base, merged, rotation, scheme)
            }
            LayerKind::Conv2d => measured::<4>(base, merged, rotation, scheme),
        };
        layers.push(layer);
        let of_scheme = paths.entry(scheme).or_default();
        of_scheme.push(base.path().to_string());
    }
    drop(merged_weights);
    drop(merged);
    for (scheme, paths) in paths {
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
        quantized = quantized.quantize_weights_group(&mut quantizer, ParamGroup::from_paths(paths));
    }
    Ok((quantized, Requantization { layers }))
}

/// Measures one layer.
fn measured<const D: usize>(
    base: &Parameter,
    merged: &Parameter,
    rotation: &Rotation,
    scheme: QuantScheme,
) -> LayerRequantization {
    let shape: [usize; D] = merged.stored.tensor::<D>().dims();
    let base = matrix::<D>(base.stored.tensor(), rotation.kind());
    let merged_matrix = matrix::<D>(merged.stored.tensor(), rotation.kind());
    let change = merged_matrix.clone() - base.clone();
    let [d_input, d_output] = base.dims();
    let rank = largest_rank(rotation.parameters(), [d_input, d_output]);
    let error = |weight: Tensor<2>| {
        // Blocks of numbers that share a scale lie along the axes of the stored weight.
        let stored = match rotation.kind() {
            LayerKind::Linear => weight.reshape(shape),
            LayerKind::Conv2d | LayerKind::Embedding => weight.transpose().reshape(shape),
        };
        relative_error(stored, &scheme)
    };
    let relative_change = norm(change.clone()) / norm(base.clone());
    let [left, right] = low_rank(change, rank);
    LayerRequantization {
        path: merged.owner().to_string(),
        scheme,
        change: relative_change,
        error: error(merged_matrix),
        lora_error: error(base + left.matmul(right)),
        lora_rank: rank,
    }
}

/// `‖quantized − exact‖ / ‖exact‖`.
fn relative_error<const D: usize>(exact: Tensor<D>, scheme: &QuantScheme) -> f64 {
    let range = compute_range(scheme, &exact, &Calibration::MinMax);
    let parameters = compute_q_params(scheme, range);
    let rounded = dequantized(exact.clone().quantize(scheme, parameters));
    norm(rounded - exact.clone()) / norm(exact)
}

/// The Frobenius norm.
fn norm<const D: usize>(tensor: Tensor<D>) -> f64 {
    let sum: f64 = tensor.powf_scalar(2.0).sum().into_scalar();
    sum.sqrt()
}
