use std::alloc::System;
use std::process::ExitCode;

use clap::Parser;
use dinov2::cli::Cli;
use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAlloc};

/// Counts the memory, so that a run can say how much it took. Unlike others that count, it lets the system clear memory, which
/// takes less time.
#[global_allocator]
static MEMORY: &PeakMemAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            // Clap prints the error first, and below it usage and tips, which would not fit in one line.
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
    match dinov2::run(cli.chosen()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.message());
            ExitCode::from(error.exit_code())
        }
    }
}
