//! The backward pass of every operation.
//!
//! A unit struct stands for each operation in Burn's graph, and [`Backward::State`] is what the operation keeps for
//! its backward pass. An input is kept by the identifier of its node, so that under gradient checkpointing Burn can
//! compute it again instead of storing it.
//!
//! | step | keeps | so that the backward pass does without |
//! |---|---|---|
//! | [`Cayley`] | the blocks | a second inverse |
//! | [`Butterfly`] | the blocks, and either its input or its output | results of single factors |
//! | [`Weight`] | the blocks, the scale, its output | the base itself |
//! | [`PackedProduct`] | the packed weight | the floats of every quantized weight at once |
//! | [`Scaled`] | its output, for a trained scale | the output before it was scaled |
//! | [`Conv2d`] | the same as `Linear` | a gradient of the shape of the weight, where there is a kernel |
//! | [`Linear`] | its input, base, blocks, scale and bias; the output for a trained scale; the rotated weight if small | a gradient of the shape of the weight |
//!
//! Tensors are shared, so what is kept costs memory only if nobody else keeps it: an output is usually the input that
//! the next operation keeps, and base and scale live in the model. All operations are *compute bound* in Burn's
//! words: under gradient checkpointing their outputs are not computed again.
//!
//! The last three end in `G` of the Gram backward, which is proved in the documentation of [`ops`](super). Its two
//! operands differ:
//!
//! | operation | gradient of the operand | `G` |
//! |---|---|---|
//! | `y = x·R`, as activations | `dx = dy·Rᵀ` | `xᵀ·dx` |
//! | `y = Rᵀ·x`, the same from the left | `dx = R·dy` | `x·dxᵀ` |
//! | `W' = R·W·diag(s)`, as weights | `dW = Rᵀ·dW'·diag(s)` | `dW'·W'ᵀ` |
//! | `W' = diag(s)·W·Rᵀ`, the same from the right | `dW = diag(s)·dW'·R` | `dW'ᵀ·W'` |
//! | `y = x·W' + bias`, a layer | `dx = dy·W'ᵀ` | `xᵀ·dx` |
//!
//! Gradients are registered only for parents that are tracked, and a [`Linear`] with a frozen base forms no gradient
//! of the base's shape.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, QuantizedTensor},
};
use burn::tensor::DType;
use burn::tensor::ops::ConvOptions;

use super::backend::{BoftBackend, OptionalTensor};
use super::butterfly::{Direction, Side};
use super::conv;
use super::linear::{Channels, along, away_from_zero, channel_sum, packed_product_backward};
use super::precision::{cast, reshape};
use super::route::keeps_weight;

impl<B: BoftBackend, C: CheckpointStrategy> BoftBackend for Autodiff<B, C> {
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        let node = skew.node();
        let blocks = B::boft_cayley(skew.into_primitive(), block_size);
        match Cayley.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(blocks.clone(), blocks),
            OpsKind::UnTracked(prep) => prep.finish(blocks),
        }
    }

    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        let nodes = [matrix.node(), blocks.node()];
        let output = B::boft_butterfly(
            matrix.primitive().clone(),
            blocks.primitive().clone(),
            side,
            direction,
        );
        match Butterfly.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                // R·t and t·Rᵀ rotate as weights do, where G = dW'·W'ᵀ; t·R and Rᵀ·t as activations, where G = xᵀ·dx.
                let kept = match direction == side.weight_direction() {
                    true => Kept::Output(output.clone()),
                    false => Kept::Input(prep.checkpoint(&matrix)),
                };
                let state = ButterflyState {
                    kept,
                    blocks: blocks.into_primitive(),
                    side,
                    direction,
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let nodes = [weight.node(), blocks.node(), scale.node()];
        let (blocks, scale) = (blocks.into_primitive(), scale.into_primitive());
        let output = B::boft_weight(weight.into_primitive(), blocks.clone(), scale.clone(), side);
        match Weight.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = WeightState {
                    output: output.clone(),
                    blocks,
                    scale,
                    side,
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn boft_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let [i, w, b, s] = [input.node(), weight.node(), blocks.node(), scale.node()];
        match bias {
            OptionalTensor::Absent => {
                rotated_linear::<B, C, 4>([i, w, b, s], input, weight, blocks, scale, None)
            }
            OptionalTensor::Present(bias) => {
                let nodes = [i, w, b, s, bias.node()];
                let bias = Some(bias.into_primitive());
                rotated_linear::<B, C, 5>(nodes, input, weight, blocks, scale, bias)
            }
        }
    }

    fn boft_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
        options: ConvOptions<2>,
    ) -> FloatTensor<Self> {
        let [i, w, b, s] = [input.node(), weight.node(), blocks.node(), scale.node()];
        let operands = (input, weight, blocks, scale);
        match bias {
            OptionalTensor::Absent => {
                rotated_conv2d::<B, C, 4>([i, w, b, s], operands, None, options)
            }
            OptionalTensor::Present(bias) => {
                let nodes = [i, w, b, s, bias.node()];
                let bias = Some(bias.into_primitive());
                rotated_conv2d::<B, C, 5>(nodes, operands, bias, options)
            }
        }
    }

    fn boft_packed_product(
        input: FloatTensor<Self>,
        weight: QuantizedTensor<Self>,
    ) -> FloatTensor<Self> {
        let node = input.node();
        let output = B::boft_packed_product(input.into_primitive(), weight.clone());
        match PackedProduct
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(weight, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn boft_scaled(
        output: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let [o, s] = [output.node(), scale.node()];
        match bias {
            OptionalTensor::Absent => scaled::<B, C, 2>([o, s], output, scale, None),
            OptionalTensor::Present(bias) => {
                let nodes = [o, s, bias.node()];
                scaled::<B, C, 3>(nodes, output, scale, Some(bias.into_primitive()))
            }
        }
    }
}

/// [`BoftBackend::boft_cayley`] in the graph. It keeps the blocks.
///
/// `∂L/∂Q = −½ (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ` reads nothing but the output, and the output is kept by the rotation
/// anyway.
#[derive(Debug)]
struct Cayley;

impl<B: BoftBackend> Backward<B, 1> for Cayley {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let [skew] = ops.parents;
        let gradient = gradients.consume::<B>(&ops.node);
        if let Some(skew) = skew {
            let gradient = B::boft_cayley_backward(ops.state, gradient);
            gradients.register::<B>(skew.id, gradient);
        }
    }
}

/// [`BoftBackend::boft_butterfly`] in the graph. Its parents are the matrix and the blocks.
///
/// The gradient of the matrix is the gradient of the output, rotated back. Where the rotation acts as on activations,
/// that same tensor is one of the two operands of `G`, which needs it even if the matrix is frozen. Where it acts as
/// on weights it is not, and it is not computed for a frozen matrix.
#[derive(Debug)]
struct Butterfly;

/// What the backward pass reads: the blocks to rotate the gradient back with, and the operand of `G` that is not a
/// gradient.
#[derive(Clone, Debug)]
struct ButterflyState<B: Backend> {
    kept: Kept<B>,
    blocks: FloatTensor<B>,
    side: Side,
    direction: Direction,
}

/// The input where the rotation acts as on activations, the output where it acts as on weights.
///
/// The choice follows from the algebra: `R·t` and `t·Rᵀ` take `G` from the output, `t·R` and `Rᵀ·t` from the input.
#[derive(Clone, Debug)]
enum Kept<B: Backend> {
    /// The node of the input, for `G = tᵀ·dt` or `t·dtᵀ`.
    Input(NodeId),
    /// The output `y`, for `G = dy·yᵀ` or `dyᵀ·y`.
    Output(FloatTensor<B>),
}

impl<B: BoftBackend> Backward<B, 2> for Butterfly {
    type State = ButterflyState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [matrix_node, blocks_node] = ops.parents;
        let ButterflyState {
            kept,
            blocks,
            side,
            direction,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        let rotate_back =
            |gradient| B::boft_butterfly(gradient, blocks.clone(), side, direction.reversed());
        match kept {
            Kept::Input(id) => {
                let input_gradient = rotate_back(gradient);
                if let Some(node) = blocks_node {
                    let input = checkpointer.retrieve_node_output(id);
                    let gradient =
                        B::boft_block_gradient(input, input_gradient.clone(), blocks, side);
                    gradients.register::<B>(node.id, gradient);
                }
                if let Some(node) = matrix_node {
                    gradients.register::<B>(node.id, input_gradient);
                }
            }
            Kept::Output(output) => {
                // A frozen weight needs no gradient of its own, so nothing is rotated back.
                if let Some(node) = matrix_node {
                    gradients.register::<B>(node.id, rotate_back(gradient.clone()));
                }
                if let Some(node) = blocks_node {
                    let gradient = B::boft_block_gradient(gradient, output, blocks, side);
                    gradients.register::<B>(node.id, gradient);
                }
            }
        }
    }
}

/// [`BoftBackend::boft_weight`] in the graph. Its parents are the weight, the blocks and the scale.
///
/// With `W' = R·W·diag(s)`, all gradients follow from `dW'` and the output:
///
/// ```text
/// G = dW'·W'ᵀ      ∂L/∂s = Σ_rows dW' ⊙ W' / s      ∂L/∂W = Rᵀ·(dW'·diag(s))
/// ```
#[derive(Debug)]
struct Weight;

/// What the backward pass reads. The base itself is not needed, since `W·diag(s) = Rᵀ·W'`.
#[derive(Clone, Debug)]
struct WeightState<B: Backend> {
    output: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
}

impl<B: BoftBackend> Backward<B, 3> for Weight {
    type State = WeightState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let [weight_node, blocks_node, scale_node] = ops.parents;
        let WeightState {
            output,
            blocks,
            scale,
            side,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        if let Some(node) = blocks_node {
            let (lhs, rhs) = (gradient.clone(), output.clone());
            let gradient = B::boft_block_gradient(lhs, rhs, blocks.clone(), side);
            gradients.register::<B>(node.id, gradient);
        }
        if let Some(node) = scale_node {
            let channels = Channels::of_weight(side);
            let sums = B::boft_channel_sums(gradient.clone(), output, channels);
            let gradient = scale_gradient::<B>(sums, scale.clone(), None);
            gradients.register::<B>(node.id, gradient);
        }
        if let Some(node) = weight_node {
            let gradient = weight_gradient::<B>(gradient, blocks, scale, side);
            gradients.register::<B>(node.id, gradient);
        }
    }
}

/// [`BoftBackend::boft_linear`] in the graph. Its parents are the input, the weight, the blocks, the scale and, if
/// there is one, the bias.
///
/// With `W' = R·W·diag(s)`, the layer of a frozen base takes one large product, `dx`, as a frozen layer does:
///
/// ```text
/// dx = dy·W'ᵀ      G = xᵀ·dx      ∂L/∂s = Σ_tokens dy ⊙ (y − bias) / s      ∂L/∂bias = Σ_tokens dy
/// ```
///
/// Only a trained base needs `dW' = xᵀ·dy`, a matrix of its own shape.
#[derive(Debug)]
struct Linear;

/// What the backward pass reads, which is at most the layer's own operands, its output and one matrix of the weight's
/// shape.
#[derive(Clone, Debug)]
struct LinearState<B: Backend> {
    /// The node of `x`, for `G` and for the gradient of a trained base.
    input: NodeId,
    /// The base, of which the rotated weight is made again where it was not kept.
    weight: FloatTensor<B>,
    /// `R·W·diag(s)`, where it is kept: up to the size of the layer's input and output together.
    effective: Option<FloatTensor<B>>,
    blocks: FloatTensor<B>,
    channels: ChannelState<B>,
}

/// What the gradients of the scale and the bias are computed from.
#[derive(Clone, Debug)]
struct ChannelState<B: Backend> {
    scale: FloatTensor<B>,
    /// Subtracted from the output for the gradient of the scale, since the scale does not multiply it.
    bias: Option<FloatTensor<B>>,
    /// Kept only for the gradient of the scale. The operation after the layer usually keeps it anyway.
    output: Option<FloatTensor<B>>,
    /// Where the channels of the output are.
    outputs: Outputs,
}

/// Where the channels of an output are.
#[derive(Clone, Copy, Debug)]
enum Outputs {
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

/// Computes the layer and enters it into the graph, with the nodes that [`Linear`] lists.
///
/// The number of parents is a constant of Burn's graph, hence `N`: four without a bias, five with one.
///
/// # Shapes
///
/// - input: `[tokens, d]`
/// - weight: `[d, o]`
/// - scale, bias: `[o]`
/// - result: `[tokens, o]`
///
/// # Numerics
///
/// `W'` is rounded to the precision of the weight, forward and where it is computed again, so that both passes see
/// the same numbers.
fn rotated_linear<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    blocks: FloatTensor<Autodiff<B, C>>,
    scale: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let keeps_output = scale.is_tracked();
    let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
    let scale = scale.into_primitive();
    let effective = B::boft_weight(weight.clone(), blocks.clone(), scale.clone(), Side::Left);
    let [rows, _] = input.primitive().shape().dims();
    let keeps_effective = keeps_weight(rows, weight.shape().dims());
    let output = B::boft_product(
        input.primitive().clone(),
        effective.clone(),
        bias.clone().into(),
    );
    match Linear.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = LinearState {
                input: prep.checkpoint(&input),
                weight,
                effective: keeps_effective.then_some(effective),
                blocks,
                channels: ChannelState {
                    scale,
                    bias,
                    output: keeps_output.then(|| output.clone()),
                    outputs: Outputs::Columns,
                },
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Linear {
    type State = LinearState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let mut parents = ops.parents.into_iter();
        let [input_node, weight_node, blocks_node, scale_node, bias_node] =
            [(); 5].map(|()| parents.next().flatten().map(|node| node.id));
        let mut state = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);

        let channels = &mut state.channels;
        channels.gradients(&gradient, [scale_node, bias_node], gradients);
        let input: Option<FloatTensor<B>> = (blocks_node.is_some() || weight_node.is_some())
            .then(|| checkpointer.retrieve_node_output(state.input));
        if input_node.is_some() || blocks_node.is_some() {
            let input_gradient = state.input_gradient(gradient.clone());
            if let (Some(node), Some(input)) = (blocks_node, input.clone()) {
                let blocks = state.blocks.clone();
                let gradient =
                    B::boft_block_gradient(input, input_gradient.clone(), blocks, Side::Right);
                gradients.register::<B>(node, gradient);
            }
            if let Some(node) = input_node {
                gradients.register::<B>(node, input_gradient);
            }
        }
        if let (Some(node), Some(input)) = (weight_node, input) {
            let gradient = B::float_matmul(B::float_swap_dims(input, 0, 1), gradient);
            let gradient =
                weight_gradient::<B>(gradient, state.blocks, state.channels.scale, Side::Left);
            gradients.register::<B>(node, gradient);
        }
    }
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
    fn gradients(
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
                if let Some(node) = bias {
                    gradients.register::<B>(node, self.outputs.sum::<B>(gradient));
                }
            }
        }
    }
}

impl<B: BoftBackend> LinearState<B> {
    /// `dx = dy·(R·W·diag(s))ᵀ`.
    ///
    /// It takes the rotated weight out of the state, so that its memory is free as soon as the product is done, or
    /// rotates the base once more where none was kept.
    ///
    /// # Shapes
    ///
    /// - gradient: `[tokens, o]`
    /// - result: `[tokens, d]`
    fn input_gradient(&mut self, gradient: FloatTensor<B>) -> FloatTensor<B> {
        let effective = self.effective.take().unwrap_or_else(|| {
            let (blocks, scale) = (self.blocks.clone(), self.channels.scale.clone());
            B::boft_weight(self.weight.clone(), blocks, scale, Side::Left)
        });
        let effective = B::float_swap_dims(effective, 0, 1);
        B::boft_product(gradient, effective, OptionalTensor::Absent)
    }
}

/// [`BoftBackend::boft_conv2d`] in the graph. Its parents are the input, the weight, the blocks, the scale and, if there
/// is one, the bias.
///
/// A convolution is a linear layer on patches, the `c·kh·kw` numbers that the kernel covers at one place, so its
/// gradients are those of [`Linear`], with the weight on the other side:
///
/// ```text
/// d patch = W'ᵀ·dy      dx = the sum of all d patch where they overlap      G = Σ patch·d patchᵀ
/// ```
///
/// A trained base takes its gradient, `dW'`, from the backend's convolution.
#[derive(Debug)]
struct Conv2d;

/// Input, weight, blocks and scale.
type Operands<B> = (
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
);

/// What the backward pass reads.
#[derive(Clone, Debug)]
struct Conv2dState<B: Backend> {
    /// The node of the input.
    input: NodeId,
    /// The base, of which the rotated weight is made again where it was not kept.
    weight: FloatTensor<B>,
    /// `diag(s)·W·Rᵀ`, where it is kept.
    effective: Option<FloatTensor<B>>,
    blocks: FloatTensor<B>,
    channels: ChannelState<B>,
    options: ConvOptions<2>,
}

/// Computes the convolution and enters it into the graph, with the nodes that [`Conv2d`] lists.
///
/// # Shapes
///
/// - input: `[n, c·groups, h, w]`
/// - weight: `[o, c, kh, kw]`
/// - scale, bias: `[o]`
/// - result: `[n, o, h', w']`
fn rotated_conv2d<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    (input, weight, blocks, scale): Operands<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
    options: ConvOptions<2>,
) -> FloatTensor<Autodiff<B, C>> {
    let keeps_output = scale.is_tracked();
    let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
    let scale = scale.into_primitive();
    let effective = rotated_kernel::<B>(weight.clone(), blocks.clone(), scale.clone());
    let output = conv::convolve::<B>(
        input.primitive().clone(),
        effective.clone(),
        bias.clone(),
        options.clone(),
    );
    let [n, _, h, w] = output.shape().dims::<4>();
    let [o, c, kh, kw] = weight.shape().dims::<4>();
    match Conv2d.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = Conv2dState {
                input: prep.checkpoint(&input),
                weight,
                effective: keeps_weight(n * h * w, [c * kh * kw, o]).then_some(effective),
                blocks,
                channels: ChannelState {
                    scale,
                    bias,
                    output: keeps_output.then(|| output.clone()),
                    outputs: Outputs::Planes,
                },
                options,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

/// The rotated and scaled weight of a convolution, `diag(s)·W·Rᵀ` for the weight as an `[o, c·kh·kw]` matrix.
///
/// # Shapes
///
/// - weight: `[o, c, kh, kw]`; so is the result
/// - scale: `[o]`
fn rotated_kernel<B: BoftBackend>(
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
) -> FloatTensor<B> {
    let shape = weight.shape().dims::<4>();
    let rotated = B::boft_weight(conv::matrix::<B>(weight), blocks, scale, Side::Right);
    reshape::<B, 4>(rotated, shape)
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Conv2d {
    type State = Conv2dState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let mut parents = ops.parents.into_iter();
        let [input_node, weight_node, blocks_node, scale_node, bias_node] =
            [(); 5].map(|()| parents.next().flatten().map(|node| node.id));
        let Conv2dState {
            input,
            weight,
            effective,
            blocks,
            mut channels,
            options,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        channels.gradients(&gradient, [scale_node, bias_node], gradients);
        if [input_node, weight_node, blocks_node]
            .iter()
            .all(Option::is_none)
        {
            return;
        }

        let scale = channels.scale;
        let effective =
            effective.unwrap_or_else(|| rotated_kernel::<B>(weight, blocks.clone(), scale.clone()));
        let input: FloatTensor<B> = checkpointer.retrieve_node_output(input);
        if let Some(node) = weight_node {
            let gradient = B::conv2d_weight_backward(
                input.clone(),
                effective.clone(),
                gradient.clone(),
                options.clone(),
            );
            let shape = gradient.shape().dims::<4>();
            let gradient = conv::matrix::<B>(gradient);
            let gradient = weight_gradient::<B>(gradient, blocks.clone(), scale, Side::Right);
            gradients.register::<B>(node, reshape::<B, 4>(gradient, shape));
        }
        let input_gradient = match blocks_node {
            Some(node) => {
                let (input_gradient, blocks_gradient) =
                    B::boft_conv2d_backward(input, effective, blocks, gradient, options);
                gradients.register::<B>(node, blocks_gradient);
                Some(input_gradient)
            }
            None => input_node.map(|_| B::conv2d_x_backward(input, effective, gradient, options)),
        };
        if let (Some(node), Some(gradient)) = (input_node, input_gradient) {
            gradients.register::<B>(node, gradient);
        }
    }
}

/// [`BoftBackend::boft_packed_product`] in the graph. It keeps the packed weight, which has no gradient, and makes floats
/// of it once more for `dx = dy·Wᵀ`.
#[derive(Debug)]
struct PackedProduct;

impl<B: BoftBackend> Backward<B, 1> for PackedProduct {
    type State = QuantizedTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let [input] = ops.parents;
        let gradient = gradients.consume::<B>(&ops.node);
        if let Some(input) = input {
            let gradient = packed_product_backward::<B>(gradient, ops.state);
            gradients.register::<B>(input.id, gradient);
        }
    }
}

/// [`BoftBackend::boft_scaled`] in the graph. Its parents are the output of a product, the scale and, if there is one, the
/// bias.
///
/// ```text
/// dz = dy ⊙ s      ∂L/∂s = Σ_tokens dy ⊙ (y − bias) / s      ∂L/∂bias = Σ_tokens dy
/// ```
#[derive(Debug)]
struct Scaled;

/// What the backward pass reads.
#[derive(Clone, Debug)]
struct ScaledState<B: Backend> {
    channels: ChannelState<B>,
    /// The precision of the product.
    dtype: DType,
}

/// Scales and adds, and enters the operation into the graph with the nodes that [`Scaled`] lists.
fn scaled<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    output: FloatTensor<Autodiff<B, C>>,
    scale: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<Autodiff<B, C>> {
    let keeps_output = scale.is_tracked();
    let (output, scale) = (output.into_primitive(), scale.into_primitive());
    let dtype = output.dtype();
    let output = B::boft_scaled(output, scale.clone(), bias.clone().into());
    match Scaled.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let channels = ChannelState {
                scale,
                bias,
                output: keeps_output.then(|| output.clone()),
                outputs: Outputs::Columns,
            };
            prep.finish(ScaledState { channels, dtype }, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for Scaled {
    type State = ScaledState<B>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let mut parents = ops.parents.into_iter();
        let [output_node, scale_node, bias_node] =
            [(); 3].map(|()| parents.next().flatten().map(|node| node.id));
        let ScaledState {
            mut channels,
            dtype,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        channels.gradients(&gradient, [scale_node, bias_node], gradients);
        if let Some(node) = output_node {
            let scale = away_from_zero::<B>(channels.scale);
            let scale = along::<B>(cast::<B>(scale, dtype), Channels::Columns);
            gradients.register::<B>(node, B::float_mul(gradient, scale));
        }
    }
}

/// The gradient of the scale, `Σ gradient ⊙ (output − bias) / s`, from the sums per channel.
///
/// The bias is constant along a channel, so `Σ dy ⊙ (y − bias) = Σ dy ⊙ y − bias · Σ dy`, and no matrix without bias
/// has to be formed.
///
/// # Shapes
///
/// - products and sums, scale, bias: `[o]`; so is the result
///
/// # Numerics
///
/// In the precision of the sums, f32 or wider, then rounded to that of the scale. The division is by the scale that
/// the forward pass used, moved [`away_from_zero`].
fn scale_gradient<B: Backend>(
    (products, sums): (FloatTensor<B>, FloatTensor<B>),
    scale: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let dtype = scale.dtype();
    let products = match bias {
        Some(bias) => {
            let bias = cast::<B>(bias, sums.dtype());
            B::float_sub(products, B::float_mul(sums, bias))
        }
        None => products,
    };
    let scale = away_from_zero::<B>(cast::<B>(scale, products.dtype()));
    cast::<B>(B::float_div(products, scale), dtype)
}

/// The gradient of a weight from that of `R·W·diag(s)`, `∂L/∂W = Rᵀ·(dW'·diag(s))`, and likewise from the right.
///
/// # Shapes
///
/// - gradient: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
/// - scale: `[o]`
fn weight_gradient<B: BoftBackend>(
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
