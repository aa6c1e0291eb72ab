//! The product of two matrices, added to the bias.
//!
//! It calls the same `gemm` as Burn does, but lets it start from the bias and write to memory that nobody cleared or
//! copied before. A separate addition would read and write the whole output once more. Transposed and rotated weights are
//! computed panel by panel inside the product.

use std::mem::MaybeUninit;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use gemm::Parallelism;
use rayon::prelude::*;

use super::butterfly::written;
use super::matrix::{Matrix, Place, call_gemm};
use super::panels::{Panels, Rotated, RotatedTransposed, Tiling, Transposed, by_panels};
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
    assert_fit([m, k], [inner, n]);
    let (lhs, rhs) = (Matrix::<E>::new(lhs), Matrix::<E>::new(rhs));
    let (sizes, adds) = ([m, k, n], bias.is_some());
    // SAFETY: `Matrix` has checked that the operands are inside their storage.
    let multiply = |output| unsafe {
        match is_shared(sizes) {
            true if rhs.has_whole_columns() => {
                let transposed = Transposed {
                    numbers: rhs.columns(k, n),
                    stride: rhs.column_stride as usize,
                };
                by_panels(output, &lhs, &transposed, sizes, adds);
            }
            true => call_gemm(output, &lhs, &rhs, sizes, adds, Parallelism::Rayon(0)),
            false => call_gemm(output, &lhs, &rhs, sizes, adds, Parallelism::None),
        }
    };
    // SAFETY: a product that does not add writes every number.
    unsafe { multiplied([m, n], bias, multiply) }
}

/// `lhs·(R·W·diag(s)) + bias`, with or without the scale, and without writing the rotated weight to memory.
///
/// None where writing it is cheaper: where one thread computes the product, and where many threads would compute the same
/// panels for a few rows each.
///
/// # Shapes
///
/// - lhs: `[m, d]`
/// - weight: `[d, o]`
/// - bias: `[o]`
/// - result: `[m, o]`
///
/// # Numerics
///
/// As [`product`] with the rotated weight.
///
/// # Panics
///
/// - If the shapes do not fit.
pub(super) fn rotated_product<E: Real>(
    lhs: &FlexTensor,
    weight: Rotated<'_, E>,
    bias: Option<&[E]>,
) -> Option<Vec<E>> {
    product_by_panels(lhs, &weight, weight.shape(), weight.span, bias)
}

/// `lhs·(R·W·diag(s))ᵀ`, as [`rotated_product`].
///
/// # Shapes
///
/// - lhs: `[m, o]`
/// - weight: `[d, o]`
/// - result: `[m, d]`
pub(super) fn rotated_transposed_product<E: Real>(
    lhs: &FlexTensor,
    weight: Rotated<'_, E>,
) -> Option<Vec<E>> {
    let [d, o] = weight.shape();
    product_by_panels(lhs, &RotatedTransposed(weight), [o, d], weight.span, None)
}

/// `lhs·rhs + bias`, where each number of the `[k, n]` matrix takes `span` multiplications to compute.
fn product_by_panels<E: Real>(
    lhs: &FlexTensor,
    rhs: &impl Panels<E>,
    [inner, n]: [usize; 2],
    span: usize,
    bias: Option<&[E]>,
) -> Option<Vec<E>> {
    let [m, k] = lhs.shape().dims::<2>();
    assert_fit([m, k], [inner, n]);
    let (sizes, adds) = ([m, k, n], bias.is_some());
    if !is_shared(sizes) || !Tiling::new(sizes, rhs.grain()).is_worthwhile(span) {
        return None;
    }
    let lhs = Matrix::<E>::new(lhs);
    // SAFETY: `Matrix` has checked that the operand is inside its storage.
    let multiply = |output| unsafe { by_panels(output, &lhs, rhs, sizes, adds) };
    // SAFETY: the panels are all columns of the product, which is written where it does not add.
    Some(unsafe { multiplied([m, n], bias, multiply) })
}

fn assert_fit([m, k]: [usize; 2], [inner, n]: [usize; 2]) {
    assert_eq!(
        k, inner,
        "a [{m}, {k}] and a [{inner}, {n}] tensor have no product"
    );
}

/// Whether a product is large enough for several threads.
fn is_shared([m, k, n]: [usize; 3]) -> bool {
    m * n * k >= SHARED_WORK
}

/// The result of a product, `[m, n]`, which `multiply` writes, or adds to the bias.
///
/// # Safety
///
/// Without a bias, `multiply` writes every number.
unsafe fn multiplied<E: Real>(
    [m, n]: [usize; 2],
    bias: Option<&[E]>,
    multiply: impl FnOnce(Place<E>),
) -> Vec<E> {
    let write = |output: &mut [MaybeUninit<E>]| {
        if let Some(bias) = bias {
            assert_eq!(bias.len(), n, "the bias of {n} outputs");
            output
                .par_chunks_mut(FILLED_ROWS * n.max(1))
                .flat_map_iter(|rows| rows.chunks_mut(n))
                .for_each(|row| {
                    row.write_copy_of_slice(bias);
                });
        }
        multiply(Place {
            start: output.as_mut_ptr().cast(),
            row_stride: n,
        });
    };
    // SAFETY: the bias fills every row, and without one `multiply` writes every number.
    unsafe { written(m * n, write) }
}
