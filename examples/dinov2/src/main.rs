use std::process::ExitCode;

use clap::Parser;
use dinov2::cli::Cli;

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
    match cli.settings().and_then(dinov2::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.line());
            ExitCode::from(error.exit_code())
        }
    }
}
