//! Loading the adapter that a command is about.

use std::path::Path;

use burn_boft::Adapter;
use burn_boft::peft::LoadOptions;

use crate::error::Error;
use crate::terminal::note;

/// Loads an adapter, and prints the notes and warnings of the load.
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Adapter, Error> {
    let (adapter, report) = Adapter::load_with(folder, options)?;
    for line in &report.converted {
        note(&format!("note: {line}"));
    }
    for warning in &report.warnings {
        note(&format!("warning: {warning}"));
    }
    Ok(adapter)
}
