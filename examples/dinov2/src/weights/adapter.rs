//! What a training has learned, in a folder: written by [`save`], read by [`AdapterFolder`].

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ParamGroup};
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot, SafetensorsStore};
use burn_boft::peft::{CONFIG_FILE, Folder, LoadOptions, SaveOptions, TENSORS_FILE, read_settings};
use burn_boft::{Adapter, AdapterConfig, KeyMap, Transformers};
use serde_json::{Value, json};

use super::checkpoint::{CONFIG, Checkpoint, read_preprocessor};
use super::config::{Family, numbered, object, refused};
use super::error::{WeightsError, unreadable, unwritable};
use super::export::write_model;
use super::files::{Files, SAFETENSORS};
use super::fit::{HEAD, Named, extent, layer, slots};
use super::lora::Lora;
use super::whole;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;

/// The file of the preprocessing, which `transformers` reads too.
pub(super) const PREPROCESSOR: &str = "preprocessor_config.json";
/// The names of the classes in the order of the head's outputs. Neither PEFT nor `transformers` reads it.
pub(super) const CLASSES: &str = "classes.json";
/// The files of a linear probe.
pub(super) const HEAD_SETTINGS: &str = "head.json";
pub(super) const HEAD_TENSORS: &str = "head.safetensors";

/// PEFT's setting that names the base.
const BASE: &str = "base_model_name_or_path";

/// A trained model, with everything that its folder needs so that predictions need nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// The trained model, with its adapter attached.
    pub model: &'a Dinov2ForImageClassification,
    /// How it was trained.
    pub method: &'a Method,
    /// What it was trained from.
    pub checkpoint: &'a Checkpoint,
    /// The names of the classes in the order of the head's outputs.
    pub labels: &'a [String],
    /// How images become pixels, as a `preprocessor_config.json`; its crop is the image size.
    pub preprocessor: &'a Value,
    /// Whose names of modules PEFT is given. Adapters are loaded into a model in memory, whose names transformers 5
    /// changed.
    pub names: Transformers,
}

/// Writes what was trained into a folder, which appears complete or not at all, and returns the size of its weights in
/// bytes.
///
/// | method | files |
/// |---|---|
/// | BOFT, OFT, LoRA | `adapter_config.json` and `adapter_model.safetensors`, for PEFT |
/// | linear probe | `head.json` and `head.safetensors` |
/// | full | `config.json` and `model.safetensors`, for `transformers` |
///
/// Beside them are `preprocessor_config.json` and, except for `full`, `classes.json`. An existing folder is replaced if it
/// holds nothing else. A process that is killed while it replaces one leaves the old folder or the new one, in the worst
/// case under a hidden name beside.
///
/// # Errors
///
/// - [`WeightsError::Labels`]: the names do not fit the head.
/// - [`WeightsError::NotAdapted`], [`WeightsError::Extract`]: the model does not carry the adapter of the method.
/// - [`WeightsError::NotMerged`]: a fully trained model carries an adapter.
/// - [`WeightsError::Occupied`], [`WeightsError::NoName`], [`WeightsError::IsFile`]: the folder cannot be replaced.
/// - [`WeightsError::Save`], [`WeightsError::Write`]: a file cannot be written.
pub fn save(saved: &Saved, folder: &Path) -> Result<u64, WeightsError> {
    let Saved {
        model,
        method,
        checkpoint,
        labels,
        preprocessor,
        names,
    } = *saved;
    check_labels(model, labels)?;
    let names = key_map(checkpoint.family().prefix(), names)?;
    whole::write(folder, |folder| {
        let weights = match method {
            Method::Full => {
                write_model(model, checkpoint, labels, preprocessor, folder)?;
                SAFETENSORS
            }
            Method::Linear => {
                write_head(model, checkpoint, folder)?;
                write_beside(Some(labels), Some(preprocessor), folder)?;
                HEAD_TENSORS
            }
            Method::Lora { .. } => {
                let lora = Lora::extract(model, checkpoint.name())?;
                lora.files(&names)?.write(folder)?;
                write_beside(Some(labels), Some(preprocessor), folder)?;
                TENSORS_FILE
            }
            Method::Oft { .. } | Method::Boft { .. } => {
                Adapter::extract(model)?
                    .with_base_model(checkpoint.name())
                    .save_with(folder, &SaveOptions::new().with_key_map(names))?;
                write_beside(Some(labels), Some(preprocessor), folder)?;
                TENSORS_FILE
            }
        };
        size(&folder.join(weights))
    })
}

/// A folder that [`save`] or PEFT wrote.
///
/// # Examples
///
/// ```no_run
/// use burn::tensor::Device;
/// use dinov2::weights::{AdapterFolder, Checkpoint};
///
/// let checkpoint = Checkpoint::open("facebook/dinov2-small")?;
/// let adapter = AdapterFolder::open("my-adapter".as_ref())?;
/// let (labels, _) = adapter.labels_for(&checkpoint)?;
/// let (model, _) = checkpoint.load(&labels, &Device::default())?;
/// let model = adapter.attach(model)?;
/// # drop(model);
/// # Ok::<(), dinov2::weights::WeightsError>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdapterFolder {
    folder: PathBuf,
    content: Content,
    labels: Option<Vec<String>>,
    preprocessor: Option<Value>,
    base: Option<String>,
    warnings: Vec<String>,
    /// The start of the names in its files.
    prefix: &'static str,
}

#[derive(Clone, Debug)]
enum Content {
    /// BOFT or OFT.
    Rotations(Box<Adapter>),
    Lora(Lora),
    /// A linear probe, of so many classes.
    Head {
        classes: usize,
    },
    /// A whole model.
    Model(Box<Checkpoint>),
}

/// Where the names of the classes of an adapter come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelOrigin {
    /// The adapter's folder.
    Adapter,
    /// The base, whose head has as many classes.
    Checkpoint,
    /// Nowhere: they are `LABEL_0`, `LABEL_1` and so on.
    Numbered,
}

impl AdapterFolder {
    /// Reads a folder: an adapter of BOFT, OFT or LoRA that was saved here or in Python, with names of transformers 4 or
    /// 5; a linear probe; or a whole model.
    ///
    /// # Errors
    ///
    /// - [`WeightsError::NoAdapter`], [`WeightsError::IsFile`], [`WeightsError::Read`]: there is no adapter.
    /// - [`WeightsError::Load`]: an adapter of BOFT or OFT that cannot be read.
    /// - [`WeightsError::Setting`]: an adapter of another method, or a variant that is not supported.
    /// - [`WeightsError::Misfit`]: tensors without their partner, and tensors that belong nowhere.
    /// - [`WeightsError::Json`], [`WeightsError::Malformed`]: a file is malformed.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        if folder.is_file() {
            return Err(WeightsError::IsFile {
                path: folder.to_path_buf(),
            });
        }
        fs::read_dir(folder).map_err(unreadable(folder))?;
        let mut opened = if folder.join(CONFIG_FILE).is_file() {
            Self::open_peft(folder)?
        } else if folder.join(HEAD_SETTINGS).is_file() {
            Self::open_head(folder)?
        } else if folder.join(CONFIG).is_file() {
            Self::open_model(folder)?
        } else {
            return Err(WeightsError::NoAdapter {
                folder: folder.to_path_buf(),
            });
        };
        opened.preprocessor = read_preprocessor(folder)?;
        if opened.labels.is_none() {
            opened.labels = opened.read_classes()?;
        }
        Ok(opened)
    }

    fn new(folder: &Path, content: Content) -> Self {
        Self {
            folder: folder.to_path_buf(),
            content,
            labels: None,
            preprocessor: None,
            base: None,
            warnings: Vec::new(),
            prefix: Family::Plain.prefix(),
        }
    }

    fn open_peft(folder: &Path) -> Result<Self, WeightsError> {
        let settings = read_settings(folder)?;
        let files = Folder::read(folder)?;
        let prefix = prefix_of(&files);
        let names = key_map(prefix, Transformers::V5)?;
        let mut opened = match settings.get("peft_type").and_then(Value::as_str) {
            Some("BOFT" | "OFT") => {
                let options = LoadOptions::new().with_key_map(names);
                let (adapter, report) = Adapter::load_with(folder, &options)?;
                let base = adapter.base_model().map(str::to_string);
                let mut opened = Self::new(folder, Content::Rotations(Box::new(adapter)));
                opened.warnings = [report.converted, report.warnings].concat();
                opened.base = base;
                opened
            }
            Some("LORA") => {
                let lora = Lora::parse(files, &names, folder)?;
                let base = lora.base().map(str::to_string);
                let mut opened = Self::new(folder, Content::Lora(lora));
                opened.base = base;
                opened
            }
            _ => {
                let path = folder.join(CONFIG_FILE);
                let expected = "only BOFT, OFT and LORA are supported";
                return Err(refused(&path, &settings, "peft_type", expected));
            }
        };
        opened.prefix = prefix;
        Ok(opened)
    }

    fn open_head(folder: &Path) -> Result<Self, WeightsError> {
        let path = folder.join(HEAD_SETTINGS);
        let settings = object(&fs::read(&path).map_err(unreadable(&path))?, &path)?;
        let path = folder.join(HEAD_TENSORS);
        let tensors = Files::safetensors(path.clone()).read()?;
        let weight = tensors.get("classifier.weight");
        let classes = weight.and_then(|weight| weight.shape.first().copied());
        let Some(classes) = classes else {
            return Err(WeightsError::Misfit {
                path,
                missing: vec!["classifier.weight".to_string()],
                unexpected: Vec::new(),
                wrong: Vec::new(),
            });
        };
        let mut opened = Self::new(folder, Content::Head { classes });
        opened.base = settings
            .get(BASE)
            .and_then(Value::as_str)
            .map(str::to_string);
        Ok(opened)
    }

    fn open_model(folder: &Path) -> Result<Self, WeightsError> {
        let checkpoint = Checkpoint::in_folder(folder, &folder.to_string_lossy())?;
        let labels = checkpoint.labels().map(<[String]>::to_vec);
        let mut opened = Self::new(folder, Content::Model(Box::new(checkpoint)));
        opened.labels = labels;
        Ok(opened)
    }

    /// The names of the classes, if they are saved.
    fn read_classes(&self) -> Result<Option<Vec<String>>, WeightsError> {
        let path = self.folder.join(CLASSES);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(unreadable(&path))?;
        let malformed = |reason| WeightsError::Json {
            path: path.clone(),
            expected: "a list of class names",
            reason,
        };
        let labels: Vec<String> =
            serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        match self.num_labels() {
            Some(classes) if classes != labels.len() => Err(malformed(format!(
                "it has {} names for a head with {classes} classes",
                labels.len(),
            ))),
            _ => Ok(Some(labels)),
        }
    }

    /// How it was trained, with the sizes of its first layer.
    pub fn method(&self) -> Method {
        match &self.content {
            Content::Rotations(adapter) => {
                let first = adapter.layers().first();
                let block_size = first.map_or(0, |layer| layer.block_size());
                match adapter.config() {
                    AdapterConfig::Boft(config) => Method::Boft {
                        block_size,
                        factors: first.map_or(1, |layer| layer.n_butterfly_factor()),
                        dropout: config.dropout,
                    },
                    config => Method::Oft {
                        block_size,
                        cayley: config.cayley(),
                    },
                }
            }
            Content::Lora(lora) => Method::Lora { rank: lora.rank() },
            Content::Head { .. } => Method::Linear,
            Content::Model(_) => Method::Full,
        }
    }

    /// The names of the classes in the order of the head's outputs. An adapter that was made in Python has none.
    pub fn labels(&self) -> Option<&[String]> {
        self.labels.as_deref()
    }

    /// How images become pixels, as a `preprocessor_config.json`. An adapter that was made in Python has none.
    pub fn preprocessor(&self) -> Option<&Value> {
        self.preprocessor.as_ref()
    }

    /// The model that it was trained from, as its folder names it.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// How many classes its head has, if it has one.
    pub fn num_labels(&self) -> Option<usize> {
        match &self.content {
            Content::Rotations(adapter) => {
                let mut tensors = adapter.tensors().iter();
                let weight =
                    tensors.find(|t| (t.module(), t.name()) == ("classifier", "weight"))?;
                weight.data().shape().first().copied()
            }
            Content::Lora(lora) => lora.head()?.shape().first().copied(),
            Content::Head { classes } => Some(*classes),
            Content::Model(checkpoint) => checkpoint.labels().map(<[String]>::len),
        }
    }

    /// What was read differently from what the files say, or may not be what somebody meant; a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The names of the classes, and where they come from: the folder; else the base, if its head has as many classes;
    /// else numbers.
    ///
    /// # Errors
    ///
    /// [`WeightsError::NoHead`]: neither the adapter nor the base has a head.
    pub fn labels_for(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<(Vec<String>, LabelOrigin), WeightsError> {
        if let Some(labels) = self.labels() {
            return Ok((labels.to_vec(), LabelOrigin::Adapter));
        }
        match (self.num_labels(), checkpoint.labels()) {
            (None, None) => Err(WeightsError::NoHead {
                folder: self.folder.clone(),
                model: checkpoint.name().to_string(),
            }),
            (None, Some(labels)) => Ok((labels.to_vec(), LabelOrigin::Checkpoint)),
            (Some(classes), Some(labels)) if classes == labels.len() => {
                Ok((labels.to_vec(), LabelOrigin::Checkpoint))
            }
            (Some(classes), _) => Ok((numbered(classes), LabelOrigin::Numbered)),
        }
    }

    /// Puts what was trained on a plain model of the base, which has as many classes. What the method trains is
    /// trainable afterwards, and so is the head; everything else is frozen.
    ///
    /// # Errors
    ///
    /// - [`WeightsError::Classes`]: the model has another number of classes.
    /// - [`WeightsError::NotMerged`]: the model already carries an adapter.
    /// - [`WeightsError::Size`], [`WeightsError::Misfit`], [`WeightsError::Attach`]: the adapter is for another model.
    /// - [`WeightsError::Read`], [`WeightsError::Malformed`]: a file cannot be read.
    pub fn attach(
        &self,
        model: Dinov2ForImageClassification,
    ) -> Result<Dinov2ForImageClassification, WeightsError> {
        check_plain(&model)?;
        let [_, classes] = model.classifier.weight.lazy_shape().dims();
        if let Some(adapter) = self.num_labels().filter(|adapter| *adapter != classes) {
            return Err(WeightsError::Classes {
                folder: self.folder.clone(),
                adapter,
                model: classes,
            });
        }
        let head = ParamGroup::from_predicate(HEAD);
        match &self.content {
            Content::Rotations(adapter) => {
                let layers = adapter.layers().iter();
                self.check_size(&model, layers.map(|layer| (layer.path(), layer.d_input())))?;
                let attached = adapter.attach(model);
                let attached = attached.map_err(|source| WeightsError::Attach {
                    folder: self.folder.clone(),
                    source,
                })?;
                Ok(attached.unfreeze_group(head))
            }
            Content::Lora(lora) => {
                self.check_size(
                    &model,
                    lora.widths().map(|(path, width)| (path, Some(width))),
                )?;
                let attached = lora.attach(model, &self.folder.join(TENSORS_FILE))?;
                Ok(attached.unfreeze_group(head))
            }
            Content::Head { .. } => {
                let path = self.folder.join(HEAD_TENSORS);
                let tensors = Files::safetensors(path.clone()).read()?;
                let named = Named::of_model(&path, tensors);
                let model = named.place(model, |name| name.starts_with(HEAD))?;
                Ok(model.freeze().unfreeze_group(head))
            }
            Content::Model(checkpoint) => Ok(checkpoint.fill(model)?.unfreeze()),
        }
    }

    /// Refuses an adapter for a model of another size with one sentence, where its layers would all be listed.
    fn check_size<'a>(
        &self,
        model: &Dinov2ForImageClassification,
        adapted: impl Iterator<Item = (&'a str, Option<usize>)>,
    ) -> Result<(), WeightsError> {
        let [_, _, width] = model.dinov2.embeddings.cls_token.lazy_shape().dims();
        let layers = model.dinov2.encoder.layer.len();
        let (mut own_width, mut own_layers) = (None, 0);
        for (path, d_input) in adapted {
            let path = path.strip_prefix("dinov2.").unwrap_or(path);
            if let Some((index, name)) = layer(path) {
                own_layers = own_layers.max(index + 1);
                // The only layers whose input is not the width of the model.
                if !matches!(name, "mlp.fc2" | "mlp.weights_out") {
                    own_width = own_width.or(d_input);
                }
            }
        }
        if own_width.is_none_or(|own| own == width) && own_layers <= layers {
            return Ok(());
        }
        Err(WeightsError::Size {
            path: self.folder.clone(),
            what: "adapter",
            found: format!(
                "is for a model {}",
                extent(own_width.unwrap_or(width), own_layers)
            ),
            said_by: "the model is",
            said: extent(width, layers),
        })
    }

    /// Writes the adapter again as PEFT reads it, with the names of a generation of transformers.
    pub(super) fn write_peft(
        &self,
        version: Transformers,
        folder: &Path,
    ) -> Result<(), WeightsError> {
        let names = key_map(self.prefix, version)?;
        match &self.content {
            Content::Rotations(adapter) => {
                adapter.save_with(folder, &SaveOptions::new().with_key_map(names))?;
            }
            Content::Lora(lora) => lora.files(&names)?.write(folder)?,
            Content::Head { .. } => return Err(self.no_layout("a linear probe")),
            Content::Model(_) => return Err(self.no_layout("a whole model")),
        }
        write_beside(self.labels(), self.preprocessor(), folder)
    }

    fn no_layout(&self, found: &'static str) -> WeightsError {
        WeightsError::NoPeftLayout {
            folder: self.folder.clone(),
            found,
        }
    }
}

/// How the modules of a file whose names start with `prefix` are called here.
fn key_map(prefix: &'static str, version: Transformers) -> Result<KeyMap, WeightsError> {
    let parts = "(embeddings|encoder|layernorm)";
    let families = r"^(?:dinov2\.|dinov2_with_registers\.)?";
    let names =
        KeyMap::dinov2(version).with_to_model(&format!(r"{families}{parts}\b"), "dinov2.$1")?;
    Ok(match prefix == Family::Plain.prefix() {
        true => names,
        false => names.with_to_file(r"^dinov2\.", prefix)?,
    })
}

/// The start of the names of modules in PEFT's files: of a classifier of either family, or of a backbone.
fn prefix_of(files: &Folder) -> &'static str {
    let starts = |prefix: &str| {
        let start = format!("{}{prefix}", burn_boft::peft::PREFIX);
        files.tensors.keys().any(|key| key.starts_with(&start))
    };
    let families = [Family::Registers, Family::Plain];
    let family = families.into_iter().find(|family| starts(family.prefix()));
    match family {
        Some(family) => family.prefix(),
        None if starts("encoder.") => "",
        None => Family::Plain.prefix(),
    }
}

/// Refuses a model whose parameters are not plain weights.
pub(super) fn check_plain(model: &Dinov2ForImageClassification) -> Result<(), WeightsError> {
    // Burn puts the parameters of an adapter below those of the layer.
    let is_adapter = |path: &str| path.contains(".weight.");
    match slots(model).iter().any(|slot| is_adapter(&slot.path)) {
        true => Err(WeightsError::NotMerged),
        false => Ok(()),
    }
}

/// Refuses names that are more or fewer than the classes of the head.
pub(super) fn check_labels(
    model: &Dinov2ForImageClassification,
    labels: &[String],
) -> Result<(), WeightsError> {
    let [_, classes] = model.classifier.weight.lazy_shape().dims();
    match labels.len() == classes {
        true => Ok(()),
        false => Err(WeightsError::Labels {
            names: labels.len(),
            classes,
        }),
    }
}

/// The head alone.
fn write_head(
    model: &Dinov2ForImageClassification,
    checkpoint: &Checkpoint,
    folder: &Path,
) -> Result<(), WeightsError> {
    let settings = json!({ "kind": "linear probe", BASE: checkpoint.name() });
    write_json(&folder.join(HEAD_SETTINGS), &settings)?;
    write_tensors(model, &folder.join(HEAD_TENSORS), |store| {
        store.with_regex(r"^classifier\.")
    })
}

/// What predictions need beside the weights.
fn write_beside(
    labels: Option<&[String]>,
    preprocessor: Option<&Value>,
    folder: &Path,
) -> Result<(), WeightsError> {
    if let Some(labels) = labels {
        write_json(&folder.join(CLASSES), &json!(labels))?;
    }
    if let Some(preprocessor) = preprocessor {
        write_json(&folder.join(PREPROCESSOR), preprocessor)?;
    }
    Ok(())
}

/// Writes the tensors of a model with PyTorch's names and orientation.
pub(super) fn write_tensors(
    model: &Dinov2ForImageClassification,
    path: &Path,
    with: impl FnOnce(SafetensorsStore) -> SafetensorsStore,
) -> Result<(), WeightsError> {
    let store = SafetensorsStore::from_file(path)
        .with_to_adapter(BurnToPyTorchAdapter)
        .clear_metadata()
        // `transformers` refuses files that do not say this.
        .metadata("format", "pt");
    let written = model.save_into(&mut with(store));
    written.map_err(|error| unwritable(path)(std::io::Error::other(error.to_string())))
}

/// Writes JSON as Python does: sorted, with two spaces for each level.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), WeightsError> {
    let failed = |error: std::io::Error| unwritable(path)(error);
    let text = serde_json::to_string_pretty(value).map_err(|error| failed(error.into()))?;
    fs::write(path, text + "\n").map_err(failed)
}

/// The size of a file in bytes.
pub(super) fn size(path: &Path) -> Result<u64, WeightsError> {
    Ok(fs::metadata(path).map_err(unwritable(path))?.len())
}
