//! The blocks of a rotation, and what is computed with them.

use burn::backend::Dispatch;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{FloatDType, Tensor};

use super::backend::{BoftBackend, is_listed};
use super::butterfly::{Direction, Side};
use super::precision::{reshaped, widen};
use super::product::{product, with_bias};
use super::route::Route;
use super::{butterfly, cayley, linear};

/// The longest span that [`Blocks::composed`] makes one block of. Longer ones take fewer multiplications factor by factor.
const LARGEST_COMPOSED: usize = 64;

/// The blocks of a rotation `R = F_{m−1} ··· F_1 · F_0`, a `[m, n, b, b]` tensor.
///
/// Factor `F_i` multiplies each of its `n` blocks by the `b` numbers that the block couples: two halves of `b/2`
/// neighbours at distance `2^i` halves, so that the blocks of `F_0` lie side by side. `R` is block-diagonal in
/// *spans* of `b·2^(m−1)` neighbours.
///
/// With more than one factor, `b` has to be even and `2^(m−1)` has to divide `n`; every method that needs the
/// factors panics otherwise.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_boft::ops::{Blocks, Direction, Side};
///
/// # let device = Device::flex();
/// // Two factors of four blocks of 2, each of one number: a rotation of 8 features.
/// let skew = Tensor::<3>::full([2, 4, 1], 0.1, &device);
/// let blocks = Blocks::cayley(skew, 2);
/// let x = Tensor::<2>::ones([3, 8], &device);
/// let rotated = blocks.rotate(x.clone(), Side::Right, Direction::Forward);
/// let back = blocks.rotate(rotated, Side::Right, Direction::Back);
/// assert!((back - x).abs().max().into_scalar::<f32>() < 1e-6);
/// ```
///
/// # References
///
/// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, section 4.
#[derive(Debug, Clone)]
pub struct Blocks {
    values: Tensor<4>,
    /// Whether the rotation is orthogonal, so that the Gram backward holds.
    orthogonal: bool,
}

impl Blocks {
    /// The exact Cayley map of packed skew-symmetric matrices, `C = (I − Q)(I + Q)⁻¹`.
    ///
    /// # Shapes
    ///
    /// - skew: a `[m, n, b(b−1)/2]` tensor, the strict upper triangles row by row
    ///
    /// # Numerics
    ///
    /// Half precision is widened to f32. `I + Q` has symmetric part `I`, so the inverse needs no pivoting and exists
    /// for every finite `Q`. In f32, `max|RᵀR − I|` stays below 1e-6 for `‖Q‖₂` up to 10.
    ///
    /// # Panics
    ///
    /// - If `b < 2`, there is no factor, or the last axis is not `b(b−1)/2`.
    ///
    /// # References
    ///
    /// Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, section 3.
    pub fn cayley(skew: Tensor<3>, block_size: usize) -> Self {
        cayley::assert_packed(skew.dims(), block_size);
        let skew = widen(skew);
        let listed = is_listed(skew.device().as_dispatch());
        let skew = skew.into_dispatch();
        let values = match listed {
            true => <Dispatch as BoftBackend>::boft_cayley(skew, block_size),
            false => cayley::exact::<Dispatch>(skew, block_size),
        };
        Self {
            values: Tensor::from_dispatch(values),
            orthogonal: true,
        }
    }

    /// PEFT's Cayley-Neumann polynomial of packed skew-symmetric matrices: `I` for fewer than two terms,
    /// `I + 2Q` for two, else `I + 2Q + ··· + 2Q^(k−1) + Q^k` with `k = max(terms − 1, 3)`.
    ///
    /// It approximates the transpose of the exact map and is not orthogonal, so that products with these blocks have a
    /// backward pass of their own.
    ///
    /// # Shapes
    ///
    /// - skew: a `[m, n, b(b−1)/2]` tensor, the strict upper triangles row by row
    ///
    /// # Panics
    ///
    /// - If `b < 2`, there is no factor, or the last axis is not `b(b−1)/2`.
    ///
    /// # References
    ///
    /// Qiu et al., *Orthogonal Finetuning Made Scalable*; PEFT's `tuners/oft/layer.py`.
    pub fn neumann(skew: Tensor<3>, block_size: usize, terms: usize) -> Self {
        Self::polynomial(skew, block_size, &cayley::neumann_coefficients(terms))
    }

    /// A polynomial of packed skew-symmetric matrices, `Σ coefficients[k]·Q^k`.
    ///
    /// Most polynomials are not orthogonal, so that products with these blocks have a backward pass of their own.
    ///
    /// # Shapes
    ///
    /// - skew: a `[m, n, b(b−1)/2]` tensor, the strict upper triangles row by row
    ///
    /// # Panics
    ///
    /// - If `b < 2`, there is no factor, or the last axis is not `b(b−1)/2`.
    pub fn polynomial(skew: Tensor<3>, block_size: usize, coefficients: &[f64]) -> Self {
        cayley::assert_packed(skew.dims(), block_size);
        let skew = widen(skew).into_dispatch();
        let values = cayley::polynomial::<Dispatch>(skew, block_size, coefficients);
        Self {
            values: Tensor::from_dispatch(values),
            orthogonal: false,
        }
    }

    /// Blocks of these numbers, which need not be orthogonal: the inverses of a polynomial's, for one.
    ///
    /// # Shapes
    ///
    /// - values: a `[m, n, b, b]` tensor
    ///
    /// # Numerics
    ///
    /// Half precision is widened to f32.
    ///
    /// # Panics
    ///
    /// - If there is no factor, or blocks are not square or smaller than 2 × 2.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::{Device, Tensor};
    /// use burn_boft::ops::{Blocks, Direction, Side};
    ///
    /// # let device = Device::flex();
    /// // One block, which is not orthogonal.
    /// let blocks = Blocks::from_values(Tensor::from_data([[[[1.0, 2.0], [0.0, 3.0]]]], &device));
    /// let x = Tensor::<2>::from_data([[5.0, 7.0]], &device);
    /// let product = blocks.rotate(x, Side::Right, Direction::Forward);
    /// assert_eq!(product.into_data().iter::<f32>().collect::<Vec<_>>(), [5.0, 31.0]);
    /// ```
    pub fn from_values(values: Tensor<4>) -> Self {
        let [m, _, rows, columns] = values.dims();
        assert!(
            m > 0 && rows == columns && rows > 1,
            "from_values: {m} factors of {rows} × {columns} blocks"
        );
        Self {
            values: widen(values),
            orthogonal: false,
        }
    }

    /// Repeats the only block of each factor `block_num` times, as PEFT's block sharing does.
    ///
    /// # Panics
    ///
    /// - If a factor has more than one block.
    pub fn share(self, block_num: usize) -> Self {
        let [m, n, b, _] = self.values.dims();
        assert_eq!(n, 1, "share: {n} blocks per factor, where one is shared");
        Self {
            values: self.values.expand([m, block_num, b, b]),
            ..self
        }
    }

    /// The same rotation as one factor, with a block for each span. Spans of more than 64 numbers stay factors.
    ///
    /// Every product with the rotation multiplies the factors out first, so it pays to do so once for blocks that are used
    /// many times and not trained. A block is then a whole span: `2^(m−1)/m` times as many numbers.
    ///
    /// # Numerics
    ///
    /// On the CPU the factors are multiplied in f64 and rounded once, here as in every product, so that products with the
    /// result have the same bits.
    pub fn composed(self) -> Self {
        let [m, n, b, _] = self.values.dims();
        self.assert_rotates("composed", n * b);
        let span = b << (m - 1);
        if m == 1 || span > LARGEST_COMPOSED {
            return self;
        }
        Self {
            values: self.spans().reshape([1, n * b / span, span, span]),
            ..self
        }
    }

    /// The same rotation, stored for products in this direction. For [`Direction::Back`], a single factor is stored transposed,
    /// so that kernels on the CPU need not transpose it for every product. Several factors stay as they are, and so does everything
    /// for [`Direction::Forward`].
    ///
    /// Products in the other direction give the same numbers, and take longer.
    pub fn stored_for(self, direction: Direction) -> Self {
        let shape = self.values.dims();
        let [m, n, b, _] = shape;
        if m > 1 || direction == Direction::Forward {
            return self;
        }
        // No view of the transpose is flat, so that the numbers are copied in their new order.
        let flat = self.values.swap_dims(2, 3).reshape([n * b * b]);
        Self {
            values: flat.reshape(shape).swap_dims(2, 3),
            ..self
        }
    }

    /// Replaces the blocks where `mask` is one by the identity, as multiplicative dropout does.
    ///
    /// A replaced block gets no gradient.
    ///
    /// # Shapes
    ///
    /// - mask: a `[m, n]` tensor of zeros and ones
    ///
    /// # Panics
    ///
    /// - If the mask does not have a number for every block.
    ///
    /// # References
    ///
    /// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*; PEFT's
    /// `MultiplicativeDropoutLayer` in `tuners/boft/layer.py`.
    pub fn replace_by_identity(self, mask: Tensor<2>) -> Self {
        let [m, n, b, _] = self.values.dims();
        assert_eq!(
            mask.dims(),
            [m, n],
            "replace_by_identity: the mask of [{m}, {n}] blocks"
        );
        let mask = mask.reshape([m, n, 1, 1]);
        let identity =
            Tensor::<2>::eye(b, &self.values.device()).cast(FloatDType::from(self.values.dtype()));
        let kept = self.values * (mask.clone().neg() + 1.0);
        Self {
            values: kept + mask * identity.unsqueeze::<4>(),
            ..self
        }
    }

    /// The rotation of some neighbouring spans alone: blocks `range` of every factor.
    ///
    /// # Panics
    ///
    /// - If the blocks are not those of whole spans, `2^(m−1)` blocks each.
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let [m, ..] = self.values.dims();
        let each = 1 << (m - 1);
        assert!(
            range.start.is_multiple_of(each) && range.end.is_multiple_of(each),
            "part: blocks {range:?} are not whole spans of {each}"
        );
        Self {
            values: self.values.clone().slice_dim(1, range),
            ..*self
        }
    }

    /// The blocks, a `[m, n, b, b]` tensor.
    pub fn values(&self) -> Tensor<4> {
        self.values.clone()
    }

    /// Rotates a matrix: `R·t` from the left, `t·R` from the right, or with `Rᵀ` to rotate back.
    ///
    /// # Shapes
    ///
    /// - matrix: `[d, columns]` for [`Side::Left`], `[rows, d]` for [`Side::Right`]; so is the result
    ///
    /// # Numerics
    ///
    /// Runs in the precision of the blocks, f32 or f64, and is rounded to that of the matrix once, at the end.
    ///
    /// # Panics
    ///
    /// - If `d` is not `n·b`.
    pub fn rotate(&self, matrix: Tensor<2>, side: Side, direction: Direction) -> Tensor<2> {
        self.assert_rotates("rotate", side.rotated(matrix.dims()));
        let operation = self.operation(&matrix);
        let (matrix, blocks) = (matrix.into_dispatch(), self.values().into_dispatch());
        Tensor::from_dispatch(match operation {
            Operation::Rotation => {
                <Dispatch as BoftBackend>::boft_butterfly(matrix, blocks, side, direction)
            }
            Operation::BlockDiagonal => {
                <Dispatch as BoftBackend>::boft_block_diagonal(matrix, blocks, side, direction)
            }
            Operation::Portable => butterfly::apply::<Dispatch>(matrix, blocks, side, direction),
        })
    }

    /// Rotates and scales a weight: `R·W·diag(s)` from the left, `diag(s)·W·Rᵀ` from the right.
    ///
    /// The right is for weights that have their outputs in rows, such as those of PyTorch and of convolutions.
    ///
    /// # Shapes
    ///
    /// - weight: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
    /// - scale: `[o]`
    ///
    /// # Numerics
    ///
    /// Runs in the precision of the blocks, f32 or f64, and is rounded to that of the weight once, at the end.
    /// Since the gradient of the scale divides by it, 1e-20 is added to a scale of less than 1e-30 in magnitude.
    ///
    /// # Panics
    ///
    /// - If `d` is not `n·b`.
    /// - If the scale does not have a number for every output.
    pub fn weight(&self, weight: Tensor<2>, scale: Option<Tensor<1>>, side: Side) -> Tensor<2> {
        let Some(scale) = scale else {
            return self.rotate(weight, side, side.weight_direction());
        };
        self.assert_rotates("weight", side.rotated(weight.dims()));
        assert_outputs("weight", "scale", &scale, side.other(weight.dims()));
        let operation = self.operation(&weight);
        let weight = weight.into_dispatch();
        let (blocks, scale) = (self.values().into_dispatch(), scale.into_dispatch());
        Tensor::from_dispatch(match operation {
            Operation::Rotation => {
                <Dispatch as BoftBackend>::boft_weight(weight, blocks, scale, side)
            }
            _ => linear::weight::<Dispatch>(weight, blocks, scale, side),
        })
    }

    /// Applies a rotated linear layer, `y = (x·R·W) ⊙ s + bias`, by a route that [`route`](super::route()) may
    /// have chosen.
    ///
    /// # Shapes
    ///
    /// - input: `[…, d]`
    /// - weight: `[d, o]`
    /// - scale, bias: `[o]`
    /// - result: `[…, o]`
    ///
    /// # Numerics
    ///
    /// In f32 both routes stay within 6e-7 of the exact result, relative to its largest number, in the tests. The
    /// weight route rounds the rotated weight to the precision of the weight.
    ///
    /// # Memory
    ///
    /// For its backward pass the weight route keeps the input, and the output where a scale is trained. The weight is rotated
    /// again there. On the CPU the product rotates the weight piece by piece and never writes all of it to memory, except
    /// where each thread would have too few rows for that. A frozen weight gets no gradient, so none of its shape is formed.
    ///
    /// # Panics
    ///
    /// - If `d` is not `n·b`, or the last axis of the input is not `d`.
    /// - If the scale or the bias does not have a number for every output.
    pub fn linear<const D: usize>(
        &self,
        input: Tensor<D>,
        weight: Tensor<2>,
        scale: Option<Tensor<1>>,
        bias: Option<Tensor<1>>,
        route: Route,
    ) -> Tensor<D> {
        let [d, d_output] = weight.dims();
        let mut shape = input.shape();
        self.assert_rotates("linear", d);
        assert_eq!(
            shape[D - 1],
            d,
            "linear: the input {:?} does not fit the weight [{d}, {d_output}]",
            input.dims()
        );
        for (name, vector) in [("scale", &scale), ("bias", &bias)] {
            if let Some(vector) = vector {
                assert_outputs("linear", name, vector, d_output);
            }
        }
        let rows = shape.num_elements() / d;
        shape[D - 1] = d_output;
        let input = reshaped(input, [rows, d]);
        let output = match route {
            Route::Activation => {
                let rotated = self.rotate(input, Side::Right, Direction::Forward);
                match scale {
                    Some(scale) => scaled(product(rotated, weight, None), scale, bias),
                    None => product(rotated, weight, bias),
                }
            }
            Route::Weight => self.linear_by_weight(input, weight, scale, bias),
        };
        reshaped(output, shape)
    }

    /// Applies a convolution with a rotated weight, `diag(s)·W·Rᵀ` for the weight as an `[o, c·kh·kw]` matrix.
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`
    /// - weight: `[o, c, kh, kw]`, where `c·kh·kw = d`
    /// - scale, bias: `[o]`
    /// - result: `[n, o, h', w']`
    ///
    /// # Numerics
    ///
    /// The rotated weight is rounded to the precision of the weight.
    ///
    /// # Memory
    ///
    /// For its backward pass it keeps the input, and the output where a scale is trained. On the CPU no gradient of the shape
    /// of the weight is formed for a frozen one; other backends form it.
    ///
    /// # Panics
    ///
    /// - If `c·kh·kw` is not `n·b`, or the input does not have `c·groups` channels.
    /// - If the scale or the bias does not have a number for every output.
    pub fn conv2d(
        &self,
        input: Tensor<4>,
        weight: Tensor<4>,
        scale: Option<Tensor<1>>,
        bias: Option<Tensor<1>>,
        options: ConvOptions<2>,
    ) -> Tensor<4> {
        let [o, c, kh, kw] = weight.dims();
        let [_, channels, _, _] = input.dims();
        self.assert_rotates("conv2d", c * kh * kw);
        assert_eq!(
            channels,
            c * options.groups,
            "conv2d: the input {:?} does not fit the weight {:?} in {} groups",
            input.dims(),
            weight.dims(),
            options.groups
        );
        for (name, vector) in [("scale", &scale), ("bias", &bias)] {
            if let Some(vector) = vector {
                assert_outputs("conv2d", name, vector, o);
            }
        }
        match (self.operation(&weight), scale) {
            (Operation::Rotation, scale) => {
                Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_conv2d(
                    input.into_dispatch(),
                    weight.into_dispatch(),
                    self.values().into_dispatch(),
                    self.or_ones(scale, o).into_dispatch(),
                    bias.map(Tensor::into_dispatch).into(),
                    options,
                ))
            }
            (Operation::BlockDiagonal, None) => {
                Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_block_diagonal_conv2d(
                    input.into_dispatch(),
                    weight.into_dispatch(),
                    self.values().into_dispatch(),
                    bias.map(Tensor::into_dispatch).into(),
                    options,
                ))
            }
            (_, scale) => {
                let rotated = self.weight(weight.reshape([o, c * kh * kw]), scale, Side::Right);
                let rotated = rotated.reshape([o, c, kh, kw]);
                burn::tensor::module::conv2d(input, rotated, bias, options)
            }
        }
    }

    /// The rotation of each span, a `[d/span, span, span]` tensor with `span = b·2^(m−1)`.
    pub fn spans(&self) -> Tensor<3> {
        let [m, n, b, _] = self.values.dims();
        self.assert_rotates("spans", n * b);
        let (span, dtype) = (b << (m - 1), self.values.dtype());
        let identity = Tensor::<2>::eye(span, &self.values.device());
        let identity = identity.cast(FloatDType::from(dtype));
        let identity = identity.repeat_dim(0, n * b / span);
        let spans = self.rotate(identity, Side::Left, Direction::Forward);
        spans.reshape([n * b / span, span, span])
    }

    /// The weight route, `x·(R·W·diag(s)) + bias`, for rows of input that are already a matrix.
    ///
    /// In training with a scale and blocks that are not orthogonal, and on backends without [`BoftBackend`], the weight is
    /// rotated and multiplied in separate operations, which Burn differentiates.
    ///
    /// # Shapes
    ///
    /// - input: `[rows, d]`
    /// - weight: `[d, o]`
    /// - scale, bias: `[o]`
    /// - result: `[rows, o]`
    fn linear_by_weight(
        &self,
        input: Tensor<2>,
        weight: Tensor<2>,
        scale: Option<Tensor<1>>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<2> {
        let operands = |input: Tensor<2>, weight: Tensor<2>| {
            let blocks = self.values().into_dispatch();
            (input.into_dispatch(), weight.into_dispatch(), blocks)
        };
        let dispatched = |bias: Option<Tensor<1>>| bias.map(Tensor::into_dispatch).into();
        match (self.operation(&weight), scale) {
            (Operation::Rotation, scale) => {
                let scale = self.or_ones(scale, weight.dims()[1]).into_dispatch();
                let (input, weight, blocks) = operands(input, weight);
                let bias = dispatched(bias);
                Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_linear(
                    input, weight, blocks, scale, bias,
                ))
            }
            (Operation::BlockDiagonal, None) => {
                let (input, weight, blocks) = operands(input, weight);
                let bias = dispatched(bias);
                Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_block_diagonal_linear(
                    input, weight, blocks, bias,
                ))
            }
            (_, scale) => with_bias(input.matmul(self.weight(weight, scale, Side::Left)), bias),
        }
    }

    /// The scale, or one of ones, which leaves the weight as it is, bit for bit, and asks for no gradient.
    fn or_ones(&self, scale: Option<Tensor<1>>, outputs: usize) -> Tensor<1> {
        let options = (&self.values.device(), self.values.dtype());
        scale.unwrap_or_else(|| Tensor::ones([outputs], options))
    }

    /// How a product with this operand runs.
    ///
    /// The backward pass of a rotation takes `Rᵀ·R = I` for granted, so blocks that are not orthogonal, such as those of a
    /// polynomial, have another one. It serves one factor, which is all that they are used with.
    fn operation<const D: usize>(&self, operand: &Tensor<D>) -> Operation {
        let device = operand.device();
        let differentiates = device.is_autodiff() || self.values.device().is_autodiff();
        let one_factor = self.values.dims()[0] == 1;
        match is_listed(device.as_dispatch()) {
            true if self.orthogonal || !differentiates => Operation::Rotation,
            true if one_factor => Operation::BlockDiagonal,
            _ => Operation::Portable,
        }
    }

    /// Panics unless the factors rotate an axis of this length.
    ///
    /// With more than one factor, blocks couple halves of `b/2` numbers, so `b` has to be even; and a span holds
    /// `2^(m−1)` blocks, so that number has to divide `n`.
    fn assert_rotates(&self, operation: &str, axis: usize) {
        let [m, n, b, _] = self.values.dims();
        assert_eq!(
            axis,
            n * b,
            "{operation}: {n} blocks of {b} rotate an axis of {}, not of {axis}",
            n * b
        );
        let pairs = u32::try_from(m - 1)
            .ok()
            .and_then(|stages| 1usize.checked_shl(stages))
            .is_some_and(|blocks_per_span| n % blocks_per_span == 0);
        assert!(
            m == 1 || b % 2 == 0 && pairs,
            "{operation}: {n} blocks of {b} do not form {m} butterfly factors"
        );
    }
}

/// How a product with blocks runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    /// As one of [`BoftBackend`]'s operations with a rotation.
    Rotation,
    /// As one of those with blocks that need not be orthogonal.
    BlockDiagonal,
    /// In Burn's operations, which Burn differentiates.
    Portable,
}

/// Panics unless a vector has a number for every output.
fn assert_outputs(operation: &str, name: &str, vector: &Tensor<1>, outputs: usize) {
    let [count] = vector.dims();
    assert_eq!(
        count, outputs,
        "{operation}: the {name} is a [{count}] tensor, for {outputs} outputs"
    );
}

/// `z ⊙ s + bias` per output channel.
///
/// # Shapes
///
/// - output: `[rows, o]`; so is the result
/// - scale, bias: `[o]`
fn scaled(output: Tensor<2>, scale: Tensor<1>, bias: Option<Tensor<1>>) -> Tensor<2> {
    match is_listed(output.device().as_dispatch()) {
        true => Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_scaled(
            output.into_dispatch(),
            scale.into_dispatch(),
            bias.map(Tensor::into_dispatch).into(),
        )),
        false => {
            let scale = scale.cast(FloatDType::from(output.dtype()));
            with_bias(output * scale.unsqueeze::<2>(), bias)
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Two factors of four blocks of 2, which rotate 8 numbers.
    fn blocks() -> Blocks {
        Blocks::cayley(zeros([2, 4, 1]), 2)
    }

    fn zeros<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::zeros(shape, &Device::flex())
    }

    #[test]
    #[should_panic = "blocks of 3 have 3 numbers, but the skew tensor is [1, 2, 6]"]
    fn a_skew_tensor_of_another_block_size_is_refused() {
        Blocks::cayley(zeros([1, 2, 6]), 3);
    }

    #[test]
    #[should_panic = "rotate: 4 blocks of 2 rotate an axis of 8, not of 6"]
    fn a_matrix_of_another_width_is_not_rotated() {
        blocks().rotate(zeros([3, 6]), Side::Right, Direction::Forward);
    }

    #[test]
    #[should_panic = "spans: 3 blocks of 2 do not form 2 butterfly factors"]
    fn blocks_without_a_partner_form_no_second_factor() {
        Blocks::cayley(zeros([2, 3, 1]), 2).spans();
    }

    #[test]
    #[should_panic = "rotate: 4 blocks of 3 do not form 2 butterfly factors"]
    fn blocks_that_have_no_halves_form_no_second_factor() {
        let blocks = Blocks::cayley(zeros([2, 4, 3]), 3);
        blocks.rotate(zeros([1, 12]), Side::Right, Direction::Forward);
    }

    #[test]
    #[should_panic = "weight: the scale is a [4] tensor, for 5 outputs"]
    fn a_scale_of_another_length_is_refused() {
        blocks().weight(zeros([8, 5]), Some(zeros([4])), Side::Left);
    }

    #[test]
    #[should_panic = "weight: the scale is a [8] tensor, for 5 outputs"]
    fn a_scale_of_the_inputs_is_refused() {
        blocks().weight(zeros([5, 8]), Some(zeros([8])), Side::Right);
    }

    #[test]
    #[should_panic = "linear: the input [2, 4] does not fit the weight [8, 5]"]
    fn an_input_of_another_width_is_refused_although_its_numbers_would_fill_a_row() {
        blocks().linear(zeros([2, 4]), zeros([8, 5]), None, None, Route::Weight);
    }

    #[test]
    #[should_panic = "linear: the bias is a [1] tensor, for 5 outputs"]
    fn a_bias_of_one_number_is_not_spread_over_the_outputs() {
        let bias = Some(zeros([1]));
        blocks().linear(zeros([2, 8]), zeros([8, 5]), None, bias, Route::Activation);
    }

    #[test]
    #[should_panic = "share: 4 blocks per factor, where one is shared"]
    fn several_blocks_cannot_be_shared() {
        blocks().share(8);
    }

    #[test]
    #[should_panic = "replace_by_identity: the mask of [2, 4] blocks"]
    fn a_mask_of_another_shape_is_refused() {
        blocks().replace_by_identity(zeros([4, 2]));
    }
}
