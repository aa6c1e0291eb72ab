//! [`Linear`]: the twin of `burn::nn::Linear` that takes the fast route, exported as `BoftLinear`.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{self, Initializer, LinearLayout};
use burn::tensor::{Device, Tensor, assert_shape};

use crate::adapter::BoftAdapter;
use crate::batch::BatchAdapter;
use crate::ops::product;

/// The configuration of a [`BoftLinear`](Linear). It has the fields, defaults and initial values of
/// [`burn::nn::LinearConfig`].
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// The number of input features.
    pub d_input: usize,
    /// The number of output features.
    pub d_output: usize,
    /// Whether a bias is added to the output. Default: `true`.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are initialized. Default: Kaiming's uniform distribution, as in Burn.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/3.0_f64.sqrt(), fan_out_only:false}")]
    pub initializer: Initializer,
    /// How the weight lies in memory. Default: rows. Its shape is `[d_input, d_output]` in either case.
    #[config(default = "LinearLayout::Row")]
    pub layout: LinearLayout,
}

impl LinearConfig {
    /// Makes a layer with the numbers that [`burn::nn::LinearConfig::init`] would give it.
    pub fn init(&self, device: &Device) -> Linear {
        nn::LinearConfig::new(self.d_input, self.d_output)
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .with_layout(self.layout)
            .init(device)
            .into()
    }
}

/// A linear layer that picks the cheaper of two equivalent ways to apply an attached adapter.
///
/// It replaces [`burn::nn::Linear`]: fields, paths and records are the same, so checkpoints fit both, and without an
/// adapter both compute the same, this one faster on the CPU (`flex`). With an adapter, it computes `y = (x·R·W) ⊙ s + bias`, where
/// [`route`](crate::ops::route()) decides whether the input or the weight is rotated. The backward pass forms no gradient
/// of the size of the weight, which a plain `nn::Linear` with an adapter cannot avoid.
///
/// # Numerics
///
/// The bias is added inside the product, so the last bit of an output may differ from that of Burn's layer.
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
// Burn's stores transpose the weights of PyTorch files only for structs of this name.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Linear {
    /// The weight, a `[d_input, d_output]` tensor.
    pub weight: Param<Tensor<2>>,
    /// The bias, a `[d_output]` tensor.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Applies the layer, with the adapter of its weight if there is one.
    ///
    /// # Shapes
    ///
    /// - input: `[…, d_input]`
    /// - result: `[…, d_output]`
    ///
    /// # Panics
    ///
    /// - If the last axis of `input` is not `d_input`.
    /// - If an [`AdapterBank`](crate::AdapterBank) made the model for a batch, and the first axis is not its requests.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let base = self.weight.base();
        let [d_input, _] = base.dims();
        assert_shape!(input, [.., d_input]);
        let bias = self.bias.as_ref().map(Param::val);
        if let Some(batch) = self.weight.reparameterization::<BatchAdapter>() {
            return batch.linear(input, base, bias);
        }
        match self.weight.reparameterization::<BoftAdapter>() {
            Some(adapter) => adapter.linear(input, base, bias),
            None => product(input, self.weight.val(), bias),
        }
    }
}

/// Takes over the parameters of a Burn layer, and the adapter that its weight may carry.
impl From<nn::Linear> for Linear {
    fn from(nn::Linear { weight, bias }: nn::Linear) -> Self {
        Self { weight, bias }
    }
}

/// Gives the parameters to a Burn layer, whose weight then carries the adapter that this one may have.
impl From<Linear> for nn::Linear {
    fn from(Linear { weight, bias }: Linear) -> Self {
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
