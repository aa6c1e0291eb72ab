//! What a model says about images, without training it.

use burn::prelude::*;
use burn::tensor::activation::softmax;

use crate::error::Error;
use crate::images::Loader;
use crate::knn::Features;
use crate::model::Dinov2ForImageClassification;
use crate::training::head::Rows;

/// Images that pass through a model at a time when it is not trained.
pub const INFERENCE_BATCH: usize = 64;

/// The logits of images, and their classes.
#[derive(Clone, Debug)]
pub struct Predictions {
    /// A row of logits per image.
    pub logits: Vec<Vec<f32>>,
    pub labels: Vec<usize>,
    /// The place of each image among the loader's; images that cannot be read may be left out.
    pub samples: Vec<usize>,
}

impl Predictions {
    /// The class of the largest logit of each image.
    pub fn answers(&self) -> Vec<usize> {
        self.logits.iter().map(|row| largest(row)).collect()
    }

    /// The share of correct answers.
    pub fn accuracy(&self) -> f64 {
        let answers = self.answers();
        let correct = answers.iter().zip(&self.labels).filter(|(a, b)| a == b);
        correct.count() as f64 / self.labels.len().max(1) as f64
    }
}

/// The index of the largest number.
pub fn largest(row: &[f32]) -> usize {
    let indexed = row.iter().enumerate();
    indexed
        .max_by(|a, b| a.1.total_cmp(b.1))
        .map_or(0, |(index, _)| index)
}

/// The probabilities that logits stand for.
pub fn probabilities(row: &[f32]) -> Vec<f64> {
    let logits = Tensor::<1>::from_data(row, &Device::flex());
    softmax(logits, 0).into_data().iter::<f64>().collect()
}

/// The logits of all images of a loader. The model must be in inference mode.
///
/// # Errors
///
/// An image cannot be read.
pub fn predict(
    model: &Dinov2ForImageClassification,
    images: &Loader,
) -> Result<Predictions, Error> {
    let mut predictions = Predictions {
        logits: Vec::new(),
        labels: Vec::new(),
        samples: Vec::new(),
    };
    for batch in images.epoch(0, 0, &model.device()) {
        let batch = batch?;
        let logits = model.forward(batch.pixels);
        let [_, classes] = logits.dims();
        let values: Vec<f32> = logits.into_data().iter::<f32>().collect();
        let rows = values.chunks_exact(classes).map(<[f32]>::to_vec);
        predictions.logits.extend(rows);
        let labels = batch.labels.into_data();
        let labels = labels.iter::<i64>().map(|label| label as usize);
        predictions.labels.extend(labels);
        predictions.samples.extend(batch.samples);
    }
    Ok(predictions)
}

/// What the head of a model would read about all images of a loader. The model must be in inference mode.
///
/// # Errors
///
/// An image cannot be read.
pub fn features(model: &Dinov2ForImageClassification, images: &Loader) -> Result<Rows, Error> {
    let mut features = Vec::new();
    let mut labels = Vec::new();
    for batch in images.epoch(0, 0, &model.device()) {
        let batch = batch?;
        features.push(model.features(batch.pixels));
        let classes = batch.labels.into_data();
        labels.extend(classes.iter::<i64>().map(|label| label as usize));
    }
    Ok(Rows {
        features: Tensor::cat(features, 0),
        labels,
    })
}

impl From<Rows> for Features {
    fn from(rows: Rows) -> Self {
        let [_, width] = rows.features.dims();
        Self {
            width,
            values: rows.features.into_data().iter::<f32>().collect(),
            labels: rows.labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_class_of_the_largest_logit() {
        let predictions = Predictions {
            logits: vec![vec![2.0, 1.0], vec![0.0, 3.0], vec![1.0, 0.0]],
            labels: vec![0, 1, 1],
            samples: vec![0, 1, 2],
        };
        assert_eq!(predictions.answers(), [0, 1, 0]);
        assert_eq!(predictions.accuracy(), 2.0 / 3.0);
    }

    #[test]
    fn probabilities_follow_from_differences_of_logits() {
        let found = probabilities(&[1000.0, 1000.0 - 3f32.ln()]);
        assert!((found[0] - 0.75).abs() < 1e-5 && (found[1] - 0.25).abs() < 1e-5);
    }
}
