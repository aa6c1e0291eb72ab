//! Modules to save that share a parameter with another place of the model.

use burn::module::Module;
use burn::nn;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{Adapter, BoftConfig, inject};

use crate::common::models::{linear, numbers, rows};

#[derive(Module, Debug)]
struct Tied {
    first: nn::Linear,
    second: nn::Linear,
    adapted: nn::Linear,
}

impl Tied {
    fn new(device: &Device) -> Self {
        let first = linear([16, 12], 1, DType::F32, device);
        let mut second = linear([16, 12], 3, DType::F32, device);
        second.weight = first.weight.clone();
        Self {
            first,
            second,
            adapted: linear([12, 8], 2, DType::F32, device),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = self.first.forward(input.clone()).tanh() + self.second.forward(input);
        self.adapted.forward(hidden)
    }
}

/// Burn's optimizers step a parameter at the first place where it stands. Here that is another one than the place that is trained.
#[test]
fn a_module_to_save_is_trained_where_it_is_saved_and_not_where_it_is_shared() {
    let device = Device::flex().autodiff();
    let step = |saved: &[&str]| {
        let config = BoftConfig::new()
            .with_target_modules(["adapted"])
            .with_modules_to_save(saved.iter().copied());
        let model = inject(Tied::new(&device), config).unwrap();
        let before = numbers(&model);
        let loss = model.forward(rows([7, 16], 4, &device)).square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let model = SgdConfig::new().init().step(0.5, model, gradients);
        let after = numbers(&model);
        let moved = before.iter().filter(|(path, old)| after[*path] != **old);
        let moved: Vec<_> = moved.map(|(path, _)| path.clone()).collect();
        (model, after, moved)
    };
    let adapter = ["adapted.weight.boft.scale", "adapted.weight.boft.skew"];
    let (model, after, moved) = step(&["second"]);
    let expected = [&adapter[..], &["second.bias", "second.weight"]].concat();
    assert_eq!(moved, expected);
    let extracted = Adapter::extract(&model).unwrap();
    let attached = numbers(&extracted.attach(Tied::new(&device)).unwrap());
    assert_eq!(attached["second.weight"], after["second.weight"]);
    assert_ne!(attached["first.weight"], after["second.weight"]);

    // Both are trained, each by its own gradient.
    let (_, after, moved) = step(&["first", "second"]);
    let both = ["first.bias", "first.weight", "second.bias", "second.weight"];
    assert_eq!(moved, [&adapter[..], &both].concat());
    assert_ne!(after["first.weight"], after["second.weight"]);
}
