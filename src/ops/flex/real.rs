//! The precisions that the kernels compute in.
//!
//! Half precision is not among them. The rotations of [`half`](super::half) widen such an operand piece by piece; before the
//! other kernels the callers widen it, or take the portable version.

use std::mem::MaybeUninit;
use std::ops::{Add, AddAssign, Mul};

use burn::tensor::Element;
use bytemuck::Pod;
use pulp::Simd;

/// A precision that the kernels compute in.
///
/// `Into<f64>` is exact for both precisions and [`rounded`](Self::rounded) leads back, which is all that a sum in f64
/// needs.
pub(super) trait Real:
    Element
    + Pod
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

    /// A register full of numbers.
    type Register<S: Simd>: Copy;

    /// A register that holds the same number everywhere.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Register<S>;

    /// `a·b + c` for the numbers of registers, each rounded once.
    fn mul_add_registers<S: Simd>(
        simd: S,
        a: Self::Register<S>,
        b: Self::Register<S>,
        c: Self::Register<S>,
    ) -> Self::Register<S>;

    /// `a·b` for the numbers of registers.
    fn mul_registers<S: Simd>(
        simd: S,
        a: Self::Register<S>,
        b: Self::Register<S>,
    ) -> Self::Register<S>;

    /// The sum of all numbers of some registers: of the registers, then of the halves of one, down to a single number.
    fn sum_registers<S: Simd, const WIDTH: usize>(
        simd: S,
        registers: [Self::Register<S>; WIDTH],
    ) -> Self;

    /// As many registers as the numbers fill, from the first on.
    fn registers<S: Simd>(numbers: &[Self]) -> &[Self::Register<S>];

    /// As many registers as the numbers fill, to be written.
    fn registers_mut<S: Simd>(numbers: &mut [Self]) -> &mut [Self::Register<S>];

    /// The places of as many registers as the places of numbers fill.
    fn register_places<S: Simd>(
        numbers: &mut [MaybeUninit<Self>],
    ) -> &mut [MaybeUninit<Self::Register<S>>];
}

/// How many numbers a register holds.
pub(super) const fn lanes<E: Real, S: Simd>() -> usize {
    size_of::<E::Register<S>>() / size_of::<E>()
}

/// What registers do with numbers of a precision.
macro_rules! registers {
    ($register:ident, $splat:ident, $mul_add:ident, $mul:ident, $add:ident, $sum:ident, $as_registers:ident, $as_registers_mut:ident, $as_places:ident) => {
        type Register<S: Simd> = S::$register;

        #[inline(always)]
        fn splat<S: Simd>(simd: S, value: Self) -> Self::Register<S> {
            simd.$splat(value)
        }

        #[inline(always)]
        fn mul_add_registers<S: Simd>(
            simd: S,
            a: Self::Register<S>,
            b: Self::Register<S>,
            c: Self::Register<S>,
        ) -> Self::Register<S> {
            simd.$mul_add(a, b, c)
        }

        #[inline(always)]
        fn mul_registers<S: Simd>(
            simd: S,
            a: Self::Register<S>,
            b: Self::Register<S>,
        ) -> Self::Register<S> {
            simd.$mul(a, b)
        }

        #[inline(always)]
        fn sum_registers<S: Simd, const WIDTH: usize>(
            simd: S,
            registers: [Self::Register<S>; WIDTH],
        ) -> Self {
            let others = registers[1..].iter();
            simd.$sum(others.fold(registers[0], |sum, &register| simd.$add(sum, register)))
        }

        #[inline(always)]
        fn registers<S: Simd>(numbers: &[Self]) -> &[Self::Register<S>] {
            S::$as_registers(numbers).0
        }

        #[inline(always)]
        fn registers_mut<S: Simd>(numbers: &mut [Self]) -> &mut [Self::Register<S>] {
            S::$as_registers_mut(numbers).0
        }

        #[inline(always)]
        fn register_places<S: Simd>(
            numbers: &mut [MaybeUninit<Self>],
        ) -> &mut [MaybeUninit<Self::Register<S>>] {
            S::$as_places(numbers).0
        }
    };
}

impl Real for f32 {
    registers!(
        f32s,
        splat_f32s,
        mul_add_f32s,
        mul_f32s,
        add_f32s,
        reduce_sum_f32s,
        as_simd_f32s,
        as_mut_simd_f32s,
        as_uninit_mut_simd_f32s
    );

    fn rounded(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        self.mul_add(factor, sum)
    }
}

impl Real for f64 {
    registers!(
        f64s,
        splat_f64s,
        mul_add_f64s,
        mul_f64s,
        add_f64s,
        reduce_sum_f64s,
        as_simd_f64s,
        as_mut_simd_f64s,
        as_uninit_mut_simd_f64s
    );

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
