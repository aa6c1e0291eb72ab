//! Loading the adapter that a command is about.

use std::fs;
use std::path::Path;

use burn_boft::Adapter;
use burn_boft::peft::{CONFIG_FILE, LoadOptions, TENSORS_FILE};

use crate::error::Error;
use crate::terminal::note;

/// Loads an adapter, and prints the notes and warnings of the load.
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Adapter, Error> {
    check_folder(folder)?;
    let (adapter, report) = Adapter::load_with(folder, options)?;
    say("note", &report.converted);
    say("warning", &report.warnings);
    Ok(adapter)
}

/// Prints lines of a report, and of very many only the first.
fn say(what: &str, lines: &[String]) {
    const SHOWN: usize = 100;
    for line in lines.iter().take(SHOWN) {
        note(&format!("{what}: {line}"));
    }
    if lines.len() > SHOWN {
        note(&format!("{what}: and {} more", lines.len() - SHOWN));
    }
}

/// Refuses a path that is not a folder. That there is nothing at it is said of the file in it.
fn check_folder(path: &Path) -> Result<(), Error> {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(Error::malformed(
            path,
            format!(
                "not a folder; PEFT keeps an adapter in a folder with {CONFIG_FILE} and {TENSORS_FILE}, so name that"
            ),
        )),
        _ => Ok(()),
    }
}
