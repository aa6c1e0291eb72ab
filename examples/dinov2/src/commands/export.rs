//! `export`: a model or an adapter for `transformers` and PEFT.

use std::process::ExitCode;

use burn::module::Module;

use super::opened::{Opened, open_adapter};
use crate::cli::{Export, What};
use crate::error::Error;
use crate::weights::{export_adapter, export_merged};

/// Writes the folder, which appears whole.
///
/// # Errors
///
/// The model cannot be used or merged, or the folder exists or cannot be written.
pub fn run(request: &Export) -> Result<ExitCode, Error> {
    let opened = Opened::open(&request.model)?;
    match request.what {
        What::Merged => {
            // Folds every adapter into its base weight, those of BOFT and OFT and those of LoRA alike.
            let merged = opened.model.materialize();
            let preprocessor = opened.processor.to_json();
            export_merged(
                &merged,
                &opened.checkpoint,
                &opened.labels,
                &preprocessor,
                &request.output,
            )?;
        }
        What::Adapter => {
            let Some(adapter) = &opened.adapter else {
                let text = "--what adapter needs --adapter or --run";
                return Err(Error::Settings(text.to_string()));
            };
            export_adapter(
                &open_adapter(adapter)?,
                request.names.into(),
                &request.output,
            )?;
        }
    }
    println!("wrote {}", request.output.display());
    Ok(ExitCode::SUCCESS)
}
