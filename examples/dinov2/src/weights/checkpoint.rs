//! A pretrained model: its settings, its classes, its preprocessing and its weights.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use burn::prelude::*;
use serde_json::{Map, Value};

use super::adapter::PREPROCESSOR;
use super::config::{Family, Settings, object};
use super::error::{WeightsError, unreadable};
use super::files::{Files, Tensors, read_bytes};
use super::fit::{HEAD, MASK_TOKEN, Named, reordered};
use super::hub::{Hub, is_name};
use crate::model::{Dinov2Config, Dinov2ForImageClassification};

/// The file of a model's settings.
pub(super) const CONFIG: &str = "config.json";

/// The name of the model that comes with this example, in place of a folder.
const EMBEDDED: &str = "embedded";

/// The folder of that model: it has seen the digits 0 to 4.
mod embedded {
    pub static CONFIG: &[u8] = include_bytes!("../../data/backbone/config.json");
    pub static PREPROCESSOR: &[u8] = include_bytes!("../../data/backbone/preprocessor_config.json");
    pub static WEIGHTS: &[u8] = include_bytes!("../../data/backbone/model.safetensors");
}

/// A pretrained model: a folder as Hugging Face's `transformers` writes it, or the one that comes with this example.
///
/// # Examples
///
/// ```no_run
/// use burn::tensor::Device;
/// use dinov2::weights::{Checkpoint, HeadOrigin};
///
/// let checkpoint = Checkpoint::open("facebook/dinov2-small")?;
/// let labels = ["cat".to_string(), "dog".to_string()];
/// let (model, head) = checkpoint.load(&labels, &Device::default())?;
/// if let HeadOrigin::Fresh { reason } = head {
///     println!("the head starts afresh: {reason}");
/// }
/// # drop(model);
/// # Ok::<(), dinov2::weights::WeightsError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    name: String,
    settings: Settings,
    preprocessor: Option<Value>,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Embedded,
    Files(Files),
}

/// Where the head of a loaded model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeadOrigin {
    /// The checkpoint's head, whose classes are those that were asked for.
    Checkpoint,
    /// A new head with random weights.
    Fresh {
        /// Why the checkpoint's could not be used.
        reason: String,
    },
}

impl Checkpoint {
    /// The model that comes with this example.
    pub fn embedded() -> Self {
        let path = Path::new(EMBEDDED);
        let settings = Settings::parse(embedded::CONFIG, path);
        let preprocessor = object(embedded::PREPROCESSOR, path);
        // Both files are part of the program, and a test reads them.
        Self {
            name: EMBEDDED.to_string(),
            settings: settings.expect("the embedded settings are valid"),
            preprocessor: Some(Value::Object(
                preprocessor.expect("the embedded JSON is valid"),
            )),
            source: Source::Embedded,
        }
    }

    /// Opens a folder; or a published model by its name, out of the local cache of Hugging Face or by a download with a
    /// progress bar; or `embedded`.
    ///
    /// Settings and the list of files are read here, and the weights by [`load`](Self::load). The cache is the one of
    /// Python's `huggingface_hub`: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    ///
    /// # Errors
    ///
    /// - [`WeightsError::NoSuchModel`], [`WeightsError::IsFile`], [`WeightsError::IsAdapter`]: it is not a model.
    /// - [`WeightsError::NoConfig`], [`WeightsError::NoWeights`], [`WeightsError::MissingShard`]: the folder is not
    ///   complete.
    /// - [`WeightsError::Architecture`], [`WeightsError::Setting`]: the model is not supported.
    /// - [`WeightsError::Offline`], [`WeightsError::Refused`], [`WeightsError::Unpublished`]: it cannot be downloaded.
    /// - [`WeightsError::Read`], [`WeightsError::Json`]: a file cannot be read.
    pub fn open(name: &str) -> Result<Self, WeightsError> {
        let path = Path::new(name);
        if path.is_dir() {
            return Self::in_folder(path, name);
        }
        if path.is_file() {
            return Err(WeightsError::IsFile {
                path: path.to_path_buf(),
            });
        }
        if name == EMBEDDED {
            return Ok(Self::embedded());
        }
        if !is_name(name) {
            return Err(WeightsError::NoSuchModel {
                name: name.to_string(),
            });
        }
        Self::in_folder(&Hub::from_env().folder(name)?, name)
    }

    /// Opens a folder under a name.
    pub(super) fn in_folder(folder: &Path, name: &str) -> Result<Self, WeightsError> {
        let config = folder.join(CONFIG);
        if !config.is_file() {
            let folder = folder.to_path_buf();
            let is_adapter = folder.join(burn_boft::peft::CONFIG_FILE).is_file()
                || folder.join(super::adapter::HEAD_SETTINGS).is_file();
            return Err(match is_adapter {
                true => WeightsError::IsAdapter { folder },
                false => WeightsError::NoConfig { folder },
            });
        }
        let text = fs::read(&config).map_err(unreadable(&config))?;
        Ok(Self {
            name: name.to_string(),
            settings: Settings::parse(&text, &config)?,
            preprocessor: read_preprocessor(folder)?,
            source: Source::Files(Files::find(folder)?),
        })
    }

    /// The name to find it by again, which adapters keep as `base_model_name_or_path`: what was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is the model that comes with this program.
    pub fn is_embedded(&self) -> bool {
        matches!(self.source, Source::Embedded)
    }

    /// The settings of the model. `num_labels` is that of the checkpoint's own head, or 2.
    pub fn config(&self) -> &Dinov2Config {
        &self.settings.config
    }

    /// The names of the classes in the order of the head's outputs, if it is a classifier.
    pub fn labels(&self) -> Option<&[String]> {
        self.settings.labels.as_deref()
    }

    /// The `preprocessor_config.json`, if the folder has one.
    pub fn preprocessor(&self) -> Option<&Value> {
        self.preprocessor.as_ref()
    }

    /// What of the settings this program does not apply, a sentence each. Predictions do not depend on any of it.
    pub fn notes(&self) -> &[String] {
        &self.settings.notes
    }

    /// The settings as they are in the file.
    pub(super) fn json(&self) -> &Map<String, Value> {
        &self.settings.json
    }

    pub(super) fn family(&self) -> Family {
        self.settings.family
    }

    /// Whether the weights have a mask token.
    pub(super) fn has_mask_token(&self) -> bool {
        self.settings.has_mask_token
    }

    /// Loads the weights into a model for these classes, on `device`.
    ///
    /// The head of the checkpoint is used where its classes are the same set, in the order of `labels`. Otherwise the
    /// head is new.
    ///
    /// # Numerics
    ///
    /// All weights become f32, whatever the files hold.
    ///
    /// # Errors
    ///
    /// - [`WeightsError::Read`], [`WeightsError::Malformed`]: a file cannot be read.
    /// - [`WeightsError::Size`]: the weights are those of a model of another size.
    /// - [`WeightsError::Misfit`]: every tensor that is missing, unexpected or wrong.
    pub fn load(
        &self,
        labels: &[String],
        device: &Device,
    ) -> Result<(Dinov2ForImageClassification, HeadOrigin), WeightsError> {
        let mut named = Named::new(self.path(), self.read()?)?;
        let has_head = named.tensors.keys().any(|name| name.starts_with(HEAD));
        let origin = match self.head_order(labels, has_head) {
            Ok(order) => {
                for name in ["classifier.weight", "classifier.bias"] {
                    // A head with another number of rows stays as it is, so that its shape is reported.
                    let fits = |rows: &usize| *rows == order.len();
                    if let Some(tensor) = named.tensors.remove(name) {
                        let tensor = match tensor.shape.first().is_some_and(fits) {
                            true => reordered(tensor, order.clone()),
                            false => tensor,
                        };
                        named.tensors.insert(name.to_string(), tensor);
                    }
                }
                HeadOrigin::Checkpoint
            }
            Err(reason) => {
                named.tensors.retain(|name, _| !name.starts_with(HEAD));
                HeadOrigin::Fresh { reason }
            }
        };
        let config = self.settings.config.clone().with_num_labels(labels.len());
        let model = config.init(device);
        named.check_size(&model)?;
        let wants_head = origin == HeadOrigin::Checkpoint;
        let wanted = |name: &str| {
            (wants_head || !name.starts_with(HEAD)) && (self.has_mask_token() || name != MASK_TOKEN)
        };
        Ok((named.place(model, wanted)?, origin))
    }

    /// Loads the weights and the head into a model with as many classes.
    pub(super) fn fill(
        &self,
        model: Dinov2ForImageClassification,
    ) -> Result<Dinov2ForImageClassification, WeightsError> {
        let named = Named::new(self.path(), self.read()?)?;
        named.check_size(&model)?;
        named.place(model, |name| self.has_mask_token() || name != MASK_TOKEN)
    }

    /// The file of the weights, for messages.
    fn path(&self) -> &Path {
        match &self.source {
            Source::Embedded => Path::new(EMBEDDED),
            Source::Files(files) => &files.path,
        }
    }

    fn read(&self) -> Result<Tensors, WeightsError> {
        match &self.source {
            Source::Embedded => read_bytes(embedded::WEIGHTS, Path::new(EMBEDDED)),
            Source::Files(files) => files.read(),
        }
    }

    /// For each label the row of the checkpoint's head, or why that cannot be used.
    fn head_order(&self, labels: &[String], has_head: bool) -> Result<Vec<usize>, String> {
        if !has_head {
            return Err("the checkpoint has no head".to_string());
        }
        let Some(own) = self.labels() else {
            return Err("config.json does not name the classes of the head".to_string());
        };
        if own.len() != labels.len() {
            return Err(format!(
                "the checkpoint's head has {} classes, and {} are needed",
                own.len(),
                labels.len(),
            ));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = own.iter().find(|label| !seen.insert(*label)) {
            return Err(format!(
                "two classes of the checkpoint's head are called `{twice}`"
            ));
        }
        let row = |label: &String| own.iter().position(|other| other == label);
        labels
            .iter()
            .map(|label| {
                row(label).ok_or_else(|| {
                    format!(
                        "the checkpoint's head knows no class `{label}`, but such as `{}`",
                        own[0]
                    )
                })
            })
            .collect()
    }
}

/// The `preprocessor_config.json` of a folder, if it has one.
pub(super) fn read_preprocessor(folder: &Path) -> Result<Option<Value>, WeightsError> {
    let path: PathBuf = folder.join(PREPROCESSOR);
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read(&path).map_err(unreadable(&path))?;
    Ok(Some(Value::Object(object(&text, &path)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digits;

    fn strings(labels: &[&str]) -> Vec<String> {
        labels.iter().map(|label| label.to_string()).collect()
    }

    #[test]
    fn the_embedded_model_loads_and_is_found_by_its_name() {
        let checkpoint = Checkpoint::open(Checkpoint::embedded().name()).unwrap();
        let (model, head) = checkpoint
            .load(&strings(&["5", "6"]), &Device::flex())
            .unwrap();

        assert!(matches!(head, HeadOrigin::Fresh { reason } if reason.contains("no head")));
        assert_eq!(model.classifier.weight.dims(), [128, 2]);
        assert_eq!(checkpoint.config().image_size, digits::SIZE);
        assert!(embedded::WEIGHTS.len() < 2_000_000);
    }

    #[test]
    fn a_folder_of_the_embedded_files_is_the_embedded_model() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/data/backbone");
        let labels = strings(&["5", "6", "7", "8", "9"]);
        let features = |checkpoint: Checkpoint| {
            let device = Device::flex();
            let (model, _) = checkpoint.load(&labels, &device).unwrap();
            model
                .features(Tensor::ones([2, 1, digits::SIZE, digits::SIZE], &device))
                .into_data()
        };
        assert_eq!(
            features(Checkpoint::embedded()),
            features(Checkpoint::open(folder).unwrap()),
        );
    }

    #[test]
    fn a_head_fits_the_same_set_of_classes_in_any_order() {
        let mut checkpoint = Checkpoint::embedded();
        let order = |checkpoint: &Checkpoint, labels: &[&str]| {
            checkpoint.head_order(&strings(labels), true)
        };
        assert!(
            order(&checkpoint, &["a"])
                .unwrap_err()
                .contains("does not name")
        );

        checkpoint.settings.labels = Some(strings(&["a", "b", "c"]));
        assert_eq!(order(&checkpoint, &["c", "a", "b"]).unwrap(), [2, 0, 1]);
        assert!(
            order(&checkpoint, &["a", "b"])
                .unwrap_err()
                .contains("3 classes, and 2")
        );
        assert!(
            order(&checkpoint, &["a", "b", "x"])
                .unwrap_err()
                .contains("`x`")
        );

        checkpoint.settings.labels = Some(strings(&["a", "b", "a"]));
        assert!(
            order(&checkpoint, &["a", "b", "c"])
                .unwrap_err()
                .contains("`a`")
        );
    }
}
