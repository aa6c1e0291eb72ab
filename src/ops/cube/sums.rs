//! Sums per output channel.
//!
//! Operands may have any strides and any of the kernels' precisions; sums run in f32.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::untile;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{PARTIAL_SUM, UNITS, cubes, empty, units};

/// Partial sums of `gradient ⊙ output` and of `gradient` per column.
///
/// The caller adds up the parts with Burn's own sum over the first axis.
///
/// # Shapes
///
/// - gradient, output: `[rows, columns]`
/// - results: `[parts, columns]`, with `parts = rows / 512`, rounded up
pub(super) fn column_sums(
    gradient: CubeTensor,
    output: CubeTensor,
    element: ElemType,
) -> (CubeTensor, CubeTensor) {
    let [rows, columns] = output.shape().dims::<2>();
    let parts = rows.div_ceil(PARTIAL_SUM);
    let (gradient, output) = (untile(gradient), untile(output));
    let products = empty(&output, [parts, columns], DType::F32);
    let sums = empty(&output, [parts, columns], DType::F32);
    column_sums_kernel::launch(
        &sums.client,
        cubes(columns.div_ceil(UNITS), parts),
        units(UNITS),
        gradient.into_tensor_arg(),
        output.into_tensor_arg(),
        products.clone().into_buffer_arg(),
        sums.clone().into_buffer_arg(),
        PARTIAL_SUM,
        element,
    );
    (products, sums)
}

/// Partial `Σ gradient ⊙ output` and `Σ gradient` per column, each over `rows` rows. Each unit sums one column.
///
/// Neighbouring units read neighbouring columns, so that a row that is contiguous in memory is read in whole lines.
/// Both operands are read once for both sums. The grid has a cube for every 128 columns along `x` and for every part
/// along `y`.
#[cube(launch)]
fn column_sums_kernel<F: Float>(
    gradient: &Tensor<F>,
    output: &Tensor<F>,
    products: &mut [f32],
    sums: &mut [f32],
    #[comptime] rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let column = ABSOLUTE_POS_X as usize;
    if column < gradient.shape(1) {
        let first = CUBE_POS_Y as usize * rows;
        let mut product = 0.0f32;
        let mut sum = 0.0f32;
        for local in 0..rows {
            let row = first + local;
            if row < gradient.shape(0) {
                let left = f32::cast_from(
                    gradient[row * gradient.stride(0) + column * gradient.stride(1)],
                );
                let right =
                    f32::cast_from(output[row * output.stride(0) + column * output.stride(1)]);
                product += left * right;
                sum += left;
            }
        }
        let place = CUBE_POS_Y as usize * gradient.shape(1) + column;
        products[place] = product;
        sums[place] = sum;
    }
}
