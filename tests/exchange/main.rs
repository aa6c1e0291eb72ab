//! Adapters as values and as files: out of a model, into PEFT's folder, and back.

#[path = "../common/mod.rs"]
mod common;

mod checkpoints;
mod crashes;
mod extraction;
mod layouts;
mod malformed;
mod names;
mod parity;
mod parts;
mod round_trip;
mod saving;
mod strictness;
mod support;
