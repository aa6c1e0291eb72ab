//! Files of models and adapters: read from Hugging Face and PEFT, and written for them.
//!
//! A [`Checkpoint`] is a pretrained model. [`save`] writes what a training has learned, by any method, into a folder
//! that an [`AdapterFolder`] reads and puts on its base again; it also reads adapters that PEFT wrote. [`export_merged`]
//! and [`export_adapter`] write for Python.

mod adapter;
mod checkpoint;
mod config;
mod error;
mod export;
mod files;
mod fit;
mod hub;
mod lora;
mod whole;

pub use adapter::{AdapterFolder, LabelOrigin, Saved, save};
pub use checkpoint::{Checkpoint, HeadOrigin};
pub use error::WeightsError;
pub use export::{export_adapter, export_merged};
