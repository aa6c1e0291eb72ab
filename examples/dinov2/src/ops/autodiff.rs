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
use burn::backend::tensor::FloatTensor;

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
