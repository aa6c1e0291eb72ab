//! How far off merging a restored weight again would be, seen from a random vector.
//!
//! Merging makes `W'' = diag(s)·W·Rᵀ`. Its product with a vector is `diag(s)·(W·(Rᵀ·v))`, for which only the vector is rotated
//! instead of every row of the weight. Where `v` has any direction with the same probability and the length `√d`, the squares of
//! the numbers of `(W'' − W')·v` are on average the squared norms of the rows of `W'' − W'`. So an error counts in whichever row it
//! is, and the norm of all rows is estimated to about one part in `√(2·rows)`.
//!
//! Freivalds, *Probabilistic Machines Can Use Less Running Time*.

use std::ops::Range;

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use burn_boft::tensors::values;

use crate::rotation::Rotation;
use crate::sums::Vector;

/// Every weight gets the same random numbers, so that the same files give the same estimate.
const SEED: u64 = 20;

/// A random vector that a weight is multiplied by before and after its rotations are taken out.
pub struct Probe {
    /// `v`, for the merged rows.
    merged: Vector,
    /// `Rᵀ·v`, for the restored rows.
    restored: Vector,
    device: Device,
}

impl Probe {
    /// A vector for a weight of so many inputs that goes through these rotations.
    pub fn new(rotations: &[Rotation], d_input: usize, device: &Device) -> Self {
        device.seed(SEED);
        let normal = Distribution::Normal(0.0, 1.0);
        let vector = Tensor::<2>::random([1, d_input], normal, (device, DType::F64));
        let vector = vector.clone() / vector.square().mean().sqrt().unsqueeze();
        let rotated = rotations.iter().rfold(vector.clone(), |vector, rotation| {
            rotation.rotate_vector(vector)
        });
        let numbers = |vector: Tensor<2>| Vector::new(values(&vector.into_data()));
        Self {
            merged: numbers(vector),
            restored: numbers(rotated),
            device: device.clone(),
        }
    }

    /// The squares of the norms of `W'' − W'`, which is estimated, and of `W'`, over these rows.
    pub fn squares(
        &self,
        rotations: &[Rotation],
        merged: &TensorData,
        restored: &TensorData,
        rows: &Range<usize>,
    ) -> [f64; 2] {
        let (merged, norm) = self.merged.products(merged);
        let (restored, _) = self.restored.products(restored);
        let restored = TensorData::new(restored, [rows.len(), 1]);
        let restored = Tensor::<2>::from_data(restored, (&self.device, DType::F64));
        let again = rotations.iter().fold(restored, |products, rotation| {
            rotation.turn_products(products, rows)
        });
        let again = values(&again.into_data());
        let apart = again.iter().zip(&merged).map(|(a, b)| (a - b) * (a - b));
        [apart.sum(), norm]
    }
}
