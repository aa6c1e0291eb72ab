//! Rotations as dense matrices in f64, computed from the formulas, and not with the library.

use crate::files::Tensor;

/// A square matrix or a weight, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    numbers: Vec<f64>,
}

impl Matrix {
    pub fn from_fn(rows: usize, columns: usize, of: impl Fn(usize, usize) -> f64) -> Self {
        let places = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
        Self {
            rows,
            columns,
            numbers: places.map(|(i, j)| of(i, j)).collect(),
        }
    }

    pub fn identity(size: usize) -> Self {
        Self::from_fn(size, size, |i, j| f64::from(u8::from(i == j)))
    }

    /// A weight of a file, of which every axis but the first is one.
    pub fn of(tensor: &Tensor) -> Self {
        let rows = tensor.shape[0];
        let columns = tensor.numbers.len() / rows;
        Self::from_fn(rows, columns, |i, j| tensor.numbers[i * columns + j])
    }

    /// As a tensor of a file.
    pub fn tensor(&self) -> Tensor {
        Tensor::new(&[self.rows, self.columns], self.numbers.clone())
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.numbers[row * self.columns + column]
    }

    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows);
        Self::from_fn(self.rows, other.columns, |i, j| {
            (0..self.columns)
                .map(|k| self.at(i, k) * other.at(k, j))
                .sum()
        })
    }

    pub fn transposed(&self) -> Self {
        Self::from_fn(self.columns, self.rows, |i, j| self.at(j, i))
    }

    pub fn plus(&self, factor: f64, other: &Self) -> Self {
        Self::from_fn(self.rows, self.columns, |i, j| {
            self.at(i, j) + factor * other.at(i, j)
        })
    }

    pub fn scaled(&self, factor: f64) -> Self {
        Self::from_fn(self.rows, self.columns, |i, j| factor * self.at(i, j))
    }

    /// `diag(scale)·self`.
    pub fn with_rows_scaled(&self, scale: &[f64]) -> Self {
        assert_eq!(self.rows, scale.len());
        Self::from_fn(self.rows, self.columns, |i, j| scale[i] * self.at(i, j))
    }

    /// By elimination with pivots.
    pub fn inverse(&self) -> Self {
        let n = self.rows;
        let mut left = self.clone();
        let mut right = Self::identity(n);
        for column in 0..n {
            let pivot = (column..n)
                .max_by(|a, b| {
                    left.at(*a, column)
                        .abs()
                        .total_cmp(&left.at(*b, column).abs())
                })
                .unwrap();
            for matrix in [&mut left, &mut right] {
                (0..n).for_each(|j| matrix.numbers.swap(pivot * n + j, column * n + j));
            }
            let divisor = left.at(column, column);
            for matrix in [&mut left, &mut right] {
                (0..n).for_each(|j| matrix.numbers[column * n + j] /= divisor);
            }
            for row in (0..n).filter(|row| *row != column) {
                let factor = left.at(row, column);
                for matrix in [&mut left, &mut right] {
                    for j in 0..n {
                        let above = matrix.at(column, j);
                        matrix.numbers[row * n + j] -= factor * above;
                    }
                }
            }
        }
        right
    }

    /// `(I − Q)(I + Q)⁻¹`.
    pub fn cayley(&self) -> Self {
        let identity = Self::identity(self.rows);
        identity
            .plus(-1.0, self)
            .times(&identity.plus(1.0, self).inverse())
    }

    /// `I + 2Q + 2Q² + 2Q³ + Q⁴`, PEFT's polynomial of five terms.
    pub fn neumann(&self) -> Self {
        let mut sum = Self::identity(self.rows);
        let mut power = Self::identity(self.rows);
        for coefficient in [2.0, 2.0, 2.0, 1.0] {
            power = power.times(self);
            sum = sum.plus(coefficient, &power);
        }
        sum
    }

    pub fn norm(&self) -> f64 {
        self.numbers.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    /// The angles of a rotation from the eigenvalues of its symmetric part, which are their cosines.
    pub fn angles(&self) -> Vec<f64> {
        let symmetric = self.plus(1.0, &self.transposed()).scaled(0.5);
        let (values, _) = symmetric.eigen();
        values.iter().map(|x| x.clamp(-1.0, 1.0).acos()).collect()
    }

    /// The nearest matrix of this rank, from the eigenvectors of `self·selfᵀ`.
    pub fn of_rank(&self, rank: usize) -> Self {
        let (values, vectors) = self.times(&self.transposed()).eigen();
        let mut order: Vec<_> = (0..self.rows).collect();
        order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
        let left = Self::from_fn(self.rows, rank, |i, k| vectors.at(i, order[k]));
        left.times(&left.transposed().times(self))
    }

    /// The eigenvalues of a symmetric matrix, and its eigenvectors as columns, by Jacobi's rotations.
    fn eigen(&self) -> (Vec<f64>, Self) {
        let n = self.rows;
        let (mut s, mut vectors) = (self.clone(), Self::identity(n));
        for _ in 0..60 {
            for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
                if s.at(p, q).abs() < 1e-300 {
                    continue;
                }
                let angle = 0.5 * f64::atan2(2.0 * s.at(p, q), s.at(q, q) - s.at(p, p));
                let (sin, cos) = angle.sin_cos();
                let turn = Self::from_fn(n, n, |i, j| match (i, j) {
                    (i, j) if (i, j) == (p, p) || (i, j) == (q, q) => cos,
                    (i, j) if (i, j) == (p, q) => sin,
                    (i, j) if (i, j) == (q, p) => -sin,
                    (i, j) => f64::from(u8::from(i == j)),
                });
                s = turn.transposed().times(&s).times(&turn);
                vectors = vectors.times(&turn);
            }
        }
        ((0..n).map(|i| s.at(i, i)).collect(), vectors)
    }
}

/// `Q` of every block of PEFT's BOFT, `½(A − Aᵀ)` of `[m, n, b, b]` squares, by factor.
pub fn skews(squares: &Tensor) -> Vec<Vec<Matrix>> {
    let [m, n, b, _] = squares.shape[..] else {
        panic!("{:?}", squares.shape)
    };
    let block = |factor: usize, block: usize| {
        let start = (factor * n + block) * b * b;
        let a = Matrix::from_fn(b, b, |i, j| squares.numbers[start + i * b + j]);
        a.plus(-1.0, &a.transposed()).scaled(0.5)
    };
    (0..m)
        .map(|factor| (0..n).map(|k| block(factor, k)).collect())
        .collect()
}

/// `Q` of every block of OFT's strict upper triangles, `[n, b(b−1)/2]`.
pub fn packed_skews(packed: &Tensor, b: usize) -> Vec<Matrix> {
    let each = b * (b - 1) / 2;
    let block = |numbers: &[f64]| {
        let at = |i: usize, j: usize| numbers[i * b - i * (i + 1) / 2 + j - i - 1];
        Matrix::from_fn(b, b, |i, j| match i.cmp(&j) {
            std::cmp::Ordering::Less => at(i, j),
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => -at(j, i),
        })
    };
    packed.numbers.chunks(each).map(block).collect()
}

/// The factor `F_index` of these blocks: block `c·2^i + j` couples the halves `j` and `j + 2^i` of the `c`-th group.
pub fn factor(index: usize, blocks: &[Matrix]) -> Matrix {
    let b = blocks[0].rows;
    let (distance, half) = (1 << index, b / 2);
    let place = |k: usize, at: usize| match index {
        0 => k * b + at,
        _ => {
            let (group, j) = (k / distance, k % distance);
            let side = if at < half { j } else { j + distance };
            group * b * distance + side * half + at % half
        }
    };
    let mut dense = Matrix::identity(b * blocks.len());
    let d = dense.rows;
    for (k, block) in blocks.iter().enumerate() {
        for (i, j) in (0..b).flat_map(|i| (0..b).map(move |j| (i, j))) {
            dense.numbers[place(k, i) * d + place(k, j)] = block.at(i, j);
        }
    }
    dense
}

/// `F_{m−1} ··· F_0` with the exact map, of every `Q` times a strength.
pub fn rotation(skews: &[Vec<Matrix>], strength: f64) -> Matrix {
    let blocks = |factor: &Vec<Matrix>| {
        let blocks = factor.iter().map(|q| q.scaled(strength).cayley());
        blocks.collect::<Vec<_>>()
    };
    let factors = skews.iter().enumerate();
    factors
        .map(|(index, skews)| factor(index, &blocks(skews)))
        .reduce(|product, factor| factor.times(&product))
        .unwrap()
}
