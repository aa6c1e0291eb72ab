//! `BoftConv2d` against a convolution written as loops, with the dense rotation: values and every gradient, for strides,
//! paddings, dilations and groups.

mod common;

use burn::module::{Module, Param};
use burn::nn::PaddingConfig2d;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{
    AdapterConfig, Bias, BoftAdapter, BoftConfig, BoftConv2d, BoftConv2dConfig, Cayley, Init,
    OftConfig, inject,
};
use common::models::distance;
use common::{Matrix, Sizes, assert_close, devices, drift, host, noise, rotation, tensor};

/// A convolution, the image it gets, and the sizes of its rotation.
#[derive(Clone, Debug)]
struct Case {
    images: usize,
    channels: [usize; 2],
    size: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
    padding: PaddingConfig2d,
    block: [usize; 2],
}

fn case(channels: [usize; 2], size: [usize; 2], kernel: [usize; 2], block: [usize; 2]) -> Case {
    Case {
        images: 3,
        channels,
        size,
        kernel,
        stride: [1, 1],
        dilation: [1, 1],
        groups: 1,
        padding: PaddingConfig2d::Valid,
        block,
    }
}

fn cases() -> Vec<Case> {
    let explicit = PaddingConfig2d::Explicit;
    vec![
        // Everything at once: the padding differs on all four sides.
        Case {
            stride: [2, 1],
            dilation: [1, 2],
            groups: 2,
            padding: explicit(1, 2, 0, 3),
            ..case([4, 6], [9, 7], [3, 2], [2, 2])
        },
        // The padding is wider than the kernel: some patches are all zeros.
        Case {
            stride: [3, 4],
            padding: explicit(4, 5, 3, 6),
            ..case([4, 5], [5, 6], [3, 3], [4, 1])
        },
        // Even kernels and strides that `Same` pads on one side only.
        Case {
            padding: PaddingConfig2d::Same,
            stride: [1, 2],
            ..case([6, 4], [7, 8], [2, 4], [4, 3])
        },
        Case {
            padding: PaddingConfig2d::Same,
            dilation: [2, 1],
            ..case([8, 10], [6, 5], [1, 1], [2, 1])
        },
        // Images of more rows than are held at a time, and more channels than a task takes.
        Case {
            padding: explicit(1, 1, 1, 1),
            images: 2,
            ..case([40, 5], [23, 31], [3, 3], [4, 2])
        },
        // Only all channels together are whole spans.
        Case {
            padding: explicit(1, 0, 1, 0),
            ..case([16, 3], [6, 7], [3, 3], [8, 2])
        },
        // A span of 128 has no kernel.
        Case {
            padding: explicit(1, 1, 1, 1),
            ..case([32, 3], [5, 4], [2, 2], [4, 6])
        },
    ]
}

impl Case {
    fn sizes(&self) -> Sizes {
        let [b, m] = self.block;
        let [kh, kw] = self.kernel;
        let d = self.channels[0] / self.groups * kh * kw;
        Sizes { d, b, m }
    }

    /// The layer as the user writes it, with numbers of no particular pattern.
    fn layer(&self, dtype: DType, device: &Device) -> BoftConv2d {
        let layer = BoftConv2dConfig::new(self.channels, self.kernel)
            .with_stride(self.stride)
            .with_dilation(self.dilation)
            .with_groups(self.groups)
            .with_padding(self.padding.clone())
            .init(device);
        let numbers = |shape: &[usize], seed| noise(shape.iter().product(), seed, 0.7);
        let shape = layer.weight.dims();
        let weight = tensor(&numbers(&shape, 3), shape, dtype, device);
        let bias = tensor(&numbers(&[shape[0]], 4), [shape[0]], dtype, device);
        BoftConv2d {
            weight: Param::from_tensor(weight),
            bias: Some(Param::from_tensor(bias)),
            ..layer
        }
    }

    /// The padding above and to the left, and the size of the output, of the layer that Burn would make.
    fn geometry(&self) -> ([usize; 2], [usize; 2]) {
        let ends = match self.padding {
            PaddingConfig2d::Valid => [(0, 0), (0, 0)],
            PaddingConfig2d::Explicit(t, l, b, r) => [(t, b), (l, r)],
            PaddingConfig2d::Same => [0, 1].map(|axis| {
                let (size, stride) = (self.size[axis], self.stride[axis]);
                let all = (size.div_ceil(stride) - 1) * stride + self.kernel[axis];
                let all = all.saturating_sub(size);
                (all / 2, all - all / 2)
            }),
        };
        let output = [0, 1].map(|axis| {
            let (before, after) = ends[axis];
            let reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1;
            (self.size[axis] + before + after - reach) / self.stride[axis] + 1
        });
        (ends.map(|(before, _)| before), output)
    }

    /// Calls `visit(output, weight, input)` with the index of every product that the convolution adds up.
    fn products(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let ([pad_top, pad_left], [h_out, w_out]) = self.geometry();
        let ([h, w], [kh, kw]) = (self.size, self.kernel);
        let [c, o] = self.channels.map(|channels| channels / self.groups);
        for image in 0..self.images {
            for out in 0..o * self.groups {
                for (y, x) in (0..h_out).flat_map(|y| (0..w_out).map(move |x| (y, x))) {
                    let output = ((image * o * self.groups + out) * h_out + y) * w_out + x;
                    for (k, (i, j)) in (0..c * kh * kw).map(|k| (k, (k / kw % kh, k % kw))) {
                        let channel = out / o * c + k / (kh * kw);
                        let row = (y * self.stride[0] + i * self.dilation[0]).checked_sub(pad_top);
                        let column =
                            (x * self.stride[1] + j * self.dilation[1]).checked_sub(pad_left);
                        if let (Some(row), Some(column)) = (row, column)
                            && row < h
                            && column < w
                        {
                            let plane = image * c * self.groups + channel;
                            visit(
                                output,
                                out * c * kh * kw + k,
                                (plane * h + row) * w + column,
                            );
                        }
                    }
                }
            }
        }
    }
}

/// `diag(s)·W·Rᵀ` by dense matrices.
fn rotated(case: &Case, weight: &[f64], skew: &[f64], scale: &[f64]) -> Matrix {
    let sizes = case.sizes();
    let weight = Matrix::new(case.channels[1], sizes.d, weight.to_vec());
    let mut rotated = weight.matmul(&rotation(sizes, skew).transpose());
    for (row, scale) in rotated.values.chunks_mut(sizes.d).zip(scale) {
        row.iter_mut().for_each(|value| *value *= scale);
    }
    rotated
}

/// Some two dozen numbers, since each of them takes the oracle two dense rotations.
fn sampled(count: usize) -> impl Iterator<Item = usize> {
    (0..count).step_by((count / 24).max(1))
}

/// The output and the gradients of `Σ output ⊙ probe`, by name.
fn oracle(
    case: &Case,
    [x, weight, bias, skew, scale, probe]: [&[f64]; 6],
) -> Vec<(&'static str, Vec<f64>)> {
    let effective = rotated(case, weight, skew, scale);
    let plane: usize = case.geometry().1.iter().product();
    let outputs = case.channels[1];
    let bias_of = |output: usize| bias[output / plane % outputs];
    let mut output: Vec<_> = (0..probe.len()).map(bias_of).collect();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
    case.products(|y, w, i| {
        output[y] += effective.values[w] * x[i];
        dx[i] += effective.values[w] * probe[y];
        dw[w] += x[i] * probe[y];
    });
    // The loss is linear in the rotated weight, so that its differences need no convolution.
    let loss = |skew: &[f64]| -> f64 {
        let effective = rotated(case, weight, skew, scale);
        effective.values.iter().zip(&dw).map(|(a, b)| a * b).sum()
    };
    let dskew = sampled(skew.len()).map(|index| {
        let moved = |by: f64| {
            let mut skew = skew.to_vec();
            skew[index] += by;
            loss(&skew)
        };
        (moved(1e-5) - moved(-1e-5)) / 2e-5
    });
    let d = case.sizes().d;
    let dscale = (0..outputs).map(|o| {
        let row = o * d..(o + 1) * d;
        let products = effective.values[row.clone()].iter().zip(&dw[row]);
        products.map(|(w, dw)| w * dw).sum::<f64>() / scale[o]
    });
    let mut dbias = vec![0.0; outputs];
    (0..probe.len()).for_each(|y| dbias[y / plane % outputs] += probe[y]);
    vec![
        ("output", output),
        ("input", dx),
        ("skew", dskew.collect()),
        ("scale", dscale.collect()),
        ("bias", dbias),
    ]
}

/// The same by the layer.
fn run(case: &Case, dtype: DType, device: &Device) -> Vec<(&'static str, Vec<f64>)> {
    let config = BoftConfig::new()
        .with_block_size(case.block[0])
        .with_n_butterfly_factor(case.block[1])
        .with_init(Init::Random { seed: 5 })
        .with_target_modules(".*");
    let device = device.clone().autodiff();
    let layer = inject(case.layer(dtype, &device), config).unwrap();
    let layer = BoftConv2d {
        bias: layer.bias.clone().map(|bias| bias.set_require_grad(true)),
        ..layer
    };
    let adapter: &BoftAdapter = layer.weight.reparameterization().unwrap();
    let shape = [case.images, case.channels[0], case.size[0], case.size[1]];
    let input = noise(shape.iter().product(), 6, 1.0);
    let input = tensor(&input, shape, dtype, &device).require_grad();
    let output = layer.forward(input.clone());
    let probe = noise(output.shape().num_elements(), 7, 1.0);
    let probe = tensor(&probe, output.dims(), dtype, &device);
    let gradients = (output.clone() * probe.clone()).sum().backward();
    let gradient = |name, gradient: Option<Vec<f64>>| (name, gradient.expect(name));
    let bias = layer.bias.as_ref().unwrap().val();
    let scale = adapter.scale().unwrap();
    let actual = vec![
        ("output", host(output)),
        gradient("input", input.grad(&gradients).map(host)),
        gradient(
            "skew",
            adapter.skew().grad(&gradients).map(|skew| {
                let skew = host(skew);
                sampled(skew.len()).map(|index| skew[index]).collect()
            }),
        ),
        gradient("scale", scale.clone().grad(&gradients).map(host)),
        gradient("bias", bias.clone().grad(&gradients).map(host)),
    ];
    assert!(layer.weight.base().grad(&gradients).is_none());
    let numbers = [
        host(input),
        host(layer.weight.base()),
        host(bias),
        host(adapter.skew()),
        host(scale),
        host(probe),
    ];
    let expected = oracle(case, numbers.each_ref().map(Vec::as_slice));
    for ((name, actual), (_, expected)) in actual.iter().zip(&expected) {
        let what = format!("{name} of {case:?} in {dtype:?}");
        // In f64 the central differences of the oracle are the limit.
        let tolerance = if dtype == DType::F64 { 1e-8 } else { 1e-5 };
        assert_close(&what, actual, expected, tolerance);
    }
    actual
}

#[test]
fn a_convolution_and_its_gradients_are_those_of_the_dense_rotation() {
    for (_, device) in devices() {
        for case in cases() {
            for dtype in [DType::F64, DType::F32] {
                run(&case, dtype, &device);
            }
        }
    }
}

/// Blocks of a polynomial have a kernel of their own. Burn's layer asks for the weight that they have changed, and its graph finds
/// the gradients.
#[test]
fn a_convolution_with_a_polynomial_and_its_gradients_are_those_of_burns_layer() {
    for (name, device) in devices() {
        let device = device.autodiff();
        // In place of the case without a kernel, one block for all of its 128 numbers.
        let sizes = [2, 4, 8, 4, 12, 16, 128];
        for (case, block_size) in cases().iter().zip(sizes) {
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                let config = OftConfig::new()
                    .with_block_size(block_size)
                    .with_cayley(Cayley::Neumann { terms: 5 })
                    .with_init(Init::Random { seed: 5 })
                    .with_bias(Bias::All)
                    .with_target_modules(".*");
                let twin = case.layer(dtype, &device);
                let burn = inject(Conv2d::from(twin.clone()), config.clone()).unwrap();
                let twin = inject(twin, config).unwrap();
                let twin = trained(&twin.weight, &twin.bias, case, |x| twin.forward(x));
                let burn = trained(&burn.weight, &burn.bias, case, |x| burn.forward(x));
                let names = ["output", "input", "skew", "bias"];
                for (what, (actual, expected)) in names.iter().zip(twin.iter().zip(&burn)) {
                    let what = format!("{what} of {case:?} in {dtype:?} on {name}");
                    assert_close(&what, actual, expected, tolerance);
                }
            }
        }
    }
}

/// The output of a layer, and the gradients of its input, its skew and its bias.
fn trained(
    weight: &Param<Tensor<4>>,
    bias: &Option<Param<Tensor<1>>>,
    case: &Case,
    forward: impl Fn(Tensor<4>) -> Tensor<4>,
) -> [Vec<f64>; 4] {
    let (device, dtype) = (weight.base().device(), weight.base().dtype());
    let shape = [case.images, case.channels[0], case.size[0], case.size[1]];
    let input = noise(shape.iter().product(), 6, 1.0);
    let input = tensor(&input, shape, dtype, &device).require_grad();
    let output = forward(input.clone());
    let probe = noise(output.shape().num_elements(), 7, 1.0);
    let probe = tensor(&probe, output.dims(), dtype, &device);
    let gradients = (output.clone() * probe).sum().backward();
    let adapter: &BoftAdapter = weight.reparameterization().unwrap();
    let bias = bias.as_ref().unwrap().val();
    assert!(weight.base().grad(&gradients).is_none());
    [
        host(output),
        host(input.grad(&gradients).unwrap()),
        host(adapter.skew().grad(&gradients).unwrap()),
        host(bias.grad(&gradients).unwrap()),
    ]
}

#[test]
fn gradients_have_the_same_bits_on_any_count_of_threads() {
    let case = &cases()[4];
    let on_threads = |count: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build();
        pool.unwrap()
            .install(|| run(case, DType::F32, &Device::flex()))
    };
    let one = on_threads(1);
    for threads in [2, 5] {
        // The output comes from Burn's own convolution, and the scale and the bias from sums that are tested elsewhere.
        for (one, many) in one.iter().zip(&on_threads(threads)) {
            if ["input", "skew"].contains(&one.0) {
                assert_eq!(one, many, "on {threads} threads");
            }
        }
    }
}

/// Everything that Burn's layer has: numbers, records, names, and what it computes with and without an adapter.
#[test]
fn the_twin_is_burns_convolution_with_and_without_an_adapter() {
    for (name, device) in devices() {
        for case in cases() {
            let twin = case.layer(DType::F32, &device);
            let burn = Conv2dConfig::new(case.channels, case.kernel)
                .with_stride(case.stride)
                .with_dilation(case.dilation)
                .with_groups(case.groups)
                .with_padding(case.padding.clone())
                .init(&device)
                .load_record(twin.clone().into_record());
            let input = noise(
                case.images * case.channels[0] * case.size[0] * case.size[1],
                6,
                1.0,
            );
            let shape = [case.images, case.channels[0], case.size[0], case.size[1]];
            let input = tensor(&input, shape, DType::F32, &device);
            assert_eq!(
                host(burn.forward(input.clone())),
                host(twin.forward(input.clone()))
            );
            let config = OftConfig::new()
                .with_block_size(2)
                .with_cayley(Cayley::Neumann { terms: 5 })
                .with_init(Init::Random { seed: 5 })
                .with_target_modules(".*");
            let [burn, twin]: [Tensor<4>; 2] = [
                inject(burn, config.clone()).unwrap().forward(input.clone()),
                inject(twin, config).unwrap().forward(input),
            ];
            let drift = distance(burn, twin);
            assert!(drift < 1e-5, "{drift:.1e} on {name}: {case:?}");
        }
    }
}

#[test]
fn a_layer_of_burn_becomes_its_twin_with_all_its_settings() {
    let device = Device::flex();
    let case = &cases()[0];
    let burn: Conv2d = Conv2dConfig::new(case.channels, case.kernel)
        .with_stride(case.stride)
        .with_dilation(case.dilation)
        .with_groups(case.groups)
        .with_padding(case.padding.clone())
        .init(&device);
    let input = noise(4 * 9 * 7, 6, 1.0);
    let input = tensor(&input, [1, 4, 9, 7], DType::F32, &device);
    let expected = host(burn.forward(input.clone()));
    let twin = BoftConv2d::from(burn.clone());
    assert_eq!(host(twin.forward(input.clone())), expected);
    assert_eq!(format!("{twin}"), format!("{burn}"));
    // And back, with the adapter that it has got.
    let config = BoftConfig::new()
        .with_block_size(2)
        .with_init(Init::Random { seed: 5 })
        .with_target_modules(".*");
    let adapted = inject(twin, config).unwrap();
    let rotated = host(adapted.forward(input.clone()));
    assert!(drift(&rotated, &expected) > 1e-2);
    let shown = format!("{adapted}");
    let back = Conv2d::from(adapted);
    assert_eq!(format!("{back}"), shown);
    assert_close("back", &host(back.forward(input)), &rotated, 1e-5);
}

#[test]
fn a_trained_base_gets_the_gradient_that_burns_convolution_gives() {
    for (_, device) in devices() {
        let device = device.autodiff();
        let case = &cases()[0];
        let boft = BoftConfig::new()
            .with_block_size(2)
            .with_n_butterfly_factor(2)
            .with_init(Init::Random { seed: 5 })
            .with_target_modules(".*");
        let polynomial = OftConfig::new()
            .with_block_size(4)
            .with_cayley(Cayley::Neumann { terms: 5 })
            .with_init(Init::Random { seed: 5 })
            .with_target_modules(".*");
        let gradient = |config: &AdapterConfig, twin: bool| {
            let layer = case.layer(DType::F64, &device);
            let layer = inject(layer, config.clone()).unwrap().unfreeze();
            let base = layer.weight.base();
            let input = noise(3 * 4 * 9 * 7, 6, 1.0);
            let input = tensor(&input, [3, 4, 9, 7], DType::F64, &device);
            let output = match twin {
                true => layer.forward(input),
                false => {
                    // Burn's layer asks for the rotated weight.
                    let padding = [(1, 0), (2, 3)];
                    let options = burn::tensor::ops::ConvOptions::new_with_padding(
                        case.stride,
                        padding,
                        case.dilation,
                        case.groups,
                    );
                    let bias = layer.bias.as_ref().map(Param::val);
                    burn::tensor::module::conv2d(input, layer.weight.val(), bias, options)
                }
            };
            let probe = noise(output.shape().num_elements(), 7, 1.0);
            let probe = tensor(&probe, output.dims(), DType::F64, &device);
            let gradients = (output * probe).sum().backward();
            base.grad(&gradients).map(host).unwrap()
        };
        for config in [boft.into(), polynomial.into()] {
            let [twin, burn] = [true, false].map(|twin| gradient(&config, twin));
            assert_close("the base", &twin, &burn, 1e-12);
        }
    }
}
