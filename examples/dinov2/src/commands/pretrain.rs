//! `pretrain`: trains the backbone that comes with this program from random weights.

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot, SafetensorsStore};
use burn::train::Interrupter;

use crate::cli::Pretrain;
use crate::digits;
use crate::error::Error;
use crate::images::{Loader, LoaderSettings, Sample, Source};
use crate::inference::predict;
use crate::method::Method;
use crate::settings::processors;
use crate::task::Task;
use crate::training::progress::Progress;
use crate::training::{Loaders, Recipe, train};
use crate::weights::Checkpoint;

/// Images per optimizer step, and the peak learning rate.
const BATCH: usize = 32;
const RATE: f64 = 1e-3;

/// Trains the backbone on the old digits and writes it with the names of Hugging Face's checkpoints.
///
/// # Errors
///
/// The file cannot be written, which is found before the training, or the training failed.
pub fn run(request: &Pretrain) -> Result<ExitCode, Error> {
    let output = &request.output;
    File::options()
        .create(true)
        .append(true)
        .open(output)
        .map_err(|source| Error::Path {
            path: output.clone(),
            source,
        })?;
    let device = request.device.device()?.autodiff();
    // The old digits are always split in the same way, so that what the backbone has seen stays known.
    let task = Task::digits(digits::OLD, 0);
    let shifted: Arc<[Sample]> = task.train.iter().flat_map(shifts).collect();

    device.seed(request.seed);
    let config = Checkpoint::embedded().config().clone();
    let model = config.with_num_labels(task.classes.len()).init(&device);
    let model = Method::Full.prepare(model)?;
    let recipe = Recipe {
        epochs: request.epochs,
        batch_size: BATCH,
        accumulate: 1,
        max_steps: None,
        learning_rate: RATE,
        head_learning_rate: RATE,
        warm_up: 0.0,
        weight_decay: 0.0,
        clip_norm: 0.0,
        label_smoothing: 0.0,
        patience: None,
        seed: request.seed,
    };
    let loaders = Loaders {
        train: Loader::new(
            shifted,
            task.processor.clone(),
            LoaderSettings {
                batch_size: BATCH,
                shuffle_seed: Some(request.seed),
                augment: false,
                label_smoothing: 0.0,
                workers: processors(),
                skip_corrupt: false,
            },
        )?,
        valid: task.plain(&task.valid, BATCH, processors())?,
    };
    let trained = train(
        model,
        &loaders,
        &recipe,
        None,
        "backbone",
        Progress::Shown,
        &Interrupter::new(),
    )?;
    let test = predict(
        &trained.model,
        &task.plain(&task.test, BATCH, processors())?,
    )?;
    println!(
        "old digits: {:.1} % of the test images",
        100.0 * test.accuracy()
    );

    let mut store = SafetensorsStore::from_file(output)
        .with_to_adapter(BurnToPyTorchAdapter)
        // `transformers` refuses files that do not say this.
        .clear_metadata()
        .metadata("format", "pt")
        .with_regex(r"^dinov2\.")
        .overwrite(true);
    let saved = trained.model.save_into(&mut store);
    saved.map_err(|error| Error::Write {
        path: output.clone(),
        reason: error.to_string(),
    })?;
    println!("saved {}", output.display());
    Ok(ExitCode::SUCCESS)
}

/// An image and its eight neighbours, moved by a pixel along each axis.
fn shifts(sample: &Sample) -> Vec<Sample> {
    let Source::Grey(pixels) = &sample.source else {
        return vec![sample.clone()];
    };
    let moves = (-1..=1).flat_map(|down| (-1..=1).map(move |right| (down, right)));
    moves
        .map(|(down, right)| Sample {
            source: Source::Grey(shifted(pixels, down, right)),
            label: sample.label,
        })
        .collect()
}

/// An image moved down and to the right. The pixels that enter are empty paper.
fn shifted(pixels: &[u8], down: isize, right: isize) -> Arc<[u8]> {
    let size = digits::SIZE as isize;
    let pixel = |row: isize, column: isize| {
        let (row, column) = (row - down, column - right);
        let inside = (0..size).contains(&row) && (0..size).contains(&column);
        match inside {
            true => pixels[(row * size + column) as usize],
            false => 0,
        }
    };
    (0..size)
        .flat_map(|row| (0..size).map(move |column| (row, column)))
        .map(|(row, column)| pixel(row, column))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_the_ink_and_keeps_the_class() {
        let mut pixels = [0; digits::SIZE * digits::SIZE];
        pixels[0] = 9;
        pixels[digits::SIZE * 2 + 7] = 5;
        let moved = shifted(&pixels, 1, 1);
        assert_eq!(moved[digits::SIZE + 1], 9);
        assert_eq!(moved.iter().map(|&v| usize::from(v)).sum::<usize>(), 9);

        let sample = Sample {
            source: Source::Grey(pixels.as_slice().into()),
            label: 3,
        };
        let all = shifts(&sample);
        assert_eq!(all.len(), 9);
        assert!(all.iter().all(|moved| moved.label == 3));
        assert!(matches!(&all[4].source, Source::Grey(same) if **same == pixels));
    }
}
