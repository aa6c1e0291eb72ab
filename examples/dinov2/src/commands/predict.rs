//! `predict`: classifies images.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::Module;
use burn::prelude::*;
use comfy_table::{Cell, CellAlignment, Table, presets};
use rayon::prelude::*;
use serde::Serialize;

use super::opened::Opened;
use crate::cli::Predict;
use crate::error::Error;
use crate::images::{Source, files};
use crate::inference::probabilities;
use crate::model::Dinov2ForImageClassification;

/// The exit code if an image could not be classified.
const CORRUPT: u8 = 2;

/// What is said about one image.
#[derive(Serialize)]
#[serde(untagged)]
enum Line<'a> {
    Classified {
        image: String,
        logits: Vec<f32>,
        top: Vec<Top<'a>>,
    },
    Failed {
        image: String,
        error: String,
    },
}

/// A class and its probability.
#[derive(Serialize)]
struct Top<'a> {
    label: &'a str,
    probability: f64,
}

/// Prints the most likely classes of every image, as they are read. The exit code is 2 if an image could not be read.
///
/// # Errors
///
/// The model cannot be used, or the output cannot be written.
pub fn run(request: &Predict) -> Result<ExitCode, Error> {
    let opened = Opened::open(&request.model)?;
    let model = opened.model.clone().materialize();
    let mut failed = 0;
    let mut any = false;
    let mut images = files(&request.images).peekable();
    while images.peek().is_some() {
        let chunk = images.by_ref().take(request.model.batch_size.max(1));
        let paths: Vec<_> = chunk.collect();
        let prepared: Vec<Result<Vec<f32>, String>> = paths
            .par_iter()
            .map(|found| match found {
                Ok(path) => {
                    let source = Source::File(Arc::from(path.as_path()));
                    let pixels = opened.processor.prepare(&source);
                    pixels.map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            })
            .collect();
        let mut logits = logits(&opened, &model, &prepared).into_iter();
        any = true;
        for (found, pixels) in paths.iter().zip(prepared) {
            let image = match found {
                Ok(path) => path.display().to_string(),
                Err(_) => String::new(),
            };
            let line = match pixels {
                Ok(_) => {
                    let logits = logits.next().unwrap_or_default();
                    let top = top(&logits, &opened.labels, request.top);
                    Line::Classified { image, logits, top }
                }
                Err(error) => {
                    failed += 1;
                    Line::Failed { image, error }
                }
            };
            print(&line, request.json)?;
        }
    }
    if !any {
        let text =
            "--images names folders without an image; PNG, JPEG, WebP, GIF, BMP and TIFF are read";
        return Err(Error::Settings(text.to_string()));
    }
    if failed > 0 {
        let images = if failed == 1 { "image" } else { "images" };
        eprintln!("error: {failed} {images} could not be read");
        return Ok(ExitCode::from(CORRUPT));
    }
    Ok(ExitCode::SUCCESS)
}

/// The logits of the images that could be prepared.
fn logits(
    opened: &Opened,
    model: &Dinov2ForImageClassification,
    prepared: &[Result<Vec<f32>, String>],
) -> Vec<Vec<f32>> {
    let pixels: Vec<f32> = prepared.iter().flatten().flatten().copied().collect();
    let count = prepared.iter().flatten().count();
    if count == 0 {
        return Vec::new();
    }
    let processor = &opened.processor;
    let shape = [
        count,
        processor.channels(),
        processor.height(),
        processor.width(),
    ];
    let pixels = Tensor::from_data(TensorData::new(pixels, shape), &model.device());
    let logits = model.forward(pixels);
    let [_, classes] = logits.dims();
    let values: Vec<f32> = logits.into_data().iter::<f32>().collect();
    values.chunks_exact(classes).map(<[f32]>::to_vec).collect()
}

/// The most likely classes, the likeliest first.
fn top<'a>(logits: &[f32], labels: &'a [String], count: usize) -> Vec<Top<'a>> {
    let mut ranked: Vec<Top> = probabilities(logits)
        .into_iter()
        .zip(labels)
        .map(|(probability, label)| Top { label, probability })
        .collect();
    ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    ranked.truncate(count);
    ranked
}

/// Prints a line of JSON, or a small table under the image's path.
fn print(line: &Line, json: bool) -> Result<(), Error> {
    let text = match (line, json) {
        (_, true) => serde_json::to_string(line).map_err(|error| Error::Write {
            path: "the output".into(),
            reason: error.to_string(),
        })?,
        (Line::Failed { error, .. }, false) => error.clone(),
        (Line::Classified { image, top, .. }, false) => {
            let mut table = Table::new();
            table.load_preset(presets::NOTHING);
            for class in top {
                let share = format!("{:.1} %", 100.0 * class.probability);
                table.add_row([
                    Cell::new(share).set_alignment(CellAlignment::Right),
                    Cell::new(class.label),
                ]);
            }
            format!("{image}\n{table}")
        }
    };
    let mut output = std::io::stdout().lock();
    writeln!(output, "{text}").map_err(|source| Error::Path {
        path: "the output".into(),
        source,
    })
}
