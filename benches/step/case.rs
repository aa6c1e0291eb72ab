//! The cases: which model, which input, which methods.

use burn::nn::{self, conv::Conv2d};
use burn::tensor::Device;
use burn_boft::{BoftConv2d, BoftLinear};
use clap::ValueEnum;
use dinov2::device::Precision;
use dinov2::model::{Dinov2Config, Dinov2Model};
use dinov2::precision::cast_all;

use crate::method::{Layers, Method, Step};
use crate::network::{self, Convolutions, Network, Projection, Recurrent};

/// A model and an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// DINOv2-S, 4 images of 224²: 1028 tokens, 72 adapted layers.
    #[value(name = "dinov2-s")]
    Dinov2S,
    /// DINOv2-L, 64 images of 224²: 16448 tokens, 144 adapted layers. For GPUs, and run only if it is named.
    #[value(name = "dinov2-l")]
    Dinov2L,
    /// Two layers of DINOv2-L, 8 images of 224²: 2056 tokens, 12 adapted layers.
    #[value(name = "dinov2-l-block")]
    Dinov2LBlock,
    /// One 4096 × 4096 projection, 512 tokens.
    #[value(name = "llm-linear-512")]
    LlmLinear512,
    /// One 4096 × 4096 projection, 8192 tokens.
    #[value(name = "llm-linear-8192")]
    LlmLinear8192,
    /// One 4096 × 4096 projection, 1 token, without gradients.
    Decode,
    /// One 4096 × 4096 projection, 64 requests of 1 token, without gradients.
    #[value(name = "serve-linear")]
    ServeLinear,
    /// DINOv2-S, 64 requests of an image of 56², 17 tokens each, without gradients.
    #[value(name = "serve-dinov2-s")]
    ServeDinov2S,
    /// Four 3×3 convolutions, 4 feature maps of 64 channels and 56².
    Conv,
    /// An LSTM of width 256, 16 sequences of 64 tokens.
    Lstm,
    /// The same, with every weight rotated once for the whole forward pass.
    #[value(name = "lstm-rotate-once")]
    LstmRotateOnce,
}

impl Case {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// Whether the case takes too much time and memory for a CPU.
    pub fn is_for_gpus(self) -> bool {
        self == Self::Dinov2L
    }

    /// The methods that the case is run with.
    pub fn methods(self) -> Vec<Method> {
        match self {
            Self::Decode => Method::inference(),
            Self::ServeLinear | Self::ServeDinov2S => Method::serving(),
            Self::Conv | Self::Lstm | Self::LstmRotateOnce => Method::training(false),
            _ => Method::training(true),
        }
    }

    /// The method that the others are compared with.
    pub fn floor(self) -> Method {
        match self {
            Self::Decode => Method::Plain,
            Self::ServeLinear | Self::ServeDinov2S => Method::Merged,
            _ => Method::Frozen(Layers::Own),
        }
    }

    /// How many requests a step serves, if the case is about serving.
    pub fn requests(self) -> Option<usize> {
        match self {
            Self::ServeLinear | Self::ServeDinov2S => Some(REQUESTS),
            _ => None,
        }
    }

    /// The model on a device and in a precision, ready to make steps of.
    pub fn load(self, device: &Device, precision: Precision) -> Loaded {
        let device = device.clone().autodiff();
        let to = (precision, &device);
        let dinov2 = |config: Dinov2Config, shape| {
            let own = Dinov2Model::<BoftLinear>::new(&config, &device);
            let burn = Dinov2Model::<nn::Linear>::new(&config, &device);
            Loaded::new(own, burn, shape, to)
        };
        let projection = |requests, tokens| {
            let own = Projection::<BoftLinear>::new(WIDTH, &device);
            let burn = Projection::<nn::Linear>::new(WIDTH, &device);
            Loaded::new(own, burn, [requests, 1, tokens, WIDTH], to)
        };
        let recurrent = |once| {
            let model = Recurrent::new(256, once, &device);
            Loaded::new(model.clone(), model, [1, 16, 64, 256], to)
        };
        match self {
            Self::Dinov2S => dinov2(network::dinov2_s(), [4, 3, 224, 224]),
            Self::Dinov2L => dinov2(network::dinov2_l(24), [64, 3, 224, 224]),
            Self::Dinov2LBlock => dinov2(network::dinov2_l(2), [8, 3, 224, 224]),
            Self::LlmLinear512 => projection(1, 512),
            Self::LlmLinear8192 => projection(1, 8192),
            Self::Decode => projection(1, 1),
            Self::Lstm => recurrent(false),
            Self::LstmRotateOnce => recurrent(true),
            Self::ServeLinear => projection(REQUESTS, 1),
            Self::ServeDinov2S => dinov2(network::dinov2_s(), [REQUESTS, 3, 56, 56]),
            Self::Conv => {
                let own = Convolutions::<BoftConv2d>::new(&device);
                let burn = Convolutions::<Conv2d>::new(&device);
                Loaded::new(own, burn, [4, 64, 56, 56], to)
            }
        }
    }
}

/// The requests of a batch.
const REQUESTS: usize = 64;

/// The width of a projection.
const WIDTH: usize = 4096;

/// A model, of either kind of layers, and its input in memory; the steps made of it share its weights.
pub struct Loaded(Box<dyn Fn(Method) -> Result<Step, String>>);

impl Loaded {
    fn new<Own: Network + 'static, Burn: Network + 'static>(
        own: Own,
        burn: Burn,
        shape: [usize; 4],
        (precision, device): (Precision, &Device),
    ) -> Self {
        let input = network::input(shape, device).cast(precision.dtype());
        let own = cast_all(network::initialized(own), precision);
        let burn = cast_all(network::initialized(burn), precision);
        let device = device.clone();
        Self(Box::new(move |method| {
            let input = input.clone();
            match method.layers() {
                Layers::Own => method.step(own.clone(), input, &device),
                Layers::Burn => method.step(burn.clone(), input, &device),
            }
        }))
    }

    /// A step of a method.
    pub fn step(&self, method: Method) -> Result<Step, String> {
        (self.0)(method)
    }
}
