//! An adapted weight computed by hand, from the dense rotation of the numbers that a model holds.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Tensor;
use burn_boft::model::LayerPlan;
use burn_boft::{AdapterConfig, Cayley, LayerKind, OftConfig};

use super::models::{numbers, set};
use super::{Matrix, Sizes, noise, rotation, skew_matrix};

/// The largest distance of two outputs, relative to the largest number of the second.
pub fn relative(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    assert!(actual.iter().all(|value| value.is_finite()));
    let size = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    let pairs = actual.iter().zip(expected);
    let distance = pairs.fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
    assert!(size > 0.0, "an output of zeros shows nothing");
    distance / size
}

/// The path of a parameter of a layer, which may be the model itself.
pub fn parameter(layer: &str, name: &str) -> String {
    match layer {
        "" => name.to_string(),
        layer => format!("{layer}.{name}"),
    }
}

/// The dense rotation of a layer, from the numbers of its adapter.
fn dense(layer: &LayerPlan, config: &AdapterConfig, skew: &[f64]) -> Matrix {
    let sizes = Sizes {
        d: layer.butterfly.d_input(),
        b: layer.butterfly.block_size(),
        m: layer.butterfly.n_butterfly_factor(),
    };
    let copies = match layer.butterfly.block_share() {
        true => layer.butterfly.block_num(),
        false => 1,
    };
    let skew = &skew.repeat(copies);
    let terms = match config {
        AdapterConfig::Oft(OftConfig {
            cayley: Cayley::Neumann { terms },
            ..
        }) => *terms,
        _ => return rotation(sizes, skew),
    };
    assert_eq!(terms, 5, "the oracle knows the polynomial of five terms");
    let mut dense = Matrix::zeros(sizes.d, sizes.d);
    for (k, packed) in skew.chunks(sizes.packed()).enumerate() {
        let q = skew_matrix(packed, sizes.b);
        let mut power = Matrix::identity(sizes.b);
        for coefficient in [1.0, 2.0, 2.0, 2.0, 1.0] {
            for row in 0..sizes.b {
                for column in 0..sizes.b {
                    *dense.at(k * sizes.b + row, k * sizes.b + column) +=
                        coefficient * power.get(row, column);
                }
            }
            power = power.matmul(&q);
        }
    }
    dense
}

/// The weight of a layer rotated by hand: `R·W·diag(s)`, of a convolution `diag(s)·W·Rᵀ`, and of an embedding `W·R`.
pub fn rotated_weight(
    layer: &LayerPlan,
    config: &AdapterConfig,
    adapted: &BTreeMap<String, Vec<f64>>,
) -> Vec<f64> {
    let number = |name: &str| adapted.get(&parameter(&layer.path, name)).cloned();
    let (d, o) = (layer.butterfly.d_input(), layer.butterfly.d_output());
    let base = number("weight").unwrap();
    let rotation = dense(layer, config, &number("weight.boft.skew").unwrap());
    let scale = number("weight.boft.scale").unwrap_or(vec![1.0; o]);
    let (mut weight, inner) = match layer.kind {
        LayerKind::Linear => (rotation.matmul(&Matrix::new(d, o, base)), 1),
        LayerKind::Conv2d => (Matrix::new(o, d, base).matmul(&rotation.transpose()), d),
        LayerKind::Embedding => (Matrix::new(o, d, base).matmul(&rotation), d),
        other => panic!("no oracle for {}", other.in_words()),
    };
    let numbers = weight.values.iter_mut().enumerate();
    numbers.for_each(|(i, value)| *value *= scale[i / inner % o]);
    weight.values
}

/// Moves the numbers of every adapter away from where they start.
pub fn perturbed<M: Module>(mut model: M) -> M {
    let paths: Vec<_> = numbers(&model).into_keys().collect();
    let ends = [
        ("weight.boft.skew", 0.0, 0.3),
        ("weight.boft.scale", 1.0, 0.25),
    ];
    for (seed, path) in (100..).zip(&paths) {
        for (_, start, amplitude) in ends.iter().filter(|(end, ..)| path.ends_with(end)) {
            model = set(model, path, |old| {
                let moved = noise(old.len(), seed, *amplitude);
                moved.into_iter().map(|x| start + x).collect()
            });
        }
    }
    model
}

/// All numbers of an output, to be compared.
pub fn flat<const D: usize>(output: Tensor<D>) -> Tensor<1> {
    let count = output.shape().num_elements();
    output.reshape([count])
}
