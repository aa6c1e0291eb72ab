//! A convolution with a rotated weight, or with one that blocks have changed which need not be orthogonal.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;
use burn::tensor::ops::ConvOptions;

use super::gradients::{ChannelState, Outputs, bias_gradient, nodes, weight_gradient};
use crate::ops::backend::{BoftBackend, changed_kernel};
use crate::ops::butterfly::Side;
use crate::ops::conv;
use crate::ops::precision::reshape;
use crate::ops::route::keeps_weight;

/// [`BoftBackend::boft_conv2d`] in the graph. Its parents are the input, the weight, the blocks, the scale and, if there
/// is one, the bias.
///
/// A convolution is a linear layer on patches, the `c·kh·kw` numbers that the kernel covers at one place, so its
/// gradients are those of [`Linear`](super::linear::Linear), with the weight on the other side:
///
/// ```text
/// d patch = W'ᵀ·dy      dx = the sum of all d patch where they overlap      G = Σ patch·d patchᵀ
/// ```
///
/// A trained base takes its gradient, `dW'`, from the backend's convolution.
#[derive(Debug)]
pub(super) struct Conv2d;

/// Input, weight, blocks and scale.
type Operands<B> = (
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
);

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(super) struct Conv2dState<B: Backend> {
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
pub(super) fn rotated_conv2d<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
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
    let keeps_effective = keeps_weight(n * h * w, [c * kh * kw, o], keeps_output);
    match Conv2d.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = Conv2dState {
                input: prep.checkpoint(&input),
                weight,
                effective: keeps_effective.then_some(effective),
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
        let [input_node, weight_node, blocks_node, scale_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
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

/// [`BoftBackend::boft_block_diagonal_conv2d`] in the graph. Its parents are the input, the weight, the blocks and, if there is
/// one, the bias.
///
/// Its gradients are those of [`BlockDiagonalLinear`](super::block_diagonal::BlockDiagonalLinear) on patches, with the weight on
/// the other side:
///
/// ```text
/// d(Rᵀ·patch) = Wᵀ·dy      ∂L/∂R = Σ patch·(Wᵀ·dy)ᵀ      d patch = R·(Wᵀ·dy)
/// ```
#[derive(Debug)]
pub(super) struct BlockDiagonalConv2d;

/// What the backward pass reads: operands of the layer, and nothing that it computed.
#[derive(Clone, Debug)]
pub(super) struct BlockDiagonalState<B: Backend> {
    /// The node of the input.
    input: NodeId,
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    /// The precision of the bias, if there is one.
    bias: Option<DType>,
    options: ConvOptions<2>,
}

/// Computes the convolution and enters it into the graph, with the nodes that [`BlockDiagonalConv2d`] lists.
///
/// # Shapes
///
/// - input: `[n, c·groups, h, w]`
/// - weight: `[o, c, kh, kw]`
/// - bias: `[o]`
/// - result: `[n, o, h', w']`
pub(super) fn block_diagonal_conv2d<B: BoftBackend, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    [input, weight, blocks]: [FloatTensor<Autodiff<B, C>>; 3],
    bias: Option<FloatTensor<B>>,
    options: ConvOptions<2>,
) -> FloatTensor<Autodiff<B, C>> {
    let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
    let dtype = bias.as_ref().map(TensorMetadata::dtype);
    let output = B::boft_block_diagonal_conv2d(
        input.primitive().clone(),
        weight.clone(),
        blocks.clone(),
        bias.into(),
        options.clone(),
    );
    match BlockDiagonalConv2d
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(mut prep) => {
            let state = BlockDiagonalState {
                input: prep.checkpoint(&input),
                weight,
                blocks,
                bias: dtype,
                options,
            };
            prep.finish(state, output)
        }
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

impl<B: BoftBackend, const N: usize> Backward<B, N> for BlockDiagonalConv2d {
    type State = BlockDiagonalState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [input_node, weight_node, blocks_node, bias_node] =
            nodes(ops.parents.map(|parent| parent.map(|node| node.id)));
        let BlockDiagonalState {
            input,
            weight,
            blocks,
            bias,
            options,
        } = ops.state;
        let gradient = gradients.consume::<B>(&ops.node);
        bias_gradient::<B>(&gradient, Outputs::Planes, bias_node, bias, gradients);
        if [input_node, weight_node, blocks_node]
            .iter()
            .all(Option::is_none)
        {
            return;
        }

        let input: FloatTensor<B> = checkpointer.retrieve_node_output(input);
        if let Some(node) = weight_node {
            let changed = changed_kernel::<B>(weight.clone(), blocks.clone());
            let operands = (input.clone(), gradient.clone());
            let gradient =
                B::conv2d_weight_backward(operands.0, changed, operands.1, options.clone());
            let shape = gradient.shape().dims::<4>();
            let (side, gradient) = (Side::Right, conv::matrix::<B>(gradient));
            let back = side.weight_direction().reversed();
            let gradient = B::boft_block_diagonal(gradient, blocks.clone(), side, back);
            gradients.register::<B>(node, reshape::<B, 4>(gradient, shape));
        }
        let input_gradient = match blocks_node {
            Some(node) => {
                let (input_gradient, blocks_gradient) = B::boft_block_diagonal_conv2d_backward(
                    input, weight, blocks, gradient, options,
                );
                gradients.register::<B>(node, blocks_gradient);
                Some(input_gradient)
            }
            None => input_node.map(|_| {
                let changed = changed_kernel::<B>(weight, blocks);
                B::conv2d_x_backward(input, changed, gradient, options)
            }),
        };
        if let (Some(node), Some(gradient)) = (input_node, input_gradient) {
            gradients.register::<B>(node, gradient);
        }
    }
}
