//! What becomes of a model: plan, inject, train, diagnose, merge, unload.

#[path = "../common/mod.rs"]
mod common;

mod coft;
mod diagnosis;
mod dropout;
mod errors;
mod layers;
mod lifecycle;
mod oracle;
mod peft_numbers;
mod precision;
mod pytorch_files;
mod tree;
