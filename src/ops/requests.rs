//! A batch whose requests use different adapters: the portable versions.
//!
//! The rows of a matrix belong to requests: the first `rows/requests` to the first request, and so on. The numbers that
//! the requests take are brought together, so that one batched product serves all of them.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;

use super::cayley;
use super::precision::{cast, reshape};

/// Tensors of a backend, and for each request the index of the one that it takes.
pub(super) type Taken<B> = (Vec<FloatTensor<B>>, Vec<Option<usize>>);

/// The portable version of [`rotate_requests`](super::rotate_requests): the rotations of all requests side by side, and
/// one batched product.
///
/// # Shapes
///
/// - input: `[rows, d]`; so is the result
/// - rotations: at least one, `[d/s, s, s]` each
pub(super) fn rotate<B: Backend>(
    input: FloatTensor<B>,
    rotations: Vec<FloatTensor<B>>,
    choices: Vec<Option<usize>>,
) -> FloatTensor<B> {
    let dtype = input.dtype();
    let [rows, d] = input.shape().dims::<2>();
    let [count, span, _] = rotations[0].shape().dims::<3>();
    let (requests, wide) = (choices.len(), rotations[0].dtype());
    let identity = cayley::identity::<B>(&rotations[0], span);
    let identity = B::float_expand(identity, Shape::from([count, span, span]));
    let rotations = taken::<B>(rotations, identity, &choices);
    let rotations = reshape::<B, 3>(rotations, [requests * count, span, span]);

    let input = cast::<B>(input, wide);
    let input = reshape::<B, 4>(input, [requests, rows / requests, count, span]);
    let input = B::float_swap_dims(input, 1, 2);
    let input = reshape::<B, 3>(input, [requests * count, rows / requests, span]);
    let rotated = B::float_matmul(input, rotations);
    let rotated = reshape::<B, 4>(rotated, [requests, count, rows / requests, span]);
    let rotated = B::float_swap_dims(rotated, 1, 2);
    cast::<B>(reshape::<B, 2>(rotated, [rows, d]), dtype)
}

/// `z ⊙ s + bias` with the scale and the bias that the request of each row takes: the portable version.
///
/// # Shapes
///
/// - output: `[rows, o]`; so is the result
/// - scales, biases: `[o]` each; either list may be empty
///
/// # Numerics
///
/// In the precision of the output, to which scales and biases are cast.
pub(super) fn scale<B: Backend>(
    output: FloatTensor<B>,
    (scales, scaled): Taken<B>,
    (biases, biased): Taken<B>,
) -> FloatTensor<B> {
    let [rows, columns] = output.shape().dims::<2>();
    let (requests, dtype) = (scaled.len(), output.dtype());
    let per_request = |vectors: Vec<FloatTensor<B>>, otherwise: f32, choices: &[Option<usize>]| {
        let neutral = cayley::constant::<B>(vec![otherwise; columns], [columns], &vectors[0]);
        let vectors = taken::<B>(vectors, neutral, choices);
        reshape::<B, 3>(cast::<B>(vectors, dtype), [requests, 1, columns])
    };
    let mut output = reshape::<B, 3>(output, [requests, rows / requests, columns]);
    if !scales.is_empty() {
        output = B::float_mul(output, per_request(scales, 1.0, &scaled));
    }
    if !biases.is_empty() {
        output = B::float_add(output, per_request(biases, 0.0, &biased));
    }
    reshape::<B, 2>(output, [rows, columns])
}

/// The numbers that each request takes, in rows; `otherwise` for a request that takes none.
///
/// # Shapes
///
/// - values, otherwise: of one shape with `k` numbers
/// - result: `[requests, k]`
fn taken<B: Backend>(
    values: Vec<FloatTensor<B>>,
    otherwise: FloatTensor<B>,
    choices: &[Option<usize>],
) -> FloatTensor<B> {
    let (none, numbers) = (values.len(), otherwise.shape().num_elements());
    let values = values.into_iter().chain([otherwise]);
    let rows = values.map(|value| reshape::<B, 2>(value, [1, numbers]));
    let stack = B::float_cat(rows.collect(), 0);
    let index = choices.iter().map(|choice| choice.unwrap_or(none) as i32);
    let index = cayley::index::<B>(index.collect(), &stack);
    B::float_select(stack, 0, index)
}
