//! Rotations of matrices in half precision, computed in f32.
//!
//! Casting the whole matrix before the rotation, and the result afterwards, would each write a matrix to memory and read it again.
//! Here a piece that a cache holds is widened, rotated and rounded before the next one is read.

use std::mem::MaybeUninit;

use burn::tensor::{bf16, f16};
use half::slice::HalfFloatSliceExt;
use pulp::{Simd, WithSimd};

use super::butterfly::{RotateColumns, RotateRows, by_passing_rows, by_spans};
use super::span::Sizes;
use super::tile::dispatch;

/// How many columns a piece has, or a few less, where spans would be parted. With 16 rows a piece and its rotation have 32 KiB
/// each.
const PIECE: usize = 512;

/// A precision that matrices are stored in and not computed with.
pub(super) trait Half: Copy + Send + Sync {
    /// Widens numbers to f32, which holds all of them exactly.
    fn widen(numbers: &[Self], wide: &mut [f32]);

    /// Rounds numbers to the nearest, and ties to the even ones.
    fn round(wide: &[f32], numbers: &mut [MaybeUninit<Self>]);
}

impl Half for bf16 {
    #[inline(always)]
    fn widen(numbers: &[Self], wide: &mut [f32]) {
        for (wide, number) in wide.iter_mut().zip(numbers) {
            *wide = f32::from_bits(u32::from(number.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn round(wide: &[f32], numbers: &mut [MaybeUninit<Self>]) {
        for (number, &wide) in numbers.iter_mut().zip(wide) {
            number.write(Self::from_f32(wide));
        }
    }
}

impl Half for f16 {
    fn widen(numbers: &[Self], wide: &mut [f32]) {
        numbers.convert_to_f32_slice(wide);
    }

    fn round(wide: &[f32], numbers: &mut [MaybeUninit<Self>]) {
        let mut rounded = [Self::ZERO; PIECE];
        for (wide, numbers) in wide.chunks(PIECE).zip(numbers.chunks_mut(PIECE)) {
            let rounded = &mut rounded[..wide.len()];
            rounded.convert_from_f32_slice(wide);
            numbers.write_copy_of_slice(rounded);
        }
    }
}

/// [`rotate_rows`](super::butterfly::rotate_rows) of a matrix in half precision.
pub(super) fn rotate_rows<H: Half>(
    matrix: &[H],
    rotation: &[f32],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[f32]>,
) -> Vec<H> {
    let operands = (matrix, rotation);
    by_spans(
        operands,
        sizes,
        [rows, columns],
        |output, matrix, rotation| {
            let kernel = Rows {
                output,
                matrix,
                rotation,
                columns,
                scale,
            };
            dispatch::<f32, _>(columns, kernel);
        },
    )
}

/// [`rotate_columns`](super::butterfly::rotate_columns) of a matrix in half precision.
pub(super) fn rotate_columns<H: Half>(
    matrix: &[H],
    rotation: &[f32],
    sizes: Sizes,
    [rows, columns]: [usize; 2],
    scale: Option<&[f32]>,
) -> Vec<H> {
    by_passing_rows(matrix, [rows, columns], |output, matrix, first| {
        let kernel = Columns {
            output,
            matrix,
            rotation,
            s: sizes.span,
            columns,
            scale: scale.map(|scale| &scale[first..]),
        };
        dispatch::<f32, _>(sizes.span, kernel);
    })
}

/// One span of [`rotate_rows`].
struct Rows<'a, H> {
    output: &'a mut [MaybeUninit<H>],
    matrix: &'a [H],
    rotation: &'a [f32],
    columns: usize,
    scale: Option<&'a [f32]>,
}

impl<H: Half> WithSimd for Rows<'_, H> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut piece = Piece::default();
        for start in (0..self.columns).step_by(PIECE) {
            let columns = PIECE.min(self.columns - start);
            let (matrix, output) = piece.widen(self.matrix, self.columns, start, columns);
            RotateRows {
                output,
                matrix,
                rotation: self.rotation,
                columns,
                scale: self.scale.map(|scale| &scale[start..]),
            }
            .with_simd(simd);
            // SAFETY: the kernel has written every number of the piece.
            unsafe { piece.round(self.output, self.columns, start, columns) };
        }
    }
}

/// Up to 16 rows of [`rotate_columns`], with the scales from the first of them on.
struct Columns<'a, H> {
    output: &'a mut [MaybeUninit<H>],
    matrix: &'a [H],
    rotation: &'a [f32],
    s: usize,
    columns: usize,
    scale: Option<&'a [f32]>,
}

impl<H: Half> WithSimd for Columns<'_, H> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut piece = Piece::default();
        let step = PIECE / self.s * self.s;
        for start in (0..self.columns).step_by(step) {
            let columns = step.min(self.columns - start);
            let (matrix, output) = piece.widen(self.matrix, self.columns, start, columns);
            RotateColumns {
                output,
                matrix,
                rotation: &self.rotation[start * self.s..][..columns * self.s],
                s: self.s,
                columns,
                scale: self.scale,
            }
            .with_simd(simd);
            // SAFETY: the kernel has written every number of the piece.
            unsafe { piece.round(self.output, self.columns, start, columns) };
        }
    }
}

/// Some columns of a matrix in f32, before and after the rotation.
#[derive(Default)]
struct Piece {
    wide: Vec<f32>,
    rotated: Vec<f32>,
}

impl Piece {
    /// Takes `columns` columns from `start` on of a matrix with `all` columns, and gives them and the place for what they become.
    #[inline(always)]
    fn widen<H: Half>(
        &mut self,
        matrix: &[H],
        all: usize,
        start: usize,
        columns: usize,
    ) -> (&[f32], &mut [MaybeUninit<f32>]) {
        let len = matrix.len() / all * columns;
        self.wide.resize(len, 0.0);
        let rows = matrix.chunks_exact(all);
        for (row, wide) in rows.zip(self.wide.chunks_exact_mut(columns)) {
            H::widen(&row[start..][..columns], wide);
        }
        self.rotated.clear();
        self.rotated.reserve(len);
        (&self.wide, &mut self.rotated.spare_capacity_mut()[..len])
    }

    /// Rounds the rotated piece into its place.
    ///
    /// # Safety
    ///
    /// Every number of the place that [`widen`](Self::widen) gave has been written.
    #[inline(always)]
    unsafe fn round<H: Half>(
        &mut self,
        output: &mut [MaybeUninit<H>],
        all: usize,
        start: usize,
        columns: usize,
    ) {
        // SAFETY: the place has the length of `wide`, and the caller has written it.
        unsafe { self.rotated.set_len(self.wide.len()) };
        let rows = self.rotated.chunks_exact(columns);
        for (rotated, row) in rows.zip(output.chunks_exact_mut(all)) {
            H::round(rotated, &mut row[start..][..columns]);
        }
    }
}
