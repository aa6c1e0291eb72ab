//! Rotated and scaled weights, and the backward passes of every operation.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

use super::{BoftBackend, Side, butterfly, cast, widen_primitive};

/// `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
pub(super) fn weight<B: Backend>(
    weight: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let dtype = weight.dtype();
    let weight = cast::<B>(weight, blocks.dtype());
    let rotated = butterfly::apply::<B>(weight, blocks, side, side == Side::Right);
    let scale = along_output::<B>(cast::<B>(scale, rotated.dtype()), side);
    cast::<B>(B::float_mul(rotated, away_from_zero::<B>(scale)), dtype)
}

/// The scale as a row for a `[d, o]` weight, as a column for an `[o, d]` weight.
fn along_output<B: Backend>(scale: FloatTensor<B>, side: Side) -> FloatTensor<B> {
    let outputs = scale.shape().num_elements();
    let shape = match side {
        Side::Left => Shape::from([1, outputs]),
        Side::Right => Shape::from([outputs, 1]),
    };
    B::float_reshape(scale, shape)
}

/// The scale with zeros replaced by 1e-20, since its gradient divides by it.
pub(super) fn away_from_zero<B: Backend>(scale: FloatTensor<B>) -> FloatTensor<B> {
    let magnitude = B::float_mul_scalar(B::float_abs(scale.clone()), 1e30.into());
    let is_zero = B::float_sub_scalar(B::float_clamp_max(magnitude, 1.0.into()), 1.0.into());
    B::float_add(scale, B::float_mul_scalar(is_zero, (-1e-20).into()))
}

/// `Σ gradient ⊙ output` over the axis that is not the output's, in f32 or wider.
pub(super) fn channel_products<B: Backend>(
    gradient: FloatTensor<B>,
    output: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let [rows, columns] = output.shape().dims::<2>();
    let (summed_axis, outputs) = match side {
        Side::Left => (0, columns),
        Side::Right => (1, rows),
    };
    let product = B::float_mul(widen_primitive::<B>(gradient), widen_primitive::<B>(output));
    B::float_reshape(
        B::float_sum_dim(product, summed_axis),
        Shape::from([outputs]),
    )
}

/// The gradient of the scale, `Σ gradient ⊙ output / s`.
fn scale_gradient<B: BoftBackend>(
    gradient: FloatTensor<B>,
    output: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let dtype = scale.dtype();
    let sum = B::boft_channel_products(gradient, output, side);
    let scale = away_from_zero::<B>(cast::<B>(scale, sum.dtype()));
    cast::<B>(B::float_div(sum, scale), dtype)
}

/// The gradient of a weight from that of `R·W·diag(s)`.
fn weight_gradient<B: BoftBackend>(
    gradient: FloatTensor<B>,
    blocks: FloatTensor<B>,
    scale: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let scale = along_output::<B>(cast::<B>(scale, gradient.dtype()), side);
    let scaled = B::float_mul(gradient, scale);
    B::boft_butterfly(scaled, blocks, side, side == Side::Left)
}

impl<B: BoftBackend, C: CheckpointStrategy> BoftBackend for Autodiff<B, C> {
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Cayley;

        impl<B: BoftBackend> Backward<B, 1> for Cayley {
            type State = FloatTensor<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 1>,
                gradients: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let [skew] = ops.parents;
                let gradient = gradients.consume::<B>(&ops.node);
                if let Some(skew) = skew {
                    let gradient = B::boft_cayley_backward(ops.state, gradient);
                    gradients.register::<B>(skew.id, gradient);
                }
            }
        }

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
        transpose: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Butterfly;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            /// The input where the rotation acts as on activations, the output where as on weights.
            kept: Kept<B>,
            blocks: FloatTensor<B>,
            side: Side,
            transpose: bool,
        }

        #[derive(Clone, Debug)]
        enum Kept<B: Backend> {
            Input(NodeId),
            Output(FloatTensor<B>),
        }

        impl<B: BoftBackend> Backward<B, 2> for Butterfly {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [matrix, blocks_node] = ops.parents;
                let State {
                    kept,
                    blocks,
                    side,
                    transpose,
                } = ops.state;
                let gradient = gradients.consume::<B>(&ops.node);
                let rotated_back =
                    B::boft_butterfly(gradient.clone(), blocks.clone(), side, !transpose);
                if let Some(node) = blocks_node {
                    let (lhs, rhs) = match kept {
                        Kept::Input(id) => {
                            (checkpointer.retrieve_node_output(id), rotated_back.clone())
                        }
                        Kept::Output(output) => (gradient, output),
                    };
                    let gradient = B::boft_block_gradient(lhs, rhs, blocks, side);
                    gradients.register::<B>(node.id, gradient);
                }
                if let Some(node) = matrix {
                    gradients.register::<B>(node.id, rotated_back);
                }
            }
        }

        let nodes = [matrix.node(), blocks.node()];
        // R·t and t·Rᵀ rotate weights, where G = dW'·W'ᵀ; t·R and Rᵀ·t activations, where G = xᵀ·dx.
        let is_weight = transpose == (side == Side::Right);
        let output = B::boft_butterfly(
            matrix.primitive().clone(),
            blocks.primitive().clone(),
            side,
            transpose,
        );
        match Butterfly.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept = match is_weight {
                    true => Kept::Output(output.clone()),
                    false => Kept::Input(prep.checkpoint(&matrix)),
                };
                let blocks = blocks.into_primitive();
                prep.finish(
                    State {
                        kept,
                        blocks,
                        side,
                        transpose,
                    },
                    output,
                )
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
        #[derive(Debug)]
        struct Weight;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            output: FloatTensor<B>,
            blocks: FloatTensor<B>,
            scale: FloatTensor<B>,
            side: Side,
        }

        impl<B: BoftBackend> Backward<B, 3> for Weight {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 3>,
                gradients: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let [weight_node, blocks_node, scale_node] = ops.parents;
                let State {
                    output,
                    blocks,
                    scale,
                    side,
                } = ops.state;
                let gradient = gradients.consume::<B>(&ops.node);
                if let Some(node) = blocks_node {
                    let gradient = B::boft_block_gradient(
                        gradient.clone(),
                        output.clone(),
                        blocks.clone(),
                        side,
                    );
                    gradients.register::<B>(node.id, gradient);
                }
                if let Some(node) = scale_node {
                    let gradient =
                        scale_gradient::<B>(gradient.clone(), output, scale.clone(), side);
                    gradients.register::<B>(node.id, gradient);
                }
                if let Some(node) = weight_node {
                    let gradient = weight_gradient::<B>(gradient, blocks, scale, side);
                    gradients.register::<B>(node.id, gradient);
                }
            }
        }

        let nodes = [weight.node(), blocks.node(), scale.node()];
        let (blocks, scale) = (blocks.into_primitive(), scale.into_primitive());
        let output = B::boft_weight(weight.into_primitive(), blocks.clone(), scale.clone(), side);
        match Weight.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(
                State {
                    output: output.clone(),
                    blocks,
                    scale,
                    side,
                },
                output,
            ),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn boft_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            input: NodeId,
            /// `R·W·diag(s)`.
            effective: FloatTensor<B>,
            blocks: FloatTensor<B>,
            scale: FloatTensor<B>,
            /// Kept for the gradient of the scale only.
            output: Option<FloatTensor<B>>,
        }

        impl<B: BoftBackend> Backward<B, 4> for Linear {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 4>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [input_node, weight_node, blocks_node, scale_node] = ops.parents;
                let State {
                    input,
                    effective,
                    blocks,
                    scale,
                    output,
                } = ops.state;
                let gradient = gradients.consume::<B>(&ops.node);
                if let (Some(node), Some(output)) = (scale_node, output) {
                    let gradient =
                        scale_gradient::<B>(gradient.clone(), output, scale.clone(), Side::Left);
                    gradients.register::<B>(node.id, gradient);
                }
                let input_gradient = || {
                    B::float_matmul(
                        gradient.clone(),
                        B::float_swap_dims(effective.clone(), 0, 1),
                    )
                };
                let input: FloatTensor<B> = match blocks_node.is_some() || weight_node.is_some() {
                    true => checkpointer.retrieve_node_output(input),
                    false => {
                        if let Some(node) = input_node {
                            gradients.register::<B>(node.id, input_gradient());
                        }
                        return;
                    }
                };
                if blocks_node.is_some() || input_node.is_some() {
                    let input_gradient = input_gradient();
                    if let Some(node) = blocks_node {
                        let gradient = B::boft_block_gradient(
                            input.clone(),
                            input_gradient.clone(),
                            blocks.clone(),
                            Side::Right,
                        );
                        gradients.register::<B>(node.id, gradient);
                    }
                    if let Some(node) = input_node {
                        gradients.register::<B>(node.id, input_gradient);
                    }
                }
                if let Some(node) = weight_node {
                    let gradient = B::float_matmul(B::float_swap_dims(input, 0, 1), gradient);
                    let gradient = weight_gradient::<B>(gradient, blocks, scale, Side::Left);
                    gradients.register::<B>(node.id, gradient);
                }
            }
        }

        let nodes = [input.node(), weight.node(), blocks.node(), scale.node()];
        let keeps_output = scale.is_tracked();
        let (blocks, scale) = (blocks.into_primitive(), scale.into_primitive());
        let effective = B::boft_weight(
            weight.into_primitive(),
            blocks.clone(),
            scale.clone(),
            Side::Left,
        );
        let output = B::float_matmul(input.primitive().clone(), effective.clone());
        match Linear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = State {
                    input: prep.checkpoint(&input),
                    effective,
                    blocks,
                    scale,
                    output: keeps_output.then(|| output.clone()),
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}
