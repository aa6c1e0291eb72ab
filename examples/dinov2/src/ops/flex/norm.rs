//! Layer normalization, row by row.

use super::elementwise::{map_rows, sum};

/// `(x − mean) / √(variance + ε) ⊙ γ + β` of every row.
pub(super) fn forward(input: &[f32], columns: [&[f32]; 2], epsilon: f32) -> Vec<f32> {
    let width = columns[0].len();
    map_rows(
        [input],
        columns,
        width,
        |[row], _| Moments::of(row, epsilon),
        |moments, [x], [gamma, beta]| moments.normalized(x) * gamma + beta,
    )
}

/// The gradient of the input, from the rows of the input and of the gradient.
///
/// With `n` a normalized row and `g` its gradient, `dy ⊙ γ`, it is `(g − mean(g) − n ⊙ mean(g ⊙ n)) / √(variance + ε)`.
pub(super) fn backward(rows: [&[f32]; 2], gamma: &[f32], epsilon: f32) -> Vec<f32> {
    map_rows(
        rows,
        [gamma],
        gamma.len(),
        |[input, gradient], [gamma]| {
            let moments = Moments::of(input, epsilon);
            let count = input.len() as f32;
            let mean = sum([gradient, gamma], |[gradient, gamma]| gradient * gamma) / count;
            let along = sum([input, gradient, gamma], |[x, gradient, gamma]| {
                moments.normalized(x) * (gradient * gamma)
            });
            (moments, mean, along / count)
        },
        |(moments, mean, along), [x, gradient], [gamma]| {
            (gradient * gamma - mean - moments.normalized(x) * along) * moments.inverse_deviation
        },
    )
}

/// What normalizes a row.
struct Moments {
    mean: f32,
    /// `1 / √(variance + ε)`.
    inverse_deviation: f32,
}

impl Moments {
    #[inline(always)]
    fn of(row: &[f32], epsilon: f32) -> Self {
        let count = row.len() as f32;
        let mean = sum([row], |[x]| x) / count;
        let variance = sum([row], |[x]| (x - mean) * (x - mean)) / count;
        Self {
            mean,
            inverse_deviation: (variance + epsilon).sqrt().recip(),
        }
    }

    #[inline(always)]
    fn normalized(&self, x: f32) -> f32 {
        (x - self.mean) * self.inverse_deviation
    }
}
