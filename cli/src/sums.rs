//! Sums over the numbers of tensors, at the speed of memory.
//!
//! Numbers of half precision are summed in f32, a few at a time, and the sums of these in f64. Where f32 does not hold the sums, they
//! are taken in f64, and those of wider numbers always are.

use std::ops::{AddAssign, Mul, Range, Sub};

use burn::tensor::{DType, Element, TensorData, bf16, f16};
use burn_boft::tensors::values;
use multiversion::multiversion;

/// How many numbers are summed in one precision.
const CHUNK: usize = 2048;
/// How many sums of differences are kept side by side, which do not wait for each other.
const LANES: usize = 16;
/// How many sums of a dot product are kept side by side: four registers of AVX-512, since each waits for the addition before.
const DOT_LANES: usize = 64;
/// Squares that f32 holds, with room for the parts that they are sums of.
const KEPT: Range<f64> = 1e-30..1e30;

/// How far some numbers are from those that are expected.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sums {
    /// The largest difference between two of them, NaN left out.
    pub largest: f64,
    /// The squared norms of the difference and of what is expected.
    pub squares: [f64; 2],
}

/// A vector that matrices of every precision are multiplied by.
pub struct Vector {
    single: Vec<f32>,
    double: Vec<f64>,
}

/// What sums are taken in: f32 or f64.
trait Sum: Copy + Default + Into<f64> + Sub<Output = Self> + Mul<Output = Self> + AddAssign {
    /// The larger of this number and the size of another.
    fn or_size(self, number: Self) -> Self;
}

impl Sum for f32 {
    fn or_size(self, number: Self) -> Self {
        self.max(number.abs())
    }
}

impl Sum for f64 {
    fn or_size(self, number: Self) -> Self {
        self.max(number.abs())
    }
}

/// `bf16::to_f32` does the same, and looks at every number whether it is NaN.
fn widened(number: bf16) -> f32 {
    f32::from_bits(u32::from(number.to_bits()) << 16)
}

/// Compares numbers with as many others, and adds up by `add` what parts of them show.
pub fn compare(found: &TensorData, expected: &TensorData, add: impl FnMut(Sums)) {
    match (found.dtype(), expected.dtype()) {
        (DType::F32, DType::F32) => {
            compare_slices(found, expected, <f64 as From<f32>>::from, add);
        }
        (DType::F16, DType::F16) => compare_slices(found, expected, f16::to_f32, add),
        (DType::BF16, DType::BF16) => compare_slices(found, expected, widened, add),
        _ => compare_values(found, expected, add),
    }
}

fn compare_values(found: &TensorData, expected: &TensorData, mut add: impl FnMut(Sums)) {
    add(Sums::of(&values(found), &values(expected)));
}

/// Compares numbers in `A`, where its sums are neither too large nor too small, and in f64 elsewhere.
fn compare_slices<T: Element, A: Sum>(
    found: &TensorData,
    expected: &TensorData,
    widened: impl Fn(T) -> A + Copy,
    mut add: impl FnMut(Sums),
) {
    let (Ok(from), Ok(to)) = (found.as_slice::<T>(), expected.as_slice::<T>()) else {
        return compare_values(found, expected, add);
    };
    for (found, expected) in from.chunks(CHUNK).zip(to.chunks(CHUNK)) {
        let apart = compare_chunk(found, expected, widened);
        let [difference, norm] = apart.squares;
        let is_same = apart.largest == 0.0 && difference == 0.0;
        add(
            match KEPT.contains(&norm) && (is_same || KEPT.contains(&difference)) {
                true => apart,
                false => compare_chunk(found, expected, |number| -> f64 { widened(number).into() }),
            },
        );
    }
}

/// Compares as many numbers as a chunk has at most, with the instructions that this processor has.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn compare_chunk<T: Element, A: Sum>(
    found: &[T],
    expected: &[T],
    widened: impl Fn(T) -> A,
) -> Sums {
    let mut wide = [[A::default(); CHUNK]; 2];
    for (wide, numbers) in wide.iter_mut().zip([found, expected]) {
        widen(numbers, wide, &widened);
    }
    Sums::of(&wide[0][..found.len()], &wide[1][..expected.len()])
}

#[inline(always)]
fn widen<T: Element, A: Sum>(numbers: &[T], wide: &mut [A], widened: impl Fn(T) -> A) {
    for (wide, &number) in wide.iter_mut().zip(numbers) {
        *wide = widened(number);
    }
}

impl Sums {
    /// Compares numbers, a few of them at a time.
    #[inline(always)]
    fn of<A: Sum>(found: &[A], expected: &[A]) -> Self {
        let zero = A::default();
        let (mut largest, mut squares) = ([zero; LANES], [[zero; LANES]; 2]);
        let mut add = |lane: usize, found: A, expected: A| {
            let difference = found - expected;
            largest[lane] = largest[lane].or_size(difference);
            squares[0][lane] += difference * difference;
            squares[1][lane] += expected * expected;
        };
        let ((found, found_rest), (expected, expected_rest)) =
            (found.as_chunks::<LANES>(), expected.as_chunks::<LANES>());
        for (found, expected) in found.iter().zip(expected) {
            (0..LANES).for_each(|lane| add(lane, found[lane], expected[lane]));
        }
        for (lane, (found, expected)) in found_rest.iter().zip(expected_rest).enumerate() {
            add(lane, *found, *expected);
        }
        Self {
            largest: largest.into_iter().map(Into::into).fold(0.0, f64::max),
            squares: squares.map(|lanes| lanes.into_iter().map(Into::into).sum()),
        }
    }
}

impl Vector {
    pub fn new(double: Vec<f64>) -> Self {
        Self {
            single: double.iter().map(|&number| number as f32).collect(),
            double,
        }
    }

    /// The products of a matrix's rows, as long as the vector, with the vector, and the square of the matrix's norm.
    pub fn products(&self, matrix: &TensorData) -> (Vec<f64>, f64) {
        let (single, double) = (&self.single, &self.double);
        let products = match matrix.dtype() {
            DType::F32 => self.rows(matrix, double, <f64 as From<f32>>::from),
            DType::F16 => self.rows(matrix, single, f16::to_f32),
            DType::BF16 => self.rows(matrix, single, widened),
            _ => None,
        };
        products.unwrap_or_else(|| self.rows_of(&values(matrix), double, |number| number))
    }

    fn rows<T: Element, A: Sum>(
        &self,
        matrix: &TensorData,
        vector: &[A],
        widened: impl Fn(T) -> A + Copy,
    ) -> Option<(Vec<f64>, f64)> {
        let numbers = matrix.as_slice::<T>().ok()?;
        Some(self.rows_of(numbers, vector, widened))
    }

    /// The products in `A`, where the square of the numbers is neither too large nor too small for it, and in f64 elsewhere.
    fn rows_of<T: Element, A: Sum>(
        &self,
        matrix: &[T],
        vector: &[A],
        widened: impl Fn(T) -> A + Copy,
    ) -> (Vec<f64>, f64) {
        let mut norm = 0.0;
        let mut product = |row: &[T]| {
            let mut sum = 0.0;
            let vectors = vector.chunks(CHUNK).zip(self.double.chunks(CHUNK));
            for (row, (vector, double)) in row.chunks(CHUNK).zip(vectors) {
                let [mut dot, mut square] = multiply_chunk(row, vector, widened);
                if !KEPT.contains(&square) {
                    let widened = |number| -> f64 { widened(number).into() };
                    [dot, square] = multiply_chunk(row, double, widened);
                }
                sum += dot;
                norm += square;
            }
            sum
        };
        let rows = matrix.chunks_exact(vector.len());
        let products = rows.map(&mut product).collect();
        (products, norm)
    }
}

/// The dot products of as many numbers as a chunk has at most, with a vector and with themselves.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn multiply_chunk<T: Element, A: Sum>(
    numbers: &[T],
    vector: &[A],
    widened: impl Fn(T) -> A,
) -> [f64; 2] {
    let mut wide = [A::default(); CHUNK];
    widen(numbers, &mut wide, widened);
    let wide = &wide[..numbers.len()];
    [dot(wide, vector), dot(wide, wide)]
}

#[inline(always)]
fn dot<A: Sum>(a: &[A], b: &[A]) -> f64 {
    let mut sums = [A::default(); DOT_LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<DOT_LANES>(), b.as_chunks::<DOT_LANES>());
    let mut add = |a: &[A], b: &[A]| {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    };
    a.iter().zip(b).for_each(|(a, b)| add(a, b));
    add(a_rest, b_rest);
    sums.into_iter().map(Into::into).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_f64_in_every_precision_and_size() {
        let width = CHUNK + 37;
        let vector: Vec<_> = (0..width).map(|i| (i as f64 * 0.37).cos()).collect();
        // In f32, the squares of numbers of the third and fourth scale would be zero and infinite.
        for (dtype, scales) in [
            (DType::BF16, [1.0, 3e-3, 2e-25, 4e22]),
            (DType::F16, [1.0, 3e-3, 2e-4, 4e3]),
            (DType::F32, [1.0, 3e-3, 2e-25, 4e22]),
            (DType::F64, [1.0, 3e-3, 2e-150, 4e120]),
        ] {
            for scale in scales {
                let numbers: Vec<_> = (0..2 * width)
                    .map(|i| scale * (i as f64 * 0.11).sin())
                    .collect();
                let matrix = TensorData::new(numbers, [2, width]).convert_dtype(dtype);
                let (products, square) = Vector::new(vector.clone()).products(&matrix);
                let numbers = values(&matrix);
                let norm: f64 = numbers.iter().map(|number| number * number).sum();
                assert!((square / norm - 1.0).abs() < 1e-5, "{dtype:?} {scale}");
                assert_eq!(products.len(), 2);
                for (product, row) in products.iter().zip(numbers.chunks_exact(width)) {
                    let expected: f64 = row.iter().zip(&vector).map(|(a, b)| a * b).sum();
                    let error = (product - expected).abs() / norm.sqrt();
                    assert!(error < 1e-6, "{dtype:?} {scale}: {error}");
                }
            }
        }
    }
}
