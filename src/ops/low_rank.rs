//! The nearest matrix of low rank: what a LoRA could make of a change.
//!
//! Burn's own decompositions do not serve: its QR forms a square matrix of the longer side, and its SVD panics where it does not
//! converge.

use burn::tensor::{DType, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

/// How many more directions are looked for than the rank asks for. They make the others exact sooner.
const EXTRA: usize = 16;
/// How often both sides are improved at most.
const ROUNDS: usize = 16;
/// Improving ends where one more round adds less than this part of what the factors hold, as a sum of squares.
const ENOUGH: f64 = 1e-4;
/// A vector of which less than this is left depends on those before it.
const DEPENDENT: f64 = 1e-10;
/// How often Jacobi's rotations go through all pairs at most. Six are usual.
const SWEEPS: usize = 30;
/// How many numbers are squared at a time.
const SQUARED: usize = 1 << 20;
/// How many sums are kept side by side, so that they do not wait for each other.
const LANES: usize = 8;

/// The largest rank of two factors that have no more numbers than this together, and at least 1.
///
/// # Shapes
///
/// - `shape`: the two axes of the product of the factors
pub fn largest_rank(numbers: usize, shape: [usize; 2]) -> usize {
    let [rows, columns] = shape;
    let rank = numbers / (rows + columns).max(1);
    rank.min(rows).min(columns).max(1)
}

/// The matrix of this rank that is nearest to another one, made as large as that one, as two factors.
///
/// This is the change of the LoRA that is compared with an adapter: it has the directions in which the adapter changes a
/// weight most, and the length of the adapter's change, `‖left·right‖ = ‖matrix‖`. Of zero it is zero.
///
/// # Shapes
///
/// - `matrix`: `[rows, columns]`
/// - output: `left`, `[rows, r]`, and `right`, `[r, columns]`, where `r` is the rank, but at most the smaller of the two axes
///
/// # Numerics
///
/// Products have the precision of the matrix; what makes both sides orthonormal is computed in f64. The directions are found
/// by 16 rounds of subspace iteration, with 16 directions more than the rank, from the same random numbers on every call.
/// Where hundreds of singular values lie close together, as in the change that a rotation makes of a wide layer, the factors
/// hold about 99.5 % of the largest possible sum of squares; where few do, all of it.
///
/// # References
///
/// Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011, algorithms 4.4 and 5.1.
pub fn low_rank(matrix: Tensor<2>, rank: usize) -> [Tensor<2>; 2] {
    let [rows, columns] = matrix.dims();
    let (rank, width) = (rank, rank + EXTRA);
    let [rank, width] = [rank, width].map(|size| size.min(rows).min(columns));
    let (device, dtype) = (matrix.device(), matrix.dtype());
    let tensor = |vectors: &[Vec<f64>]| {
        let shape = [vectors.len(), vectors.first().map_or(0, Vec::len)];
        let data = TensorData::new(vectors.concat(), shape).convert_dtype(dtype);
        Tensor::<2>::from_data(data, (&device, dtype)).transpose()
    };
    let along = |right: &[Vec<f64>]| vectors(matrix.clone().matmul(tensor(right)));
    let mut random = StdRng::seed_from_u64(0);
    let mut vector = |length: usize| -> Vec<f64> {
        let numbers = (0..length).map(|_| StandardNormal.sample(&mut random));
        numbers.collect()
    };
    let mut right = orthonormal((0..width).map(|_| vector(columns)).collect());
    let mut left = along(&right);
    let mut held = 0.0;
    for _ in 0..ROUNDS {
        let now = left.iter().map(|vector| dot(vector, vector)).sum();
        if now <= held * (1.0 + ENOUGH) {
            break;
        }
        held = now;
        let left_sides = tensor(&orthonormal(left));
        right = orthonormal(vectors(matrix.clone().transpose().matmul(left_sides)));
        left = along(&right);
    }
    let longest = eigenvectors(products(&left)).into_iter().take(rank);
    let longest: Vec<_> = longest.map(|shares| combined(&right, &shares)).collect();
    let right = tensor(&longest);
    let left = matrix.clone().matmul(right.clone());
    // The rows of the right side are orthonormal, so that the left side is as long as the product.
    let (whole, held) = (norm(matrix), norm(left.clone()));
    let left = match held > 0.0 {
        true => left * (whole / held),
        false => left,
    };
    [left, right.transpose()]
}

/// The columns of a matrix, on the host.
fn vectors(matrix: Tensor<2>) -> Vec<Vec<f64>> {
    let [length, _] = matrix.dims();
    let data = matrix.transpose().into_data().convert_dtype(DType::F64);
    let numbers: Vec<f64> = data.iter().collect();
    numbers.chunks(length).map(<[f64]>::to_vec).collect()
}

/// These vectors made orthonormal one after the other. Those that depend on others become zero.
fn orthonormal(mut vectors: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    for index in 0..vectors.len() {
        let (before, rest) = vectors.split_at_mut(index);
        let vector = &mut rest[0];
        let whole = dot(vector, vector).sqrt();
        let mut length = whole;
        loop {
            for other in before.iter() {
                let along = dot(vector, other);
                let pairs = vector.iter_mut().zip(other);
                pairs.for_each(|(x, y)| *x -= along * y);
            }
            let left = dot(vector, vector).sqrt();
            // Where much was taken away, rounding has left something of the others. NaN ends this too.
            let goes_on = left <= 0.5 * length && left > DEPENDENT * whole;
            length = left;
            if !goes_on {
                break;
            }
        }
        let factor = match length > DEPENDENT * whole {
            true => 1.0 / length,
            false => 0.0,
        };
        vector.iter_mut().for_each(|x| *x *= factor);
    }
    vectors
}

/// The products of every pair of vectors.
fn products(vectors: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let row = |a: &Vec<f64>| vectors.iter().map(|b| dot(a, b)).collect();
    vectors.iter().map(row).collect()
}

/// The eigenvectors of a symmetric matrix, those of the largest eigenvalues first, by Jacobi's rotations.
fn eigenvectors(mut matrix: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let size = matrix.len();
    let unit = |at: usize| (0..size).map(|k| f64::from(u8::from(k == at))).collect();
    let mut vectors: Vec<Vec<f64>> = (0..size).map(unit).collect();
    for _ in 0..SWEEPS {
        let mut is_diagonal = true;
        for (p, q) in (0..size).flat_map(|p| (p + 1..size).map(move |q| (p, q))) {
            let (a, b, c) = (matrix[p][p], matrix[q][q], matrix[p][q]);
            if c * c <= f64::EPSILON.powi(2) * (a * b).abs() {
                continue;
            }
            is_diagonal = false;
            let (sin, cos) = (0.5 * f64::atan2(2.0 * c, b - a)).sin_cos();
            let turn =
                |x: &mut f64, y: &mut f64| (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
            for row in &mut matrix {
                let (before, rest) = row.split_at_mut(q);
                turn(&mut before[p], &mut rest[0]);
            }
            for rows in [&mut matrix, &mut vectors] {
                let (before, rest) = rows.split_at_mut(q);
                let pairs = before[p].iter_mut().zip(&mut rest[0]);
                pairs.for_each(|(x, y)| turn(x, y));
            }
        }
        if is_diagonal {
            break;
        }
    }
    let mut order: Vec<_> = (0..size).collect();
    order.sort_by(|a, b| matrix[*b][*b].total_cmp(&matrix[*a][*a]));
    order.into_iter().map(|at| vectors[at].clone()).collect()
}

/// The sum of vectors, each with its share.
fn combined(vectors: &[Vec<f64>], shares: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; vectors.first().map_or(0, Vec::len)];
    for (vector, share) in vectors.iter().zip(shares) {
        let pairs = sum.iter_mut().zip(vector);
        pairs.for_each(|(sum, x)| *sum += share * x);
    }
    sum
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        (0..LANES).for_each(|lane| lanes[lane] += a[lane] * b[lane]);
    }
    let rest = a_rest.iter().zip(b_rest).map(|(x, y)| x * y);
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}

/// The Frobenius norm, computed from some rows at a time, so that no second matrix is in memory.
fn norm(matrix: Tensor<2>) -> f64 {
    let [rows, columns] = matrix.dims();
    let at_once = (SQUARED / columns.max(1)).max(1);
    let parts = (0..rows).step_by(at_once).map(|start| {
        let part = matrix.clone().narrow(0, start, at_once.min(rows - start));
        let sum: f64 = (part.clone() * part).sum().into_scalar();
        sum
    });
    parts.sum::<f64>().sqrt()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// The `k`-th vector of the cosine basis, which is orthonormal.
    fn cosine(length: usize, k: usize) -> Vec<f64> {
        let scale = if k == 0 { 1.0 } else { 2.0 } / length as f64;
        let angle = |i: usize| std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / length as f64;
        (0..length).map(|i| scale.sqrt() * angle(i).cos()).collect()
    }

    /// The matrix of these singular values, with the `k`-th cosine of each length as its `k`-th singular vectors.
    fn matrix([rows, columns]: [usize; 2], values: &[f64]) -> Vec<f64> {
        let mut sum = vec![0.0; rows * columns];
        for (k, value) in values.iter().enumerate() {
            let (left, right) = (cosine(rows, k), cosine(columns, k));
            for (at, number) in sum.iter_mut().enumerate() {
                *number += value * left[at / columns] * right[at % columns];
            }
        }
        sum
    }

    fn product(matrix: &[f64], shape: [usize; 2], rank: usize, dtype: DType) -> Vec<f64> {
        let device = Device::flex();
        let data = TensorData::new(matrix.to_vec(), shape).convert_dtype(dtype);
        let [left, right] = low_rank(Tensor::from_data(data, (&device, dtype)), rank);
        let inner = rank.min(shape[0]).min(shape[1]);
        assert_eq!(
            (left.dims(), right.dims()),
            ([shape[0], inner], [inner, shape[1]])
        );
        left.matmul(right)
            .into_data()
            .convert_dtype(DType::F64)
            .iter()
            .collect()
    }

    #[test]
    fn the_factors_have_the_largest_singular_values_and_the_length_of_the_matrix() {
        let shape = [57, 48];
        let values: Vec<_> = (0..40).map(|k| 0.9f64.powi(k)).collect();
        let whole = matrix(shape, &values);
        for (rank, dtype, tolerance) in [
            (1, DType::F32, 1e-3),
            (2, DType::F64, 1e-3),
            (12, DType::F64, 1e-3),
            (24, DType::F64, 1e-12),
            (48, DType::F32, 1e-6),
            (60, DType::F32, 1e-6),
        ] {
            let kept = &values[..values.len().min(rank)];
            let length = |values: &[f64]| dot(values, values).sqrt();
            let expected = matrix(shape, kept);
            let factor = length(&values) / length(kept);
            let found = product(&whole, shape, rank, dtype);
            let pairs = found.iter().zip(&expected);
            let apart: Vec<_> = pairs.map(|(x, y)| x - factor * y).collect();
            let apart = length(&apart) / length(&values);
            println!("rank {rank}: {apart:.1e}");
            assert!(apart < tolerance, "rank {rank}: {apart:e}");
            assert!((length(&found) / length(&values) - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn a_matrix_with_nan_has_factors_with_nan() {
        let mut whole = matrix([5, 7], &[2.0, 1.0]);
        whole[9] = f64::NAN;
        let found = product(&whole, [5, 7], 2, DType::F32);
        assert!(found.iter().any(|x| x.is_nan()));
    }

    #[test]
    fn zero_has_factors_of_zero() {
        assert!(
            product(&[0.0; 15], [3, 5], 2, DType::F32)
                .iter()
                .all(|x| *x == 0.0)
        );
    }

    #[test]
    fn a_lora_has_no_more_numbers_than_the_adapter_and_at_least_one_rank() {
        for (numbers, shape, rank) in [
            (5120, [2048, 2048], 1),
            (16384, [2048, 2048], 4),
            (16383, [2048, 2048], 3),
            (100, [2048, 2048], 1),
            (1000, [6, 8], 6),
            (0, [6, 8], 1),
        ] {
            assert_eq!(largest_rank(numbers, shape), rank);
        }
    }
}
