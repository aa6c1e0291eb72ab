//! `burn-boft`: adapters and models on disk, without Python and without the model's architecture.

mod base;
mod changes;
mod cli;
mod convert;
mod error;
mod header;
mod inspect;
mod interrupt;
mod lora;
mod merge;
mod names;
mod numbers;
mod output;
mod peft;
mod plot;
mod record;
mod rewrite;
mod settings;
mod turn;
mod unmerge;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            // Clap adds usage and tips below the complaint; the complaint alone is one line.
            let text = error.to_string();
            let lines = text.lines().take_while(|line| !line.trim().is_empty());
            let complaint: Vec<&str> = lines.map(str::trim).collect();
            eprintln!("{}", complaint.join(" "));
            return ExitCode::from(2);
        }
        Err(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
    };
    interrupt::handle();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.line());
            ExitCode::from(error.exit_code())
        }
    }
}
