//! What a traversal shows, and the state that modules keep beside their parameters.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{self, BatchNorm, BatchNormConfig};
use burn::tensor::{DType, Device, Tensor};

use super::{INPUTS, OUTPUTS, pin, weight};
use crate::common::models::{linear, numbers, rows};

#[test]
fn a_struct_of_the_user_called_linear_looks_like_the_layer_of_burn() {
    /// Computes something else than a linear layer.
    #[derive(Module, Debug)]
    struct Linear {
        weight: Param<Tensor<2>>,
        gate: Param<Tensor<2>>,
    }

    /// The types that own what is shown.
    #[derive(Default)]
    struct Containers(Vec<String>);

    impl ModuleVisitor for Containers {
        fn enter_module(&mut self, name: &str, container: &str) {
            if name == "weight" {
                self.0.push(container.to_string());
            }
        }
    }

    let device = Device::flex();
    let own = Linear {
        weight: weight(&device),
        gate: weight(&device),
    };
    let mut containers = Containers::default();
    own.visit(&mut containers);
    let burns: nn::Linear = linear([INPUTS, OUTPUTS], 1, DType::F32, &device);
    burns.visit(&mut containers);
    let pinned = vec!["Struct:Linear".to_string(); 2];
    let name = "a_struct_of_the_user_called_linear_looks_like_the_layer_of_burn";
    pin(name, containers.0, pinned);
}

/// A batch norm that has seen one batch in training.
fn trained(norm: BatchNorm, device: &Device) -> BatchNorm {
    norm.forward(rows([7, OUTPUTS], 3, device));
    norm
}

fn norm(device: &Device) -> BatchNorm {
    BatchNormConfig::new(OUTPUTS).init(device)
}

/// Whether the running mean that a traversal shows has moved from zero.
fn has_moved(norm: &BatchNorm) -> bool {
    numbers(norm)["running_mean"].iter().any(|x| *x != 0.0)
}

#[test]
fn a_traversal_shows_running_statistics_one_batch_late() {
    let device = Device::flex().autodiff();
    let norm = trained(norm(&device), &device);
    let before = has_moved(&norm);
    drop(norm.valid());
    let name = "a_traversal_shows_running_statistics_one_batch_late";
    pin(name, [before, has_moved(&norm)], [false, true]);
}

#[test]
fn clones_of_a_batch_norm_share_its_running_statistics() {
    let device = Device::flex().autodiff();
    let norm = norm(&device);
    let clone = norm.clone();
    drop(trained(norm, &device).valid());
    let name = "clones_of_a_batch_norm_share_its_running_statistics";
    pin(name, has_moved(&clone), true);
}

#[test]
fn a_batch_norm_without_trainable_parameters_moves_its_statistics() {
    let device = Device::flex().autodiff();
    let norm = norm(&device).set_require_grad(false);
    let norm = trained(norm, &device).valid();
    let name = "a_batch_norm_without_trainable_parameters_moves_its_statistics";
    pin(name, has_moved(&norm), true);
}

#[test]
fn norms_have_names_of_their_own_and_no_count_of_batches() {
    let names: Vec<_> = numbers(&norm(&Device::flex())).into_keys().collect();
    let pinned = ["beta", "gamma", "running_mean", "running_var"].map(str::to_string);
    let name = "norms_have_names_of_their_own_and_no_count_of_batches";
    pin(name, names, pinned.to_vec());
}

#[test]
fn a_plain_device_does_not_say_what_would_be_trained() {
    let weight = weight(&Device::flex()).set_require_grad(true);
    let plain = weight.base().is_require_grad();
    let trained = weight.train().base().is_require_grad();
    let name = "a_plain_device_does_not_say_what_would_be_trained";
    pin(name, [plain, trained], [false, true]);
}

#[test]
fn initial_numbers_are_drawn_when_they_are_first_read() {
    let layer = nn::LinearConfig::new(INPUTS, OUTPUTS).init(&Device::flex());
    let before = layer.weight.is_initialized();
    layer.weight.val();
    let name = "initial_numbers_are_drawn_when_they_are_first_read";
    pin(name, [before, layer.weight.is_initialized()], [false, true]);
}

#[test]
fn training_again_forgets_gradient_checkpointing() {
    let device = Device::flex().autodiff().gradient_checkpointing();
    let weight = weight(&device);
    let strategy = |weight: &Param<Tensor<2>>| weight.val().gradient_checkpointing_strategy();
    assert_ne!(
        strategy(&weight),
        Tensor::<1>::zeros([2], &Device::flex().autodiff()).gradient_checkpointing_strategy()
    );
    let again = weight.valid().train();
    let name = "training_again_forgets_gradient_checkpointing";
    pin(name, strategy(&weight) == strategy(&again), false);
}
