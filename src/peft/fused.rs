//! The model's names for what a file holds, and layers that the model fuses and the file stores separately.

use std::collections::BTreeMap;

use crate::tensors::concatenate;
use crate::value::keymap::{KeyMap, KeyMapError, Part};
use crate::value::layer::{AdapterLayer, SavedTensor};
use crate::value::mismatch::{Mismatch, PartsError, Wrong};

/// Renames everything to the model's names, and joins the parts of fused layers.
pub(super) fn to_model_names(
    names: &KeyMap,
    layers: &mut Vec<AdapterLayer>,
    tensors: &mut Vec<SavedTensor>,
    mismatch: &mut Mismatch,
) -> Result<(), KeyMapError> {
    let mut renamer = Renamer {
        names,
        claimed: BTreeMap::new(),
        mismatch,
    };
    *layers = renamer.rename(std::mem::take(layers))?;
    *tensors = renamer.rename(std::mem::take(tensors))?;
    Ok(())
}

/// Something that belongs to a module, whole or in part.
trait OfModule: Sized {
    /// The path of the module.
    fn module(&mut self) -> &mut String;

    /// What tells several things of one module apart.
    fn name(&self) -> String;

    /// The thing of the whole module that these are of the parts of, in order.
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
    fn join(parts: Vec<Self>) -> Result<Self, PartsError> {
        let first = &parts[0];
        let is_alike = |part: &Self| {
            (part.block_size, part.block_share, &part.skew)
                == (first.block_size, first.block_share, &first.skew)
        };
        if !parts.iter().all(is_alike) {
            return Err(PartsError::Rotations);
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
    names: Vec<String>,
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
