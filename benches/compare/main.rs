//! Alternates the steps of this crate with the same steps of PEFT or LyCORIS, in one run.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use burn_boft_benches::{Server, exit_code};
use clap::Parser;

/// Alternates steps of the step benchmark with steps of PEFT or LyCORIS and prints the ratios.
#[derive(Parser)]
struct Cli {
    /// The Python that has the packages of benches/peers/requirements.txt.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The program of the peers.
    #[arg(long, default_value = "benches/peers/peft_step.py")]
    peers: PathBuf,
    /// The device, by the name that the step benchmark has for it.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The cases to run.
    #[arg(long = "case", default_values = ["dinov2-s", "dinov2-l-block"])]
    cases: Vec<String>,
    /// How many times the two programs take turns.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The steps to compare: one of this crate and one of a peer, as in boft-m2-b8=lycoris-boft-b8.
    #[arg(
        long = "pair",
        value_name = "OURS=THEIRS",
        value_parser = pair,
        default_values = [
            "frozen=frozen",
            "lora-r8=lora-r8",
            "boft-m2-b4=lora-r8",
            // PEFT's default is the polynomial.
            "oft-b32-neumann=oft-b32",
            "oft-b32=oft-b32",
            "boft-m1-b4=boft-m1-b4",
            "boft-m2-b4=boft-m2-b4",
        ]
    )]
    pairs: Vec<(String, String)>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (ours, theirs) = text.split_once('=').ok_or("has no `=`")?;
    Ok((ours.to_string(), theirs.to_string()))
}

fn main() -> ExitCode {
    exit_code(run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let step = program.with_file_name("step");
    let mut here = Server::start(Command::new(step).args(["--serve", "--device", &cli.device]))?;
    let peer_device = match cli.device.as_str() {
        "cpu" => "cpu",
        _ => "cuda",
    };
    let mut peers = Command::new(&cli.python);
    peers
        .arg(&cli.peers)
        .args(["--serve", "--device", peer_device])
        // Otherwise, threads of PyTorch that wait would keep the cores busy while the other program runs.
        .env("OMP_WAIT_POLICY", "passive");
    let mut peers = Server::start(&mut peers)?;
    println!(
        "{:<16} {:<16} {:>9} {:<16} {:>9} {:>7}",
        "case", "burn-boft", "ms", "peer", "ms", "ratio"
    );
    for case in &cli.cases {
        for (ours, theirs) in &cli.pairs {
            // The first step of both programs is not measured: it allocates memory, and tunes kernels on a GPU.
            here.step(case, ours)?;
            peers.step(case, theirs)?;
            let mut times = [Vec::new(), Vec::new()];
            for _ in 0..cli.rounds {
                times[0].push(here.step(case, ours)?);
                times[1].push(peers.step(case, theirs)?);
            }
            let [a, b] = times.map(|mut times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            println!(
                "{case:<16} {ours:<16} {a:>9.1} {theirs:<16} {b:>9.1} {:>7.2}",
                a / b
            );
        }
    }
    Ok(())
}
