//! Pictures of patch features: their first three principal components as red, green and blue.

use faer::{Mat, MatRef};
use image::{Rgb, RgbImage};
use thiserror::Error;

/// Colours per picture.
const CHANNELS: usize = 3;
/// The share of patches that may be darker than black, and the share that may be brighter than full colour. A few
/// extreme patches would otherwise take all contrast from the rest.
const CLIPPED: f64 = 0.02;
/// The brightness of a component that is the same everywhere.
const GREY: u8 = 128;

/// Features that cannot be drawn.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PatchError {
    /// As many numbers as patches times the width are needed, before and after.
    #[error(
        "{found} numbers are not the features of {rows} × {columns} patches with {width} numbers each; leave out the class token and the register tokens"
    )]
    Size {
        found: usize,
        rows: usize,
        columns: usize,
        width: usize,
    },

    /// NaN or infinity.
    #[error("the features of patch {patch} hold NaN or infinity; the model has diverged")]
    NotFinite { patch: usize },

    /// The singular value decomposition failed.
    #[error("the principal components of {rows} × {columns} patches were not found")]
    NoComponents { rows: usize, columns: usize },
}

/// Draws patch features before and after training, one pixel for each patch.
///
/// The three colours are the first three principal components. Components, origin and brightness come from the features
/// *before* and are used for both pictures, so that the two can be compared. Each component points where its
/// largest entry is positive; 2 % of the patches before are darker than black, and 2 % brighter than full colour. A
/// component that is the same for all patches, or that narrow features do not have, is grey.
///
/// # Shapes
///
/// - `before`, `after`: `[rows · columns, width]` in row-major order, patches from left to right and from top to bottom
/// - `grid`: `[rows, columns]`
///
/// # Errors
///
/// The features have another size or are not finite.
pub fn pictures(
    before: &[f32],
    after: &[f32],
    width: usize,
    grid: [usize; 2],
) -> Result<[RgbImage; 2], PatchError> {
    let [rows, columns] = grid;
    check(before, width, grid)?;
    check(after, width, grid)?;
    let fit = Fit::new(before, width, grid)?;
    let draw = |features| {
        let scores = fit.scores(features);
        RgbImage::from_fn(columns as u32, rows as u32, |x, y| {
            let patch = y as usize * columns + x as usize;
            Rgb(std::array::from_fn(|channel| {
                fit.brightness(channel, scores[(patch, channel)])
            }))
        })
    };
    Ok([draw(before), draw(after)])
}

fn check(features: &[f32], width: usize, [rows, columns]: [usize; 2]) -> Result<(), PatchError> {
    if width == 0 || features.is_empty() || features.len() != rows * columns * width {
        return Err(PatchError::Size {
            found: features.len(),
            rows,
            columns,
            width,
        });
    }
    match features.iter().position(|number| !number.is_finite()) {
        Some(place) => Err(PatchError::NotFinite {
            patch: place / width,
        }),
        None => Ok(()),
    }
}

/// The principal components of features, and the scores that are black and full colour.
struct Fit {
    width: usize,
    mean: Vec<f64>,
    /// `[width, 3]`; columns that the features do not have are zero.
    components: Mat<f64>,
    /// Black and full colour of each component.
    ends: [(f64, f64); CHANNELS],
}

impl Fit {
    fn new(
        features: &[f32],
        width: usize,
        [rows, columns]: [usize; 2],
    ) -> Result<Self, PatchError> {
        let patches = features.len() / width;
        let mean = (0..width)
            .map(|column| {
                let values = features.iter().skip(column).step_by(width);
                values.map(|value| f64::from(*value)).sum::<f64>() / patches as f64
            })
            .collect();
        let mut fit = Self {
            width,
            mean,
            components: Mat::zeros(width, CHANNELS),
            ends: [(0.0, 0.0); CHANNELS],
        };
        let svd = fit
            .centred(features)
            .thin_svd()
            .map_err(|_| PatchError::NoComponents { rows, columns })?;
        for channel in 0..CHANNELS.min(svd.V().ncols()) {
            let component = column(svd.V(), channel);
            let sign = sign(&component);
            for (row, value) in component.iter().enumerate() {
                fit.components[(row, channel)] = sign * value;
            }
        }
        let scores = fit.scores(features);
        // Rounding alone gives a constant component a spread, which must not be stretched to full contrast.
        let largest = svd.S()[0];
        fit.ends = std::array::from_fn(|channel| {
            let (low, high) = ends(column(scores.as_ref(), channel));
            match high - low > 1e-6 * largest {
                true => (low, high),
                false => (0.0, 0.0),
            }
        });
        Ok(fit)
    }

    fn centred(&self, features: &[f32]) -> Mat<f64> {
        Mat::from_fn(features.len() / self.width, self.width, |patch, column| {
            f64::from(features[patch * self.width + column]) - self.mean[column]
        })
    }

    /// How much of each component is in each patch: `[patches, 3]`.
    fn scores(&self, features: &[f32]) -> Mat<f64> {
        self.centred(features) * &self.components
    }

    fn brightness(&self, channel: usize, score: f64) -> u8 {
        let (low, high) = self.ends[channel];
        match high > low {
            true => (255.0 * ((score - low) / (high - low)).clamp(0.0, 1.0)).round() as u8,
            false => GREY,
        }
    }
}

fn column(matrix: MatRef<'_, f64>, column: usize) -> Vec<f64> {
    (0..matrix.nrows())
        .map(|row| matrix[(row, column)])
        .collect()
}

/// The sign with which the largest entry is positive.
fn sign(component: &[f64]) -> f64 {
    let largest = component
        .iter()
        .copied()
        .reduce(|a, b| if b.abs() > a.abs() { b } else { a });
    if largest < Some(0.0) { -1.0 } else { 1.0 }
}

/// The quantiles that become black and full colour.
fn ends(mut scores: Vec<f64>) -> (f64, f64) {
    scores.sort_by(f64::total_cmp);
    let at = |share: f64| scores[(share * (scores.len() - 1) as f64).round() as usize];
    (at(CLIPPED), at(1.0 - CLIPPED))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: [usize; 2] = [8, 6];
    const WIDTH: usize = 10;

    /// Features whose first three components are known: the row of the patch, its column, and a checkerboard, each along
    /// its own axis with less and less weight.
    fn features() -> Vec<f32> {
        let [rows, columns] = GRID;
        let mut features = vec![0.5; rows * columns * WIDTH];
        for (patch, values) in features.chunks_exact_mut(WIDTH).enumerate() {
            let (row, column) = (patch / columns, patch % columns);
            values[4] += 9.0 * row as f32;
            values[7] -= 4.0 * column as f32;
            values[1] += ((row + column) % 2) as f32;
        }
        features
    }

    #[test]
    fn the_colours_are_the_principal_components() {
        let features = features();
        let [before, after] = pictures(&features, &features, WIDTH, GRID).unwrap();
        assert_eq!(before, after);
        assert_eq!(before.dimensions(), (6, 8));
        for (x, y, Rgb([red, green, blue])) in before.enumerate_pixels() {
            // The largest entry of a component is positive, so that red grows with the row, and green falls with the
            // column.
            let checks = [
                (*red, 255.0 * f64::from(y) / 7.0),
                (*green, 255.0 - 255.0 * f64::from(x) / 5.0),
                (*blue, 255.0 * f64::from((x + y) % 2)),
            ];
            for (found, expected) in checks {
                assert!(
                    (f64::from(found) - expected).abs() < 25.0,
                    "{x} {y} {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn both_pictures_have_the_colours_of_the_features_before() {
        let before = features();
        // Every patch moves to where the patch one row lower was.
        let shift = GRID[1] * WIDTH;
        let after: Vec<f32> = before[shift..]
            .iter()
            .chain(&before[..shift])
            .copied()
            .collect();
        let [first, second] = pictures(&before, &after, WIDTH, GRID).unwrap();
        for (x, y, pixel) in second.enumerate_pixels() {
            assert_eq!(pixel, first.get_pixel(x, (y + 1) % 8));
        }
    }

    #[test]
    fn one_extreme_patch_does_not_take_the_contrast_from_the_others() {
        let [rows, columns] = [20, 20];
        let mut features = vec![0.0; rows * columns];
        features
            .iter_mut()
            .enumerate()
            .for_each(|(patch, value)| *value = (patch % 20) as f32);
        features[7] = 150.0;
        let [picture, _] = pictures(&features, &features, 1, [rows, columns]).unwrap();
        let reds: Vec<_> = picture
            .pixels()
            .skip(20)
            .take(20)
            .map(|pixel| pixel.0[0])
            .collect();
        assert!(reds[0] < 10 && reds[19] > 245, "{reds:?}");
        // Features of width 1 have one component, and the other two are grey.
        assert_eq!(picture.get_pixel(0, 3).0[1..], [GREY, GREY]);
    }

    #[test]
    fn equal_patches_are_grey() {
        let features = vec![0.1; 12 * 5];
        let [picture, _] = pictures(&features, &features, 5, [3, 4]).unwrap();
        assert!(picture.pixels().all(|pixel| pixel.0 == [GREY; 3]));
    }

    #[test]
    fn features_of_another_size_and_nan_are_refused() {
        let features = features();
        assert_eq!(
            pictures(&features, &features[WIDTH..], WIDTH, GRID)
                .unwrap_err()
                .to_string(),
            "470 numbers are not the features of 8 × 6 patches with 10 numbers each; leave out the class token and the register tokens"
        );
        let mut broken = features.clone();
        broken[3 * WIDTH + 2] = f32::NAN;
        assert_eq!(
            pictures(&features, &broken, WIDTH, GRID),
            Err(PatchError::NotFinite { patch: 3 })
        );
        assert!(pictures(&[], &[], WIDTH, [0, 4]).is_err());
    }
}
