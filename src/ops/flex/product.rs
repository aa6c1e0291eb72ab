//! The product of two matrices, added to the bias.
//!
//! It calls the same `gemm` as Burn does, but lets it start from the bias and write to memory that nobody cleared or
//! copied before. A separate addition would read and write the whole output once more.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use gemm::{Parallelism, gemm};
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
    let parallelism = match m * n * k >= SHARED_WORK {
        true => Parallelism::Rayon(0),
        false => Parallelism::None,
    };
    // SAFETY: the pointers and strides describe a [m, k] and a [k, n] matrix inside their storage, which
    // `Matrix` checks, and an [m, n] matrix inside the capacity of `output`, which nothing else refers to.
    // `gemm` reads `output` only where it starts from the bias, and writes every number of it.
    unsafe {
        gemm(
            m,
            n,
            k,
            output.as_mut_ptr(),
            1,
            n as isize,
            bias.is_some(),
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
        output.set_len(m * n);
    }
    output
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
}
