//! The product of two matrices, added to the bias.
//!
//! It calls the same `gemm` as Burn does, but lets it start from the bias and write to memory that nobody cleared or
//! copied before. A separate addition would read and write the whole output once more. For transposed weights, which the
//! backward pass multiplies by, it also does what `gemm` does badly: it brings them into the order that the product needs.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use gemm::{Parallelism, gemm};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::real::Real;

/// A product of at least this many multiplications is shared among threads. Burn's own products change over at the
/// same size.
const SHARED_WORK: usize = 192 * 192 * 192;

/// Rows that one task fills with the bias. A task of one row would copy too little to be worth a thread.
const FILLED_ROWS: usize = 64;

/// `lhs·rhs + bias` of a `[m, k]` and a `[k, n]` tensor with any strides.
///
/// The backward pass multiplies by transposes, which are views with swapped strides here and need no copy.
///
/// # Shapes
///
/// - lhs: `[m, k]`
/// - rhs: `[k, n]`
/// - bias: `[n]`
/// - result: `[m, n]`, contiguous
///
/// # Numerics
///
/// Products are summed in the operands' precision, in the order that `gemm` chooses for these sizes. With a bias, a
/// sum starts from it instead of adding it last.
///
/// # Panics
///
/// - If the inner lengths differ, or the bias does not have a number for every output.
pub(super) fn product<E: Real>(lhs: &FlexTensor, rhs: &FlexTensor, bias: Option<&[E]>) -> Vec<E> {
    let ([m, k], [inner, n]) = (lhs.shape().dims::<2>(), rhs.shape().dims::<2>());
    assert_eq!(
        k, inner,
        "a [{m}, {k}] and a [{inner}, {n}] tensor have no product"
    );
    let mut output = Vec::with_capacity(m * n);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "the bias of {n} outputs");
        output.spare_capacity_mut()[..m * n]
            .par_chunks_mut(FILLED_ROWS * n.max(1))
            .flat_map_iter(|rows| rows.chunks_mut(n))
            .for_each(|row| {
                row.write_copy_of_slice(bias);
            });
    }
    let (lhs, rhs) = (Matrix::<E>::new(lhs), Matrix::<E>::new(rhs));
    let place = Place {
        start: output.as_mut_ptr(),
        row_stride: n,
    };
    let (sizes, adds) = ([m, k, n], bias.is_some());
    // SAFETY: `Matrix` has checked that the operands are inside their storage. The output is a matrix inside the capacity
    // of `output`, which nothing else refers to, and it is read only where it holds the bias. Every number of it is
    // written.
    unsafe {
        match m * n * k >= SHARED_WORK {
            true if rhs.has_whole_columns() => by_panels(place, &lhs, &rhs, sizes, adds),
            true => call_gemm(place, &lhs, &rhs, sizes, adds, Parallelism::Rayon(0)),
            false => call_gemm(place, &lhs, &rhs, sizes, adds, Parallelism::None),
        }
        output.set_len(m * n);
    }
    output
}

/// Columns that `gemm` computes at a time on processors with AVX-512. A panel has so many, or twice as many.
const PANEL: usize = 64;

/// Numbers of each column that are turned at a time, at most: those of a panel stay in a second-level cache.
const TURNED: usize = 512;

/// The product with a matrix whose columns lie in one piece each, such as `dy·Wᵀ`.
///
/// `gemm` would gather such a matrix number by number, and a small one on a single thread. Here every task turns the
/// columns of a panel into rows and multiplies by that.
///
/// # Numerics
///
/// The parts of a sum are added up in the order of `k`, whatever the number of threads.
///
/// # Safety
///
/// As that of [`call_gemm`].
unsafe fn by_panels<E: Real>(
    output: Place<E>,
    lhs: &Matrix<E>,
    rhs: &Matrix<E>,
    [m, k, n]: [usize; 3],
    adds: bool,
) {
    let threads = rayon::current_num_threads();
    let width = match n >= 4 * threads * PANEL {
        true => 2 * PANEL,
        false => PANEL,
    };
    let panels = n.div_ceil(width);
    // A few columns are too little for many threads, which then share the rows as well.
    let height = m.div_ceil((2 * threads).div_ceil(panels)).max(PANEL);
    let depth = k.div_ceil(k.div_ceil(TURNED));

    let arch = Arch::new();
    let tasks = (0..panels * m.div_ceil(height)).into_par_iter();
    tasks.for_each_init(Vec::new, |turned, task| {
        let (row, column) = (task / panels * height, task % panels * width);
        let (rows, columns) = (height.min(m - row), width.min(n - column));
        turned.resize(depth * columns, E::default());
        for first in (0..k).step_by(depth) {
            let len = depth.min(k - first);
            arch.dispatch(Turn {
                // SAFETY: the columns lie in the storage of `rhs`, one after the other.
                columns: unsafe { rhs.at(first, column).columns(len, columns) },
                stride: rhs.column_stride as usize,
                rows: &mut turned[..len * columns],
                width: columns,
            });
            let panel = Matrix {
                start: turned.as_ptr(),
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

/// Copies the columns of a matrix into rows.
struct Turn<'a, E> {
    /// From the first number of the first column to the last of the last.
    columns: &'a [E],
    /// From one column to the next.
    stride: usize,
    rows: &'a mut [E],
    /// How many columns there are, which is the length of a row.
    width: usize,
}

impl<E: Real> WithSimd for Turn<'_, E> {
    type Output = ();

    /// A square of numbers at a time, which is a few lines of a cache, is in registers on its way.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const SQUARE: usize = 16;
        let Self {
            columns,
            stride,
            rows,
            width,
        } = self;
        let len = rows.len() / width;
        let (whole_len, whole_width) = (len - len % SQUARE, width - width % SQUARE);
        for row in (0..whole_len).step_by(SQUARE) {
            for column in (0..whole_width).step_by(SQUARE) {
                let square: [[E; SQUARE]; SQUARE] = std::array::from_fn(|i| {
                    let start = (column + i) * stride + row;
                    *columns[start..].first_chunk().expect("inside of a column")
                });
                for i in 0..SQUARE {
                    let target = rows[(row + i) * width + column..].first_chunk_mut();
                    *target.expect("inside of a row") = square.map(|column| column[i]);
                }
            }
        }
        for row in 0..len {
            let first = match row < whole_len {
                true => whole_width,
                false => 0,
            };
            for column in first..width {
                rows[row * width + column] = columns[column * stride + row];
            }
        }
    }
}

/// `gemm` with row-major outputs and one precision: writes `lhs·rhs`, or adds it to what is there.
///
/// # Safety
///
/// `lhs` is a `[m, k]` and `rhs` a `[k, n]` matrix that may be read, and `output` a `[m, n]` matrix that may be written, and
/// read if the product is added. Nothing else refers to the output.
unsafe fn call_gemm<E: Real>(
    output: Place<E>,
    lhs: &Matrix<E>,
    rhs: &Matrix<E>,
    [m, k, n]: [usize; 3],
    adds: bool,
    parallelism: Parallelism,
) {
    // SAFETY: the caller vouches for the three matrices.
    unsafe {
        gemm(
            m,
            n,
            k,
            output.start,
            1,
            output.row_stride as isize,
            adds,
            lhs.start,
            lhs.column_stride,
            lhs.row_stride,
            rhs.start,
            rhs.column_stride,
            rhs.row_stride,
            E::rounded(1.0),
            E::rounded(1.0),
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Where a matrix is written, row after row.
#[derive(Clone, Copy)]
struct Place<E> {
    start: *mut E,
    row_stride: usize,
}

// SAFETY: it does not write by itself. Whoever writes through it has to exclude others.
unsafe impl<E: Send> Sync for Place<E> {}

impl<E> Place<E> {
    /// The part from this number on.
    fn at(self, row: usize, column: usize) -> Self {
        Self {
            start: self.start.wrapping_add(row * self.row_stride + column),
            ..self
        }
    }
}

/// Where the numbers of a matrix lie in memory: entry `(row, column)` at
/// `start + row·row_stride + column·column_stride`, counted in numbers.
///
/// The pointer is valid as long as the tensor that it was made of. `gemm` does not check any bounds, so
/// [`Matrix::new`] does.
struct Matrix<E> {
    start: *const E,
    row_stride: isize,
    column_stride: isize,
}

// SAFETY: it is only read.
unsafe impl<E: Sync> Sync for Matrix<E> {}

impl<E: Real> Matrix<E> {
    /// The strides of a tensor, after a check that its four corners lie inside its storage. Strides may be negative,
    /// as those of a flipped tensor are.
    ///
    /// # Panics
    ///
    /// - If the matrix reaches beyond its storage.
    fn new(tensor: &FlexTensor) -> Self {
        let [rows, columns] = tensor.shape().dims::<2>();
        let layout = tensor.layout();
        let (row_stride, column_stride) = (layout.strides()[0], layout.strides()[1]);
        let storage = tensor.storage::<E>();
        let reach = |count: usize, stride: isize| count.saturating_sub(1) as isize * stride;
        let (along_rows, along_columns) = (reach(rows, row_stride), reach(columns, column_stride));
        let start = layout.start_offset() as isize;
        let first = start + along_rows.min(0) + along_columns.min(0);
        let last = start + along_rows.max(0) + along_columns.max(0);
        assert!(
            rows * columns == 0 || first >= 0 && (last as usize) < storage.len(),
            "a [{rows}, {columns}] tensor reaches beyond its storage"
        );
        Self {
            start: storage.as_ptr().wrapping_offset(start),
            row_stride,
            column_stride,
        }
    }

    /// Whether the numbers of each column lie in one piece, and the columns one after the other.
    fn has_whole_columns(&self) -> bool {
        self.row_stride == 1 && self.column_stride > 1
    }

    /// The part from this entry on.
    fn at(&self, row: usize, column: usize) -> Self {
        let (row, column) = (row as isize, column as isize);
        let offset = row * self.row_stride + column * self.column_stride;
        Self {
            start: self.start.wrapping_offset(offset),
            ..*self
        }
    }

    /// The numbers from the first of the first column to the last of the last.
    ///
    /// # Safety
    ///
    /// The matrix [has whole columns](Self::has_whole_columns), at least as many as these and at least as long, and its storage
    /// outlives the slice.
    unsafe fn columns<'a>(self, len: usize, count: usize) -> &'a [E] {
        let reach = (count - 1) * self.column_stride as usize + len;
        // SAFETY: the columns lie in one storage, which the caller vouches for.
        unsafe { std::slice::from_raw_parts(self.start, reach) }
    }
}
