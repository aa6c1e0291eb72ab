//! What each verb on a model costs by the number of layers: a verb that is linear has the same time per layer in
//! every column.

use std::time::Instant;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_boft::{Adapter, BoftConfig, candidates, inject, merge, plan, summary, unload};
use clap::Parser;

/// Measures plan, inject, extract, attach, summary, candidates, unload and merge on models of small layers.
#[derive(Parser)]
struct Cli {
    /// Numbers of layers.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
    layers: Vec<usize>,
    /// Times that each verb takes its turn; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<Linear>,
}

const VERBS: [&str; 8] = [
    "plan",
    "inject",
    "extract",
    "attach",
    "summary",
    "candidates",
    "unload",
    "merge",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cli = Cli::parse();
    let columns = cli
        .layers
        .iter()
        .map(|&layers| medians(layers, cli.rounds))
        .collect::<Result<Vec<_>, _>>()?;
    print!("{:<12}", "ms");
    for layers in &cli.layers {
        print!(" {:>16}", format!("{layers} layers"));
    }
    println!();
    for (row, verb) in VERBS.iter().enumerate() {
        print!("{verb:<12}");
        for column in &columns {
            print!(" {:>16.1}", column[row]);
        }
        println!();
    }
    Ok(())
}

/// The median milliseconds of every verb.
fn medians(layers: usize, rounds: u32) -> Result<[f64; 8], Box<dyn std::error::Error>> {
    let device = Device::flex();
    let stack = (0..layers).map(|_| LinearConfig::new(8, 6).init(&device));
    let base = Stack {
        layers: stack.collect(),
    };
    // Named one by one, which asks the most of the matching rules.
    let names = (0..layers).map(|layer| format!("layers.{layer}"));
    let config = BoftConfig::new().with_target_modules(names.collect::<Vec<_>>());
    let mut times = [const { Vec::new() }; 8];
    for _ in 0..rounds {
        let mut take = |verb: usize, start: Instant| times[verb].push(start.elapsed());
        let start = Instant::now();
        plan(&base, &config)?;
        take(0, start);
        let start = Instant::now();
        let model = inject(base.clone(), &config)?;
        take(1, start);
        let start = Instant::now();
        let adapter = Adapter::extract(&model)?;
        take(2, start);
        let start = Instant::now();
        let attached = adapter.attach(base.clone())?;
        take(3, start);
        let start = Instant::now();
        summary(&model);
        take(4, start);
        let start = Instant::now();
        candidates(&model);
        take(5, start);
        let start = Instant::now();
        unload(attached);
        take(6, start);
        let start = Instant::now();
        merge(model)?;
        take(7, start);
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    }))
}
