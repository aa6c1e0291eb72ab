//! What every launch needs: the sizes that the kernels serve, the counts of cubes and units, empty results.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

/// Spans beyond this size go to the portable version, factor by factor.
///
/// A unit keeps a row or a column of a span in registers, and a cube keeps a span's matrix of f32 in shared memory:
/// 64 registers and 16 KiB at this size.
const LARGEST_SPAN: usize = 64;
/// Units of a cube, unless the kernel needs another count: a multiple of the 32 or 64 units that devices run in step.
/// Every device allows this many.
pub(super) const UNITS: usize = 128;
/// Bytes of shared memory that every device has: WebGPU promises no more.
const SHARED_MEMORY: usize = 16 << 10;
/// Numbers that one partial sum adds up.
///
/// Cutting a sum into parts gives work to more cubes than the columns alone would, and shortens the chains of
/// additions in f32. A second step adds up the parts.
pub(super) const PARTIAL_SUM: usize = 512;
/// The most cubes along an axis: WebGPU promises no more.
pub(super) const CUBES: usize = 65_535;

/// The sizes of a rotation that the kernels serve.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Butterfly factors.
    pub(super) m: usize,
    /// Numbers that a block couples.
    pub(super) b: usize,
    /// Neighbours that the rotation mixes, `b·2^(m−1)`.
    pub(super) span: usize,
    /// Number of spans.
    pub(super) count: usize,
}

impl Sizes {
    /// The sizes, if the kernels serve them: blocks in f32, spans of up to [`LARGEST_SPAN`], and no more spans than
    /// an axis has cubes.
    pub(super) fn of(blocks: &CubeTensor) -> Option<Self> {
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let span = b << (m - 1);
        let count = n * b / span;
        let served = blocks.dtype == DType::F32 && span <= LARGEST_SPAN && count <= CUBES;
        served.then_some(Self { m, b, span, count })
    }

    /// The spans that one cube works on, and how many units they need: one unit for each number of a span.
    ///
    /// Small spans share a cube, so that its units are not idle, as long as their matrices fit into [`SHARED_MEMORY`]
    /// with rows of [`line`](Self::line) numbers.
    pub(super) fn per_cube(self) -> (usize, usize) {
        let shared = SHARED_MEMORY / (4 * self.span * self.line());
        let spans = (UNITS / self.span).min(shared);
        (spans, spans * self.span)
    }

    /// The numbers from one row of a span's matrix to the next in shared memory. One more than a row has keeps units that walk
    /// along rows on different memory banks; a span of 64 would then take 16,640 bytes, 256 too many.
    pub(super) fn line(self) -> usize {
        match 4 * self.span * (self.span + 1) <= SHARED_MEMORY {
            true => self.span + 1,
            false => self.span,
        }
    }
}

/// The blocks that one cube of the Cayley kernels works on, if two copies of each fit its shared memory.
///
/// With rows of `b + 1` numbers of 4 bytes, two copies take `8·b·(b + 1)` bytes, so that blocks of up to 44×44
/// numbers fit. Each block has `b` units.
pub(super) fn blocks_per_cube(skew: &CubeTensor, b: usize, count: usize) -> Option<usize> {
    let per_cube = (SHARED_MEMORY / (8 * b * (b + 1))).min(UNITS / b);
    let served = skew.dtype == DType::F32 && per_cube > 0 && count.div_ceil(per_cube) <= CUBES;
    served.then_some(per_cube)
}

/// The precision of an operand as the kernels name it, if they serve the operand. A kernel is compiled for each of the three.
pub(super) fn element(operand: &CubeTensor) -> Option<ElemType> {
    let served = matches!(operand.dtype, DType::F32 | DType::F16 | DType::BF16);
    (served && is_indexed(&operand.shape(), operand.meta.strides()))
        .then(|| burn::backend::cubecl::dtype_to_storage_type(operand.dtype))
}

/// Whether the kernels, which count in 32 bits, reach every number of an operand and of a result of its shape.
fn is_indexed(shape: &[usize], strides: &[usize]) -> bool {
    let axes = shape.iter().zip(strides);
    let reach: usize = axes
        .map(|(&len, stride)| len.saturating_sub(1) * stride)
        .sum();
    reach.max(shape.iter().product()) <= u32::MAX as usize
}

/// A contiguous tensor whose numbers the kernel has yet to write, on the device of `like`.
pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

/// A grid of `x` by `y` cubes. The caller keeps both within [`CUBES`].
pub(super) fn cubes(x: usize, y: usize) -> CubeCount {
    CubeCount::Static(x as u32, y as u32, 1)
}

/// The units of a cube, in a line.
pub(super) fn units(count: usize) -> CubeDim {
    CubeDim::new_1d(count as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_a_cube_fit_the_memory_that_every_device_has() {
        for span in 1..=LARGEST_SPAN {
            let (m, b, count) = (1, span, 1);
            let sizes = Sizes { m, b, span, count };
            let (spans, units) = sizes.per_cube();
            assert!(spans > 0 && units <= UNITS, "{span}");
            assert!(4 * spans * span * sizes.line() <= SHARED_MEMORY, "{span}");
        }
    }

    #[test]
    fn operands_beyond_32_bits_are_not_served() {
        let most = u32::MAX as usize;
        assert!(is_indexed(&[most, 1], &[1, 1]));
        assert!(!is_indexed(&[most + 1, 1], &[1, 1]));
        // A narrow part of a wide matrix, and a row that is repeated.
        assert!(!is_indexed(&[1 << 20, 8], &[1 << 12, 1]));
        assert!(!is_indexed(&[1 << 20, 1 << 12], &[0, 1]));
        assert!(is_indexed(&[0, 8], &[8, 1]));
    }
}
