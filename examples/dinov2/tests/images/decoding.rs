//! Decoding and preparing, beside Pillow and `transformers`.

use std::fs;

use dinov2::images::{DecodeError, Processor, decode};
use image::{Rgb, RgbImage};
use safetensors::SafeTensors;

use crate::common::*;

#[test]
fn every_format_is_decoded_to_the_bytes_of_pillow() {
    let file = fs::read(fixture("decoded.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut failures = Vec::new();
    for (name, tensor) in expected.tensors() {
        match decode(&picture(&name)) {
            Err(error) => failures.push(error.to_string()),
            Ok(found) => {
                if [found.height, found.width, found.channels] != *tensor.shape() {
                    failures.push(format!("{name} has {} columns", found.width));
                }
                let pairs = found.data.iter().zip(tensor.data());
                let difference = pairs.map(|(a, b)| a.abs_diff(*b)).max();
                if difference != Some(0) {
                    failures.push(format!("{name} differs by {difference:?}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(expected.len(), 36);
}

/// Resizing to the bit leaves the rounding of single precision in the normalisation.
#[test]
fn pictures_are_prepared_as_the_processor_of_transformers_does() {
    let file = fs::read(fixture("prepared.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    let configs = metadata.metadata().clone().unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut failures = Vec::new();
    for (case, tensor) in expected.tensors() {
        let (name, config) = case.split_once('@').unwrap();
        let json = serde_json::from_str(&configs[&format!("config.{config}")]).unwrap();
        let processor = Processor::from_json(&json).unwrap();
        let stride = if config == "published" { 7 } else { 1 };

        let values = processor.prepare(&source(&picture(name))).unwrap();
        let found = every(&values, &processor, stride);
        let expected = normalised(tensor.data());
        assert_eq!(found.len(), expected.len(), "{case}");
        let pairs = found.iter().zip(&expected);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if difference > 1e-5 {
            failures.push(format!("{case} differs by {difference}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(expected.len(), 34);
}

/// The values of every `stride`-th row and column.
fn every(values: &[f32], processor: &Processor, stride: usize) -> Vec<f32> {
    let (height, width) = (processor.height(), processor.width());
    let planes = values.chunks_exact(height * width);
    planes
        .flat_map(|plane| plane.chunks_exact(width).step_by(stride))
        .flat_map(|row| row.iter().step_by(stride).copied())
        .collect()
}

fn normalised(levels: &[u8]) -> Vec<f32> {
    const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
    const STD: [f32; 3] = [0.229, 0.224, 0.225];
    let plane = levels.len() / 3;
    let levels = levels.iter().enumerate();
    levels
        .map(|(index, &level)| {
            (f32::from(level) / 255.0 - MEAN[index / plane]) / STD[index / plane]
        })
        .collect()
}

#[test]
fn a_model_of_grey_images_reads_colour_as_luma() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("red.png");
    RgbImage::from_pixel(8, 8, Rgb([255, 0, 0]))
        .save(&path)
        .unwrap();
    let values = Processor::digits().prepare(&source(&path)).unwrap();
    assert_eq!(values.len(), 64);
    let expected = (76.0 / 255.0 - 0.305) / 0.376;
    assert!(
        values
            .iter()
            .all(|value: &f32| (value - expected).abs() < 1e-6)
    );
}

#[test]
fn the_same_seed_augments_in_the_same_way_and_another_in_another() {
    let processor = Processor::dinov2().with_image_size(28);
    let picture = source(&picture("large.jpg"));
    let once = processor.augment(&picture, 3).unwrap();
    assert_eq!(once.len(), 3 * 28 * 28);
    assert_eq!(once, processor.augment(&picture, 3).unwrap());
    assert_ne!(once, processor.augment(&picture, 4).unwrap());
    assert_ne!(once, processor.prepare(&picture).unwrap());
}

#[test]
fn an_even_picture_stays_even_when_it_is_augmented() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("even.png");
    RgbImage::from_pixel(40, 30, Rgb([10, 128, 250]))
        .save(&path)
        .unwrap();
    let processor = Processor::dinov2().with_image_size(14);
    let plain = processor.prepare(&source(&path)).unwrap();
    for seed in 0..20 {
        assert_eq!(processor.augment(&source(&path), seed).unwrap(), plain);
    }
}

#[test]
fn a_picture_that_is_cut_off_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "wide.png",
        "large.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "lossy.webp",
        "alpha.webp",
        "animated.gif",
        "plain.bmp",
        "lzw.tiff",
    ] {
        let bytes = fs::read(picture(name)).unwrap();
        for length in [bytes.len() / 3, bytes.len() * 2 / 3] {
            let path = folder.path().join(name);
            // An animation that is cut off may still have its first frame.
            let length = if name.ends_with("gif") {
                length / 2
            } else {
                length
            };
            fs::write(&path, &bytes[..length]).unwrap();
            let error = decode(&path).expect_err(name);
            assert!(matches!(error, DecodeError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}

#[test]
fn what_is_no_picture_is_refused_with_the_formats_that_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jpg");
    fs::write(&path, "text").unwrap();
    let error = decode(&path).unwrap_err();
    assert!(matches!(error, DecodeError::Format { .. }));
    assert!(
        error.to_string().contains("convert it to PNG, JPEG"),
        "{error}"
    );

    let error = decode(&folder.path().join("none.png")).unwrap_err();
    assert!(matches!(error, DecodeError::Read { .. }));
}
