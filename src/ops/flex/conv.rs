//! The backward pass of a convolution with a rotated weight: both gradients from one product.
//!
//! A convolution multiplies *patches*, the `c·kh·kw` numbers of the input that the kernel covers at one place. The
//! gradient of a patch, `W'ᵀ·dy`, serves twice: added where the patch came from it is the gradient of the input, and its
//! products with the patch are `G` of the Gram backward. So there is no gradient of the weight, and since a task works
//! on a few rows of one image, neither the patches nor their gradients are ever in memory as a whole.
//!
//! With blocks that need not be orthogonal, the product is that of the weight without them, `Wᵀ·dy`. Its products with the patch are
//! the gradients of the blocks, and the blocks times it are the gradient of the patch.

use std::ops::Range;

use burn::tensor::ops::ConvOptions;
use gemm::{Parallelism, gemm};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gram::GramOfRows;
use super::real::Real;
use super::tile::LANES;

/// The most numbers of a patch that a task works on, if these are whole channels and whole spans: as many as make the product
/// worth its packing.
const PATCH_ROWS: usize = 256;

/// Numbers of patches that a task holds at a time. In f32 they and their gradients are 512 KiB.
const HELD: usize = 64 << 10;

/// The sizes of a convolution.
#[derive(Clone, Debug)]
pub(super) struct Convolution {
    /// Input channels of a group, `c`.
    channels: usize,
    /// Output channels of a group.
    outputs: usize,
    groups: usize,
    input: [usize; 2],
    output: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    /// Padding above and to the left; what is below and to the right follows from the sizes.
    padding: [usize; 2],
    dilation: [usize; 2],
}

impl Convolution {
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`
    /// - weight: `[o, c, kh, kw]`
    /// - output: `[n, o, h', w']`
    pub(super) fn new(
        [_, _, h, w]: [usize; 4],
        [o, channels, kh, kw]: [usize; 4],
        [_, _, h_out, w_out]: [usize; 4],
        options: &ConvOptions<2>,
    ) -> Self {
        Self {
            channels,
            outputs: o / options.groups,
            groups: options.groups,
            input: [h, w],
            output: [h_out, w_out],
            kernel: [kh, kw],
            stride: options.stride,
            padding: options.padding_begin(),
            dilation: options.dilation,
        }
    }

    /// Numbers of a patch, `d = c·kh·kw`.
    fn patch(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// Channels that a task works on: a multiple of the fewest whose numbers in a patch are whole spans, so that tasks have
    /// [`PATCH_ROWS`] or less, and all of them about as many. A patch is made of whole channels and of whole spans, so its last
    /// task has whole spans, too.
    fn channels_per_task(&self, span: usize) -> usize {
        let taps = self.kernel[0] * self.kernel[1];
        let fewest = (1..=self.channels)
            .find(|channels| (channels * taps).is_multiple_of(span))
            .unwrap_or(self.channels);
        let most = (PATCH_ROWS / (fewest * taps)).max(1);
        let units = self.channels.div_ceil(fewest);
        fewest * units.div_ceil(units.div_ceil(most))
    }

    /// Rows of the output that a task works on at a time, for this many numbers of a patch: as many as [`HELD`] allows, and
    /// if possible as many as make whole [`LANES`] of the Gram sums.
    fn lines_at_a_time(&self, rows: usize) -> usize {
        let [height, width] = self.output;
        let most = (HELD / (rows * width)).clamp(1, height);
        let whole = |lines: &usize| (lines * width).is_multiple_of(LANES);
        (1..=most).rev().find(whole).unwrap_or(most)
    }

    /// The channel and the place in the kernel of a number of a patch.
    #[inline(always)]
    fn tap(&self, row: usize) -> (usize, [usize; 2]) {
        let [kh, kw] = self.kernel;
        (row / (kh * kw), [row / kw % kh, row % kw])
    }

    /// The row of the input that row `tap` of the kernel reads for a row of the output; none in the padding.
    #[inline(always)]
    fn source(&self, output: usize, tap: usize) -> Option<usize> {
        let place = output * self.stride[0] + tap * self.dilation[0];
        let place = place.checked_sub(self.padding[0])?;
        (place < self.input[0]).then_some(place)
    }

    /// The columns of the output for which column `tap` of the kernel reads inside the input.
    #[inline(always)]
    fn inside(&self, tap: usize) -> Range<usize> {
        let (stride, offset) = (self.stride[1], tap * self.dilation[1]);
        let first = self.padding[1].saturating_sub(offset).div_ceil(stride);
        let end = (self.input[1] + self.padding[1])
            .saturating_sub(offset)
            .div_ceil(stride);
        let end = end.min(self.output[1]);
        first.min(end)..end
    }

    /// The column of the input that column `tap` of the kernel reads for the first of these columns of the output.
    #[inline(always)]
    fn start(&self, tap: usize, inside: &Range<usize>) -> usize {
        inside.start * self.stride[1] + tap * self.dilation[1] - self.padding[1]
    }
}

/// The gradient of the input, and `G` of every span.
///
/// Tasks are an image, a group and some of the channels, whatever the number of threads, and their parts of `G` are added
/// up in a fixed order.
///
/// # Shapes
///
/// - input: `[n, c·groups, h, w]`, contiguous; so is the first result
/// - weight: `[o, c, kh, kw]`, contiguous: rotated and scaled, or without the blocks where these are given
/// - gradient: `[n, o, h', w']`, contiguous
/// - blocks: `[d/s, s, s]`, contiguous; so is the second result
///
/// # Numerics
///
/// Gradients of patches are summed by `gemm`, and those of the input from them, in the operands' precision. `G` is
/// summed over a few rows at a time, as the Gram backward of a weight sums it, and these sums are added in f64.
pub(super) fn backward<E: Real>(
    [input, weight, gradient]: [&[E]; 3],
    blocks: Option<&[E]>,
    convolution: &Convolution,
    span: usize,
) -> (Vec<E>, Vec<f64>) {
    let Convolution {
        channels,
        outputs,
        groups,
        ..
    } = *convolution;
    let plane: usize = convolution.input.iter().product();
    let pixels: usize = convolution.output.iter().product();
    let (patch, per_task) = (convolution.patch(), convolution.channels_per_task(span));
    let rows_per_task = per_task * convolution.kernel.iter().product::<usize>();
    let arch = Arch::new();
    let mut input_gradient = vec![E::default(); input.len()];
    let tasks: Vec<_> = input_gradient
        .chunks_mut(channels * plane)
        .zip(input.chunks(channels * plane))
        .zip(gradient.chunks(outputs * pixels))
        .enumerate()
        .flat_map(|(index, ((input_gradient, input), gradient))| {
            let weight = &weight[index % groups * outputs * patch..][..outputs * patch];
            let parts = input_gradient.chunks_mut(per_task * plane);
            let parts = parts.zip(input.chunks(per_task * plane)).enumerate();
            parts.map(move |(task, (input_gradient, input))| Task {
                input_gradient,
                input,
                weight: &weight[task * rows_per_task..],
                gradient,
                blocks: blocks.map(|blocks| &blocks[task * rows_per_task * span..]),
                convolution,
                span,
            })
        })
        .collect();
    let grams: Vec<Vec<f64>> = tasks
        .into_par_iter()
        .map_init(Default::default, |memory, task| {
            arch.dispatch(Backward { task, memory })
        })
        .collect();
    let mut gram = vec![0.0; patch * span];
    let tasks = channels.div_ceil(per_task);
    for (index, partial) in grams.iter().enumerate() {
        let sums = &mut gram[index % tasks * rows_per_task * span..];
        for (sum, value) in sums.iter_mut().zip(partial) {
            *sum += value;
        }
    }
    (input_gradient, gram)
}

/// Some channels of one group of one image in [`backward`].
struct Task<'a, E> {
    /// `[channels, h, w]`, zeros.
    input_gradient: &'a mut [E],
    /// `[channels, h, w]`.
    input: &'a [E],
    /// The group's rows of the weight, `[outputs, d]`, from the first number of these channels on.
    weight: &'a [E],
    /// `[outputs, h', w']`.
    gradient: &'a [E],
    /// Blocks that need not be orthogonal, from that of the first number of these channels on.
    blocks: Option<&'a [E]>,
    convolution: &'a Convolution,
    span: usize,
}

/// A task, whose output is its part of `G`.
struct Backward<'a, E> {
    task: Task<'a, E>,
    /// What a task before has left, to be written over.
    memory: &'a mut [Vec<E>; 3],
}

impl<E: Real> WithSimd for Backward<'_, E> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f64> {
        let Task {
            input_gradient,
            input,
            weight,
            gradient,
            blocks,
            convolution,
            span,
        } = self.task;
        let [kernel_height, kernel_width] = convolution.kernel;
        let [height, width] = convolution.output;
        let plane: usize = convolution.input.iter().product();
        let rows = input.len() / plane * kernel_height * kernel_width;
        let held = convolution.lines_at_a_time(rows);
        let [patches, patch_gradients, multiplied] = self.memory;
        for memory in [&mut *patches, &mut *patch_gradients] {
            memory.resize(rows * held * width, E::default());
        }
        if blocks.is_some() {
            multiplied.resize(rows * held * width, E::default());
        }
        let mut gram = vec![0.0; rows * span];
        for first in (0..height).step_by(held) {
            let lines = first..height.min(first + held);
            let columns = lines.len() * width;
            let patches = &mut patches[..rows * columns];
            let patch_gradients = &mut patch_gradients[..rows * columns];
            unfold(patches, input, convolution, lines.clone());
            multiply(
                patch_gradients,
                weight,
                &gradient[first * width..],
                convolution,
                columns,
            );
            add_gram(simd, &mut gram, patches, patch_gradients, columns, span);
            let patch_gradients = match blocks {
                Some(blocks) => {
                    let multiplied = &mut multiplied[..rows * columns];
                    multiply_by_blocks(multiplied, blocks, patch_gradients, columns, span);
                    multiplied
                }
                None => patch_gradients,
            };
            fold(input_gradient, patch_gradients, convolution, lines);
        }
        gram
    }
}

/// Copies the patches of some rows of the output, with zeros where they reach into the padding.
///
/// # Shapes
///
/// - patches: `[channels·kh·kw, lines·w']`
/// - input: `[channels, h, w]`
#[inline(always)]
fn unfold<E: Real>(patches: &mut [E], input: &[E], convolution: &Convolution, lines: Range<usize>) {
    let ([h, w], width) = (convolution.input, convolution.output[1]);
    let columns = lines.len() * width;
    for (row, patches) in patches.chunks_exact_mut(columns).enumerate() {
        let (channel, [i, j]) = convolution.tap(row);
        let inside = convolution.inside(j);
        for (line, target) in lines.clone().zip(patches.chunks_exact_mut(width)) {
            let Some(source) = convolution.source(line, i).filter(|_| !inside.is_empty()) else {
                target.fill(E::default());
                continue;
            };
            let source = &input[(channel * h + source) * w..][convolution.start(j, &inside)..];
            target[..inside.start].fill(E::default());
            target[inside.end..].fill(E::default());
            let target = &mut target[inside.clone()];
            match convolution.stride[1] {
                1 => target.copy_from_slice(&source[..target.len()]),
                stride => {
                    for (target, &value) in target.iter_mut().zip(source.iter().step_by(stride)) {
                        *target = value;
                    }
                }
            }
        }
    }
}

/// Adds the gradients of the patches of some rows of the output to the input that they were copied from: the reverse of
/// [`unfold`].
///
/// # Shapes
///
/// - input_gradient: `[channels, h, w]`
/// - patch_gradients: `[channels·kh·kw, lines·w']`
#[inline(always)]
fn fold<E: Real>(
    input_gradient: &mut [E],
    patch_gradients: &[E],
    convolution: &Convolution,
    lines: Range<usize>,
) {
    let ([h, w], width) = (convolution.input, convolution.output[1]);
    let columns = lines.len() * width;
    for (row, gradients) in patch_gradients.chunks_exact(columns).enumerate() {
        let (channel, [i, j]) = convolution.tap(row);
        let inside = convolution.inside(j);
        for (line, source) in lines.clone().zip(gradients.chunks_exact(width)) {
            let Some(target) = convolution.source(line, i).filter(|_| !inside.is_empty()) else {
                continue;
            };
            let target =
                &mut input_gradient[(channel * h + target) * w..][convolution.start(j, &inside)..];
            let source = &source[inside.clone()];
            match convolution.stride[1] {
                1 => {
                    for (sum, &value) in target.iter_mut().zip(source) {
                        *sum += value;
                    }
                }
                stride => {
                    for (sum, &value) in target.iter_mut().step_by(stride).zip(source) {
                        *sum += value;
                    }
                }
            }
        }
    }
}

/// The gradients of patches, `W'ᵀ·dy`, on this thread alone.
///
/// # Shapes
///
/// - patch_gradients: `[rows, columns]`
/// - weight: `[outputs, rows]`, whose rows are `d` apart
/// - gradient: `[outputs, columns]`, whose rows are `h'·w'` apart
#[inline(always)]
fn multiply<E: Real>(
    patch_gradients: &mut [E],
    weight: &[E],
    gradient: &[E],
    convolution: &Convolution,
    columns: usize,
) {
    let (outputs, patch) = (convolution.outputs, convolution.patch());
    let pixels: usize = convolution.output.iter().product();
    let rows = patch_gradients.len() / columns;
    assert!(
        weight.len() >= (outputs - 1) * patch + rows
            && gradient.len() >= (outputs - 1) * pixels + columns,
        "the operands of the product reach beyond their slices"
    );
    // SAFETY: the assertion bounds what is read, and the result is a [rows, columns] matrix that is written as a whole.
    unsafe {
        gemm(
            rows,
            columns,
            outputs,
            patch_gradients.as_mut_ptr(),
            1,
            columns as isize,
            false,
            weight.as_ptr(),
            patch as isize,
            1,
            gradient.as_ptr(),
            1,
            pixels as isize,
            E::rounded(1.0),
            E::rounded(1.0),
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The products of blocks with what they meet, `R·u`, on this thread alone.
///
/// # Shapes
///
/// - products, u: `[rows, columns]`
/// - blocks: `[rows/s, s, s]`, and more that are not read
#[inline(always)]
fn multiply_by_blocks<E: Real>(
    products: &mut [E],
    blocks: &[E],
    u: &[E],
    columns: usize,
    span: usize,
) {
    let blocks = blocks.chunks_exact(span * span);
    let spans = products.chunks_exact_mut(span * columns);
    for ((products, u), block) in spans.zip(u.chunks_exact(span * columns)).zip(blocks) {
        // SAFETY: the slices are a [span, columns], a [span, span] and a [span, columns] matrix, and the first is written as a
        // whole.
        unsafe {
            gemm(
                span,
                columns,
                span,
                products.as_mut_ptr(),
                1,
                columns as isize,
                false,
                block.as_ptr(),
                1,
                span as isize,
                u.as_ptr(),
                1,
                columns as isize,
                E::rounded(1.0),
                E::rounded(1.0),
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// Adds the products of patches and their gradients to `G` of every span.
///
/// # Shapes
///
/// - gram: `[rows/s, s, s]`
/// - patches, patch_gradients: `[rows, columns]`
#[inline(always)]
fn add_gram<E: Real, S: Simd>(
    simd: S,
    gram: &mut [f64],
    patches: &[E],
    patch_gradients: &[E],
    columns: usize,
    span: usize,
) {
    let spans = patches.chunks_exact(span * columns);
    let spans = spans.zip(patch_gradients.chunks_exact(span * columns));
    for (gram, (lhs, rhs)) in gram.chunks_exact_mut(span * span).zip(spans) {
        let products = GramOfRows {
            gram,
            lhs,
            rhs,
            columns,
        };
        products.with_simd(simd);
    }
}
