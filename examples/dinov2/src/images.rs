//! Images in memory, their split, and the batches a model reads.

use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::prelude::*;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// One image: `[channels, size, size]` values from 0 to its format's white, and its class.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    pub pixels: Arc<[u8]>,
    pub label: usize,
}

/// A batch: `[batch, channels, size, size]` normalised pixels and `[batch]` classes.
#[derive(Clone, Debug)]
pub struct ImageBatch {
    pub pixels: Tensor<4>,
    pub labels: Tensor<1, Int>,
}

/// How stored values become the numbers a model reads: `(value / white − mean) / std`.
#[derive(Clone, Debug)]
pub struct Format {
    /// Pixels along each side.
    pub size: usize,
    /// The value of a white pixel.
    pub white: f32,
    /// Mean per channel; its length is the number of channels.
    pub mean: Vec<f32>,
    /// Standard deviation per channel.
    pub std: Vec<f32>,
}

impl Format {
    /// RGB photographs, normalised as DINOv2 was trained.
    pub fn imagenet(size: usize) -> Self {
        Self {
            size,
            white: 255.0,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
        }
    }

    /// The number of colour channels.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }
}

impl Batcher<Image, ImageBatch> for Format {
    fn batch(&self, images: Vec<Image>, device: &Device) -> ImageBatch {
        let plane = self.size * self.size;
        let pixels: Vec<f32> = images
            .iter()
            .flat_map(|image| image.pixels.iter().enumerate())
            .map(|(index, &value)| {
                let channel = index / plane % self.channels();
                (f32::from(value) / self.white - self.mean[channel]) / self.std[channel]
            })
            .collect();
        let labels: Vec<i64> = images.iter().map(|image| image.label as i64).collect();

        let shape = [images.len(), self.channels(), self.size, self.size];
        ImageBatch {
            pixels: Tensor::from_data(TensorData::new(pixels, shape), device),
            labels: Tensor::from_data(TensorData::new(labels, [images.len()]), device),
        }
    }
}

/// A classification problem: images, how to read them, and the names of the classes.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub images: Vec<Image>,
    pub format: Format,
    pub classes: Vec<String>,
}

/// A classification problem, split.
#[derive(Clone, Debug)]
pub struct Task {
    pub split: Split,
    pub format: Format,
    pub classes: Vec<String>,
}

impl Dataset {
    /// The problem, split by a seed.
    pub fn split(self, seed: u64) -> Task {
        Task {
            split: Split::new(&self.images, seed),
            format: self.format,
            classes: self.classes,
        }
    }
}

/// Images for training, for choosing the best epoch, and for the reported accuracy.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    pub train: Vec<Image>,
    pub valid: Vec<Image>,
    pub test: Vec<Image>,
}

impl Split {
    /// Splits every class 60 : 15 : 25, always in the same way for the same seed. A class with three images or more
    /// has at least one in each part.
    pub fn new(images: &[Image], seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut split = Self {
            train: Vec::new(),
            valid: Vec::new(),
            test: Vec::new(),
        };
        let classes = images
            .iter()
            .map(|image| image.label + 1)
            .max()
            .unwrap_or(0);
        for class in 0..classes {
            let mut members: Vec<Image> = images
                .iter()
                .filter(|image| image.label == class)
                .cloned()
                .collect();
            members.shuffle(&mut rng);
            let test = (members.len() / 4).max(1);
            let valid = (members.len() * 3 / 20).max(1);
            split.test.extend(members.drain(..test.min(members.len())));
            split
                .valid
                .extend(members.drain(..valid.min(members.len())));
            split.train.extend(members);
        }
        split
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(count: usize, classes: usize) -> Vec<Image> {
        (0..count)
            .map(|index| Image {
                pixels: Arc::new([index as u8]),
                label: index % classes,
            })
            .collect()
    }

    #[test]
    fn a_split_parts_every_class_and_loses_nothing() {
        let split = Split::new(&images(120, 3), 7);
        for part in [&split.train, &split.valid, &split.test] {
            for class in 0..3 {
                let members = part.iter().filter(|image| image.label == class).count();
                assert_eq!(members * 3, part.len());
            }
        }
        assert_eq!(
            [split.train.len(), split.valid.len(), split.test.len()],
            [72, 18, 30]
        );

        let mut all: Vec<u8> = [split.train, split.valid, split.test]
            .concat()
            .iter()
            .map(|i| i.pixels[0])
            .collect();
        all.sort_unstable();
        assert_eq!(all, (0..120).collect::<Vec<u8>>());
    }

    #[test]
    fn a_seed_fixes_the_split() {
        let images = images(60, 2);
        assert_eq!(Split::new(&images, 1), Split::new(&images, 1));
        assert_ne!(Split::new(&images, 1), Split::new(&images, 2));
    }

    #[test]
    fn pixels_are_normalised_per_channel() {
        let format = Format {
            size: 1,
            white: 10.0,
            mean: vec![0.0, 0.5],
            std: vec![1.0, 0.25],
        };
        let image = Image {
            pixels: Arc::new([5, 10]),
            label: 3,
        };
        let batch = format.batch(vec![image], &Device::flex());
        assert_eq!(
            batch.pixels.into_data(),
            TensorData::from([[[[0.5f32]], [[2.0]]]])
        );
        let labels: Vec<i64> = batch.labels.into_data().iter().collect();
        assert_eq!(labels, [3]);
    }
}
