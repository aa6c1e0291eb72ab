//! Where matrices lie in memory, and the call of `gemm`.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use gemm::{Parallelism, gemm};

use super::real::Real;

/// `gemm` with row-major outputs and one precision: writes `lhs·rhs`, or adds it to what is there.
///
/// # Safety
///
/// `lhs` is a `[m, k]` and `rhs` a `[k, n]` matrix that may be read, and `output` a `[m, n]` matrix that may be written, and
/// read if the product is added. Nothing else refers to the output.
pub(super) unsafe fn call_gemm<E: Real>(
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
pub(super) struct Place<E> {
    pub(super) start: *mut E,
    pub(super) row_stride: usize,
}

// SAFETY: it does not write by itself. Whoever writes through it has to exclude others.
unsafe impl<E: Send> Sync for Place<E> {}

impl<E> Place<E> {
    /// The part from this number on.
    pub(super) fn at(self, row: usize, column: usize) -> Self {
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
pub(super) struct Matrix<E> {
    pub(super) start: *const E,
    pub(super) row_stride: isize,
    pub(super) column_stride: isize,
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
    pub(super) fn new(tensor: &FlexTensor) -> Self {
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
    pub(super) fn has_whole_columns(&self) -> bool {
        self.row_stride == 1 && self.column_stride > 1
    }

    /// The part from this entry on.
    pub(super) fn at(&self, row: usize, column: usize) -> Self {
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
    pub(super) unsafe fn columns<'a>(&self, len: usize, count: usize) -> &'a [E] {
        let reach = (count - 1) * self.column_stride as usize + len;
        // SAFETY: the columns lie in one storage, which the caller vouches for.
        unsafe { std::slice::from_raw_parts(self.start, reach) }
    }
}
