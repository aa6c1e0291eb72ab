//! Adapters that other programs write for the same rotations, in files of their own.
//!
//! [`AdapterFile::read`] recognises the file by the names and shapes of its tensors, and [`AdapterFile::adapter`] makes the
//! [`Adapter`](crate::Adapter) of it that computes what the program computes when it merges: names of modules become those of
//! the model, and whatever the program does to its numbers before they are a rotation has been done. [`Dialect`] has the
//! table of what is read.
//!
//! [`Adapter::to_sd_scripts`](crate::Adapter::to_sd_scripts) goes the other way. PEFT's own folders are [`peft`](crate::peft)'s.
//!
//! # Examples
//!
//! ```no_run
//! use std::collections::BTreeMap;
//!
//! use burn_boft::KeyMap;
//! use burn_boft::dialects::AdapterFile;
//!
//! let file = AdapterFile::read("style.safetensors")?;
//! println!("{} layers of {}", file.layers().len(), file.program());
//! // Every module of the model that has a weight, with the shape that PyTorch gives it.
//! let model = BTreeMap::from([("mid_block.attentions.0.proj_in".to_string(), vec![320, 320, 1, 1])]);
//! let adapter = file.adapter(&model, &KeyMap::new())?;
//! # drop(adapter);
//! # Ok::<(), burn_boft::dialects::DialectError>(())
//! ```

mod error;
mod file;
mod lycoris;
mod names;
mod oft_v2;
mod open_clip;
mod parts;
mod read;
mod sd_scripts;
mod table;
mod unet;
mod write;

pub use error::{DialectError, Misplaced};
pub use file::{AdapterFile, FileLayer, Placed};
pub use read::has_rotation;
pub use table::{Dialect, ToPeft};
pub use write::WriteError;
