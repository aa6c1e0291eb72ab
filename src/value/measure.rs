//! [`Adapter::measure`]: the rotations of an adapter without its model.

use burn::tensor::{Device, Tensor};

use super::Adapter;
use super::layer::AdapterLayer;
use crate::config::LayerKind;
use crate::model;
use crate::rotation::Method;
use crate::tensors::values;

/// One rotation of an adapter, made by [`Adapter::measure`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerMeasure {
    /// The layer's dotted path.
    pub path: String,
    /// Numbers that are free to change: the packed skew, and the scale.
    pub effective: usize,
    /// Numbers that PEFT stores for the same layer: its BOFT keeps full squares, and a scale in any case.
    pub stored_by_peft: usize,
    /// `max|RᵀR − I|`.
    pub orthogonality_defect: f64,
    /// `‖Q‖₂`, the largest over all blocks.
    pub skew_norm: f64,
    /// The largest angle by which one block turns a plane, in radians: `2·atan ‖Q‖₂` for an exact block.
    pub largest_angle: f64,
    /// The smallest and the largest scale, where there is one.
    pub scale_range: Option<(f64, f64)>,
}

impl Adapter {
    /// Measures every rotation: what [`diagnose`](crate::diagnose()) finds in a model, as far as the adapter alone says
    /// it.
    ///
    /// The layers are in the order of [`Adapter::layers`]. Of a layer that does not rotate, defect, norm and angle are
    /// 0.
    ///
    /// # Numerics
    ///
    /// Numbers that are not finite make measurements that are NaN.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::{Device, TensorData};
    /// use burn_boft::value::AdapterLayer;
    /// use burn_boft::{Adapter, OftConfig};
    ///
    /// // One block that turns a plane by 2·atan 0.5.
    /// let skew = TensorData::new(vec![0.5f32], [1, 1, 1]);
    /// let layer = AdapterLayer::new("query", None, skew, None)?;
    /// let adapter = Adapter::from_parts(OftConfig::new(), vec![layer], Vec::new())?;
    /// let measured = &adapter.measure(&Device::flex())[0];
    /// assert!((measured.largest_angle - 2.0 * 0.5f64.atan()).abs() < 1e-6);
    /// assert!(measured.orthogonality_defect < 1e-6);
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn measure(&self, device: &Device) -> Vec<LayerMeasure> {
        let measure = |layer| self.measure_layer(layer, device);
        self.layers.iter().map(measure).collect()
    }

    /// Measures one rotation. Where the outputs are not known, the scale that PEFT would store is counted as empty.
    fn measure_layer(&self, layer: &AdapterLayer, device: &Device) -> LayerMeasure {
        let [orthogonality_defect, skew_norm, largest_angle] =
            self.measure_rotation(layer, device).unwrap_or([0.0; 3]);
        let scale = layer.scale.as_ref().map(values);
        let [m, n, _] = layer.skew.shape().dims::<3>();
        let sizes = [m, n, layer.block_size];
        LayerMeasure {
            path: layer.path.clone(),
            effective: layer.effective(),
            stored_by_peft: Method::unchecked(&self.config)
                .stored_by_peft(sizes, layer.d_output.unwrap_or(0)),
            orthogonality_defect,
            skew_norm,
            largest_angle,
            scale_range: scale.as_deref().and_then(range),
        }
    }

    /// Defect, norm and angle; none of a layer that does not rotate.
    fn measure_rotation(&self, layer: &AdapterLayer, device: &Device) -> Option<[f64; 3]> {
        let butterfly = layer.own_sizes()?;
        if !values(&layer.skew).iter().all(|value| value.is_finite()) {
            return Some([f64::NAN; 3]);
        }
        let method = Method::unchecked(&self.config);
        let rotation = method.with_sizes(LayerKind::Linear, butterfly, layer.scale.is_some());
        let skew = Tensor::<3>::from_data(layer.skew.clone(), (device, layer.skew.dtype()));
        let defect = model::defect(&rotation.blocks(skew.clone()));
        let norm = model::norm(&rotation, skew);
        Some([defect, norm, rotation.angle(norm)])
    }
}

/// The smallest and the largest number; NaN where one is.
fn range(numbers: &[f64]) -> Option<(f64, f64)> {
    if numbers.iter().any(|number| number.is_nan()) {
        return Some((f64::NAN, f64::NAN));
    }
    let low = numbers.iter().copied().reduce(f64::min)?;
    Some((low, numbers.iter().copied().fold(low, f64::max)))
}
