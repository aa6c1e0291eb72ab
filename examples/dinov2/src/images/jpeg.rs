//! JPEG through libjpeg, whose pixels are those of Pillow, bit for bit.
//!
//! Decoders differ by up to four levels of 255 where chroma is subsampled, which is more than the resizing afterwards
//! can hide: one level is 0.017 after normalisation.

use std::io::{self, BufRead, Read};

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};
use mozjpeg::{ColorSpace, Decompress, Marker};

use super::decode::LARGEST;

/// Decodes a JPEG file into upright RGB. Must run where unwinding is caught, because libjpeg reports errors so.
pub(super) fn decode(bytes: &[u8]) -> Result<DynamicImage, String> {
    let text = |error: io::Error| error.to_string();
    let jpeg = Decompress::builder()
        .with_markers(&[Marker::APP(1)])
        .from_reader(Whole(bytes))
        .map_err(text)?;
    let (width, height) = jpeg.size();
    if 4 * width as u64 * height as u64 > LARGEST {
        return Err(format!("{width} x {height} pixels are too many"));
    }
    let orientation = jpeg
        .markers()
        .filter(|marker| marker.marker == Marker::APP(1))
        .find_map(|marker| Orientation::from_exif_chunk(marker.data.strip_prefix(b"Exif\0\0")?))
        .unwrap_or(Orientation::NoTransforms);

    let data = match jpeg.color_space() {
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
            let mut rows = jpeg.to_colorspace(ColorSpace::JCS_CMYK).map_err(text)?;
            let pixels: Vec<[u8; 4]> = rows.read_scanlines().map_err(text)?;
            // Adobe's programs write 255 − ink, and Pillow takes every file for one of theirs.
            pixels
                .into_iter()
                .flat_map(|[cyan, magenta, yellow, key]| {
                    [cyan, magenta, yellow].map(|value| product(value, key))
                })
                .collect()
        }
        _ => {
            let mut rows = jpeg.rgb().map_err(text)?;
            let pixels: Vec<[u8; 3]> = rows.read_scanlines().map_err(text)?;
            pixels.into_flattened()
        }
    };
    let image = RgbImage::from_raw(width as u32, height as u32, data)
        .ok_or("the file ends before the image does")?;
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    Ok(image)
}

/// Reads the header only: the size of the image.
pub(super) fn size(reader: impl BufRead) -> Result<(usize, usize), String> {
    let jpeg = Decompress::new_reader(reader).map_err(|error| error.to_string())?;
    Ok(jpeg.size())
}

/// `a · b / 255`, rounded.
fn product(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    (((product >> 8) + product) >> 8) as u8
}

/// A file that fails at its end. libjpeg would fill up a file that is cut off with grey and only whisper about it.
struct Whole<'a>(&'a [u8]);

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.fill_buf()?;
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Whole<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.0.is_empty() {
            return Err(io::Error::other("the file ends before the image does"));
        }
        Ok(self.0)
    }

    fn consume(&mut self, count: usize) {
        self.0 = &self.0[count..];
    }
}
