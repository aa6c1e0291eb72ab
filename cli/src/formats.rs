//! `formats`: what is read, from the library's table.

use burn_boft::dialects::Dialect;
use serde_json::json;

use crate::error::Error;
use crate::terminal::report;

pub fn run(json: bool) -> Result<(), Error> {
    let text = Dialect::ALL.map(|dialect| {
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
    report(json, &text.join("\n"), &json!(value))
}
