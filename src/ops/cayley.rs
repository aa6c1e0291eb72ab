//! From packed skew-symmetric matrices to blocks, and back for gradients. The portable version.
//!
//! A skew-symmetric `Q` is stored as its strict upper triangle, row by row: `b(b−1)/2` numbers, `Q_ij` with `i < j`.
//! The lower triangle is their negative, the diagonal is zero. All blocks are worked on at once as a `[m·n, b, b]`
//! tensor, so that the number of tensor operations depends on `b` and not on the number of blocks.
//!
//! # References
//!
//! Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, section 3.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{Slice, TensorData};

use super::precision::{cast, reshape};

/// Panics unless the last axis holds the strict upper triangles of `block_size` square matrices.
pub(super) fn assert_packed(dims: [usize; 3], block_size: usize) {
    let packed = block_size * block_size.saturating_sub(1) / 2;
    assert!(
        block_size >= 2 && dims[0] > 0 && dims[2] == packed,
        "blocks of {block_size} have {packed} numbers, but the skew tensor is {dims:?}"
    );
}

/// `C = (I − Q)(I + Q)⁻¹ = 2(I + Q)⁻¹ − I`, by `b` sweeps over all blocks at once, made orthogonal to rounding.
///
/// A sweep on index `k` with pivot `p = A[k,k]` is the rank-one update `A ← A − (A[:,k] − e_k)·(A[k,:] + e_k)/p`;
/// sweeping every index inverts the matrix in place. The symmetric part of `I + Q` is `I`, so every pivot is at least
/// 1.
///
/// # Shapes
///
/// - skew: `[m, n, b(b−1)/2]`
/// - result: `[m, n, b, b]`
///
/// # Numerics
///
/// In the precision of the skew, f32 or f64. A skew of zeros gives exactly `I`.
pub(super) fn exact<B: Backend>(skew: FloatTensor<B>, block_size: usize) -> FloatTensor<B> {
    let b = block_size;
    let [m, n, _] = skew.shape().dims::<3>();
    let q = unpack::<B>(skew, b);
    let identity = identity::<B>(&q, b);
    let mut inverse = B::float_add(q, identity.clone());
    for k in 0..b {
        let line = Slice::from(k..k + 1);
        let all = Slice::full();
        let column = B::float_slice(inverse.clone(), &[all, all, line]);
        let row = B::float_slice(inverse.clone(), &[all, line, all]);
        let pivot = B::float_slice(row.clone(), &[all, all, line]);
        let column = B::float_sub(column, B::float_slice(identity.clone(), &[all, all, line]));
        let row = B::float_add(row, B::float_slice(identity.clone(), &[all, line, all]));
        let update = B::float_mul(column, B::float_div(row, pivot));
        inverse = B::float_sub(inverse, update);
    }
    let blocks = B::float_sub(B::float_mul_scalar(inverse, 2.into()), identity.clone());
    let blocks = orthogonalize::<B>(blocks, identity);
    reshape::<B, 4>(blocks, [m, n, b, b])
}

/// One Newton-Schulz step towards the nearest orthogonal matrices, `C + ½ C·(I − CᵀC)`.
///
/// Rounding in the sweeps leaves an orthogonality defect of about `ε·‖Q‖²`, which the step squares. It leaves an
/// identity exactly as it is. In f32 at `‖Q‖ = 10` it takes the defect from 2.6e-5 to 7.2e-7.
///
/// # Shapes
///
/// - blocks: `[m·n, b, b]`; so is the result
/// - identity: `[1, b, b]`
fn orthogonalize<B: Backend>(blocks: FloatTensor<B>, identity: FloatTensor<B>) -> FloatTensor<B> {
    let product = B::float_matmul(B::float_swap_dims(blocks.clone(), 1, 2), blocks.clone());
    let correction = B::float_matmul(blocks.clone(), B::float_sub(identity, product));
    B::float_add(blocks, B::float_mul_scalar(correction, 0.5.into()))
}

/// The gradient of [`exact`] with respect to the packed numbers, from its output alone:
/// `∂L/∂Q = −½ (I + C)ᵀ · ∂L/∂C · (I + C)ᵀ` and `∂v_ij = ∂Q_ij − ∂Q_ji`.
///
/// Since `I + C = 2(I + Q)⁻¹`, the differential needs no inverse:
///
/// ```text
/// dC = −2 (I + Q)⁻¹ · dQ · (I + Q)⁻¹ = −½ (I + C) · dQ · (I + C)
/// ```
///
/// A packed number stands in `Q` twice, with opposite signs, which gives the difference. The Newton-Schulz step is
/// not differentiated: it corrects rounding, and leaves orthogonal blocks as they are.
///
/// # Shapes
///
/// - blocks, grad: `[m, n, b, b]`
/// - result: `[m, n, b(b−1)/2]`
pub(super) fn backward<B: Backend>(blocks: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let [m, n, b, _] = blocks.shape().dims::<4>();
    let blocks = reshape::<B, 3>(blocks, [m * n, b, b]);
    let grad = reshape::<B, 3>(grad, [m * n, b, b]);
    let identity = identity::<B>(&blocks, b);
    let shifted = B::float_swap_dims(B::float_add(blocks, identity), 1, 2);
    let grad = B::float_matmul(B::float_matmul(shifted.clone(), grad), shifted);
    let packed = pack::<B>(B::float_mul_scalar(grad, (-0.5).into()), b);
    reshape::<B, 3>(packed, [m, n, b * (b - 1) / 2])
}

/// `Σ coefficients[k]·Q^k`.
///
/// One product for each power beyond the first, so `k` coefficients take `k − 2`. No pass of its own goes back: Burn
/// differentiates these operations.
///
/// # Shapes
///
/// - skew: `[m, n, b(b−1)/2]`
/// - result: `[m, n, b, b]`
///
/// # References
///
/// Qiu et al., *Orthogonal Finetuning Made Scalable*.
pub(super) fn polynomial<B: Backend>(
    skew: FloatTensor<B>,
    block_size: usize,
    coefficients: &[f64],
) -> FloatTensor<B> {
    let b = block_size;
    let [m, n, _] = skew.shape().dims::<3>();
    let q = unpack::<B>(skew, b);
    let identity = identity::<B>(&q, b);
    let (constant, linear, higher) = match coefficients {
        [constant, linear, higher @ ..] => (*constant, *linear, higher),
        [constant] => (*constant, 0.0, &[][..]),
        [] => (0.0, 0.0, &[][..]),
    };
    let times = |power: FloatTensor<B>, factor: f64| B::float_mul_scalar(power, factor.into());
    let mut sum = B::float_add(times(q.clone(), linear), times(identity, constant));
    let mut power = q.clone();
    for coefficient in higher {
        power = B::float_matmul(power, q.clone());
        sum = B::float_add(sum, times(power.clone(), *coefficient));
    }
    reshape::<B, 4>(sum, [m, n, b, b])
}

/// The coefficients of PEFT's polynomial: `1` for fewer than two terms, `1, 2` for two, else
/// `1, 2, …, 2, 1` of degree `max(terms − 1, 3)`.
pub(crate) fn neumann_coefficients(terms: usize) -> Vec<f64> {
    match terms {
        0 | 1 => vec![1.0],
        2 => vec![1.0, 2.0],
        _ => {
            let mut coefficients = neumann_016_coefficients(terms.max(4));
            coefficients[terms.max(4) - 1] = 1.0;
            coefficients
        }
    }
}

/// The coefficients of the polynomial of PEFT 0.16 and 0.17: `1, 2, …, 2`, as many as terms.
pub(crate) fn neumann_016_coefficients(terms: usize) -> Vec<f64> {
    let mut coefficients = vec![2.0; terms.max(1)];
    coefficients[0] = 1.0;
    coefficients
}

/// `[m, n, b(b−1)/2]` packed numbers as `[m·n, b, b]` skew-symmetric matrices.
///
/// Every entry selects a packed number and multiplies it by a sign: 1 above the diagonal, −1 below, and 0 on it,
/// where the number selected does not matter.
fn unpack<B: Backend>(skew: FloatTensor<B>, b: usize) -> FloatTensor<B> {
    let [m, n, packed] = skew.shape().dims::<3>();
    let (mut indices, mut signs) = (vec![0; b * b], vec![0.0; b * b]);
    for (index, (row, column)) in upper_triangle(b).enumerate() {
        indices[row * b + column] = index as i32;
        indices[column * b + row] = index as i32;
        signs[row * b + column] = 1.0;
        signs[column * b + row] = -1.0;
    }
    let skew = reshape::<B, 2>(skew, [m * n, packed]);
    let signs = constant::<B>(signs, [1, b * b], &skew);
    let indices = index::<B>(indices, &skew);
    reshape::<B, 3>(
        B::float_mul(B::float_select(skew, 1, indices), signs),
        [m * n, b, b],
    )
}

/// `Q_ij − Q_ji` of `[k, b, b]` matrices, packed: the adjoint of [`unpack`], a `[k, b(b−1)/2]` tensor.
fn pack<B: Backend>(matrices: FloatTensor<B>, b: usize) -> FloatTensor<B> {
    let count = matrices.shape().dims::<3>()[0];
    let flat = reshape::<B, 2>(matrices, [count, b * b]);
    let entries = |f: fn(usize, (usize, usize)) -> usize| {
        upper_triangle(b)
            .map(|entry| f(b, entry) as i32)
            .collect::<Vec<_>>()
    };
    let upper = index::<B>(entries(|b, (row, column)| row * b + column), &flat);
    let lower = index::<B>(entries(|b, (row, column)| column * b + row), &flat);
    let upper = B::float_select(flat.clone(), 1, upper);
    B::float_sub(upper, B::float_select(flat, 1, lower))
}

/// The strict upper triangle row by row, the order of the packed numbers.
pub(crate) fn upper_triangle(b: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..b).flat_map(move |row| (row + 1..b).map(move |column| (row, column)))
}

/// A `[1, b, b]` identity of the precision and on the device of `like`.
pub(super) fn identity<B: Backend>(like: &FloatTensor<B>, b: usize) -> FloatTensor<B> {
    let mut values = vec![0.0; b * b];
    (0..b).for_each(|i| values[i * (b + 1)] = 1.0);
    constant::<B>(values, [1, b, b], like)
}

/// A tensor of these values, in the precision and on the device of `like`. Zeros, ones and signs are exact in any.
pub(super) fn constant<B: Backend>(
    values: Vec<f32>,
    shape: impl Into<burn::tensor::Shape>,
    like: &FloatTensor<B>,
) -> FloatTensor<B> {
    let values = B::float_from_data(TensorData::new(values, shape.into()), &like.device());
    cast::<B>(values, like.dtype())
}

/// Indices on the device of `like`, in its integer type.
pub(super) fn index<B: Backend>(values: Vec<i32>, like: &FloatTensor<B>) -> IntTensor<B> {
    let count = values.len();
    B::int_from_data(TensorData::new(values, [count]), &like.device())
}
