//! Rotations of matrices in half precision, computed in f32.
//!
//! Casting the whole matrix before the rotation, and the result afterwards, would each write a matrix to memory and read it again.
//! Here a piece that a cache holds is widened, rotated and rounded before the next one is read.

use std::mem::MaybeUninit;

use burn::tensor::{bf16, f16};
use half::slice::HalfFloatSliceExt;
use pulp::Simd;

use super::LARGEST_SPAN;
use super::butterfly::{Stored, Task};
use crate::ops::butterfly::Side;

/// How many columns a piece has, or a few less, where spans would be parted. On the right, where it has up to 16 rows, a piece and
/// what it becomes have 8 KiB each, so that both stay in a first-level cache, together with the rotation.
const PIECE: usize = 128;

// A piece has one span at least.
const _: () = assert!(LARGEST_SPAN <= PIECE);

/// A precision that matrices are stored in and not computed with.
trait Half: Stored<Real = f32> {
    /// Widens numbers to f32, which holds all of them exactly.
    fn widen(numbers: &[Self], wide: &mut [f32]);

    /// Rounds up to [`PIECE`] numbers to the nearest, and ties to the even ones.
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
            // The bits of `bf16::from_f32`, in fewer instructions.
            let bits = wide.to_bits();
            let high = match wide.is_nan() {
                true => bits >> 16 | 0x40,
                false => (bits + 0x7fff + (bits >> 16 & 1)) >> 16,
            };
            number.write(Self::from_bits(high as u16));
        }
    }
}

impl Half for f16 {
    fn widen(numbers: &[Self], wide: &mut [f32]) {
        numbers.convert_to_f32_slice(wide);
    }

    fn round(wide: &[f32], numbers: &mut [MaybeUninit<Self>]) {
        let mut rounded = [Self::ZERO; PIECE];
        let rounded = &mut rounded[..wide.len()];
        rounded.convert_from_f32_slice(wide);
        numbers.write_copy_of_slice(rounded);
    }
}

impl Stored for bf16 {
    type Real = f32;

    #[inline(always)]
    fn run<S: Simd>(simd: S, task: Task<'_, Self>) {
        in_pieces(simd, task);
    }
}

impl Stored for f16 {
    type Real = f32;

    #[inline(always)]
    fn run<S: Simd>(simd: S, task: Task<'_, Self>) {
        in_pieces(simd, task);
    }
}

/// Rotates some columns after the other.
#[inline(always)]
fn in_pieces<H: Half, S: Simd>(simd: S, task: Task<'_, H>) {
    let Task { s, side, .. } = task;
    let step = match side {
        Side::Left => PIECE,
        Side::Right => PIECE / s * s,
    };
    let mut piece = Piece::default();
    for start in (0..task.columns).step_by(step) {
        let columns = step.min(task.columns - start);
        let (rotation, scale) = match side {
            Side::Left => (task.rotation, task.scale.map(|scale| &scale[start..])),
            Side::Right => (&task.rotation[start * s..][..columns * s], task.scale),
        };
        let (matrix, output) = piece.widen(task.matrix, task.stride, start, columns);
        Task {
            output,
            matrix,
            stride: columns,
            rotation,
            s,
            columns,
            scale,
            side,
        }
        .run(simd);
        // SAFETY: every number of the piece has been written, since it has whole spans.
        unsafe { piece.round(task.output, task.columns, start, columns) };
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
