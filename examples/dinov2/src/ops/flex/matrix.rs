//! Matrices inside of tensors, and their products.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use gemm::{Parallelism, gemm};

/// A matrix inside of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Rows after rows.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Self {
        Self {
            values,
            shape: [values.len() / columns, columns],
            strides: [columns, 1],
        }
    }

    /// The `[tokens, head_size]` matrix at `[batch, head]`.
    pub(super) fn head(tensor: &'a FlexTensor, [batch, head]: [usize; 2]) -> Self {
        let [_, _, tokens, head_size] = tensor.shape().dims::<4>();
        let layout = tensor.layout();
        let strides = [0, 1, 2, 3]
            .map(|axis| usize::try_from(layout.strides()[axis]).expect("the heads lie in order"));
        let start = layout.start_offset() + batch * strides[0] + head * strides[1];
        let matrix = Self {
            values: &tensor.storage::<f32>()[start..],
            shape: [tokens, head_size],
            strides: [strides[2], strides[3]],
        };
        assert!(
            matrix.len() <= matrix.values.len(),
            "the head is inside of its tensor"
        );
        matrix
    }

    pub(super) fn rows(&self) -> usize {
        self.shape[0]
    }

    pub(super) fn columns(&self) -> usize {
        self.shape[1]
    }

    pub(super) fn transposed(self) -> Self {
        let ([rows, columns], [down, right]) = (self.shape, self.strides);
        Self {
            shape: [columns, rows],
            strides: [right, down],
            ..self
        }
    }

    pub(super) fn slice(self, rows: &Range<usize>) -> Self {
        assert!(rows.end <= self.rows());
        Self {
            values: &self.values[rows.start * self.strides[0]..],
            shape: [rows.len(), self.columns()],
            ..self
        }
    }

    /// From the first to the last number.
    fn len(&self) -> usize {
        let [rows, columns] = self.shape;
        let [down, right] = self.strides;
        match rows * columns {
            0 => 0,
            _ => (rows - 1) * down + (columns - 1) * right + 1,
        }
    }
}

/// Rows of a tensor that nobody else reads or writes.
pub(super) struct MatrixMut<'a> {
    start: *mut f32,
    shape: [usize; 2],
    stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is as if it held the slices of its rows.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// Rows after rows.
    pub(super) fn new(values: &'a mut [f32], columns: usize) -> Self {
        Self {
            start: values.as_mut_ptr(),
            shape: [values.len() / columns, columns],
            stride: columns,
            lifetime: PhantomData,
        }
    }

    /// The `[tokens, head_size]` matrices of every batch and head, of a `[batch, tokens, heads, head_size]` tensor.
    pub(super) fn heads(
        values: &'a mut [MaybeUninit<f32>],
        [batch, tokens, heads, head_size]: [usize; 4],
    ) -> Vec<Self> {
        assert_eq!(values.len(), batch * heads * tokens * head_size);
        let start = values.as_mut_ptr().cast::<f32>();
        (0..batch * heads)
            .map(|index| {
                let token = index / heads * tokens;
                Self {
                    // SAFETY: the first number of a matrix is inside of the tensor, and no two matrices share one.
                    start: unsafe { start.add((token * heads + index % heads) * head_size) },
                    shape: [tokens, head_size],
                    stride: heads * head_size,
                    lifetime: PhantomData,
                }
            })
            .collect()
    }

    pub(super) fn slice(&mut self, rows: &Range<usize>) -> MatrixMut<'_> {
        assert!(rows.end <= self.shape[0]);
        MatrixMut {
            // SAFETY: the row is inside of this matrix.
            start: unsafe { self.start.add(rows.start * self.stride) },
            shape: [rows.len(), self.shape[1]],
            stride: self.stride,
            lifetime: PhantomData,
        }
    }

    /// Becomes `lhs·rhs`.
    pub(super) fn assign(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        self.product(lhs, rhs, false);
    }

    /// Becomes `lhs·rhs`, or that is added. What is added to has been written before.
    pub(super) fn product(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>, adds: bool) {
        let ([m, n], k) = (self.shape, lhs.columns());
        assert_eq!(
            [lhs.shape, rhs.shape],
            [[m, k], [k, n]],
            "the shapes of a product"
        );
        // SAFETY: the constructors check that all three matrices are inside of their memory, and the borrows
        // that nobody else writes it.
        unsafe {
            gemm(
                m,
                n,
                k,
                self.start,
                1,
                self.stride as isize,
                adds,
                lhs.values.as_ptr(),
                lhs.strides[1] as isize,
                lhs.strides[0] as isize,
                rhs.values.as_ptr(),
                rhs.strides[1] as isize,
                rhs.strides[0] as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}
