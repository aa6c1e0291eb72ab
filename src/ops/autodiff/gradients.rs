//! Gradients that several operations share: those of the scale, of the bias, and of a weight.

use burn::backend::autodiff::{NodeId, grads::Gradients};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;

use crate::ops::backend::{BoftBackend, OptionalTensor};
use crate::ops::butterfly::Side;
use crate::ops::linear::{Channels, along, away_from_zero, channel_sum, one_unless_zero};
use crate::ops::precision::{cast, reshape};

/// The nodes of `N` parents as `M`, of which the last may be missing. A parent that is not tracked is none.
pub(super) fn nodes<const N: usize, const M: usize>(
    parents: [Option<NodeId>; N],
) -> [Option<NodeId>; M] {
    let mut parents = parents.into_iter();
    [(); M].map(|()| parents.next().flatten())
}

/// What the gradients of the scale and the bias are computed from.
#[derive(Clone, Debug)]
pub(super) struct ChannelState<B: Backend> {
    pub(super) scale: FloatTensor<B>,
    /// Subtracted from the output for the gradient of the scale, since the scale does not multiply it.
    pub(super) bias: Option<FloatTensor<B>>,
    /// Kept only for the gradient of the scale. The operation after the layer usually keeps it anyway.
    pub(super) output: Option<FloatTensor<B>>,
    /// Where the channels of the output are.
    pub(super) outputs: Outputs,
}

/// Where the channels of an output are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outputs {
    /// The columns of a `[tokens, o]` matrix.
    Columns,
    /// The second axis of a `[n, o, h, w]` tensor.
    Planes,
}

impl Outputs {
    /// `Σ dy ⊙ y` and `Σ dy` of every channel, in f32 or wider.
    fn sums<B: BoftBackend>(
        self,
        gradient: FloatTensor<B>,
        output: FloatTensor<B>,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        match self {
            Self::Columns => B::boft_channel_sums(gradient, output, Channels::Columns),
            Self::Planes => {
                let [n, o, ..] = output.shape().dims::<4>();
                let (gradient, output) = (planes::<B>(gradient), planes::<B>(output));
                let (products, sums) = B::boft_channel_sums(gradient, output, Channels::Rows);
                let total =
                    |sums| channel_sum::<B>(reshape::<B, 2>(sums, [n, o]), Channels::Columns);
                (total(products), total(sums))
            }
        }
    }

    /// `Σ dy` of every channel, in the precision of the gradient.
    fn sum<B: Backend>(self, gradient: FloatTensor<B>) -> FloatTensor<B> {
        match self {
            Self::Columns => channel_sum::<B>(gradient, Channels::Columns),
            Self::Planes => {
                let [n, o, ..] = gradient.shape().dims::<4>();
                let sums = channel_sum::<B>(planes::<B>(gradient), Channels::Rows);
                channel_sum::<B>(reshape::<B, 2>(sums, [n, o]), Channels::Columns)
            }
        }
    }
}

/// The planes of a `[n, o, h, w]` tensor as the rows of a matrix.
fn planes<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let [n, o, h, w] = tensor.shape().dims::<4>();
    reshape::<B, 2>(tensor, [n * o, h * w])
}

impl<B: BoftBackend> ChannelState<B> {
    /// Registers the gradients of the scale and the bias, which share their sums.
    ///
    /// With a trained scale one pass over `dy` and `y` gives both. Without one only `Σ dy` is needed, in the
    /// precision of the gradient.
    ///
    /// # Shapes
    ///
    /// - gradient: that of the output, `[tokens, o]` or `[n, o, h, w]`
    pub(super) fn gradients(
        &mut self,
        gradient: &FloatTensor<B>,
        [scale, bias]: [Option<NodeId>; 2],
        gradients: &mut Gradients,
    ) {
        let gradient = gradient.clone();
        match (scale, self.output.take()) {
            (Some(scale), Some(output)) => {
                let sums = self.outputs.sums::<B>(gradient, output);
                if let Some(node) = bias {
                    let dtype = self.bias.as_ref().map_or(sums.1.dtype(), |b| b.dtype());
                    gradients.register::<B>(node, cast::<B>(sums.1.clone(), dtype));
                }
                let gradient = scale_gradient::<B>(sums, self.scale.clone(), self.bias.take());
                gradients.register::<B>(scale, gradient);
            }
            _ => {
                let dtype = self.bias.as_ref().map(TensorMetadata::dtype);
                bias_gradient::<B>(&gradient, self.outputs, bias, dtype, gradients);
            }
        }
    }
}

/// Registers the gradient of a bias that no scale multiplies, `Σ dy`, in the precision of the bias.
///
/// # Shapes
///
/// - gradient: that of the output, `[tokens, o]` or `[n, o, h, w]`
pub(super) fn bias_gradient<B: Backend>(
    gradient: &FloatTensor<B>,
    outputs: Outputs,
    bias: Option<NodeId>,
    dtype: Option<DType>,
    gradients: &mut Gradients,
) {
    if let Some(node) = bias {
        let sum = outputs.sum::<B>(gradient.clone());
        let dtype = dtype.unwrap_or(sum.dtype());
        gradients.register::<B>(node, cast::<B>(sum, dtype));
    }
}

/// The gradient of the input of a product with a weight, `dx = dy·Wᵀ`.
///
/// # Shapes
///
/// - gradient: `[tokens, o]`
/// - weight: `[d, o]`
/// - result: `[tokens, d]`
pub(super) fn input_gradient<B: BoftBackend>(
    gradient: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    let transposed = B::float_swap_dims(weight, 0, 1);
    B::boft_product(gradient, transposed, OptionalTensor::Absent)
}

/// The gradient of the scale, `Σ gradient ⊙ (output − bias) / s`, from the sums per channel.
///
/// The bias is constant along a channel, so `Σ dy ⊙ (y − bias) = Σ dy ⊙ y − bias · Σ dy`, and no matrix without bias
/// has to be formed. Beside a bias, rounding leaves nothing of an output whose scale counts as zero: the gradient of such a
/// scale is zero.
///
/// # Shapes
///
/// - products and sums, scale, bias: `[o]`; so is the result
///
/// # Numerics
///
/// In the precision of the sums, f32 or wider, then rounded to that of the scale. The division is by the scale that
/// the forward pass used, moved [`away_from_zero`]. The relative error is that of `y`, times `|bias| / |y − bias|` where the
/// bias is larger.
pub(super) fn scale_gradient<B: Backend>(
    (products, sums): (FloatTensor<B>, FloatTensor<B>),
    scale: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let dtype = scale.dtype();
    let scale = cast::<B>(scale, products.dtype());
    let products = match bias {
        Some(bias) => {
            let bias = cast::<B>(bias, sums.dtype());
            let products = B::float_sub(products, B::float_mul(sums, bias.clone()));
            // A scale that counts as zero beside a bias that does not.
            let bias = one_unless_zero::<B>(bias);
            let is_lost = B::float_sub(
                bias.clone(),
                B::float_mul(bias, one_unless_zero::<B>(scale.clone())),
            );
            B::float_sub(products.clone(), B::float_mul(products, is_lost))
        }
        None => products,
    };
    cast::<B>(B::float_div(products, away_from_zero::<B>(scale)), dtype)
}

/// The gradient of a weight from that of `R·W·diag(s)`, `∂L/∂W = Rᵀ·(dW'·diag(s))`, and likewise from the right.
///
/// # Shapes
///
/// - gradient: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
/// - scale: `[o]`
pub(super) fn weight_gradient<B: BoftBackend>(
    gradient: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let channels = Channels::of_weight(side);
    let scale = along::<B>(cast::<B>(scale, gradient.dtype()), channels);
    let scaled = B::float_mul(gradient, scale);
    B::boft_butterfly(scaled, blocks, side, side.weight_direction().reversed())
}
