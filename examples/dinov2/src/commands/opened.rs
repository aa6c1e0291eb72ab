//! A model as the commands that do not train use it: opened, adapted, with its classes and its preprocessing.

use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::Device;
use burn::train::Interrupter;

use crate::cli;
use crate::error::Error;
use crate::images::Processor;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;
use crate::run::RunFolder;
use crate::seeds::mix;
use crate::weights::{AdapterFolder, Checkpoint, HeadOrigin, LabelOrigin};

use super::INTERRUPTED;

/// Tells the seed of a method's own numbers from that of the head.
const METHOD: u64 = 1;

/// A model that can be asked.
pub struct Opened {
    /// The model in inference mode, with its adapter attached.
    pub model: Dinov2ForImageClassification,
    pub checkpoint: Checkpoint,
    pub adapter: Option<PathBuf>,
    pub labels: Vec<String>,
    /// Whether the labels are names, and not numbers in place of them.
    pub named: bool,
    pub processor: Processor,
    /// The run that was named.
    pub run: Option<RunFolder>,
    pub workers: usize,
}

impl Opened {
    /// Opens what the flags name.
    ///
    /// # Errors
    ///
    /// A file cannot be used, the parts do not fit each other, or nobody has trained the head.
    pub fn open(request: &cli::Model) -> Result<Self, Error> {
        let run = request.run.as_deref().map(RunFolder::open).transpose()?;
        let (name, adapter) = match &run {
            Some(run) => {
                let adapter = run.adapter();
                if !adapter.is_dir() {
                    return Err(Error::Settings(format!(
                        "{} has no adapter yet; finish it with `train --resume {0}`",
                        run.path().display()
                    )));
                }
                (run.settings().model.clone(), Some(adapter))
            }
            None => (request.model.clone(), request.adapter.clone()),
        };
        let folder = adapter.as_deref().map(open_adapter).transpose()?;
        // An adapter says what it was trained from.
        let base = folder.as_ref().and_then(AdapterFolder::base);
        let name = name.or(base.filter(|_| run.is_none()).map(str::to_string));
        if name.is_none() && run.is_none() {
            let text = "--model or --run is needed: nothing else says which model to use";
            return Err(Error::Settings(text.to_string()));
        }
        let checkpoint = open_checkpoint(name.as_deref())?;
        let device = request.device.device()?;
        let (labels, named) = labels(&checkpoint, folder.as_ref())?;
        let (mut model, head) = checkpoint.load(&labels, &device)?;
        match &folder {
            Some(folder) => model = folder.attach(model)?,
            None => {
                if let HeadOrigin::Fresh { reason } = head {
                    return Err(Error::Settings(format!(
                        "{} has no trained head ({reason}); name the --adapter that has one",
                        checkpoint.name()
                    )));
                }
            }
        }
        let saved = folder.as_ref().and_then(AdapterFolder::preprocessor);
        let mut processor = processor(&checkpoint, saved)?;
        if let Some(size) = request.image_size {
            processor = sized(processor, size, &checkpoint)?;
        }
        Ok(Self {
            model: model.valid(),
            checkpoint,
            adapter,
            labels,
            named,
            processor,
            run,
            workers: request.workers.unwrap_or_else(crate::settings::processors),
        })
    }
}

/// The classes that the head of a model tells apart, and whether they are names.
fn labels(
    checkpoint: &Checkpoint,
    adapter: Option<&AdapterFolder>,
) -> Result<(Vec<String>, bool), Error> {
    let Some(adapter) = adapter else {
        let labels = checkpoint.labels();
        let labels = labels.map(|labels| (labels.to_vec(), true));
        return labels.ok_or_else(|| {
            Error::Settings(format!(
                "{} has no head, so it tells no classes apart; name the --adapter that has one",
                checkpoint.name()
            ))
        });
    };
    let (labels, origin) = adapter.labels_for(checkpoint)?;
    if origin == LabelOrigin::Numbered {
        eprintln!(
            "note: neither the adapter nor the model names the classes, so they are numbered"
        );
    }
    Ok((labels, origin != LabelOrigin::Numbered))
}

/// Opens a pretrained model by its folder or name, or the one that comes with this program.
///
/// # Errors
///
/// There is none of that name, or its files cannot be used.
pub fn open_checkpoint(name: Option<&str>) -> Result<Checkpoint, Error> {
    let Some(name) = name else {
        return Ok(Checkpoint::embedded());
    };
    let checkpoint = Checkpoint::open(name)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    Ok(checkpoint)
}

/// Opens an adapter, and passes on what was remarkable about it.
///
/// # Errors
///
/// There is none, or its files cannot be used.
pub fn open_adapter(folder: &Path) -> Result<AdapterFolder, Error> {
    let adapter = AdapterFolder::open(folder)?;
    for warning in adapter.warnings() {
        eprintln!("warning: {warning}");
    }
    Ok(adapter)
}

/// A pretrained model with a head for these classes. The same seed gives every method the same head.
///
/// # Errors
///
/// The files of the model cannot be used.
pub fn with_head(
    checkpoint: &Checkpoint,
    classes: &[String],
    seed: u64,
    device: &Device,
) -> Result<(Dinov2ForImageClassification, HeadOrigin), Error> {
    device.seed(seed);
    let (model, origin) = checkpoint.load(classes, device)?;
    // Burn draws the random numbers of a parameter when it is first read.
    model.classifier.weight.val();
    model.classifier.bias.as_ref().map(Param::val);
    Ok((model, origin))
}

/// A pretrained model prepared for a method. What the method draws does not depend on what was drawn before.
///
/// # Errors
///
/// The sizes of the method do not fit the model.
pub fn with_method(
    model: Dinov2ForImageClassification,
    method: &Method,
    seed: u64,
) -> Result<Dinov2ForImageClassification, Error> {
    model.device().seed(mix(seed, &[METHOD]));
    Ok(method.prepare(model)?)
}

/// Makes Ctrl-C stop the work after a step, and at the second time the program.
///
/// # Errors
///
/// The system does not let the program handle it.
pub fn stop_on_interrupt(interrupter: &Interrupter) -> Result<(), Error> {
    let interrupter = interrupter.clone();
    ctrlc::set_handler(move || {
        if interrupter.should_stop() {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("stopping after this step; press Ctrl-C again to stop at once");
        interrupter.stop(Some("interrupted"));
    })
    .map_err(|error| Error::Settings(format!("Ctrl-C cannot be handled: {error}")))
}

/// The preprocessing of a model: as it was saved with an adapter, else as the checkpoint says, else as DINOv2 was published.
///
/// # Errors
///
/// The preprocessing is one that this program does not do.
pub fn processor(
    checkpoint: &Checkpoint,
    saved: Option<&serde_json::Value>,
) -> Result<Processor, Error> {
    if checkpoint.is_embedded() {
        return Ok(Processor::digits());
    }
    match saved.or(checkpoint.preprocessor()) {
        Some(json) => Ok(Processor::from_json(json)?),
        None => Ok(Processor::dinov2()),
    }
}

/// The preprocessing with another size.
///
/// # Errors
///
/// The size is no whole number of patches.
pub fn sized(
    processor: Processor,
    size: usize,
    checkpoint: &Checkpoint,
) -> Result<Processor, Error> {
    let patch = checkpoint.config().patch_size;
    if size == 0 || !size.is_multiple_of(patch) {
        let below = (size / patch).max(1) * patch;
        return Err(Error::Settings(format!(
            "--image-size must be a multiple of the model's patches of {patch} pixels: {below} or {}, not {size}",
            below + patch
        )));
    }
    Ok(processor.with_image_size(size))
}
