//! The step benchmark: what a training step costs with each adapter, compared with a frozen model.
//!
//! The methods take turns, so that a machine that slows down slows all of them.

mod case;
mod measure;
mod method;
mod network;

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::process::{Command, ExitCode};

use burn::tensor::Device;
use burn_boft_benches::{Server, exit_code};
use clap::{Parser, ValueEnum};
use dinov2::device::{DeviceName, Precision};

use case::{Case, Loaded};
use measure::{Row, Times, time};
use method::{Method, Step};

/// Measures training steps with each adapter, compared with a frozen model.
#[derive(Parser)]
struct Cli {
    /// The cases to run; if none is given, all but those for GPUs.
    #[arg(long = "case")]
    cases: Vec<Case>,
    /// The methods to run, by the names in the table; all if none is given.
    #[arg(long = "method")]
    methods: Vec<String>,
    /// Where to run.
    #[arg(long, default_value_t, value_enum)]
    device: DeviceName,
    /// The precision of weights and activations.
    #[arg(long, default_value_t, value_enum)]
    dtype: Precision,
    /// How many times every method takes its turn.
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print one JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
    /// Give every method a process of its own, as an application is. In one process, a method finds the memory that others have
    /// left to the allocator. Only warm steps are measured then.
    #[arg(long)]
    apart: bool,
    /// Run one step for every line `<case> <method>` of standard input and print its milliseconds.
    #[arg(long, conflicts_with_all = ["cases", "methods", "json", "apart"])]
    serve: bool,
}

fn main() -> ExitCode {
    exit_code(run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<(), String> {
    let device = cli.device.device().map_err(|error| error.to_string())?;
    if cli.serve {
        return serve(&device, cli.dtype);
    }
    let known = |name: &String| {
        let mut methods = Method::training(true)
            .into_iter()
            .chain(Method::inference())
            .chain(Method::serving());
        methods.any(|method| method.to_string() == *name)
    };
    if let Some(name) = cli.methods.iter().find(|name| !known(name)) {
        return Err(format!("no method is called {name}"));
    }
    let cases = match cli.cases.is_empty() {
        true => {
            let all = Case::value_variants().iter().copied();
            all.filter(|case| !case.is_for_gpus()).collect()
        }
        false => cli.cases.clone(),
    };
    for case in cases {
        let rows = measure(case, cli, &device)?;
        match cli.json {
            true => rows.iter().for_each(|row| {
                println!(
                    "{}",
                    serde_json::to_string(row).expect("a row is plain data")
                );
            }),
            false => print_table(case, &rows),
        }
    }
    Ok(())
}

/// Where the steps of a method run.
enum Place {
    Here(Step),
    Apart(Server),
}

/// Lets every method of a case take its turn, round after round.
fn measure(case: Case, cli: &Cli, device: &Device) -> Result<Vec<Row>, String> {
    let loaded = (!cli.apart).then(|| case.load(device, cli.dtype));
    let mut turns = Vec::new();
    for method in case.methods() {
        let name = method.to_string();
        if method == case.floor() || cli.methods.is_empty() || cli.methods.contains(&name) {
            let (place, times) = match &loaded {
                Some(loaded) => {
                    let mut step = loaded.step(method)?;
                    let times = Times::start(&mut step);
                    (Place::Here(step), times)
                }
                None => {
                    let mut server = serve_apart(cli)?;
                    server.step(&case.name(), &name)?;
                    (Place::Apart(server), Times::default())
                }
            };
            turns.push((method, place, times));
        }
    }
    for _ in 0..cli.rounds {
        for (method, place, times) in &mut turns {
            times.warm.push(match place {
                Place::Here(step) => time(step),
                Place::Apart(server) => server.step(&case.name(), &method.to_string())?,
            });
        }
    }
    let floor = turns.iter().find(|(method, ..)| *method == case.floor());
    let floor = floor.map(|(.., times)| times.median());
    let on_host = cli.device == DeviceName::Cpu;
    Ok(turns
        .iter()
        .map(|(method, place, times)| Row {
            case: case.name(),
            backend: "burn",
            device: name(&cli.device),
            dtype: name(&cli.dtype),
            method: method.to_string(),
            median_ms: times.median(),
            min_ms: times.min(),
            max_ms: times.max(),
            cold_ms: times.cold,
            ratio_to_frozen: floor.map(|floor| times.median() / floor),
            peak_mib: times.peak_mib.filter(|_| on_host),
            trainable: match place {
                Place::Here(step) => Some(step.trainable),
                Place::Apart(_) => None,
            },
            requests_per_s: case
                .requests()
                .map(|requests| requests as f64 / times.median() * 1e3),
        })
        .collect())
}

/// Another process of this program, with the same device and precision.
fn serve_apart(cli: &Cli) -> Result<Server, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let device = name(&cli.device);
    let precision = name(&cli.dtype);
    let mut command = Command::new(program);
    Server::start(command.args(["--serve", "--device", &device, "--dtype", &precision]))
}

/// What a value is called on the command line.
fn name(value: &impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().into())
}

fn print_table(case: Case, rows: &[Row]) {
    println!("\n{} (ratio to {})", case.name(), case.floor());
    println!(
        "{:<24} {:>9} {:>9} {:>9} {:>9} {:>7} {:>9} {:>10}",
        "method",
        "median ms",
        "min",
        "max",
        "cold",
        "ratio",
        "peak MiB",
        case.requests().map_or("trainable", |_| "requests/s")
    );
    for row in rows {
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
        };
        println!(
            "{:<24} {:>9.2} {:>9.2} {:>9.2} {:>9} {:>7} {:>9} {:>10}",
            row.method,
            row.median_ms,
            row.min_ms,
            row.max_ms,
            optional(row.cold_ms, 2),
            optional(row.ratio_to_frozen, 3),
            optional(row.peak_mib, 0),
            match row.requests_per_s {
                Some(rate) => optional(Some(rate), 0),
                None => optional(row.trainable.map(|count| count as f64), 0),
            }
        );
    }
}

/// Runs a step for every line of the input and prints its time, so that another program can take turns with this one.
fn serve(device: &Device, precision: Precision) -> Result<(), String> {
    let mut loaded: HashMap<String, Loaded> = HashMap::new();
    let mut steps: HashMap<(String, String), Step> = HashMap::new();
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let Some((case, name)) = line.split_once(' ') else {
            return Err(format!("expected `<case> <method>`, found `{line}`"));
        };
        let key = (case.to_string(), name.to_string());
        if !steps.contains_key(&key) {
            let case = Case::from_str(case, false)?;
            let method = case
                .methods()
                .into_iter()
                .find(|method| method.to_string() == name);
            let method = method.ok_or_else(|| format!("{} has no method {name}", case.name()))?;
            let loaded = loaded
                .entry(case.name())
                .or_insert_with(|| case.load(device, precision));
            let mut step = loaded.step(method)?;
            (step.run)();
            steps.insert(key.clone(), step);
        }
        let step = steps.get_mut(&key).expect("it was just inserted");
        println!("{}", time(step));
        io::stdout().flush().map_err(|error| error.to_string())?;
    }
    Ok(())
}
