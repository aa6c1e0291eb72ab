//! What each verb on a model costs by the number of layers: a verb that is linear has the same time per layer in
//! every column.

use std::time::Instant;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_boft::{
    Adapter, AdapterBank, BoftConfig, candidates, inject, merge, plan, summary, unload,
};
use clap::Parser;

/// Measures the verbs on a model, and those of a bank, on models of square layers.
#[derive(Parser)]
struct Cli {
    /// Numbers of layers.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
    layers: Vec<usize>,
    /// Channels of a layer.
    #[arg(long, default_value_t = 8)]
    width: usize,
    /// Times that each verb takes its turn; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<Linear>,
}

/// The requests of a batch that a bank makes a model for.
const REQUESTS: usize = 64;

const VERBS: [&str; 11] = [
    "plan",
    "inject",
    "extract",
    "attach",
    "summary",
    "candidates",
    "unload",
    "merge",
    "bank add",
    "bank model",
    "bank remove",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cli = Cli::parse();
    let columns = cli
        .layers
        .iter()
        .map(|&layers| medians([layers, cli.width], cli.rounds))
        .collect::<Result<Vec<_>, _>>()?;
    print!("{:<12}", "ms");
    for layers in &cli.layers {
        print!(" {:>16}", format!("{layers} layers"));
    }
    println!();
    for (row, verb) in VERBS.iter().enumerate() {
        print!("{verb:<12}");
        for column in &columns {
            print!(" {:>16.3}", column[row]);
        }
        println!();
    }
    Ok(())
}

/// The median milliseconds of every verb.
fn medians(
    [layers, width]: [usize; 2],
    rounds: u32,
) -> Result<[f64; VERBS.len()], Box<dyn std::error::Error>> {
    let device = Device::flex();
    let stack = (0..layers).map(|_| LinearConfig::new(width, width).init(&device));
    let base = Stack {
        layers: stack.collect(),
    };
    // Named one by one, which asks the most of the matching rules.
    let names = (0..layers).map(|layer| format!("layers.{layer}"));
    let config = BoftConfig::new().with_target_modules(names.collect::<Vec<_>>());
    let mut bank = AdapterBank::new(base.clone())?;
    let mut times = [const { Vec::new() }; VERBS.len()];
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
        let start = Instant::now();
        let id = bank.add(&adapter)?;
        take(8, start);
        let start = Instant::now();
        bank.model(&[Some(id); REQUESTS])?;
        take(9, start);
        let start = Instant::now();
        bank.remove(id);
        take(10, start);
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    }))
}
