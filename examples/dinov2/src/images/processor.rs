//! From an image to the numbers that a model reads.

use super::Source;
use super::augment;
use super::decode::{DecodeError, decode};
use super::pixels::Pixels;
use super::resample::{self, Area, Filter};

/// Pixels along each side of an embedded digit, and its value of white.
const DIGIT_SIDE: usize = 8;
const DIGIT_WHITE: f32 = 16.0;

/// What `preprocessor_config.json` says: resize, crop the centre, rescale, normalise, as the `BitImageProcessor` of
/// transformers does with Pillow, to the bit before normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct Processor {
    pub(super) resize: Option<Resize>,
    pub(super) filter: Filter,
    /// `[height, width]`.
    pub(super) crop: Option<[usize; 2]>,
    /// Values are multiplied by it.
    pub(super) rescale: Option<f64>,
    pub(super) normalize: Option<Normalize>,
}

/// The size that an image is given before it is cropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resize {
    /// The shorter side has this length, the longer one follows.
    ShortestEdge(usize),
    Exact {
        height: usize,
        width: usize,
    },
}

/// `(value − mean) / std`, per channel.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Normalize {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

impl Processor {
    /// The processor of the published DINOv2 checkpoints: short side 256 (bicubic), centre 224 × 224, mean and
    /// standard deviation of ImageNet.
    pub fn dinov2() -> Self {
        Self {
            resize: Some(Resize::ShortestEdge(256)),
            filter: Filter::Bicubic,
            crop: Some([224, 224]),
            rescale: Some(1.0 / 255.0),
            normalize: Some(Normalize {
                mean: vec![0.485, 0.456, 0.406],
                std: vec![0.229, 0.224, 0.225],
            }),
        }
    }

    /// The processor of the embedded digits: one channel, 8 × 8, normalised by their own mean and deviation.
    pub fn digits() -> Self {
        Self {
            resize: Some(Resize::Exact {
                height: DIGIT_SIDE,
                width: DIGIT_SIDE,
            }),
            filter: Filter::Bicubic,
            crop: None,
            rescale: Some(1.0 / 255.0),
            normalize: Some(Normalize {
                mean: vec![0.305],
                std: vec![0.376],
            }),
        }
    }

    /// The processor for another image size: the result has `size` × `size` pixels, and the size before cropping
    /// changes by the same ratio.
    ///
    /// # Panics
    ///
    /// `size` is 0.
    pub fn with_image_size(mut self, size: usize) -> Self {
        assert!(size > 0, "an image has at least one pixel");
        let [height, width] = [self.height(), self.width()];
        let scaled = |length: usize, whole: usize| ((length * size + whole / 2) / whole).max(1);
        self.resize = self.resize.map(|resize| match resize {
            Resize::ShortestEdge(edge) => Resize::ShortestEdge(scaled(edge, height.min(width))),
            Resize::Exact {
                height: from_height,
                width: from_width,
            } => Resize::Exact {
                height: scaled(from_height, height),
                width: scaled(from_width, width),
            },
        });
        self.crop = self.crop.map(|_| [size, size]);
        self
    }

    /// The number of colour channels of the result: 1 or 3.
    pub fn channels(&self) -> usize {
        self.normalize
            .as_ref()
            .map_or(3, |normalize| normalize.mean.len())
    }

    /// Rows of the result.
    pub fn height(&self) -> usize {
        self.output()[0]
    }

    /// Columns of the result.
    pub fn width(&self) -> usize {
        self.output()[1]
    }

    /// The number of values of a prepared image.
    pub fn len(&self) -> usize {
        self.channels() * self.height() * self.width()
    }

    /// Whether a prepared image has no values, which is never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn output(&self) -> [usize; 2] {
        match (self.crop, self.resize) {
            (Some(crop), _) => crop,
            (None, Some(Resize::Exact { height, width })) => [height, width],
            (None, _) => {
                unreachable!("a processor without a fixed size is refused when it is read")
            }
        }
    }

    /// The `[channels, height, width]` values of an image for evaluation.
    ///
    /// # Errors
    ///
    /// The file is not read as an image.
    pub fn prepare(&self, source: &Source) -> Result<Vec<f32>, DecodeError> {
        match source {
            Source::File(path) => Ok(self.evaluate(decode(path)?)),
            Source::Grey(digit) => Ok(self.digit(digit)),
        }
    }

    /// The `[channels, height, width]` values of an image for training. A photograph gets torchvision's random resized
    /// crop (8 to 100 % of the area, 3:4 to 4:3) and is flipped half of the time; a digit moves by up to one
    /// pixel. The same seed gives the same values.
    ///
    /// # Errors
    ///
    /// The file is not read as an image.
    pub fn augment(&self, source: &Source, seed: u64) -> Result<Vec<f32>, DecodeError> {
        match source {
            Source::File(path) => Ok(self.train(decode(path)?, seed)),
            Source::Grey(digit) => Ok(self.digit(&augment::shift(digit, DIGIT_SIDE, seed))),
        }
    }

    fn evaluate(&self, image: Pixels) -> Vec<f32> {
        let image = image.with_channels(self.channels());
        let whole = Area::whole(image.width, image.height);
        let [width, height] = self.resized(image.width, image.height);
        let [crop_height, crop_width] = self.crop.unwrap_or([height, width]);
        let (columns, left) = centre(width, crop_width);
        let (rows, top) = centre(height, crop_height);
        let window = Area { columns, rows };
        let part = resample::resize(&image, &whole, [width, height], &window, self.filter);
        self.normalised(&part, [left, top])
    }

    fn train(&self, image: Pixels, seed: u64) -> Vec<f32> {
        let image = image.with_channels(self.channels());
        let (area, flipped) = augment::crop_and_flip(image.width, image.height, seed);
        let size = [self.width(), self.height()];
        let whole = Area::whole(size[0], size[1]);
        let mut part = resample::resize(&image, &area, size, &whole, self.filter);
        if flipped {
            augment::flip(&mut part);
        }
        self.normalised(&part, [0, 0])
    }

    /// A digit keeps its 17 levels where it is not resized; else it becomes an image of 256 levels.
    fn digit(&self, digit: &[u8]) -> Vec<f32> {
        let side = DIGIT_SIDE;
        if [self.channels(), self.height(), self.width()] == [1, side, side]
            && self.resized(side, side) == [side, side]
            && self.rescale == Some(1.0 / 255.0)
        {
            let normalise = |value: f32| match &self.normalize {
                Some(n) => (value - n.mean[0] as f32) / n.std[0] as f32,
                None => value,
            };
            return digit
                .iter()
                .map(|&value| normalise(f32::from(value) / DIGIT_WHITE))
                .collect();
        }
        let level = |&value: &u8| (f32::from(value) / DIGIT_WHITE * 255.0).round() as u8;
        self.evaluate(Pixels {
            width: side,
            height: side,
            channels: 1,
            data: digit.iter().map(level).collect(),
        })
    }

    /// `[width, height]` of an image before it is cropped.
    fn resized(&self, width: usize, height: usize) -> [usize; 2] {
        match self.resize {
            None => [width, height],
            Some(Resize::Exact { height, width }) => [width, height],
            Some(Resize::ShortestEdge(edge)) if width <= height => [edge, edge * height / width],
            Some(Resize::ShortestEdge(edge)) => [edge * width / height, edge],
        }
    }

    /// Rescales and normalises an image that is laid on black at `[left, top]` where it does not fill the result.
    fn normalised(&self, image: &Pixels, [left, top]: [usize; 2]) -> Vec<f32> {
        let [height, width] = self.output();
        let mut result = Vec::with_capacity(self.len());
        for channel in 0..image.channels {
            let table = self.table(channel);
            let start = result.len();
            result.resize(start + height * width, table[0]);
            let plane = &mut result[start..];
            for (y, row) in image
                .data
                .chunks_exact(image.width * image.channels)
                .enumerate()
            {
                let values = row[channel..].iter().step_by(image.channels);
                let target = &mut plane[(top + y) * width + left..][..image.width];
                for (target, &value) in target.iter_mut().zip(values) {
                    *target = table[usize::from(value)];
                }
            }
        }
        result
    }

    /// What each of the 256 levels becomes, in the arithmetic of transformers: rescaled in double precision, normalised
    /// in single.
    fn table(&self, channel: usize) -> [f32; 256] {
        std::array::from_fn(|level| {
            let value = (level as f64 * self.rescale.unwrap_or(1.0)) as f32;
            match &self.normalize {
                Some(n) => (value - n.mean[channel] as f32) / n.std[channel] as f32,
                None => value,
            }
        })
    }
}

/// Which part of a side is kept by cropping its centre, and how far it is moved where the side is too short.
fn centre(length: usize, crop: usize) -> (std::ops::Range<usize>, usize) {
    if length < crop {
        return (0..length, (crop - length).div_ceil(2));
    }
    let start = (length - crop) / 2;
    (start..start + crop, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_side_is_resized_and_the_long_one_follows() {
        let processor = Processor::dinov2();
        assert_eq!(processor.resized(500, 333), [384, 256]);
        assert_eq!(processor.resized(333, 500), [256, 384]);
        assert_eq!(processor.resized(7, 7), [256, 256]);
    }

    #[test]
    fn another_image_size_keeps_the_margin_that_is_cropped_away() {
        let small = Processor::dinov2().with_image_size(56);
        assert_eq!(small.resize, Some(Resize::ShortestEdge(64)));
        assert_eq!(
            [small.channels(), small.height(), small.width()],
            [3, 56, 56]
        );
        assert_eq!(
            Processor::dinov2().with_image_size(224),
            Processor::dinov2()
        );
    }

    #[test]
    fn a_digit_keeps_its_levels() {
        let mut digit = [0u8; 64];
        digit[9] = 16;
        digit[10] = 5;
        let source = Source::Grey(digit.as_slice().into());
        let values = Processor::digits().prepare(&source).unwrap();
        assert_eq!(values.len(), 64);
        assert_eq!(values[0], (0.0 - 0.305) / 0.376);
        assert_eq!(values[9], (1.0 - 0.305) / 0.376);
        assert_eq!(values[10], (5.0 / 16.0 - 0.305) / 0.376);
    }

    #[test]
    fn a_digit_is_enlarged_for_a_model_of_photographs() {
        let source = Source::Grey([16u8; 64].as_slice().into());
        let processor = Processor::dinov2().with_image_size(28);
        let values = processor.prepare(&source).unwrap();
        assert_eq!(values.len(), 3 * 28 * 28);
        for (channel, white) in [(0, 2.248_908_4), (1, 2.428_571_5), (2, 2.64)] {
            let plane = &values[channel * 784..][..784];
            assert!(plane.iter().all(|value| (value - white).abs() < 1e-5));
        }
    }

    #[test]
    fn an_image_smaller_than_the_crop_lies_in_the_middle_of_black() {
        let processor = Processor {
            resize: None,
            crop: Some([4, 5]),
            normalize: None,
            rescale: None,
            filter: Filter::Bicubic,
        };
        let image = Pixels {
            width: 2,
            height: 6,
            channels: 3,
            data: (0..36).collect(),
        };
        let values = processor.evaluate(image);
        // Rows 1 to 4 of the image, two columns of black before and one behind.
        assert_eq!(values[..5], [0.0, 0.0, 6.0, 9.0, 0.0]);
        assert_eq!(values[15..20], [0.0, 0.0, 24.0, 27.0, 0.0]);
        assert_eq!(values[20..25], [0.0, 0.0, 7.0, 10.0, 0.0]);
    }
}
