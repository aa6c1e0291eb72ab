//! What a step computes: the models of the cases, and their inputs.

use burn::module::{Module, ModuleDisplay, ModuleVisitor, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{LinearConfig, Lstm, LstmConfig, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use burn_boft::{BoftConv2d, rotate_once};
use dinov2::method::PROJECTIONS;
use dinov2::model::{Dinov2Config, Dinov2Model, LinearLayer};

/// A model under test.
pub trait Network: Module {
    /// The layers that a method adapts, by the end of their paths.
    const TARGETS: &'static [&'static str];

    /// Computes the output. With `tracked`, a gradient flows back to the input of the first layer that can be adapted, as it
    /// does in the middle of a model.
    fn forward(&self, input: Tensor<4>, tracked: bool) -> Tensor<4>;
}

impl<L: LinearLayer> Network for Dinov2Model<L> {
    const TARGETS: &'static [&'static str] = &PROJECTIONS;

    fn forward(&self, pixels: Tensor<4>, tracked: bool) -> Tensor<4> {
        let tokens = track(self.embeddings.forward(pixels, None), tracked);
        self.normalized(self.encoder.forward(tokens)).unsqueeze()
    }
}

/// One projection without a bias, as in language models.
#[derive(Module, Debug)]
pub struct Projection<L: LinearLayer> {
    projection: L,
}

impl<L: LinearLayer> Projection<L> {
    pub fn new(width: usize, device: &Device) -> Self {
        let projection = LinearConfig::new(width, width).with_bias(false);
        Self {
            projection: projection.init(device).into(),
        }
    }
}

impl<L: LinearLayer> Network for Projection<L> {
    const TARGETS: &'static [&'static str] = &["projection"];

    fn forward(&self, tokens: Tensor<4>, tracked: bool) -> Tensor<4> {
        self.projection.forward(track(tokens, tracked))
    }
}

/// A convolution with the parameters of [`Conv2d`].
pub trait Convolution: Module + ModuleDisplay + From<Conv2d> {
    fn forward(&self, images: Tensor<4>) -> Tensor<4>;
}

impl Convolution for BoftConv2d {
    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        self.forward(images)
    }
}

impl Convolution for Conv2d {
    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        self.forward(images)
    }
}

/// Four 3×3 convolutions of a ResNet, each followed by ReLU: 64→64, 64→128 with stride 2, 128→128 twice.
#[derive(Module, Debug)]
pub struct Convolutions<L: Convolution> {
    conv: Vec<L>,
}

impl<L: Convolution> Convolutions<L> {
    pub fn new(device: &Device) -> Self {
        let conv = |channels: [usize; 2], stride: usize| {
            Conv2dConfig::new(channels, [3, 3])
                .with_stride([stride; 2])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device)
                .into()
        };
        Self {
            conv: vec![
                conv([64, 64], 1),
                conv([64, 128], 2),
                conv([128, 128], 1),
                conv([128, 128], 1),
            ],
        }
    }
}

impl<L: Convolution> Network for Convolutions<L> {
    const TARGETS: &'static [&'static str] = &["conv.0", "conv.1", "conv.2", "conv.3"];

    fn forward(&self, images: Tensor<4>, tracked: bool) -> Tensor<4> {
        let input = track(images, tracked);
        self.conv
            .iter()
            .fold(input, |input, conv| relu(conv.forward(input)))
    }
}

/// An LSTM as Burn has it, whose gates are plain linear layers.
#[derive(Module, Debug)]
pub struct Recurrent {
    lstm: Lstm,
    /// Whether a forward pass begins with rotating every weight.
    once: bool,
}

impl Recurrent {
    pub fn new(width: usize, once: bool, device: &Device) -> Self {
        let lstm = LstmConfig::new(width, width, true).init(device);
        Self { lstm, once }
    }
}

impl Network for Recurrent {
    const TARGETS: &'static [&'static str] = &["input_transform", "hidden_transform"];

    fn forward(&self, sequences: Tensor<4>, tracked: bool) -> Tensor<4> {
        let input = track(sequences, tracked).squeeze_dim(0);
        let (output, _) = match self.once {
            true => rotate_once(&self.lstm).forward(input, None),
            false => self.lstm.forward(input, None),
        };
        output.unsqueeze()
    }
}

fn track<const D: usize>(tensor: Tensor<D>, tracked: bool) -> Tensor<D> {
    match tracked {
        true => tensor.detach().require_grad(),
        false => tensor,
    }
}

/// So many layers of DINOv2-L, which has 24.
pub fn dinov2_l(layers: usize) -> Dinov2Config {
    Dinov2Config::new(1024, 16, layers).with_image_size(224)
}

/// DINOv2-S for images of 224².
pub fn dinov2_s() -> Dinov2Config {
    Dinov2Config::small().with_image_size(224)
}

/// The model after its random weights are drawn, so that its clones share them.
pub fn initialized<N: Network>(model: N) -> N {
    struct Draw;

    impl ModuleVisitor for Draw {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            param.val();
        }
    }

    model.visit(&mut Draw);
    model
}

/// Normally distributed numbers, which are the same on every run of a device.
pub fn input(shape: [usize; 4], device: &Device) -> Tensor<4> {
    device.seed(7);
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}
