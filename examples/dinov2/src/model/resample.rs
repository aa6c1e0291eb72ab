//! Bicubic resampling of a grid, as `torch.nn.functional.interpolate(…, align_corners=False)` does
//! it.
//!
//! Resampling is linear and separable, so it is two products with small constant matrices. They
//! differentiate on every backend; Burn's own bicubic `interpolate` neither antialiases nor has a
//! backward pass on the GPU backends.

use burn::tensor::{Device, Tensor, TensorData};

/// How the cubic kernel is laid over the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cubic {
    /// PyTorch's `antialias=False`: `a = −0.75`, four taps, edges repeated.
    Interpolating,
    /// PyTorch's `antialias=True`: `a = −0.5`, a kernel as wide as the shrinking asks, cut at the
    /// edges.
    Antialiased,
}

impl Cubic {
    /// Resamples a `[height, width, channels]` grid to `size`.
    ///
    /// # Shapes
    ///
    /// - `grid`: `[height, width, channels]`
    /// - output: `[size[0], size[1], channels]`
    pub(super) fn resample(self, grid: Tensor<3>, size: [usize; 2]) -> Tensor<3> {
        let [height, width, channels] = grid.dims();
        let device = grid.device();
        let rows = self.matrix(height, size[0], &device);
        let columns = self.matrix(width, size[1], &device);

        let grid = rows.matmul(grid.reshape([height, width * channels]));
        columns
            .unsqueeze::<3>()
            .matmul(grid.reshape([size[0], width, channels]))
    }

    /// The `[output, input]` matrix that resamples one axis.
    fn matrix(self, input: usize, output: usize, device: &Device) -> Tensor<2> {
        let weights = self.weights(input, output);
        Tensor::from_data(TensorData::new(weights, [output, input]), device)
    }

    /// The rows of [`matrix`](Self::matrix), one after the other.
    fn weights(self, input: usize, output: usize) -> Vec<f32> {
        let step = input as f64 / output as f64;
        (0..output)
            .flat_map(|i| {
                let center = step * (i as f64 + 0.5);
                match self {
                    Self::Interpolating => interpolating_row(center, input),
                    Self::Antialiased => antialiased_row(center, step.max(1.0), input),
                }
            })
            .map(|weight| weight as f32)
            .collect()
    }
}

/// Four taps around `center`; taps beyond the edge fall on the edge.
fn interpolating_row(center: f64, input: usize) -> Vec<f64> {
    let mut row = vec![0.0; input];
    let position = center - 0.5;
    let first = position.floor() as isize - 1;
    for tap in first..first + 4 {
        let index = tap.clamp(0, input as isize - 1) as usize;
        row[index] += kernel(position - tap as f64, -0.75);
    }
    row
}

/// All taps within `2 · width` of `center`, scaled to sum to one.
fn antialiased_row(center: f64, width: f64, input: usize) -> Vec<f64> {
    let start = (center - 2.0 * width + 0.5).max(0.0) as usize;
    let end = ((center + 2.0 * width + 0.5) as usize).min(input);
    let mut row = vec![0.0; input];
    for (index, weight) in row.iter_mut().enumerate().take(end).skip(start) {
        *weight = kernel((index as f64 + 0.5 - center) / width, -0.5);
    }
    let sum: f64 = row.iter().sum();
    row.iter().map(|weight| weight / sum).collect()
}

/// Keys' cubic convolution kernel.
fn kernel(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resampling_to_the_same_size_changes_nothing() {
        for cubic in [Cubic::Interpolating, Cubic::Antialiased] {
            for (i, weight) in cubic.weights(5, 5).into_iter().enumerate() {
                let expected = if i % 6 == 0 { 1.0 } else { 0.0 };
                assert!((weight - expected).abs() < 1e-7, "{cubic:?} {i} {weight}");
            }
        }
    }

    #[test]
    fn a_constant_stays_constant() {
        for cubic in [Cubic::Interpolating, Cubic::Antialiased] {
            for (input, output) in [(4, 7), (7, 4), (37, 16), (1, 3)] {
                for row in cubic.weights(input, output).chunks(input) {
                    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
                }
            }
        }
    }
}
