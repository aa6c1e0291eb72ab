//! [`Adapter`]: a trained adapter as a value.
//!
//! An adapter is made of [`AdapterLayer`]s and [`SavedTensor`]s on the host. It comes out of a model with
//! [`Adapter::extract`] or out of a file with [`Adapter::load`], and goes into a model with [`Adapter::attach`]. What does
//! not fit is a [`Mismatch`]; a [`KeyMap`] says how the names of a file and of a model correspond.

mod attach;
mod bank;
mod extract;
pub(crate) mod keymap;
pub(crate) mod layer;
mod measure;
pub(crate) mod mismatch;
pub(crate) mod reconcile;
mod report;
mod strength;

use burn::tensor::{DType, Device, Tensor};
use serde_json::{Map, Value};

pub use attach::AttachError;
pub use bank::{AdapterBank, AdapterId, BankError, BankMisfit};
pub use extract::ExtractError;
pub use keymap::{KeyMap, KeyMapError, Place, Transformers, join};
pub use layer::{AdapterLayer, Axis, SavedTensor, TensorOwner};
pub use measure::LayerMeasure;
pub use mismatch::{FitError, Mismatch, Missing, PartsError, SizeError, Unexpected, Wrong};
pub use report::LoadReport;
pub use strength::StrengthError;

use crate::config::{AdapterConfig, LayerKind, Selection};
use crate::ops::Blocks;
use crate::rotation::Method;
use crate::tensors::is_float;

/// A trained adapter as a value: its settings, and the numbers of every layer on the host.
///
/// It needs no model: [`Adapter::load`] and [`Adapter::save`] read and write PEFT's folder,
/// `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The settings, with the model's names.
    pub(crate) config: AdapterConfig,
    /// The adapted layers, sorted by path.
    pub(crate) layers: Vec<AdapterLayer>,
    /// Biases and parts of saved modules, sorted by module and name.
    pub(crate) tensors: Vec<SavedTensor>,
    /// Copies of embeddings and heads of the base, sorted in the same way.
    pub(crate) copies: Vec<SavedTensor>,
    /// Settings that say where it comes from.
    pub(crate) about: Map<String, Value>,
    /// What the file promised, in its own names.
    pub(crate) promised: Option<Promise>,
    /// What PEFT would save beside the modules to save, as far as the model is known that the adapter was extracted from.
    pub(crate) saved_too: Vec<SavedToo>,
}

/// A module of a model that is not saved, although its path ends with an entry of `modules_to_save`: not at a dot, to which PEFT
/// has no regard.
#[derive(Debug, Clone)]
pub(crate) struct SavedToo {
    /// The entry, such as `head`.
    pub(crate) entry: String,
    /// The path of the module, such as `lm_head`.
    pub(crate) module: String,
}

/// What a file says it adapts and saves, in its own names.
///
/// Only a model can say what a regular expression or `all-linear` selects, so the promise of a file is checked when the
/// adapter is attached: what it names and the file has not is missing.
#[derive(Debug, Clone)]
pub(crate) struct Promise {
    /// The settings of the file before the tensors and the key map changed them.
    pub(crate) selection: Selection,
    /// The key map that the file was read with.
    pub(crate) names: KeyMap,
}

impl Adapter {
    /// Builds an adapter from tensors you computed yourself.
    ///
    /// The shapes of the tensors decide how many factors there are, how large the blocks are and whether there is a
    /// scale; the settings are changed to say the same. Targets are not compared with the layers before the adapter is
    /// attached.
    ///
    /// # Errors
    ///
    /// [`Mismatch`], with every entry that applies:
    ///
    /// - [`Wrong::NotOft`]: a layer has factors, a scale or unshared blocks that the settings of OFT do not allow.
    /// - [`Wrong::Bias`]: a bias does not have as many numbers as its layer has outputs.
    /// - [`Wrong::Kept`]: a tensor is neither of floats nor of i64.
    ///
    /// Settings are checked where they are used: when the adapter is attached or saved.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::AdapterLayer;
    /// use burn_boft::{Adapter, LayerKind, OftConfig};
    ///
    /// // Six blocks of 4 channels, each with 4·3/2 numbers above the diagonal.
    /// let skew = TensorData::new(vec![0.1f32; 6 * 6], [1, 6, 6]);
    /// let layer = AdapterLayer::new("query", Some(LayerKind::Linear), skew, None)?;
    /// let adapter = Adapter::from_parts(OftConfig::new(), vec![layer], Vec::new())?;
    /// assert_eq!(adapter.layers()[0].d_input(), Some(24));
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn from_parts(
        config: impl Into<AdapterConfig>,
        mut layers: Vec<AdapterLayer>,
        tensors: Vec<SavedTensor>,
    ) -> Result<Self, Mismatch> {
        let mut config = config.into();
        let mut mismatch = Mismatch::default();
        let method = Method::unchecked(&config);
        for layer in &mut layers {
            let [m, rows, _] = layer.skew.shape().dims::<3>();
            let is_shared = method.block_share() && rows != 1;
            if is_shared || !method.allows(m, layer.scale.is_some()) {
                let path = layer.path.clone();
                mismatch.wrong.push(Wrong::NotOft { path });
            }
            layer.block_share = method.shares(layer.block_share);
        }
        for tensor in &tensors {
            let dtype = tensor.data.dtype();
            if !is_float(dtype) && dtype != DType::I64 {
                mismatch.wrong.push(Wrong::Kept {
                    path: join(&tensor.module, &tensor.name),
                    dtype: dtype.name(),
                });
            }
        }
        reconcile::check_biases(&layers, &tensors, &mut mismatch);
        if !mismatch.is_empty() {
            return Err(mismatch);
        }
        reconcile::reconcile(&mut config, &layers, &mut LoadReport::default());
        let mut adapter = Self {
            config,
            layers,
            tensors,
            copies: Vec::new(),
            about: Map::new(),
            promised: None,
            saved_too: Vec::new(),
        };
        adapter.sort();
        Ok(adapter)
    }

    /// Orders layers and tensors by path, so that two adapters with the same numbers are the same and are written the
    /// same.
    pub(crate) fn sort(&mut self) {
        self.layers.sort_by(|a, b| a.path.cmp(&b.path));
        for tensors in [&mut self.tensors, &mut self.copies] {
            tensors.sort_by(|a, b| (&a.module, &a.name).cmp(&(&b.module, &b.name)));
        }
    }

    /// The settings, with the model's names.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The adapted layers, by path.
    pub fn layers(&self) -> &[AdapterLayer] {
        &self.layers
    }

    /// The tensors that travel with the rotations: trained biases, and the modules to save.
    pub fn tensors(&self) -> &[SavedTensor] {
        &self.tensors
    }

    /// Tensors of the base model that PEFT keeps a copy of: embeddings and heads, where one of them is a target or where the
    /// vocabulary was resized.
    ///
    /// They are not trained. PEFT puts them into the model that it loads the adapter into; here the model must have the
    /// same numbers.
    pub fn base_copies(&self) -> &[SavedTensor] {
        &self.copies
    }

    /// Sets the copies of tensors of the base model, which [`Adapter::save`] writes along.
    pub fn with_base_copies(mut self, copies: Vec<SavedTensor>) -> Self {
        self.copies = copies;
        self.sort();
        self
    }

    /// The same adapter with its rotations and scales in f64, so that what is computed with them is not rounded to f32.
    pub fn in_f64(mut self) -> Self {
        for layer in &mut self.layers {
            for data in [Some(&mut layer.skew), layer.scale.as_mut()]
                .into_iter()
                .flatten()
            {
                *data = data.clone().convert_dtype(DType::F64);
            }
        }
        self
    }

    /// The settings that say where the adapter comes from: the model that it is for, its revision, the task.
    pub fn about(&self) -> &Map<String, Value> {
        &self.about
    }

    /// PEFT's `base_model_name_or_path`: the model that the adapter is for.
    pub fn base_model(&self) -> Option<&str> {
        self.about.get("base_model_name_or_path")?.as_str()
    }

    /// Sets the model that the adapter is for, which PEFT looks up.
    pub fn with_base_model(mut self, name: impl Into<String>) -> Self {
        let key = "base_model_name_or_path".to_string();
        self.about.insert(key, Value::String(name.into()));
        self
    }

    /// Whether the rotations are orthogonal, so that their transposes undo them: with the exact Cayley map they are, with a
    /// Neumann polynomial only nearly.
    pub fn is_orthogonal(&self) -> bool {
        Method::unchecked(&self.config).is_orthogonal()
    }

    /// The rotation of one of the layers, for a weight of `d_input` by `d_output`; none where blocks of one channel do
    /// not rotate. It is of the axis that [`AdapterLayer::axis`] says.
    ///
    /// It is computed on `device` with the settings of this adapter, within the COFT radius if there is one and without
    /// the scale.
    ///
    /// # Errors
    ///
    /// [`Mismatch`]:
    ///
    /// - [`Wrong::Fit`]: the layer does not fit these widths.
    /// - [`Wrong::Rotation`]: the settings give no layer a rotation.
    pub fn rotation(
        &self,
        layer: &AdapterLayer,
        [d_input, d_output]: [usize; 2],
        device: &Device,
    ) -> Result<Option<Blocks>, Mismatch> {
        if !layer.rotates() {
            return Ok(None);
        }
        let butterfly = layer.butterfly(d_input, d_output);
        let butterfly = butterfly.map_err(|reason| Wrong::Fit {
            path: layer.path.clone(),
            reason,
        })?;
        let kind = layer.kind.unwrap_or(LayerKind::Linear);
        let method = Method::new(&self.config).map_err(|errors| Mismatch {
            wrong: errors.into_iter().map(Wrong::from).collect(),
            ..Mismatch::default()
        })?;
        let rotation = method.with_sizes(kind, butterfly, layer.scale.is_some());
        let skew = Tensor::<3>::from_data(layer.skew.clone(), (device, layer.skew.dtype()));
        Ok(Some(rotation.blocks(skew)))
    }
}
