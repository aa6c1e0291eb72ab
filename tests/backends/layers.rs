//! The kinds of layers, with numbers that every precision holds exactly.

use burn::module::Param;
use burn::nn;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_boft::ops::{Base, Pass, Route, route};
use burn_boft::{AdapterConfig, BoftConfig, BoftConv2d, BoftLinear, OftConfig};

use crate::cell::{Outcome, check};
use crate::common::by_hand::flat;
use crate::common::{noise, tensor};
use crate::precision::Precision;

/// A row of the table: its name, how it is computed, and its check.
pub struct Row {
    pub layer: &'static str,
    pub rotated: &'static str,
    pub check: fn(Precision, &Device) -> Outcome,
}

pub const ROWS: &[Row] = &[
    Row {
        layer: "`BoftLinear`, few tokens",
        rotated: "the input",
        check: |precision, device| boft_linear(FEW, Route::Activation, precision, device),
    },
    Row {
        layer: "`BoftLinear`, many tokens",
        rotated: "the weight (the input, if the weight is quantized)",
        check: |precision, device| boft_linear(MANY, Route::Weight, precision, device),
    },
    Row {
        layer: "`burn::nn::Linear`",
        rotated: "the weight",
        check: |precision, device| check(&plain_linear(), precision, device),
    },
    Row {
        layer: "`burn::nn::Conv2d`",
        rotated: "the weight, along `c_in/groups · kh · kw`",
        check: |precision, device| check(&plain_conv2d(), precision, device),
    },
    Row {
        layer: "`BoftConv2d`",
        rotated: "the weight, along `c_in/groups · kh · kw`",
        check: |precision, device| check(&boft_conv2d(), precision, device),
    },
    Row {
        layer: "`burn::nn::Embedding` (OFT)",
        rotated: "the weight, along `d_model`",
        check: |precision, device| check(&plain_embedding(), precision, device),
    },
];

/// Channels that the rotation mixes: three spans of two factors with blocks of four.
const D: usize = 24;
const OUTPUT: usize = 40;
const FEW: usize = 3;
const MANY: usize = 67;
/// Two images of five rows and four columns.
const IMAGES: [usize; 4] = [2, D / 4, 5, 4];

/// A layer, the adapter that it gets, what goes in, and what comes out.
pub struct Layer<M, const R: usize> {
    pub build: fn(DType, &Device) -> M,
    pub config: AdapterConfig,
    /// The shape of the input.
    pub input: [usize; R],
    pub forward: fn(&M, Tensor<R>) -> Tensor<1>,
}

fn boft() -> AdapterConfig {
    let config = BoftConfig::new()
        .with_block_size(4)
        .with_n_butterfly_factor(2);
    config.with_target_modules(".*").into()
}

fn oft() -> AdapterConfig {
    let config = OftConfig::new().with_block_size(4);
    config.with_target_modules(".*").into()
}

/// Multiples of 1/64 below two in magnitude, which have eight binary digits and so are the same in bf16 and in f64.
pub fn exact<const R: usize>(
    shape: [usize; R],
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Tensor<R> {
    let values = noise(shape.iter().product(), seed, 1.0);
    let values: Vec<f64> = values.iter().map(|x| (x * 64.0).round() / 64.0).collect();
    tensor(&values, shape, dtype, device)
}

fn param<const R: usize>(
    shape: [usize; R],
    seed: u64,
    (dtype, device): (DType, &Device),
) -> Param<Tensor<R>> {
    Param::from_tensor(exact(shape, seed, dtype, device))
}

pub fn linear(dtype: DType, device: &Device) -> nn::Linear {
    nn::Linear {
        weight: param([D, OUTPUT], 1, (dtype, device)),
        bias: Some(param([OUTPUT], 2, (dtype, device))),
    }
}

fn plain_linear() -> Layer<nn::Linear, 2> {
    Layer {
        build: linear,
        config: boft(),
        input: [7, D],
        forward: |layer, input| flat(layer.forward(input)),
    }
}

/// A layer that takes this route for this many tokens.
fn boft_linear(tokens: usize, taken: Route, precision: Precision, device: &Device) -> Outcome {
    let sizes = [D, OUTPUT];
    assert_eq!(route(tokens, sizes, Pass::Training, Base::Float), taken);
    let layer = Layer::<BoftLinear, 2> {
        build: |dtype, device| linear(dtype, device).into(),
        config: boft(),
        input: [tokens, D],
        forward: |layer, input| flat(layer.forward(input)),
    };
    check(&layer, precision, device)
}

fn conv2d(dtype: DType, device: &Device) -> nn::conv::Conv2d {
    let config = nn::conv::Conv2dConfig::new([D / 4, 10], [2, 2]).with_stride([1, 2]);
    nn::conv::Conv2d {
        weight: param([10, D / 4, 2, 2], 1, (dtype, device)),
        bias: Some(param([10], 2, (dtype, device))),
        ..config.init(device)
    }
}

fn plain_conv2d() -> Layer<nn::conv::Conv2d, 4> {
    Layer {
        build: conv2d,
        config: boft(),
        input: IMAGES,
        forward: |layer, input| flat(layer.forward(input)),
    }
}

fn boft_conv2d() -> Layer<BoftConv2d, 4> {
    Layer {
        build: |dtype, device| conv2d(dtype, device).into(),
        config: boft(),
        input: IMAGES,
        forward: |layer, input| flat(layer.forward(input)),
    }
}

/// Its input are indices, which are the same for every precision.
fn plain_embedding() -> Layer<nn::Embedding, 1> {
    Layer {
        build: |dtype, device| nn::Embedding {
            weight: param([11, D], 1, (dtype, device)),
        },
        config: oft(),
        input: [1],
        forward: |layer, input| {
            let indices = Tensor::<2, Int>::from_data([[3, 9, 0], [7, 7, 10]], &input.device());
            flat(layer.forward(indices))
        },
    }
}
