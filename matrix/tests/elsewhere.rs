//! Devices that this library has no kernels for: a backend of Burn that it was not told of, and devices of other processes.
//!
//! Burn's `ndarray` stands for the first, since the feature `ndarray` of burn-boft is off here. The second are devices behind
//! `burn-remote`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use burn::module::Module;
use burn::nn;
use burn::optim::{AdamConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::remote::RemoteHost;
use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::{Adapter, BoftConfig, BoftLinear, Init, inject, merge};

#[derive(Module, Debug)]
struct Model {
    convolution: nn::conv::Conv2d,
    fast: BoftLinear,
    plain: nn::Linear,
}

const IMAGES: usize = 6;
const STEPS: usize = 8;

/// Numbers of no particular pattern, the same on every device.
fn numbers<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
    let count = shape.iter().product();
    let value = |i: usize| ((i * 7919 + seed * 104_729) as f64 * 0.731).sin() as f32;
    let values: Vec<f32> = (0..count).map(value).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

impl Model {
    fn new(width: usize, device: &Device) -> Self {
        let param = burn::module::Param::from_tensor;
        let linear = |[input, output]: [usize; 2], seed| nn::Linear {
            weight: param(numbers([input, output], seed, device) / (input as f64).sqrt()),
            bias: Some(burn::module::Param::from_tensor(numbers(
                [output],
                seed + 1,
                device,
            ))),
        };
        Self {
            convolution: nn::conv::Conv2d {
                weight: burn::module::Param::from_tensor(numbers([4, 6, 2, 2], 1, device) * 0.3),
                bias: None,
                ..nn::conv::Conv2dConfig::new([6, 4], [2, 2])
                    .with_bias(false)
                    .init(device)
            },
            fast: linear([4 * 4 * 4, width], 2).into(),
            plain: linear([width, 10], 4),
        }
    }

    /// Of images that belong to this number.
    fn forward(&self, seed: usize, device: &Device) -> Tensor<2> {
        let images = numbers([IMAGES, 6, 5, 5], seed, device);
        let hidden = self.convolution.forward(images).flatten(1, 3);
        self.plain.forward(self.fast.forward(hidden).tanh())
    }
}

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_block_size(4)
        .with_n_butterfly_factor(2)
        .with_target_modules(["convolution", "fast", "plain"])
}

/// What a training leaves: its losses, what the trained model computes, and its adapter.
struct Trained {
    losses: Vec<f32>,
    output: Vec<f32>,
    merged: Vec<f32>,
    adapter: Adapter,
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Trains towards the outputs of another adapter. `each` is called after the model is on the device, and after each step.
fn train(width: usize, device: &Device, mut each: impl FnMut()) -> Trained {
    let device = device.clone().autodiff();
    let base = Model::new(width, &device);
    let teacher = inject(base.clone(), config().with_init(Init::Random { seed: 5 })).unwrap();
    let goal = teacher.forward(9, &device).detach();
    let mut model = inject(base, config()).unwrap();
    let mut optimizer = AdamConfig::new().init();
    device.sync().unwrap();
    each();
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let loss = (model.forward(9, &device) - goal.clone()).square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        losses.push(host(loss)[0]);
        // The wider a layer, the smaller a step has to be.
        model = optimizer.step(0.3 / width as f64, model, gradients);
        device.sync().unwrap();
        each();
    }
    let model = model.valid();
    let device = device.inner();
    Trained {
        losses,
        output: host(model.forward(9, &device)),
        adapter: Adapter::extract(&model).unwrap(),
        merged: host(merge(model).unwrap().forward(9, &device)),
    }
}

/// Trains as [`train`] does, with twice the images, half of them on each of two devices.
///
/// It does what Burn's strategy for several devices does: each device takes the model anew for each step, and the first one
/// adds up the gradients and updates the model. `each` is called before and after gradients are sent to it.
fn train_together(width: usize, devices: [&Device; 2], mut each: impl FnMut()) -> Trained {
    let devices = devices.map(|device| device.clone().autodiff());
    let [first, _] = &devices;
    let base = Model::new(width, first);
    let teacher = inject(base.clone(), config().with_init(Init::Random { seed: 5 })).unwrap();
    let seeds = [9, 10];
    let goals = seeds.map(|seed| teacher.forward(seed, first).detach());
    let mut model = inject(base, config()).unwrap();
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let mut accumulator = GradientsAccumulator::new();
        let mut loss_of_step = 0.0;
        for (index, (device, goal)) in devices.iter().zip(&goals).enumerate() {
            let model_there = model.clone().fork(device);
            let output = model_there.forward(seeds[index], device);
            let loss = (output - goal.clone().to_device(device)).square().mean() / 2.0;
            let gradients = GradientsParams::from_grads(loss.backward(), &model_there);
            loss_of_step += host(loss)[0];
            each();
            let gradients = gradients.to_device(first, &model);
            first.sync().unwrap();
            each();
            accumulator.accumulate(&model, gradients);
        }
        losses.push(loss_of_step);
        model = optimizer.step(0.3 / width as f64, model, accumulator.grads());
    }
    let model = model.valid();
    let device = first.clone().inner();
    Trained {
        losses,
        output: host(model.forward(9, &device)),
        adapter: Adapter::extract(&model).unwrap(),
        merged: host(merge(model).unwrap().forward(9, &device)),
    }
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let size = b.iter().fold(0f32, |max, x| max.max(x.abs()));
    let pairs = a.iter().zip(b);
    pairs.fold(0f32, |max, (a, b)| max.max((a - b).abs())) / size
}

/// A run elsewhere is the run here, and training did something.
fn agrees(found: &Trained, expected: &Trained) {
    let (losses, last) = (&expected.losses, STEPS - 1);
    assert!(losses[last] < 0.7 * losses[0], "{losses:?}");
    for (found, expected) in found.losses.iter().zip(losses) {
        let drift = (found - expected).abs() / losses[0];
        assert!(drift <= 1e-4, "a loss of {found} for {expected}");
    }
    let drift = distance(&found.output, &expected.output);
    println!("the outputs differ by {drift:.1e}");
    assert!(drift <= 1e-4);
    assert!(distance(&found.merged, &found.output) <= 1e-5);
    let paths = |trained: &Trained| -> Vec<String> {
        let layers = trained.adapter.layers().iter();
        layers.map(|layer| layer.path().to_string()).collect()
    };
    assert_eq!(paths(found), paths(expected));
}

#[test]
#[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
fn a_backend_that_the_library_was_not_built_for_takes_the_portable_versions() {
    let expected = train(48, &Device::flex(), || {});
    agrees(&train(48, &Device::ndarray(), || {}), &expected);
}

/// A server in a process of its own, which ends with the test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_serve"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        let output = process.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut address).unwrap();
        Self {
            process,
            address: address.trim().to_string(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// The device behind a server.
fn server_device(address: &str) -> Device {
    let host = RemoteHost::websocket(&format!("ws://{address}"));
    Device::remote_options(&host).init().unwrap()
}

/// Passes on what goes to a server and what comes back, and counts the bytes.
struct Wire {
    address: String,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

impl Wire {
    fn to(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self {
            address: listener.local_addr().unwrap().to_string(),
            sent: Arc::default(),
            received: Arc::default(),
        };
        let (to, sent, received) = (
            server.address.clone(),
            wire.sent.clone(),
            wire.received.clone(),
        );
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(&to).unwrap());
                pass(
                    client.try_clone().unwrap(),
                    server.try_clone().unwrap(),
                    sent.clone(),
                );
                pass(server, client, received.clone());
            }
        });
        wire
    }

    fn bytes(&self) -> [u64; 2] {
        [&self.sent, &self.received].map(|bytes| bytes.load(Ordering::Relaxed))
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, bytes: Arc<AtomicU64>) {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            bytes.fetch_add(count as u64, Ordering::Relaxed);
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
    });
}

/// The operations of a step travel, and its loss comes back. Neither the base nor its gradients do.
#[test]
fn a_model_on_a_server_learns_what_it_learns_here_and_its_base_is_sent_once() {
    let server = Server::start();
    let steps = |width: usize| {
        let wire = Wire::to(&server);
        let device = server_device(&wire.address);
        let mut marks = Vec::new();
        let trained = train(width, &device, || marks.push(wire.bytes()));
        agrees(&trained, &train(width, &Device::flex(), || {}));
        let base = 4 * (4 * 24 + 65 * width + 11 * width);
        println!("a base of {base} bytes; sent and received until each step: {marks:?}");
        let [start, ..] = marks[0];
        assert!(start > base as u64, "the base is sent at the start");
        // The first step allocates the optimizer's state.
        let [sent, received] = [0, 1].map(|way| {
            let step = |pair: &[[u64; 2]]| pair[1][way] - pair[0][way];
            marks[1..].windows(2).map(step).max().unwrap()
        });
        [base as u64, sent, received]
    };
    let [small, large] = [48, 1600].map(steps);
    assert!(large[0] > 400_000, "the large base has {} bytes", large[0]);
    // A step sends its input, which is the same, and the descriptions of its operations.
    assert!(large[1] < large[0] / 4, "a step sends {} bytes", large[1]);
    assert!(large[1] < small[1] * 5 / 4, "{small:?} and {large:?}");
    assert!(large[2] < 20_000, "a step receives {} bytes", large[2]);
}

/// Of what each device computes, the gradients of the adapter alone go to the one that updates the model.
#[test]
fn two_servers_learn_what_one_device_learns() {
    let (one, other) = (Server::start(), Server::start());
    let wire = Wire::to(&other);
    let width = 1600;
    let mut marks = Vec::new();
    let found = train_together(
        width,
        [&server_device(&one.address), &server_device(&wire.address)],
        || marks.push(wire.bytes()),
    );
    let here = Device::flex();
    agrees(&found, &train_together(width, [&here, &here], || {}));
    let layers = found.adapter.layers().iter();
    let numbers = layers.map(|layer| {
        let scale = layer.scale().map_or(0, |scale| scale.num_elements());
        (layer.skew().num_elements() + scale) as u64
    });
    let gradients = 4 * numbers.sum::<u64>();
    // Marks are made before and after the first device's gradients, which are there already, and the other one's.
    for step in marks.chunks(4) {
        let came = step[3][1] - step[2][1];
        println!("{came} bytes came for {gradients} of gradients");
        assert!((gradients..gradients + 1000).contains(&came));
        assert_eq!(step[1], step[0]);
    }
    let [sent, _] = marks.last().unwrap();
    let base = 4 * (4 * 24 + 65 * width + 11 * width) as u64;
    assert!(
        *sent < base / 2,
        "{sent} bytes were sent, and the base has {base}"
    );
}

/// A pin: the day this fails, `src/ops/butterfly.rs` may permute axes again instead of swapping them.
#[test]
fn permuting_a_tensor_fails_on_a_server() {
    let server = Server::start();
    let device = server_device(&server.address);
    let ones = || Tensor::<3>::ones([4, 3, 2], &device);
    let swapped = ones().swap_dims(1, 2).swap_dims(0, 1);
    assert_eq!(host(swapped), [1.0; 24]);
    let permuted = std::panic::catch_unwind(|| {
        ones().permute([2, 0, 1]).into_data();
        device.sync().unwrap();
    });
    assert!(
        permuted.is_err(),
        "Burn permutes tensors on a server: remove the workaround, `swap_halves` in src/ops/butterfly.rs, and its line in docs/upstream.md"
    );
}
