//! What every launch needs: the sizes that the kernels serve, the counts of cubes and units, empty results.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

/// Spans beyond this size go to the portable version, factor by factor.
const LARGEST_SPAN: usize = 64;
/// Units of a cube, unless the kernel needs another count.
pub(super) const UNITS: usize = 128;
/// Bytes of shared memory that every device has.
const SHARED_MEMORY: usize = 16 << 10;
/// Numbers that one partial sum adds up.
pub(super) const PARTIAL_SUM: usize = 512;
/// The most cubes along an axis.
pub(super) const CUBES: usize = 65_535;

/// The sizes of a rotation that the kernels serve.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) b: usize,
    /// Neighbours that the rotation mixes, `b·2^(m−1)`.
    pub(super) span: usize,
    /// Number of spans.
    pub(super) count: usize,
}

impl Sizes {
    /// The sizes, if the kernels serve them.
    pub(super) fn of(blocks: &CubeTensor) -> Option<Self> {
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let span = b << (m - 1);
        let count = n * b / span;
        let served = blocks.dtype == DType::F32 && span <= LARGEST_SPAN && count <= CUBES;
        served.then_some(Self { m, b, span, count })
    }

    /// The spans that one cube works on, and how many units they need.
    pub(super) fn per_cube(self) -> (usize, usize) {
        let shared = SHARED_MEMORY / (4 * self.span * (self.span + 1));
        let spans = (UNITS / self.span).min(shared).max(1);
        (spans, spans * self.span)
    }
}

/// The blocks that one cube of the Cayley kernels works on, if two copies of each fit its shared memory.
pub(super) fn blocks_per_cube(skew: &CubeTensor, b: usize, count: usize) -> Option<usize> {
    let per_cube = (SHARED_MEMORY / (8 * b * (b + 1))).min(UNITS / b);
    let served = skew.dtype == DType::F32 && per_cube > 0 && count.div_ceil(per_cube) <= CUBES;
    served.then_some(per_cube)
}

/// The precision of an operand as the kernels name it, if they serve it.
pub(super) fn element(operand: &CubeTensor) -> Option<ElemType> {
    matches!(operand.dtype, DType::F32 | DType::F16 | DType::BF16)
        .then(|| burn::backend::cubecl::dtype_to_storage_type(operand.dtype))
}

pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

pub(super) fn cubes(x: usize, y: usize) -> CubeCount {
    CubeCount::Static(x as u32, y as u32, 1)
}

pub(super) fn units(count: usize) -> CubeDim {
    CubeDim::new_1d(count as u32)
}
