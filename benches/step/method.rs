//! The methods that are compared: what a step does with the model.

use std::fmt::{self, Display, Formatter};

use burn::module::{Lora, Module, ModuleVisitor, Param, ParamGroup, QLora, Quantizer};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{Device, Tensor};
use burn_boft::ops::Blocks;
use burn_boft::{
    Adapter, AdapterBank, AdapterConfig, BoftConfig, Cayley, Init, OftConfig, inject, merge,
};

use crate::network::Network;

/// A way to run a step. Training steps are forward, backward and an optimizer's update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// No adapter: only the forward pass and the gradient of the input. No training step can cost less.
    Frozen(Layers),
    /// BOFT with blocks of `b` and `m` factors.
    Boft { b: usize, m: usize, layers: Layers },
    /// OFT with blocks of 32.
    Oft(Cayley),
    /// Burn's own LoRA of rank 8.
    Lora(Layers),
    /// [`Frozen`](Self::Frozen) with the weights of the targets in eight bits, a scale each.
    FrozenQuantized,
    /// BOFT with blocks of 4 and 2 factors on weights in eight bits.
    BoftQuantized,
    /// OFT with blocks of 32 on weights in eight bits.
    OftQuantized,
    /// Burn's own QLoRA of rank 8 on weights in eight bits.
    LoraQuantized,
    /// Full fine-tuning: every number is trained.
    Full,
    /// Inference without adapters.
    Plain,
    /// Inference with adapters merged into the weights.
    Merged,
    /// Inference with adapters attached.
    Attached,
    /// Inference with a bank of so many adapters, which the requests of the batch use in turns. A step makes the model for
    /// the batch and runs it.
    Bank(usize),
    /// The Cayley map of every layer alone, forward and backward, with blocks of 4 and 2 factors.
    Cayley,
}

/// Whose layers a model is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// `BoftLinear` and `BoftConv2d`.
    Own,
    /// `nn::Linear` and `nn::Conv2d`, which can only ask for the rotated weight.
    Burn,
}

const RANK: usize = 8;
/// What PEFT's OFT has by default.
const NEUMANN: Cayley = Cayley::Neumann { terms: 5 };

impl Method {
    /// The methods of a case with a backward pass. Burn's LoRA and quantized weights need linear layers.
    pub fn training(linear: bool) -> Vec<Self> {
        use Layers::{Burn, Own};
        let boft = |m, b, layers| Self::Boft { b, m, layers };
        let mut methods = vec![
            Self::Frozen(Own),
            Self::Frozen(Burn),
            boft(1, 4, Own),
            boft(2, 4, Own),
            boft(4, 4, Own),
            boft(2, 8, Own),
            boft(1, 4, Burn),
            boft(2, 4, Burn),
            boft(4, 4, Burn),
            boft(2, 8, Burn),
        ];
        if linear {
            methods.extend([
                Self::Lora(Own),
                Self::Lora(Burn),
                Self::FrozenQuantized,
                Self::BoftQuantized,
                Self::OftQuantized,
                Self::LoraQuantized,
            ]);
        }
        methods.extend([
            Self::Oft(Cayley::Exact),
            Self::Oft(NEUMANN),
            Self::Full,
            Self::Cayley,
            Self::Plain,
            Self::Merged,
        ]);
        methods
    }

    /// The methods of a case without a backward pass.
    pub fn inference() -> Vec<Self> {
        vec![Self::Plain, Self::Attached, Self::Merged]
    }

    /// The methods of a case that serves a batch of requests.
    pub fn serving() -> Vec<Self> {
        let banks = [1, 8, 64].map(Self::Bank);
        [Self::Plain, Self::Merged, Self::Attached]
            .into_iter()
            .chain(banks)
            .collect()
    }

    /// Whose layers the method runs on.
    pub fn layers(self) -> Layers {
        match self {
            Self::Frozen(layers) | Self::Lora(layers) | Self::Boft { layers, .. } => layers,
            _ => Layers::Own,
        }
    }

    fn config(self, targets: &[&str]) -> AdapterConfig {
        self.seeded(targets, 3)
    }

    /// The configuration with random numbers of this seed.
    fn seeded(self, targets: &[&str], seed: u64) -> AdapterConfig {
        let init = Init::Random { seed };
        let targets: Vec<String> = targets.iter().map(|target| target.to_string()).collect();
        let oft = |cayley| -> AdapterConfig {
            OftConfig::new()
                .with_cayley(cayley)
                .with_init(init)
                .with_target_modules(targets.clone())
                .into()
        };
        match self {
            Self::Oft(cayley) => oft(cayley),
            Self::OftQuantized => oft(Cayley::Exact),
            _ => {
                let (b, m) = match self {
                    Self::Boft { b, m, .. } => (b, m),
                    _ => (4, 2),
                };
                BoftConfig::new()
                    .with_block_size(b)
                    .with_n_butterfly_factor(m)
                    .with_init(init)
                    .with_target_modules(targets.clone())
                    .into()
            }
        }
    }

    /// The model as the method trains or runs it, or the reason why it cannot.
    fn prepare<N: Network>(self, model: N, device: &Device) -> Result<N, String> {
        let adapted =
            |model| inject(model, self.config(N::TARGETS)).map_err(|error| error.to_string());
        let model = match self {
            Self::Frozen(_) => model.no_grad(),
            Self::Full => model.unfreeze(),
            Self::Plain | Self::Bank(_) => model.valid(),
            Self::Boft { .. } | Self::Oft(_) | Self::Cayley => adapted(model)?,
            Self::Attached => adapted(model)?.valid(),
            Self::Merged => merge(adapted(model)?.valid()).map_err(|error| error.to_string())?,
            Self::Lora(_) => model.apply_lora(lora::<N>()),
            Self::FrozenQuantized => model
                .no_grad()
                .quantize_weights_group(&mut quantizer(device), weights::<N>()),
            Self::BoftQuantized | Self::OftQuantized => {
                let packed = model.quantize_weights_group(&mut quantizer(device), weights::<N>());
                adapted(packed)?
            }
            Self::LoraQuantized => {
                let mut quantizer = quantizer(device);
                quantizer.set_param_group(weights::<N>());
                model.apply_qlora(QLora::new(lora::<N>(), quantizer))
            }
        };
        Ok(model)
    }

    /// A step of this method, and how many numbers it trains.
    pub fn step<N: Network + 'static>(
        self,
        model: N,
        input: Tensor<4>,
        device: &Device,
    ) -> Result<Step, String> {
        let model = self.prepare(model, device)?;
        let trainable = count_trainable(&model);
        let device = device.clone();
        let run: Box<dyn FnMut()> = match self {
            Self::Plain | Self::Merged | Self::Attached => {
                let (model, input) = (model, input.without_autodiff());
                Box::new(move || {
                    std::hint::black_box(model.forward(input.clone(), false));
                    device.sync().expect("the device finishes its work");
                })
            }
            Self::Bank(count) => {
                let mut bank = AdapterBank::new(model).map_err(|error| error.to_string())?;
                let adapters = (0..count).map(|seed| {
                    let config = self.seeded(N::TARGETS, seed as u64);
                    let adapted = inject(bank.base().clone(), config).map_err(|e| e.to_string())?;
                    Adapter::extract(&adapted).map_err(|error| error.to_string())
                });
                let adapters = adapters.collect::<Result<Vec<_>, String>>()?;
                let ids = adapters
                    .iter()
                    .map(|adapter| bank.add(adapter).map_err(|e| e.to_string()));
                let ids = ids.collect::<Result<Vec<_>, String>>()?;
                let input = input.without_autodiff();
                let requests = ids.into_iter().map(Some).cycle().take(input.dims()[0]);
                let requests: Vec<_> = requests.collect();
                Box::new(move || {
                    let model = bank.model(&requests).expect("the bank has the adapters");
                    std::hint::black_box(model.forward(input.clone(), false));
                    device.sync().expect("the device finishes its work");
                })
            }
            Self::Frozen(_) | Self::FrozenQuantized => Box::new(move || {
                std::hint::black_box(loss(&model, &input, true).backward());
                device.sync().expect("the device finishes its work");
            }),
            Self::Cayley => {
                let skews = skews(&model);
                Box::new(move || {
                    let sums = skews
                        .iter()
                        .map(|(skew, b)| Blocks::cayley(skew.clone(), *b).values().sum());
                    std::hint::black_box(sums.reduce(Tensor::add).map(|sum| sum.backward()));
                    device.sync().expect("the device finishes its work");
                })
            }
            _ => {
                let mut optimizer = AdamWConfig::new().init();
                let mut trained = Some(model);
                Box::new(move || {
                    let model = trained.take().expect("every step returns the model");
                    let gradients = loss(&model, &input, self != Self::Full).backward();
                    let gradients = GradientsParams::from_grads(gradients, &model);
                    trained = Some(optimizer.step(1e-4, model, gradients));
                    device.sync().expect("the device finishes its work");
                })
            }
        };
        Ok(Step { run, trainable })
    }
}

/// The weights of the layers that a method adapts.
fn weights<N: Network>() -> ParamGroup {
    let paths = N::TARGETS.iter().map(|target| format!("{target}.weight"));
    ParamGroup::from_any_predicates(paths.collect::<Vec<_>>())
}

fn lora<N: Network>() -> Lora {
    Lora::new(RANK, RANK as f64).set_param_group(weights::<N>())
}

/// Eight bits, with a scale per tensor.
fn quantizer(device: &Device) -> Quantizer {
    let scheme = device.settings().quantization.scheme;
    Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S))
}

/// One step that can be run again and again.
pub struct Step {
    pub run: Box<dyn FnMut()>,
    pub trainable: usize,
}

fn loss<N: Network>(model: &N, input: &Tensor<4>, tracked: bool) -> Tensor<1> {
    model.forward(input.clone(), tracked).square().mean()
}

/// Numbers that a step trains.
fn count_trainable<N: Module>(model: &N) -> usize {
    struct Count(usize);

    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.is_require_grad() {
                self.0 += param.shape().num_elements();
            }
        }
    }

    let mut count = Count(0);
    model.visit(&mut count);
    count.0
}

/// The packed numbers of every adapter, with the block size.
fn skews<N: Module>(model: &N) -> Vec<(Tensor<3>, usize)> {
    #[derive(Default)]
    struct Collect {
        path: Vec<String>,
        skews: Vec<(Tensor<3>, usize)>,
    }

    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.path.last().is_some_and(|name| name == "skew") {
                let shape = param.dims();
                let packed = shape[D - 1];
                let b = (1 + 8 * packed).isqrt().div_ceil(2);
                let skew = param.val().reshape([shape[0], shape[1], packed]).detach();
                self.skews.push((skew.require_grad(), b));
            }
        }
    }

    let mut collect = Collect::default();
    model.visit(&mut collect);
    collect.skews
}

impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frozen(_) => f.write_str("frozen"),
            Self::Boft { b, m, .. } => write!(f, "boft-m{m}-b{b}"),
            Self::Oft(Cayley::Exact) => f.write_str("oft-b32"),
            Self::Oft(_) => f.write_str("oft-b32-neumann"),
            Self::Lora(_) => f.write_str("lora-r8"),
            Self::FrozenQuantized => f.write_str("frozen-q8"),
            Self::BoftQuantized => f.write_str("qboft-m2-b4"),
            Self::OftQuantized => f.write_str("qoft-b32"),
            Self::LoraQuantized => f.write_str("qlora-r8"),
            Self::Full => f.write_str("full"),
            Self::Plain => f.write_str("plain"),
            Self::Merged => f.write_str("merged"),
            Self::Attached => f.write_str("boft-m2-b4"),
            Self::Bank(adapters) => write!(f, "bank-{adapters}"),
            Self::Cayley => f.write_str("cayley-m2-b4"),
        }?;
        match self.layers() {
            Layers::Own => Ok(()),
            Layers::Burn => f.write_str("-on-burn"),
        }
    }
}
