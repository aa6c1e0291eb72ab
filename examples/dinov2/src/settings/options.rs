//! The settings of a training run as a user gives them, by flags or in a file.

use std::path::{Path, PathBuf};

use burn_boft::Cayley;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::device::{DeviceName, Precision};
use crate::error::Error;
use crate::method::Method;

/// The settings of a training run as a user gives them, by flags or in a TOML file with the same names. What is left out
/// has a default.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Options {
    /// Pretrained model: a Hugging Face folder, or a name such as facebook/dinov2-small, which is looked up in the local
    /// Hugging Face cache and else downloaded [default: a small one that comes with this program and reads digits]
    #[arg(long, value_name = "FOLDER|NAME", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,

    /// Images to learn: a folder per class, or train/, val/ and test/ with a folder per class in each
    /// [default: the handwritten digits 5 to 9]
    #[arg(long, value_name = "FOLDER", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,

    /// Adapter to start from, as this program or PEFT saved it
    #[arg(long, value_name = "FOLDER", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,

    /// Pixels along each side of the images that the model reads, a multiple of its patches
    /// [default: what preprocessor_config.json of the model says]
    #[arg(long, value_name = "PIXELS", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,

    /// Changes of the training images [default: standard for photographs, none for the digits]
    #[arg(long, value_enum, help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment: Option<Augment>,

    /// Goes on without images that cannot be read
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_corrupt: Option<bool>,

    /// Threads that decode images [default: one per processor]
    #[arg(long, value_name = "COUNT", help_heading = "Model and images")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<usize>,

    /// How to adapt the model; the head is trained by all methods [default: boft]
    #[arg(long, value_enum, help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<MethodName>,

    /// Channels per rotated block [default: 4 for boft, 8 for oft]
    #[arg(long, value_name = "CHANNELS", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<usize>,

    /// Butterfly factors of boft [default: 2]
    #[arg(long, value_name = "COUNT", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factors: Option<usize>,

    /// Share of one factor's blocks that a training step of boft leaves unrotated [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,

    /// Terms of the Neumann series by which oft approximates the Cayley map [default: the exact map]
    #[arg(long, value_name = "TERMS", help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neumann: Option<usize>,

    /// Rank of lora [default: 2, which has about as many parameters as boft]
    #[arg(long, help_heading = "Method")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,

    /// Passes over the training images [default: 20]
    #[arg(long, value_name = "COUNT", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,

    /// Images per optimizer step [default: 32]
    #[arg(long, value_name = "IMAGES", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,

    /// Parts that a batch is computed in, one after the other, to save memory [default: as few as fit the memory]
    #[arg(long, value_name = "PARTS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<usize>,

    /// Ends the run after so many optimizer steps, and evaluates on as many images as they see
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,

    /// Peak learning rate of everything but the head; it falls to zero along a cosine [default: by method and width of the model]
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,

    /// Peak learning rate of the head [default: by width of the model, the same for all methods]
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_learning_rate: Option<f64>,

    /// Share of the steps in which the learning rate rises to its peak [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_up: Option<f64>,

    /// Weight decay of matrices; scales, biases and norms have none [default: 0.02]
    #[arg(long, value_name = "DECAY", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,

    /// Largest norm of all gradients together; 0 for no limit [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,

    /// Share of the target that is spread over all classes [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f32>,

    /// Ends the run after so many epochs without a lower validation loss
    #[arg(long, value_name = "EPOCHS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<usize>,

    /// Starts from the head of the linear probe
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_start: Option<bool>,

    /// Leaves out the linear probe, with which the result is compared
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_probe: Option<bool>,

    /// Looks for a good learning rate first, by short runs that are judged on the validation images
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub find_rate: Option<bool>,

    /// Seed of the split, of the new head, of the order of images, of augmentation and of dropout [default: 0]
    #[arg(long, help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// Optimizer steps between checkpoints within an epoch; 0 for none [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<usize>,

    /// Where to compute; Cargo features of this program add devices [default: cpu]
    #[arg(long, value_enum, help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceName>,

    /// Precision of the frozen weights and of the activations, where the device has it [default: f32]
    #[arg(long, value_enum, help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,

    /// Recomputes parts of the forward pass in the backward pass, to save memory
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_checkpointing: Option<bool>,
}

/// The methods by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    Boft,
    Oft,
    Lora,
    Linear,
    Full,
}

/// How training images are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Augment {
    /// Not at all.
    None,
    /// A random part of the image, resized, and mirrored half of the time.
    Standard,
}

impl Options {
    /// Reads settings from a TOML file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or holds something else than settings.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Path {
            path: path.to_path_buf(),
            source,
        })?;
        toml::from_str(&text).map_err(|error| Error::SettingsFile {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })
    }

    /// These settings, and those of others where these say nothing.
    ///
    /// # Errors
    ///
    /// A number does not fit TOML, such as a seed above 2⁶³.
    pub fn over(&self, others: &Self) -> Result<Self, Error> {
        let mut merged = others.to_table()?;
        merged.extend(self.to_table()?);
        let merged = merged.try_into();
        merged.map_err(|error: toml::de::Error| Error::Settings(error.to_string()))
    }

    /// The settings that are given, by name.
    ///
    /// # Errors
    ///
    /// A number does not fit TOML, such as a seed above 2⁶³.
    pub fn to_table(&self) -> Result<toml::Table, Error> {
        toml::Table::try_from(self).map_err(|error| Error::Settings(error.to_string()))
    }

    /// These settings with whole paths, which mean the same from every folder.
    ///
    /// # Errors
    ///
    /// A path is empty, or the current folder is unknown.
    pub fn located(mut self) -> Result<Self, Error> {
        let whole = |path: &Path| {
            std::path::absolute(path).map_err(|source| Error::Path {
                path: path.to_path_buf(),
                source,
            })
        };
        for path in [&mut self.data, &mut self.adapter].into_iter().flatten() {
            *path = whole(path)?;
        }
        // What is no folder is the name of a published model.
        if let Some(model) = self
            .model
            .as_mut()
            .filter(|model| Path::new(model).is_dir())
        {
            let path = whole(Path::new(model))?;
            // A path that is not text cannot have been given as one.
            *model = path.to_string_lossy().into_owned();
        }
        Ok(self)
    }

    /// Checks every setting against its range and against the others, before any file is opened.
    ///
    /// # Errors
    ///
    /// The first setting that is out of range or has no place beside the others.
    pub fn check(&self) -> Result<(), Error> {
        let within = |value: Option<f64>, holds: fn(f64) -> bool| value.is_none_or(holds);
        let rate = |value| within(value, |rate| rate > 0.0 && rate <= 1.0);
        let share = |value| within(value, |share| (0.0..1.0).contains(&share));
        let positive = |value: Option<usize>| value != Some(0);
        let checks = [
            (positive(self.epochs), "--epochs must be 1 or more"),
            (positive(self.batch_size), "--batch-size must be 1 or more"),
            (positive(self.accumulate), "--accumulate must be 1 or more"),
            (positive(self.max_steps), "--max-steps must be 1 or more"),
            (positive(self.patience), "--patience must be 1 or more"),
            (positive(self.workers), "--workers must be 1 or more"),
            (positive(self.factors), "--factors must be 1 or more"),
            (positive(self.rank), "--rank must be 1 or more"),
            (positive(self.neumann), "--neumann must be 1 or more"),
            (positive(self.image_size), "--image-size must be 1 or more"),
            (
                rate(self.learning_rate),
                "--learning-rate must be above 0 and at most 1",
            ),
            (
                rate(self.head_learning_rate),
                "--head-learning-rate must be above 0 and at most 1",
            ),
            (
                share(self.dropout),
                "--dropout must be at least 0 and below 1",
            ),
            (
                share(self.warm_up),
                "--warm-up must be at least 0 and below 1",
            ),
            (
                share(self.label_smoothing.map(f64::from)),
                "--label-smoothing must be at least 0 and below 1",
            ),
            (
                within(self.weight_decay, |decay| decay >= 0.0 && decay.is_finite()),
                "--weight-decay must be 0 or more",
            ),
            (
                within(self.clip_norm, |norm| norm >= 0.0 && norm.is_finite()),
                "--clip-norm must be 0 or more",
            ),
            (
                self.block_size.is_none_or(|size| size >= 2),
                "--block-size must be 2 or more",
            ),
            (
                self.accumulate.is_none_or(|parts| parts <= self.batch()),
                "--accumulate must not be larger than the batch",
            ),
            (
                self.find_rate != Some(true) || self.learning_rate.is_none(),
                "--find-rate looks for a learning rate, so --learning-rate has no place beside it",
            ),
            (
                self.warm_start != Some(true) || self.adapter.is_none(),
                "--warm-start brings the head of the probe, and --adapter brings its own; leave one of them out",
            ),
        ];
        if let Some((_, complaint)) = checks.iter().find(|(holds, _)| !holds) {
            return Err(Error::Settings((*complaint).to_string()));
        }
        if self.method.is_some() || self.adapter.is_none() {
            self.check_sizes(self.method.unwrap_or(MethodName::Boft))?;
        }
        let half = self.dtype.is_some_and(|dtype| dtype != Precision::F32);
        let whole = [MethodName::Lora, MethodName::Full];
        if half && self.method.is_some_and(|name| whole.contains(&name)) {
            let text = "--dtype is for frozen weights, and lora and full train in the precision of the model; leave it at f32";
            return Err(Error::Settings(text.to_string()));
        }
        if self.data.is_some() && self.model.is_none() {
            let text = "--data needs --model: the model that comes with this program reads the digits alone";
            return Err(Error::Settings(text.to_string()));
        }
        if self.model.is_some() && self.data.is_none() {
            let text = "--model needs --data: the digits are too small for it";
            return Err(Error::Settings(text.to_string()));
        }
        if self.data.is_none() && self.image_size.is_some() {
            let text = "--image-size needs --data: the digits have 8 pixels along each side";
            return Err(Error::Settings(text.to_string()));
        }
        if self.data.is_none() && self.augment == Some(Augment::Standard) {
            let text = "--augment standard needs --data: a mirrored digit is no digit";
            return Err(Error::Settings(text.to_string()));
        }
        Ok(())
    }

    /// Refuses sizes that a method does not have.
    fn check_sizes(&self, name: MethodName) -> Result<(), Error> {
        let boft = [MethodName::Boft];
        let rotations = [MethodName::Boft, MethodName::Oft];
        let rules: [(&str, bool, &[MethodName]); 5] = [
            ("--factors", self.factors.is_some(), &boft),
            ("--dropout", self.dropout.is_some(), &boft),
            ("--block-size", self.block_size.is_some(), &rotations),
            ("--neumann", self.neumann.is_some(), &[MethodName::Oft]),
            ("--rank", self.rank.is_some(), &[MethodName::Lora]),
        ];
        for (flag, given, methods) in rules {
            if given && !methods.contains(&name) {
                let names: Vec<String> = methods.iter().map(|name| name.text()).collect();
                return Err(Error::Settings(format!(
                    "only --method {} takes {flag}",
                    names.join(" or ")
                )));
            }
        }
        Ok(())
    }

    /// Images per optimizer step.
    pub(super) fn batch(&self) -> usize {
        self.batch_size.unwrap_or(32)
    }

    /// The method that is asked for, which an adapter to start from decides where there is one.
    ///
    /// # Errors
    ///
    /// The adapter holds another method, or other sizes than were asked for.
    pub(super) fn method(&self, adapter: Option<&Method>) -> Result<Method, Error> {
        let Some(adapter) = adapter else {
            return Ok(self.method.unwrap_or(MethodName::Boft).with(self));
        };
        let of_adapter = Self::of(adapter);
        let name = self.method.or(of_adapter.method);
        let name = name.unwrap_or(MethodName::Boft);
        self.check_sizes(name)?;
        let sizes = Self {
            block_size: self.block_size.or(of_adapter.block_size),
            factors: self.factors.or(of_adapter.factors),
            dropout: self.dropout.or(of_adapter.dropout),
            neumann: self.neumann.or(of_adapter.neumann),
            rank: self.rank.or(of_adapter.rank),
            ..Self::default()
        };
        let asked = name.with(&sizes);
        match asked == *adapter {
            true => Ok(asked),
            false => Err(Error::Settings(format!(
                "--adapter holds {adapter}, so {asked} has no place beside it; leave its method and its sizes out"
            ))),
        }
    }

    /// The settings that stand for a method.
    pub(super) fn of(method: &Method) -> Self {
        let mut options = Self::default();
        options.method = Some(match method {
            Method::Linear => MethodName::Linear,
            Method::Lora { rank } => {
                options.rank = Some(*rank);
                MethodName::Lora
            }
            Method::Oft { block_size, cayley } => {
                options.block_size = Some(*block_size);
                if let Cayley::Neumann { terms } = cayley {
                    options.neumann = Some(*terms);
                }
                MethodName::Oft
            }
            Method::Boft {
                block_size,
                factors,
                dropout,
            } => {
                options.block_size = Some(*block_size);
                options.factors = Some(*factors);
                options.dropout = Some(*dropout);
                MethodName::Boft
            }
            Method::Full => MethodName::Full,
        });
        options
    }
}

impl MethodName {
    /// Every method, from the fewest trained numbers to the most.
    pub const ALL: [Self; 5] = [Self::Linear, Self::Lora, Self::Oft, Self::Boft, Self::Full];

    /// The method with the sizes that are given, and the defaults for the rest.
    pub fn with(self, options: &Options) -> Method {
        match self {
            Self::Linear => Method::Linear,
            Self::Lora => Method::Lora {
                rank: options.rank.unwrap_or(2),
            },
            Self::Oft => Method::Oft {
                block_size: options.block_size.unwrap_or(8),
                cayley: options
                    .neumann
                    .map_or(Cayley::Exact, |terms| Cayley::Neumann { terms }),
            },
            Self::Boft => Method::Boft {
                block_size: options.block_size.unwrap_or(4),
                factors: options.factors.unwrap_or(2),
                dropout: options.dropout.unwrap_or(0.1),
            },
            Self::Full => Method::Full,
        }
    }

    /// Whether a method is of this kind.
    pub fn is(self, method: &Method) -> bool {
        matches!(
            (self, method),
            (Self::Linear, Method::Linear)
                | (Self::Lora, Method::Lora { .. })
                | (Self::Oft, Method::Oft { .. })
                | (Self::Boft, Method::Boft { .. })
                | (Self::Full, Method::Full)
        )
    }

    /// The name on the command line.
    fn text(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_string())
    }
}
