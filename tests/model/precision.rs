//! Base weights in half precision.

use burn::module::Param;
use burn::nn;
use burn::tensor::{DType, Device};
use burn_boft::{BoftLinear, inject, merge};

use super::oracle::boft;
use crate::common::host;
use crate::common::models::{distance, linear, numbers, precisions, rows};

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
