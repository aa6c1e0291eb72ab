//! Rotating a weight with an adapter, and undoing that.

use std::ops::{Range, RangeInclusive};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_boft::ops::{Blocks, Direction, Side};
use burn_boft::tensors::{from_values, values};
use burn_boft::value::Axis;
use faer::Mat;
use faer::linalg::solvers::DenseSolveCore;
use rayon::prelude::*;

use crate::changes::Step;
use crate::distance::Difference;
use crate::pieces::Turn;

/// A block counts as singular where its largest entry times the largest of its inverse reaches this. Such an inverse is
/// mostly rounding errors.
const SINGULAR: f64 = 1e6;
/// The scales that can be divided by. Multiplying by a smaller number, or by the reciprocal of a larger one, moves that number away
/// from zero.
const SCALES: RangeInclusive<f64> = 1e-30..=1e30;

/// `W' = diag(s)·W·Rᵀ` in PyTorch's orientation, row by row, or `diag(s)·R·W` where the outputs are rotated; of several
/// rotations one after the other, without rounding to the precision of the weight in between.
pub struct Forward {
    device: Device,
}

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

impl Rotation {
    fn new(step: &Step, d_input: usize, device: &Device) -> Result<Self, String> {
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
    fn inverse(&self, is_orthogonal: bool, device: &Device) -> Result<Inverse, String> {
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
    fn entered(&self, weight: Tensor<2>, count: usize) -> Tensor<2> {
        match count {
            1 => weight,
            _ => self.widened(weight),
        }
    }

    /// The rotated rows. Where a single operation makes them, they are rounded to the precision that they came in.
    fn apply(&self, weight: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
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

fn scaled(weight: Tensor<2>, scale: Option<Tensor<1>>) -> Tensor<2> {
    match scale {
        Some(scale) => weight * scale.unsqueeze_dim::<2>(1),
        None => weight,
    }
}

impl Forward {
    pub fn new() -> Self {
        Self {
            device: Device::flex(),
        }
    }
}

impl Turn for Forward {
    type Rotations = Vec<Rotation>;

    fn prepare(&self, steps: &[Step], d_input: usize) -> Result<Vec<Rotation>, String> {
        let rotations = steps
            .iter()
            .map(|step| Rotation::new(step, d_input, &self.device));
        rotations.collect()
    }

    fn turn(
        &self,
        rotations: &Vec<Rotation>,
        numbers: TensorData,
        rows: Range<usize>,
    ) -> Result<TensorData, String> {
        let dtype = numbers.dtype();
        let weight = tensor(numbers, &self.device);
        Ok(rounded(rotated(rotations, weight, &rows), dtype))
    }
}

/// Rows rotated by one rotation after the other, which are not rounded in between.
fn rotated(rotations: &[Rotation], weight: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    rotations.iter().fold(weight, |weight, rotation| {
        rotation.apply(rotation.entered(weight, rotations.len()), rows)
    })
}

/// Rows of a weight.
fn tensor(numbers: TensorData, device: &Device) -> Tensor<2> {
    let dtype = numbers.dtype();
    Tensor::<2>::from_data(numbers, (device, dtype))
}

fn rounded(weight: Tensor<2>, dtype: DType) -> TensorData {
    weight.cast(FloatDType::from(dtype)).into_data()
}

/// `W = diag(1/s)·W'·(Rᵀ)⁻¹`: takes rotations out, the last one first, and measures how far merging the result again is from
/// `W'`.
pub struct Backward {
    device: Device,
    /// Of every weight, how far the merged numbers are from those that come out when the restored ones are merged again.
    differences: Mutex<Vec<Difference>>,
}

/// The rotations that are taken out of a weight.
pub struct Undo {
    rotations: Vec<Rotation>,
    inverses: Vec<Inverse>,
    /// Which of the weights it is.
    weight: usize,
}

/// What undoes a rotation, apart from its scale: the inverses of the blocks of one factor, or none where the rotation itself does in
/// the other direction.
type Inverse = Option<Blocks>;

impl Backward {
    pub fn new() -> Self {
        Self {
            device: Device::flex(),
            differences: Mutex::default(),
        }
    }

    /// How far the merged weights are from those that come out when the restored weights are merged again.
    pub fn difference(&self) -> Difference {
        let mut all = Difference::default();
        for weight in self.lock().iter() {
            all.next();
            all.include(weight);
        }
        all
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Difference>> {
        // Whoever panicked has changed nothing by halves.
        self.differences
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a rotation out of rows. Where a single operation does, they are rounded to the precision that they came in.
    fn restore(
        rotation: &Rotation,
        inverse: &Inverse,
        weight: Tensor<2>,
        rows: &Range<usize>,
    ) -> Tensor<2> {
        let rows = rotation.own(rows);
        let scale = rotation.scale(rows.clone()).map(Tensor::recip);
        match (&rotation.blocks, inverse, rotation.axis) {
            (Some(_), Some(blocks), Axis::Input) => blocks.weight(weight, scale, Side::Right),
            (Some(blocks), None, Axis::Input) => {
                let weight = scaled(rotation.widened(weight), scale);
                blocks.rotate(weight, Side::Right, Direction::Forward)
            }
            (Some(_), Some(blocks), Axis::Output) => {
                let weight = scaled(rotation.widened(weight), scale);
                of_rows(blocks, &rows).rotate(weight, Side::Left, Direction::Forward)
            }
            (Some(blocks), None, Axis::Output) => {
                let weight = scaled(rotation.widened(weight), scale);
                of_rows(blocks, &rows).rotate(weight, Side::Left, Direction::Back)
            }
            (None, ..) => scaled(rotation.widened(weight), scale),
        }
    }
}

impl Turn for Backward {
    type Rotations = Undo;

    fn prepare(&self, steps: &[Step], d_input: usize) -> Result<Undo, String> {
        let (mut rotations, mut inverses) = (Vec::new(), Vec::new());
        for step in steps {
            let scales = step.layer.scale().map(values).unwrap_or_default();
            let lost = scales
                .iter()
                .position(|scale| !SCALES.contains(&scale.abs()));
            if let Some(row) = lost {
                return Err(format!(
                    "was scaled by {:.1e} in row {}, which cannot be undone",
                    scales[row],
                    step.rows.start + row
                ));
            }
            let rotation = Rotation::new(step, d_input, &self.device)?;
            inverses.push(rotation.inverse(step.adapter.is_orthogonal(), &self.device)?);
            rotations.push(rotation);
        }
        let mut differences = self.lock();
        differences.push(Difference::default());
        let weight = differences.len() - 1;
        Ok(Undo {
            rotations,
            inverses,
            weight,
        })
    }

    fn turn(
        &self,
        undo: &Undo,
        numbers: TensorData,
        rows: Range<usize>,
    ) -> Result<TensorData, String> {
        let dtype = numbers.dtype();
        let merged = tensor(numbers, &self.device);
        let undone = undo.rotations.iter().zip(&undo.inverses);
        let restored = undone.rfold(merged.clone(), |weight, (rotation, inverse)| {
            let weight = rotation.entered(weight, undo.rotations.len());
            Self::restore(rotation, inverse, weight, &rows)
        });
        let restored = restored.cast(FloatDType::from(dtype));
        let again = rounded(rotated(&undo.rotations, restored.clone(), &rows), dtype);
        let mut difference = Difference::default();
        difference.widen(&again, &merged.into_data());
        self.lock()[undo.weight].include(&difference);
        Ok(restored.into_data())
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
