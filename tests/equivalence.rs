//! One rotation, every way to compute it: dense oracle ≡ activation route ≡ weight route ≡ merged, values
//! and gradients, on every backend.

mod common;

use burn::tensor::{DType, Device, Tensor};
use burn_boft::ops::{Blocks, Route, Side};
use common::{
    Matrix, Sizes, assert_close, few_sizes, host, kernel_devices, noise, rotation_with, tensor,
};

/// Drifts measured on 2 cores of x86-64 and on a software Vulkan adapter, worst case over this file, with the tolerance used:
///
/// | quantity | f64 | f32 |
/// |---|---|---|
/// | values | 1.6e-15 → 1e-12 | 5.8e-7 → 5e-6 |
/// | gradients | 3.4e-9 (of the differences) → 1e-7 | 7.9e-7 → 1e-5 |
struct Tolerance {
    value: f64,
    gradient: f64,
}

fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F64 => Tolerance {
            value: 1e-12,
            gradient: 1e-7,
        },
        _ => Tolerance {
            value: 5e-6,
            gradient: 1e-5,
        },
    }
}

/// One case: numbers that are nowhere zero, one, square or the identity.
struct Case {
    sizes: Sizes,
    d_output: usize,
    tokens: usize,
    skew: Vec<f64>,
    scale: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    input: Vec<f64>,
    /// The loss is the inner product of the output with these numbers.
    probe: Vec<f64>,
    dropped: Vec<f64>,
}

impl Case {
    fn new(sizes: Sizes, d_output: usize, tokens: usize) -> Self {
        let seed = (sizes.d * 131 + sizes.b * 17 + sizes.m) as u64;
        let blocks = sizes.m * sizes.blocks();
        Self {
            sizes,
            d_output,
            tokens,
            skew: noise(sizes.skew_len(), seed, 0.4),
            scale: noise(d_output, seed + 1, 0.5)
                .iter()
                .map(|v| 1.3 + v)
                .collect(),
            weight: noise(sizes.d * d_output, seed + 2, 1.0),
            bias: noise(d_output, seed + 3, 2.0),
            input: noise(tokens * sizes.d, seed + 4, 1.5),
            probe: noise(tokens * d_output, seed + 5, 1.0),
            dropped: vec![0.0; blocks],
        }
    }

    fn with_dropped(mut self) -> Self {
        let dropped = noise(self.dropped.len(), 7, 1.0);
        self.dropped = dropped.iter().map(|&v| f64::from(v > 0.2)).collect();
        assert!(self.dropped.contains(&1.0) && self.dropped.contains(&0.0));
        self
    }

    fn rotation(&self, skew: &[f64]) -> Matrix {
        let n = self.sizes.blocks();
        rotation_with(self.sizes, skew, |stage, k| {
            self.dropped[stage * n + k] == 1.0
        })
    }

    fn output(&self, input: &[f64], skew: &[f64], scale: &[f64], weight: &[f64]) -> Vec<f64> {
        let weight = Matrix::new(self.sizes.d, self.d_output, weight.to_vec());
        let effective = self.rotation(skew).matmul(&weight);
        let mut output = Matrix::new(self.tokens, self.sizes.d, input.to_vec()).matmul(&effective);
        for row in 0..self.tokens {
            for (column, (scale, bias)) in scale.iter().zip(&self.bias).enumerate() {
                *output.at(row, column) = output.get(row, column) * scale + bias;
            }
        }
        output.values
    }

    fn loss(&self, input: &[f64], skew: &[f64], scale: &[f64], weight: &[f64]) -> f64 {
        let output = self.output(input, skew, scale, weight);
        output.iter().zip(&self.probe).map(|(y, p)| y * p).sum()
    }
}

/// A few indices spread over a parameter.
fn sample(len: usize) -> Vec<usize> {
    let step = (len / 11).max(1);
    (0..len).step_by(step).chain([len - 1]).collect()
}

/// The gradient of `loss` at sampled indices, by central differences.
fn differences(values: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-6;
    let at = |index: usize, delta: f64| {
        let mut values = values.to_vec();
        values[index] += delta;
        loss(&values)
    };
    sample(values.len())
        .into_iter()
        .map(|index| (at(index, step) - at(index, -step)) / (2.0 * step))
        .collect()
}

fn sampled<const D: usize>(gradient: Tensor<D>) -> Vec<f64> {
    let values = host(gradient);
    sample(values.len())
        .into_iter()
        .map(|index| values[index])
        .collect()
}

/// A way to compute the layer.
type Compute = fn(&Inputs) -> Tensor<2>;

fn routes() -> Vec<(&'static str, Compute)> {
    vec![
        ("activation route", |i| {
            i.blocks()
                .linear(i.x(), i.w(), i.s(), i.bias(), Route::Activation)
        }),
        ("weight route", |i| {
            i.blocks()
                .linear(i.x(), i.w(), i.s(), i.bias(), Route::Weight)
        }),
        ("plain weight", |i| {
            let weight = i.blocks().weight(i.w(), i.s(), Side::Left);
            i.x().matmul(weight) + i.bias.clone().unsqueeze::<2>()
        }),
        ("convolution weight", |i| {
            let weight = i.blocks().weight(i.w().transpose(), i.s(), Side::Right);
            i.x().matmul(weight.transpose()) + i.bias.clone().unsqueeze::<2>()
        }),
        ("leading axes", |i| {
            let [tokens, d] = i.input.dims();
            let input = i.x().reshape([1, tokens, d]);
            let output = i
                .blocks()
                .linear(input, i.w(), i.s(), i.bias(), Route::Weight);
            let [_, _, o] = output.dims();
            output.reshape([tokens, o])
        }),
    ]
}

struct Inputs {
    input: Tensor<2>,
    weight: Tensor<2>,
    skew: Tensor<3>,
    scale: Tensor<1>,
    bias: Tensor<1>,
    mask: Tensor<2>,
    block_size: usize,
}

impl Inputs {
    fn new(case: &Case, dtype: DType, device: &Device) -> Self {
        let Case {
            sizes,
            d_output,
            tokens,
            ..
        } = *case;
        let track = |t: Tensor<2>| t.require_grad();
        Self {
            input: track(tensor(&case.input, [tokens, sizes.d], dtype, device)),
            weight: track(tensor(&case.weight, [sizes.d, d_output], dtype, device)),
            skew: tensor(&case.skew, sizes.skew_shape(), dtype, device).require_grad(),
            scale: tensor(&case.scale, [d_output], dtype, device).require_grad(),
            bias: tensor(&case.bias, [d_output], dtype, device),
            mask: tensor(&case.dropped, [sizes.m, sizes.blocks()], dtype, device),
            block_size: sizes.b,
        }
    }

    fn blocks(&self) -> Blocks {
        Blocks::cayley(self.skew.clone(), self.block_size).replace_by_identity(self.mask.clone())
    }

    fn x(&self) -> Tensor<2> {
        self.input.clone()
    }

    fn w(&self) -> Tensor<2> {
        self.weight.clone()
    }

    fn s(&self) -> Option<Tensor<1>> {
        Some(self.scale.clone())
    }

    fn bias(&self) -> Option<Tensor<1>> {
        Some(self.bias.clone())
    }
}

fn check(case: &Case, dtype: DType, gradients: bool) {
    let tolerance = tolerance(dtype);
    let Case {
        sizes,
        skew,
        scale,
        weight,
        input,
        ..
    } = case;
    let expected = case.output(input, skew, scale, weight);
    let expected_gradients = gradients.then(|| {
        [
            differences(skew, |skew| case.loss(input, skew, scale, weight)),
            differences(scale, |scale| case.loss(input, skew, scale, weight)),
            differences(input, |input| case.loss(input, skew, scale, weight)),
            differences(weight, |weight| case.loss(input, skew, scale, weight)),
        ]
    });
    for (backend, device) in kernel_devices() {
        // A GPU compiles every size anew: there, the kernels' precision and a few sizes.
        let is_gpu = !matches!(backend, "flex" | "ndarray");
        let tried: &[usize] = match few_sizes() {
            true => &[15, 24],
            false => &[15, 24, 32],
        };
        if is_gpu && (dtype == DType::F64 || !tried.contains(&sizes.d)) {
            continue;
        }
        for device in [
            device.clone().autodiff(),
            device.autodiff().gradient_checkpointing(),
        ] {
            for (route, compute) in routes() {
                let what = |quantity: &str| format!("{quantity} of {route}, {sizes:?}, {backend}");
                let inputs = Inputs::new(case, dtype, &device);
                let output = compute(&inputs);
                assert_close(
                    &what("output"),
                    &host(output.clone()),
                    &expected,
                    tolerance.value,
                );
                let Some([dskew, dscale, dinput, dweight]) = &expected_gradients else {
                    continue;
                };
                let probe = tensor(&case.probe, [case.tokens, case.d_output], dtype, &device);
                let gradients = (output * probe).sum().backward();
                let skew = sampled(inputs.skew.grad(&gradients).unwrap());
                let scale = sampled(inputs.scale.grad(&gradients).unwrap());
                let input = sampled(inputs.input.grad(&gradients).unwrap());
                let weight = sampled(inputs.weight.grad(&gradients).unwrap());
                assert_close(&what("skew gradient"), &skew, dskew, tolerance.gradient);
                assert_close(&what("scale gradient"), &scale, dscale, tolerance.gradient);
                assert_close(&what("input gradient"), &input, dinput, tolerance.gradient);
                assert_close(
                    &what("weight gradient"),
                    &weight,
                    dweight,
                    tolerance.gradient,
                );
            }
        }
    }
}

/// The smallest widths that hold `m` factors of `b`, twice over so that spans repeat.
fn table() -> Vec<Sizes> {
    let mut cases = Vec::new();
    for m in [1, 2, 3, 4] {
        for b in [2, 4, 8, 16] {
            cases.push(Sizes {
                d: 2 * (b << (m - 1)),
                b,
                m,
            });
        }
    }
    // Odd blocks with one factor, one block, three spans, and a span too wide to compose.
    cases.extend([
        Sizes { d: 15, b: 5, m: 1 },
        Sizes { d: 6, b: 6, m: 1 },
        Sizes { d: 24, b: 4, m: 2 },
        Sizes { d: 128, b: 2, m: 7 },
    ]);
    cases
}

#[test]
fn every_route_equals_the_dense_oracle_in_f64() {
    for sizes in table() {
        check(&Case::new(sizes, 10, 7), DType::F64, sizes.d <= 64);
    }
}

#[test]
fn every_route_equals_the_dense_oracle_in_f32() {
    for sizes in table() {
        check(&Case::new(sizes, 9, 5), DType::F32, sizes.d <= 64);
    }
}

#[test]
fn dropped_blocks_are_the_identity_and_get_no_gradient() {
    for sizes in [Sizes { d: 24, b: 4, m: 2 }, Sizes { d: 32, b: 4, m: 3 }] {
        let case = Case::new(sizes, 10, 7).with_dropped();
        check(&case, DType::F64, true);
        let inputs = Inputs::new(&case, DType::F64, &Device::flex().autodiff());
        let output = inputs
            .blocks()
            .linear(inputs.x(), inputs.w(), None, None, Route::Weight);
        let gradients = output.sum().backward();
        let gradient = host(inputs.skew.grad(&gradients).unwrap());
        for (k, &dropped) in case.dropped.iter().enumerate() {
            let block = &gradient[k * sizes.packed()..(k + 1) * sizes.packed()];
            assert_eq!(block.iter().all(|&v| v == 0.0), dropped == 1.0, "block {k}");
        }
    }
}
