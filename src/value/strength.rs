//! [`Adapter::with_strength`] and [`Adapter::with_factors`]: an adapter that rotates less far, further or back.

use burn::tensor::{Device, Tensor, TensorData};

use super::Adapter;
use super::layer::{AdapterLayer, Axis};
use crate::config::LayerKind;
use crate::rotation::{Method, RotationError, factors};
use crate::tensors::{from_values, is_finite, values};

/// Why an adapter has no version of this strength, or of so few factors.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StrengthError {
    /// The strength is NaN or infinite.
    #[error("a strength of {strength} is not a finite number")]
    NotFinite {
        /// The value given.
        strength: f64,
    },
    /// The numbers of a layer times the strength are beyond their precision.
    #[error(
        "`{path}` would have numbers beyond {dtype} at a strength of {strength}; use a smaller one"
    )]
    Overflow {
        /// The layer's path.
        path: String,
        /// The strength given.
        strength: f64,
        /// The precision of the layer's numbers.
        dtype: &'static str,
    },
    /// A scale that has no such power: that of a negative scale is not real, and a negative one of zero is infinite.
    #[error(
        "`{path}` scales output {output} by {scale}, of which there is no power {strength}; use {}",
        whole(*scale)
    )]
    Scale {
        /// The layer's path.
        path: String,
        /// The output channel.
        output: usize,
        /// Its scale.
        scale: f64,
        /// The strength given.
        strength: f64,
    },
    /// More factors are to be kept than a layer has.
    #[error(
        "`{path}` has {}, of which {kept} cannot be kept; keep at most {n_butterfly_factor}",
        factors(*n_butterfly_factor)
    )]
    Factors {
        /// The layer's path.
        path: String,
        /// How many factors are to be kept.
        kept: usize,
        /// How many it has.
        n_butterfly_factor: usize,
    },
    /// The settings give no layer a rotation.
    #[error("the settings: {0}")]
    Settings(#[from] RotationError),
}

/// Which strengths such a scale has a power of.
fn whole(scale: f64) -> &'static str {
    match scale == 0.0 {
        true => "a positive strength",
        false => "a whole strength",
    }
}

impl Adapter {
    /// The adapter at another strength: every `Q` times `strength`, and every scale to the power of it.
    ///
    /// The rotation moves along the path that the Cayley map makes of `strength · Q`, and stays orthogonal on all of it. One turns
    /// the adapter into itself, to the last bit, zero into no rotation and scales of ones, and −1 into the transposed blocks and
    /// the inverse scales. With one factor that undoes the adapter. With several it does not, since their inverses would have to
    /// be multiplied in the opposite order.
    ///
    /// Biases and parts of saved modules stay as they are: an adapter holds what they are after training, and not what they were
    /// before.
    ///
    /// # Numerics
    ///
    /// Numbers are multiplied in f64 and rounded to their precision once. A Neumann polynomial is that of `strength · Q`: the
    /// larger the strength, the less orthogonal it is, as [`Adapter::measure`] shows.
    ///
    /// A COFT radius bounds `Q` before it is multiplied, on `device`, as it does in every use of the adapter. The result has no
    /// radius, which could bound it once more.
    ///
    /// # Errors
    ///
    /// - [`StrengthError::NotFinite`]: the strength is NaN or infinite.
    /// - [`StrengthError::Overflow`]: finite numbers would become infinite.
    /// - [`StrengthError::Scale`]: a scale that is not positive has no such power.
    /// - [`StrengthError::Settings`]: the settings give no layer a rotation.
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
    /// let half = adapter.with_strength(0.5, &Device::flex())?;
    /// let angle = half.measure(&Device::flex())[0].largest_angle;
    /// assert!((angle - 2.0 * 0.25f64.atan()).abs() < 1e-6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_strength(mut self, strength: f64, device: &Device) -> Result<Self, StrengthError> {
        if !strength.is_finite() {
            return Err(StrengthError::NotFinite { strength });
        }
        if strength == 1.0 {
            return Ok(self);
        }
        let method = Method::new(&self.config).map_err(|mut errors| errors.remove(0))?;
        for layer in &mut self.layers {
            let bounded = bounded(layer, &method, device);
            let scale = layer
                .scale
                .as_ref()
                .map(|scale| powers(layer, scale, strength));
            let scale = scale.transpose()?;
            let skew = values(&bounded).into_iter().map(|number| number * strength);
            let (shape, dtype) = (bounded.shape().to_vec(), bounded.dtype());
            let skew = from_values(skew.collect(), shape, dtype);
            if is_finite(&bounded) && !is_finite(&skew) {
                return Err(overflow(layer, strength));
            }
            (layer.skew, layer.scale) = (skew, scale);
        }
        if method.is_bounded() {
            self.config = method.unbounded().config(self.config.selection().clone());
        }
        Ok(self)
    }

    /// The adapter with the first `kept` of its butterfly factors; the others become the identity.
    ///
    /// The first factor is the one that activations meet first. Where the inputs are rotated, as in PEFT, that is `F_{m−1}` of `x ·
    /// F_{m−1} ··· F_0`, which joins the most distant halves of blocks and which PEFT stores last. Where the outputs are rotated,
    /// as in LyCORIS, it is `F_0` of `F_{m−1} ··· F_0 · W`, which is stored first. All of them leave the adapter as it is, to the
    /// last bit, and none of them leaves its scale, which no factor has a part of.
    ///
    /// # Errors
    ///
    /// [`StrengthError::Factors`]: a layer has fewer.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::AdapterLayer;
    /// use burn_boft::{Adapter, BoftConfig};
    ///
    /// // Two factors of two blocks of 2 channels.
    /// let skew = TensorData::new(vec![0.1f32, 0.2, 0.3, 0.4], [2, 2, 1]);
    /// let layer = AdapterLayer::new("query", None, skew, None)?;
    /// let adapter = Adapter::from_parts(BoftConfig::new(), vec![layer], Vec::new())?;
    /// let kept = adapter.with_factors(1)?;
    /// let skew = kept.layers()[0].skew().to_vec::<f32>().unwrap();
    /// assert_eq!(skew, [0.0, 0.0, 0.3, 0.4]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # References
    ///
    /// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, which interpolates models by
    /// replacing factors one after the other.
    pub fn with_factors(mut self, kept: usize) -> Result<Self, StrengthError> {
        let wanting = self
            .layers
            .iter()
            .find(|layer| layer.n_butterfly_factor() < kept);
        if let Some(layer) = wanting {
            return Err(StrengthError::Factors {
                path: layer.path.clone(),
                kept,
                n_butterfly_factor: layer.n_butterfly_factor(),
            });
        }
        for layer in &mut self.layers {
            let [m, n, packed] = layer.skew.shape().dims::<3>();
            let dropped = match layer.axis {
                Axis::Input => 0..m - kept,
                Axis::Output => kept..m,
            };
            if dropped.is_empty() {
                continue;
            }
            let (mut numbers, each) = (values(&layer.skew), n * packed);
            numbers[dropped.start * each..dropped.end * each].fill(0.0);
            layer.skew = from_values(numbers, [m, n, packed], layer.skew.dtype());
        }
        Ok(self)
    }
}

/// The numbers of a layer within the COFT radius, if there is one.
fn bounded(layer: &AdapterLayer, method: &Method, device: &Device) -> TensorData {
    let sizes = layer.own_sizes().filter(|_| method.is_bounded());
    let Some(sizes) = sizes else {
        return layer.skew.clone();
    };
    let kind = layer.kind.unwrap_or(LayerKind::Linear);
    let rotation = method.with_sizes(kind, sizes, layer.scale.is_some());
    let skew = Tensor::<3>::from_data(layer.skew.clone(), (device, layer.skew.dtype()));
    rotation.project(skew).into_data()
}

/// The powers of a scale. Those of numbers near one differ by `strength` times as much from one.
fn powers(
    layer: &AdapterLayer,
    scale: &TensorData,
    strength: f64,
) -> Result<TensorData, StrengthError> {
    let mut powers = Vec::with_capacity(scale.num_elements());
    for (output, scale) in values(scale).into_iter().enumerate() {
        let power = scale.powf(strength);
        if scale <= 0.0 && !power.is_finite() {
            return Err(StrengthError::Scale {
                path: layer.path.clone(),
                output,
                scale,
                strength,
            });
        }
        powers.push(power);
    }
    let powers = from_values(powers, scale.shape().to_vec(), scale.dtype());
    match is_finite(scale) && !is_finite(&powers) {
        true => Err(overflow(layer, strength)),
        false => Ok(powers),
    }
}

fn overflow(layer: &AdapterLayer, strength: f64) -> StrengthError {
    StrengthError::Overflow {
        path: layer.path.clone(),
        strength,
        dtype: layer.skew.dtype().name(),
    }
}
