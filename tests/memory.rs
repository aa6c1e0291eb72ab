//! What adapters cost in memory: many of them on one base, and training on a quantized base.

mod common;

use std::sync::Mutex;

use burn::module::{Module, ParamGroup, Quantizer};
use burn::nn;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{
    Adapter, AdapterBank, BoftAdapter, BoftConfig, BoftLinear, BoftLinearConfig, Init, inject,
    summary,
};
use common::host;
use common::models::{Layer, gradients, linear, rows};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Memory is counted for the whole process, so one test measures at a time.
static MEASURING: Mutex<()> = Mutex::new(());

const ADAPTERS: usize = 100;
const WIDTHS: [usize; 3] = [256, 384, 128];

#[derive(Module, Debug)]
struct Model {
    layers: Vec<BoftLinear>,
}

impl Model {
    fn new(device: &Device) -> Self {
        let layers = WIDTHS.windows(2).map(|pair| {
            let layer = BoftLinearConfig::new(pair[0], pair[1]).init(device);
            // Burn draws the random numbers of a parameter when it is first read.
            layer.weight.val();
            layer
        });
        Self {
            layers: layers.collect(),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let layers = self.layers.iter();
        layers.fold(input, |input, layer| layer.forward(input))
    }
}

fn config(seed: u64) -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(Init::Random { seed })
        .with_target_modules("all-linear")
}

fn bytes(model: &Model) -> usize {
    4 * summary(model).total
}

/// The bytes that a result holds: the median of many attempts, since each thread of a pool allocates its own buffer for
/// matrix products in its first one, and a thread that ends during an attempt frees its buffer.
fn held<T>(make: impl Fn() -> T) -> usize {
    let mut attempts: [usize; 101] = std::array::from_fn(|_| {
        let before = MEMORY.current_usage();
        let result = make();
        let held = MEMORY.current_usage().saturating_sub(before);
        drop(result);
        held
    });
    attempts.sort_unstable();
    attempts[attempts.len() / 2]
}

/// The most bytes that there are at a time in the backward pass of a loss, beside those from before the forward pass: the
/// least of a few attempts, since each thread of a pool allocates its own buffer for matrix products in its first one.
fn backward_peak(loss: impl Fn() -> Tensor<1>) -> usize {
    let attempts = (0..5).map(|_| {
        let before = MEMORY.current_usage();
        let loss = loss();
        MEMORY.reset_peak_usage();
        drop(loss.backward());
        MEMORY.peak_usage().saturating_sub(before)
    });
    attempts.min().unwrap()
}

#[test]
fn adapters_on_clones_share_the_base_and_serve_threads_at_once() {
    let _measuring = MEASURING.lock();
    let device = Device::flex();
    let base = Model::new(&device);
    let adapted = |seed| inject(base.clone(), config(seed)).unwrap();
    // The first one brings whatever is allocated once.
    let adapters: Vec<_> = (0..=ADAPTERS as u64)
        .map(|seed| Adapter::extract(&adapted(seed)).unwrap())
        .collect();
    let attach = |adapter: &Adapter| adapter.attach(base.clone()).unwrap();
    let attach_all = || adapters[1..].iter().map(attach).collect::<Vec<_>>();
    let each = held(attach_all) / ADAPTERS;
    let models = attach_all();
    let own = bytes(&models[0]) - bytes(&base);
    println!(
        "{each} bytes for an adapter of {own} on a base of {}",
        bytes(&base)
    );
    assert!(each >= own && each < own + 16_000, "{each} for {own}");
    assert!(each < bytes(&base) / 10);

    let input = rows([7, WIDTHS[0]], 4, &device);
    let expected: Vec<_> = models
        .iter()
        .map(|model| host(model.forward(input.clone())))
        .collect();
    assert_ne!(expected[0], expected[1]);
    let served: Vec<_> = std::thread::scope(|scope| {
        let serve = |model: &Model| host(model.forward(input.clone()));
        let threads: Vec<_> = models
            .chunks(ADAPTERS / 10)
            .map(|models| scope.spawn(move || models.iter().map(serve).collect::<Vec<_>>()))
            .collect();
        let served = threads.into_iter().map(|thread| thread.join().unwrap());
        served.flatten().collect()
    });
    assert_eq!(served, expected);
}

/// Beside its input and its output, which the gradient of the scale reads, a layer keeps nothing.
#[test]
fn a_layer_keeps_no_rotated_weight() {
    let _measuring = MEASURING.lock();
    let device = Device::flex().autodiff();
    let model = inject(Model::new(&device), config(3)).unwrap();
    let [d_input, d_output, _] = WIDTHS;
    let weight = 4 * d_input * d_output;
    for tokens in [d_output / 2, 4 * d_output] {
        let input = rows([tokens, d_input], 4, &device);
        let kept = held(|| model.layers[0].forward(input.clone())) - 4 * tokens * d_output;
        println!("{kept} bytes beside the output of {tokens} tokens, with a weight of {weight}");
        assert!(kept < weight / 4, "{kept} of {weight}, {tokens} tokens");
    }
}

/// An adapter in a bank takes its own numbers, and a model for a batch of all of them none at all.
#[test]
fn a_bank_holds_the_base_once_and_of_each_adapter_its_own_numbers() {
    let _measuring = MEASURING.lock();
    let base = Model::new(&Device::flex());
    let adapters: Vec<_> = (0..=ADAPTERS as u64)
        .map(|seed| Adapter::extract(&inject(base.clone(), config(seed)).unwrap()).unwrap())
        .collect();
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let first = bank.add(&adapters[0]).unwrap();
    // 8 numbers for each input, since spans are of 8 channels, and one for each output.
    let own = bank.memory(first).unwrap();
    assert_eq!(own, 4 * (8 * (256 + 384) + 384 + 128));

    let before = MEMORY.current_usage();
    let ids: Vec<_> = adapters[1..].iter().map(|a| bank.add(a).unwrap()).collect();
    let each = (MEMORY.current_usage() - before) / ADAPTERS;
    println!(
        "{each} bytes for an adapter of {own} on a base of {}",
        bytes(&base)
    );
    assert!(each >= own && each < own + 4_000, "{each} for {own}");

    let requests: Vec<_> = ids.iter().copied().map(Some).collect();
    let batch = held(|| bank.model(&requests).unwrap());
    println!("{batch} bytes for a batch of {ADAPTERS} adapters");
    assert!(batch < ADAPTERS * own / 10, "{batch}");
    let before = MEMORY.current_usage();
    ids.into_iter().for_each(|id| assert!(bank.remove(id)));
    assert!(before - MEMORY.current_usage() >= ADAPTERS * own);
}

/// Between its two passes, a training step keeps what the backward pass reads. Of a packed weight it must not keep the
/// floats.
#[test]
fn a_step_keeps_packed_weights_packed() {
    let _measuring = MEASURING.lock();
    let device = Device::flex().autodiff();
    let scheme = device.settings().quantization.scheme;
    let weights = ParamGroup::from_predicate(".weight");
    let packed = |scheme| {
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
        Model::new(&device).quantize_weights_group(&mut quantizer, weights.clone())
    };
    let model = inject(packed(scheme.with_value(QuantValue::Q8S)), config(7)).unwrap();
    let floats = 4 * WIDTHS
        .windows(2)
        .map(|pair| pair[0] * pair[1])
        .sum::<usize>();
    let input = rows([5, WIDTHS[0]], 4, &device);
    let loss = || model.forward(input.clone()).square().mean();
    let kept = held(loss);
    println!("{kept} bytes are kept, of weights with {floats} bytes as floats");
    assert!(kept < floats / 4, "{kept} bytes are kept");
    let gradients = loss().backward();
    let skew = model.layers[0].weight.reparameterization::<BoftAdapter>();
    assert!(skew.unwrap().skew().grad(&gradients).is_some());
}

/// The backward pass makes floats of a packed weight once, for the gradient of the rotated input. A gradient of the weight would be
/// as many numbers again beside them, and is in Burn's layer with the same adapter.
#[test]
fn the_backward_pass_of_a_quantized_layer_forms_no_gradient_of_its_weight() {
    const SIZES: [usize; 2] = [512, 4096];
    fn peak<L: Layer>() -> usize {
        let device = Device::flex().autodiff();
        let scheme = device.settings().quantization.scheme;
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S));
        let layer = L::from_linear(linear(SIZES, 1, DType::F32, &device));
        let layer = layer.quantize_weights_group(&mut quantizer, ParamGroup::from_path("weight"));
        let layer = inject(layer, config(7)).unwrap();
        let input = rows([5, SIZES[0]], 4, &device);
        let loss = || layer.apply(input.clone()).square().mean();
        let gradients = gradients(&layer, &loss().backward());
        let paths: Vec<_> = gradients.keys().map(String::as_str).collect();
        assert_eq!(paths, ["weight.boft.scale", "weight.boft.skew"]);
        backward_peak(loss)
    }
    let _measuring = MEASURING.lock();
    let weight = 4 * SIZES[0] * SIZES[1];
    let (own, burns) = (peak::<BoftLinear>(), peak::<nn::Linear>());
    println!("{own} bytes in the backward pass, {burns} in Burn's, with a weight of {weight}");
    assert!(own < weight * 3 / 2, "{own} of {weight}");
    assert!(burns > weight * 3 / 2, "{burns} of {weight}");
}
