//! The model's names for what a file holds, and layers that the model fuses and the file stores separately.
//!
//! DINOv2 has one layer `mlp.weights_in`, which transformers 5 stores as `mlp.gate_proj` and `mlp.up_proj`. Both have the same
//! input, so one rotation serves the fused layer only where theirs are equal; scales and biases follow one another.
//!
//! PEFT trains the parts independently, so the rotations of an adapter from PEFT usually differ. Such a file is refused
//! and not averaged: no rotation of the shared input computes both. Files that this crate wrote from a fused layer join
//! again.

use std::collections::BTreeMap;

use crate::tensors::concatenate;
use crate::value::keymap::{KeyMap, KeyMapError, Part};
use crate::value::layer::{AdapterLayer, SavedTensor};
use crate::value::mismatch::{Mismatch, PartsError, Wrong};

/// Renames everything to the model's names, and joins the parts of fused layers.
///
/// What cannot be joined goes to `mismatch` and is in neither list afterwards. The order of the lists is not kept.
///
/// # Errors
///
/// - [`KeyMapError::Undecided`]: a pattern has no answer for a name.
/// - [`KeyMapError::Collision`]: two modules of the file would get the same name in the model. Which of them is meant
///   cannot be told, so nothing is read.
pub(super) fn to_model_names(
    names: &KeyMap,
    (layers, tensors, copies): (
        &mut Vec<AdapterLayer>,
        &mut Vec<SavedTensor>,
        &mut Vec<SavedTensor>,
    ),
    mismatch: &mut Mismatch,
) -> Result<(), KeyMapError> {
    let mut renamer = Renamer {
        names,
        claimed: BTreeMap::new(),
        mismatch,
    };
    *layers = renamer.rename(std::mem::take(layers))?;
    *tensors = renamer.rename(std::mem::take(tensors))?;
    *copies = renamer.rename(std::mem::take(copies))?;
    Ok(())
}

/// Something that belongs to a module, whole or in part.
trait OfModule: Sized {
    /// The path of the module.
    fn module(&mut self) -> &mut String;

    /// What tells several things of one module apart: the name of a saved tensor. A module has only one adapter.
    fn name(&self) -> String;

    /// Makes one thing of those of the parts, which are in the order of their shares of the output. There is at least
    /// one. The result keeps the path of the first part until the caller sets it.
    ///
    /// # Errors
    ///
    /// [`PartsError`]: the parts do not make one thing.
    fn join(parts: Vec<Self>) -> Result<Self, PartsError>;
}

impl OfModule for AdapterLayer {
    fn module(&mut self) -> &mut String {
        &mut self.path
    }

    fn name(&self) -> String {
        String::new()
    }

    /// The adapter of a fused layer: one rotation, and the scales one after the other.
    ///
    /// The whole has a scale if all parts have one, and none if none has. The outputs are known if all parts know theirs.
    ///
    /// # Shapes
    ///
    /// - scale: `[Σ d_output]` of parts with `[d_output]` each
    ///
    /// # Errors
    ///
    /// - [`PartsError::Rotations`]: block sizes or numbers differ. They are compared exactly, since a rounded copy is
    ///   another rotation.
    /// - [`PartsError::Scales`]: only some parts have a scale, as where a file lacks one and a partial load passes over it.
    /// - [`PartsError::Shapes`]: the scales have different precisions.
    fn join(parts: Vec<Self>) -> Result<Self, PartsError> {
        let first = &parts[0];
        let is_alike = |part: &Self| {
            (part.block_size, part.block_share, &part.skew)
                == (first.block_size, first.block_share, &first.skew)
        };
        if !parts.iter().all(is_alike) {
            return Err(PartsError::Rotations);
        }
        let is_scaled = |part: &Self| part.scale.is_some() == first.scale.is_some();
        if !parts.iter().all(is_scaled) {
            return Err(PartsError::Scales);
        }
        let scales: Option<Vec<_>> = parts.iter().map(|part| part.scale.as_ref()).collect();
        let scale = scales
            .map(|scales| concatenate(scales).ok_or(PartsError::Shapes))
            .transpose()?;
        Ok(Self {
            d_output: parts.iter().map(|part| part.d_output).sum(),
            scale,
            ..first.clone()
        })
    }
}

impl OfModule for SavedTensor {
    fn module(&mut self) -> &mut String {
        &mut self.module
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    /// The tensor of a fused layer: rows of weights and biases of the parts, one part after the other.
    ///
    /// # Shapes
    ///
    /// - result: `[Σ rows, …]` of parts with `[rows, …]` each, as PyTorch orients them, so that rows are outputs
    ///
    /// # Errors
    ///
    /// [`PartsError::Shapes`]: the parts have different precisions, or differ in another axis than the first.
    fn join(parts: Vec<Self>) -> Result<Self, PartsError> {
        let data = concatenate(parts.iter().map(|part| &part.data)).ok_or(PartsError::Shapes)?;
        Ok(Self::new(&parts[0].module, &parts[0].name, data))
    }
}

/// Gives things the model's names.
struct Renamer<'a> {
    names: &'a KeyMap,
    /// The module of the file that each module of the model stands for.
    claimed: BTreeMap<String, String>,
    mismatch: &'a mut Mismatch,
}

impl Renamer<'_> {
    /// Renames all things of one type. Whole modules come first, joined ones after them.
    ///
    /// Parts are collected by the path of the whole and the name of the thing, so that weight and bias of one fused
    /// layer join separately.
    fn rename<T: OfModule>(&mut self, things: Vec<T>) -> Result<Vec<T>, KeyMapError> {
        let mut renamed = Vec::new();
        let mut fused: BTreeMap<(String, String), Parts<T>> = BTreeMap::new();
        for mut thing in things {
            let module = thing.module().clone();
            match self.names.part(&module) {
                Some(part) => {
                    let whole = (part.whole.clone(), thing.name());
                    fused.entry(whole).or_default().add(part, thing);
                }
                None => {
                    *thing.module() = self.claim(&module, &module)?;
                    renamed.push(thing);
                }
            }
        }
        for ((whole, _), parts) in fused {
            let path = self.claim(&parts.names[0], &whole)?;
            match parts.join(&whole) {
                Ok(mut thing) => {
                    *thing.module() = path;
                    renamed.push(thing);
                }
                Err(wrong) => self.mismatch.wrong.push(wrong),
            }
        }
        Ok(renamed)
    }

    /// The model's name of `path`, for this module of the file and no other.
    ///
    /// The same module may claim its name several times, as its adapter and its bias do.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Collision`]: another module of the file has claimed it.
    fn claim(&mut self, file: &str, path: &str) -> Result<String, KeyMapError> {
        let model = self.names.model_path(path)?;
        match self.claimed.insert(model.clone(), file.to_string()) {
            Some(first) if first != file => Err(KeyMapError::Collision {
                first,
                second: file.to_string(),
                name: model,
            }),
            _ => Ok(model),
        }
    }
}

/// Parts of one fused layer.
struct Parts<T> {
    /// The paths of all parts in the file, whether or not they were found.
    names: Vec<String>,
    /// What was found, by the place of its part in `names`.
    found: BTreeMap<usize, T>,
}

impl<T> Default for Parts<T> {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            found: BTreeMap::new(),
        }
    }
}

impl<T: OfModule> Parts<T> {
    fn add(&mut self, part: Part, thing: T) {
        self.names = part.parts;
        self.found.insert(part.index, thing);
    }

    /// Joins the parts of the layer that has this path in the file's naming.
    ///
    /// # Errors
    ///
    /// - [`Wrong::AbsentParts`]: the file has nothing for one of the parts. An identity in its place would be a guess.
    /// - [`Wrong::Parts`]: the parts do not join.
    fn join(self, whole: &str) -> Result<T, Wrong> {
        let Self { names, found } = self;
        let absent: Vec<_> = (0..names.len())
            .filter(|index| !found.contains_key(index))
            .map(|index| names[index].clone())
            .collect();
        if !absent.is_empty() {
            return Err(Wrong::AbsentParts {
                path: whole.to_string(),
                parts: names.len(),
                absent,
            });
        }
        T::join(found.into_values().collect()).map_err(|reason| Wrong::Parts {
            path: whole.to_string(),
            parts: names,
            reason,
        })
    }
}
