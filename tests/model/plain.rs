//! `BoftLinear` without an adapter, against products that the host computes in f64.

use burn::module::{Module, Param, Quantizer};
use burn::nn;
use burn::tensor::quantization::Calibration;
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{AdapterConfig, BoftConfig, BoftLinear, Cayley, Init, OftConfig, inject};

use crate::common::models::{Layer, distance, linear};
use crate::common::{Matrix, assert_close, devices, host, noise, tensor};

/// Rows, inputs and outputs: tiny ones, and such that products are shared among threads, in which `dy·Wᵀ` has panels and
/// parts of sums that are not whole, and more rows than panels.
const SIZES: [[usize; 3]; 4] = [[3, 5, 7], [70, 165, 1100], [70, 1100, 165], [1300, 37, 163]];

/// Which of input, weight and bias have gradients.
const TRACKED: [[bool; 3]; 5] = [
    [true, false, false],
    [false, true, false],
    [false, false, true],
    [true, false, true],
    [true, true, true],
];

/// What a layer computes: the output, and the gradients that there are.
fn run(
    sizes: [usize; 3],
    tracked: [bool; 3],
    (dtype, device): (DType, &Device),
) -> [Option<Vec<f64>>; 4] {
    let device = device.clone().autodiff();
    let [rows, d, o] = sizes;
    let [x, w, b, dy] = operands(sizes);
    let input = tensor(&x.values, [rows, d], dtype, &device);
    let weight = tensor(&w.values, [d, o], dtype, &device);
    let bias = tensor(&b.values, [o], dtype, &device);
    let [input, weight] =
        [(input, tracked[0]), (weight, tracked[1])].map(|(t, tracked)| match tracked {
            true => t.require_grad(),
            false => t,
        });
    let layer = BoftLinear {
        weight: Param::from_tensor(weight.clone()).set_require_grad(tracked[1]),
        bias: Some(Param::from_tensor(bias).set_require_grad(tracked[2])),
    };
    let output = layer.forward(input.clone());
    let loss = output.clone() * tensor(&dy.values, [rows, o], dtype, &device);
    let gradients = loss.sum().backward();
    let bias = layer.bias.unwrap().val();
    [
        Some(host(output)),
        input.grad(&gradients).map(host),
        layer.weight.val().grad(&gradients).map(host),
        bias.grad(&gradients).map(host),
    ]
}

/// `x`, `W`, `bias` and `dy`.
fn operands([rows, d, o]: [usize; 3]) -> [Matrix; 4] {
    [(rows, d, 1), (d, o, 2), (1, o, 3), (rows, o, 4)]
        .map(|(rows, columns, seed)| Matrix::new(rows, columns, noise(rows * columns, seed, 1.3)))
}

#[test]
fn output_and_gradients_are_those_of_a_product() {
    for (name, device) in devices() {
        for sizes in SIZES {
            let [x, w, b, dy] = operands(sizes);
            let mut output = x.matmul(&w);
            for row in output.values.chunks_mut(sizes[2]) {
                row.iter_mut().zip(&b.values).for_each(|(y, b)| *y += b);
            }
            let ones = Matrix::new(1, sizes[0], vec![1.0; sizes[0]]);
            let expected = [
                output,
                dy.matmul(&w.transpose()),
                x.transpose().matmul(&dy),
                ones.matmul(&dy),
            ];
            for tracked in TRACKED {
                for (dtype, tolerance) in [(DType::F32, 3e-6), (DType::F64, 1e-14)] {
                    let found = run(sizes, tracked, (dtype, &device));
                    let exists = [true].into_iter().chain(tracked);
                    for ((found, expected), exists) in found.iter().zip(&expected).zip(exists) {
                        let what = format!("{sizes:?}, {tracked:?}, {dtype:?} on {name}");
                        assert_eq!(found.is_some(), exists, "{what}");
                        if let Some(found) = found {
                            assert_close(&what, found, &expected.values, tolerance);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn every_axis_but_the_last_is_a_row() {
    for (name, device) in devices() {
        let [x, w, ..] = operands([24, 10, 7]);
        let layer = BoftLinear {
            weight: Param::from_tensor(w.to_tensor(DType::F32, &device)),
            bias: None,
        };
        let rows = host(layer.forward(x.to_tensor(DType::F32, &device)));
        // The axes of the first input are swapped in memory only.
        let input: Tensor<3> = tensor(&x.values, [4, 6, 10], DType::F32, &device);
        let swapped = input.clone().swap_dims(0, 1);
        let back = layer.forward(swapped).swap_dims(0, 1);
        assert_eq!(back.dims(), [4, 6, 7]);
        assert_close(name, &host(back), &rows, 1e-6);
        let vector: Tensor<1> = input.slice([2..3, 1..2]).reshape([10]);
        let start = (2 * 6 + 1) * 7;
        assert_close(
            name,
            &host(layer.forward(vector)),
            &rows[start..start + 7],
            1e-6,
        );
    }
}

#[test]
fn an_input_without_rows_has_an_output_without_rows() {
    // Burn's `ndarray` cannot multiply such matrices by itself.
    for device in devices()
        .into_iter()
        .filter(|(name, _)| *name != "ndarray")
        .map(|(_, device)| device)
    {
        let layer = BoftLinear::from(linear([24, 10], 4, DType::F32, &device));
        let init = Init::Random { seed: 7 };
        let boft = BoftConfig::new().with_n_butterfly_factor(2).with_init(init);
        let oft = OftConfig::new().with_block_size(8).with_init(init);
        let neumann = oft.clone().with_cayley(Cayley::Neumann { terms: 5 });
        let configs: [AdapterConfig; 3] = [
            boft.with_target_modules(".*").into(),
            oft.with_target_modules(".*").into(),
            neumann.with_target_modules(".*").into(),
        ];
        let adapted = configs.map(|config| inject(layer.clone(), config).unwrap());
        for layer in [layer].into_iter().chain(adapted) {
            let input = Tensor::<3>::zeros([2, 0, 24], (&device, DType::F32));
            assert_eq!(layer.forward(input.clone()).dims(), [2, 0, 10]);
            if let Some(adapter) = layer.adapter() {
                assert_eq!(adapter.rotate(input).dims(), [2, 0, 24]);
            }

            let layer = layer.train();
            let tracked = device.clone().autodiff();
            let input = Tensor::<3>::zeros([2, 0, 24], (&tracked, DType::F32)).require_grad();
            let gradients = layer.forward(input.clone()).sum().backward();
            assert_eq!(input.grad(&gradients).unwrap().dims(), [2, 0, 24]);
        }
    }
}

#[test]
fn a_layer_of_burn_becomes_its_twin_and_one_again_with_its_adapter() {
    for (name, device) in devices() {
        let burn = linear([24, 10], 4, DType::F32, &device);
        let input = tensor(&noise(7 * 24, 5, 1.0), [7, 24], DType::F32, &device);
        let config = BoftConfig::new()
            .with_n_butterfly_factor(2)
            .with_init(Init::Random { seed: 7 })
            .with_target_modules(".*");
        let adapted = inject(BoftLinear::from(burn.clone()), config).unwrap();
        let rotated = adapted.forward(input.clone());
        assert!(distance(rotated.clone(), burn.forward(input.clone())) > 1e-2);
        let back = nn::Linear::from(adapted);
        let drift = distance(back.forward(input), rotated);
        assert!(drift <= 2e-6, "{drift:.1e} on {name}");
    }
}

#[test]
fn the_bits_do_not_depend_on_the_count_of_threads() {
    for sizes in SIZES {
        let on_threads = |count: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
            let run = || run(sizes, [true; 3], (DType::F32, &Device::flex()));
            pool.unwrap().install(run)
        };
        let one = on_threads(1);
        for threads in [2, 3, 11] {
            assert!(one == on_threads(threads), "{sizes:?} on {threads} threads");
        }
    }
}

#[test]
fn half_precision_and_packed_weights_compute_as_burns_layer() {
    for (name, device) in devices() {
        let input = tensor(&noise(7 * 24, 5, 1.0), [7, 24], DType::F32, &device);
        // Burn's `ndarray` has no half precision.
        let halves: &[_] = match name {
            "ndarray" => &[],
            _ => &[DType::BF16, DType::F16],
        };
        for &dtype in halves {
            let burn = linear([24, 10], 4, dtype, &device);
            let twin = BoftLinear::from(burn.clone());
            let input = input.clone().cast(dtype);
            let (twin, burn) = (twin.forward(input.clone()), burn.forward(input));
            assert_eq!(host(twin), host(burn), "{dtype:?} on {name}");
        }
        let scheme = device.settings().quantization.scheme;
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
        let burn = linear([24, 10], 4, DType::F32, &device).quantize_weights(&mut quantizer);
        let twin = BoftLinear::from(burn.clone());
        let drift = distance(twin.forward(input.clone()), burn.forward(input));
        assert!(drift <= 1e-6, "{drift} on {name}");
    }
}
