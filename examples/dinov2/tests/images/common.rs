//! What these tests share.

use std::fs;
use std::path::{Path, PathBuf};

use dinov2::images::Source;
use image::{Rgb, RgbImage};

pub fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
    folder.join(name)
}

pub fn picture(name: &str) -> PathBuf {
    fixture("pictures").join(name)
}

pub fn source(path: &Path) -> Source {
    Source::File(path.into())
}

/// A picture whose grey level tells it apart.
pub fn write_picture(path: &Path, level: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(9, 7, Rgb([level; 3]))
        .save(path)
        .unwrap();
}
