//! The tool `burn-boft`, run on small models and on what PEFT wrote.

mod broken_adapters;
mod broken_models;
mod convert_folders;
mod convert_loras;
mod convert_records;
mod dense;
mod dialects;
mod diff;
mod files;
mod half;
mod inspect;
#[cfg(unix)]
mod interrupts;
mod labels;
mod limits;
#[cfg(target_os = "linux")]
mod memory;
mod merge;
mod names;
mod numbers;
mod orientation;
mod outputs;
mod quantize;
mod saved;
mod several;
mod stable_diffusion;
mod strength;
mod terminal;
mod tied;
mod unmerge;
mod valid;
