//! Attention, head by head, without copying the tokens of a head together.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::elementwise::exp;
use super::matrix::{Matrix, MatrixMut};
use super::tensor;

/// The memory that a thread reuses from tile to tile.
#[derive(Default)]
pub(super) struct Scratch {
    weights: Vec<f32>,
    gradients: Vec<f32>,
}

/// Runs a pass for every head of `[batch, heads, tokens, head_size]` tensors of one shape.
///
/// A pass gets outputs that nobody has cleared, and writes every row of them before it adds to it.
///
/// The results lie token by token, as the layers around the heads read them.
pub(super) fn by_head<const I: usize, const O: usize>(
    inputs: [FlexTensor; I],
    pass: fn(&mut Scratch, [Matrix<'_>; I], [MatrixMut<'_>; O]),
) -> [FlexTensor; O] {
    let inputs = inputs.map(|input| match input.layout().has_positive_strides() {
        true => input,
        false => input.to_contiguous(),
    });
    let [batch, heads, tokens, head_size] = inputs[0].shape().dims::<4>();
    for input in &inputs {
        assert_eq!(
            input.shape(),
            inputs[0].shape(),
            "attention takes tensors of one shape"
        );
    }
    let shape = [batch, tokens, heads, head_size];
    let count = shape.iter().product();
    let mut outputs = [(); O].map(|()| Vec::with_capacity(count));
    let mut places = outputs.each_mut().map(|output| {
        let places = &mut output.spare_capacity_mut()[..count];
        MatrixMut::heads(places, shape).into_iter()
    });
    let tasks: Vec<_> = (0..batch * heads)
        .map(|_| {
            places
                .each_mut()
                .map(|places| places.next().expect("a place for every head"))
        })
        .collect();
    tasks.into_par_iter().enumerate().for_each_init(
        Scratch::default,
        |scratch, (index, outputs)| {
            let place = [index / heads, index % heads];
            pass(
                scratch,
                inputs.each_ref().map(|input| Matrix::head(input, place)),
                outputs,
            );
        },
    );
    outputs.map(|mut output| {
        // SAFETY: a pass writes all rows of its head, and the heads are the whole output.
        unsafe { output.set_len(count) };
        tensor(output, shape).transpose(1, 2)
    })
}

/// `softmax(Q·Kᵀ / √head_size)·V`.
pub(super) fn forward(
    scratch: &mut Scratch,
    [query, key, value]: [Matrix<'_>; 3],
    [mut output]: [MatrixMut<'_>; 1],
) {
    for rows in tiles(query.rows()) {
        let weights = attention_weights(query.slice(&rows), key, &mut scratch.weights);
        output.slice(&rows).assign(weights, value);
    }
}

/// The gradients of `Q`, `K` and `V`.
pub(super) fn backward(
    scratch: &mut Scratch,
    [query, key, value, gradient]: [Matrix<'_>; 4],
    [mut query_gradient, mut key_gradient, mut value_gradient]: [MatrixMut<'_>; 3],
) {
    for rows in tiles(query.rows()) {
        // The first tile finds outputs that nobody has written.
        let adds = rows.start > 0;
        let (query, gradient) = (query.slice(&rows), gradient.slice(&rows));
        let weights = attention_weights(query, key, &mut scratch.weights);
        value_gradient.product(weights.transposed(), gradient, adds);

        let scores = &mut scratch.gradients;
        scores.resize(query.rows() * key.rows(), 0.0);
        MatrixMut::new(scores, key.rows()).assign(gradient, value.transposed());
        Arch::new().dispatch(SoftmaxBackward {
            weights: &scratch.weights,
            gradients: scores,
            columns: key.rows(),
            scale: score_scale(query),
        });
        let scores = Matrix::new(scores, key.rows());
        query_gradient.slice(&rows).assign(scores, key);
        key_gradient.product(scores.transposed(), query, adds);
    }
}

/// How many queries are computed at a time, at most, so that their weights stay in a small cache.
const TILE: usize = 192;

/// Ranges of about as many rows each.
fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let tile = rows.div_ceil(rows.div_ceil(TILE).max(1)).max(1);
    (0..rows)
        .step_by(tile)
        .map(move |start| start..(start + tile).min(rows))
}

/// `softmax(Q·Kᵀ / √head_size)`.
fn attention_weights<'a>(
    query: Matrix<'_>,
    key: Matrix<'_>,
    scratch: &'a mut Vec<f32>,
) -> Matrix<'a> {
    scratch.resize(query.rows() * key.rows(), 0.0);
    MatrixMut::new(scratch, key.rows()).assign(query, key.transposed());
    Arch::new().dispatch(Softmax {
        scores: scratch,
        columns: key.rows(),
        scale: score_scale(query),
    });
    Matrix::new(scratch, key.rows())
}

fn score_scale(query: Matrix<'_>) -> f32 {
    (query.columns() as f32).sqrt().recip()
}

/// Turns every row of scores into weights.
struct Softmax<'a> {
    scores: &'a mut [f32],
    columns: usize,
    scale: f32,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for row in self.scores.chunks_exact_mut(self.columns) {
            let largest = fold(row, f32::NEG_INFINITY, |largest, score| {
                if score > largest { score } else { largest }
            });
            for score in &mut *row {
                *score = exp(self.scale * (*score - largest));
            }
            let total = fold(row, 0.0, |sum, weight| sum + weight).recip();
            for weight in row {
                *weight *= total;
            }
        }
    }
}

/// Turns the gradient of every row of weights into that of the scores.
struct SoftmaxBackward<'a> {
    weights: &'a [f32],
    gradients: &'a mut [f32],
    columns: usize,
    scale: f32,
}

impl WithSimd for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.weights.chunks_exact(self.columns);
        for (weights, gradients) in rows.zip(self.gradients.chunks_exact_mut(self.columns)) {
            for (gradient, weight) in gradients.iter_mut().zip(weights) {
                *gradient *= weight;
            }
            let total = fold(gradients, 0.0, |sum, gradient| sum + gradient);
            for (gradient, weight) in gradients.iter_mut().zip(weights) {
                *gradient = self.scale * (*gradient - weight * total);
            }
        }
    }
}

/// Folds a row in lanes of a fixed number, and then the lanes.
#[inline(always)]
fn fold(row: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, value);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(start, |folded, &value| f(folded, value))
}
