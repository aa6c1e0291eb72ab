//! Runs one operation of the engine on fixed numbers, for a program that counts instructions.
//!
//! `count.sh` beside this file runs it under valgrind and compares the counts with those of `counts.txt`.

use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::ops::{Blocks, Direction, Route, Side};
use clap::{Parser, ValueEnum};

/// Runs one operation of the engine a number of times.
#[derive(Parser)]
struct Cli {
    /// The operation.
    #[arg(value_enum, required_unless_present = "list")]
    operation: Option<Operation>,
    /// How many times.
    #[arg(default_value_t = 1)]
    times: u32,
    /// Print the names of the operations.
    #[arg(long)]
    list: bool,
}

/// The operations. Numbers in their names are the block size, and the number of factors where it is not one.
#[derive(Clone, Copy, ValueEnum)]
enum Operation {
    Cayley4,
    Cayley32,
    CayleyBackward4,
    CayleyBackward32,
    ComposeSpans4x2,
    ComposeSpans4x4,
    WeightLeft4x2,
    WeightLeft32,
    WeightRight4x2,
    WeightRight32,
    Input4x2,
    Step4x1,
    Step4x2,
    Step32,
    StepScale4x2,
}

/// Inputs and outputs of the layer, and its tokens. Neither is a multiple of a vector.
const D_INPUT: usize = 192;
const D_OUTPUT: usize = 260;
const TOKENS: usize = 133;

fn main() {
    let cli = Cli::parse();
    if cli.list {
        for operation in Operation::value_variants() {
            let name = operation
                .to_possible_value()
                .map(|value| value.get_name().to_string());
            println!("{}", name.unwrap_or_default());
        }
    }
    let Some(operation) = cli.operation else {
        return;
    };
    let inputs = Inputs::new(operation);
    let mut sum = 0.0;
    for _ in 0..cli.times {
        sum += inputs.run(operation);
    }
    println!("{sum}");
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
    fn new(operation: Operation) -> Self {
        let (b, m) = operation.sizes();
        let device = match operation.is_backward() {
            true => Device::flex().autodiff(),
            false => Device::flex(),
        };
        Self {
            skew: noise([m, D_INPUT / b, b * (b - 1) / 2], &device),
            block_size: b,
            input: noise([TOKENS, D_INPUT], &device),
            weight: noise([D_INPUT, D_OUTPUT], &device),
            scale: noise([D_OUTPUT], &device),
            gradient: noise([TOKENS, D_OUTPUT], &device),
        }
    }

    fn blocks(&self, skew: Tensor<3>) -> Blocks {
        Blocks::cayley(skew, self.block_size)
    }

    /// Runs it once, and returns a number of the result.
    fn run(&self, operation: Operation) -> f64 {
        use Operation::*;
        match operation {
            Cayley4 | Cayley32 => number(self.blocks(self.skew.clone()).values()),
            ComposeSpans4x2 | ComposeSpans4x4 => number(self.blocks(self.skew.clone()).spans()),
            CayleyBackward4 | CayleyBackward32 => {
                let skew = self.skew.clone().require_grad();
                let values = self.blocks(skew.clone()).values();
                let gradients = values.clone().square().sum().backward();
                skew.grad(&gradients).map_or(f64::NAN, number)
            }
            WeightLeft4x2 | WeightLeft32 => {
                let blocks = self.blocks(self.skew.clone());
                let scale = Some(self.scale.clone());
                number(blocks.weight(self.weight.clone(), scale, Side::Left))
            }
            WeightRight4x2 | WeightRight32 => {
                let blocks = self.blocks(self.skew.clone());
                number(blocks.weight(self.input.clone(), None, Side::Right))
            }
            Input4x2 => {
                let blocks = self.blocks(self.skew.clone());
                number(blocks.rotate(self.input.clone(), Side::Right, Direction::Forward))
            }
            Step4x1 | Step4x2 | Step32 => self.step(None),
            StepScale4x2 => self.step(Some(self.scale.clone().require_grad())),
        }
    }

    /// Forward and backward pass of a layer in the middle of a model.
    fn step(&self, scale: Option<Tensor<1>>) -> f64 {
        let skew = self.skew.clone().require_grad();
        let input = self.input.clone().require_grad();
        let (weight, blocks) = (self.weight.clone(), self.blocks(skew.clone()));
        let output = blocks.linear(input, weight, scale, None, Route::Weight);
        let gradients = (output * self.gradient.clone()).sum().backward();
        skew.grad(&gradients).map_or(f64::NAN, number)
    }
}

impl Operation {
    /// The block size and the number of factors.
    fn sizes(self) -> (usize, usize) {
        use Operation::*;
        match self {
            Cayley4 | CayleyBackward4 | Step4x1 => (4, 1),
            Cayley32 | CayleyBackward32 | WeightLeft32 | WeightRight32 | Step32 => (32, 1),
            ComposeSpans4x2 | WeightLeft4x2 | WeightRight4x2 | Input4x2 | Step4x2
            | StepScale4x2 => (4, 2),
            ComposeSpans4x4 => (4, 4),
        }
    }

    fn is_backward(self) -> bool {
        use Operation::*;
        matches!(
            self,
            CayleyBackward4 | CayleyBackward32 | Step4x1 | Step4x2 | Step32 | StepScale4x2
        )
    }
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
    tensor.into_data().iter::<f64>().last().unwrap_or(f64::NAN)
}
