//! `x·W + bias` with a weight that is not rotated.

use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};

use super::backend::{BoftBackend, is_listed, multiplies};
use super::precision::{dequantized, is_quantized, reshaped};

/// `x·W + bias` with a weight that is not rotated, and may be quantized.
///
/// On the CPU (`flex`) it does without clearing and copying the output, which Burn's product does. Other backends tune their
/// products for each device. With a packed weight, the backward pass keeps that and not the floats that Burn makes of
/// it.
///
/// # Shapes
///
/// - input: `[…, d]`
/// - weight: `[d, o]`
/// - bias: `[o]`
/// - result: `[…, o]`
///
/// # Numerics
///
/// On the CPU a sum starts from the bias, elsewhere the bias is added to the rounded product.
pub(crate) fn product<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let device = input.device();
    let is_packed = is_quantized(weight.dtype());
    if !is_listed(device.as_dispatch()) || !is_packed && !multiplies(device.as_dispatch()) {
        return burn::tensor::module::linear(input, weight, bias);
    }
    let [d, d_output] = weight.dims();
    let mut shape = input.shape();
    let rows = shape[..D - 1].iter().product();
    shape[D - 1] = d_output;
    let input = reshaped::<D, 2>(input, [rows, d]).into_dispatch();
    let weight = weight.into_dispatch();
    let output = match is_packed {
        true => {
            let output = <Dispatch as BoftBackend>::boft_packed_product(input, weight);
            with_bias(Tensor::from_dispatch(output), bias)
        }
        false => {
            let bias = bias.map(Tensor::into_dispatch).into();
            Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_product(input, weight, bias))
        }
    };
    reshaped(output, shape)
}

/// Adds a bias of `[o]`, which may be quantized, to each row of a `[rows, o]` tensor, to whose precision it is cast.
pub(super) fn with_bias(output: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    match bias {
        Some(bias) => {
            let dtype = FloatDType::from(output.dtype());
            output + dequantized(bias).cast(dtype).unsqueeze::<2>()
        }
        None => output,
    }
}
