//! Injects BOFT into a model that knows nothing of this crate, trains it, saves the adapter, and merges it.
//!
//! `cargo run --release --example quickstart`

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, Relu, loss::MseLoss, loss::Reduction};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor, s};
use burn_boft::{Adapter, BoftConfig, inject, merge, summary};

/// A plain Burn model.
#[derive(Module, Debug)]
struct Mlp {
    hidden: Linear,
    output: Linear,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        Self {
            hidden: LinearConfig::new(16, 32).init(device),
            output: LinearConfig::new(32, 4).init(device),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        self.output
            .forward(Relu::new().forward(self.hidden.forward(input)))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::flex().autodiff();
    device.seed(7);

    // The task: the model gets features in another order than it learned, here reversed, and has to give the same
    // outputs as before. A rotation of the input can do that.
    let pretrained = Mlp::new(&device);
    let input = Tensor::<2>::random([256, 16], Distribution::Normal(0.0, 1.0), &device);
    let target = pretrained.forward(input.clone().flip([1])).detach();

    let config = BoftConfig::new()
        .with_block_size(4)
        .with_n_butterfly_factor(3)
        .with_target_modules(["hidden", "output"]);
    let mut model = inject(pretrained, &config)?;
    println!("{}", summary(&model));

    let mut optimizer = AdamConfig::new().init();
    for step in 0..=300 {
        let output = model.forward(input.clone());
        let loss = MseLoss::new().forward(output, target.clone(), Reduction::Mean);
        if step % 100 == 0 {
            let value: f32 = loss.clone().into_scalar();
            println!("step {step:3}  loss {value:.4}");
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }

    let folder = std::env::temp_dir().join("quickstart-adapter");
    Adapter::extract(&model)?.save(&folder)?;
    println!("adapter saved to {}", folder.display());

    let adapted = model.valid();
    let merged = merge(adapted.clone())?;
    let input = input.without_autodiff().slice(s![0..3, ..]);
    let difference = adapted.forward(input.clone()) - merged.forward(input);
    let difference: f32 = difference.abs().max().into_scalar();
    println!("merged model differs by {difference:.1e}");
    Ok(())
}
