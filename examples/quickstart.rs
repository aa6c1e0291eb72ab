//! Inject BOFT into a model that knows nothing of this crate, train it, save it, merge it.
//!
//! `cargo run --release --example quickstart`

use burn::module::{Module, ParamGroup};
use burn::nn::{Linear, LinearConfig, Relu, loss::MseLoss, loss::Reduction};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use burn_boft::{BoftConfig, inject, merge, summary};

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

    // The task: what the pretrained model does to an input that somebody shuffled.
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
        let loss = MseLoss::new().forward(
            model.forward(input.clone()),
            target.clone(),
            Reduction::Mean,
        );
        if step % 100 == 0 {
            println!(
                "step {step:3}  loss {:.4}",
                loss.clone().into_scalar::<f32>()
            );
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }

    let adapter = std::env::temp_dir().join("quickstart-adapter");
    let record = model
        .clone()
        .into_record_group(ParamGroup::from_regex(r"\.boft\.")?);
    record.save(&adapter)?;
    println!("adapter saved to {}.bpk", adapter.display());

    let adapted = model.valid();
    let merged = merge(adapted.clone())?;
    let input = input.without_autodiff();
    let difference = (adapted.forward(input.clone()) - merged.forward(input))
        .abs()
        .max();
    println!(
        "merged model differs by {:.1e}",
        difference.into_scalar::<f32>()
    );
    Ok(())
}
