//! `--pretrain`: trains the backbone that comes with the example from random weights.

use std::fs::File;
use std::path::Path;

use burn::prelude::*;
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot, SafetensorsStore};

use crate::backbone;
use crate::digits;
use crate::error::Error;
use crate::images::Image;
use crate::method::Method;
use crate::progress::Progress;
use crate::train::{Recipe, test, train};

/// The learning rate that the training of the backbone starts with.
const RATE: f64 = 1e-3;

/// Trains the backbone on the old digits and writes it with the names of Hugging Face's checkpoints.
///
/// # Errors
///
/// The file cannot be written, which is found before the training, or the training failed.
pub fn pretrain(output: &Path, recipe: &Recipe, device: &Device) -> Result<(), Error> {
    File::options()
        .create(true)
        .append(true)
        .open(output)
        .map_err(|source| Error::Path {
            path: output.to_path_buf(),
            source,
        })?;

    let mut task = digits::old_task();
    task.split.train = task.split.train.iter().flat_map(shifts).collect();

    device.seed(recipe.seed);
    let model = backbone::embedded_config()
        .with_num_labels(task.classes.len())
        .init(&device.clone().autodiff());
    let model = Method::Full.prepare(model)?;
    let trained = train(model, &task, recipe, RATE, "backbone", Progress::Shown)?;
    println!(
        "old digits: {:.1} % of the test images",
        100.0 * test(&trained.model, &task).accuracy,
    );

    let mut store = SafetensorsStore::from_file(output)
        .with_to_adapter(BurnToPyTorchAdapter)
        .with_regex(r"^dinov2\.")
        .overwrite(true);
    trained
        .model
        .save_into(&mut store)
        .map_err(|error| Error::Write {
            path: output.to_path_buf(),
            reason: error.to_string(),
        })?;
    println!("saved {}", output.display());
    Ok(())
}

/// An image and its eight neighbours, moved by a pixel along each axis.
fn shifts(image: &Image) -> Vec<Image> {
    let moves = (-1..=1).flat_map(|down| (-1..=1).map(move |right| (down, right)));
    moves
        .map(|(down, right)| shifted(image, down, right))
        .collect()
}

/// An image moved down and to the right. The pixels that enter are empty paper.
fn shifted(image: &Image, down: isize, right: isize) -> Image {
    let size = digits::SIZE as isize;
    let pixel = |row: isize, column: isize| {
        let (row, column) = (row - down, column - right);
        let inside = (0..size).contains(&row) && (0..size).contains(&column);
        if inside {
            image.pixels[(row * size + column) as usize]
        } else {
            0
        }
    };
    Image {
        pixels: (0..size)
            .flat_map(|row| (0..size).map(move |column| (row, column)))
            .map(|(row, column)| pixel(row, column))
            .collect(),
        label: image.label,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_the_ink_and_keeps_the_class() {
        let mut pixels = [0; digits::SIZE * digits::SIZE];
        pixels[0] = 9;
        pixels[digits::SIZE * 2 + 7] = 5;
        let image = Image {
            pixels: pixels.as_slice().into(),
            label: 3,
        };
        let moved = shifted(&image, 1, 1);
        assert_eq!(moved.label, 3);
        assert_eq!(moved.pixels[digits::SIZE + 1], 9);
        assert_eq!(
            moved.pixels.iter().map(|&v| usize::from(v)).sum::<usize>(),
            9
        );
        assert_eq!(shifts(&image).len(), 9);
        assert!(shifts(&image).contains(&image));
    }
}
