//! Frozen weights and activations in half precision.

use burn::module::{Module, ModuleMapper, Param};
use burn::prelude::*;

use crate::device::Precision;
use crate::model::Dinov2ForImageClassification;

/// Casts the backbone of a model. The head keeps single precision, since it is trained.
pub fn cast(
    mut model: Dinov2ForImageClassification,
    precision: Precision,
) -> Dinov2ForImageClassification {
    model.dinov2 = cast_all(model.dinov2, precision);
    model
}

/// Casts every parameter of a model.
pub fn cast_all<M: Module>(model: M, precision: Precision) -> M {
    match precision {
        Precision::F32 => model,
        _ => model.map(&mut Cast(precision)),
    }
}

struct Cast(Precision);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let dtype = self.0.dtype();
        param.map(|tensor| tensor.cast(dtype).detach())
    }
}
