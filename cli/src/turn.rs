//! Rotating a weight with an adapter, and undoing that.

use std::ops::{Range, RangeInclusive};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_boft::tensors::values;

use crate::changes::Step;
use crate::distance::{Relative, larger};
use crate::pieces::Turn;
use crate::probe::Probe;
use crate::rotation::{Inverse, Rotation};

/// The scales that can be divided by. Multiplying by a smaller number, or by the reciprocal of a larger one, moves that number away
/// from zero.
const SCALES: RangeInclusive<f64> = 1e-30..=1e30;

/// `W' = diag(s)·W·Rᵀ` in PyTorch's orientation, row by row, or `diag(s)·R·W` where the outputs are rotated; of several
/// rotations one after the other, without rounding to the precision of the weight in between.
pub struct Forward {
    device: Device,
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

/// `W = diag(1/s)·W'·(Rᵀ)⁻¹`: takes rotations out, the last one first, and estimates how far merging the result again would be from
/// `W'`.
pub struct Backward {
    device: Device,
    /// Of every weight, about how far the merged numbers are from those that would come out if the restored ones were merged again.
    differences: Mutex<Vec<Relative>>,
}

/// The rotations that are taken out of a weight.
pub struct Undo {
    rotations: Vec<Rotation>,
    inverses: Vec<Inverse>,
    /// Shows how far merging again would be off.
    probe: Probe,
    /// Which of the weights it is.
    weight: usize,
}

impl Backward {
    pub fn new() -> Self {
        Self {
            device: Device::flex(),
            differences: Mutex::default(),
        }
    }

    /// About how far merging the restored weights again would be off, relative to the norm of the worst one.
    pub fn difference(&self) -> f64 {
        let weights = self.lock();
        weights.iter().map(Relative::worst).fold(0.0, larger)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Relative>> {
        // Whoever panicked has changed nothing by halves.
        self.differences
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
        let probe = Probe::new(&rotations, d_input, &self.device);
        let mut differences = self.lock();
        differences.push(Relative::default());
        let weight = differences.len() - 1;
        Ok(Undo {
            rotations,
            inverses,
            probe,
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
            rotation.restore(inverse, weight, &rows)
        });
        let restored = restored.cast(FloatDType::from(dtype));
        let (restored, merged) = (restored.into_data(), merged.into_data());
        let probe = &undo.probe;
        let squares = probe.squares(&undo.rotations, &merged, &restored, &rows);
        self.lock()[undo.weight].add(squares);
        Ok(restored)
    }
}
