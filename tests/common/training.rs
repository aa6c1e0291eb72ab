//! A regression on rows of numbers, for models that Burn's `Learner` trains.

use burn::data::dataloader::batcher::Batcher;
use burn::tensor::{Device, Tensor, TensorData};
use burn::train::RegressionOutput;

/// Items of a data set: an input and its targets.
pub type Item = (Vec<f32>, Vec<f32>);

#[derive(Clone, Debug)]
pub struct Batch {
    pub input: Tensor<2>,
    pub targets: Tensor<2>,
}

/// Stacks items into a batch.
pub struct Rows;

impl Batcher<Item, Batch> for Rows {
    fn batch(&self, items: Vec<Item>, device: &Device) -> Batch {
        let (inputs, targets): (Vec<_>, Vec<_>) = items.into_iter().unzip();
        let stack = |rows: Vec<Vec<f32>>| {
            let shape = [rows.len(), rows[0].len()];
            Tensor::from_data(TensorData::new(rows.concat(), shape), device)
        };
        Batch {
            input: stack(inputs),
            targets: stack(targets),
        }
    }
}

/// The mean squared error of a batch.
pub fn regress(forward: impl FnOnce(Tensor<2>) -> Tensor<2>, batch: Batch) -> RegressionOutput {
    let output = forward(batch.input);
    let loss = (output.clone() - batch.targets.clone()).square().mean();
    RegressionOutput::new(loss, output, batch.targets)
}
