//! The two turns of a weight: with the rotation of an adapter, and back.

use std::ops::Range;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_boft::ops::{Blocks, Side};
use burn_boft::{Adapter, AdapterLayer};

use crate::rewrite::Turn;

/// `W' = diag(s)·W·Rᵀ` in PyTorch's orientation, row by row.
pub struct Forward<'a> {
    adapter: &'a Adapter,
    device: Device,
    rotation: Option<Rotation>,
}

/// The rotation and the scale of one layer, ready to use.
struct Rotation {
    blocks: Blocks,
    scale: Option<Tensor<1>>,
}

impl Rotation {
    fn new(
        adapter: &Adapter,
        layer: &AdapterLayer,
        widths: [usize; 2],
        device: &Device,
    ) -> Result<Self, String> {
        let blocks = adapter
            .rotation(layer, widths, device)
            .map_err(|mismatch| mismatch.to_string())?
            .ok_or("has an adapter that does not rotate")?;
        let scale = layer.scale();
        let scale = scale.map(|scale| Tensor::from_data(scale.clone(), (device, scale.dtype())));
        Ok(Self { blocks, scale })
    }

    fn dtype(&self) -> DType {
        self.blocks.values().dtype()
    }

    /// The scale of these rows.
    fn scale(&self, rows: Range<usize>) -> Option<Tensor<1>> {
        self.scale.clone().map(|scale| scale.slice([rows]))
    }

    fn apply(&self, weight: Tensor<2>, rows: Range<usize>) -> Tensor<2> {
        self.blocks.weight(weight, self.scale(rows), Side::Right)
    }
}

impl<'a> Forward<'a> {
    pub fn new(adapter: &'a Adapter) -> Self {
        Self {
            adapter,
            device: Device::flex(),
            rotation: None,
        }
    }
}

impl Turn for Forward<'_> {
    fn start(&mut self, layer: &AdapterLayer, widths: [usize; 2]) -> Result<(), String> {
        self.rotation = Some(Rotation::new(self.adapter, layer, widths, &self.device)?);
        Ok(())
    }

    fn turn(&mut self, numbers: TensorData, rows: Range<usize>) -> Result<TensorData, String> {
        let rotation = self.rotation.as_ref().ok_or("has no rotation")?;
        let dtype = numbers.dtype();
        let weight = tensor(numbers, &self.device, rotation.dtype());
        Ok(rounded(rotation.apply(weight, rows), dtype))
    }
}

/// Rows of a weight, in the precision of the rotation.
fn tensor(numbers: TensorData, device: &Device, dtype: DType) -> Tensor<2> {
    let own = numbers.dtype();
    Tensor::<2>::from_data(numbers, (device, own)).cast(FloatDType::from(dtype))
}

fn rounded(weight: Tensor<2>, dtype: DType) -> TensorData {
    weight.cast(FloatDType::from(dtype)).into_data()
}
