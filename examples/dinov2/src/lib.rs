//! Fine-tuning a DINOv2 image classifier with BOFT: the model, and a program around it.

pub mod model;
pub mod ops;

mod adapt;
mod backbone;
mod best;
pub mod cli;
mod compare;
pub mod device;
mod digits;
mod error;
mod folder;
mod images;
mod knn;
mod method;
mod pretrain;
mod progress;
mod train;

use cli::{Job, Settings};
pub use error::Error;

/// The backbone that comes with the example, under a new head.
///
/// # Errors
///
/// The embedded file was written for another model.
pub fn embedded(
    num_labels: usize,
    device: &burn::tensor::Device,
) -> Result<model::Dinov2ForImageClassification, Error> {
    backbone::Backbone::Embedded.load(num_labels, device)
}

/// Does the job that the command line asks for.
///
/// # Errors
///
/// The first failure, which ends the job.
pub fn run(settings: Settings) -> Result<(), Error> {
    let Settings {
        job,
        recipe,
        device,
    } = settings;
    let device = device.device()?;
    match job {
        Job::Adapt(request) => adapt::adapt(&request, &recipe, &device),
        Job::Compare { methods, seeds } => compare::compare(&methods, seeds, &recipe, &device),
        Job::Pretrain { output } => pretrain::pretrain(&output, &recipe, &device),
    }
}
