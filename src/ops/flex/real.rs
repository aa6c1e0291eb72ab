//! The precisions that the kernels compute in.
//!
//! Half precision is not among them: the callers widen such an operand before a kernel reads it, or take the portable
//! version.

use std::ops::{Add, AddAssign, Mul};

use burn::tensor::Element;

/// A precision that the kernels compute in.
///
/// `Into<f64>` is exact for both precisions and [`rounded`](Self::rounded) leads back, which is all that a sum in f64
/// needs.
pub(super) trait Real:
    Element
    + bytemuck::Pod
    + Default
    + Send
    + Sync
    + Add<Output = Self>
    + Mul<Output = Self>
    + AddAssign
    + Into<f64>
{
    /// The nearest number of this precision, as Rust's `as` rounds it. In f32, a magnitude beyond its range becomes
    /// infinite.
    fn rounded(value: f64) -> Self;

    /// `self·factor + sum`, rounded once.
    ///
    /// One instruction where it is inlined into a kernel, and a slow call of a library function elsewhere on x86.
    fn mul_add(self, factor: Self, sum: Self) -> Self;
}

impl Real for f32 {
    fn rounded(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        self.mul_add(factor, sum)
    }
}

impl Real for f64 {
    fn rounded(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        self.mul_add(factor, sum)
    }
}

/// Runs an expression with `$real` as the precision of a tensor of f32 or f64.
///
/// Any precision other than f64 counts as f32, so that the caller has to check first, as
/// [`has_kernel`](super::has_kernel) does.
macro_rules! in_precision {
    ($dtype:expr, $real:ident => $run:expr) => {
        match $dtype {
            DType::F64 => {
                type $real = f64;
                $run
            }
            _ => {
                type $real = f32;
                $run
            }
        }
    };
}

pub(super) use in_precision;
