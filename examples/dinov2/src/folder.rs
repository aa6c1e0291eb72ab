//! Image folders: one subfolder per class, PNG or JPEG files in it.

use std::fs;
use std::path::{Path, PathBuf};

use image::{ImageReader, imageops::FilterType};

use crate::error::Error;
use crate::images::{Dataset, Format, Image};

/// How many images a class needs at least, so that each part of the split gets one.
const LEAST_IMAGES: usize = 3;

/// Reads every image of a folder, cut to a centred square of `size` pixels. The classes are the
/// subfolders, by name; hidden entries are left out.
///
/// # Errors
///
/// The first folder or file that cannot be used, by name. No file is skipped.
pub fn read(folder: &Path, size: usize) -> Result<Dataset, Error> {
    let mut images = Vec::new();
    let mut classes = Vec::new();
    for class in entries(folder)?.into_iter().filter(|path| path.is_dir()) {
        let files = entries(&class)?;
        if files.len() < LEAST_IMAGES {
            return Err(Error::Folder {
                path: class,
                reason: format!("a class needs {LEAST_IMAGES} images, found {}", files.len()),
            });
        }
        for file in files {
            images.push(Image {
                pixels: decode(&file, size)?.into(),
                label: classes.len(),
            });
        }
        classes.push(
            class
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        );
    }
    if classes.len() < 2 {
        return Err(Error::Folder {
            path: folder.to_path_buf(),
            reason: format!(
                "two or more subfolders are needed, one per class, found {}",
                classes.len()
            ),
        });
    }
    Ok(Dataset {
        images,
        format: Format::imagenet(size),
        classes,
    })
}

/// What a folder holds, by name, without hidden entries.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |source| Error::Path {
        path: folder.to_path_buf(),
        source,
    };
    let mut paths = fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.path()))
                .collect::<Result<Vec<_>, _>>()
        })
        .map_err(unreadable)?;
    paths.retain(|path| {
        path.file_name()
            .is_some_and(|name| !name.to_string_lossy().starts_with('.'))
    });
    paths.sort();
    Ok(paths)
}

/// The red, then the green, then the blue values of an image.
fn decode(file: &Path, size: usize) -> Result<Vec<u8>, Error> {
    let unreadable = |source| Error::Path {
        path: file.to_path_buf(),
        source,
    };
    let image = ImageReader::open(file)
        .and_then(ImageReader::with_guessed_format)
        .map_err(unreadable)?
        .decode()
        .map_err(|source| Error::Image {
            path: file.to_path_buf(),
            source,
        })?;
    let side = size as u32;
    let rgb = image
        .resize_to_fill(side, side, FilterType::CatmullRom)
        .to_rgb8();
    Ok((0..3)
        .flat_map(|channel| rgb.pixels().map(move |pixel| pixel[channel]))
        .collect())
}
