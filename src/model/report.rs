//! Reports about an adapted model: [`summary`] counts its parameters, [`diagnose`] measures its rotations.

use std::fmt::{self, Display, Formatter};

use burn::module::Module;
use burn::tensor::{FloatDType, Int, Tensor};

use super::walk::walk;
use crate::config::LayerKind;
use crate::ops::{Blocks, Direction, Side, dequantized, upper_triangle, widen};
use crate::rotation::{ButterflyPlan, Rotation};

/// How many parameters a model has, as [`summary`] counted them. `Display` prints the line that PEFT prints.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// How many numbers training changes.
    pub trainable: usize,
    /// How many numbers there are, including those of adapters.
    pub total: usize,
    /// One row per adapted layer, in the model's order.
    pub layers: Vec<LayerSummary>,
}

/// One adapted layer of a [`Summary`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerSummary {
    /// The dotted path of the layer.
    pub path: String,
    /// The sizes of the rotation.
    pub butterfly: ButterflyPlan,
    /// How many numbers the adapter has: those of the skew and those of the scale. They are its degrees of freedom.
    pub effective: usize,
    /// How many numbers PEFT stores for the same adapter. Its BOFT stores whole squares instead of triangles.
    pub stored_by_peft: usize,
}

impl Summary {
    /// How many numbers all adapters have together, which are their degrees of freedom.
    pub fn effective(&self) -> usize {
        self.layers.iter().map(|layer| layer.effective).sum()
    }

    /// How many numbers PEFT stores for the same adapters.
    pub fn stored_by_peft(&self) -> usize {
        self.layers.iter().map(|layer| layer.stored_by_peft).sum()
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let share = 100.0 * self.trainable as f64 / (self.total.max(1)) as f64;
        let (trainable, total) = (thousands(self.trainable), thousands(self.total));
        write!(
            f,
            "trainable params: {trainable} || all params: {total} || trainable%: {share:.4}"
        )
    }
}

/// `1,234,567`.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(String::from_utf8_lossy)
        .collect();
    groups.join(",")
}

/// Counts the parameters of a model, as PEFT's `print_trainable_parameters` does. The running statistics of batch norms are
/// buffers and not counted.
///
/// A parameter counts as trainable if it is after [`Module::train`], so a model and its `valid()` have the same counts.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{OftConfig, inject, summary};
///
/// # let device = burn::tensor::Device::flex().autodiff();
/// let layer = LinearConfig::new(64, 32).with_bias(false).init(&device);
/// let layer = inject(layer, OftConfig::new().with_block_size(8).with_target_modules("all-linear"))?;
/// assert_eq!(
///     summary(&layer).to_string(),
///     "trainable params: 224 || all params: 2,272 || trainable%: 9.8592"
/// );
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
pub fn summary<M: Module>(model: &M) -> Summary {
    let walk = walk(model);
    let mut summary = Summary {
        trainable: 0,
        total: 0,
        layers: Vec::new(),
    };
    for parameter in walk.parameters.iter().filter(|p| !p.is_statistic()) {
        let attached = parameter.attached.iter();
        let parts = attached.flat_map(|attached| attached.parts.iter().map(|(_, part)| part));
        for stored in [&parameter.stored].into_iter().chain(parts) {
            let count = stored.shape().iter().product::<usize>();
            summary.total += count;
            if stored.is_trainable() {
                summary.trainable += count;
            }
        }
    }
    let layers = walk.adapted().map(|(weight, _, rotation)| LayerSummary {
        path: weight.owner().to_string(),
        butterfly: rotation.sizes(),
        effective: rotation.parameters(),
        stored_by_peft: rotation.stored_by_peft(),
    });
    summary.layers = layers.collect();
    summary
}

/// Measurements of every rotation of a model, as [`diagnose`] made them. `Display` prints a table.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Diagnosis {
    /// One row per adapted layer, in the model's order.
    pub layers: Vec<LayerDiagnosis>,
}

/// One adapted layer of a [`Diagnosis`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerDiagnosis {
    /// The dotted path of the layer.
    pub path: String,
    /// The orthogonality defect, `max|RᵀR − I|`: 0 for a rotation, up to rounding.
    pub orthogonality_defect: f64,
    /// The largest `‖Q‖₂` of all blocks: 0 before training.
    pub skew_norm: f64,
    /// The largest angle by which a block turns a plane, in radians: `2·atan ‖Q‖₂` for the exact map.
    pub largest_angle: f64,
    /// The hyperspherical energy `Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹` of the base, where `ŵ_i` are the normalised weights of output
    /// neuron `i`, or of an embedding its rows. It is large where neurons point in similar directions.
    pub energy_before: f64,
    /// The hyperspherical energy of the rotated weight. An orthogonal rotation does not change it.
    pub energy_after: f64,
}

impl Display for Diagnosis {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let width = self
            .layers
            .iter()
            .map(|layer| layer.path.len())
            .max()
            .unwrap_or(0)
            .max(5);
        write!(
            f,
            "{:width$}  {:>9}  {:>9}  {:>9}  {:>13}  {:>13}",
            "layer", "defect", "‖Q‖₂", "angle/rad", "energy before", "energy after"
        )?;
        for layer in &self.layers {
            write!(
                f,
                "\n{:width$}  {:>9.2e}  {:>9.4}  {:>9.4}  {:>13.6e}  {:>13.6e}",
                layer.path,
                layer.orthogonality_defect,
                layer.skew_norm,
                layer.largest_angle,
                layer.energy_before,
                layer.energy_after,
            )?;
        }
        Ok(())
    }
}

/// Measures every rotation of a model, without multiplicative dropout.
///
/// The energy takes `d_output²·d_input` multiplications for each layer, on the model's device.
///
/// # Numerics
///
/// The measurements run in f32, or in f64 for an f64 base. If an adapter holds NaN or infinity, its measurements are NaN.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{BoftConfig, Init, diagnose, inject};
///
/// # let device = burn::tensor::Device::flex();
/// let config = BoftConfig::new()
///     .with_target_modules("all-linear")
///     .with_init(Init::Random { seed: 7 });
/// let layer = inject(LinearConfig::new(64, 32).init(&device), config)?;
/// let measured = diagnose(&layer);
/// assert!(measured.layers[0].orthogonality_defect < 1e-6);
/// assert!(measured.layers[0].largest_angle > 0.0);
/// println!("{measured}");
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
///
/// # References
///
/// Liu et al., *Learning towards Minimum Hyperspherical Energy*, NeurIPS 2018; OFT, section 3.
pub fn diagnose<M: Module>(model: &M) -> Diagnosis {
    // The plain device: nothing here is differentiated.
    let model = model.valid();
    let walk = walk(&model);
    let layers = walk.adapted().filter_map(|(weight, attached, rotation)| {
        let (_, trained) = attached.trained_skew()?;
        let skew = rotation.skew_of(dequantized(trained.tensor()));
        let base = match rotation.kind() {
            LayerKind::Linear | LayerKind::Embedding => {
                matrix::<2>(weight.stored.tensor(), rotation.kind())
            }
            LayerKind::Conv2d => matrix::<4>(weight.stored.tensor(), rotation.kind()),
        };
        Some(diagnose_layer(weight.owner(), rotation, skew, base))
    });
    Diagnosis {
        layers: layers.collect(),
    }
}

/// The weight as a `[d_input, d_output]` matrix in f32 or wider.
pub(super) fn matrix<const D: usize>(base: Tensor<D>, kind: LayerKind) -> Tensor<2> {
    let base = widen(dequantized(base));
    let (d_input, d_output) = kind.axes(&base.dims());
    match kind {
        LayerKind::Linear => base.reshape([d_input, d_output]),
        LayerKind::Conv2d | LayerKind::Embedding => base.reshape([d_output, d_input]).transpose(),
    }
}

/// Measures one layer.
///
/// # Shapes
///
/// - `skew`: `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` where one block is shared
/// - `base`: `[d_input, d_output]`
fn diagnose_layer(
    path: &str,
    rotation: &Rotation,
    skew: Tensor<3>,
    base: Tensor<2>,
) -> LayerDiagnosis {
    let blocks = rotation.blocks(skew.clone());
    let (defect, q) = (defect(&blocks), norm(rotation, skew));
    let rotated = blocks.rotate(base.clone(), Side::Left, Direction::Forward);
    LayerDiagnosis {
        path: path.to_string(),
        orthogonality_defect: defect,
        skew_norm: q,
        largest_angle: rotation.angle(q),
        energy_before: energy(base),
        energy_after: energy(rotated),
    }
}

/// The orthogonality defect, `max|RᵀR − I|`.
///
/// `R` is block-diagonal in its spans, so it is computed for each span and not for all of `R`.
pub(crate) fn defect(blocks: &Blocks) -> f64 {
    let rotation = blocks.spans();
    let [_, span, _] = rotation.dims();
    let identity =
        Tensor::<2>::eye(span, &rotation.device()).cast(FloatDType::from(rotation.dtype()));
    let product = rotation.clone().swap_dims(1, 2).matmul(rotation);
    let defect = (product - identity.unsqueeze::<3>()).abs().max();
    defect.into_scalar::<f64>()
}

/// The largest `‖Q‖₂` of the blocks that a layer computes with, which COFT may have scaled back.
pub(crate) fn norm(rotation: &Rotation, skew: Tensor<3>) -> f64 {
    skew_norm(&rotation.project(skew), rotation.sizes().block_size())
}

/// The largest `‖Q‖₂` of packed blocks, by power iteration on `QᵀQ`.
///
/// # Shapes
///
/// - `skew`: `[m, n, b(b−1)/2]`
///
/// # Numerics
///
/// The iteration runs on the host in f64 and can only fall short of the norm. The result is NaN if a number is.
fn skew_norm(skew: &Tensor<3>, b: usize) -> f64 {
    const STEPS: usize = 200;
    let numbers = skew.clone().into_data();
    let numbers: Vec<f64> = numbers.iter::<f64>().collect();
    let norm = |vector: &[f64]| vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    let apply = |packed: &[f64], vector: &[f64]| {
        let mut result = vec![0.0; b];
        for (value, (row, column)) in packed.iter().zip(upper_triangle(b)) {
            result[row] += value * vector[column];
            result[column] -= value * vector[row];
        }
        result
    };
    let block_norm = |packed: &[f64]| {
        // Only a start that is orthogonal to the plane of the largest norm would fail. This one has no pattern that a
        // plane could share.
        let mut vector: Vec<f64> = (0..b).map(|i| 1.0 + 0.1 * (1.7 * i as f64).sin()).collect();
        let mut length = 0.0;
        for _ in 0..STEPS {
            let size = norm(&vector);
            if size == 0.0 {
                return 0.0;
            }
            vector.iter_mut().for_each(|x| *x /= size);
            vector = apply(packed, &vector);
            length = norm(&vector);
        }
        length
    };
    // `f64::max` would ignore NaN.
    let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
    numbers
        .chunks(b * (b - 1) / 2)
        .map(block_norm)
        .fold(0.0, larger)
}

/// The hyperspherical energy, `Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹` over the normalised columns.
///
/// The rows of an embedding are tens of thousands of columns here, so not all distances are in memory at once.
///
/// # Shapes
///
/// - `weight`: `[d_input, d_output]`
///
/// # Numerics
///
/// Distances come from cosines, `‖ŵ_i − ŵ_j‖² = 2 − 2·cos`, which takes one product. Squared distances below `10⁻¹²`
/// count as `10⁻¹²`, so that equal columns have a finite energy.
fn energy(weight: Tensor<2>) -> f64 {
    /// How many columns are compared with all others at a time.
    const AT_ONCE: usize = 1024;
    let [_, columns] = weight.dims();
    let device = weight.device();
    let norm = weight.clone().square().sum_dim(0).sqrt().clamp_min(1e-12);
    let unit = weight / norm;
    let numbers =
        |from: usize, to: usize| Tensor::<1, Int>::arange(from as i64..to as i64, &device);
    let starts = (0..columns).step_by(AT_ONCE);
    let energies = starts.map(|start| {
        let end = columns.min(start + AT_ONCE);
        let shape = [end - start, columns];
        let some = unit.clone().slice_dim(1, start..end).transpose();
        let squares = (some.matmul(unit.clone()) * -2.0 + 2.0).clamp_min(1e-12);
        // The distance of a column to itself is set to one, and these ones are subtracted from the sum.
        let own = numbers(start, end).unsqueeze_dim::<2>(1).expand(shape);
        let itself = own.equal(numbers(0, columns).unsqueeze::<2>().expand(shape));
        let squares = squares.mask_fill(itself, 1.0);
        squares.sqrt().recip().sum().into_scalar::<f64>() - shape[0] as f64
    });
    energies.sum()
}
