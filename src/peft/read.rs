//! PEFT's tensors, read.
//!
//! 1. [`Reader::new`] reads the settings, and chooses the layout from them and from the keys of the file.
//! 2. [`Sorted`] puts each tensor where its key says it belongs: a layer, a saved module, a bias, or nowhere.
//! 3. Layers are made of their tensors, whose shapes decide over the settings (`reconcile`).
//! 4. `to_model_names` gives everything the model's names, and joins layers that the model fuses.
//!
//! Nothing stops at the first tensor that is amiss: a caller learns of all of them at once.
//!
//! PEFT builds the adapters from the settings first and then copies the tensors of the file into them. It drops a tensor
//! without a place and says nothing, and a layer without a tensor keeps its initial numbers. Here the tensors are the
//! starting point, so that both are found.
//!
//! PEFT's file: `src/peft/utils/save_and_load.py`, `set_peft_model_state_dict`, read in PEFT 0.21.2.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use burn::tensor::{DType, TensorData};
use serde_json::{Map, Value};

use super::config_json::{self, ConfigError, Settings};
use super::folder::Folder;
use super::fused::to_model_names;
use super::keys::{
    EMBEDDING_ROTATION, Format, Layout, Leaf, PREFIX, is_copied, key, leaf, wrapped,
};
use super::legacy::{self, Squares};
use super::{notes, scale};
use crate::config::{AdapterConfig, Bias, LayerKind, Selection, TargetModules};
use crate::select::{Saved, SavedByPeft, endings, longest};
use crate::tensors::{from_values, is_finite, values, widened};
use crate::value::LoadReport;
use crate::value::keymap::{KeyMap, KeyMapError};
use crate::value::layer::{AdapterLayer, Axis, SavedTensor, block_size, check_sizes, pack};
use crate::value::mismatch::{Mismatch, Missing, SizeError, Unexpected, Wrong};
use crate::value::reconcile::{check_biases, reconcile};

/// An adapter's file, understood.
pub(super) struct Parsed {
    /// The settings, changed to say what the tensors are, with the model's names.
    pub(super) config: AdapterConfig,
    /// The adapted layers under the model's names, not sorted yet.
    pub(super) layers: Vec<AdapterLayer>,
    /// Biases and parts of saved modules under the model's names, in PyTorch's orientation.
    pub(super) tensors: Vec<SavedTensor>,
    /// Copies of tensors of the base, in the same way.
    pub(super) copies: Vec<SavedTensor>,
}

/// What reading found beside the adapter.
#[derive(Default)]
pub(super) struct Findings {
    /// What was used, what was read differently from what the file says, and what may surprise. `missing` and
    /// `unexpected` stay empty here: those are in the mismatch, and the caller decides whether they are errors.
    pub(super) report: LoadReport,
    /// What is missing, unexpected or wrong, under the names of the file.
    pub(super) mismatch: Mismatch,
}

/// How a file is read, decided from its settings and its keys before any tensor is.
pub(super) struct Reader {
    /// The settings as the file says them, until [`Reader::read`] lets the tensors decide.
    config: AdapterConfig,
    /// How the tensors of every layer are laid out. A file has one layout.
    layout: Layout,
    /// Whether the settings say that one block serves all blocks of a layer. Packed blocks must then have one row.
    block_share: bool,
    /// For files of PEFT 0.14 to 0.15.2.
    squares: Option<Squares>,
    /// What is said where the Neumann series is an old one.
    old_series: Option<String>,
}

impl Reader {
    /// Chooses how a file with these settings and keys is read.
    ///
    /// The settings alone do not suffice: OFT of PEFT 0.14 and OFT of PEFT 0.21 have the same `peft_type`, and only the
    /// keys tell their layouts apart. A file with squares becomes BOFT with one factor, because that is what it
    /// computes.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the settings are refused, by the rules of `config_json`. Tensors are not looked at.
    pub(super) fn new<'a>(
        json: &Map<String, Value>,
        keys: impl Iterator<Item = &'a String>,
        report: &mut LoadReport,
    ) -> Result<Self, ConfigError> {
        let Settings {
            config,
            format,
            block_share,
            warnings,
        } = config_json::read(json)?;
        report.warnings.extend(warnings);
        let layout = Layout::of(format, keys);
        let (config, squares) = match layout {
            Layout::Squares => {
                let (config, squares) = legacy::settings(json)?;
                (config.into(), Some(squares))
            }
            Layout::Boft | Layout::Oft => (config, None),
        };
        Ok(Self {
            old_series: config_json::warn_of_old_series(&config, json),
            config,
            layout,
            block_share,
            squares,
        })
    }

    /// The settings of the file, in its own names.
    pub(super) fn selection(&self) -> &Selection {
        self.config.selection()
    }

    /// Reads the tensors of a file. What is amiss goes to the findings.
    ///
    /// The order matters. Layers get their sizes and the settings follow them while all names are still those of the
    /// file, because the messages are about the file. Scales that the metadata says are untrained are taken out before
    /// the settings are adjusted, so that the settings then say that there is no scale. Only then do all names become
    /// the model's.
    ///
    /// # Errors
    ///
    /// [`KeyMapError`]: a pattern has no answer for a name, or two modules of the file would get the same name in the
    /// model.
    pub(super) fn read(
        mut self,
        files: Folder,
        names: &KeyMap,
        findings: &mut Findings,
    ) -> Result<Parsed, KeyMapError> {
        let Folder {
            tensors, metadata, ..
        } = files;
        let selection = self.selection().clone();
        let adapted = adapted(tensors.keys());
        let entries = Entries::new(&selection.modules_to_save);
        let mut sorted = Sorted::default();
        for (key, data) in tensors {
            sorted.sort(key, data, self.layout, (selection.bias, &entries), findings);
        }
        let Sorted {
            slots,
            mut tensors,
            mut copies,
            wrapped,
            saved,
        } = sorted;
        // PEFT puts `base_layer` into the path of adapted layers only.
        for module in wrapped.iter().filter(|module| !slots.contains_key(*module)) {
            let key = key(module, self.layout.rotation());
            findings.mismatch.missing.push(Missing::Tensor { key });
            tensors.retain(|tensor| tensor.module != *module);
        }
        let slots = slots.into_iter();
        let mut layers: Vec<_> = slots
            .filter_map(|(path, slots)| self.layer(path, slots, findings))
            .collect();
        let Findings { report, mismatch } = findings;
        if layers.is_empty() && mismatch.is_empty() {
            let tensor = self.layout.rotation();
            mismatch.missing.push(Missing::AllLayers { tensor });
        }
        report.warnings.extend(self.old_series);
        // A file without any layer is reported as that.
        if !adapted.is_empty() {
            warn_of_lost((&selection, &entries), &adapted, &tensors, &saved, report);
        }
        check_biases(&layers, &tensors, mismatch);
        notes::restore(&metadata, &mut self.config, &mut layers, report);
        reconcile(&mut self.config, &layers, report);
        to_model_names(names, (&mut layers, &mut tensors, &mut copies), mismatch)?;
        let lost = lost_modules(&selection, &saved);
        let own = self.config.selection_mut();
        name_in_model(own, names, &layers, saved.iter().chain(lost))?;
        Ok(Parsed {
            config: self.config,
            layers,
            tensors,
            copies,
        })
    }

    /// Reads one layer, and says what may surprise about it. None where a finding says why there is no layer.
    ///
    /// - Without a rotation there is no layer: a scale alone does not say how large the blocks are.
    /// - BOFT without `boft_s` is a finding, and still a layer, so that a partial load has its rotation.
    /// - `oft_r` without `oft_s` is from PEFT 0.13 or older, whose numbers mean another rotation.
    fn layer(&self, path: String, slots: Slots, findings: &mut Findings) -> Option<AdapterLayer> {
        let Findings { report, mismatch } = findings;
        let named = |tensor| key(&path, tensor);
        let mut missing = |tensor| {
            mismatch
                .missing
                .push(Missing::Tensor { key: named(tensor) })
        };
        let layer = match (self.layout, slots.rotation, slots.scale) {
            (layout, None, _) => {
                missing(layout.rotation());
                return None;
            }
            (Layout::Oft, Some(r), _) => {
                let kind = slots.is_embedding.then_some(LayerKind::Embedding);
                read_oft(path.clone(), kind, &r, self.block_share)
            }
            (Layout::Boft, Some(r), s) => {
                if s.is_none() {
                    missing("boft_s");
                }
                read_boft(path.clone(), &r, s.as_ref())
            }
            (Layout::Squares, Some(r), Some(s)) => {
                let squares = self.squares.as_ref()?;
                let layer = squares.read(&path, &r, &s);
                if layer.is_ok() {
                    report.converted.push(squares.note(&path));
                }
                layer
            }
            (Layout::Squares, Some(_), None) => Err(Wrong::OldRotation {
                key: named("oft_r"),
            }),
        };
        let layer = layer.map_err(|wrong| mismatch.wrong.push(wrong)).ok()?;
        report.warnings.extend(surprises(&layer));
        Some(layer)
    }
}

/// What is read as it is and may surprise.
///
/// PEFT's OFT shrinks the blocks to one channel where 1 is the nearest size that divides the layer
/// (`adjust_oft_parameters` in `src/peft/tuners/oft/layer.py`), so such a layer trained nothing. NaN and infinity load as they are, so that a
/// broken adapter can be inspected; [`merge`](crate::merge()) refuses the weights that they make.
fn surprises(layer: &AdapterLayer) -> impl Iterator<Item = String> {
    let path = &layer.path;
    let idle = (!layer.rotates()).then(|| {
        let rest = match layer.is_identity() {
            true => "nothing is attached there",
            false => "its scale can be merged, and not attached",
        };
        format!("`{path}` has blocks of one channel, which do not rotate; {rest}")
    });
    let mut numbers = [Some(&layer.skew), layer.scale.as_ref()]
        .into_iter()
        .flatten();
    let infinite = numbers
        .any(|numbers| !is_finite(numbers))
        .then(|| format!("the adapter of `{path}` holds NaN or infinity"));
    idle.into_iter().chain(infinite)
}

/// The tensors of one adapted layer.
#[derive(Default)]
struct Slots {
    /// The tensor that [`Layout::rotation`] names, in the shape of its layout.
    rotation: Option<TensorData>,
    /// Whether the rotation is that of an embedding, which has a name of its own.
    is_embedding: bool,
    /// The tensor that [`Layout::scale`] names, `[d_output, 1]` or `[1, d_output]`.
    scale: Option<TensorData>,
}

/// Tensors by what they belong to.
#[derive(Default)]
struct Sorted {
    /// The tensors of adapters by the path of their layer.
    slots: BTreeMap<String, Slots>,
    /// Biases and parts of saved modules.
    tensors: Vec<SavedTensor>,
    /// Copies of tensors of the base.
    copies: Vec<SavedTensor>,
    /// Modules that PEFT wrapped, by the keys of their own parameters.
    wrapped: BTreeSet<String>,
    /// Names of modules to save that have tensors.
    saved: BTreeSet<String>,
}

impl Sorted {
    /// Puts one tensor where it belongs, or says why it belongs nowhere.
    ///
    /// | the key names | what happens |
    /// |---|---|
    /// | a rotation or scale of the layout of the file | it belongs to its layer |
    /// | a rotation or scale of another layout | it is refused, see [`refuse_layout`] |
    /// | `boft_P` | it is left out: the permutation follows from the sizes |
    /// | a rotation of an embedding | it is the one of its layer in a file of OFT's today, and refused in any other |
    /// | `base_layer.bias` | it is a trained bias, unless the settings train none |
    /// | another weight or bias of an embedding or head | it is a copy of the base's |
    /// | any other `base_layer.…` | it is unexpected: an adapter changes no base weight |
    /// | a bias in PEFT's wrapper of a saved module | it is left out where the settings train all biases |
    /// | a part of a module to save | it is kept |
    /// | any other bias | it is a trained bias where the settings train all of them |
    /// | anything else | it is unexpected |
    ///
    /// Whole numbers are unexpected wherever they are, except the count of batches that PyTorch's batch norms carry.
    ///
    /// # References
    ///
    /// `_get_learnable_bias_state_dict` in `src/peft/tuners/tuners_utils.py` of PEFT 0.21.2 for the biases. PEFT 0.20
    /// and older collected keys that contain the letters `oft_` or `boft_`, so their files may hold weights of a module
    /// called `soft_gate`.
    fn sort(
        &mut self,
        key: String,
        data: TensorData,
        layout: Layout,
        (bias, entries): (Bias, &Entries),
        Findings { report, mismatch }: &mut Findings,
    ) {
        let Some((module, leaf)) = leaf(&key) else {
            let prefix = PREFIX;
            return mismatch.unexpected.push(Unexpected::Prefix { key, prefix });
        };
        if data.dtype() == DType::I64 && !key.ends_with("num_batches_tracked") {
            return mismatch.unexpected.push(Unexpected::Integers { key });
        }
        match leaf {
            Leaf::Rotation(found) | Leaf::Scale(found) if found != layout => {
                return refuse_layout(key, found, layout, mismatch);
            }
            Leaf::Rotation(_) => self.slots(module).rotation = Some(data),
            Leaf::Scale(_) => self.slots(module).scale = Some(data),
            Leaf::Permutation => return report.converted.push(legacy::permutation_note(&key)),
            Leaf::Embedding if layout != Layout::Oft => {
                return refuse_layout(key, Layout::Oft, layout, mismatch);
            }
            Leaf::Embedding => {
                let slots = self.slots(module);
                if slots.rotation.is_some() {
                    return mismatch.unexpected.push(Unexpected::SecondRotation { key });
                }
                (slots.rotation, slots.is_embedding) = (Some(data), true);
            }
            Leaf::Base("bias") if bias != Bias::None => {
                self.wrapped.insert(module.to_string());
                self.save(module, "bias", data);
            }
            Leaf::Base(name) if is_copied(module, name) => {
                self.wrapped.insert(module.to_string());
                self.copies.push(SavedTensor::new(module, name, data));
            }
            Leaf::Base("bias") => return mismatch.unexpected.push(Unexpected::Bias { key }),
            Leaf::Base(_) => return mismatch.unexpected.push(Unexpected::BaseWeight { key }),
            Leaf::Other(name)
                if wrapped(module).is_some_and(|saved| {
                    let is_collected = name == "bias" && bias == Bias::All;
                    is_collected || is_copied(saved, name) || !entries.of(saved).is_empty()
                }) =>
            {
                return report.converted.push(format!(
                    "`{key}` is left out: a copy that PEFT keeps beside the module it saves"
                ));
            }
            Leaf::Other(name) => {
                let saved_by = entries.of(module);
                let is_trained = name == "bias" && bias == Bias::All;
                if !saved_by.is_empty() || is_trained {
                    self.saved.extend(saved_by);
                    self.save(module, name, data);
                } else if is_copied(module, name) {
                    self.copies.push(SavedTensor::new(module, name, data));
                } else {
                    return mismatch.unexpected.push(Unexpected::Unclaimed { key });
                }
            }
        }
        report.applied.push(key);
    }

    /// The tensors of the layer at this path so far.
    fn slots(&mut self, module: &str) -> &mut Slots {
        self.slots.entry(module.to_string()).or_default()
    }

    /// Keeps a tensor that travels beside the rotations. Its module and its name are as the file says them.
    fn save(&mut self, module: &str, name: &str, data: TensorData) {
        self.tensors.push(SavedTensor::new(module, name, data));
    }
}

/// Says why a tensor of this layout is not read in a file of another one.
///
/// Two layouts of OFT in one file are wrong and stop even a partial load: whichever is left out, the model would
/// compute with half of its layers. A tensor of the other method is only unexpected.
fn refuse_layout(key: String, found: Layout, layout: Layout, mismatch: &mut Mismatch) {
    match (found.format(), layout.format()) {
        (Format::Oft, Format::Oft) => mismatch.wrong.push(Wrong::MixedVersions { key }),
        (found, expected) => mismatch.unexpected.push(Unexpected::Method {
            key,
            found: found.article(),
            expected: expected.article(),
        }),
    }
}

/// The modules that the keys of a file adapt, whether or not their tensors can be used: a layer whose tensor is refused
/// is reported for that, and not as lost too.
fn adapted<'a>(keys: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let module = |key: &'a String| match leaf(key)? {
        (_, Leaf::Base(_) | Leaf::Other(_)) => None,
        (module, _) => Some(module.to_string()),
    };
    keys.filter_map(module).collect()
}

/// Warns of what the settings name and the file has nothing of: PEFT passes over it.
///
/// - A name in `target_modules` without an adapter. Regular expressions and `all-linear` are not checked, since only a
///   model can say what they select; [`Adapter::attach`](crate::Adapter::attach) does.
/// - An entry of `modules_to_save` without tensors.
/// - Trained biases where the file has none. PEFT 0.20 and older did not save those of OFT, nor BOFT's for `boft_only`.
fn warn_of_lost(
    (selection, entries): (&Selection, &Entries),
    adapted: &BTreeSet<String>,
    tensors: &[SavedTensor],
    saved: &BTreeSet<String>,
    report: &mut LoadReport,
) {
    let warnings = &mut report.warnings;
    if let Some(TargetModules::Names(names)) = &selection.target_modules {
        let longest = longest(names);
        let adapted = adapted.iter().flat_map(|path| endings(path, longest));
        let adapted: HashSet<_> = adapted.collect();
        let is_lost =
            |name: &&String| !adapted.contains(name.as_str()) && entries.of(name).is_empty();
        warnings.extend(names.iter().filter(is_lost).map(|name| {
            format!("`target_modules` names `{name}`, and the file has no adapter of it")
        }));
    }
    let lost = lost_modules(selection, saved);
    warnings.extend(
        lost.map(|name| {
            format!("`modules_to_save` names `{name}`, and the file has nothing of it")
        }),
    );
    let is_trained =
        |tensor: &SavedTensor| tensor.name == "bias" && entries.of(&tensor.module).is_empty();
    if selection.bias != Bias::None && !tensors.iter().any(is_trained) {
        warnings.push(
            "the configuration trains biases, and the file has none: the layers have none, or PEFT 0.20 or older \
             trained them and did not save them"
                .to_string(),
        );
    }
}

/// The modules to save that the file has nothing of.
///
/// For a classification task, PEFT adds both `classifier` and `score` to the list (`PeftModelForSequenceClassification`
/// in `src/peft/peft_model.py`), and a model has one of the two. The other one is not lost.
fn lost_modules<'a>(
    selection: &'a Selection,
    saved: &BTreeSet<String>,
) -> impl Iterator<Item = &'a String> {
    /// PEFT names both where it trains a classifier, and a model has one.
    const HEADS: [&str; 2] = ["classifier", "score"];
    // A name ends a path where it starts the path read backwards, and then stands directly before it in their order.
    fn backwards(text: &str) -> String {
        text.chars().rev().collect()
    }
    let paths: BTreeSet<_> = saved.iter().map(|path| backwards(path)).collect();
    let is_found = move |name: &str| {
        let name = backwards(name);
        let next = paths.range(name.clone()..).next();
        next.is_some_and(|path| path.starts_with(&name))
    };
    let has_head = HEADS.into_iter().any(&is_found);
    let names = selection.modules_to_save.iter();
    names.filter(move |name| !(is_found(name) || has_head && HEADS.contains(&name.as_str())))
}

/// The entries of `modules_to_save`, indexed for many lookups by both rules of PEFT.
struct Entries {
    /// By the rule for what is not adapted, which compares between dots.
    between_dots: Saved,
    /// By the rule for what is saved, which compares endings without regard to dots.
    by_endings: SavedByPeft,
}

impl Entries {
    fn new(names: &[String]) -> Self {
        Self {
            between_dots: Saved::new(names),
            by_endings: SavedByPeft::new(names),
        }
    }

    /// The entries that a module of a file goes back to, spelt so that they match at dots.
    ///
    /// PEFT's `head` saves `lm_head` too, and the entry is then `lm_head`.
    fn of(&self, module: &str) -> Vec<String> {
        let named: Vec<_> = self.between_dots.of(module).map(str::to_string).collect();
        if !named.is_empty() {
            return named;
        }
        let is_saved = |path: &&str| self.by_endings.of(path).is_some();
        let ends = module.match_indices('.').map(|(dot, _)| dot);
        let mut paths = ends.chain([module.len()]).map(|end| &module[..end]);
        paths
            .find(is_saved)
            .map(str::to_string)
            .into_iter()
            .collect()
    }
}

/// OFT's packed blocks: the strict upper triangle of each, row by row, as in an [`AdapterLayer`].
///
/// The block size follows from the packed numbers, `b = (1 + √(1 + 8·numbers))/2`, and not from the settings, whose
/// size PEFT adjusts to each layer and does not write back. Whether the layer is linear or a convolution is not in the file,
/// and neither are its outputs; only an embedding shows by the name of its tensor.
///
/// # Shapes
///
/// - `r`: `[n, b(b−1)/2]`, or `[1, b(b−1)/2]` where the blocks share their numbers
///
/// # Numerics
///
/// Numbers narrower than f32 are widened to it, as PEFT widens them by default.
///
/// # Errors
///
/// [`Wrong::Tensor`]: not two axes, numbers that no block has, no blocks, or several where one is shared.
///
/// # References
///
/// `OFTRotationModule` in `src/peft/tuners/oft/layer.py` of PEFT 0.21.2.
fn read_oft(
    path: String,
    kind: Option<LayerKind>,
    r: &TensorData,
    block_share: bool,
) -> Result<AdapterLayer, Wrong> {
    let sizes = |shape: &[usize]| {
        let [rows, packed] = shape[..] else {
            let expected = "blocks and packed numbers are two axes";
            return Err(SizeError::Axes { expected });
        };
        let numbers = packed;
        let b = block_size(packed).ok_or(SizeError::Packed { numbers })?;
        if rows == 0 || (block_share && rows != 1) {
            return Err(SizeError::Blocks {
                expected: if block_share { "one block" } else { "blocks" },
                found: rows,
            });
        }
        check_sizes([1, rows, b])?;
        Ok([rows, packed, b])
    };
    let [rows, packed, b] = sizes(r.shape()).map_err(|reason| Wrong::Tensor {
        key: match kind {
            Some(LayerKind::Embedding) => key(&path, EMBEDDING_ROTATION),
            _ => key(&path, Layout::Oft.rotation()),
        },
        shape: r.shape().to_vec(),
        reason,
    })?;
    let skew = from_values(values(r), [1, rows, packed], widened(r.dtype()));
    Ok(AdapterLayer {
        path,
        kind,
        axis: Axis::Input,
        block_size: b,
        block_share,
        d_output: None,
        skew,
        scale: None,
    })
}

/// BOFT's squares `A`, of which the skew-symmetric part `½(A − Aᵀ)` counts, and its scale where there is one.
///
/// The symmetric part has no effect and no gradient. Files have one where PEFT started from random numbers; it is
/// dropped.
///
/// # Shapes
///
/// - `r`: `[m, n, b, b]`
/// - `s`: `[d_output, 1]`, of a convolution `[1, d_output]`
///
/// # Numerics
///
/// Numbers narrower than f32 are widened to it. `½(A − Aᵀ)` is computed in f64.
///
/// # Errors
///
/// [`Wrong::Tensor`]: shapes that are not these, and factors that do not fit the blocks.
///
/// # References
///
/// `cayley_batch` in `src/peft/tuners/boft/layer.py` of PEFT 0.21.2.
fn read_boft(path: String, r: &TensorData, s: Option<&TensorData>) -> Result<AdapterLayer, Wrong> {
    let sizes = |shape: &[usize]| {
        let [m, n, b, columns] = shape[..] else {
            let expected = "factors, blocks, rows and columns are four axes";
            return Err(SizeError::Axes { expected });
        };
        if b != columns || b == 0 || m == 0 || n == 0 {
            let expected = "factors and blocks of squares expected";
            return Err(SizeError::Squares { expected });
        }
        check_sizes([m, n, b])?;
        Ok([m, n, b])
    };
    let [m, n, b] = sizes(r.shape()).map_err(|reason| Wrong::Tensor {
        key: key(&path, Layout::Boft.rotation()),
        shape: r.shape().to_vec(),
        reason,
    })?;
    let scale = s
        .map(|s| scale::read(key(&path, "boft_s"), s))
        .transpose()?;
    let dtype = widened(r.dtype());
    let skew = from_values(pack(&values(r), b), [m, n, b * (b - 1) / 2], dtype);
    Ok(AdapterLayer {
        path,
        kind: scale.as_ref().and_then(|(_, kind)| *kind),
        axis: Axis::Input,
        block_size: b,
        block_share: false,
        d_output: scale.as_ref().map(|(scale, _)| scale.len()),
        skew,
        scale: scale.map(|(scale, _)| {
            let shape = [scale.len()];
            from_values(scale, shape, dtype)
        }),
    })
}

/// Says in the model's names which layers are adapted and which modules are saved.
///
/// With a key map, the targets become the full paths of the layers that the file has: a regular expression for Python's
/// names would select other layers of the model, or none. What the file said stays in the promise of the adapter.
fn name_in_model<'a>(
    selection: &mut Selection,
    names: &KeyMap,
    layers: &[AdapterLayer],
    saved: impl Iterator<Item = &'a String>,
) -> Result<(), KeyMapError> {
    selection.modules_to_save = saved
        .map(|name| names.model_path(name))
        .collect::<Result<_, _>>()?;
    if !names.is_identity() {
        selection.target_modules = Some(TargetModules::Names(
            layers.iter().map(|layer| layer.path.clone()).collect(),
        ));
        selection.exclude_modules = None;
        selection.layers_to_transform = Vec::new();
        selection.layers_pattern = Vec::new();
    }
    Ok(())
}
