//! What happens to gradients between the backward pass and the optimizer: those of the parts of a batch are added up, and
//! the norm of all of them together is limited.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::DType;

/// Adds up the gradients of the parts of one batch.
#[derive(Default)]
pub struct Accumulator {
    sum: GradientsParams,
}

impl Accumulator {
    /// Adds the gradients of one part, weighted by its share of the batch.
    pub fn add<M: Module>(&mut self, model: &M, part: GradientsParams, share: f64) {
        let mut adding = Adding {
            sum: std::mem::take(&mut self.sum),
            part,
            share,
        };
        model.visit(&mut adding);
        self.sum = adding.sum;
    }

    /// The gradients of the batch.
    pub fn take(&mut self) -> GradientsParams {
        std::mem::take(&mut self.sum)
    }
}

struct Adding {
    sum: GradientsParams,
    part: GradientsParams,
    share: f64,
}

impl ModuleVisitor for Adding {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(part) = self.part.remove::<D>(param.id) else {
            return;
        };
        let part = match self.share == 1.0 {
            true => part,
            false => part.mul_scalar(self.share),
        };
        let sum = match self.sum.remove::<D>(param.id) {
            Some(sum) => sum + part,
            None => part,
        };
        self.sum.register(param.id, sum);
    }
}

/// Scales all gradients by the same factor, so that their norm, taken over all of them together, is at most `limit`.
///
/// The factor stays on the device, so that nothing waits for it.
pub fn clip<M: Module>(model: &M, gradients: GradientsParams, limit: f64) -> GradientsParams {
    let mut norm = SquaredNorm {
        gradients,
        sum: None,
    };
    model.visit(&mut norm);
    let Some(sum) = norm.sum else {
        return norm.gradients;
    };
    let mut scaling = Scaling {
        gradients: norm.gradients,
        // PyTorch's `clip_grad_norm_` adds the same small number.
        factor: (sum.sqrt() + 1e-6).recip().mul_scalar(limit).clamp_max(1.0),
    };
    model.visit(&mut scaling);
    scaling.gradients
}

/// The sum of the squares of all gradients, in f32.
struct SquaredNorm {
    gradients: GradientsParams,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for SquaredNorm {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else {
            return;
        };
        let gradient = gradient.cast(DType::F32);
        let square = (gradient.clone() * gradient).sum();
        self.sum = Some(match self.sum.take() {
            Some(sum) => sum + square,
            None => square,
        });
    }
}

/// Multiplies every gradient by a number that lies on the device.
struct Scaling {
    gradients: GradientsParams,
    factor: Tensor<1>,
}

impl ModuleVisitor for Scaling {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            let factor = self.factor.clone().cast(gradient.dtype());
            let factor = factor.reshape([1; D]);
            self.gradients.register(param.id, gradient * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Tolerance;

    use super::*;

    /// A layer with given gradients of weight and bias.
    fn gradients(weight: [[f32; 2]; 1], bias: [f32; 2]) -> (Linear, GradientsParams) {
        let device = Device::flex();
        let layer = LinearConfig::new(1, 2).init(&device);
        let gradients = of(&layer, weight, bias);
        (layer, gradients)
    }

    fn of(layer: &Linear, weight: [[f32; 2]; 1], bias: [f32; 2]) -> GradientsParams {
        let device = Device::flex();
        let mut gradients = GradientsParams::new();
        gradients.register(layer.weight.id, Tensor::<2>::from_data(weight, &device));
        let id = layer.bias.as_ref().unwrap().id;
        gradients.register(id, Tensor::<1>::from_data(bias, &device));
        gradients
    }

    fn assert_gradients(layer: &Linear, found: &GradientsParams, weight: [f32; 2], bias: [f32; 2]) {
        let exact = Tolerance::absolute(1e-6);
        let found_weight = found.get::<2>(layer.weight.id).unwrap().into_data();
        found_weight.assert_approx_eq::<f32>(&TensorData::from([weight]), exact);
        let found_bias = found.get::<1>(layer.bias.as_ref().unwrap().id).unwrap();
        found_bias
            .into_data()
            .assert_approx_eq::<f32>(&TensorData::from(bias), exact);
    }

    #[test]
    fn the_norm_is_that_of_all_gradients_together() {
        let (layer, long) = gradients([[3.0, 0.0]], [0.0, 4.0]);
        assert_gradients(&layer, &clip(&layer, long, 1.0), [0.6, 0.0], [0.0, 0.8]);
        let (layer, short) = gradients([[0.3, 0.0]], [0.0, 0.4]);
        assert_gradients(&layer, &clip(&layer, short, 1.0), [0.3, 0.0], [0.0, 0.4]);
    }

    #[test]
    fn parts_are_added_up_by_their_share_of_the_batch() {
        let (layer, first) = gradients([[4.0, 8.0]], [1.0, 0.0]);
        let mut sum = Accumulator::default();
        sum.add(&layer, first, 0.75);
        sum.add(&layer, of(&layer, [[8.0, 0.0]], [0.0, 2.0]), 0.25);
        assert_gradients(&layer, &sum.take(), [5.0, 6.0], [0.75, 0.5]);
        assert!(sum.take().is_empty());
    }
}
