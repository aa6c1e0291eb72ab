//! Rotating a weight with an adapter, and undoing that.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_boft::ops::{Blocks, Direction, Side};
use burn_boft::tensors::{from_values, values};
use burn_boft::value::Axis;
use faer::Mat;
use faer::linalg::solvers::DenseSolveCore;

use crate::changes::Step;
use crate::distance::Difference;
use crate::pieces::Turn;

/// A block counts as singular where its largest entry times the largest of its inverse reaches this. Such an inverse is
/// mostly rounding errors.
const SINGULAR: f64 = 1e6;

/// `W' = diag(s)·W·Rᵀ` in PyTorch's orientation, row by row, or `diag(s)·R·W` where the outputs are rotated; of several
/// rotations one after the other, without rounding to the precision of the weight in between.
pub struct Forward {
    device: Device,
}

/// The rotation and the scale of one layer, ready to use.
pub struct Rotation {
    /// None where blocks of one channel do not rotate.
    blocks: Option<Blocks>,
    scale: Option<Tensor<1>>,
    axis: Axis,
    block_size: usize,
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
        let scale = layer.scale();
        let scale = scale.map(|scale| Tensor::from_data(scale.clone(), (device, scale.dtype())));
        Ok(Self {
            blocks,
            scale,
            axis: layer.axis(),
            block_size: layer.block_size(),
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

    /// The blocks that rotate these rows among themselves, where the outputs are rotated. The rows are whole spans.
    fn of_rows(&self, blocks: &Blocks, rows: &Range<usize>) -> Blocks {
        blocks.part(rows.start / self.block_size..rows.end / self.block_size)
    }

    fn apply(&self, weight: Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
        let (weight, rows) = (weight.cast(FloatDType::from(self.dtype)), self.own(rows));
        let weight = match (&self.blocks, self.axis) {
            (Some(blocks), Axis::Output) => {
                self.of_rows(blocks, &rows)
                    .rotate(weight, Side::Left, Direction::Forward)
            }
            _ => weight,
        };
        let blocks = self.blocks.as_ref().filter(|_| self.axis == Axis::Input);
        match (blocks, self.scale(rows)) {
            (Some(blocks), scale) => blocks.weight(weight, scale, Side::Right),
            (None, Some(scale)) => weight * scale.unsqueeze_dim::<2>(1),
            (None, None) => weight,
        }
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
        let rotations = rotations.iter();
        let weight = rotations.fold(weight, |weight, rotation| rotation.apply(weight, &rows));
        Ok(rounded(weight, dtype))
    }
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
    rotations: Vec<(Rotation, Inverse)>,
    /// Which of the weights it is.
    weight: usize,
}

/// What undoes a rotation: the transposed inverses of its blocks, or none where it is orthogonal and undoes itself.
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

    fn restore(
        rotation: &Rotation,
        inverse: &Inverse,
        weight: Tensor<2>,
        rows: &Range<usize>,
    ) -> Tensor<2> {
        let rows = rotation.own(rows);
        let weight = weight.cast(FloatDType::from(rotation.dtype));
        let weight = match rotation.scale(rows.clone()) {
            Some(scale) => weight / scale.unsqueeze_dim::<2>(1),
            None => weight,
        };
        match (&rotation.blocks, inverse) {
            (None, _) => weight,
            (Some(blocks), _) if rotation.axis == Axis::Output => {
                let blocks = rotation.of_rows(blocks, &rows);
                blocks.rotate(weight, Side::Left, Direction::Back)
            }
            (Some(blocks), None) | (Some(_), Some(blocks)) => {
                blocks.rotate(weight, Side::Right, Direction::Forward)
            }
        }
    }
}

impl Turn for Backward {
    type Rotations = Undo;

    fn prepare(&self, steps: &[Step], d_input: usize) -> Result<Undo, String> {
        let mut rotations = Vec::new();
        for step in steps {
            if let Some(scale) = step.layer.scale()
                && let Some(row) = scale.iter::<f64>().position(|scale| scale == 0.0)
            {
                return Err(format!(
                    "was scaled by zero in row {row}: nothing of that row is left to restore"
                ));
            }
            let rotation = Rotation::new(step, d_input, &self.device)?;
            let inverse = match &rotation.blocks {
                Some(blocks) if !step.adapter.is_orthogonal() => {
                    Some(invert(blocks, &self.device)?)
                }
                _ => None,
            };
            rotations.push((rotation, inverse));
        }
        let mut differences = self.lock();
        differences.push(Difference::default());
        let weight = differences.len() - 1;
        Ok(Undo { rotations, weight })
    }

    fn turn(
        &self,
        undo: &Undo,
        numbers: TensorData,
        rows: Range<usize>,
    ) -> Result<TensorData, String> {
        let dtype = numbers.dtype();
        let rotations = || undo.rotations.iter();
        let merged = tensor(numbers.clone(), &self.device);
        let restored = rotations().rfold(merged, |weight, (rotation, inverse)| {
            Self::restore(rotation, inverse, weight, &rows)
        });
        let restored = rounded(restored, dtype);
        let again = tensor(restored.clone(), &self.device);
        let again = rotations().fold(again, |weight, (rotation, _)| rotation.apply(weight, &rows));
        let mut difference = Difference::default();
        difference.widen(&rounded(again, dtype), &numbers);
        self.lock()[undo.weight].include(&difference);
        Ok(restored)
    }
}

/// The transposed inverses of the blocks of one factor.
fn invert(blocks: &Blocks, device: &Device) -> Result<Blocks, String> {
    let squares = blocks.values();
    let ([m, n, b, _], dtype) = (squares.dims(), squares.dtype());
    if m != 1 {
        return Err(format!("has {m} factors of blocks that are not orthogonal"));
    }
    let numbers = values(&squares.into_data());
    let mut inverses = Vec::with_capacity(numbers.len());
    for (index, block) in numbers.chunks_exact(b * b).enumerate() {
        let block = Mat::from_fn(b, b, |row, column| block[row * b + column]);
        let inverse = block.partial_piv_lu().inverse();
        // A singular block cannot be undone, but rounding turns "no inverse" into a huge one.
        let largest = |matrix: &Mat<f64>| {
            let numbers = (0..b * b).map(|at| matrix[(at / b, at % b)].abs());
            // `f64::max` ignores NaN.
            numbers.fold(0.0, |largest, x| {
                if x > largest || x.is_nan() {
                    x
                } else {
                    largest
                }
            })
        };
        let condition = largest(&inverse) * largest(&block);
        if condition.is_nan() || condition >= SINGULAR {
            return Err(format!(
                "cannot be restored: block {index} of the Neumann polynomial has no inverse"
            ));
        }
        inverses.extend((0..b * b).map(|at| inverse[(at % b, at / b)]));
    }
    let data = from_values(inverses, [1, n, b, b], dtype);
    let inverses = Tensor::from_data(data, (device, dtype));
    Ok(Blocks::from_values(inverses))
}
