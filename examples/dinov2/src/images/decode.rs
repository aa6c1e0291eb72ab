//! Reading an image file into RGB, as Pillow and transformers read it.

use std::any::Any;
use std::fs;
use std::io::{BufRead, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use image::{
    DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, metadata::Orientation,
};
use thiserror::Error;

use super::jpeg;
use super::pixels::Pixels;
use crate::files::in_words;

/// The most that one decoded image may take, in bytes: 178 million RGB pixels.
pub(super) const LARGEST: u64 = 512 << 20;

/// A file that is not read as an image.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The file does not exist or may not be read.
    #[error("{path}: {}", in_words(source), path = path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },

    /// The content is none of the formats that are read.
    #[error(
        "{path} is not an image of a format that is read here; convert it to PNG, JPEG, WebP, GIF, BMP or TIFF",
        path = path.display()
    )]
    Format { path: PathBuf },

    /// The header or the body is damaged, cut off, or of a kind that the format's decoder does not know.
    #[error("{path} cannot be decoded: {reason}", path = path.display())]
    Corrupt { path: PathBuf, reason: String },
}

impl DecodeError {
    /// What is wrong, without the path.
    pub fn reason(&self) -> String {
        match self {
            Self::Read { source, .. } => source.to_string(),
            Self::Format { .. } => "not an image of a format that is read here".into(),
            Self::Corrupt { reason, .. } => reason.clone(),
        }
    }
}

/// The formats that are read.
pub(super) fn supported(format: ImageFormat) -> bool {
    use ImageFormat as F;
    matches!(
        format,
        F::Png | F::Jpeg | F::WebP | F::Gif | F::Bmp | F::Tiff
    )
}

/// Reads an image file into RGB: upright by its EXIF orientation, transparency on white, of an animation the first
/// frame, of 16 bits the upper eight, CMYK as Pillow converts it. The content decides on the format, not the name.
///
/// # Errors
///
/// - The file cannot be read.
/// - It is no PNG, JPEG, WebP, GIF, BMP or TIFF.
/// - It is damaged or cut off.
pub fn decode(path: &Path) -> Result<Pixels, DecodeError> {
    let bytes = fs::read(path).map_err(|source| DecodeError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    let format = image::guess_format(&bytes)
        .ok()
        .filter(|&format| supported(format))
        .ok_or_else(|| DecodeError::Format {
            path: path.to_path_buf(),
        })?;
    let image = guarded(|| match format {
        ImageFormat::Jpeg => jpeg::decode(&bytes),
        _ => other(&bytes, format),
    })
    .map_err(|reason| DecodeError::Corrupt {
        path: path.to_path_buf(),
        reason,
    })?;
    let image = image.into_rgb8();
    Ok(Pixels {
        width: image.width() as usize,
        height: image.height() as usize,
        channels: 3,
        data: image.into_raw(),
    })
}

/// Runs a decoder. libjpeg reports its errors by unwinding, and no decoder of damaged files is trusted not to panic.
pub(super) fn guarded<T>(decode: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| Err(message(&*panic)))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.map_or("the decoder failed".into(), |text| {
        text.trim_start_matches("libjpeg fatal error: ").into()
    })
}

/// What an error of the image crate says, without the name of the format, which the user knows.
fn reason(error: &ImageError) -> String {
    let text = match error {
        ImageError::Decoding(inner) => inner.to_string(),
        other => other.to_string(),
    };
    text.lines().collect::<Vec<_>>().join(" ")
}

/// Reads the header. A forged one cannot ask for all memory.
pub(super) fn open<'a>(
    reader: impl BufRead + Seek + 'a,
    format: ImageFormat,
) -> Result<impl ImageDecoder + 'a, String> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(LARGEST);
    let mut reader = ImageReader::with_format(reader, format);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| reason(&error))?;
    let (width, height) = decoder.dimensions();
    if decoder.total_bytes() > LARGEST {
        return Err(format!("{width} x {height} pixels are too many"));
    }
    Ok(decoder)
}

fn other(bytes: &[u8], format: ImageFormat) -> Result<DynamicImage, String> {
    let mut decoder = open(Cursor::new(bytes), format)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(|error| reason(&error))?;
    let mut image = on_white(image);
    image.apply_orientation(orientation);
    Ok(image)
}

/// Eight bits per value and no transparency.
fn on_white(image: DynamicImage) -> DynamicImage {
    use DynamicImage as I;
    let high = |value: u16| (value >> 8) as u8;
    match image {
        // Pillow keeps the upper eight of 16 bits and does not round.
        I::ImageLuma16(grey) => {
            let (width, height) = grey.dimensions();
            let data = grey.pixels().flat_map(|pixel| [high(pixel[0]); 3]);
            rgb(width, height, data.collect())
        }
        I::ImageRgb16(colour) => {
            let (width, height) = colour.dimensions();
            let data = colour.pixels().flat_map(|pixel| pixel.0.map(high));
            rgb(width, height, data.collect())
        }
        I::ImageLumaA16(grey) => {
            let (width, height) = grey.dimensions();
            let data = grey
                .pixels()
                .flat_map(|pixel| over_white([high(pixel[0]); 3], high(pixel[1])));
            rgb(width, height, data.collect())
        }
        I::ImageRgba16(colour) => {
            let (width, height) = colour.dimensions();
            let data = colour.pixels().flat_map(|pixel| {
                let [red, green, blue, alpha] = pixel.0.map(high);
                over_white([red, green, blue], alpha)
            });
            rgb(width, height, data.collect())
        }
        image if image.color().has_alpha() => {
            let colour = image.into_rgba8();
            let (width, height) = colour.dimensions();
            let data = colour.pixels().flat_map(|pixel| {
                let [red, green, blue, alpha] = pixel.0;
                over_white([red, green, blue], alpha)
            });
            rgb(width, height, data.collect())
        }
        image => image,
    }
}

fn rgb(width: u32, height: u32, data: Vec<u8>) -> DynamicImage {
    let image = image::RgbImage::from_raw(width, height, data);
    DynamicImage::ImageRgb8(image.expect("three values per pixel"))
}

/// Pillow's `alpha_composite` on an opaque white background, in its fixed-point arithmetic.
fn over_white(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    let front = u32::from(alpha) * 128;
    let back = 255 * 128 - front;
    colour.map(|value| {
        let sum = u32::from(value) * front + 255 * back + (128 << 7);
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transparency_shows_white() {
        assert_eq!(over_white([10, 0, 255], 0), [255, 255, 255]);
        assert_eq!(over_white([10, 0, 255], 255), [10, 0, 255]);
        assert_eq!(over_white([0, 100, 255], 128), [127, 177, 255]);
    }

    #[test]
    fn sixteen_bits_lose_the_lower_eight() {
        let image = image::ImageBuffer::from_raw(2, 1, vec![0x12ff_u16, 0xff00]).unwrap();
        let grey = on_white(DynamicImage::ImageLuma16(image)).into_rgb8();
        assert_eq!(grey.into_raw(), [0x12, 0x12, 0x12, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn a_decoder_that_panics_becomes_an_error() {
        let error = guarded::<()>(|| std::panic::resume_unwind(Box::new("slipped".to_string())));
        assert_eq!(error, Err("slipped".into()));
    }
}
