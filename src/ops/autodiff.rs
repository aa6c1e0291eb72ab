//! The backward pass of every operation.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

use super::backend::BoftBackend;
use super::butterfly::Side;
use super::linear::{along_output, away_from_zero};
use super::precision::cast;
use super::route::keeps_weight;

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
                    let sums = B::boft_channel_sums(gradient.clone(), output, side);
                    let gradient = scale_gradient::<B>(sums, scale.clone(), None);
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
        bias: FloatTensor<Self>,
        has_bias: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            input: NodeId,
            weight: FloatTensor<B>,
            /// `R·W·diag(s)`, where it is kept.
            effective: Option<FloatTensor<B>>,
            blocks: FloatTensor<B>,
            scale: FloatTensor<B>,
            bias: Option<FloatTensor<B>>,
            /// Kept for the gradient of the scale only; what follows the layer mostly keeps it too.
            output: Option<FloatTensor<B>>,
        }

        impl<B: BoftBackend> Backward<B, 5> for Linear {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 5>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [input, weight, blocks, scale, bias] = ops.parents;
                let state = ops.state;
                let gradient = gradients.consume::<B>(&ops.node);
                match (scale, state.output) {
                    (Some(scale), Some(output)) => {
                        let sums = B::boft_channel_sums(gradient.clone(), output, Side::Left);
                        if let Some(bias) = bias {
                            let dtype = state.bias.as_ref().map_or(sums.1.dtype(), |b| b.dtype());
                            gradients.register::<B>(bias.id, cast::<B>(sums.1.clone(), dtype));
                        }
                        let gradient = scale_gradient::<B>(sums, state.scale.clone(), state.bias);
                        gradients.register::<B>(scale.id, gradient);
                    }
                    _ => {
                        if let Some(bias) = bias {
                            let sum = B::float_sum_dim(gradient.clone(), 0);
                            let outputs = sum.shape().num_elements();
                            let sum = B::float_reshape(sum, Shape::from([outputs]));
                            gradients.register::<B>(bias.id, sum);
                        }
                    }
                }
                let kept_input: Option<FloatTensor<B>> = (blocks.is_some() || weight.is_some())
                    .then(|| checkpointer.retrieve_node_output(state.input));
                if input.is_some() || blocks.is_some() {
                    let effective = state.effective.unwrap_or_else(|| {
                        let (blocks, scale) = (state.blocks.clone(), state.scale.clone());
                        B::boft_weight(state.weight, blocks, scale, Side::Left)
                    });
                    let effective = B::float_swap_dims(effective, 0, 1);
                    let unread = state.scale.clone();
                    let input_gradient =
                        B::boft_product(gradient.clone(), effective, unread, false);
                    if let (Some(node), Some(input)) = (blocks, kept_input.clone()) {
                        let gradient = B::boft_block_gradient(
                            input,
                            input_gradient.clone(),
                            state.blocks.clone(),
                            Side::Right,
                        );
                        gradients.register::<B>(node.id, gradient);
                    }
                    if let Some(node) = input {
                        gradients.register::<B>(node.id, input_gradient);
                    }
                }
                if let (Some(node), Some(input)) = (weight, kept_input) {
                    let gradient = B::float_matmul(B::float_swap_dims(input, 0, 1), gradient);
                    let gradient =
                        weight_gradient::<B>(gradient, state.blocks, state.scale, Side::Left);
                    gradients.register::<B>(node.id, gradient);
                }
            }
        }

        let nodes = [
            input.node(),
            weight.node(),
            blocks.node(),
            scale.node(),
            bias.node(),
        ];
        let keeps_output = scale.is_tracked();
        let (weight, blocks) = (weight.into_primitive(), blocks.into_primitive());
        let (scale, bias) = (scale.into_primitive(), bias.into_primitive());
        let effective = B::boft_weight(weight.clone(), blocks.clone(), scale.clone(), Side::Left);
        let rows = input.primitive().shape().dims::<2>()[0];
        let keeps_effective = keeps_weight(rows, weight.shape().dims());
        let output = B::boft_product(
            input.primitive().clone(),
            effective.clone(),
            bias.clone(),
            has_bias,
        );
        match Linear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = State {
                    input: prep.checkpoint(&input),
                    weight,
                    effective: keeps_effective.then_some(effective),
                    blocks,
                    scale,
                    bias: has_bias.then_some(bias),
                    output: keeps_output.then(|| output.clone()),
                };
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}

/// The gradient of the scale, `Σ gradient ⊙ (output − bias) / s`, from the sums per channel.
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
