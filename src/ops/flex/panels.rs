//! Products whose second operand is computed panel by panel: transposed weights and rotated weights.
//!
//! A panel is a few columns of the operand. Each task computes a panel in a small cache and multiplies by it, so that the
//! operand is never written to memory as a whole. `gemm` alone would copy a transposed operand one number at a time, and a
//! small one on a single thread.

use std::mem::MaybeUninit;

use gemm::Parallelism;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::butterfly::{Task, overwrite};
use super::matrix::{Matrix, Place, call_gemm};
use super::real::Real;
use super::tile::{dispatch, line};
use crate::ops::butterfly::Side;

/// About how many columns a panel has, or half of it: the columns that `gemm` computes at a time on processors with
/// AVX-512.
const WIDTH: usize = 64;

/// About how many rows of a panel are computed at a time, so that they stay in a second-level cache.
const DEPTH: usize = 512;

/// A matrix that is computed panel by panel.
pub(super) trait Panels<E: Real>: Sync {
    /// The smallest number of rows and of columns that can be computed by themselves. A panel has multiples of both.
    fn grain(&self) -> [usize; 2];

    /// Computes a `[rows, columns]` part of the matrix, which starts at a row and a column, and stores it row by row in the first
    /// vector. The second vector is scratch memory.
    fn compute(&self, start: [usize; 2], shape: [usize; 2], memory: &mut [Vec<E>; 2]);
}

/// How a product is divided into tasks, and its sums into parts.
pub(super) struct Tiling {
    /// Columns of a panel.
    width: usize,
    /// Rows of a panel that are computed at a time.
    depth: usize,
    /// Rows of the result in a task.
    height: usize,
    /// Tasks down the rows and along the columns of the result.
    tasks: [usize; 2],
}

impl Tiling {
    /// Divides `[m, k]·[k, n]` among all threads of the pool.
    pub(super) fn new([m, k, n]: [usize; 3], [rows, columns]: [usize; 2]) -> Self {
        let threads = rayon::current_num_threads();
        let wide = match n >= 4 * threads * WIDTH {
            true => 2 * WIDTH,
            false => WIDTH,
        };
        let width = (wide / columns).max(1) * columns;
        let panels = n.div_ceil(width);
        // With too few panels for all threads, the rows of the result are divided as well.
        let height = m.div_ceil((2 * threads).div_ceil(panels)).max(WIDTH);
        let depth = k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(rows);
        Self {
            width,
            depth,
            height,
            tasks: [m.div_ceil(height), panels],
        }
    }

    /// Whether computing the panels costs little compared with the product, if each number of a panel takes this many
    /// multiplications. Where the rows of the result are divided, each of their tasks computes the panel again.
    pub(super) fn is_worthwhile(&self, multiplications: usize) -> bool {
        let [blocks, _] = self.tasks;
        blocks == 1 || self.height >= 16 * multiplications
    }
}

/// The product with a matrix that is computed panel by panel.
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
    let tiling = Tiling::new([m, k, n], rhs.grain());
    let [blocks, panels] = tiling.tasks;
    let tasks = (0..blocks * panels).into_par_iter();
    tasks.for_each_init(Default::default, |memory, task| {
        let (row, column) = (task / panels * tiling.height, task % panels * tiling.width);
        let (rows, columns) = (tiling.height.min(m - row), tiling.width.min(n - column));
        for first in (0..k).step_by(tiling.depth) {
            let len = tiling.depth.min(k - first);
            rhs.compute([first, column], [len, columns], memory);
            let computed = &memory[0];
            assert_eq!(
                computed.len(),
                len * columns,
                "a panel of [{len}, {columns}]"
            );
            let panel = Matrix {
                start: computed.as_ptr(),
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

    fn compute(&self, [row, column]: [usize; 2], shape: [usize; 2], [panel, _]: &mut [Vec<E>; 2]) {
        let numbers = &self.numbers[column * self.stride + row..];
        transpose(numbers, self.stride, shape, panel);
    }
}

/// A rotated weight, `R·W·diag(s)`, or `R·W` without a scale.
#[derive(Clone, Copy)]
pub(super) struct Rotated<'a, E> {
    /// `W`, a `[d, o]` matrix.
    pub(super) weight: &'a [E],
    /// `o`.
    pub(super) outputs: usize,
    /// `R`, a `[d/s, s, s]` tensor.
    pub(super) rotation: &'a [E],
    /// The length of a span.
    pub(super) span: usize,
    /// A number for each of the `o` outputs.
    pub(super) scale: Option<&'a [E]>,
}

impl<E: Real> Rotated<'_, E> {
    /// `[d, o]`, after a check that the numbers are those of such a weight.
    ///
    /// # Panics
    ///
    /// - If the rotation or the scale is for another weight.
    pub(super) fn shape(&self) -> [usize; 2] {
        let (d, o) = (self.rotation.len() / self.span, self.outputs);
        assert_eq!(self.rotation.len(), d * self.span, "whole spans");
        assert_eq!(self.weight.len(), d * o, "the weight is [{d}, {o}]");
        if let Some(scale) = self.scale {
            assert_eq!(scale.len(), o, "the scale of {o} outputs");
        }
        [d, o]
    }

    /// Rotates whole spans of rows, in some columns.
    fn rotate(&self, [row, column]: [usize; 2], [rows, columns]: [usize; 2], panel: &mut Vec<E>) {
        let (s, stride) = (self.span, self.outputs);
        let spans = row / s..(row + rows) / s;
        assert_eq!(
            [spans.start * s, spans.len() * s],
            [row, rows],
            "whole spans"
        );
        let write = |panel: &mut [MaybeUninit<E>]| {
            for (span, output) in spans.zip(panel.chunks_exact_mut(s * columns)) {
                let task = Task {
                    output,
                    matrix: &self.weight[span * s * stride + column..],
                    stride,
                    rotation: &self.rotation[span * s * s..][..s * s],
                    s,
                    columns,
                    scale: self.scale.map(|scale| &scale[column..][..columns]),
                    side: Side::Left,
                };
                dispatch::<E, _>(columns, task);
            }
        };
        // SAFETY: the panel consists of these spans, and a task rotates every number of its own.
        unsafe { overwrite(panel, rows * columns, write) };
    }
}

impl<E: Real> Panels<E> for Rotated<'_, E> {
    fn grain(&self) -> [usize; 2] {
        [self.span, 1]
    }

    fn compute(&self, start: [usize; 2], shape: [usize; 2], [panel, _]: &mut [Vec<E>; 2]) {
        self.rotate(start, shape, panel);
    }
}

/// The transpose of a rotated weight, `(R·W·diag(s))ᵀ`.
pub(super) struct RotatedTransposed<'a, E>(pub(super) Rotated<'a, E>);

impl<E: Real> Panels<E> for RotatedTransposed<'_, E> {
    fn grain(&self) -> [usize; 2] {
        [1, self.0.span]
    }

    fn compute(
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
    let write = |panel: &mut [MaybeUninit<E>]| {
        Arch::new().dispatch(Transpose {
            numbers,
            stride,
            panel,
            columns,
        });
    };
    // SAFETY: squares and what is left beside and below them cover the panel.
    unsafe { overwrite(panel, rows * columns, write) };
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
        for column in (0..whole_columns).step_by(SQUARE) {
            for row in (0..whole_rows).step_by(SQUARE) {
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
