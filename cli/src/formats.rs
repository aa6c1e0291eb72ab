//! `formats`: what is read, from the library's table.

use burn_boft::dialects::Dialect;
use serde_json::json;

use crate::error::Error;
use crate::terminal::report;

/// Every dialect, with what is known of it.
pub fn text() -> String {
    let dialects = Dialect::ALL.map(|dialect| {
        format!(
            "{}\n  written by  {}\n  tensors     {}\n  rotates     {}s\n  merged to   {}\n  to PEFT     {}\n",
            dialect.name(),
            dialect.programs(),
            dialect.tensors(),
            dialect.axis().name(),
            dialect.merges(),
            dialect.to_peft().name()
        )
    });
    dialects.join("\n")
}

pub fn run(json: bool) -> Result<(), Error> {
    let value = Dialect::ALL.map(|dialect| {
        json!({
            "dialect": dialect.name(),
            "written_by": dialect.programs(),
            "tensors": dialect.tensors(),
            "rotates": dialect.axis().name(),
            "merged_to": dialect.merges(),
            "to_peft": dialect.to_peft().name(),
        })
    });
    report(json, &text(), &json!(value))
}
