//! Products with a matrix that is made panel by panel on its way into them.
//!
//! Every task makes one panel after the other in a small cache and multiplies by it, so that the matrix itself is never in
//! memory. `gemm` would gather a transposed matrix number by number, and a small one on a single thread. A rotated weight
//! would have to be written to memory first and read again.

use std::mem::MaybeUninit;

use gemm::Parallelism;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::butterfly::{Task, overwrite};
use super::matrix::{Matrix, Place, call_gemm};
use super::real::Real;
use super::tile::{dispatch, line};
use crate::ops::butterfly::Side;

/// Columns that `gemm` computes at a time on processors with AVX-512. A panel has about so many, or twice as many.
const WIDTH: usize = 64;

/// Rows of a panel that are made at a time, about: such a panel stays in a second-level cache.
const DEPTH: usize = 512;

/// A matrix of which panels can be made.
pub(super) trait Panels<E: Real>: Sync {
    /// The rows and columns that come together only. A panel has multiples of them.
    fn grain(&self) -> [usize; 2];

    /// Makes the part of the matrix from a row and a column on, `[rows, columns]` numbers row by row, in the first of the vectors.
    fn make(&self, start: [usize; 2], shape: [usize; 2], memory: &mut [Vec<E>; 2]);
}

/// How a product is cut into tasks and parts of sums.
pub(super) struct Cut {
    /// Columns of a panel.
    width: usize,
    /// Rows of a panel that are made at a time.
    depth: usize,
    /// Rows of the result in a task.
    height: usize,
    tasks: [usize; 2],
}

impl Cut {
    /// A cut of `[m, k]·[k, n]` for all threads of the pool.
    pub(super) fn new([m, k, n]: [usize; 3], [rows, columns]: [usize; 2]) -> Self {
        let threads = rayon::current_num_threads();
        let wide = match n >= 4 * threads * WIDTH {
            true => 2 * WIDTH,
            false => WIDTH,
        };
        let width = (wide / columns).max(1) * columns;
        let panels = n.div_ceil(width);
        // A few panels are too little for many threads, which then share the rows of the result as well.
        let height = m.div_ceil((2 * threads).div_ceil(panels)).max(WIDTH);
        let depth = k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(rows);
        Self {
            width,
            depth,
            height,
            tasks: [m.div_ceil(height), panels],
        }
    }

    /// Whether making numbers of a panel, with so many multiplications each, takes little beside multiplying by the panel. Every
    /// block of rows makes all panels anew.
    pub(super) fn pays_for(&self, multiplications: usize) -> bool {
        let [blocks, _] = self.tasks;
        blocks == 1 || self.height >= 16 * multiplications
    }
}

/// The product with a matrix that is made on the way.
///
/// # Numerics
///
/// The parts of a sum are added up in the order of `k`, whatever the number of threads.
///
/// # Safety
///
/// As that of [`call_gemm`], of which `rhs` takes the place of the second operand.
pub(super) unsafe fn by_panels<E: Real>(
    output: Place<E>,
    lhs: &Matrix<E>,
    rhs: &impl Panels<E>,
    [m, k, n]: [usize; 3],
    adds: bool,
) {
    let cut = Cut::new([m, k, n], rhs.grain());
    let [blocks, panels] = cut.tasks;
    let tasks = (0..blocks * panels).into_par_iter();
    tasks.for_each_init(Default::default, |memory, task| {
        let (row, column) = (task / panels * cut.height, task % panels * cut.width);
        let (rows, columns) = (cut.height.min(m - row), cut.width.min(n - column));
        for first in (0..k).step_by(cut.depth) {
            let len = cut.depth.min(k - first);
            rhs.make([first, column], [len, columns], memory);
            let made = &memory[0];
            assert_eq!(made.len(), len * columns, "a panel of [{len}, {columns}]");
            let panel = Matrix {
                start: made.as_ptr(),
                row_stride: columns as isize,
                column_stride: 1,
            };
            let (output, lhs) = (output.at(row, column), lhs.at(row, first));
            let (sizes, adds) = ([rows, len, columns], adds || first > 0);
            // SAFETY: these are parts of the matrices of the caller, and no two tasks write the same one.
            unsafe { call_gemm(output, &lhs, &panel, sizes, adds, Parallelism::None) };
        }
    });
}

/// A matrix whose columns lie in one piece each, such as the transpose of a weight.
pub(super) struct Transposed<'a, E> {
    /// From the first number of the first column to the last of the last.
    pub(super) numbers: &'a [E],
    /// From one column to the next.
    pub(super) stride: usize,
}

impl<E: Real> Panels<E> for Transposed<'_, E> {
    fn grain(&self) -> [usize; 2] {
        [1, 1]
    }

    fn make(&self, [row, column]: [usize; 2], shape: [usize; 2], [panel, _]: &mut [Vec<E>; 2]) {
        let numbers = &self.numbers[column * self.stride + row..];
        transpose(numbers, self.stride, shape, panel);
    }
}

/// A rotated and scaled weight, `R·W·diag(s)`.
#[derive(Clone, Copy)]
pub(super) struct Rotated<'a, E> {
    /// `W`, a `[d, o]` matrix.
    pub(super) weight: &'a [E],
    /// `R`, a `[d/s, s, s]` tensor.
    pub(super) rotation: &'a [E],
    /// The length of a span.
    pub(super) span: usize,
    /// A number for each of the `o` outputs.
    pub(super) scale: &'a [E],
}

impl<E: Real> Rotated<'_, E> {
    /// `[d, o]`, after a check that the numbers are those of such a weight.
    ///
    /// # Panics
    ///
    /// - If the rotation or the scale is for another weight.
    pub(super) fn shape(&self) -> [usize; 2] {
        let (d, o) = (self.rotation.len() / self.span, self.scale.len());
        assert_eq!(self.rotation.len(), d * self.span, "whole spans");
        assert_eq!(self.weight.len(), d * o, "the weight is [{d}, {o}]");
        [d, o]
    }

    /// Rotates whole spans of rows, in some columns.
    fn rotate(&self, [row, column]: [usize; 2], [rows, columns]: [usize; 2], panel: &mut Vec<E>) {
        let (s, stride) = (self.span, self.scale.len());
        overwrite(panel, rows * columns, |panel| {
            let spans = row / s..(row + rows) / s;
            assert_eq!(
                [spans.start * s, spans.len() * s],
                [row, rows],
                "whole spans"
            );
            for (span, output) in spans.zip(panel.chunks_exact_mut(s * columns)) {
                let task = Task {
                    output,
                    matrix: &self.weight[span * s * stride + column..],
                    stride,
                    rotation: &self.rotation[span * s * s..][..s * s],
                    s,
                    columns,
                    scale: Some(&self.scale[column..][..columns]),
                    side: Side::Left,
                };
                dispatch::<E, _>(columns, task);
            }
        });
    }
}

impl<E: Real> Panels<E> for Rotated<'_, E> {
    fn grain(&self) -> [usize; 2] {
        [self.span, 1]
    }

    fn make(&self, start: [usize; 2], shape: [usize; 2], [panel, _]: &mut [Vec<E>; 2]) {
        self.rotate(start, shape, panel);
    }
}

/// The transpose of a rotated weight, `(R·W·diag(s))ᵀ`.
pub(super) struct RotatedTransposed<'a, E>(pub(super) Rotated<'a, E>);

impl<E: Real> Panels<E> for RotatedTransposed<'_, E> {
    fn grain(&self) -> [usize; 2] {
        [1, self.0.span]
    }

    fn make(
        &self,
        [row, column]: [usize; 2],
        [rows, columns]: [usize; 2],
        [panel, rotated]: &mut [Vec<E>; 2],
    ) {
        self.0.rotate([column, row], [columns, rows], rotated);
        transpose(rotated, rows, [rows, columns], panel);
    }
}

/// Copies columns, which lie in one piece each with a stride between them, into `[rows, columns]` numbers row by row.
fn transpose<E: Real>(
    numbers: &[E],
    stride: usize,
    [rows, columns]: [usize; 2],
    panel: &mut Vec<E>,
) {
    assert!(numbers.len() >= (columns - 1) * stride + rows);
    overwrite(panel, rows * columns, |panel| {
        Arch::new().dispatch(Transpose {
            numbers,
            stride,
            panel,
            columns,
        });
    });
}

struct Transpose<'a, E> {
    numbers: &'a [E],
    stride: usize,
    panel: &'a mut [MaybeUninit<E>],
    columns: usize,
}

impl<E: Real> WithSimd for Transpose<'_, E> {
    type Output = ();

    /// A square of numbers at a time, which is a few lines of a cache, is in registers on its way.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const SQUARE: usize = 16;
        let Self {
            numbers,
            stride,
            panel,
            columns,
        } = self;
        let rows = panel.len() / columns;
        let [whole_rows, whole_columns] = [rows, columns].map(|len| len - len % SQUARE);
        for row in (0..whole_rows).step_by(SQUARE) {
            for column in (0..whole_columns).step_by(SQUARE) {
                let square: [[E; SQUARE]; SQUARE] = std::array::from_fn(|index| {
                    let start = (column + index) * stride + row;
                    *line(numbers, start)
                });
                for index in 0..SQUARE {
                    let place = (row + index) * columns + column;
                    panel[place..][..SQUARE].write_copy_of_slice(&square.map(|line| line[index]));
                }
            }
        }
        for row in 0..rows {
            let first = match row < whole_rows {
                true => whole_columns,
                false => 0,
            };
            for column in first..columns {
                panel[row * columns + column].write(numbers[column * stride + row]);
            }
        }
    }
}
