//! The blocks of a rotation, and what is computed with them.

use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Tensor};

use super::backend::{BoftBackend, is_listed};
use super::butterfly::{Direction, Side};
use super::precision::widen;
use super::route::Route;
use super::{butterfly, cayley, linear};

/// The blocks of a rotation.
///
/// `R = F_{m−1} ··· F_1 · F_0`, where factor `i` couples half-blocks at distance `2^i`.
///
/// # References
///
/// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, section 4.
#[derive(Debug, Clone)]
pub struct Blocks {
    values: Tensor<4>,
    orthogonal: bool,
}

impl Blocks {
    /// The exact Cayley map of packed skew-symmetric matrices.
    ///
    /// # Shapes
    ///
    /// - skew: a `[m, n, b(b−1)/2]` tensor, the strict upper triangles row by row
    ///
    /// # Numerics
    ///
    /// Half precision is widened to f32. `I + Q` has symmetric part `I`, so the inverse needs no pivoting
    /// and exists for every finite `Q`.
    ///
    /// # Panics
    ///
    /// If the last axis is not `b(b−1)/2`, or `b < 2`.
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

    /// PEFT's Cayley-Neumann polynomial of packed skew-symmetric matrices.
    ///
    /// See [`Cayley::Neumann`](crate::Cayley::Neumann) for the polynomial. Not orthogonal, so products
    /// with these blocks take Burn's own differentiation.
    ///
    /// # Panics
    ///
    /// If the last axis is not `b(b−1)/2`, or `b < 2`.
    pub fn neumann(skew: Tensor<3>, block_size: usize, terms: usize) -> Self {
        Self::polynomial(skew, block_size, &cayley::neumann_coefficients(terms))
    }

    /// A polynomial of packed skew-symmetric matrices, `Σ coefficients[k]·Q^k`.
    ///
    /// Taken to be no rotation, so products with these blocks take Burn's own differentiation.
    ///
    /// # Panics
    ///
    /// If the last axis is not `b(b−1)/2`, or `b < 2`.
    pub fn polynomial(skew: Tensor<3>, block_size: usize, coefficients: &[f64]) -> Self {
        cayley::assert_packed(skew.dims(), block_size);
        let skew = widen(skew).into_dispatch();
        let values = cayley::polynomial::<Dispatch>(skew, block_size, coefficients);
        Self {
            values: Tensor::from_dispatch(values),
            orthogonal: false,
        }
    }

    /// Repeats a single stored block per factor over `block_num` blocks, as block sharing does.
    pub fn share(self, block_num: usize) -> Self {
        let [m, _, b, _] = self.values.dims();
        Self {
            values: self.values.expand([m, block_num, b, b]),
            ..self
        }
    }

    /// Replaces the blocks where `mask` is one by the identity.
    ///
    /// `mask` is a `[m, n]` tensor of zeros and ones. A replaced block gets no gradient.
    pub fn replace_by_identity(self, mask: Tensor<2>) -> Self {
        let [m, n, b, _] = self.values.dims();
        let mask = mask.reshape([m, n, 1, 1]);
        let identity =
            Tensor::<2>::eye(b, &self.values.device()).cast(FloatDType::from(self.values.dtype()));
        let kept = self.values * (mask.clone().neg() + 1.0);
        Self {
            values: kept + mask * identity.unsqueeze::<4>(),
            ..self
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
    /// # Panics
    ///
    /// If `d` is not `n·b`.
    pub fn rotate(&self, matrix: Tensor<2>, side: Side, direction: Direction) -> Tensor<2> {
        self.assert_axis(side.rotated(matrix.dims()), "rotate");
        let kernel = self.has_gram_backward(&matrix);
        let (matrix, blocks) = (matrix.into_dispatch(), self.values().into_dispatch());
        Tensor::from_dispatch(match kernel {
            true => <Dispatch as BoftBackend>::boft_butterfly(matrix, blocks, side, direction),
            false => butterfly::apply::<Dispatch>(matrix, blocks, side, direction),
        })
    }

    /// Rotates and scales a weight: `R·W·diag(s)` on the left, `diag(s)·W·Rᵀ` on the right.
    ///
    /// # Shapes
    ///
    /// - weight: `[d, o]` for [`Side::Left`], `[o, d]` for [`Side::Right`]; so is the result
    /// - scale: `[o]`
    ///
    /// # Numerics
    ///
    /// The rotation of a half-precision weight runs in f32 and is rounded once, at the end.
    ///
    /// # Panics
    ///
    /// If `d` is not `n·b`.
    pub fn weight(&self, weight: Tensor<2>, scale: Option<Tensor<1>>, side: Side) -> Tensor<2> {
        let Some(scale) = scale else {
            return self.rotate(weight, side, side.weight_direction());
        };
        self.assert_axis(side.rotated(weight.dims()), "weight");
        let kernel = self.has_gram_backward(&weight);
        let weight = weight.into_dispatch();
        let (blocks, scale) = (self.values().into_dispatch(), scale.into_dispatch());
        Tensor::from_dispatch(match kernel {
            true => <Dispatch as BoftBackend>::boft_weight(weight, blocks, scale, side),
            false => linear::weight::<Dispatch>(weight, blocks, scale, side),
        })
    }

    /// Applies a rotated linear layer, `y = (x·R·W) ⊙ s + bias`, by the route that [`route`] chooses.
    ///
    /// # Shapes
    ///
    /// - input: `[…, d]`
    /// - weight: `[d, o]`
    /// - scale, bias: `[o]`
    /// - result: `[…, o]`
    ///
    /// # Memory
    ///
    /// For its backward pass the weight route keeps the input, the output where a scale is trained, and the
    /// rotated weight where that is no larger than the two, `d·o ≤ T·(d + o)`; a larger one is computed again.
    /// It never forms a weight-shaped gradient of a frozen weight.
    ///
    /// # Panics
    ///
    /// If `d` is not `n·b`.
    pub fn linear<const D: usize>(
        &self,
        input: Tensor<D>,
        weight: Tensor<2>,
        scale: Option<Tensor<1>>,
        bias: Option<Tensor<1>>,
        route: Route,
    ) -> Tensor<D> {
        let [d, d_output] = weight.dims();
        self.assert_axis(d, "linear");
        let mut shape = input.shape();
        let rows = shape.num_elements() / d;
        shape[D - 1] = d_output;
        let input = input.reshape([rows, d]);
        let output = match route {
            Route::Activation => {
                let rotated = self.rotate(input, Side::Right, Direction::Forward);
                let Some(scale) = scale else {
                    return burn::tensor::module::linear(rotated, weight, bias).reshape(shape);
                };
                let output = burn::tensor::module::linear(rotated, weight, None);
                let scale = scale.cast(FloatDType::from(output.dtype()));
                with_bias(output * scale.unsqueeze::<2>(), bias)
            }
            Route::Weight => self.linear_by_weight(input, weight, scale, bias),
        };
        output.reshape(shape)
    }

    /// The rotation of each span of `b·2^(m−1)` neighbours, a `[d/span, span, span]` tensor.
    ///
    /// `R` is block-diagonal in them.
    pub fn spans(&self) -> Tensor<3> {
        Tensor::from_dispatch(butterfly::compose::<Dispatch>(
            &self.values().into_dispatch(),
        ))
    }

    fn linear_by_weight(
        &self,
        input: Tensor<2>,
        weight: Tensor<2>,
        scale: Option<Tensor<1>>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<2> {
        if !self.has_gram_backward(&weight) {
            return with_bias(input.matmul(self.weight(weight, scale, Side::Left)), bias);
        }
        // A scale of ones leaves the weight as it is, bit for bit, and asks for no gradient.
        let [_, d_output] = weight.dims();
        let options = (&self.values.device(), self.values.dtype());
        let scale = scale.unwrap_or_else(|| Tensor::ones([d_output], options));
        Tensor::from_dispatch(<Dispatch as BoftBackend>::boft_linear(
            input.into_dispatch(),
            weight.into_dispatch(),
            self.values().into_dispatch(),
            scale.into_dispatch(),
            bias.map(Tensor::into_dispatch).into(),
        ))
    }

    fn has_gram_backward(&self, operand: &Tensor<2>) -> bool {
        self.orthogonal && is_listed(operand.device().as_dispatch())
    }

    fn assert_axis(&self, axis: usize, operation: &str) {
        let [_, n, b, _] = self.values.dims();
        assert_eq!(
            axis,
            n * b,
            "{operation}: {n} blocks of {b} rotate an axis of {}, not of {axis}",
            n * b
        );
    }
}

fn with_bias(output: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    match bias {
        Some(bias) => output + bias.unsqueeze::<2>(),
        None => output,
    }
}
