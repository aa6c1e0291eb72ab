//! Products with the blocks alone, on either side.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, tensor::FloatTensor};

use crate::ops::backend::{BoftBackend, products_of_blocks};
use crate::ops::butterfly::{Direction, Side};

/// [`BoftBackend::boft_butterfly`] and [`BoftBackend::boft_block_diagonal`] in the graph. The parents are the matrix and the
/// blocks.
///
/// The gradient of the matrix is the gradient of the output, rotated back. Where a rotation acts as on activations, that same
/// tensor is one of the two operands of `G`, which needs it even if the matrix is frozen. Where it acts as on weights it is
/// not, and it is not computed for a frozen matrix; nor is it for blocks that need not be orthogonal.
#[derive(Debug)]
pub(super) struct Butterfly;

/// What the backward pass reads: the blocks to rotate the gradient back with, and what is not a gradient of the two operands of
/// `G`.
#[derive(Clone, Debug)]
pub(super) struct ButterflyState<B: Backend> {
    kept: Kept<B>,
    blocks: FloatTensor<B>,
    side: Side,
    direction: Direction,
}

/// What is kept, by the algebra. Of a rotation, `R·t` and `t·Rᵀ` take `G` from the output, `t·R` and `Rᵀ·t` from the input.
#[derive(Clone, Debug)]
enum Kept<B: Backend> {
    /// The node of the input, for `G = tᵀ·dt` or `t·dtᵀ`.
    Input(NodeId),
    /// The output `y`, for `G = dy·yᵀ` or `dyᵀ·y`.
    Output(FloatTensor<B>),
    /// The node of the matrix, for blocks that need not be orthogonal: `∂L/∂R` is its product with `dy`.
    Matrix(NodeId),
}

/// Enters a product and its result into the graph.
pub(super) fn multiplied<B: BoftBackend, C: CheckpointStrategy>(
    [matrix, blocks]: [FloatTensor<Autodiff<B, C>>; 2],
    output: FloatTensor<B>,
    (side, direction): (Side, Direction),
    is_rotation: bool,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [matrix.node(), blocks.node()];
    match Butterfly.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let kept = match is_rotation {
                true if direction == side.weight_direction() => Kept::Output(output.clone()),
                true => Kept::Input(prep.checkpoint(&matrix)),
                false => Kept::Matrix(prep.checkpoint(&matrix)),
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
            Kept::Matrix(id) => {
                if let Some(node) = matrix_node {
                    let (gradient, blocks) = (gradient.clone(), blocks.clone());
                    let back = direction.reversed();
                    let gradient = B::boft_block_diagonal(gradient, blocks, side, back);
                    gradients.register::<B>(node.id, gradient);
                }
                if let Some(node) = blocks_node {
                    let matrix = checkpointer.retrieve_node_output(id);
                    // R·t and t·Rᵀ put the gradient first, t·R and Rᵀ·t the matrix.
                    let (lhs, rhs) = match direction == side.weight_direction() {
                        true => (gradient, matrix),
                        false => (matrix, gradient),
                    };
                    let gradient = products_of_blocks::<B>(lhs, rhs, &blocks, side);
                    gradients.register::<B>(node.id, gradient);
                }
            }
        }
    }
}
