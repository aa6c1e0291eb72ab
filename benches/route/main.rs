//! Measures both routes of a linear layer for several numbers of tokens, and shows which one `route` chooses.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use burn_boft::ops::{Base, Blocks, Pass, Route, route};
use clap::Parser;
use dinov2::device::DeviceName;

/// Measures both routes of a linear layer for several numbers of tokens.
#[derive(Parser)]
struct Cli {
    /// Where to run.
    #[arg(long, default_value_t, value_enum)]
    device: DeviceName,
    /// How many times both routes take turns.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

const SHAPES: [[usize; 2]; 4] = [[384, 384], [384, 1536], [1024, 1024], [4096, 4096]];
/// The numbers of tokens, as shares of the output width. The switch between the routes lies among them.
const SHARES: [f64; 7] = [0.02, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cli = Cli::parse();
    let device = cli.device.device()?;
    println!(
        "{:<12} {:<9} {:>7} {:>14} {:>11} {:>8}  chosen",
        "weight", "pass", "tokens", "activation ms", "weight ms", "ratio"
    );
    for shape @ [d_input, d_output] in SHAPES {
        for pass in [Pass::Inference, Pass::Training] {
            for share in SHARES {
                let tokens = ((d_output as f64 * share) as usize).max(1);
                let layer = Layer::new(shape, tokens, pass, &device);
                let [activation, weight] = layer.medians(cli.rounds, &device);
                println!(
                    "{:<12} {:<9} {tokens:>7} {activation:>14.3} {weight:>11.3} {:>8.2}  {:?}",
                    format!("{d_input}x{d_output}"),
                    match pass {
                        Pass::Inference => "inference",
                        Pass::Training => "training",
                    },
                    activation / weight,
                    route(tokens, shape, pass, Base::Float),
                );
            }
        }
    }
    Ok(())
}

/// A BOFT(2,4) layer in the middle of a model.
struct Layer {
    input: Tensor<2>,
    weight: Tensor<2>,
    skew: Tensor<3>,
    scale: Tensor<1>,
    pass: Pass,
}

impl Layer {
    fn new([d_input, d_output]: [usize; 2], tokens: usize, pass: Pass, device: &Device) -> Self {
        let training = pass == Pass::Training;
        let device = match training {
            true => device.clone().autodiff(),
            false => device.clone(),
        };
        let noise = Distribution::Normal(0.0, 0.1);
        Self {
            input: Tensor::random([tokens, d_input], noise, &device).set_require_grad(training),
            weight: Tensor::random([d_input, d_output], noise, &device),
            skew: Tensor::random([2, d_input / 4, 6], noise, &device).set_require_grad(training),
            scale: (Tensor::random([d_output], noise, &device) + 1.0)
                .detach()
                .set_require_grad(training),
            pass,
        }
    }

    fn run(&self, route: Route, device: &Device) -> f64 {
        let start = Instant::now();
        let blocks = Blocks::cayley(self.skew.clone(), 4);
        let output = blocks.linear(
            self.input.clone(),
            self.weight.clone(),
            Some(self.scale.clone()),
            None,
            route,
        );
        if self.pass == Pass::Training {
            std::hint::black_box(output.backward());
        }
        device.sync().expect("the device finishes its work");
        start.elapsed().as_secs_f64() * 1e3
    }

    /// The median of each route, activation first.
    fn medians(&self, rounds: u32, device: &Device) -> [f64; 2] {
        let routes = [Route::Activation, Route::Weight];
        routes.iter().for_each(|&route| {
            self.run(route, device);
        });
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (times, route) in times.iter_mut().zip(routes) {
                times.push(self.run(route, device));
            }
        }
        times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
    }
}
