//! What gradient checkpointing saves. The only test of this program, since it reads how much memory the program holds.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Gradients, Tensor, TensorData};
use burn_boft::{BoftConfig, Init, inject};
use dinov2::model::{Dinov2Config, Dinov2Model};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The gradients of a model by path.
struct Reader<'a> {
    gradients: &'a Gradients,
    path: Vec<String>,
    found: BTreeMap<String, TensorData>,
}

impl ModuleVisitor for Reader<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.base().grad(self.gradients) {
            self.found.insert(self.path.join("."), gradient.into_data());
        }
    }
}

/// A training step on a device: the bytes that the forward pass keeps for the backward pass, and the gradients.
///
/// The peak would say less. It holds the scratch buffers of products besides, whose sizes depend on the processor.
fn step(device: &Device) -> (usize, BTreeMap<String, TensorData>) {
    // The same weights and the same pixels for every device.
    device.seed(7);
    let config = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(Init::Random { seed: 3 })
        .with_target_modules(["query", "key", "value", "output.dense", "fc1", "fc2"]);
    let base = Dinov2Config::new(48, 3, 4).with_image_size(112);
    let model: Dinov2Model = inject(base.init_backbone(device), config).unwrap();
    let pixels = Tensor::<4>::random([8, 3, 112, 112], Distribution::Default, device);
    let before = PeakAlloc.current_usage();
    let tokens = model.embeddings.forward(pixels, None);
    let loss = model.encoder.forward(tokens).square().mean();
    let kept = PeakAlloc.current_usage() - before;
    let gradients = loss.backward();
    let mut reader = Reader {
        gradients: &gradients,
        path: Vec::new(),
        found: BTreeMap::new(),
    };
    model.visit(&mut reader);
    (kept, reader.found)
}

/// The fewest bytes that several steps keep, since threads allocate scratch buffers when they get their first product.
fn steps(device: &Device) -> (usize, BTreeMap<String, TensorData>) {
    let (kept, gradients): (Vec<_>, Vec<_>) = (0..8).map(|_| step(device)).unzip();
    let kept = kept.into_iter().min().unwrap();
    (kept, gradients.into_iter().next().unwrap())
}

#[test]
fn gradient_checkpointing_keeps_less_and_gives_the_same_gradients() {
    let device = Device::flex().autodiff();
    let (all, expected) = steps(&device);
    let (less, found) = steps(&device.gradient_checkpointing());
    println!("{all} bytes, and {less} with gradient checkpointing");
    // Three quarters of this fifth are the outputs of GELU; the rest is norms and sums.
    assert!(less * 5 < all * 4, "{less} bytes instead of {all}");
    assert_eq!(found.len(), 2 * 6 * 4);
    assert_eq!(found, expected);
}
