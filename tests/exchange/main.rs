//! Adapters as values and as PEFT's files: extracted from a model, saved, loaded and attached again.

#[path = "../common/mod.rs"]
mod common;

mod checkpoints;
mod copies;
mod crashes;
mod dialects;
mod dinov2;
mod extraction;
mod impossible_sizes;
mod layouts;
mod malformed;
mod names;
mod parity;
mod parts;
mod round_trip;
mod saving;
mod settings;
mod shared_folders;
mod stable_diffusion;
mod strength;
mod strictness;
mod support;
mod untrained_scale;
