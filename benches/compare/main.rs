//! Alternates the steps of this crate with the same steps of PEFT or LyCORIS, in one run.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cli = Cli::parse();
    let step = std::env::current_exe()?.with_file_name("step");
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

/// A program that runs one step for each line it reads.
struct Server {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    fn start(command: &mut Command) -> Result<Self, Box<dyn std::error::Error>> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{name} does not start: {error}"))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self {
            child,
            requests,
            answers,
        })
    }

    /// Milliseconds of one step.
    fn step(&mut self, case: &str, method: &str) -> Result<f64, Box<dyn std::error::Error>> {
        let requests = self.requests.as_mut().ok_or("no input")?;
        writeln!(requests, "{case} {method}")?;
        requests.flush()?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("no answer to `{case} {method}`").into());
        }
        Ok(line.trim().parse()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The program ends when its input ends.
        self.requests = None;
        let _ = self.child.wait();
    }
}
