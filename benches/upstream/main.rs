//! What Burn 0.22 costs on the CPU, each beside the same work done otherwise: reproductions of what `docs/upstream.md` says under
//! "Without a pin".

use std::alloc::System;
use std::time::Instant;

use burn::module::{Module, Quantizer};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::activation::gelu;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{Device, Distribution, Tensor};
use burn_boft::BoftLinear;
use dinov2::ops;
use gemm::{Parallelism, gemm};
use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAlloc, PeakMemAllocTrait};

#[global_allocator]
static MEMORY: &PeakMemAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How many times both ways take turns.
const ROUNDS: usize = 41;

fn main() {
    println!("{:<76} {:>8} {:>9} {:>6}", "", "Burn", "otherwise", "ratio");
    let device = Device::flex();
    product(&device);
    turned_product(&device);
    on_one_thread(&device);
    normalization(&device);
    quantized(&device);
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Default, device)
}

/// Prints the medians of both ways in milliseconds, each called in its turn.
fn compare(what: &str, mut burn: impl FnMut(), mut otherwise: impl FnMut()) {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        times[0].push(time(&mut burn));
        times[1].push(time(&mut otherwise));
    }
    let [burn, otherwise] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    print(what, burn, otherwise);
}

fn print(what: &str, burn: f64, otherwise: f64) {
    println!(
        "{what:<76} {burn:>8.2} {otherwise:>9.2} {:>6.2}",
        burn / otherwise
    );
}

/// Burn clears the output of a product before it is computed, and copies it afterwards.
fn product(device: &Device) {
    let [rows, inner, columns] = [1028, 384, 1536];
    let (x, w) = (
        random([rows, inner], device),
        random([inner, columns], device),
    );
    let [x_data, w_data] = [&x, &w].map(|tensor| tensor.to_data().try_to_vec::<f32>().unwrap());
    compare(
        "ms, a product into memory that is cleared and copied, and into one that is not",
        || drop(x.clone().matmul(w.clone())),
        || {
            let mut output = Vec::<f32>::with_capacity(rows * columns);
            // SAFETY: the operands have these sizes, and the product writes all of the output, whose length is set afterwards.
            unsafe {
                gemm(
                    rows,
                    columns,
                    inner,
                    output.as_mut_ptr(),
                    1,
                    columns as isize,
                    false,
                    x_data.as_ptr(),
                    1,
                    inner as isize,
                    w_data.as_ptr(),
                    1,
                    columns as isize,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::Rayon(0),
                );
                output.set_len(rows * columns);
            }
            std::hint::black_box(&output);
        },
    );
}

/// `gemm` brings a transposed operand into its own order number by number.
fn turned_product(device: &Device) {
    for [rows, inner, columns] in [[1028, 1536, 384], [512, 4096, 4096]] {
        let (dy, w) = (
            random([rows, inner], device),
            random([columns, inner], device),
        );
        let turned = w.clone().transpose();
        // The same numbers in the order of the transposed matrix.
        let contiguous = Tensor::<2>::from_data(turned.to_data(), device);
        compare(
            &format!(
                "ms, dy·Wᵀ of {rows} × {inner} by {inner} × {columns}, with W as it is, and turned before"
            ),
            || drop(dy.clone().matmul(turned.clone())),
            || drop(dy.clone().matmul(contiguous.clone())),
        );
    }
}

/// GELU and operations on single numbers run on one thread.
fn on_one_thread(device: &Device) {
    let hidden = random([4, 257, 1536], device);
    let halves = [
        random([2, 257, 1536], device),
        random([2, 257, 1536], device),
    ];
    compare(
        "ms, GELU at once, and of each half on a thread",
        || drop(gelu(hidden.clone())),
        || drop(on_two_threads(&halves, gelu)),
    );
    compare(
        "ms, a power of each number at once, and of each half on a thread",
        || drop(hidden.clone().powf_scalar(1.5)),
        || drop(on_two_threads(&halves, |half| half.powf_scalar(1.5))),
    );
}

fn on_two_threads(
    [a, b]: &[Tensor<3>; 2],
    compute: impl Fn(Tensor<3>) -> Tensor<3> + Sync,
) -> [Tensor<3>; 2] {
    std::thread::scope(|scope| {
        let other = scope.spawn(|| compute(b.clone()));
        [compute(a.clone()), other.join().unwrap()]
    })
}

/// A normalization that is differentiated is a graph of many operations.
fn normalization(device: &Device) {
    let device = device.clone().autodiff();
    let norm: LayerNorm = LayerNormConfig::new(384).init(&device);
    let norm = norm.no_grad();
    let input = random([4, 257, 384], &device).require_grad();
    compare(
        "ms, the gradient of a layer normalization, and of one as a single operation",
        || drop(norm.forward(input.clone()).sum().backward()),
        || drop(ops::layer_norm(&norm, 1e-5, input.clone()).sum().backward()),
    );
}

/// A product with a quantized weight keeps the floats that it makes of the weight.
fn quantized(device: &Device) {
    const LAYERS: usize = 8;
    let device = device.clone().autodiff();
    let layers = || -> Vec<Linear> {
        let config = LinearConfig::new(1024, 1024).with_bias(false);
        (0..LAYERS).map(|_| config.init(&device)).collect()
    };
    let quantizer = || {
        let scheme = device.settings().quantization.scheme;
        Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S))
    };
    let theirs = layers().quantize_weights(&mut quantizer()).no_grad();
    let ours: Vec<BoftLinear> = layers().into_iter().map(BoftLinear::from).collect();
    let ours = ours.quantize_weights(&mut quantizer()).no_grad();
    let input = random([64, 1024], &device).require_grad();
    let peak = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        INSTRUMENTED_SYSTEM.reset_peak_memory();
        drop(forward(input.clone()).sum().backward());
        INSTRUMENTED_SYSTEM.get_peak_memory() as f64 / f64::from(1 << 20)
    };
    let burn = peak(&|input| theirs.iter().fold(input, |x, layer| layer.forward(x)));
    let otherwise = peak(&|input| ours.iter().fold(input, |x, layer| layer.forward(x)));
    print(
        "MiB, a step through 8 layers of 1024 × 1024 in eight bits, and packed until then",
        burn,
        otherwise,
    );
}
