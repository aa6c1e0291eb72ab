//! The backward pass of every operation.
//!
//! A unit struct stands for each operation in Burn's graph, and [`Backward::State`] is what the operation keeps for
//! its backward pass. An input is kept by the identifier of its node, so that under gradient checkpointing Burn can
//! compute it again instead of storing it.
//!
//! | step | keeps | so that the backward pass does without |
//! |---|---|---|
//! | [`Cayley`] | the blocks | a second inverse |
//! | [`Butterfly`](butterfly::Butterfly) | the blocks, and either its input or its output | results of single factors |
//! | [`Weight`] | the blocks, the scale, its output | the base itself |
//! | [`Product`](product::Product) | its input for a trained weight, its weight for a tracked input | |
//! | [`PackedProduct`] | the packed weight | the floats of every quantized weight at once |
//! | [`Scaled`](scaled::Scaled) | its output, for a trained scale | the output before it was scaled |
//! | [`Linear`](linear::Linear) | its input, base, blocks, scale and bias; the output for a trained scale | a gradient of the shape of the weight, and the rotated weight |
//! | [`BlockDiagonalLinear`](block_diagonal::BlockDiagonalLinear) | its input, base and blocks | a gradient of the shape of the weight |
//! | [`Conv2d`](conv::Conv2d) | the same as `Linear`; the rotated weight if small | a gradient of the shape of the weight, where there is a kernel |
//!
//! Tensors are shared, so what is kept costs memory only if nobody else keeps it: an output is usually the input that
//! the next operation keeps, and base and scale live in the model. All operations are *compute bound* in Burn's
//! words: under gradient checkpointing their outputs are not computed again.
//!
//! [`Butterfly`](butterfly::Butterfly), [`Weight`], [`Linear`](linear::Linear) and [`Conv2d`](conv::Conv2d) end in `G` of the Gram
//! backward, which is proved in the documentation of [`ops`](super). Its two operands differ:
//!
//! | operation | gradient of the operand | `G` |
//! |---|---|---|
//! | `y = x·R`, as activations | `dx = dy·Rᵀ` | `xᵀ·dx` |
//! | `y = Rᵀ·x`, the same from the left | `dx = R·dy` | `x·dxᵀ` |
//! | `W' = R·W·diag(s)`, as weights | `dW = Rᵀ·dW'·diag(s)` | `dW'·W'ᵀ` |
//! | `W' = diag(s)·W·Rᵀ`, the same from the right | `dW = diag(s)·dW'·R` | `dW'ᵀ·W'` |
//! | `y = x·W' + bias`, a layer | `dx = dy·W'ᵀ` | `xᵀ·dx` |
//!
//! Gradients are registered only for parents that are tracked, and a [`Linear`](linear::Linear) with a frozen base forms no gradient
//! of the base's shape.

mod block_diagonal;
mod butterfly;
mod conv;
mod gradients;
mod linear;
mod product;
mod scaled;

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{
    Backend,
    tensor::{FloatTensor, QuantizedTensor},
};
use burn::tensor::ops::ConvOptions;

use block_diagonal::block_diagonal_linear;
use butterfly::multiplied;
use conv::{block_diagonal_conv2d, rotated_conv2d};
use gradients::{scale_gradient, weight_gradient};
use linear::rotated_linear;
use product::product;
use scaled::scaled;

use super::backend::{BoftBackend, OptionalTensor};
use super::butterfly::{Direction, Side};
use super::linear::{Channels, packed_product_backward};

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
        let (operand, values) = (matrix.primitive().clone(), blocks.primitive().clone());
        let output = B::boft_butterfly(operand, values, side, direction);
        multiplied::<B, C>([matrix, blocks], output, (side, direction), true)
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

    fn boft_block_diagonal(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        direction: Direction,
    ) -> FloatTensor<Self> {
        let (operand, values) = (matrix.primitive().clone(), blocks.primitive().clone());
        let output = B::boft_block_diagonal(operand, values, side, direction);
        multiplied::<B, C>([matrix, blocks], output, (side, direction), false)
    }

    fn boft_block_diagonal_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let [i, w, b] = [input.node(), weight.node(), blocks.node()];
        match bias {
            OptionalTensor::Absent => {
                block_diagonal_linear::<B, C, 3>([i, w, b], input, weight, blocks, None)
            }
            OptionalTensor::Present(bias) => {
                let nodes = [i, w, b, bias.node()];
                let bias = Some(bias.into_primitive());
                block_diagonal_linear::<B, C, 4>(nodes, input, weight, blocks, bias)
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

    fn boft_block_diagonal_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
        options: ConvOptions<2>,
    ) -> FloatTensor<Self> {
        let [i, w, b] = [input.node(), weight.node(), blocks.node()];
        let operands = [input, weight, blocks];
        match bias {
            OptionalTensor::Absent => {
                block_diagonal_conv2d::<B, C, 3>([i, w, b], operands, None, options)
            }
            OptionalTensor::Present(bias) => {
                let nodes = [i, w, b, bias.node()];
                let bias = Some(bias.into_primitive());
                block_diagonal_conv2d::<B, C, 4>(nodes, operands, bias, options)
            }
        }
    }

    fn boft_product(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
    ) -> FloatTensor<Self> {
        let [i, w] = [input.node(), weight.node()];
        match bias {
            OptionalTensor::Absent => product::<B, C, 2>([i, w], input, weight, None),
            OptionalTensor::Present(bias) => {
                let nodes = [i, w, bias.node()];
                product::<B, C, 3>(nodes, input, weight, Some(bias.into_primitive()))
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
