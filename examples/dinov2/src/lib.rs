//! Fine-tuning DINOv2 on your own pictures: the model, and a program around it.

pub mod cli;
mod commands;
pub mod device;
pub mod digits;
mod error;
pub mod evidence;
mod files;
pub mod images;
mod inference;
mod knn;
mod memory;
pub mod method;
pub mod model;
pub mod ops;
pub mod precision;
pub mod report;
mod run;
pub mod scores;
mod seeds;
mod settings;
mod task;
mod training;
pub mod weights;

pub use commands::run;
pub use error::Error;
