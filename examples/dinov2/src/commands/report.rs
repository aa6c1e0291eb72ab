//! `report`: a page about a run.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::Module;
use burn::prelude::*;
use burn_boft::diagnose;
use image::RgbImage;
use image::imageops::FilterType;
use serde::Deserialize;

use super::opened::Opened;
use crate::cli::{self, Report as Request};
use crate::error::Error;
use crate::images::{Source, picture};
use crate::inference::{largest, probabilities};
use crate::model::Dinov2ForImageClassification;
use crate::report::{LayerPoint, Mistake, PatchPicture, Report, patches};
use crate::run::RunFolder;
use crate::scores::confusion_matrix;
use crate::training::journal::{self, Entry};

/// Classes named beside a mistake.
const NAMED: usize = 3;
/// Pixels along the longer side of a picture on the page.
const PICTURE: u32 = 224;

/// A line of the file of predictions.
#[derive(Deserialize)]
struct Predicted {
    image: Option<PathBuf>,
    label: usize,
    logits: Vec<f32>,
}

/// Writes the page, which is one file without references to others.
///
/// # Errors
///
/// The folder is no run, or its files cannot be used, or the page cannot be written.
pub fn run(request: &Request) -> Result<ExitCode, Error> {
    let run = RunFolder::open(&request.run)?;
    let mut report = Report {
        title: format!("{} on {}", run.settings().method, subject(&run)),
        settings: settings(&run)?,
        ..Report::default()
    };
    add_journal(&mut report, &run)?;
    match run.results()? {
        Some(results) => {
            report.best_epoch = Some(results.best_epoch);
            add_results(&mut report, &run, request)?;
        }
        None => report.notes.push(format!(
            "The run has not finished. It goes on with: dinov2 train --resume {}",
            run.path().display()
        )),
    }
    let output = request.output.clone();
    let output = output.unwrap_or_else(|| run.path().join("report.html"));
    report.write(&output)?;
    println!("wrote {}", output.display());
    Ok(ExitCode::SUCCESS)
}

/// What was learned.
fn subject(run: &RunFolder) -> String {
    match &run.settings().data {
        Some(path) => path.file_name().map_or_else(
            || path.display().to_string(),
            |name| name.to_string_lossy().into_owned(),
        ),
        None => "the handwritten digits 5 to 9".to_string(),
    }
}

/// The settings, and what came of them.
fn settings(run: &RunFolder) -> Result<Vec<(String, String)>, Error> {
    let mut listed = Vec::new();
    if let Some(results) = run.results()? {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        listed.push(("test accuracy".to_string(), percent(results.test_accuracy)));
        if let Some(probe) = run.probe_scores()? {
            listed.push((
                "test accuracy of the linear probe".to_string(),
                percent(probe.test_accuracy),
            ));
        }
        listed.push((
            "trainable parameters".to_string(),
            results.trainable_parameters.to_string(),
        ));
        listed.push((
            "training time".to_string(),
            format!("{:.0} s", results.seconds),
        ));
    }
    let table = run.settings().to_options().to_table()?;
    listed.extend(table.into_iter().map(|(name, value)| (name, plain(&value))));
    Ok(listed)
}

/// A value without the quotes of TOML.
fn plain(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn add_journal(report: &mut Report, run: &RunFolder) -> Result<(), Error> {
    let path = run.journal();
    if !path.exists() {
        return Ok(());
    }
    for entry in journal::read(&path)? {
        match entry {
            Entry::Step(step) => report.steps.push(step),
            Entry::Epoch(epoch) => report.epochs.push(epoch),
        }
    }
    Ok(())
}

/// Adds what the trained model shows: confusions, mistakes, rotations and features.
fn add_results(report: &mut Report, run: &RunFolder, request: &Request) -> Result<(), Error> {
    let opened = Opened::open(&cli::Model {
        run: Some(run.path().to_path_buf()),
        ..cli::Model::default()
    })?;
    let predictions = predictions(run)?;
    let truth: Vec<usize> = predictions.iter().map(|line| line.label).collect();
    let answers: Vec<usize> = predictions
        .iter()
        .map(|line| largest(&line.logits))
        .collect();
    report.classes.clone_from(&opened.labels);
    report.confusion = confusion_matrix(opened.labels.len(), &truth, &answers)?;
    report.layers = diagnose(&opened.model)
        .layers
        .iter()
        .map(LayerPoint::from)
        .collect();
    report.mistakes = mistakes(&predictions, &opened.labels, request.mistakes);
    report.patches = features(&opened, &predictions, request.patches)?;
    Ok(())
}

fn predictions(run: &RunFolder) -> Result<Vec<Predicted>, Error> {
    let path = run.predictions();
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Path {
        path: path.clone(),
        source,
    })?;
    let lines = text.lines().map(serde_json::from_str);
    let lines: Result<Vec<_>, _> = lines.collect();
    lines.map_err(|error| Error::SettingsFile {
        path,
        reason: error.to_string(),
    })
}

/// The mistakes that the model was surest of. An image that is gone has no picture, and is left out.
fn mistakes(predictions: &[Predicted], labels: &[String], count: usize) -> Vec<Mistake> {
    let mut wrong: Vec<(&PathBuf, usize, Vec<f64>)> = predictions
        .iter()
        .filter(|line| largest(&line.logits) != line.label)
        .filter_map(|line| {
            Some((
                line.image.as_ref()?,
                line.label,
                probabilities(&line.logits),
            ))
        })
        .collect();
    let doubt = |(_, truth, shares): &(&PathBuf, usize, Vec<f64>)| shares[*truth];
    wrong.sort_by(|a, b| doubt(a).total_cmp(&doubt(b)));
    let pictured = wrong.into_iter().filter_map(|(path, truth, shares)| {
        let mut top: Vec<(String, f64)> = labels.iter().cloned().zip(shares).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1));
        top.truncate(NAMED);
        Some(Mistake {
            path: path.clone(),
            thumbnail: reduced(picture(path).ok()?),
            truth: labels[truth].clone(),
            top,
        })
    });
    pictured.take(count).collect()
}

fn reduced(picture: RgbImage) -> RgbImage {
    let longer = picture.width().max(picture.height());
    if longer <= PICTURE {
        return picture;
    }
    let side = |side: u32| (side * PICTURE / longer).max(1);
    let size = (side(picture.width()), side(picture.height()));
    image::imageops::resize(&picture, size.0, size.1, FilterType::Triangle)
}

/// The patch features of some test images, spread over the classes, before and after training.
fn features(
    opened: &Opened,
    predictions: &[Predicted],
    count: usize,
) -> Result<Vec<PatchPicture>, Error> {
    let images: Vec<&PathBuf> = predictions
        .iter()
        .filter_map(|line| line.image.as_ref())
        .collect();
    let count = count.min(images.len());
    let (pretrained, _) = opened
        .checkpoint
        .load(&opened.labels, &opened.model.device())?;
    let trained = opened.model.clone().materialize();
    let mut pictures = Vec::new();
    for index in 0..count {
        let path = images[index * images.len() / count];
        let source = Source::File(Arc::from(path.as_path()));
        let Ok(pixels) = opened.processor.prepare(&source) else {
            continue;
        };
        let processor = &opened.processor;
        let shape = [
            1,
            processor.channels(),
            processor.height(),
            processor.width(),
        ];
        let pixels = Tensor::<4>::from_data(TensorData::new(pixels, shape), &trained.device());
        let (before, width, grid) = patch_features(&pretrained, pixels.clone());
        let (after, ..) = patch_features(&trained, pixels.clone());
        let Ok([before, after]) = patches::pictures(&before, &after, width, grid) else {
            continue;
        };
        pictures.push(PatchPicture {
            image: processor.picture(&pixels.into_data().iter::<f32>().collect::<Vec<_>>()),
            before,
            after,
        });
    }
    Ok(pictures)
}

/// The features of the patches of one image, their width, and the rows and columns of the patches.
fn patch_features(
    model: &Dinov2ForImageClassification,
    pixels: Tensor<4>,
) -> (Vec<f32>, usize, [usize; 2]) {
    let (patches, grid) = model.dinov2.patch_features(pixels);
    let [_, _, width] = patches.dims();
    (patches.into_data().iter::<f32>().collect(), width, grid)
}
