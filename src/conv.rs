//! [`Conv2d`]: the twin of `burn::nn::conv::Conv2d` that takes the fast route, exported as `BoftConv2d`.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{self, Initializer, PaddingConfig2d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor};

use crate::adapter::BoftAdapter;

/// The configuration of a [`BoftConv2d`](Conv2d). It has the fields, defaults and initial values of
/// [`burn::nn::conv::Conv2dConfig`].
#[derive(Config, Debug)]
pub struct Conv2dConfig {
    /// The number of input and of output channels.
    pub channels: [usize; 2],
    /// The height and width of the kernel.
    pub kernel_size: [usize; 2],
    /// The stride, down and across. Default: 1.
    #[config(default = "[1, 1]")]
    pub stride: [usize; 2],
    /// The distance of neighbouring elements of the kernel. Default: 1.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// The number of groups of channels, each of which is convolved by itself. Default: 1.
    #[config(default = "1")]
    pub groups: usize,
    /// The padding. Default: none.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Whether a bias is added to the output. Default: `true`.
    #[config(default = true)]
    pub bias: bool,
    /// How the parameters are initialized. Default: Kaiming's uniform distribution, as in Burn.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/3.0_f64.sqrt(), fan_out_only:false}")]
    pub initializer: Initializer,
}

impl Conv2dConfig {
    /// Makes a layer with the numbers that [`burn::nn::conv::Conv2dConfig::init`] would give it.
    ///
    /// # Panics
    ///
    /// - If the groups do not divide the channels.
    pub fn init(&self, device: &Device) -> Conv2d {
        nn::conv::Conv2dConfig::new(self.channels, self.kernel_size)
            .with_stride(self.stride)
            .with_dilation(self.dilation)
            .with_groups(self.groups)
            .with_padding(self.padding.clone())
            .with_bias(self.bias)
            .with_initializer(self.initializer.clone())
            .init(device)
            .into()
    }
}

/// A convolution whose backward pass forms no gradient of the size of the weight for an attached adapter.
///
/// It replaces [`burn::nn::conv::Conv2d`]: fields, paths and records are the same, so checkpoints fit both, and without
/// an adapter both compute the same. With an adapter, it convolves with the weight `diag(s)·W·Rᵀ`, rotated along
/// `c_in/groups·kh·kw`. On the CPU (`flex`) the gradient of the input and that of the rotation come from one product. Other
/// backends form the gradient of the weight, as with Burn's layer.
///
/// # Examples
///
/// ```
/// use burn::nn::PaddingConfig2d;
/// use burn_boft::{BoftConv2d, BoftConv2dConfig};
///
/// # fn init(device: &burn::tensor::Device) -> BoftConv2d {
/// BoftConv2dConfig::new([64, 128], [3, 3])
///     .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
///     .init(device)
/// # }
/// ```
// Whether a struct of this name can carry an adapter is decided by the name, as of Burn's.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Conv2d {
    /// The weight, a `[channels_out, channels_in/groups, kernel_height, kernel_width]` tensor.
    pub weight: Param<Tensor<4>>,
    /// The bias, a `[channels_out]` tensor.
    pub bias: Option<Param<Tensor<1>>>,
    /// The stride, down and across.
    pub stride: [usize; 2],
    /// The height and width of the kernel.
    pub kernel_size: [usize; 2],
    /// The distance of neighbouring elements of the kernel.
    pub dilation: [usize; 2],
    /// The number of groups of channels.
    pub groups: usize,
    /// The padding.
    #[module(skip)]
    pub padding: PaddingConfig2d,
}

impl Conv2d {
    /// Applies the convolution, with the adapter of its weight if there is one.
    ///
    /// # Shapes
    ///
    /// - input: `[images, channels_in, height, width]`
    /// - result: `[images, channels_out, height_out, width_out]`
    ///
    /// # Panics
    ///
    /// - If the input does not have `channels_in` channels, or is smaller than the kernel.
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = input.dims();
        let options = ConvOptions::new_with_padding(
            self.stride,
            self.padding_of([height, width]),
            self.dilation,
            self.groups,
        );
        let bias = self.bias.as_ref().map(Param::val);
        match self.weight.reparameterization::<BoftAdapter>() {
            Some(adapter) => adapter.conv2d(input, self.weight.base(), bias, options),
            None => burn::tensor::module::conv2d(input, self.weight.val(), bias, options),
        }
    }

    /// The padding before and after each axis of an image of this size, as Burn's layer computes it.
    fn padding_of(&self, size: [usize; 2]) -> [(usize, usize); 2] {
        match self.padding {
            PaddingConfig2d::Valid => [(0, 0); 2],
            PaddingConfig2d::Explicit(top, left, bottom, right) => [(top, bottom), (left, right)],
            PaddingConfig2d::Same => [0, 1].map(|axis| {
                let (size, stride) = (size[axis], self.stride[axis]);
                let reach =
                    size.div_ceil(stride).saturating_sub(1) * stride + self.kernel_size[axis];
                let total = reach.saturating_sub(size);
                (total / 2, total - total / 2)
            }),
        }
    }
}

/// Takes over the parameters of a Burn layer, and the adapter that its weight may carry.
impl From<nn::conv::Conv2d> for Conv2d {
    fn from(conv: nn::conv::Conv2d) -> Self {
        let nn::conv::Conv2d {
            weight,
            bias,
            stride,
            kernel_size,
            dilation,
            groups,
            padding,
        } = conv;
        Self {
            weight,
            bias,
            stride,
            kernel_size,
            dilation,
            groups,
            padding,
        }
    }
}

/// Gives the parameters to a Burn layer, whose weight then carries the adapter that this one may have.
impl From<Conv2d> for nn::conv::Conv2d {
    fn from(conv: Conv2d) -> Self {
        let Conv2d {
            weight,
            bias,
            stride,
            kernel_size,
            dilation,
            groups,
            padding,
        } = conv;
        Self {
            weight,
            bias,
            stride,
            kernel_size,
            dilation,
            groups,
            padding,
        }
    }
}

impl ModuleDisplay for Conv2d {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [channels_out, channels_in, _, _] = self.weight.lazy_shape().dims();
        content
            .add("ch_in", &(channels_in * self.groups))
            .add("ch_out", &channels_out)
            .add("stride", &format!("{:?}", self.stride))
            .add("kernel_size", &format!("{:?}", self.kernel_size))
            .add("dilation", &format!("{:?}", self.dilation))
            .add("groups", &self.groups)
            .add_debug_attribute("padding", &self.padding)
            .optional()
    }
}
