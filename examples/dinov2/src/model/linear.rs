//! What the linear layers of the model can be.

use burn::module::{Module, ModuleDisplay};
use burn::nn;
use burn::tensor::{Device, Tensor};
use burn_boft::BoftLinear;

/// A linear layer with the parameters of [`burn::nn::Linear`].
pub trait LinearLayer: Module + ModuleDisplay + From<nn::Linear> {
    /// A layer with a bias and random numbers.
    fn init(d_input: usize, d_output: usize, device: &Device) -> Self {
        nn::LinearConfig::new(d_input, d_output).init(device).into()
    }

    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - `input`: `[…, d_input]`
    /// - output: `[…, d_output]`
    fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D>;
}

impl LinearLayer for BoftLinear {
    fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        self.forward(input)
    }
}

impl LinearLayer for nn::Linear {
    fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        self.forward(input)
    }
}
