//! Long trainings with large learning rates: rotations stay orthogonal, and memory does not grow.

mod common;

use std::sync::Mutex;

use burn::module::Module;
use burn::nn;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor, activation};
use burn_boft::{BoftConfig, BoftLinear, Init, OftConfig, diagnose, inject};
use common::kernel_devices;
use common::models::{linear, rows};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const KIB: f64 = 1024.0;

/// The most that the process has had in memory, in KiB. Only Linux says it.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

const INPUT: usize = 48;
const HIDDEN: usize = 32;
const OUTPUT: usize = 7;
const TOKENS: usize = 24;

/// One layer for each route: the first rotates its input, the second its weight.
#[derive(Module, Debug)]
struct Network {
    hidden: BoftLinear,
    output: nn::Linear,
}

impl Network {
    fn new(device: &Device) -> Self {
        Self {
            hidden: linear([INPUT, HIDDEN], 1, DType::F32, device).into(),
            output: linear([HIDDEN, OUTPUT], 2, DType::F32, device),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        self.output
            .forward(activation::gelu(self.hidden.forward(input)))
    }
}

/// What a training has come to.
#[derive(Debug)]
struct Outcome {
    /// The largest orthogonality defect of a layer at any time that it was measured.
    defect: f64,
    /// The largest `‖Q‖` at the end.
    skew: f64,
    /// Bytes at the end of step 100 and at the end of the last one.
    live: [usize; 2],
    /// The most bytes in the first hundred steps, and in all others.
    peak: [usize; 2],
}

/// Trains with Adam at this rate towards targets that no rotation reaches, so that the skew grows without end.
fn train(model: Network, device: &Device, steps: usize, rate: f64) -> Outcome {
    const FIRST: usize = 100;
    let input = rows([TOKENS, INPUT], 60, device);
    let targets = model.forward(input.clone()).detach() * -3.0;
    let mut model = model;
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    let (mut defect, mut live, mut peak) = (0.0f64, [0; 2], [0; 2]);
    // What a GPU compiles for a diagnosis is there before anything is counted.
    diagnose(&model);
    MEMORY.reset_peak_usage();
    for step in 1..=steps {
        let error = model.forward(input.clone()) - targets.clone();
        let gradients = GradientsParams::from_grads(error.square().mean().backward(), &model);
        model = optimizer.step(rate, model, gradients);
        if step.is_multiple_of(FIRST) {
            let index = usize::from(step > FIRST);
            live[index] = MEMORY.current_usage();
            peak[index] = peak[index].max(MEMORY.peak_usage());
            for layer in diagnose(&model).layers {
                defect = defect.max(layer.orthogonality_defect);
                assert!(layer.orthogonality_defect.is_finite(), "{layer:?}");
            }
            // Measuring needed memory of its own.
            MEMORY.reset_peak_usage();
        }
    }
    let layers = diagnose(&model).layers;
    assert_eq!(layers.len(), 2);
    Outcome {
        defect,
        skew: layers
            .iter()
            .fold(0.0, |most, layer| f64::max(most, layer.skew_norm)),
        live,
        peak,
    }
}

/// Trains BOFT with three factors and OFT on every backend, and checks what comes of it.
fn endure(steps: usize) {
    // Two trainings at once would count each other's memory.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    for (backend, device) in kernel_devices() {
        let device = device.autodiff();
        for rate in [0.05, 0.5] {
            for method in ["BOFT", "OFT"] {
                let init = Init::Random { seed: 5 };
                let model = Network::new(&device);
                let model = match method {
                    "BOFT" => {
                        let config = BoftConfig::new().with_n_butterfly_factor(3);
                        let config = config.with_block_size(4).with_init(init);
                        inject(model, config.with_target_modules("all-linear"))
                    }
                    _ => {
                        let config = OftConfig::new().with_block_size(8).with_init(init);
                        inject(model, config.with_target_modules("all-linear"))
                    }
                };
                let outcome = train(model.unwrap(), &device, steps, rate);
                let what = format!("{backend}, {method}, rate {rate}, {steps} steps");
                println!(
                    "{what}: defect {:.1e}, ‖Q‖ {:.1}, KiB live {:.1} → {:.1}, peak {:.1} → {:.1}, resident {:?}",
                    outcome.defect,
                    outcome.skew,
                    outcome.live[0] as f64 / KIB,
                    outcome.live[1] as f64 / KIB,
                    outcome.peak[0] as f64 / KIB,
                    outcome.peak[1] as f64 / KIB,
                    resident(),
                );
                assert!(outcome.defect <= 1e-6, "{what}: {outcome:?}");
                assert!(outcome.skew > 1.0, "{what}: {outcome:?}");
                // A GPU backend also holds what its queue of operations does, which comes and goes.
                let growth = match backend {
                    "flex" | "ndarray" => 1.02,
                    _ => 1.1,
                };
                assert_flat(&what, outcome.live, growth);
                assert_flat(&what, outcome.peak, growth);
            }
        }
    }
}

#[track_caller]
fn assert_flat(what: &str, [first, last]: [usize; 2], growth: f64) {
    assert!(
        last as f64 <= first as f64 * growth,
        "{what}: memory grows from {first} to {last} bytes"
    );
}

#[test]
fn a_few_hundred_steps_keep_rotations_orthogonal_and_memory_flat() {
    endure(400);
}

#[test]
#[ignore = "trains for a minute; cargo test --release --workspace --test endurance -- --ignored --nocapture"]
fn ten_thousand_steps_keep_rotations_orthogonal_and_memory_flat() {
    endure(10_000);
}
