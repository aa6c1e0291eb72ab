//! The operations as nodes of the graph.

use std::marker::PhantomData;

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{
        base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
        strategy::CheckpointStrategy,
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::ops::{FloatTensorOps, ModuleOps};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};

use super::TransformerBackend;

/// Computes GELU once more in the backward pass.
#[derive(Debug)]
struct GeluAgain<B> {
    input: NodeId,
    backend: PhantomData<B>,
}

impl<B: TransformerBackend> RetroForward for GeluAgain<B> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let input = states.get_state::<FloatTensor<B>>(&self.input);
        states.save(output, B::fused_gelu(input));
    }
}

/// Normalizes once more in the backward pass.
#[derive(Debug)]
struct LayerNormAgain<B: Backend> {
    input: NodeId,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    epsilon: f64,
}

impl<B: TransformerBackend> RetroForward for LayerNormAgain<B> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let input = states.get_state::<FloatTensor<B>>(&self.input);
        let (gamma, beta) = (self.gamma.clone(), self.beta.clone());
        states.save(
            output,
            B::fused_layer_norm(input, gamma, beta, self.epsilon),
        );
    }
}

/// Adds once more in the backward pass.
#[derive(Debug)]
struct AddScaledAgain<B: Backend> {
    tokens: NodeId,
    update: NodeId,
    scale: FloatTensor<B>,
}

impl<B: TransformerBackend> RetroForward for AddScaledAgain<B> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let tokens = states.get_state::<FloatTensor<B>>(&self.tokens);
        let update = states.get_state::<FloatTensor<B>>(&self.update);
        states.save(
            output,
            B::fused_add_scaled(tokens, update, self.scale.clone()),
        );
    }
}

impl<B: TransformerBackend, C: CheckpointStrategy> TransformerBackend for Autodiff<B, C> {
    fn fused_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Gelu;

        impl<B: TransformerBackend> Backward<B, 1> for Gelu {
            type State = NodeId;

            fn backward(
                self,
                ops: Ops<Self::State, 1>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [parent] = ops.parents;
                let gradient = gradients.consume::<B>(&ops.node);
                if let Some(parent) = parent {
                    let input = checkpointer.retrieve_node_output(ops.state);
                    let gradient = B::fused_gelu_backward(input, gradient);
                    gradients.register::<B>(parent.id, gradient);
                }
            }
        }

        let output = B::fused_gelu(input.primitive().clone());
        // Under gradient checkpointing the output, the widest tensor of a block, is computed again and not kept.
        match Gelu
            .prepare::<C>([input.node()])
            .memory_bound()
            .retro_forward(GeluAgain::<B> {
                input: input.id(),
                backend: PhantomData,
            })
            .parents([&input])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = prep.checkpoint(&input);
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn fused_gelu_backward(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        unreachable!("a backward pass is not differentiated")
    }

    fn fused_layer_norm(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct LayerNorm;

        impl<B: TransformerBackend> Backward<B, 1> for LayerNorm {
            type State = (NodeId, FloatTensor<B>, f64);

            fn backward(
                self,
                ops: Ops<Self::State, 1>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [parent] = ops.parents;
                let gradient = gradients.consume::<B>(&ops.node);
                if let Some(parent) = parent {
                    let (input, gamma, epsilon) = ops.state;
                    let input = checkpointer.retrieve_node_output(input);
                    let gradient = B::fused_layer_norm_backward(input, gamma, gradient, epsilon);
                    gradients.register::<B>(parent.id, gradient);
                }
            }
        }

        if gamma.is_tracked() || beta.is_tracked() {
            return Self::layer_norm(input, gamma, Some(beta), epsilon);
        }
        let (gamma, beta) = (gamma.into_primitive(), beta.into_primitive());
        let values = input.primitive().clone();
        let output = B::fused_layer_norm(values, gamma.clone(), beta.clone(), epsilon);
        match LayerNorm
            .prepare::<C>([input.node()])
            .memory_bound()
            .retro_forward(LayerNormAgain::<B> {
                input: input.id(),
                gamma: gamma.clone(),
                beta,
                epsilon,
            })
            .parents([&input])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&input), gamma, epsilon);
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn fused_layer_norm_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: f64,
    ) -> FloatTensor<Self> {
        unreachable!("a backward pass is not differentiated")
    }

    fn fused_add_scaled(
        tokens: FloatTensor<Self>,
        update: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct AddScaled;

        impl<B: TransformerBackend> Backward<B, 2> for AddScaled {
            type State = FloatTensor<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                gradients: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let [tokens, update] = ops.parents;
                let gradient = gradients.consume::<B>(&ops.node);
                if let Some(update) = update {
                    let gradient = B::fused_scale(gradient.clone(), ops.state);
                    gradients.register::<B>(update.id, gradient);
                }
                if let Some(tokens) = tokens {
                    gradients.register::<B>(tokens.id, gradient);
                }
            }
        }

        if scale.is_tracked() {
            return Self::float_add(tokens, Self::fused_scale(update, scale));
        }
        let scale = scale.into_primitive();
        let [values, updates] = [&tokens, &update].map(|tensor| tensor.primitive().clone());
        let output = B::fused_add_scaled(values, updates, scale.clone());
        match AddScaled
            .prepare::<C>([tokens.node(), update.node()])
            .memory_bound()
            .retro_forward(AddScaledAgain::<B> {
                tokens: tokens.id(),
                update: update.id(),
                scale: scale.clone(),
            })
            .parents([&tokens, &update])
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(scale, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn fused_scale(tokens: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self> {
        let mut shape = vec![1; tokens.shape().num_dims()];
        *shape.last_mut().expect("tokens have channels") = scale.shape().num_elements();
        Self::float_mul(tokens, Self::float_reshape(scale, shape.into()))
    }

    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Attention;

        impl<B: TransformerBackend> Backward<B, 3> for Attention {
            type State = [NodeId; 3];

            fn backward(
                self,
                ops: Ops<Self::State, 3>,
                gradients: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let gradient = gradients.consume::<B>(&ops.node);
                let [query, key, value] = ops.state.map(|id| checkpointer.retrieve_node_output(id));
                let (query, key, value) = B::fused_attention_backward(query, key, value, gradient);
                for (parent, gradient) in ops.parents.into_iter().zip([query, key, value]) {
                    if let Some(parent) = parent {
                        gradients.register::<B>(parent.id, gradient);
                    }
                }
            }
        }

        let output = B::fused_attention(
            query.primitive().clone(),
            key.primitive().clone(),
            value.primitive().clone(),
        );
        let nodes = [query.node(), key.node(), value.node()];
        match Attention.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = [&query, &key, &value].map(|input| prep.checkpoint(input));
                prep.finish(state, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }

    fn fused_attention_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        unreachable!("a backward pass is not differentiated")
    }
}
