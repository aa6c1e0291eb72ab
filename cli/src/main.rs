//! `burn-boft`: adapters and models on disk, without Python and without the model's architecture.

mod attention;
mod base;
mod changes;
mod cli;
mod compare;
mod conv1d;
mod convert;
mod copies;
mod diff;
mod distance;
mod error;
mod families;
mod find;
mod formats;
mod header;
mod inspect;
mod interrupt;
mod labels;
mod layers;
mod load;
mod lora;
mod manual;
mod merge;
mod names;
mod output;
mod pieces;
mod plot;
mod probe;
mod quantize;
mod record;
mod rewrite;
mod rotation;
mod sd_scripts;
mod sums;
mod terminal;
mod tie;
mod turn;
mod unmerge;

use std::panic::{self, UnwindSafe};
use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::ErrorKind;

use crate::cli::{Cli, Command};
use crate::error::Error;
use crate::terminal::{note, print};

/// Buffers of the same sizes come and go on every thread. This allocator keeps their pages, where the system's gives them back
/// each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let matches = manual::command().try_get_matches();
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            note(
                "error: name a command: merge, unmerge, inspect, diff or convert; burn-boft --help says what they do",
            );
            return ExitCode::from(2);
        }
        Err(error) if error.use_stderr() => {
            // Clap adds usage and tips below the complaint; the complaint alone is one line.
            let text = error.to_string();
            let lines = text.lines().take_while(|line| !line.trim().is_empty());
            let complaint: Vec<&str> = lines.map(str::trim).collect();
            note(&complaint.join(" "));
            return ExitCode::from(2);
        }
        Err(help) => {
            let help = help.to_string();
            return ExitCode::from(code(|| print(&help)));
        }
    };
    interrupt::handle();
    output::clean(cli.clean);
    ExitCode::from(code(|| run(cli.command, cli.json)))
}

/// Does what was asked for.
fn run(command: Command, json: bool) -> Result<(), Error> {
    match command {
        Command::Merge(options) => merge::run(&options, json),
        Command::Unmerge(options) => unmerge::run(&options, json),
        Command::Inspect(options) => inspect::run(&options, json),
        Command::Diff(options) => diff::run(&options, json),
        Command::Convert(options) => convert::run(&options, json),
        Command::Formats => formats::run(json),
        Command::Completions(_) | Command::Man(_) if json => {
            let why = "completions and pages of the manual are not JSON; leave out --json";
            Err(Error::Settings(why.into()))
        }
        Command::Completions(options) => manual::completions(&options),
        Command::Man(options) => manual::page(&options),
    }
}

/// The exit code of a run. Prints the error of one that failed, also if the tool itself is at fault.
fn code(run: impl FnOnce() -> Result<(), Error> + UnwindSafe) -> u8 {
    panic::set_hook(Box::new(|fault| {
        let fault = fault.to_string().replace('\n', " ");
        note(&format!(
            "error: burn-boft itself is at fault; please report this: {fault}"
        ));
    }));
    match panic::catch_unwind(run) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            note(&format!("error: {}", error.line()));
            error.exit_code()
        }
        Err(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_no_more_than_a_failure() {
        assert_eq!(code(|| panic!("expected here")), 1);
        assert_eq!(code(|| Err(Error::Settings("no".into()))), 2);
        assert_eq!(code(|| Ok(())), 0);
        _ = panic::take_hook();
    }
}
