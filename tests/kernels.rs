//! Every kernel against the dense oracle and the portable version in f64, on random sizes and layouts.
//!
//! The portable version is what `ndarray` runs: it has no kernels of its own.

mod common;

use burn::backend::Dispatch;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_boft::ops::{
    Blocks, BoftBackend, Direction, PerRequest, Route, Side, linear_requests, rotate_requests,
};
use common::{
    Matrix, Sizes, assert_close, drift, few_sizes, host, kernel_devices, noise, rotation, tensor,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// The largest drifts of the CPU backends, measured on x86-64, and the tolerances, which leave room for the GPUs and for other
/// orders of sums:
///
/// | quantity | f64 | f32 | f16 | bf16 |
/// |---|---|---|---|---|
/// | values | 2.3e-15, 1e-12 | 7.0e-7, 1e-5 | 2.5e-3, 2e-2 | 6.3e-3, 2e-2 |
/// | gradients | 4.6e-15, 1e-11 | 7.6e-7, 3e-5 | 2.6e-3, 5e-2 | 1.1e-2, 5e-2 |
fn tolerances(dtype: DType) -> [f64; 2] {
    match dtype {
        DType::F64 => [1e-12, 1e-11],
        DType::F32 => [1e-5, 3e-5],
        _ => [2e-2, 5e-2],
    }
}

/// A rotated layer of random sizes.
#[derive(Clone, Debug)]
struct Case {
    sizes: Sizes,
    d_output: usize,
    tokens: usize,
    /// Whether operands are views of transposed memory.
    strided: bool,
    seed: u64,
}

impl Case {
    /// Sizes, weights, tokens: what the kernels and the portable versions both serve.
    fn strategy() -> impl Strategy<Value = Self> {
        let block = prop_oneof![
            (1usize..=4, prop::sample::select(vec![2, 4, 6, 8, 10, 16])),
            (Just(1), 2usize..=33),
            (5usize..=6, Just(2)),
            (Just(1), Just(64)),
        ];
        let tokens = prop_oneof![Just(1), 2usize..=40, Just(129), Just(700)];
        (
            block,
            1usize..=3,
            1usize..=150,
            tokens,
            any::<bool>(),
            any::<u32>(),
        )
            .prop_map(|((m, b), spans, d_output, tokens, strided, seed)| Self {
                sizes: Sizes {
                    d: spans * (b << (m - 1)),
                    b,
                    m,
                },
                d_output,
                tokens,
                strided,
                seed: u64::from(seed),
            })
    }

    fn numbers(&self, count: usize, index: u64) -> Vec<f64> {
        // Numbers that half precision holds, so that all precisions start from the same ones.
        noise(count, self.seed * 8 + index, 1.0)
            .iter()
            .map(|value| (value * 64.0).round() / 64.0)
            .collect()
    }

    fn skew(&self) -> Vec<f64> {
        noise(self.sizes.skew_len(), self.seed * 8 + 7, 0.6)
    }

    fn scale(&self) -> Vec<f64> {
        let scale = self.numbers(self.d_output, 3);
        scale.iter().map(|value| 1.5 + value).collect()
    }

    /// A matrix of these numbers, in rows or as a view of its transpose.
    fn matrix(&self, values: &[f64], shape: [usize; 2], to: (DType, &Device)) -> Tensor<2> {
        if !self.strided {
            return tensor(values, shape, to.0, to.1);
        }
        let [rows, columns] = shape;
        let transposed = Matrix::new(rows, columns, values.to_vec()).transpose();
        transposed.to_tensor(to.0, to.1).transpose()
    }
}

/// What a layer computes and what flows back, by name.
type Quantities = Vec<(&'static str, Vec<f64>)>;

/// Runs a way to compute the layer, with the gradients of `Σ output ⊙ probe`.
fn run(case: &Case, route: Way, dtype: DType, device: &Device) -> [Quantities; 2] {
    let Sizes { d, b, .. } = case.sizes;
    let (t, o) = (case.tokens, case.d_output);
    let wide = if dtype == DType::F64 {
        dtype
    } else {
        DType::F32
    };
    let skew = tensor(&case.skew(), case.sizes.skew_shape(), wide, device).require_grad();
    let scale = tensor(&case.scale(), [o], wide, device).require_grad();
    let operand = |shape: [usize; 2], index: u64| {
        let values = case.numbers(shape[0] * shape[1], index);
        case.matrix(&values, shape, (dtype, device))
    };
    let weight = operand([d, o], 1).detach().require_grad();
    let input = operand([t, d], 0).detach().require_grad();
    let blocks = Blocks::cayley(skew.clone(), b);
    let output = match route {
        Way::Linear(route) => blocks.linear(
            input.clone(),
            weight.clone(),
            Some(scale.clone()),
            None,
            route,
        ),
        Way::Weight(Side::Left) => blocks.weight(weight.clone(), Some(scale.clone()), Side::Left),
        Way::Weight(Side::Right) => {
            let weight = weight.clone().transpose();
            blocks.weight(weight, Some(scale.clone()), Side::Right)
        }
        Way::Rotate(side @ Side::Left, direction) => blocks.rotate(weight.clone(), side, direction),
        Way::Rotate(side @ Side::Right, direction) => blocks.rotate(input.clone(), side, direction),
    };
    let probe = operand(output.dims(), 2).detach();
    let values = vec![("output", host(output.clone()))];
    let gradients = (output * probe).sum().backward();
    let gradients = [
        ("skew", skew.grad(&gradients).map(host)),
        ("scale", scale.grad(&gradients).map(host)),
        ("weight", weight.grad(&gradients).map(host)),
        ("input", input.grad(&gradients).map(host)),
    ];
    let gradients = gradients.into_iter();
    [
        values,
        gradients
            .filter_map(|(name, value)| Some((name, value?)))
            .collect(),
    ]
}

/// A way to compute the layer, or a part of it.
#[derive(Clone, Copy, Debug)]
enum Way {
    Linear(Route),
    Weight(Side),
    Rotate(Side, Direction),
}

const WAYS: [Way; 8] = [
    Way::Linear(Route::Activation),
    Way::Linear(Route::Weight),
    Way::Weight(Side::Left),
    Way::Weight(Side::Right),
    Way::Rotate(Side::Left, Direction::Forward),
    Way::Rotate(Side::Left, Direction::Back),
    Way::Rotate(Side::Right, Direction::Forward),
    Way::Rotate(Side::Right, Direction::Back),
];

/// What the dense oracle says of the output.
fn oracle(case: &Case, way: Way) -> Vec<f64> {
    let Sizes { d, .. } = case.sizes;
    let (t, o) = (case.tokens, case.d_output);
    let rotation = rotation(case.sizes, &case.skew());
    let weight = Matrix::new(d, o, case.numbers(d * o, 1));
    let input = Matrix::new(t, d, case.numbers(t * d, 0));
    let op = |direction| match direction {
        Direction::Forward => rotation.clone(),
        Direction::Back => rotation.transpose(),
    };
    let scaled = |mut matrix: Matrix| {
        let columns = matrix.columns;
        for (index, value) in matrix.values.iter_mut().enumerate() {
            *value *= case.scale()[index % columns];
        }
        matrix
    };
    match way {
        Way::Linear(_) => scaled(input.matmul(&rotation).matmul(&weight)).values,
        Way::Weight(Side::Left) => scaled(rotation.matmul(&weight)).values,
        Way::Weight(Side::Right) => scaled(rotation.matmul(&weight)).transpose().values,
        Way::Rotate(Side::Left, direction) => op(direction).matmul(&weight).values,
        Way::Rotate(Side::Right, direction) => input.matmul(&op(direction)).values,
    }
}

#[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
fn portable(case: &Case, way: Way) -> [Quantities; 2] {
    run(case, way, DType::F64, &Device::ndarray().autodiff())
}

/// Compares one case on one device with the oracle and the portable version.
fn compare(
    case: &Case,
    ways: &[Way],
    dtype: DType,
    (name, device): &(&str, Device),
) -> Result<(), TestCaseError> {
    for &way in ways {
        let expected = oracle(case, way);
        let reference = portable(case, way);
        let device = device.clone().autodiff();
        let actual = run(case, way, dtype, &device);
        let within = |what: String, actual: &[f64], expected: &[f64], tolerance: f64| {
            let drift = drift(actual, expected);
            prop_assert!(drift <= tolerance, "{what}: drift {drift:.2e}");
            Ok(())
        };
        let tolerances = tolerances(dtype);
        within(
            format!("oracle, {way:?}, {dtype:?} on {name}"),
            &actual[0][0].1,
            &expected,
            tolerances[0],
        )?;
        for ((actual, reference), tolerance) in actual.iter().zip(&reference).zip(tolerances) {
            prop_assert_eq!(actual.len(), reference.len());
            for ((quantity, actual), (_, reference)) in actual.iter().zip(reference) {
                let what = format!("{quantity} of {way:?}, {dtype:?} on {name}");
                within(what, actual, reference, tolerance)?;
            }
        }
    }
    Ok(())
}

/// Tries random cases on every backend that holds numbers of this precision.
fn try_random_cases(dtype: DType) {
    for device in kernel_devices() {
        if !device.1.supports_dtype(dtype) {
            continue;
        }
        // A GPU compiles a kernel for every size, and the portable version has many.
        let cases = match (device.0, dtype) {
            ("flex", _) => 40,
            ("ndarray", _) => 6,
            (_, DType::F64) => 1,
            _ if few_sizes() => 1,
            _ => 6,
        };
        let mut runner = TestRunner::new_with_rng(
            Config {
                cases,
                failure_persistence: None,
                ..Config::default()
            },
            proptest::test_runner::TestRng::deterministic_rng(
                proptest::test_runner::RngAlgorithm::ChaCha,
            ),
        );
        let result = runner.run(&Case::strategy(), |case| {
            compare(&case, &WAYS, dtype, &device)
        });
        if let Err(error) = result {
            panic!("{error}");
        }
    }
}

#[test]
fn kernels_equal_the_oracle_and_the_portable_version_in_f64() {
    try_random_cases(DType::F64);
}

#[test]
fn kernels_equal_the_oracle_and_the_portable_version_in_f32() {
    try_random_cases(DType::F32);
}

#[test]
fn kernels_equal_the_oracle_and_the_portable_version_in_f16() {
    try_random_cases(DType::F16);
}

#[test]
fn kernels_equal_the_oracle_and_the_portable_version_in_bf16() {
    try_random_cases(DType::BF16);
}

/// Spans of 128 and 256 are too wide to compose, blocks of 70 too wide for a GPU's shared memory.
#[test]
fn sizes_without_a_kernel_take_the_portable_version() {
    let sizes = [
        Sizes { d: 256, b: 4, m: 6 },
        Sizes { d: 256, b: 2, m: 8 },
        Sizes {
            d: 140,
            b: 70,
            m: 1,
        },
    ];
    for sizes in sizes {
        let case = Case {
            sizes,
            d_output: 11,
            tokens: 5,
            strided: true,
            seed: 3,
        };
        for device in kernel_devices() {
            let ways = [
                Way::Linear(Route::Weight),
                Way::Rotate(Side::Right, Direction::Forward),
            ];
            compare(&case, &ways, DType::F32, &device).unwrap();
        }
    }
}

/// Spans that the kernels serve, one of blocks of odd size, and one that is too long.
const REQUESTS: [Sizes; 4] = [
    Sizes { d: 48, b: 4, m: 3 },
    Sizes { d: 20, b: 2, m: 2 },
    Sizes { d: 21, b: 7, m: 1 },
    Sizes { d: 256, b: 4, m: 6 },
];

/// Three rotations for five requests, which take one of them, another one or none.
#[test]
fn every_request_is_rotated_by_its_own_rotation() {
    const CHOICES: [Option<usize>; 5] = [Some(2), None, Some(0), Some(2), Some(1)];
    let requests = REQUESTS.into_iter().zip([1, 37, 3, 2]);
    for (sizes, tokens) in requests.take(if few_sizes() { 1 } else { REQUESTS.len() }) {
        let case = |seed| Case {
            sizes,
            d_output: 11,
            tokens: CHOICES.len() * tokens,
            strided: true,
            seed,
        };
        let (d, o, rows) = (sizes.d, 11, CHOICES.len() * tokens);
        let x = Matrix::new(rows, d, case(1).numbers(rows * d, 0));
        let w = Matrix::new(d, o, case(1).numbers(d * o, 1));
        let cases = [2, 3, 4].map(case);
        let rotations = cases.each_ref().map(|case| rotation(sizes, &case.skew()));
        // Request 2 takes no scale, request 3 no bias.
        let [scaled, biased] = [2, 3].map(|without| {
            let choices = CHOICES.into_iter().enumerate();
            choices
                .map(|(i, choice)| choice.filter(|_| i != without))
                .collect::<Vec<_>>()
        });
        let (mut rotated, mut output) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let request = row / tokens;
            let line = Matrix::new(1, d, x.values[row * d..][..d].to_vec());
            let line = CHOICES[request].map_or(line.clone(), |i| line.matmul(&rotations[i]));
            rotated.extend(&line.values);
            for (column, value) in line.matmul(&w).values.into_iter().enumerate() {
                let scale = scaled[request].map_or(1.0, |i| cases[i].scale()[column]);
                let bias = biased[request].map_or(0.0, |i| cases[i].numbers(o, 5)[column]);
                output.push(value * scale + bias);
            }
        }
        for (name, device) in kernel_devices() {
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                let wide = if dtype == DType::F64 {
                    dtype
                } else {
                    DType::F32
                };
                let spans = cases.each_ref().map(|case| {
                    let skew = tensor(&case.skew(), sizes.skew_shape(), wide, &device);
                    Blocks::cayley(skew, sizes.b).spans()
                });
                let vectors = |index, dtype| {
                    let numbers = |case: &Case| match index {
                        3 => case.scale(),
                        _ => case.numbers(o, index),
                    };
                    let vectors = cases.iter();
                    let vectors = vectors.map(|case| tensor(&numbers(case), [o], dtype, &device));
                    vectors.collect::<Vec<_>>()
                };
                let to = (dtype, &device);
                let input = case(1).matrix(&x.values, [rows, d], to);
                let weight = case(1).matrix(&w.values, [d, o], to);
                let rotations = PerRequest::new(spans.to_vec(), CHOICES.to_vec());
                let actual = rotate_requests(input.clone(), rotations.clone());
                let what = format!("{sizes:?} in {dtype:?} on {name}");
                assert_close(&what, &host(actual), &rotated, tolerances(dtype)[0]);
                let actual = linear_requests(
                    input,
                    weight,
                    rotations,
                    PerRequest::new(vectors(3, wide), scaled.clone()),
                    PerRequest::new(vectors(5, dtype), biased.clone()),
                );
                assert_close(&what, &host(actual), &output, tolerances(dtype)[0]);
            }
        }
    }
}

/// The kernel of the CPU writes over the rows, unless another tensor has them, too.
#[test]
fn scaling_rows_does_not_change_a_tensor_that_shares_them() {
    for (name, device) in kernel_devices() {
        let numbers: Vec<f64> = (0..24).map(f64::from).collect();
        let whole = tensor(&numbers, [6, 4], DType::F32, &device);
        let part = whole.clone().slice([2..6, 0..4]);
        let scale = tensor(&[2.0, 3.0, 5.0, 7.0], [4], DType::F32, &device);
        let bias = tensor(&[0.5, 0.25, -1.0, 4.0], [4], DType::F32, &device);
        let scaled = <Dispatch as BoftBackend>::boft_scale_requests(
            part.into_dispatch(),
            vec![scale.into_dispatch()].into(),
            vec![Some(0), None],
            vec![bias.into_dispatch()].into(),
            vec![None, Some(0)],
        );
        let expected = [
            16.0, 27.0, 50.0, 77.0, 24.0, 39.0, 70.0, 105.0, //
            16.5, 17.25, 17.0, 23.0, 20.5, 21.25, 21.0, 27.0,
        ];
        let scaled = Tensor::<2>::from_dispatch(scaled);
        assert_close(name, &host(scaled), &expected, 1e-6);
        assert_close(name, &host(whole), &numbers, 0.0);
    }
}

/// A scale below 1e-30 counts as zero, and 1e-20 is added to it, since its gradient divides by it.
#[test]
fn every_backend_keeps_tiny_scales_away_from_zero_by_the_same_rule() {
    let scale = [
        0.0, 1e-36, 1e-31, -1e-31, 5e-31, -9.9e-31, 1.1e-30, -2e-30, 1e-25, -1e-20, 3.0,
    ];
    let case = Case {
        sizes: Sizes { d: 16, b: 4, m: 2 },
        d_output: scale.len(),
        tokens: 5,
        strided: false,
        seed: 4,
    };
    let expected: Vec<f64> = scale
        .iter()
        .map(|&s: &f64| if s.abs() < 1e-30 { s + 1e-20 } else { s })
        .collect();
    let (d, o) = (case.sizes.d, scale.len());
    let weight = Matrix::new(d, o, case.numbers(d * o, 1));
    let rotated = rotation(case.sizes, &case.skew()).matmul(&weight);
    let sums: Vec<f64> = (0..o)
        .map(|column| (0..d).map(|row| rotated.get(row, column)).sum())
        .collect();
    for (name, device) in kernel_devices() {
        for dtype in [DType::F32, DType::F64] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let to = (dtype, &device.clone().autodiff());
            let skew = tensor(&case.skew(), case.sizes.skew_shape(), to.0, to.1);
            let blocks = Blocks::cayley(skew, case.sizes.b);
            for side in [Side::Left, Side::Right] {
                let scale = tensor(&scale, [o], to.0, to.1).require_grad();
                let weight = weight.to_tensor(to.0, to.1);
                let scaled = match side {
                    Side::Left => blocks.weight(weight, Some(scale.clone()), side),
                    Side::Right => blocks
                        .weight(weight.transpose(), Some(scale.clone()), side)
                        .transpose(),
                };
                let values = host(scaled.clone());
                let gradient = host(scale.grad(&scaled.sum().backward()).unwrap());
                for (column, (&expected, &sum)) in expected.iter().zip(&sums).enumerate() {
                    let what = format!("{side:?} scale {column}, {dtype:?} on {name}");
                    let unscaled: Vec<f64> = (0..d)
                        .map(|row| values[row * o + column] / expected)
                        .collect();
                    let rotated: Vec<f64> = (0..d).map(|row| rotated.get(row, column)).collect();
                    assert_close(&what, &unscaled, &rotated, 1e-5);
                    assert_close(&what, &[gradient[column]], &[sum], 1e-4);
                }
            }
        }
    }
}

/// Beside a bias, rounding leaves nothing of an output whose scale is zero, so that no gradient can be found for the scale.
#[test]
fn a_scale_of_zero_beside_a_bias_has_no_gradient_and_other_scales_keep_theirs() {
    let scale = [0.0, 1.5, 1e-32, 0.0, -0.75];
    let bias = [0.3, -0.2, 0.7, 0.0, 0.0];
    let is_lost = [true, false, true, false, false];
    let case = Case {
        sizes: Sizes { d: 16, b: 4, m: 2 },
        d_output: scale.len(),
        tokens: 7,
        strided: false,
        seed: 6,
    };
    let (d, o, tokens) = (case.sizes.d, scale.len(), case.tokens);
    let [x, w, dy] = [(tokens, d, 0), (d, o, 1), (tokens, o, 2)].map(|(rows, columns, index)| {
        Matrix::new(rows, columns, case.numbers(rows * columns, index))
    });
    let unscaled = x.matmul(&rotation(case.sizes, &case.skew())).matmul(&w);
    let expected: Vec<f64> = (0..o)
        .map(|column| {
            let products = (0..tokens).map(|row| dy.get(row, column) * unscaled.get(row, column));
            if is_lost[column] { 0.0 } else { products.sum() }
        })
        .collect();
    for (name, device) in kernel_devices() {
        for dtype in [DType::F32, DType::F64] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let to = (dtype, &device.clone().autodiff());
            let skew = tensor(&case.skew(), case.sizes.skew_shape(), to.0, to.1);
            let blocks = Blocks::cayley(skew, case.sizes.b);
            for route in [Route::Weight, Route::Activation] {
                let [x, w, dy] = [&x, &w, &dy].map(|matrix| matrix.to_tensor(to.0, to.1));
                let scale = tensor(&scale, [o], to.0, to.1).require_grad();
                let bias = tensor(&bias, [o], to.0, to.1);
                let output = blocks.linear(x, w, Some(scale.clone()), Some(bias), route);
                let gradient = host(scale.grad(&(output * dy).sum().backward()).unwrap());
                let what = format!("{route:?}, {dtype:?} on {name}");
                assert_close(&what, &gradient, &expected, 1e-4);
                let lost = is_lost.iter().zip(&gradient).filter(|(lost, _)| **lost);
                assert!(
                    lost.into_iter().all(|(_, &gradient)| gradient == 0.0),
                    "{what}"
                );
            }
        }
    }
}

/// In a layer of bf16 whose bias stays in f32, which an optimizer steps in its own precision.
#[test]
fn the_gradient_of_a_bias_has_the_precision_of_the_bias() {
    let device = Device::flex().autodiff();
    let skew = |d: usize| {
        tensor(
            &noise(d / 4 * 6, 1, 0.5),
            [1, d / 4, 6],
            DType::F32,
            &device,
        )
    };
    let bias = || tensor::<1>(&noise(10, 2, 1.0), [10], DType::F32, &device).require_grad();
    let half = |seed, shape: [usize; 2]| {
        tensor::<2>(
            &noise(shape[0] * shape[1], seed, 1.0),
            shape,
            DType::BF16,
            &device,
        )
    };
    for scale in [None, Some(Tensor::ones([10], (&device, DType::F32)))] {
        for route in [Route::Weight, Route::Activation] {
            for blocks in [Blocks::cayley(skew(24), 4), Blocks::neumann(skew(24), 4, 5)] {
                let (bias, (x, w)) = (bias(), (half(3, [7, 24]), half(4, [24, 10])));
                let output = blocks.linear(x, w, scale.clone(), Some(bias.clone()), route);
                let gradient = bias.grad(&output.sum().backward()).unwrap();
                assert_eq!(gradient.dtype(), DType::F32, "{route:?}");
                assert_close(&format!("{route:?}"), &host(gradient), &[7.0; 10], 1e-6);
            }
        }
        let bias = bias();
        let input = half(3, [48, 48]).reshape([4, 4, 12, 12]);
        let weight = half(4, [10, 36]).reshape([10, 4, 3, 3]);
        let options = ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
        let output = Blocks::cayley(skew(36), 4).conv2d(
            input,
            weight,
            scale.clone(),
            Some(bias.clone()),
            options,
        );
        let gradient = bias.grad(&output.sum().backward()).unwrap();
        assert_eq!(gradient.dtype(), DType::F32, "conv2d");
        assert_close("conv2d", &host(gradient), &[400.0; 10], 1e-2);
    }
}

#[test]
#[should_panic = "linear_requests: rotations, scales and biases are for [4, 4, 8] requests"]
fn lists_for_different_numbers_of_requests_are_refused() {
    let device = Device::flex();
    let skew = tensor(&noise(6, 1, 0.5), [1, 2, 3], DType::F32, &device);
    let spans = Blocks::cayley(skew, 3).spans();
    let vector = tensor::<1>(&noise(5, 2, 1.0), [5], DType::F32, &device);
    let input = tensor::<2>(&noise(8 * 6, 3, 1.0), [8, 6], DType::F32, &device);
    let weight = tensor::<2>(&noise(6 * 5, 4, 1.0), [6, 5], DType::F32, &device);
    linear_requests(
        input,
        weight,
        PerRequest::new(vec![spans], vec![Some(0); 4]),
        PerRequest::new(vec![vector.clone()], vec![Some(0); 4]),
        PerRequest::new(vec![vector], vec![None; 8]),
    );
}

/// A layer that reads or writes nothing is a degenerate one, and no reason to panic.
#[test]
fn operands_without_numbers_have_results_without_numbers() {
    // Burn's `ndarray` divides by the length of an axis.
    let devices = kernel_devices().into_iter();
    for (name, device) in devices.filter(|(name, _)| *name != "ndarray") {
        let skew = tensor(&noise(12, 1, 0.5), [1, 2, 6], DType::F32, &device);
        let blocks = Blocks::cayley(skew, 4);
        for (side, shape) in [(Side::Left, [8, 0]), (Side::Right, [0, 8])] {
            let empty = Tensor::<2>::zeros(shape, &device);
            let rotated = blocks.rotate(empty.clone(), side, Direction::Forward);
            assert_eq!(rotated.dims(), shape, "{name}");
            let scaled = blocks.weight(empty, Some(Tensor::ones([0], &device)), side);
            assert_eq!(scaled.dims(), shape, "{name}");
        }
    }
}

/// One case with more tokens than a partial sum covers.
fn long_case() -> Case {
    Case {
        sizes: Sizes { d: 48, b: 4, m: 3 },
        d_output: 37,
        tokens: 1543,
        strided: false,
        seed: 11,
    }
}

/// Layers so large that several threads compute a product, which then rotates the weight panel by panel. Among them are spans that
/// do not divide a panel, sums in several parts, and more threads than panels.
#[test]
fn weights_rotated_inside_a_product_equal_the_oracle() {
    let case = |[d, b, m]: [usize; 3], d_output, tokens, strided| Case {
        sizes: Sizes { d, b, m },
        d_output,
        tokens,
        strided,
        seed: 13,
    };
    let cases = [
        case([240, 4, 2], 300, 133, false),
        case([252, 6, 2], 130, 700, true),
        case([192, 32, 1], 61, 700, false),
        case([640, 4, 5], 90, 133, true),
        case([147, 7, 1], 163, 700, false),
        case([1068, 6, 2], 70, 129, false),
    ];
    for (case, threads) in cases.iter().flat_map(|case| [1, 2, 9].map(|n| (case, n))) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let ways = [Way::Linear(Route::Weight)];
        for dtype in [DType::F32, DType::F64] {
            let compare = || compare(case, &ways, dtype, &("flex", Device::flex()));
            let outcome = pool.as_ref().unwrap().install(compare);
            if let Err(error) = outcome {
                panic!("{case:?} on {threads} threads: {error}");
            }
        }
    }
}

#[test]
fn flex_gives_the_same_bits_twice() {
    let device = Device::flex().autodiff();
    for way in WAYS {
        let [first, second] = [(); 2].map(|()| run(&long_case(), way, DType::F32, &device));
        assert_eq!(first, second, "{way:?}");
    }
}

/// Products of this many numbers go to Burn's own kernels, which may sum in another order.
#[test]
fn flex_gives_the_same_numbers_on_any_count_of_threads() {
    let on_threads = |count: usize, way| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
        pool.unwrap()
            .install(|| run(&long_case(), way, DType::F32, &Device::flex().autodiff()))
    };
    for way in WAYS {
        let one = on_threads(1, way);
        for threads in [2, 3, 7] {
            for (one, many) in one
                .iter()
                .flatten()
                .zip(on_threads(threads, way).iter().flatten())
            {
                let what = format!("{} of {way:?} on {threads} threads", one.0);
                assert_close(&what, &many.1, &one.1, 1e-6);
            }
        }
    }
}

/// A rotation of `n` spans, and a weight and a scale for it, as one of the precisions stores them.
fn weighted(sizes: Sizes, d_output: usize, stored: DType) -> (Blocks, [Tensor<2>; 2], Tensor<1>) {
    let device = Device::flex();
    let wide = DType::F32;
    let skew = noise(sizes.skew_len(), 5, 0.4);
    let skew = tensor(&skew, sizes.skew_shape(), wide, &device);
    let weight = noise(sizes.d * d_output, 6, 2.0);
    let weights = [[sizes.d, d_output], [d_output, sizes.d]];
    let weights = weights.map(|shape| tensor(&weight, shape, stored, &device));
    let scale: Vec<f64> = noise(d_output, 7, 0.5).iter().map(|x| 1.3 + x).collect();
    let scale = tensor(&scale, [d_output], wide, &device);
    (Blocks::cayley(skew, sizes.b), weights, scale)
}

/// Sizes that fill registers of every width, that end within one, and more columns than a cache holds at a time.
fn sizes_of_registers() -> impl Iterator<Item = (Sizes, usize)> {
    let blocks = [
        (2, 1),
        (4, 1),
        (2, 3),
        (4, 2),
        (3, 1),
        (6, 2),
        (8, 2),
        (32, 1),
        (4, 5),
    ];
    blocks.into_iter().flat_map(|(b, m)| {
        let span = b << (m - 1);
        let shapes = [(1, 7), (3, 19), (1100 / span, 37), (2, 1093)];
        shapes.map(|(spans, d_output)| {
            let d = span * spans;
            (Sizes { d, b, m }, d_output)
        })
    })
}

#[test]
fn half_precision_is_rotated_as_if_it_were_widened_before_and_rounded_after() {
    for stored in [DType::F16, DType::BF16] {
        for (sizes, d_output) in sizes_of_registers() {
            let (blocks, weights, scale) = weighted(sizes, d_output, stored);
            for (weight, side) in weights.into_iter().zip([Side::Left, Side::Right]) {
                for scale in [None, Some(scale.clone())] {
                    let what = format!("{sizes:?}, {d_output} outputs, {side:?}, {stored:?}");
                    let wide = weight.clone().cast(FloatDType::F32);
                    let wide = blocks.weight(wide, scale.clone(), side);
                    let found = blocks.weight(weight.clone(), scale, side).into_data();
                    let expected = wide.cast(FloatDType::from(stored)).into_data();
                    assert_eq!(found, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn how_blocks_are_stored_changes_no_bit_of_a_product() {
    for (sizes, d_output) in sizes_of_registers() {
        let (blocks, [left, right], scale) = weighted(sizes, d_output, DType::F32);
        let stored = blocks.clone().composed().stored_for(Direction::Back);
        for direction in [Direction::Forward, Direction::Back] {
            for (matrix, side) in [(&left, Side::Left), (&right, Side::Right)] {
                let [found, expected] = [&stored, &blocks]
                    .map(|blocks| blocks.rotate(matrix.clone(), side, direction).into_data());
                assert_eq!(found, expected, "{sizes:?}, {side:?}, {direction:?}");
            }
        }
        let [found, expected] = [&stored, &blocks].map(|blocks| {
            let weight = blocks.weight(right.clone(), Some(scale.clone()), Side::Right);
            weight.into_data()
        });
        assert_eq!(found, expected, "{sizes:?} with a scale");
    }
}

/// Blocks of a polynomial are no rotation.
#[test]
fn a_polynomial_is_multiplied_as_it_is_and_not_as_if_it_were_orthogonal() {
    let sizes = Sizes { d: 24, b: 8, m: 1 };
    let skew = noise(sizes.skew_len(), 1, 0.6);
    let weight = noise(sizes.d * 10, 2, 1.0);
    let scale: Vec<f64> = noise(10, 3, 0.5).iter().map(|x| 1.5 + x).collect();
    let run = |device: &Device, dtype: DType| {
        let skew = tensor(&skew, sizes.skew_shape(), dtype, device);
        let blocks = Blocks::neumann(skew, sizes.b, 5);
        let [left, right] = [[sizes.d, 10], [10, sizes.d]].map(|shape| {
            let side = if shape[0] == 10 {
                Side::Right
            } else {
                Side::Left
            };
            let weight = tensor(&weight, shape, dtype, device);
            let scale = tensor(&scale, [10], dtype, device);
            let back = blocks.rotate(weight.clone(), side, Direction::Back);
            [host(blocks.weight(weight, Some(scale), side)), host(back)].concat()
        });
        (host(blocks.values()), [left, right].concat())
    };
    #[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
    let portable = Device::ndarray();
    let (values, expected) = run(&portable, DType::F64);
    // The blocks times their transposes are far from the identity.
    let block = Matrix::new(sizes.b, sizes.b, values[..sizes.b * sizes.b].to_vec());
    let square = block.matmul(&block.transpose());
    assert!(drift(&square.values, &Matrix::identity(sizes.b).values) > 0.1);
    for (backend, device) in kernel_devices() {
        let (_, found) = run(&device, DType::F32);
        assert_close(backend, &found, &expected, 1e-5);
        // Where it is differentiated, the result is the same.
        let (_, differentiated) = run(&device.autodiff(), DType::F32);
        assert_close(backend, &differentiated, &found, 1e-5);
    }
}

/// Blocks of a polynomial have a backward pass that does not take them for orthogonal. The gradients are those that Burn finds
/// for products with the whole matrix. The second layer is so large that its weight is multiplied by the blocks inside a product.
#[test]
fn gradients_through_a_polynomial_are_those_of_products_with_its_matrix() {
    for (d, outputs, tokens) in [(24, 10, 13), (240, 300, 133)] {
        compare_gradients_through_a_polynomial(Sizes { d, b: 8, m: 1 }, outputs, tokens);
    }
}

fn compare_gradients_through_a_polynomial(sizes: Sizes, outputs: usize, tokens: usize) {
    let numbers = |count, seed| noise(count, seed, 1.0);
    let run = |device: &Device, dtype: DType, way: Product| -> Vec<Vec<f64>> {
        let leaf = |values: &[f64], shape| tensor::<2>(values, shape, dtype, device).require_grad();
        let skew = tensor::<3>(
            &noise(sizes.skew_len(), 1, 0.6),
            sizes.skew_shape(),
            dtype,
            device,
        );
        let skew = skew.require_grad();
        let input = leaf(&numbers(tokens * sizes.d, 2), [tokens, sizes.d]);
        let weight = leaf(&numbers(sizes.d * outputs, 3), [sizes.d, outputs]);
        let scale = tensor::<1>(&noise(outputs, 4, 0.5), [outputs], dtype, device) + 1.5;
        let scale = scale.detach().require_grad();
        let bias = tensor::<1>(&numbers(outputs, 5), [outputs], dtype, device).require_grad();
        let blocks = Blocks::neumann(skew.clone(), sizes.b, 5);
        let output = way(
            &blocks,
            [input.clone(), weight.clone()],
            [scale.clone(), bias.clone()],
        );
        let probe = numbers(output.shape().num_elements(), 6);
        let probe = tensor::<2>(&probe, output.dims(), dtype, device);
        let gradients = (output.clone() * probe).sum().backward();
        let of = |tensor: Option<Vec<f64>>| tensor.unwrap_or_default();
        vec![
            host(output),
            of(skew.grad(&gradients).map(host)),
            of(input.grad(&gradients).map(host)),
            of(weight.grad(&gradients).map(host)),
            of(scale.grad(&gradients).map(host)),
            of(bias.grad(&gradients).map(host)),
        ]
    };
    #[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
    let ndarray = Device::ndarray().autodiff();
    for (name, ours, dense) in products() {
        let expected = run(&ndarray, DType::F64, dense);
        assert!(!expected[1].is_empty(), "{name}");
        let devices = kernel_devices().into_iter();
        let devices =
            devices.map(|(backend, device)| (backend, device.autodiff(), DType::F32, 2e-5));
        for (backend, device, dtype, tolerance) in
            devices.chain([("ndarray", ndarray.clone(), DType::F64, 1e-12)])
        {
            for (index, (found, expected)) in
                run(&device, dtype, ours).iter().zip(&expected).enumerate()
            {
                let what = format!("{name}, quantity {index}, on {backend}, {tokens} tokens");
                assert_eq!(found.len(), expected.len(), "{what}");
                if !expected.is_empty() {
                    assert_close(&what, found, expected, tolerance);
                }
            }
        }
    }
}

/// A product of blocks with an input and a weight, and what follows it: a scale and a bias.
type Product = fn(&Blocks, [Tensor<2>; 2], [Tensor<1>; 2]) -> Tensor<2>;

/// Every product with blocks, as the library computes it and with the whole matrix.
fn products() -> [(&'static str, Product, Product); 8] {
    [
        (
            "x·R",
            |blocks, [x, _], _| blocks.rotate(x, Side::Right, Direction::Forward),
            |blocks, [x, _], _| x.matmul(whole(blocks)),
        ),
        (
            "x·Rᵀ",
            |blocks, [x, _], _| blocks.rotate(x, Side::Right, Direction::Back),
            |blocks, [x, _], _| x.matmul(whole(blocks).transpose()),
        ),
        (
            "R·W",
            |blocks, [_, w], _| blocks.rotate(w, Side::Left, Direction::Forward),
            |blocks, [_, w], _| whole(blocks).matmul(w),
        ),
        (
            "Rᵀ·W",
            |blocks, [_, w], _| blocks.rotate(w, Side::Left, Direction::Back),
            |blocks, [_, w], _| whole(blocks).transpose().matmul(w),
        ),
        (
            "a layer by its weight",
            |blocks, [x, w], _| blocks.linear(x, w, None, None, Route::Weight),
            |blocks, [x, w], _| x.matmul(whole(blocks)).matmul(w),
        ),
        (
            "a layer with a bias by its weight",
            |blocks, [x, w], [_, bias]| blocks.linear(x, w, None, Some(bias), Route::Weight),
            |blocks, [x, w], [_, bias]| x.matmul(whole(blocks)).matmul(w) + bias.unsqueeze::<2>(),
        ),
        (
            "a layer with a bias by its activations",
            |blocks, [x, w], [_, bias]| blocks.linear(x, w, None, Some(bias), Route::Activation),
            |blocks, [x, w], [_, bias]| x.matmul(whole(blocks)).matmul(w) + bias.unsqueeze::<2>(),
        ),
        (
            "a layer with a scale and a bias by its weight",
            |blocks, [x, w], [scale, bias]| {
                blocks.linear(x, w, Some(scale), Some(bias), Route::Weight)
            },
            |blocks, [x, w], [scale, bias]| {
                let product = x.matmul(whole(blocks)).matmul(w);
                product * scale.unsqueeze::<2>() + bias.unsqueeze::<2>()
            },
        ),
    ]
}

/// One factor as a `[d, d]` matrix.
fn whole(blocks: &Blocks) -> Tensor<2> {
    let values = blocks.values();
    let [_, n, b, _] = values.dims();
    let rows = (0..n).map(|index| {
        let block = values.clone().slice([0..1, index..index + 1]);
        let zeros = |columns: usize| {
            let zeros = Tensor::<2>::zeros([b, columns], &values.device());
            zeros.cast(values.dtype())
        };
        let (before, after) = (zeros(index * b), zeros((n - 1 - index) * b));
        Tensor::cat(vec![before, block.reshape([b, b]), after], 1)
    });
    Tensor::cat(rows.collect(), 0)
}
