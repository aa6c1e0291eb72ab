//! Parts of a batch, and what a batch looks like.

use std::path::Path;

use image::RgbImage;

use super::{DecodeError, ImageBatch, Processor, decode};

impl ImageBatch {
    /// The number of images.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The batch in parts of at most so many images.
    pub fn parts(self, size: usize) -> Vec<Self> {
        let count = self.len();
        if count <= size {
            return vec![self];
        }
        let starts = (0..count).step_by(size);
        let part = |start: usize| {
            let length = size.min(count - start);
            Self {
                pixels: self.pixels.clone().narrow(0, start, length),
                labels: self.labels.clone().narrow(0, start, length),
                label_smoothing: self.label_smoothing,
                samples: self.samples[start..start + length].to_vec(),
            }
        };
        starts.map(part).collect()
    }
}

/// An image file as a picture.
///
/// # Errors
///
/// The file is not read as an image.
pub fn picture(path: &Path) -> Result<RgbImage, DecodeError> {
    let pixels = decode(path)?;
    let (width, height) = (pixels.width as u32, pixels.height as u32);
    Ok(RgbImage::from_raw(width, height, pixels.data)
        .expect("a decoded image has three values per pixel"))
}

impl Processor {
    /// The picture that `[3, height, width]` prepared values stand for.
    pub fn picture(&self, values: &[f32]) -> RgbImage {
        let (width, height) = (self.width(), self.height());
        let statistic = |values: Option<&Vec<f64>>, none: f64| {
            let values = values.filter(|values| values.len() == 3);
            values.cloned().unwrap_or_else(|| vec![none; 3])
        };
        let normalize = self.normalize.as_ref();
        let mean = statistic(normalize.map(|normalize| &normalize.mean), 0.0);
        let std = statistic(normalize.map(|normalize| &normalize.std), 1.0);
        RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let place = y as usize * width + x as usize;
            image::Rgb(std::array::from_fn(|channel| {
                let value = f64::from(values[channel * width * height + place]);
                let value = value * std[channel] + mean[channel];
                (255.0 * value).round().clamp(0.0, 255.0) as u8
            }))
        })
    }
}
