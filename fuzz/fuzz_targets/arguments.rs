//! The arguments of the tool, one a line: they are refused, or parsed; the rules of `--map` answer for every name.

#![no_main]

use burn_boft::KeyMap;
use clap::Parser;
use libfuzzer_sys::fuzz_target;

// The tool is a program without a library, so this is its source.
#[path = "../../cli/src/cli.rs"]
mod cli;

use cli::{Cli, Command};

const MODULES: [&str; 4] = ["", "query", "encoder.layer.11.attention.query", "h.0..ß"];

fuzz_target!(|arguments: &str| {
    let arguments = ["burn-boft"].into_iter().chain(arguments.split('\n'));
    let command = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.command,
        Err(error) => {
            _ = error.to_string();
            return;
        }
    };
    let maps = match &command {
        Command::Merge(options) => &options.adapters.maps,
        Command::Unmerge(options) => &options.adapters.maps,
        Command::Diff(options) => &options.maps,
        Command::Convert(options) => &options.maps,
        Command::Inspect(_) | Command::Formats | Command::Completions(_) | Command::Man(_) => {
            return;
        }
    };
    let mut names = KeyMap::new();
    for rule in maps {
        let Some((pattern, replacement)) = rule.rsplit_once('=') else {
            return;
        };
        names = match names.with_to_model(pattern, replacement) {
            Ok(names) => names,
            Err(error) => {
                _ = error.to_string();
                return;
            }
        };
    }
    for module in MODULES {
        match names.places(module) {
            Ok(places) => assert!(!places.is_empty(), "no place for `{module}`"),
            Err(error) => _ = error.to_string(),
        }
    }
});
