//! The engine's operations on fixed numbers, for a program that counts instructions: `count.sh` beside this file.
//!
//! It is a test without a harness, so that `cargo test` builds it like everything else and runs each operation once. With the
//! name of an operation and a number, it runs that one so many times.

use std::env;

use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_boft::ops::{Blocks, Direction, PerRequest, Route, Side, linear_requests};

/// Inputs and outputs of the layer, and its tokens. The outputs and the tokens do not fill whole vectors. A product is just large
/// enough for several threads.
const D_INPUT: usize = 192;
const D_OUTPUT: usize = 260;
const TOKENS: usize = 149;
/// The channels of small operations. Threads that wake and sleep take a thousand instructions or two, now more, now less, and that
/// has to be little beside what is counted.
const MANY: usize = 32 * D_INPUT;

struct Operation {
    name: &'static str,
    block_size: usize,
    factors: usize,
    /// How many channels are rotated.
    d_input: usize,
    /// Whether it differentiates.
    backward: bool,
    /// Runs it once, and returns a number of the result.
    run: fn(&Inputs) -> f64,
}

/// Numbers in the names are the block size, and the number of factors where it is not one.
const OPERATIONS: &[Operation] = &[
    forward("cayley-4", (4, 1, MANY), cayley),
    forward("cayley-32", (32, 1, D_INPUT), cayley),
    backward("cayley-backward-4", (4, 1, MANY), cayley_backward),
    backward("cayley-backward-32", (32, 1, D_INPUT), cayley_backward),
    forward("spans-4x2", (4, 2, MANY), spans),
    forward("spans-4x4", (4, 4, MANY), spans),
    forward("weight-left-4x2", (4, 2, D_INPUT), weight_left),
    forward("weight-left-32", (32, 1, D_INPUT), weight_left),
    forward("weight-right-4x2", (4, 2, D_INPUT), weight_right),
    forward("weight-right-32", (32, 1, D_INPUT), weight_right),
    backward("step-4", (4, 1, D_INPUT), step),
    backward("step-4x2", (4, 2, D_INPUT), step),
    backward("step-4x4", (4, 4, D_INPUT), step),
    backward("step-32", (32, 1, D_INPUT), step),
    backward("step-scale-4x2", (4, 2, D_INPUT), step_with_scale),
    backward("step-neumann-32", (32, 1, D_INPUT), step_of_a_polynomial),
    backward("step-activation-4x2", (4, 2, D_INPUT), step_by_activations),
    backward("step-conv-4x2", (4, 2, 9 * CHANNELS), step_of_a_convolution),
    backward("step-conv-32", (32, 1, 9 * CHANNELS), step_of_a_convolution),
    backward(
        "step-conv-neumann-32",
        (32, 1, 9 * CHANNELS),
        step_of_a_convolution_with_a_polynomial,
    ),
    forward("weight-left-4x2-bf16", (4, 2, D_INPUT), weight_left_in_half),
    forward("requests-4x2", (4, 2, D_INPUT), requests),
];

/// Channels of a convolution with kernels of 3×3, and the side of its input.
const CHANNELS: usize = 32;
const SIDE: usize = 19;

const fn forward(
    name: &'static str,
    (block_size, factors, d_input): (usize, usize, usize),
    run: fn(&Inputs) -> f64,
) -> Operation {
    Operation {
        name,
        block_size,
        factors,
        d_input,
        backward: false,
        run,
    }
}

const fn backward(
    name: &'static str,
    sizes: (usize, usize, usize),
    run: fn(&Inputs) -> f64,
) -> Operation {
    Operation {
        backward: true,
        ..forward(name, sizes, run)
    }
}

fn main() {
    let mut arguments = env::args().skip(1);
    let chosen = arguments.next();
    let chosen = OPERATIONS
        .iter()
        .find(|operation| Some(operation.name) == chosen.as_deref());
    let times = arguments.next().and_then(|times| times.parse().ok());
    match (chosen, times) {
        (Some(operation), Some(times)) => {
            let inputs = Inputs::new(operation);
            let sum: f64 = (0..times).map(|_: u32| (operation.run)(&inputs)).sum();
            println!("{sum:e}");
        }
        _ => OPERATIONS.iter().for_each(|operation| {
            let result = (operation.run)(&Inputs::new(operation));
            println!("{} {result:e}", operation.name);
            assert!(result.is_finite() && result != 0.0, "{}", operation.name);
        }),
    }
}

/// What the operations compute with.
struct Inputs {
    skew: Tensor<3>,
    block_size: usize,
    input: Tensor<2>,
    weight: Tensor<2>,
    scale: Tensor<1>,
    gradient: Tensor<2>,
}

impl Inputs {
    fn new(operation: &Operation) -> Self {
        let (b, m) = (operation.block_size, operation.factors);
        let device = match operation.backward {
            true => Device::flex().autodiff(),
            false => Device::flex(),
        };
        Self {
            skew: noise([m, operation.d_input / b, b * (b - 1) / 2], &device),
            block_size: b,
            input: noise([TOKENS, D_INPUT], &device),
            weight: noise([D_INPUT, D_OUTPUT], &device),
            scale: noise([D_OUTPUT], &device),
            gradient: noise([TOKENS, D_OUTPUT], &device),
        }
    }

    fn blocks(&self) -> Blocks {
        Blocks::cayley(self.skew.clone(), self.block_size)
    }
}

fn cayley(inputs: &Inputs) -> f64 {
    number(inputs.blocks().values())
}

fn spans(inputs: &Inputs) -> f64 {
    number(inputs.blocks().spans())
}

fn cayley_backward(inputs: &Inputs) -> f64 {
    let skew = inputs.skew.clone().require_grad();
    let values = Blocks::cayley(skew.clone(), inputs.block_size).values();
    let gradients = values.powi_scalar(3).sum().backward();
    skew.grad(&gradients).map_or(f64::NAN, number)
}

fn weight_left(inputs: &Inputs) -> f64 {
    let (weight, scale) = (inputs.weight.clone(), inputs.scale.clone());
    number(inputs.blocks().weight(weight, Some(scale), Side::Left))
}

/// A weight with outputs in rows, and an input, go the same way.
fn weight_right(inputs: &Inputs) -> f64 {
    let input = inputs.input.clone();
    number(
        inputs
            .blocks()
            .rotate(input, Side::Right, Direction::Forward),
    )
}

fn weight_left_in_half(inputs: &Inputs) -> f64 {
    let weight = inputs.weight.clone().cast(FloatDType::BF16);
    let rotated = inputs.blocks().weight(weight, None, Side::Left);
    number(rotated.cast(FloatDType::F32))
}

/// One request for each row, every third of which takes no rotation.
fn requests(inputs: &Inputs) -> f64 {
    let spans = inputs.blocks().spans();
    let choices: Vec<_> = (0..TOKENS).map(|row| (row % 3 > 0).then_some(0)).collect();
    let scales = PerRequest::new(vec![inputs.scale.clone()], choices.clone());
    let none = PerRequest::new(Vec::new(), vec![None; TOKENS]);
    let rotations = PerRequest::new(vec![spans], choices);
    let (input, weight) = (inputs.input.clone(), inputs.weight.clone());
    number(linear_requests(input, weight, rotations, scales, none))
}

fn step(inputs: &Inputs) -> f64 {
    layer(inputs, Blocks::cayley, None, Route::Weight)
}

fn step_with_scale(inputs: &Inputs) -> f64 {
    let scale = inputs.scale.clone().require_grad();
    layer(inputs, Blocks::cayley, Some(scale), Route::Weight)
}

fn step_of_a_polynomial(inputs: &Inputs) -> f64 {
    let polynomial = |skew, block_size| Blocks::neumann(skew, block_size, 5);
    layer(inputs, polynomial, None, Route::Weight)
}

fn step_by_activations(inputs: &Inputs) -> f64 {
    layer(inputs, Blocks::cayley, None, Route::Activation)
}

/// Forward and backward pass of a layer in the middle of a model.
fn layer(
    inputs: &Inputs,
    blocks: fn(Tensor<3>, usize) -> Blocks,
    scale: Option<Tensor<1>>,
    route: Route,
) -> f64 {
    differentiated(inputs, blocks, |blocks| {
        let input = inputs.input.clone().require_grad();
        let output = blocks.linear(input, inputs.weight.clone(), scale, None, route);
        (output * inputs.gradient.clone()).sum()
    })
}

fn step_of_a_convolution(inputs: &Inputs) -> f64 {
    convolved(inputs, Blocks::cayley)
}

fn step_of_a_convolution_with_a_polynomial(inputs: &Inputs) -> f64 {
    convolved(inputs, |skew, block_size| {
        Blocks::neumann(skew, block_size, 5)
    })
}

fn convolved(inputs: &Inputs, blocks: fn(Tensor<3>, usize) -> Blocks) -> f64 {
    differentiated(inputs, blocks, |blocks| {
        let device = inputs.input.device();
        let input = noise([1, CHANNELS, SIDE, SIDE], &device).require_grad();
        let weight = noise([CHANNELS, CHANNELS, 3, 3], &device);
        let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
        let output = blocks.conv2d(input, weight, None, None, options);
        output.clone().mul(noise(output.dims(), &device)).sum()
    })
}

/// The last number of the gradient of the skew.
fn differentiated(
    inputs: &Inputs,
    blocks: fn(Tensor<3>, usize) -> Blocks,
    loss: impl FnOnce(Blocks) -> Tensor<1>,
) -> f64 {
    let skew = inputs.skew.clone().require_grad();
    let gradients = loss(blocks(skew.clone(), inputs.block_size)).backward();
    skew.grad(&gradients).map_or(f64::NAN, number)
}

/// Numbers between −0.1 and 0.1, which are the same on every machine.
fn noise<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let mut state = 0x9E37_79B9u32;
    let numbers: Vec<f32> = (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 * 0.2 - 0.1
        })
        .collect();
    Tensor::from_data(TensorData::new(numbers, shape), device)
}

/// The last number of a tensor, so that nothing of it can be left out.
fn number<const D: usize>(tensor: Tensor<D>) -> f64 {
    let data = tensor.into_data();
    let last = data.as_slice::<f32>().ok().and_then(<[f32]>::last);
    last.map_or(f64::NAN, |&last| last.into())
}
