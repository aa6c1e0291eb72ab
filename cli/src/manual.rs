//! Completions for shells, and pages of the manual, made of the command line itself.

use clap::{Command, CommandFactory};

use crate::cli::{Cli, Completions, Man};
use crate::error::Error;
use crate::formats;
use crate::terminal::print_bytes;

const NAME: &str = "burn-boft";

/// The command line. The help of `formats` has the table that the command prints.
pub fn command() -> Command {
    // Not `mut_subcommand`, which would move it to the end.
    Cli::command().mut_subcommands(|command| match command.get_name() {
        "formats" => command.after_help(formats::text()),
        _ => command,
    })
}

/// Prints the completions for a shell.
pub fn completions(options: &Completions) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command(), NAME, &mut script);
    print_bytes(&script)
}

/// Prints the page of the tool or of one of its commands, in the language of `man`.
pub fn page(options: &Man) -> Result<(), Error> {
    let mut tool = command();
    // Options of the whole tool are then in the page of each command.
    tool.build();
    let command = match &options.command {
        None => tool,
        Some(name) => {
            let commands: Vec<_> = tool
                .get_subcommands()
                .map(|command| command.get_name())
                .collect();
            let refuse = || {
                Error::Settings(format!(
                    "there is no command `{name}`; there are {}",
                    commands.join(", ")
                ))
            };
            tool.find_subcommand(name).cloned().ok_or_else(refuse)?
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .map_err(|error| Error::Settings(format!("the page cannot be made: {error}")))?;
    print_bytes(&page)
}
