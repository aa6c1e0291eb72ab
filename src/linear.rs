//! [`Linear`]: the `nn::Linear` twin with the fast route, exported as `BoftLinear`.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{self, Initializer, LinearLayout};
use burn::tensor::{Device, Tensor, assert_shape};

use crate::adapter::BoftAdapter;

/// Configuration of a [`BoftLinear`](Linear), that of [`burn::nn::LinearConfig`].
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// The size of the input features.
    pub d_input: usize,
    /// The size of the output features.
    pub d_output: usize,
    /// If a bias should be applied during the linear transformation.
    #[config(default = true)]
    pub bias: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/3.0_f64.sqrt(), fan_out_only:false}")]
    pub initializer: Initializer,
    /// The layout in which the linear parameters are stored.
    #[config(default = "LinearLayout::Row")]
    pub layout: LinearLayout,
}

impl LinearConfig {
    /// Initializes a layer with the values that [`burn::nn::LinearConfig::init`] gives.
    pub fn init(&self, device: &Device) -> Linear {
        nn::LinearConfig::new(self.d_input, self.d_output)
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .with_layout(self.layout)
            .init(device)
            .into()
    }
}

/// A linear layer that applies an attached adapter without rewriting what it need not.
///
/// A drop-in for [`burn::nn::Linear`]: same fields, same paths, same records. Without an adapter it computes
/// the same. With one, `y = (x·R·W) ⊙ s + bias` takes the route that [`route`](crate::ops::route()) chooses,
/// and the backward pass never forms a weight-shaped gradient.
///
/// # Examples
///
/// ```
/// use burn_boft::{BoftLinear, BoftLinearConfig};
///
/// # fn init(device: &burn::tensor::Device) -> BoftLinear {
/// BoftLinearConfig::new(64, 32).with_bias(false).init(device)
/// # }
/// ```
// Burn's stores transpose PyTorch weights for structs of this name only.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Linear {
    /// The weight, a `[d_input, d_output]` tensor.
    pub weight: Param<Tensor<2>>,
    /// The bias, a `[d_output]` tensor.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Applies the layer.
    ///
    /// # Shapes
    ///
    /// - input: `[…, d_input]`
    /// - result: `[…, d_output]`
    ///
    /// # Panics
    ///
    /// If the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let base = self.weight.base();
        let [d_input, _] = base.dims();
        assert_shape!(input, [.., d_input]);
        let bias = self.bias.as_ref().map(Param::val);
        match self.weight.reparameterization::<BoftAdapter>() {
            Some(adapter) => adapter.linear(input, base, bias),
            None => burn::tensor::module::linear(input, self.weight.val(), bias),
        }
    }
}

impl From<nn::Linear> for Linear {
    fn from(nn::Linear { weight, bias }: nn::Linear) -> Self {
        Self { weight, bias }
    }
}

impl ModuleDisplay for Linear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.weight.lazy_shape().dims();
        content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.bias.is_some())
            .optional()
    }
}
