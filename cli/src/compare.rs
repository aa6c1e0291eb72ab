//! Two rotations of one layer, compared.

use burn::tensor::Device;
use burn_boft::tensors::values;
use burn_boft::value::{AdapterLayer, Axis};
use burn_boft::{Adapter, LayerKind};
use faer::Mat;

use crate::changes::least_common_multiple;

/// How far two rotations of one layer are apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Apart {
    /// The largest angle by which `R_Aᵀ·R_B` turns a plane, in radians.
    pub largest_angle: f64,
    /// The mean angle over all channels: those of a plane have its angle, and those that stay where they are have 0.
    pub mean_angle: f64,
    /// The largest difference between the scales of an output, where one of the two has a scale. The other then has ones.
    pub scale: Option<f64>,
}

impl Apart {
    /// Compares a layer of an adapter with one of another, or says why they cannot be compared: the words after its name.
    ///
    /// `inspect` shows the largest angle of a single block, which is that of one of its eigenvalues and which the norm of its skew
    /// says. `R_Aᵀ·R_B` has no skew, so here all eigenvalues are computed. Their largest angle is that of `inspect` where one of
    /// the two is the identity and the other has one factor. Polynomials that are far from orthogonal have no angles in a
    /// strict sense, and these are then those of the eigenvalues all the same.
    pub fn new(a: (&Adapter, &AdapterLayer), b: (&Adapter, &AdapterLayer)) -> Result<Self, String> {
        let widths = widths(a.1, b.1)?;
        let (one, other) = (Spans::new(a, widths)?, Spans::new(b, widths)?);
        let rotated = match a.1.axis() {
            Axis::Input => widths[0],
            Axis::Output => widths[1],
        };
        // Blocks of this size are mixed by both rotations together.
        let size = least_common_multiple(one.size, other.size);
        let (mut largest, mut sum) = (0.0f64, 0.0);
        for start in (0..rotated).step_by(size) {
            let relative = one.dense(start, size).transpose() * other.dense(start, size);
            let angles = angles(&relative)?;
            largest = angles.iter().copied().fold(largest, f64::max);
            sum += angles.iter().sum::<f64>();
        }
        Ok(Self {
            largest_angle: largest,
            mean_angle: sum / rotated as f64,
            scale: scales_apart(a.1, b.1)?,
        })
    }
}

/// The widths `[d_input, d_output]` of the layer that both are for, as far as they say them. One block stands for all that share
/// it, and an axis that is not rotated may have any length.
fn widths(a: &AdapterLayer, b: &AdapterLayer) -> Result<[usize; 2], String> {
    let same = |what: &str, one: Option<usize>, other: Option<usize>| match (one, other) {
        (Some(one), Some(other)) if one != other => Err(format!(
            "has {one} {what} in the first and {other} in the second"
        )),
        (one, other) => Ok(one.or(other)),
    };
    if a.axis() != b.axis() {
        let [one, other] = [a, b].map(|layer| layer.axis().name());
        return Err(format!(
            "has its {one}s rotated in the first and its {other}s in the second"
        ));
    }
    let [one, other] = [a, b].map(|layer| layer.kind() == Some(LayerKind::Embedding));
    if one != other {
        let embedding = if one { "first" } else { "second" };
        return Err(format!("is an embedding in the {embedding} only"));
    }
    let d_input = same("inputs", a.d_input(), b.d_input())?;
    let d_output = same("outputs", a.d_output(), b.d_output())?;
    let shared = least_common_multiple(a.span(), b.span());
    Ok([d_input.unwrap_or(shared), d_output.unwrap_or(1)])
}

/// A rotation as the matrices of its spans.
struct Spans {
    size: usize,
    /// Row by row, one span after the other; none of the identity.
    numbers: Option<Vec<f64>>,
}

impl Spans {
    fn new(
        (adapter, layer): (&Adapter, &AdapterLayer),
        widths: [usize; 2],
    ) -> Result<Self, String> {
        let blocks = adapter
            .rotation(layer, widths, &Device::flex())
            .map_err(|mismatch| format!("cannot be computed: {mismatch}"))?;
        let Some(blocks) = blocks else {
            let (size, numbers) = (1, None);
            return Ok(Self { size, numbers });
        };
        let spans = blocks.spans();
        let [_, size, _] = spans.dims();
        let numbers = values(&spans.into_data());
        match numbers.iter().all(|number| number.is_finite()) {
            true => Ok(Self {
                size,
                numbers: Some(numbers),
            }),
            false => Err("has a rotation with NaN or infinity".into()),
        }
    }

    /// The rotation of `size` channels from `start` on, which are whole spans.
    fn dense(&self, start: usize, size: usize) -> Mat<f64> {
        let Some(numbers) = &self.numbers else {
            return Mat::identity(size, size);
        };
        let span = self.size;
        let at = |row: usize, column: usize| (start + row) * span + column % span;
        Mat::from_fn(size, size, |row, column| {
            match row / span == column / span {
                true => numbers[at(row, column)],
                false => 0.0,
            }
        })
    }
}

/// The angles of the eigenvalues of a rotation, one for each channel: those of a plane come twice.
fn angles(rotation: &Mat<f64>) -> Result<Vec<f64>, String> {
    let eigenvalues = rotation
        .eigenvalues()
        .map_err(|_| "has angles that cannot be computed: the iteration does not converge")?;
    Ok(eigenvalues
        .iter()
        .map(|value| f64::atan2(value.im, value.re).abs())
        .collect())
}

/// The largest difference between the scales of an output.
fn scales_apart(a: &AdapterLayer, b: &AdapterLayer) -> Result<Option<f64>, String> {
    let (one, other) = (a.scale().map(values), b.scale().map(values));
    let count = one.as_ref().or(other.as_ref()).map(Vec::len);
    let Some(count) = count else {
        return Ok(None);
    };
    let ones = || vec![1.0; count];
    let (one, other) = (one.unwrap_or_else(ones), other.unwrap_or_else(ones));
    let differences = one.iter().zip(&other).map(|(a, b)| (a - b).abs());
    match differences.clone().all(|difference| difference.is_finite()) {
        true => Ok(Some(differences.fold(0.0, f64::max))),
        false => Err("has a scale with NaN or infinity".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_exact_from_none_to_half_a_turn() {
        for angle in [0.0, 1e-12, 1e-7, 0.5, 3.0, std::f64::consts::PI] {
            let (sin, cos) = f64::sin_cos(angle);
            // The third channel stays where it is.
            let rows = [[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]];
            let mut found = angles(&Mat::from_fn(3, 3, |i, j| rows[i][j])).unwrap();
            found.sort_by(f64::total_cmp);
            let expected = [0.0, angle, angle];
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-14, "{found} {expected}");
            }
        }
    }
}
