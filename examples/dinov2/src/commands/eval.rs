//! `eval`: how good a model is on labelled images.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::Module;

use super::opened::Opened;
use crate::cli::{Eval, Part};
use crate::digits;
use crate::error::Error;
use crate::images::{Labelled, Sample, ScanOptions, labelled};
use crate::inference::predict;
use crate::scores::Scores;
use crate::task::{Task, remark, renumbered};

/// Prints accuracy, macro F1, a row per class and the confusion matrix.
///
/// # Errors
///
/// The model or the images cannot be used, or the images have classes that the model does not know.
pub fn run(request: &Eval) -> Result<ExitCode, Error> {
    let opened = Opened::open(&request.model)?;
    let (classes, samples) = images(request, &opened)?;
    if samples.is_empty() {
        return Err(Error::Settings(
            "this part of the images is empty".to_string(),
        ));
    }
    let samples = numbered(samples, &classes, &opened)?;
    let task = Task {
        classes,
        train: Arc::default(),
        valid: Arc::default(),
        test: samples.clone(),
        processor: opened.processor.clone(),
        skip_corrupt: request.skip_corrupt,
    };
    let loader = task.plain(&samples, request.model.batch_size, opened.workers)?;
    let predictions = predict(&opened.model.clone().materialize(), &loader)?;
    remark(&[], &loader.newly_skipped());
    let scores = Scores::of(&opened.labels, &predictions.labels, &predictions.answers())?;
    match request.json {
        true => println!("{}", serde_json::json!(scores)),
        false => println!(
            "{}\n\n{}\n\n{}",
            scores.line(),
            scores.class_table(),
            scores.confusion_table()
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// The classes and the images that are asked for, or else those of the run.
fn images(request: &Eval, opened: &Opened) -> Result<(Vec<String>, Arc<[Sample]>), Error> {
    let settings = opened.run.as_ref().map(|run| run.settings());
    let of_run = settings.and_then(|settings| settings.data.as_deref());
    let seed = settings.map(|settings| settings.recipe.seed);
    let seed = request.seed.or(seed).unwrap_or(0);
    let task = match (&request.data, of_run) {
        // Somebody who names a folder without parts wants all of it.
        (Some(path), _) if request.part.is_none() && !has_parts(path) => {
            let options = ScanOptions {
                seed,
                skip_corrupt: request.skip_corrupt,
            };
            let Labelled {
                classes,
                samples,
                skipped,
                notes,
            } = labelled(path, &options)?;
            remark(&notes, &skipped);
            return Ok((classes, samples.into()));
        }
        (Some(path), _) => path,
        (None, Some(path)) => path,
        (None, None) if opened.checkpoint.is_embedded() => {
            let task = Task::digits(digits::NEW, seed);
            let samples = part(&task, request.part.unwrap_or_default());
            return Ok((task.classes, samples));
        }
        (None, None) => {
            let text = "--data is needed: labelled images to evaluate on";
            return Err(Error::Settings(text.to_string()));
        }
    };
    let task = Task::folder(task, opened.processor.clone(), seed, request.skip_corrupt)?;
    let samples = part(&task, request.part.unwrap_or_default());
    Ok((task.classes, samples))
}

/// Whether a folder holds the parts of a data set rather than classes.
fn has_parts(path: &Path) -> bool {
    ["train", "test"]
        .iter()
        .all(|part| path.join(part).is_dir())
}

fn part(task: &Task, part: Part) -> Arc<[Sample]> {
    match part {
        Part::Train => task.train.clone(),
        Part::Val => task.valid.clone(),
        Part::Test => task.test.clone(),
        Part::All => [&task.train, &task.valid, &task.test]
            .into_iter()
            .flat_map(|samples| samples.iter().cloned())
            .collect(),
    }
}

/// The samples with the model's numbers of their classes.
fn numbered(
    samples: Arc<[Sample]>,
    classes: &[String],
    opened: &Opened,
) -> Result<Arc<[Sample]>, Error> {
    if !opened.named && classes.len() == opened.labels.len() {
        eprintln!(
            "note: nothing names the classes of the model, so they are taken in the order of the folder"
        );
        return Ok(samples);
    }
    renumbered(&samples, classes, &opened.labels).map_err(|unknown| {
        Error::Settings(format!(
            "the model does not know the classes {} of the images; it knows {}",
            unknown.join(", "),
            opened.labels.join(", ")
        ))
    })
}
