//! Adapters of another strength, and with fewer factors. The tool's tests merge them.

use burn::tensor::{DType, Device, TensorData};
use burn_boft::tensors::{from_values, values};
use burn_boft::value::{AdapterLayer, SavedTensor, StrengthError};
use burn_boft::{Adapter, AdapterConfig, BoftConfig, Cayley, LayerKind, OftConfig};

use crate::common::{Matrix, Sizes, assert_close, noise, rotation};

const OUTPUTS: usize = 5;

/// BOFT of one layer, with a scale around one, and a saved bias.
fn boft(sizes: Sizes, dtype: DType) -> Adapter {
    let skew = from_values(noise(sizes.skew_len(), 3, 0.6), sizes.skew_shape(), dtype);
    let scale = noise(OUTPUTS, 5, 0.5).iter().map(|s| 1.0 + s).collect();
    let scale = from_values(scale, [OUTPUTS], dtype);
    let kind = Some(LayerKind::Linear);
    let layer = AdapterLayer::new("query", kind, skew, Some(scale)).unwrap();
    let bias = TensorData::new(vec![0.5f32; OUTPUTS], [OUTPUTS]);
    let bias = SavedTensor::new("query", "bias", bias);
    Adapter::from_parts(BoftConfig::new(), vec![layer], vec![bias]).unwrap()
}

/// The dense rotation of the only layer.
fn dense(adapter: &Adapter, d: usize) -> Vec<f64> {
    let layer = &adapter.layers()[0];
    let blocks = adapter.rotation(layer, [d, OUTPUTS], &Device::flex());
    let spans = blocks.unwrap().unwrap().spans();
    let [_, span, _] = spans.dims();
    let numbers = values(&spans.into_data());
    let mut dense = Matrix::zeros(d, d);
    for (at, number) in numbers.into_iter().enumerate() {
        let (row, column) = (at / span, at % span);
        *dense.at(row, row / span * span + column) = number;
    }
    dense.values
}

#[test]
fn a_strength_multiplies_every_q_and_raises_every_scale() {
    for (m, dtype, tolerance) in [
        (1, DType::F64, 1e-13),
        (2, DType::F64, 1e-13),
        (3, DType::F32, 2e-6),
    ] {
        let sizes = Sizes { d: 32, b: 4, m };
        let adapter = boft(sizes, dtype);
        for strength in [-1.0, 0.0, 0.7, 3.0] {
            let strong = adapter
                .clone()
                .with_strength(strength, &Device::flex())
                .unwrap();
            let skew: Vec<_> = values(adapter.layers()[0].skew())
                .iter()
                .map(|v| v * strength)
                .collect();
            let expected = rotation(sizes, &skew);
            let what = format!("{m} factors at {strength}");
            assert_close(&what, &dense(&strong, 32), &expected.values, tolerance);
            let scale = |adapter: &Adapter| values(adapter.layers()[0].scale().unwrap());
            let powers: Vec<_> = scale(&adapter).iter().map(|s| s.powf(strength)).collect();
            assert_close(&what, &scale(&strong), &powers, tolerance);
            assert_eq!(
                strong.tensors(),
                adapter.tensors(),
                "biases are taken whole"
            );
            assert_eq!(strong.config(), adapter.config());
        }
        let same = adapter.clone().with_strength(1.0, &Device::flex()).unwrap();
        assert_eq!(same.layers(), adapter.layers());
    }
}

/// The radius bounds `Q` before it is multiplied, also where a strength above one would exceed it.
#[test]
fn a_coft_radius_acts_before_the_strength_and_not_after_it() {
    let sizes = Sizes { d: 24, b: 4, m: 1 };
    let radius = 0.5;
    let skew = noise(sizes.skew_len(), 3, 0.6);
    let data = from_values(skew.clone(), sizes.skew_shape(), DType::F64);
    let layer = AdapterLayer::new("query", None, data, None).unwrap();
    let config = OftConfig::new().with_coft_radius(radius);
    let adapter = Adapter::from_parts(config, vec![layer], Vec::new()).unwrap();
    let bound = radius / (sizes.blocks() as f64).sqrt();
    let bounded = skew.chunks(sizes.packed()).flat_map(|block| {
        let norm = (2.0 * block.iter().map(|v| v * v).sum::<f64>()).sqrt();
        assert!(norm > bound, "the radius acts");
        block.iter().map(move |v| v * bound / norm)
    });
    let bounded: Vec<_> = bounded.collect();
    for strength in [-2.0, 0.5, 4.0] {
        let strong = adapter
            .clone()
            .with_strength(strength, &Device::flex())
            .unwrap();
        let scaled: Vec<_> = bounded.iter().map(|v| v * strength).collect();
        let expected = rotation(sizes, &scaled);
        assert_close("bounded", &dense(&strong, 24), &expected.values, 1e-13);
        let AdapterConfig::Oft(config) = strong.config() else {
            panic!("{}", strong.config());
        };
        assert_eq!((config.coft_radius, config.cayley), (None, Cayley::Exact));
    }
}

/// `x·F_2·F_1·F_0`: the last of the stored factors meets activations first.
#[test]
fn the_factors_that_are_kept_are_those_that_activations_meet_first() {
    let sizes = Sizes { d: 32, b: 4, m: 3 };
    let adapter = boft(sizes, DType::F64);
    let skew = values(adapter.layers()[0].skew());
    for kept in 0..=3 {
        let some = adapter.clone().with_factors(kept).unwrap();
        let mut expected = skew.clone();
        expected[..(3 - kept) * sizes.blocks() * sizes.packed()].fill(0.0);
        assert_close(
            "kept",
            &dense(&some, 32),
            &rotation(sizes, &expected).values,
            1e-13,
        );
        assert_eq!(some.layers()[0].scale(), adapter.layers()[0].scale());
        assert_eq!(some.layers() == adapter.layers(), kept == 3);
    }
    // A rotation of outputs, `F_2·F_1·F_0·W`, meets the first of the stored factors first.
    let layer = adapter.layers()[0].clone();
    let layer = AdapterLayer::new("query", layer.kind(), layer.skew().clone(), None).unwrap();
    let layer = layer.with_output_axis().unwrap();
    let outputs = Adapter::from_parts(BoftConfig::new(), vec![layer], Vec::new()).unwrap();
    let some = outputs.with_factors(1).unwrap();
    let mut expected = skew;
    expected[sizes.blocks() * sizes.packed()..].fill(0.0);
    assert_eq!(values(some.layers()[0].skew()), expected);
}

#[test]
fn strengths_and_factors_that_an_adapter_cannot_have_are_refused() {
    let sizes = Sizes { d: 32, b: 4, m: 2 };
    let adapter = || boft(sizes, DType::F32);
    for strength in [f64::NAN, f64::INFINITY] {
        let error = adapter()
            .with_strength(strength, &Device::flex())
            .unwrap_err();
        assert!(matches!(error, StrengthError::NotFinite { .. }), "{error}");
    }
    assert_eq!(
        adapter().with_factors(3).unwrap_err(),
        StrengthError::Factors {
            path: "query".into(),
            kept: 3,
            n_butterfly_factor: 2
        }
    );
    let error = adapter().with_strength(1e39, &Device::flex()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "`query` would have numbers beyond f32 at a strength of {}; use a smaller one",
            1e39
        )
    );
    let scaled = |first: f32| {
        let layer = adapter().layers()[0].clone();
        let scale = TensorData::new(vec![first, 1.0, 2.0, 0.5, 1.5], [OUTPUTS]);
        let layer = AdapterLayer::new("query", layer.kind(), layer.skew().clone(), Some(scale));
        Adapter::from_parts(BoftConfig::new(), vec![layer.unwrap()], Vec::new()).unwrap()
    };
    for (scale, strength, is_there) in [
        (-0.5, 0.5, false),
        (-0.5, 2.0, true),
        (0.0, -1.0, false),
        (0.0, 0.5, true),
    ] {
        let strong = scaled(scale).with_strength(strength, &Device::flex());
        match strong {
            Ok(_) => assert!(is_there, "{scale} to the power of {strength}"),
            Err(StrengthError::Scale { output: 0, .. }) => assert!(!is_there),
            Err(error) => panic!("{error}"),
        }
    }
    let config = OftConfig::new().with_coft_radius(-1.0);
    let layer = adapter().layers()[0].skew().clone();
    let skew = from_values(values(&layer)[..48].to_vec(), [1, 8, 6], DType::F32);
    let layer = AdapterLayer::new("query", None, skew, None).unwrap();
    let adapter = Adapter::from_parts(config, vec![layer], Vec::new()).unwrap();
    let error = adapter.with_strength(0.5, &Device::flex()).unwrap_err();
    assert!(matches!(error, StrengthError::Settings(_)), "{error}");
}

#[test]
fn an_adapter_in_f64_has_the_same_numbers() {
    let sizes = Sizes { d: 32, b: 4, m: 2 };
    let adapter = boft(sizes, DType::F32);
    let wide = adapter.clone().in_f64();
    let [one, other] = [&adapter.layers()[0], &wide.layers()[0]];
    assert_eq!(
        (one.skew().dtype(), other.skew().dtype()),
        (DType::F32, DType::F64)
    );
    assert_eq!(values(one.skew()), values(other.skew()));
    assert_eq!(one.scale().map(values), other.scale().map(values));
    let expected = rotation(sizes, &values(one.skew()));
    assert_close("f64", &dense(&wide, 32), &expected.values, 1e-13);
}
