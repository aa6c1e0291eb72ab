//! The rotation and the scale of one layer, as rows of its weight go through it and out of it again.

use std::ops::Range;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_boft::ops::{Blocks, Direction, Side};
use burn_boft::tensors::{from_values, values};
use burn_boft::value::Axis;
use faer::Mat;
use faer::linalg::solvers::DenseSolveCore;
use rayon::prelude::*;

use crate::changes::Step;

/// A block counts as singular where its largest entry times the largest of its inverse reaches this. Such an inverse is
/// mostly rounding errors.
const SINGULAR: f64 = 1e6;

/// The rotation and the scale of one layer, ready to use.
pub struct Rotation {
    /// One block for each span, or the factors where spans are long. None where blocks of one channel do not rotate.
    blocks: Option<Blocks>,
    scale: Option<Tensor<1>>,
    axis: Axis,
    dtype: DType,
    /// The first row of the weight that it turns.
    first: usize,
}

/// What undoes a rotation, apart from its scale: the inverses of the blocks of one factor, or none where the rotation itself does in
/// the other direction.
pub type Inverse = Option<Blocks>;

impl Rotation {
    /// Computes the blocks of a layer, once for all rows of a weight with so many inputs.
    pub fn new(step: &Step, d_input: usize, device: &Device) -> Result<Self, String> {
        let layer = step.layer;
        let blocks = step
            .adapter
            .rotation(layer, [d_input, step.rows.len()], device)
            .map_err(|mismatch| mismatch.to_string())?;
        let direction = direction(layer.axis());
        let blocks = blocks.map(|blocks| blocks.composed().stored_for(direction));
        let scale = layer.scale();
        let scale = scale.map(|scale| Tensor::from_data(scale.clone(), (device, scale.dtype())));
        Ok(Self {
            blocks,
            scale,
            axis: layer.axis(),
            dtype: layer.skew().dtype(),
            first: step.rows.start,
        })
    }

    /// Rows of the weight, counted from the first that it turns.
    fn own(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start - self.first..rows.end - self.first
    }

    /// The scale of these rows.
    fn scale(&self, rows: Range<usize>) -> Option<Tensor<1>> {
        self.scale.clone().map(|scale| scale.slice([rows]))
    }

    /// What undoes it.
    pub fn inverse(&self, is_orthogonal: bool, device: &Device) -> Result<Inverse, String> {
        let Some(blocks) = &self.blocks else {
            return Ok(None);
        };
        if !is_orthogonal {
            let inverses = invert(blocks, device)?;
            return Ok(Some(inverses.stored_for(direction(self.axis))));
        }
        let transposed = blocks.values().swap_dims(2, 3);
        let [m, ..] = transposed.dims();
        // The transpose of more factors has them in the other order, and where outputs are rotated, either direction is as
        // quick as the other.
        Ok(match (m, self.axis) {
            (1, Axis::Input) => Some(Blocks::from_values(transposed).stored_for(Direction::Back)),
            _ => None,
        })
    }

    /// Rows in the precision that they are computed in.
    fn widened(&self, weight: Tensor<2>) -> Tensor<2> {
        weight.cast(FloatDType::from(self.dtype))
    }

    /// Rows as they enter one of so many rotations: widened where they go through several, between which nothing is rounded.
    pub fn entered(&self, weight: Tensor<2>, count: usize) -> Tensor<2> {
        match count {
            1 => weight,
            _ => self.widened(weight),
        }
    }

    /// `v·R` for a row `v`: what a weight is multiplied by for the product of the rotated weight with `v`, but for the scale.
    /// A rotation of outputs changes no row.
    pub fn rotate_vector(&self, vector: Tensor<2>) -> Tensor<2> {
        match (&self.blocks, self.axis) {
            (Some(blocks), Axis::Input) => {
                in_f64(blocks).rotate(vector, Side::Right, Direction::Forward)
            }
            _ => vector,
        }
    }

    /// The products of the rotated rows with a vector, from a column of those of the rows with the vector that
    /// [`rotate_vector`](Self::rotate_vector) makes of it.
    pub fn turn_products(&self, products: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
        let rows = self.own(rows);
        let scale = self.scale(rows.clone());
        let products = match (&self.blocks, self.axis) {
            (Some(blocks), Axis::Output) => {
                let blocks = in_f64(&of_rows(blocks, &rows));
                blocks.rotate(products, Side::Left, Direction::Forward)
            }
            _ => products,
        };
        scaled(products, scale.map(|scale| scale.cast(FloatDType::F64)))
    }

    /// The rotated rows. Where a single operation makes them, they are rounded to the precision that they came in.
    pub fn apply(&self, weight: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
        let rows = self.own(rows);
        let scale = self.scale(rows.clone());
        match (&self.blocks, self.axis) {
            (Some(blocks), Axis::Input) => blocks.weight(weight, scale, Side::Right),
            (Some(blocks), Axis::Output) => {
                let blocks = of_rows(blocks, &rows);
                let weight = self.widened(weight);
                scaled(blocks.rotate(weight, Side::Left, Direction::Forward), scale)
            }
            (None, _) => scaled(self.widened(weight), scale),
        }
    }

    /// Takes the rotation out of rows. Where a single operation does, they are rounded to the precision that they came in.
    pub fn restore(&self, inverse: &Inverse, weight: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
        let rows = self.own(rows);
        let scale = self.scale(rows.clone()).map(Tensor::recip);
        match (&self.blocks, inverse, self.axis) {
            (Some(_), Some(blocks), Axis::Input) => blocks.weight(weight, scale, Side::Right),
            (Some(blocks), None, Axis::Input) => {
                let weight = scaled(self.widened(weight), scale);
                blocks.rotate(weight, Side::Right, Direction::Forward)
            }
            (Some(_), Some(blocks), Axis::Output) => {
                let weight = scaled(self.widened(weight), scale);
                of_rows(blocks, &rows).rotate(weight, Side::Left, Direction::Forward)
            }
            (Some(blocks), None, Axis::Output) => {
                let weight = scaled(self.widened(weight), scale);
                of_rows(blocks, &rows).rotate(weight, Side::Left, Direction::Back)
            }
            (None, ..) => scaled(self.widened(weight), scale),
        }
    }
}

/// The direction of the products with the weight.
fn direction(axis: Axis) -> Direction {
    match axis {
        Axis::Input => Direction::Back,
        Axis::Output => Direction::Forward,
    }
}

/// The blocks that rotate these rows among themselves, where the outputs are rotated. The rows are whole spans.
fn of_rows(blocks: &Blocks, rows: &Range<usize>) -> Blocks {
    let [.., block_size] = blocks.values().dims();
    blocks.part(rows.start / block_size..rows.end / block_size)
}

/// The same blocks, for products in f64.
fn in_f64(blocks: &Blocks) -> Blocks {
    Blocks::from_values(blocks.values().cast(FloatDType::F64))
}

fn scaled(weight: Tensor<2>, scale: Option<Tensor<1>>) -> Tensor<2> {
    match scale {
        Some(scale) => weight * scale.unsqueeze_dim::<2>(1),
        None => weight,
    }
}

/// The inverses of the blocks of one factor.
fn invert(blocks: &Blocks, device: &Device) -> Result<Blocks, String> {
    let squares = blocks.values();
    let ([m, n, b, _], dtype) = (squares.dims(), squares.dtype());
    if m != 1 {
        return Err(format!("has {m} factors of blocks that are not orthogonal"));
    }
    let numbers = values(&squares.into_data());
    let blocks = numbers.par_chunks_exact(b * b);
    let blocks: Vec<_> = blocks.map(|block| inverse(block, b)).collect();
    if let Some(index) = blocks.iter().position(Option::is_none) {
        return Err(format!(
            "cannot be restored: block {index} of the Neumann polynomial has no inverse"
        ));
    }
    let inverses = blocks.into_iter().flatten().flatten().collect();
    let data = from_values(inverses, [1, n, b, b], dtype);
    let inverses = Tensor::from_data(data, (device, dtype));
    Ok(Blocks::from_values(inverses))
}

/// The inverse of a block, row by row. None of a singular one, whose inverse rounding would turn into a huge one.
fn inverse(block: &[f64], b: usize) -> Option<Vec<f64>> {
    // `f64::max` ignores NaN.
    let larger = |largest: f64, x: &f64| match x.abs() > largest || x.is_nan() {
        true => x.abs(),
        false => largest,
    };
    let inverse = Mat::from_fn(b, b, |row, column| block[row * b + column])
        .partial_piv_lu()
        .inverse();
    let inverse: Vec<_> = (0..b * b).map(|at| inverse[(at / b, at % b)]).collect();
    let [block, largest] = [block, &inverse].map(|numbers| numbers.iter().fold(0.0, larger));
    let condition = block * largest;
    (condition < SINGULAR).then_some(inverse)
}
