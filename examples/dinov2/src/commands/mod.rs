//! What the program does, a file per command.

mod compare;
mod eval;
mod export;
mod opened;
mod predict;
mod pretrain;
mod report;
mod train;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command};
use crate::error::Error;

/// The exit code after Ctrl-C, as shells give it.
const INTERRUPTED: u8 = 130;

/// Carries out a command. The exit code is that of a command that did what it should, with or without remarks.
///
/// # Errors
///
/// The first failure, which ends the command.
pub fn run(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Train(request) => train::run(*request),
        Command::Eval(request) => eval::run(&request),
        Command::Predict(request) => predict::run(&request),
        Command::Export(request) => export::run(&request),
        Command::Report(request) => report::run(&request),
        Command::Compare(request) => compare::run(&request),
        Command::Pretrain(request) => pretrain::run(&request),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dinov2", &mut script);
            // Whoever has read enough closes the pipe.
            match std::io::stdout().write_all(&script) {
                Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(Error::Path {
                    path: "the output".into(),
                    source,
                }),
                _ => Ok(ExitCode::SUCCESS),
            }
        }
    }
}
