//! The user's pictures: finding them, reading them as the checkpoint's processor does, and feeding them to a model.

mod augment;
mod batch;
mod config;
mod decode;
mod files;
mod folder;
mod header;
mod jpeg;
mod layout;
mod loader;
mod pixels;
mod problems;
mod processor;
mod resample;
mod split;

pub use batch::picture;
pub use config::ProcessorError;
pub use decode::{DecodeError, decode};
pub use files::files;
pub use folder::{ImageFolder, Labelled, Note, ScanOptions, Skipped, labelled, scan};
pub use loader::{DeviceLoader, Epoch, ImageBatch, Loader, LoaderError, LoaderSettings};
pub use pixels::Pixels;
pub use problems::{FolderError, Problems};
pub use processor::Processor;
pub use resample::Filter;
pub use split::{Parts, split};

use std::path::Path;
use std::sync::Arc;

/// Where an image comes from. Cloning is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An image file.
    File(Arc<Path>),
    /// An embedded handwritten digit: 8 × 8 values from 0 to 16, which is white.
    Grey(Arc<[u8]>),
}

/// A labelled image. Cloning is cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub source: Source,
    /// The index of the class.
    pub label: usize,
}
