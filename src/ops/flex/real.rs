//! The precisions that the kernels compute in.

use std::ops::{Add, AddAssign, Mul};

use burn::tensor::Element;

/// A precision that the kernels compute in.
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
    fn rounded(value: f64) -> Self;

    /// `self·factor + sum`, rounded once.
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
