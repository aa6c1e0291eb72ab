//! GPU kernels: one CubeCL source for CUDA, ROCm, Metal, Vulkan and WebGPU.
//!
//! Operands of f32, f16 and bf16, spans up to [`LARGEST_SPAN`], blocks in f32. Everything else takes the
//! portable versions.

mod blocks;
mod spans;

use burn::backend::ops::FloatTensorOps;
use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::kernel::{into_contiguous, untile};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

use super::{BoftBackend, Side, butterfly, cast, cayley, linear};

/// Spans beyond this size go to the portable version, factor by factor.
const LARGEST_SPAN: usize = 64;
/// Units of a cube, where the kernel does not fix them.
const UNITS: usize = 128;
/// Bytes of shared memory that every device has.
const SHARED_MEMORY: usize = 16 << 10;
/// Rows of activations that a cube rotates at once, and rows or columns that it multiplies at once.
const ROTATED_ROWS: usize = 32;
const MULTIPLIED_ROWS: usize = 8;
/// Terms of one partial sum.
const PARTIAL_SUM: usize = 512;
/// The most cubes along an axis.
const CUBES: usize = 65_535;

/// The sizes of a rotation that the kernels serve.
#[derive(Clone, Copy)]
struct Sizes {
    m: usize,
    b: usize,
    /// Neighbours that the rotation mixes, `b·2^(m−1)`.
    span: usize,
    /// Number of spans.
    count: usize,
}

impl Sizes {
    /// The sizes, where the kernels serve them.
    fn of(blocks: &CubeTensor) -> Option<Self> {
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let span = b << (m - 1);
        let count = n * b / span;
        let served = blocks.dtype == DType::F32 && span <= LARGEST_SPAN && count <= CUBES;
        served.then_some(Self { m, b, span, count })
    }

    /// Spans of one cube, and the units that they take.
    fn per_cube(self) -> (usize, usize) {
        let shared = SHARED_MEMORY / (4 * self.span * (self.span + 1));
        let spans = (UNITS / self.span).min(shared).max(1);
        (spans, spans * self.span)
    }
}

/// Blocks of one cube of the Cayley kernels, where two of each fit its shared memory.
fn blocks_per_cube(skew: &CubeTensor, b: usize, count: usize) -> Option<usize> {
    let per_cube = (SHARED_MEMORY / (8 * b * (b + 1))).min(UNITS / b);
    let served = skew.dtype == DType::F32 && per_cube > 0 && count.div_ceil(per_cube) <= CUBES;
    served.then_some(per_cube)
}

/// How the kernels name the precision of an operand, where they serve it.
fn element(operand: &CubeTensor) -> Option<ElemType> {
    matches!(operand.dtype, DType::F32 | DType::F16 | DType::BF16)
        .then(|| burn::backend::cubecl::dtype_to_storage_type(operand.dtype))
}

fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), dtype)
}

fn cubes(x: usize, y: usize) -> CubeCount {
    CubeCount::Static(x as u32, y as u32, 1)
}

fn units(count: usize) -> CubeDim {
    CubeDim::new_1d(count as u32)
}

impl BoftBackend for CubeBackend {
    fn boft_cayley(skew: FloatTensor<Self>, block_size: usize) -> FloatTensor<Self> {
        let [m, n, _] = skew.shape().dims::<3>();
        let Some(per_cube) = blocks_per_cube(&skew, block_size, m * n) else {
            return cayley::exact::<Self>(skew, block_size);
        };
        let skew = into_contiguous(skew);
        let blocks = empty(&skew, [m, n, block_size, block_size], DType::F32);
        blocks::cayley_kernel::launch(
            &blocks.client,
            cubes((m * n).div_ceil(per_cube), 1),
            units(per_cube * block_size),
            skew.into_buffer_arg(),
            blocks.clone().into_buffer_arg(),
            block_size,
            per_cube,
        );
        blocks
    }

    fn boft_cayley_backward(
        blocks: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [m, n, b, _] = blocks.shape().dims::<4>();
        let per_cube = blocks_per_cube(&blocks, b, m * n);
        let Some(per_cube) = per_cube.filter(|_| gradient.dtype == DType::F32) else {
            return cayley::backward::<Self>(blocks, gradient);
        };
        let (blocks, gradient) = (into_contiguous(blocks), into_contiguous(gradient));
        let skew = empty(&blocks, [m, n, b * (b - 1) / 2], DType::F32);
        blocks::cayley_backward_kernel::launch(
            &skew.client,
            cubes((m * n).div_ceil(per_cube), 1),
            units(per_cube * b),
            blocks.into_buffer_arg(),
            gradient.into_buffer_arg(),
            skew.clone().into_buffer_arg(),
            b,
            per_cube,
        );
        skew
    }

    fn boft_butterfly(
        matrix: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
        transpose: bool,
    ) -> FloatTensor<Self> {
        match (Sizes::of(&blocks), element(&matrix)) {
            (Some(sizes), Some(element)) => {
                rotate(matrix, blocks, (sizes, element), None, side, transpose)
            }
            _ => butterfly::apply::<Self>(matrix, blocks, side, transpose),
        }
    }

    fn boft_weight(
        weight: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        match (Sizes::of(&blocks), element(&weight)) {
            (Some(sizes), Some(element)) => {
                let scale = into_contiguous(cast::<Self>(scale, DType::F32));
                let transpose = side == Side::Right;
                rotate(
                    weight,
                    blocks,
                    (sizes, element),
                    Some(scale),
                    side,
                    transpose,
                )
            }
            _ => linear::weight::<Self>(weight, blocks, scale, side),
        }
    }

    fn boft_block_gradient(
        lhs: FloatTensor<Self>,
        rhs: FloatTensor<Self>,
        blocks: FloatTensor<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let element = element(&lhs).filter(|_| lhs.dtype == rhs.dtype);
        let (Some(sizes), Some(element)) = (Sizes::of(&blocks), element) else {
            return butterfly::block_gradient::<Self>(lhs, rhs, blocks, side);
        };
        let partial = gram(lhs, rhs, sizes, element, side);
        let blocks = into_contiguous(blocks);
        let gradient = empty(&blocks, blocks.shape(), DType::F32);
        let (per_cube, width) = sizes.per_cube();
        spans::block_gradient_kernel::launch(
            &gradient.client,
            cubes(sizes.count.div_ceil(per_cube), 1),
            units(width),
            partial.into_buffer_arg(),
            blocks.into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            sizes.b,
            sizes.m,
            per_cube,
        );
        gradient
    }

    fn boft_channel_sums(
        gradient: FloatTensor<Self>,
        output: FloatTensor<Self>,
        side: Side,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [rows, columns] = output.shape().dims::<2>();
        let chunks = rows.div_ceil(PARTIAL_SUM);
        let served = side == Side::Left && gradient.dtype == output.dtype && chunks <= CUBES;
        let Some(element) = element(&output).filter(|_| served) else {
            return linear::channel_sums::<Self>(gradient, output, side);
        };
        let (gradient, output) = (untile(gradient), untile(output));
        let products = empty(&output, [chunks, columns], DType::F32);
        let sums = empty(&output, [chunks, columns], DType::F32);
        spans::column_sums_kernel::launch(
            &sums.client,
            cubes(columns.div_ceil(UNITS), chunks),
            units(UNITS),
            gradient.into_tensor_arg(),
            output.into_tensor_arg(),
            products.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            PARTIAL_SUM,
            element,
        );
        let total = |partial: CubeTensor| match chunks {
            1 => super::reshape::<Self, 1>(partial, [columns]),
            _ => super::reshape::<Self, 1>(Self::float_sum_dim(partial, 0), [columns]),
        };
        (total(products), total(sums))
    }
}

/// `op(R)·t` or `t·op(R)`, times a scale per output channel of a weight.
fn rotate(
    matrix: CubeTensor,
    blocks: CubeTensor,
    (sizes, element): (Sizes, ElemType),
    scale: Option<CubeTensor>,
    side: Side,
    transpose: bool,
) -> CubeTensor {
    let [rows, columns] = matrix.shape().dims::<2>();
    let matrix = untile(matrix);
    let rotations = compose(blocks, sizes, transpose).into_buffer_arg();
    let scale = scale.map(CubeTensor::into_buffer_arg).into();
    let output = empty(&matrix, [rows, columns], matrix.dtype);
    let (client, matrix) = (output.client.clone(), matrix.into_tensor_arg());
    let result = output.clone().into_tensor_arg();
    match side {
        Side::Left => spans::rotate_rows_kernel::launch(
            &client,
            cubes(columns.div_ceil(UNITS), sizes.count),
            units(UNITS),
            matrix,
            rotations,
            scale,
            result,
            sizes.span,
            element,
        ),
        Side::Right => {
            let width = UNITS / sizes.span * sizes.span;
            spans::rotate_columns_kernel::launch(
                &client,
                cubes(columns.div_ceil(width), rows.div_ceil(ROTATED_ROWS)),
                units(width),
                matrix,
                rotations,
                scale,
                result,
                sizes.span,
                width,
                ROTATED_ROWS,
                element,
            )
        }
    }
    output
}

/// `op(R)` of every span, a `[count, span, span]` tensor.
fn compose(blocks: CubeTensor, sizes: Sizes, transpose: bool) -> CubeTensor {
    let blocks = into_contiguous(blocks);
    let Sizes { m, b, span, count } = sizes;
    let rotations = empty(&blocks, [count, span, span], DType::F32);
    let (per_cube, width) = sizes.per_cube();
    spans::compose_kernel::launch(
        &rotations.client,
        cubes(count.div_ceil(per_cube), 1),
        units(width),
        blocks.into_buffer_arg(),
        rotations.clone().into_buffer_arg(),
        b,
        m,
        per_cube,
        transpose,
    );
    rotations
}

/// Partial sums of `G = lhsᵀ·rhs` per span, a `[parts, count, span, span]` tensor.
fn gram(
    lhs: CubeTensor,
    rhs: CubeTensor,
    sizes: Sizes,
    element: ElemType,
    side: Side,
) -> CubeTensor {
    let [rows, columns] = lhs.shape().dims::<2>();
    let (summed, rotated, channels) = match side {
        Side::Left => (columns, rows, 0),
        Side::Right => (rows, columns, 1),
    };
    let Sizes { span, count, .. } = sizes;
    let width = UNITS / span * span;
    // Fixed sums, but for what would exceed the cubes of an axis.
    let tiles = (PARTIAL_SUM / MULTIPLIED_ROWS).max(summed.div_ceil(MULTIPLIED_ROWS * CUBES));
    let parts = summed.div_ceil(tiles * MULTIPLIED_ROWS);
    let (lhs, rhs) = (untile(lhs), untile(rhs));
    let partial = empty(&lhs, [parts, count, span, span], DType::F32);
    spans::gram_kernel::launch(
        &partial.client,
        cubes(rotated.div_ceil(width), parts),
        units(width),
        lhs.into_tensor_arg(),
        rhs.into_tensor_arg(),
        partial.clone().into_buffer_arg(),
        tiles as u32,
        span,
        width,
        MULTIPLIED_ROWS,
        channels,
        element,
    );
    partial
}
