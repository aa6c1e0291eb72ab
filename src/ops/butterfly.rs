//! The butterfly: applying a rotation, and the gradient of its blocks. The portable version.
//!
//! It runs on every backend, for every span and in every precision, and is what the kernels are tested against.
//! Rotated axes are brought to the front and cut into spans, `[d/s, s, k]`, so that both sides and both directions
//! share one path of batched products.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

use super::cayley;
use super::precision::{cast, reshape, widen_primitive};

/// Which side of a matrix the rotation multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `R·t`, on the rows of a `[d, columns]` matrix.
    Left,
    /// `t·R`, on the columns of a `[rows, d]` matrix.
    Right,
}

impl Side {
    /// The length of the rotated axis.
    pub(super) fn rotated(self, [rows, columns]: [usize; 2]) -> usize {
        match self {
            Self::Left => rows,
            Self::Right => columns,
        }
    }

    /// The length of the other axis.
    pub(super) fn other(self, [rows, columns]: [usize; 2]) -> usize {
        match self {
            Self::Left => columns,
            Self::Right => rows,
        }
    }

    /// How a weight is rotated from this side: `R·W` where it is `[d, o]`, `W·Rᵀ` where it is `[o, d]`.
    pub(super) fn weight_direction(self) -> Direction {
        match self {
            Self::Left => Direction::Forward,
            Self::Right => Direction::Back,
        }
    }
}

/// Whether a product takes the rotation or its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `R`.
    Forward,
    /// `Rᵀ`, which undoes `R` where the blocks are orthogonal.
    Back,
}

impl Direction {
    /// The direction that undoes this one, which is also that of the transposed product: `t·R` is the transpose of
    /// `Rᵀ·tᵀ`.
    pub(super) fn reversed(self) -> Self {
        match self {
            Self::Forward => Self::Back,
            Self::Back => Self::Forward,
        }
    }
}

/// Spans up to this size are composed into one matrix each before they meet the operand.
///
/// With a composed span the operand is read once, whatever the number of factors, for `span/(m·b)` times the
/// multiplications. Longer spans are rotated factor by factor, which reads and writes the operand once for each
/// factor and copies it for each stage permutation.
const COMPOSED_SPAN: usize = 64;

/// `op(R)·t` or `t·op(R)`, in the precision of the blocks, returned in the operand's.
///
/// # Shapes
///
/// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]; so is the result
/// - blocks: `[m, n, b, b]`, where `d = n·b`
///
/// # Numerics
///
/// Sums run in the precision of the blocks, f32 or f64, as the backend's matrix product runs them. The result is
/// rounded to the operand's precision once.
///
/// # References
///
/// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, section 4.
pub(super) fn apply<B: Backend>(
    matrix: FloatTensor<B>,
    blocks: FloatTensor<B>,
    side: Side,
    direction: Direction,
) -> FloatTensor<B> {
    let dtype = matrix.dtype();
    let matrix = cast::<B>(matrix, blocks.dtype());
    let spans = into_spans::<B>(matrix, side, span(&blocks.shape().dims::<4>()));
    // t·op(R) is the transpose of op(R)ᵀ·tᵀ.
    let direction = match side {
        Side::Left => direction,
        Side::Right => direction.reversed(),
    };
    let spans = rotate_spans::<B>(spans, blocks, direction);
    cast::<B>(from_spans::<B>(spans, side), dtype)
}

/// `G` per span along the rotated axis, `lhs·rhsᵀ` or `lhsᵀ·rhs`.
///
/// Only the blocks of the product on its diagonal are formed, `d·s` numbers of `d²`: they hold every pair of indices
/// that a rotation mixes.
///
/// # Shapes
///
/// - lhs, rhs: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]
/// - result: `[d/s, s, s]`
///
/// # Numerics
///
/// Operands in half precision are widened before the product, so that it sums in f32 or wider.
fn gram<B: Backend>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    side: Side,
    span: usize,
) -> FloatTensor<B> {
    let lhs = into_spans::<B>(widen_primitive::<B>(lhs), side, span);
    let rhs = into_spans::<B>(widen_primitive::<B>(rhs), side, span);
    B::float_matmul(lhs, B::float_swap_dims(rhs, 1, 2))
}

/// The gradient of the blocks from the two matrices whose product per span is `G`.
///
/// # Shapes
///
/// - lhs, rhs: as [`gram`] takes them
/// - blocks: `[m, n, b, b]`; so is the result
///
/// # Numerics
///
/// In f32 or wider up to `G`, then in the precision of the blocks.
pub(super) fn block_gradient<B: Backend>(
    lhs: FloatTensor<B>,
    rhs: FloatTensor<B>,
    blocks: FloatTensor<B>,
    side: Side,
) -> FloatTensor<B> {
    let span = span(&blocks.shape().dims::<4>());
    backward::<B>(gram::<B>(lhs, rhs, side, span), blocks)
}

/// The gradient of the blocks from `G`, where `∂L/∂R = G·R`.
///
/// From the last factor to the first: `∂L/∂C = G[L,L]·C` for the indices `L` that the block couples, then
/// `G ← F_iᵀ·G·F_i`. With `R = A·F_i·B`, where `A` holds the factors after `F_i` and `B` those before it:
///
/// ```text
/// ∂L/∂F_i = Aᵀ · ∂L/∂R · Bᵀ = Aᵀ·G·(A·F_i·B)·Bᵀ = (Aᵀ·G·A)·F_i
/// ```
///
/// So what the factor needs is `G` carried past the factors after it, and neither `A`, `B` nor a partly rotated
/// operand has to be kept. A block sees its own indices only, since the other entries of `F_i` are constant zeros.
///
/// # Shapes
///
/// - gram: `[d/s, s, s]`
/// - blocks: `[m, n, b, b]`; so is the result
fn backward<B: Backend>(gram: FloatTensor<B>, blocks: FloatTensor<B>) -> FloatTensor<B> {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let mut gram = cast::<B>(gram, blocks.dtype());
    let mut gradients = Vec::with_capacity(m);
    for stage in (0..m).rev() {
        let factor = factor::<B>(&blocks, stage);
        let coupled = coupled_blocks::<B>(gram.clone(), stage, b);
        let gradient = B::float_matmul(coupled, factor.clone());
        gradients.push(reshape::<B, 4>(gradient, [1, n, b, b]));
        if stage > 0 {
            let half = rotate_stage::<B>(gram, factor.clone(), stage, Direction::Back);
            let half = B::float_swap_dims(half, 1, 2);
            gram = B::float_swap_dims(
                rotate_stage::<B>(half, factor, stage, Direction::Back),
                1,
                2,
            );
        }
    }
    gradients.reverse();
    B::float_cat(gradients, 0)
}

/// The neighbours that a rotation mixes, `s = b·2^(m−1)`, from the shape of its blocks.
fn span(&[m, _, b, _]: &[usize; 4]) -> usize {
    b << (m - 1)
}

/// A matrix with its rotated axis in front and cut into spans.
///
/// On the left this only reshapes. On the right it swaps axes, a view that the backend's product may read as it is. (A
/// permutation would do the same, and fails on devices of `burn-remote`.)
///
/// # Shapes
///
/// - matrix: `[d, k]` for [`Side::Left`], `[k, d]` for [`Side::Right`]
/// - result: `[d/s, s, k]`
fn into_spans<B: Backend>(matrix: FloatTensor<B>, side: Side, span: usize) -> FloatTensor<B> {
    let [rows, columns] = matrix.shape().dims::<2>();
    match side {
        Side::Left => reshape::<B, 3>(matrix, [rows / span, span, columns]),
        Side::Right => {
            let spans = reshape::<B, 3>(matrix, [rows, columns / span, span]);
            let spans = B::float_swap_dims(spans, 0, 1);
            B::float_swap_dims(spans, 1, 2)
        }
    }
}

/// The inverse of [`into_spans`].
fn from_spans<B: Backend>(spans: FloatTensor<B>, side: Side) -> FloatTensor<B> {
    let [count, span, k] = spans.shape().dims::<3>();
    match side {
        Side::Left => reshape::<B, 2>(spans, [count * span, k]),
        Side::Right => {
            let spans = B::float_swap_dims(spans, 1, 2);
            let spans = B::float_swap_dims(spans, 0, 1);
            reshape::<B, 2>(spans, [k, count * span])
        }
    }
}

/// `op(R)·t` on spans: at once for one factor, through a composed matrix up to [`COMPOSED_SPAN`], else factor by
/// factor.
///
/// # Shapes
///
/// - spans: `[d/s, s, k]`; so is the result
/// - blocks: `[m, n, b, b]`
fn rotate_spans<B: Backend>(
    spans: FloatTensor<B>,
    blocks: FloatTensor<B>,
    direction: Direction,
) -> FloatTensor<B> {
    let dims = blocks.shape().dims::<4>();
    if dims[0] == 1 {
        return rotate_stage::<B>(spans, factor::<B>(&blocks, 0), 0, direction);
    }
    if span(&dims) > COMPOSED_SPAN {
        return rotate_factors::<B>(spans, &blocks, direction);
    }
    let rotation = compose::<B>(&blocks);
    B::float_matmul(transposed::<B>(rotation, direction), spans)
}

/// The rotation of each span as one matrix, a `[d/s, s, s]` tensor: all factors applied to an identity.
///
/// # Numerics
///
/// In the precision of the blocks, with the rounding of `m` products. The kernels for CPUs compose in f64.
pub(super) fn compose<B: Backend>(blocks: &FloatTensor<B>) -> FloatTensor<B> {
    let dims = blocks.shape().dims::<4>();
    let span = span(&dims);
    let count = dims[1] * dims[2] / span;
    let identity = cayley::identity::<B>(blocks, span);
    let identity = B::float_expand(identity, [count, span, span].into());
    rotate_factors::<B>(identity, blocks, Direction::Forward)
}

/// `F_{m−1} ··· F_0 · t`, or `F_0ᵀ ··· F_{m−1}ᵀ · t`, one factor after the other.
///
/// What meets `t` first is the rightmost factor, `F_0` forward and the transpose of `F_{m−1}` back.
///
/// # Shapes
///
/// - spans: `[d/s, s, k]`; so is the result
fn rotate_factors<B: Backend>(
    spans: FloatTensor<B>,
    blocks: &FloatTensor<B>,
    direction: Direction,
) -> FloatTensor<B> {
    let m = blocks.shape().dims::<4>()[0];
    (0..m).fold(spans, |spans, step| {
        let stage = match direction {
            Direction::Forward => step,
            Direction::Back => m - 1 - step,
        };
        rotate_stage::<B>(spans, factor::<B>(blocks, stage), stage, direction)
    })
}

/// `op(F_i)·t` on spans, where `F_i = P_i · blockdiag(C_{i,0}, …, C_{i,n−1}) · P_iᵀ`.
///
/// `P_iᵀ` is [`pair`] and `P_i` is [`unpair`]. Between them all `n` blocks, of every span, are one batched product.
///
/// # Shapes
///
/// - spans: `[d/s, s, k]`; so is the result
/// - factor: `[n, b, b]`
fn rotate_stage<B: Backend>(
    spans: FloatTensor<B>,
    factor: FloatTensor<B>,
    stage: usize,
    direction: Direction,
) -> FloatTensor<B> {
    let [count, span, k] = spans.shape().dims::<3>();
    let [n, b, _] = factor.shape().dims::<3>();
    let paired = pair::<B>(spans, stage, b);
    let paired = reshape::<B, 3>(paired, [n, b, k]);
    let rotated = B::float_matmul(transposed::<B>(factor, direction), paired);
    unpair::<B>(reshape::<B, 3>(rotated, [count, span, k]), stage, b)
}

/// The stage permutation of the span axis: half-blocks at distance `2^stage` side by side.
///
/// The axis is seen as `[c, 2, 2^stage, b/2]` and its two middle axes are swapped, with a view and one copy instead
/// of a permutation tensor. The halves of stage 0 are neighbours already, so that nothing moves. With `b = 2` and
/// stage 1, the places `0 1 2 3` become `0 2 1 3`.
fn pair<B: Backend>(spans: FloatTensor<B>, stage: usize, b: usize) -> FloatTensor<B> {
    swap_halves::<B>(spans, stage, b, [2, 1 << stage])
}

/// The inverse of [`pair`].
fn unpair<B: Backend>(spans: FloatTensor<B>, stage: usize, b: usize) -> FloatTensor<B> {
    swap_halves::<B>(spans, stage, b, [1 << stage, 2])
}

/// Swaps two axes, of these lengths, of the span axis seen as `[c, outer, inner, b/2]`.
///
/// # Shapes
///
/// - spans: `[d/s, s, k]`; so is the result
fn swap_halves<B: Backend>(
    spans: FloatTensor<B>,
    stage: usize,
    b: usize,
    [outer, inner]: [usize; 2],
) -> FloatTensor<B> {
    if stage == 0 {
        return spans;
    }
    let [count, span, k] = spans.shape().dims::<3>();
    let chunks = span / (b << stage);
    let spans = reshape::<B, 6>(spans, [count, chunks, outer, inner, b / 2, k]);
    let spans = B::float_swap_dims(spans, 2, 3);
    reshape::<B, 3>(spans, [count, span, k])
}

/// `G[L,L]` for every block of a stage.
///
/// Pairing both axes of `G` brings the entries that a block couples together into a `b×b` tile on the diagonal. The
/// tiles are then laid out one after another and those of the diagonal selected, by a handful of indices instead of
/// one for each entry.
///
/// # Shapes
///
/// - gram: `[d/s, s, s]`
/// - result: `[n, b, b]`
fn coupled_blocks<B: Backend>(gram: FloatTensor<B>, stage: usize, b: usize) -> FloatTensor<B> {
    let [count, span, _] = gram.shape().dims::<3>();
    let gram = B::float_swap_dims(pair::<B>(gram, stage, b), 1, 2);
    let gram = B::float_swap_dims(pair::<B>(gram, stage, b), 1, 2);
    let per_span = span / b;
    let tiles = reshape::<B, 5>(gram, [count, per_span, b, per_span, b]);
    let tiles = B::float_swap_dims(tiles, 2, 3);
    let tiles = reshape::<B, 3>(tiles, [count, per_span * per_span, b * b]);
    let diagonal = (0..per_span).map(|k| (k * (per_span + 1)) as i32).collect();
    let diagonal = cayley::index::<B>(diagonal, &tiles);
    reshape::<B, 3>(
        B::float_select(tiles, 1, diagonal),
        [count * per_span, b, b],
    )
}

/// The `[n, b, b]` blocks of one factor, of a `[m, n, b, b]` tensor.
fn factor<B: Backend>(blocks: &FloatTensor<B>, stage: usize) -> FloatTensor<B> {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let factor = match m {
        1 => blocks.clone(),
        _ => B::float_slice(blocks.clone(), &[(stage..stage + 1).into()]),
    };
    reshape::<B, 3>(factor, [n, b, b])
}

/// `op(C)` of a stack of matrices.
fn transposed<B: Backend>(matrices: FloatTensor<B>, direction: Direction) -> FloatTensor<B> {
    match direction {
        Direction::Forward => matrices,
        Direction::Back => B::float_swap_dims(matrices, 1, 2),
    }
}
