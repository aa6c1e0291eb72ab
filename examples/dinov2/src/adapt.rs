//! The default job: adapt one model, compare it with a linear probe, and save what was trained.

use std::path::Path;

use burn::module::{Param, ParamGroup};
use burn::prelude::*;
use burn_boft::peft::SaveOptions;
use burn_boft::{Adapter, KeyMap, Transformers, summary};

use crate::backbone::Backbone;
use crate::cli::Adapt;
use crate::digits;
use crate::error::Error;
use crate::folder;
use crate::images::Task;
use crate::method::{Method, trainable};
use crate::model::Dinov2ForImageClassification;
use crate::progress::Progress;
use crate::train::{Recipe, logits, predictions, test, train};

/// The file that a run leaves in its output folder. For BOFT and OFT, the settings of the adapter lie beside it.
const ADAPTER: &str = "adapter_model.safetensors";
const RECORD: &str = "adapter.bpk";

/// Adapts a model and reports accuracy before and after, on images that took no part in training.
///
/// # Errors
///
/// The images, the backbone, the output folder or the sizes cannot be used, or the training failed.
pub fn adapt(request: &Adapt, recipe: &Recipe, device: &Device) -> Result<(), Error> {
    let task = read_task(request, recipe.seed)?;
    println!(
        "{} classes: {}; {} images to train on, {} to validate, {} to test",
        task.classes.len(),
        task.classes.join(", "),
        task.split.train.len(),
        task.split.valid.len(),
        task.split.test.len(),
    );

    // Everything that can be wrong with the input is checked before the first training.
    let Adapt {
        method, backbone, ..
    } = request;
    let model = prepare(method, backbone, &task, recipe, device)?;
    std::fs::create_dir_all(&request.output).map_err(|source| Error::Path {
        path: request.output.clone(),
        source,
    })?;
    let saved = trainable(&model);
    let sizes = summary(&model);
    println!("{method}: {sizes}");
    if let Some(note) = method.adjusted(&sizes) {
        println!("{note}");
    }

    let probe = match method {
        Method::Linear => None,
        _ => {
            let model = prepare(&Method::Linear, backbone, &task, recipe, device)?;
            let rate = Method::Linear.learning_rate();
            Some(run(&Method::Linear, model, &task, recipe, rate)?)
        }
    };
    let trained = run(method, model, &task, recipe, request.learning_rate)?;

    if let Some(probe) = probe {
        println!(
            "accuracy before: {:.1} % (linear probe on the frozen backbone, trained alike)",
            100.0 * test(&probe, &task).accuracy,
        );
    }
    println!(
        "accuracy after:  {:.1} % ({method})",
        100.0 * test(&trained, &task).accuracy,
    );
    save(method, &trained, saved, &request.output)?;
    check_merged(method, &trained, &task)
}

/// Trains, shows the progress, and says which epoch was kept.
fn run(
    method: &Method,
    model: Dinov2ForImageClassification,
    task: &Task,
    recipe: &Recipe,
    rate: f64,
) -> Result<Dinov2ForImageClassification, Error> {
    let label = method.to_string();
    let trained = train(model, task, recipe, rate, &label, Progress::Shown)?;
    match trained.epoch {
        Some(epoch) => println!(
            "{method}: best epoch {epoch}, validation loss {:.3}, validation accuracy {:.1} %",
            trained.valid.loss,
            100.0 * trained.valid.accuracy,
        ),
        None => println!("{method}: stopped before the first epoch was complete"),
    }
    Ok(trained.model)
}

fn read_task(request: &Adapt, seed: u64) -> Result<Task, Error> {
    Ok(match (&request.images, &request.backbone) {
        (Some(path), Backbone::File { image_size, .. }) => folder::read(path, *image_size)?,
        _ => digits::digits(digits::NEW),
    }
    .split(seed))
}

/// The backbone with a new head, ready to train. The same seed gives every method the same head.
pub fn prepare(
    method: &Method,
    backbone: &Backbone,
    task: &Task,
    recipe: &Recipe,
    device: &Device,
) -> Result<Dinov2ForImageClassification, Error> {
    device.seed(recipe.seed);
    let model = backbone.load(task.classes.len(), &device.clone().autodiff())?;
    // Burn draws the random numbers of a parameter when it is first read, so the head is read here, before a method
    // draws numbers of its own.
    model.classifier.weight.val();
    model.classifier.bias.as_ref().map(Param::val);
    method.prepare(model)
}

/// Merges the adapter into the weights, and compares the predictions of both models on the test images.
fn check_merged(
    method: &Method,
    model: &Dinov2ForImageClassification,
    task: &Task,
) -> Result<(), Error> {
    let Some(merged) = method.merged(model.clone())? else {
        return Ok(());
    };
    let adapted = logits(model, &task.split.test, &task.format);
    let merged = logits(&merged, &task.split.test, &task.format);
    let (ours, theirs) = (predictions(&adapted), predictions(&merged));
    let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    let difference = (merged - adapted).abs().max().into_scalar::<f64>();
    if differing > 0 {
        return Err(Error::Merged {
            differing,
            difference,
        });
    }
    println!(
        "merged model: all {} test predictions equal, largest logit difference {difference:.1e}",
        ours.len(),
    );
    Ok(())
}

/// Saves what was trained, and nothing of the frozen backbone. BOFT and OFT are saved in PEFT's format with the names of
/// transformers 5, and everything else as a record of Burn.
fn save(
    method: &Method,
    model: &Dinov2ForImageClassification,
    trained: ParamGroup,
    folder: &Path,
) -> Result<(), Error> {
    let path = match method.adapter() {
        Some(_) => folder.join(ADAPTER),
        None => folder.join(RECORD),
    };
    let failed = |reason: String| Error::Write {
        path: path.clone(),
        reason,
    };
    match method.adapter() {
        Some(config) => {
            let names = SaveOptions::new().with_key_map(KeyMap::dinov2(Transformers::V5));
            Adapter::extract_as(model, &config)
                .map_err(|error| failed(error.to_string()))?
                .save_with(folder, &names)
                .map_err(|error| failed(error.to_string()))?;
        }
        None => {
            let record = model.clone().into_record_group(trained);
            record
                .save(&path)
                .map_err(|error| failed(error.to_string()))?;
        }
    }
    let bytes = std::fs::metadata(&path)
        .map_err(|error| failed(error.to_string()))?
        .len();
    println!(
        "saved {} ({:.1} kB): what was trained, nothing else",
        path.display(),
        bytes as f64 / 1e3
    );
    Ok(())
}
