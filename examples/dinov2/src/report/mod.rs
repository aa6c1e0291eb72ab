//! What a run did, as one HTML page that needs nothing else: no script, no style sheet, no font, no file beside it.

mod axis;
mod chart;
mod classes;
mod natural;
mod page;
mod palette;
pub mod patches;
mod pictures;
mod rotations;
mod training;

use std::io;
use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files::write_whole;
use crate::scores::ScoresError;
pub use crate::training::journal::{EpochEntry, StepEntry};

/// The data of a run, finished or interrupted. Whatever is empty or absent has no section on the page.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The heading of the page.
    pub title: String,
    /// Names and values of what the run was told to do.
    pub settings: Vec<(String, String)>,
    /// Sentences that a reader should see first, for example that the run was interrupted.
    pub notes: Vec<String>,
    /// One entry per training step, or per n-th step.
    pub steps: Vec<StepEntry>,
    /// One entry per finished epoch.
    pub epochs: Vec<EpochEntry>,
    /// The epoch whose model was kept.
    pub best_epoch: Option<usize>,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// How many test images of class `[truth]` were taken for class `[prediction]`.
    pub confusion: Vec<Vec<usize>>,
    /// The worst mistakes, the worst first.
    pub mistakes: Vec<Mistake>,
    /// One entry per adapted layer, in any order.
    pub layers: Vec<LayerPoint>,
    /// Patch features of some images.
    pub patches: Vec<PatchPicture>,
}

/// A test image that was taken for another class.
#[derive(Clone, Debug)]
pub struct Mistake {
    /// Where the image is.
    pub path: PathBuf,
    /// The image, of any size.
    pub thumbnail: RgbImage,
    /// The name of its class.
    pub truth: String,
    /// The most probable classes and their probabilities, the most probable first.
    pub top: Vec<(String, f64)>,
}

/// One adapted layer, as [`burn_boft::diagnose()`] measures it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPoint {
    /// Its dotted path.
    pub path: String,
    /// The largest angle by which a block turns a plane, in radians.
    pub angle: f64,
    /// The orthogonality defect `max|RᵀR − I|`.
    pub defect: f64,
    /// The hyperspherical energy of the pretrained weight.
    pub energy_before: f64,
    /// The hyperspherical energy of the rotated weight.
    pub energy_after: f64,
}

impl From<&burn_boft::model::LayerDiagnosis> for LayerPoint {
    fn from(layer: &burn_boft::model::LayerDiagnosis) -> Self {
        Self {
            path: layer.path.clone(),
            angle: layer.largest_angle,
            defect: layer.orthogonality_defect,
            energy_before: layer.energy_before,
            energy_after: layer.energy_after,
        }
    }
}

/// An image and its patch features, as [`patches::pictures`] draws them.
#[derive(Clone, Debug)]
pub struct PatchPicture {
    /// The image as the model saw it.
    pub image: RgbImage,
    /// The features before training.
    pub before: RgbImage,
    /// The features after training.
    pub after: RgbImage,
}

/// Data that no page can be made of, or a page that cannot be written.
#[derive(Debug, Error)]
pub enum ReportError {
    /// Classes and confusion matrix do not belong together.
    #[error("the scores cannot be reported: {0}")]
    Scores(#[from] ScoresError),

    /// A chart that Plotters refuses.
    #[error("the chart “{title}” cannot be drawn: {reason}")]
    Chart { title: &'static str, reason: String },

    /// An image without pixels, or one that cannot be encoded.
    #[error("{what} cannot be put on the page: {source}")]
    Image {
        what: String,
        source: image::ImageError,
    },

    /// The page cannot be written.
    #[error("cannot write {path}: {source}; name a file in a folder that exists", path = path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl Report {
    /// The page.
    ///
    /// # Errors
    ///
    /// The confusion matrix does not fit the classes, or a picture cannot be encoded.
    pub fn html(&self) -> Result<String, ReportError> {
        page::page(self).map(|page| page.into_string())
    }

    /// Writes the page to a file, which appears whole or not at all. A page that is there already is replaced.
    ///
    /// # Errors
    ///
    /// As for [`html`](Self::html), or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        let page = self.html()?;
        write_whole(path, page.as_bytes()).map_err(|source| ReportError::Write {
            path: path.to_path_buf(),
            source,
        })
    }
}

/// A number with four digits, or with three and an exponent.
fn short(number: f64) -> String {
    let size = number.abs();
    if !number.is_finite() || size == 0.0 {
        return format!("{}", size.copysign(if size == 0.0 { 1.0 } else { number }));
    }
    let is_plain = (0.01..1e6).contains(&size);
    let rounded = match is_plain {
        true => {
            let digits = (3.0 - size.log10().floor()).max(0.0) as usize;
            format!("{number:.digits$}")
        }
        false => format!("{number:.2e}"),
    };
    // Reading it again drops the zeros at its end.
    match (rounded.parse::<f64>(), is_plain) {
        (Ok(number), true) => number.to_string(),
        (Ok(number), false) => format!("{number:e}"),
        (Err(_), _) => rounded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.123456, "0.1235"),
            (-12.5, "-12.5"),
            (123456.7, "123457"),
            (0.001, "1e-3"),
            (1.2345e-7, "1.23e-7"),
            (7.0e12, "7e12"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(short(number), text);
        }
    }
}
