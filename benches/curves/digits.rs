//! The task: the handwritten digits 5 to 9, which the backbone of the DINOv2 example has never seen.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dinov2::digits::{NEW, SIZE, samples};
use dinov2::images::{Processor, Sample, split};

/// The digits, split once for all runs.
pub struct Digits {
    pub train: Part,
    pub valid: Part,
    pub test: Part,
    /// The names of the classes.
    pub classes: Vec<String>,
}

/// Images and their classes, on a device without gradients.
pub struct Part {
    /// `[images, 1, 8, 8]`.
    pub pixels: Tensor<4>,
    /// `[images]`.
    pub labels: Tensor<1, Int>,
}

impl Digits {
    pub fn new() -> Self {
        let parts = split(&samples(NEW), 0);
        let [train, valid, test] =
            [&parts.train, &parts.valid, &parts.test].map(|part| Part::new(part));
        Self {
            train,
            valid,
            test,
            classes: NEW.map(|digit| digit.to_string()).collect(),
        }
    }
}

impl Part {
    fn new(samples: &[Sample]) -> Self {
        let (device, processor, count) = (Device::flex(), Processor::digits(), samples.len());
        let prepare = |sample: &Sample| {
            let pixels = processor.prepare(&sample.source);
            pixels.expect("a digit in memory needs no decoding")
        };
        let pixels: Vec<f32> = samples.iter().flat_map(prepare).collect();
        let labels: Vec<i64> = samples.iter().map(|sample| sample.label as i64).collect();
        Self {
            pixels: Tensor::from_data(TensorData::new(pixels, [count, 1, SIZE, SIZE]), &device),
            labels: Tensor::from_data(TensorData::new(labels, [count]), &device),
        }
    }

    /// How many images there are.
    pub fn len(&self) -> usize {
        self.labels.dims()[0]
    }

    /// Some of the images, by their indices.
    pub fn select(&self, indices: &[usize]) -> Self {
        let rows: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
        let rows = TensorData::new(rows, [indices.len()]);
        let rows = Tensor::<1, Int>::from_data(rows, &self.pixels.device());
        Self {
            pixels: self.pixels.clone().select(0, rows.clone()),
            labels: self.labels.clone().select(0, rows),
        }
    }
}
