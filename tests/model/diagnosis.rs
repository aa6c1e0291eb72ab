//! What `diagnose` measures.

use burn::module::Param;
use burn::nn;
use burn::tensor::{DType, Device};
use burn_boft::model::LayerDiagnosis;
use burn_boft::{AdapterConfig, BoftConfig, BoftLinear, Cayley, OftConfig, diagnose, inject};

use super::oracle::{boft, neumann, polynomial};
use crate::common::models::{Net, linear, numbers, set};
use crate::common::{Matrix, assert_close, devices, noise};

/// The measurements of a linear layer, 24 → 10, with the given skew.
fn diagnosed(config: impl Into<AdapterConfig>, skew: &[f64], device: &Device) -> LayerDiagnosis {
    let model = inject(linear([24, 10], 3, DType::F32, device), config).unwrap();
    let model = set(model, "weight.boft.skew", |_| skew.to_vec());
    diagnose(&model).layers[0].clone()
}

#[test]
fn diagnose_measures_the_largest_angle_and_norm_of_all_blocks() {
    // A block of two channels turns its plane by 2·atan t, and ‖Q‖₂ = t.
    let mut skew: Vec<f64> = (0..24).map(|k| 0.01 * f64::from(k)).collect();
    skew[17] = -1.5;
    let config = boft().with_block_size(2);
    for (backend, device) in devices() {
        let layer = diagnosed(config.clone(), &skew, &device);
        let measured = [layer.skew_norm, layer.largest_angle];
        assert_close(backend, &measured, &[1.5, 2.0 * 1.5f64.atan()], 1e-6);
        assert!(layer.orthogonality_defect <= 1e-6, "{backend}: {layer:?}");
    }
}

/// `Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹` over the normalised columns.
fn energy(weight: &Matrix) -> f64 {
    let column = |j: usize| {
        let column: Vec<f64> = (0..weight.rows).map(|i| weight.get(i, j)).collect();
        let norm = column.iter().map(|x| x * x).sum::<f64>().sqrt();
        column.into_iter().map(move |x| x / norm)
    };
    let distance = |i, j| {
        let squares = column(i).zip(column(j)).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let pairs = (0..weight.columns).flat_map(|i| (0..weight.columns).map(move |j| (i, j)));
    pairs
        .filter(|(i, j)| i != j)
        .map(|(i, j)| distance(i, j).recip())
        .sum()
}

#[test]
fn diagnose_shows_how_far_a_neumann_block_is_from_orthogonal() {
    let (b, terms) = (4, 3);
    let skew = noise(6 * 6, 21, 0.8);
    let config = OftConfig::new()
        .with_block_size(b)
        .with_cayley(Cayley::Neumann { terms })
        .with_target_modules(".*");
    let mut rotation = Matrix::zeros(24, 24);
    for (k, packed) in skew.chunks(6).enumerate() {
        let block = polynomial(packed, b, neumann(terms));
        for (row, column) in (0..b).flat_map(|i| (0..b).map(move |j| (i, j))) {
            *rotation.at(k * b + row, k * b + column) = block.get(row, column);
        }
    }
    let mut defect = rotation.transpose().matmul(&rotation);
    (0..24).for_each(|i| *defect.at(i, i) -= 1.0);
    let defect = defect
        .values
        .iter()
        .fold(0.0, |max, x| f64::max(max, x.abs()));
    assert!(defect > 0.1);
    for (backend, device) in devices() {
        let layer = diagnosed(config.clone(), &skew, &device);
        assert_close(backend, &[layer.orthogonality_defect], &[defect], 1e-6);
        let base = numbers(&linear([24, 10], 3, DType::F32, &device));
        let base = Matrix::new(24, 10, base["weight"].clone());
        let expected = [energy(&base), energy(&rotation.matmul(&base))];
        let measured = [layer.energy_before, layer.energy_after];
        assert_close(backend, &measured, &expected, 1e-5);
        assert!((expected[0] - expected[1]).abs() > 1e-3 * expected[0]);
    }
}

/// There are more rows than are compared at once, and the polynomial turns them in one direction only.
#[test]
fn diagnose_measures_the_energy_of_the_rows_of_an_embedding() {
    let (d, rows, terms) = (8, 1100, 5);
    let skew = noise(2 * 6, 22, 0.8);
    let config = OftConfig::new()
        .with_block_size(4)
        .with_cayley(Cayley::Neumann { terms })
        .with_target_modules(".*");
    let mut rotation = Matrix::zeros(d, d);
    for (k, packed) in skew.chunks(6).enumerate() {
        let block = polynomial(packed, 4, neumann(terms));
        for (row, column) in (0..4).flat_map(|i| (0..4).map(move |j| (i, j))) {
            *rotation.at(4 * k + row, 4 * k + column) = block.get(row, column);
        }
    }
    let table = Matrix::new(rows, d, noise(rows * d, 23, 1.0));
    let turned = table.matmul(&rotation);
    let expected = [energy(&table.transpose()), energy(&turned.transpose())];
    assert!((expected[0] - expected[1]).abs() > 1e-3 * expected[0]);
    for (backend, device) in devices() {
        let layer = nn::Embedding {
            weight: Param::from_tensor(table.to_tensor(DType::F32, &device)),
        };
        let model = inject(layer, &config).unwrap();
        let model = set(model, "weight.boft.skew", |_| skew.clone());
        let layer = &diagnose(&model).layers[0];
        let measured = [layer.energy_before, layer.energy_after];
        assert_close(backend, &measured, &expected, 1e-4);
    }
}

#[test]
fn diagnose_reports_nan_in_every_measurement_of_the_layer() {
    let config = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_target_modules(["hidden", "output"]);
    for (backend, device) in devices() {
        let model = inject(Net::<BoftLinear>::new(1, &device), &config).unwrap();
        let model = set(model, "hidden.weight.boft.skew", |mut numbers| {
            numbers[3] = f64::NAN;
            numbers
        });
        let layer = &diagnose(&model).layers[0];
        for number in [
            layer.orthogonality_defect,
            layer.skew_norm,
            layer.largest_angle,
            layer.energy_after,
        ] {
            assert!(number.is_nan(), "{backend}: {layer:?}");
        }
        assert!(layer.energy_before.is_finite());
    }
}
