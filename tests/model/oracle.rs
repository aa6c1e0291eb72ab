//! The weight that a merged layer must have, computed in f64 with dense rotations from the adapter's numbers.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;
use burn_boft::model::{InjectPlan, LayerPlan};
use burn_boft::{
    AdapterConfig, BoftConfig, Cayley, Init, LayerKind, OftConfig, inject, merge, plan,
};

use crate::common::models::numbers;
use crate::common::{Matrix, Sizes, assert_close, cayley, skew_matrix};

pub const INIT: Init = Init::Random { seed: 11 };

pub fn boft() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_target_modules(".*")
}

pub fn oft() -> OftConfig {
    OftConfig::new().with_init(INIT).with_target_modules(".*")
}

/// The coefficients of PEFT's polynomial, from the table of `Cayley::Neumann`.
pub fn neumann(terms: usize) -> &'static [f64] {
    match terms {
        2 => &[1.0, 2.0],
        3 | 4 => &[1.0, 2.0, 2.0, 1.0],
        5 => &[1.0, 2.0, 2.0, 2.0, 1.0],
        6 => &[1.0, 2.0, 2.0, 2.0, 2.0, 1.0],
        _ => panic!("{terms}"),
    }
}

/// The coefficients of the polynomial of PEFT 0.16 and 0.17.
pub fn neumann_016(terms: usize) -> &'static [f64] {
    &[1.0, 2.0, 2.0, 2.0, 2.0, 2.0][..terms]
}

pub fn polynomial(packed: &[f64], b: usize, coefficients: &[f64]) -> Matrix {
    let q = skew_matrix(packed, b);
    let (mut block, mut power) = (Matrix::zeros(b, b), Matrix::identity(b));
    for &coefficient in coefficients {
        let scaled = power.values.iter().map(|value| coefficient * value);
        block
            .values
            .iter_mut()
            .zip(scaled)
            .for_each(|(sum, value)| *sum += value);
        power = power.matmul(&q);
    }
    block
}

/// The path of a layer's parameter. A model that is the layer itself has an empty path.
fn number_of(layer: &LayerPlan, name: &str) -> String {
    match layer.path.as_str() {
        "" => name.to_string(),
        path => format!("{path}.{name}"),
    }
}

/// The dense rotation of a layer.
fn rotation(layer: &LayerPlan, config: &AdapterConfig, skew: &[f64]) -> Matrix {
    let butterfly = layer.butterfly;
    let sizes = Sizes {
        d: butterfly.d_input(),
        b: butterfly.block_size(),
        m: butterfly.n_butterfly_factor(),
    };
    let copies = if butterfly.block_share() {
        butterfly.block_num()
    } else {
        1
    };
    let skew = skew.repeat(copies);
    assert_eq!(skew.len(), sizes.skew_len());
    let AdapterConfig::Oft(OftConfig { cayley: map, .. }) = config else {
        return crate::common::rotation(sizes, &skew);
    };
    let mut rotation = Matrix::zeros(sizes.d, sizes.d);
    for (k, packed) in skew.chunks(sizes.packed()).enumerate() {
        let block = match *map {
            Cayley::Exact => cayley(packed, sizes.b),
            Cayley::Neumann { terms } => polynomial(packed, sizes.b, neumann(terms)),
            Cayley::Neumann016 { terms } => polynomial(packed, sizes.b, neumann_016(terms)),
            other => panic!("no oracle for {other}"),
        };
        for row in 0..sizes.b {
            for column in 0..sizes.b {
                let start = k * sizes.b;
                *rotation.at(start + row, start + column) = block.get(row, column);
            }
        }
    }
    rotation
}

/// `R·W·diag(s)` of a linear layer, `diag(s)·W·Rᵀ` of a convolution.
fn oracle(
    layer: &LayerPlan,
    config: &AdapterConfig,
    before: &BTreeMap<String, Vec<f64>>,
) -> Vec<f64> {
    let number = |name: &str| before.get(&number_of(layer, name)).cloned();
    let (d, o) = (layer.butterfly.d_input(), layer.butterfly.d_output());
    let rotation = rotation(layer, config, &number("weight.boft.skew").unwrap());
    let scale = number("weight.boft.scale").unwrap_or(vec![1.0; o]);
    assert_eq!(layer.scale, matches!(config, AdapterConfig::Boft(_)));
    let base = number("weight").unwrap();
    match layer.kind {
        LayerKind::Linear => {
            let mut weight = rotation.matmul(&Matrix::new(d, o, base));
            weight
                .values
                .iter_mut()
                .enumerate()
                .for_each(|(i, value)| *value *= scale[i % o]);
            weight.values
        }
        LayerKind::Conv2d => {
            let mut weight = Matrix::new(o, d, base).matmul(&rotation.transpose());
            weight
                .values
                .iter_mut()
                .enumerate()
                .for_each(|(i, value)| *value *= scale[i / d]);
            weight.values
        }
        other => panic!("no oracle for {}", other.in_words()),
    }
}

/// Injects, merges, and compares every number with the oracle. f32 drifts by 5e-7.
pub fn assert_merges_as_the_oracle<M: Module>(
    model: M,
    config: impl Into<AdapterConfig>,
) -> (M, M, InjectPlan) {
    let config = config.into();
    let plan = plan(&model, &config).unwrap();
    let base = numbers(&model);
    let adapted = inject(model, &config).unwrap();
    let merged = merge(adapted.clone()).unwrap();
    let (before, after) = (numbers(&adapted), numbers(&merged));
    assert!(after.keys().eq(base.keys()));
    let mut untouched: BTreeSet<_> = base.keys().cloned().collect();
    for layer in &plan.layers {
        let weight = number_of(layer, "weight");
        let expected = oracle(layer, &config, &before);
        assert_close(&weight, &after[&weight], &expected, 2e-6);
        let moved = after[&weight].iter().zip(&base[&weight]);
        assert!(
            moved.fold(0.0, |max, (a, b)| f64::max(max, (a - b).abs())) > 0.01,
            "{weight}"
        );
        assert_eq!(before[&weight], base[&weight]);
        untouched.remove(&weight);
    }
    for path in untouched {
        assert_eq!(after[&path], base[&path], "{path}");
    }
    (adapted, merged, plan)
}
