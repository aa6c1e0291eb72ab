//! Operations on tensors.

use std::panic;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::module::interpolate;
use burn::tensor::ops::{InterpolateMode, InterpolateOptions};
use burn::tensor::{DType, Device, Tensor};

use super::pin;
use crate::common::{host, noise, tensor};

#[test]
fn a_detached_tensor_still_requires_a_gradient() {
    let device = Device::flex().autodiff();
    let weight = tensor(&noise(6, 2, 1.0), [2, 3], DType::F32, &device).require_grad();
    let name = "a_detached_tensor_still_requires_a_gradient";
    pin(name, weight.detach().is_require_grad(), true);
}

/// An operation for which one backend is listed.
#[backend_extension(Flex)]
pub trait Doubled: Backend {
    fn doubled(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_add(input.clone(), input)
    }
}

impl Doubled for Flex {}

#[test]
#[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
fn an_operation_of_ones_own_panics_on_a_backend_that_is_not_listed() {
    let doubled = |device: Device| {
        let input = tensor(&[0.5, -3.0], [2], DType::F32, &device);
        let output = <Dispatch as Doubled>::doubled(input.into_dispatch());
        host(Tensor::<1>::from_dispatch(output))
    };
    assert_eq!(doubled(Device::flex()), [1.0, -6.0]);
    let unlisted = panic::catch_unwind(|| doubled(Device::ndarray()));
    let name = "an_operation_of_ones_own_panics_on_a_backend_that_is_not_listed";
    pin(name, unlisted.is_err(), true);
}

#[test]
fn bicubic_interpolation_reads_four_columns_however_much_it_shrinks() {
    // Column 7 of 32 lies between the four columns around each of the four new ones, with aligned corners and without. A
    // kernel as wide as the shrinking asks would reach it.
    let mut values = vec![0.0; 3 * 32];
    (0..3).for_each(|row| values[row * 32 + 7] = 1.0);
    let picture = tensor(&values, [1, 1, 3, 32], DType::F32, &Device::flex());
    for align in [false, true] {
        let options = InterpolateOptions::new(InterpolateMode::Bicubic)
            .with_align_corners(align)
            .with_output_size([3, 4]);
        let shrunk = host(interpolate(picture.clone(), options));
        let name = "bicubic_interpolation_reads_four_columns_however_much_it_shrinks";
        pin(name, shrunk, vec![0.0; 12]);
    }
}
