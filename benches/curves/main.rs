//! Loss curves on a quantized base: QBOFT and QOFT beside Burn's QLoRA, on the same task and from the same packed weights.
//!
//! Every method is trained at each learning rate with each seed. The rate with the lowest validation loss at the end, in the mean
//! over the seeds, is the one that is shown. Test images have no part in the choice.

mod digits;
mod method;
mod plot;
mod table;
mod train;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn_boft_benches::exit_code;
use clap::Parser;
use serde::{Deserialize, Deserializer, Serialize};

use digits::Digits;
use method::{Bits, Method};
use train::Training;

/// Trains adapters on a quantized base, and compares their losses.
#[derive(Parser)]
struct Cli {
    /// Training steps of a run.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// How many seeds every method is trained with. A seed fixes the head, the order of the images, and what QLoRA draws.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The learning rates that every method is trained with.
    #[arg(long, value_delimiter = ',', num_args = 1.., default_values_t = [3e-4, 1e-3, 3e-3, 1e-2])]
    rates: Vec<f64>,
    /// Where to keep every loss, as one JSON object per line. Runs that the file has are not trained again.
    #[arg(long, value_name = "FILE")]
    losses: Option<PathBuf>,
    /// Where to draw the curves, as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// What a run has reached after some steps. All losses are means over the images of a part of the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub bits: Bits,
    pub method: Method,
    /// How many numbers the adapter has; the head has the same with every method.
    pub trained: usize,
    pub rate: f64,
    pub seed: u64,
    pub step: usize,
    #[serde(deserialize_with = "number")]
    pub train: f64,
    #[serde(deserialize_with = "number")]
    pub valid: f64,
    #[serde(deserialize_with = "number")]
    pub test: f64,
    /// The share of the test images whose digit is found.
    pub accuracy: f64,
}

/// A number, of which JSON has `null` if it is not finite.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}

fn main() -> ExitCode {
    exit_code(run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<(), String> {
    let mut record = Record::open(cli.losses.as_deref())?;
    // A picture that cannot be written is found before the training, not after it.
    let picture = cli.plot.as_deref().map(append).transpose()?;
    let digits = Digits::new();
    let mut losses = Vec::new();
    for training in trainings(cli) {
        let run = match record.run(&training) {
            Some(run) => run,
            None => {
                let run = training.run(&digits)?;
                let end = run.last().expect("a run has a first loss");
                eprintln!("{training}: {:.4}", end.train);
                record.add(&run)?;
                run
            }
        };
        losses.extend(run);
    }
    let curves = table::curves(&losses);
    check_starts(&curves)?;
    print!("{}", table::markdown(&curves));
    if let (Some(_), Some(path)) = (picture, &cli.plot) {
        fs::write(path, plot::svg(&curves)?).map_err(failed(path))?;
    }
    Ok(())
}

/// The file of losses, if there is one.
struct Record {
    losses: Vec<Loss>,
    file: Option<File>,
}

impl Record {
    fn open(path: Option<&Path>) -> Result<Self, String> {
        let losses = match path {
            Some(path) if path.exists() => read(path)?,
            _ => Vec::new(),
        };
        let file = path.map(append).transpose()?;
        Ok(Self { losses, file })
    }

    /// The losses of a run, if the file has them up to its last step.
    fn run(&self, training: &Training) -> Option<Vec<Loss>> {
        let of_run = self.losses.iter().filter(|loss| training.is_of(loss));
        let mut run: Vec<Loss> = of_run.cloned().collect();
        // A run that was trained again for more steps has its first losses twice.
        run.sort_by_key(|loss| loss.step);
        run.dedup_by_key(|loss| loss.step);
        run.last()
            .is_some_and(|end| end.step == training.steps)
            .then_some(run)
    }

    fn add(&mut self, run: &[Loss]) -> Result<(), String> {
        let text: String = run.iter().map(line).collect();
        match &mut self.file {
            Some(file) => file
                .write_all(text.as_bytes())
                .map_err(|error| format!("the losses cannot be written: {error}")),
            None => Ok(()),
        }
    }
}

fn append(path: &Path) -> Result<File, String> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(failed(path))
}

/// Every run, those of one seed together.
fn trainings(cli: &Cli) -> Vec<Training> {
    let mut trainings = Vec::new();
    for seed in 0..cli.seeds {
        for bits in Bits::ALL {
            for method in Method::ALL {
                let runs = method.rates(&cli.rates).iter().map(|&rate| Training {
                    bits,
                    method,
                    rate,
                    seed,
                    steps: cli.steps,
                });
                trainings.extend(runs);
            }
        }
    }
    trainings
}

fn line(loss: &Loss) -> String {
    serde_json::to_string(loss).expect("a loss is plain data") + "\n"
}

/// The losses of earlier runs.
fn read(path: &Path) -> Result<Vec<Loss>, String> {
    let text = fs::read_to_string(path).map_err(failed(path))?;
    let parse = |(number, line)| {
        let loss = serde_json::from_str(line);
        loss.map_err(|error| format!("{}, line {number}: {error}", path.display()))
    };
    (1..).zip(text.lines()).map(parse).collect()
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Checks that all methods start from the same loss, as they do if their packed weights, heads and images are the same.
fn check_starts(curves: &[table::Curve]) -> Result<(), String> {
    for bits in Bits::ALL {
        let of_bits = curves.iter().filter(|curve| curve.bits == bits);
        let starts: Vec<_> = of_bits.map(|curve| curve.points[0].train).collect();
        if let Some(other) = starts
            .iter()
            .find(|start| (*start - starts[0]).abs() > 1e-4 * starts[0])
        {
            return Err(format!(
                "with {bits} the methods do not start from the same loss: {} and {other}",
                starts[0]
            ));
        }
    }
    Ok(())
}
