//! Base weights in half precision, and quantized ones.

use burn::module::Param;
use burn::nn;
use burn::tensor::{DType, Device};
use burn_boft::{BoftLinear, inject, merge};

use super::oracle::boft;
use crate::common::host;
use crate::common::models::{distance, linear, numbers, precisions, quantized, rows};

#[test]
fn merging_into_a_half_precision_base_rounds_once() {
    let device = Device::flex();
    for (dtype, digits) in [(DType::F16, 11), (DType::BF16, 8)] {
        let base = linear([24, 10], 3, dtype, &device);
        let values = numbers(&base);
        let wide = set_precision(&base, DType::F32);
        assert_eq!(numbers(&wide), values);
        let adapted = inject(base, boft()).unwrap();
        let precisions = precisions(&adapted);
        for (path, precision) in &precisions {
            let expected = if path.contains(".boft.") {
                DType::F32
            } else {
                dtype
            };
            assert_eq!(*precision, expected, "{path}");
        }
        let merged = merge(adapted.clone()).unwrap();
        assert_eq!(merged.weight.val().dtype(), dtype);
        let exact = numbers(&merge(inject(wide, boft()).unwrap()).unwrap());
        let half_unit = 2f64.powi(-digits);
        let pairs = numbers(&merged)["weight"]
            .clone()
            .into_iter()
            .zip(&exact["weight"]);
        let mut rounded = 0;
        for (actual, expected) in pairs {
            // A value next to a tie may round either way; subnormals of f16 have fewer digits.
            let bound = expected.abs() * half_unit * 1.01 + 1e-7;
            assert!(
                (actual - expected).abs() <= bound,
                "{actual} for {expected} in {dtype:?}"
            );
            rounded += usize::from(actual != *expected);
        }
        assert!(rounded > 100, "{dtype:?}");

        let input = rows([7, 24], 4, &device).cast(dtype);
        let expected = merged.forward(input.clone());
        for output in [
            adapted.forward(input.clone()),
            BoftLinear::from(adapted).forward(input),
        ] {
            assert_eq!(output.dtype(), dtype);
            let size = host(expected.clone())
                .iter()
                .fold(0.0, |max, v| f64::max(max, v.abs()));
            let drift = distance(output, expected.clone()) / size;
            println!("{dtype:?}: {drift:.1e}");
            assert!(drift <= 4.0 * half_unit, "{drift} in {dtype:?}");
        }
    }
}

fn set_precision(layer: &nn::Linear, dtype: DType) -> nn::Linear {
    nn::Linear {
        weight: Param::from_tensor(layer.weight.val().cast(dtype)),
        bias: layer
            .bias
            .as_ref()
            .map(|bias| Param::from_tensor(bias.val().cast(dtype))),
    }
}

#[test]
fn quantizing_the_base_keeps_the_adapter_and_almost_the_output() {
    let device = Device::flex();
    let base = BoftLinear::from(linear([24, 16], 3, DType::F32, &device));
    let adapted = inject(base.clone(), boft()).unwrap();
    let quantized = quantized(adapted.clone(), "weight", &device);
    assert!(matches!(precisions(&quantized)["weight"], DType::QFloat(_)));
    assert_eq!(
        numbers(&quantized)["weight.boft.skew"],
        numbers(&adapted)["weight.boft.skew"]
    );

    let input = rows([7, 24], 4, &device);
    let output = adapted.forward(input.clone());
    let drift = distance(quantized.forward(input.clone()), output.clone());
    println!("quantized: {drift:.1e}");
    // Eight bits of weights up to 0.41 err by up to 0.0016 each: 1e-2 over 24 inputs.
    assert!(drift > 0.0 && drift <= 0.02, "{drift}");
    assert!(distance(base.forward(input.clone()), output) > 0.1);

    let merged = merge(quantized.clone()).unwrap();
    assert_eq!(merged.weight.val().dtype(), DType::F32);
    let drift = distance(merged.forward(input.clone()), quantized.forward(input));
    assert!(drift <= 1e-5, "{drift}");
}
