//! What becomes of a model: plan, inject, train, diagnose, merge, unload.

#[path = "../common/mod.rs"]
mod common;

mod bank;
mod batch_norms;
mod coft;
mod devices;
mod diagnosis;
mod dropout;
mod errors;
mod layers;
mod lifecycle;
mod many_layers;
mod once;
mod oracle;
mod peft_numbers;
mod plain;
mod precision;
mod pytorch_files;
mod quantized;
mod recognition;
mod scaled_skew;
mod shared;
mod strategies;
mod targets;
mod tree;
