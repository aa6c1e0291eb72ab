//! The model's names for what a file holds, and layers that are one here and several there.

use std::collections::BTreeMap;

use crate::error::{KeyMapError, Mismatch};
use crate::tensors::concatenate;
use crate::value::keymap::{KeyMap, Part};
use crate::value::layer::{AdapterLayer, SavedTensor};

/// Renames everything to the model's names, and joins the parts of fused layers.
pub(super) fn to_model_names(
    names: &KeyMap,
    layers: &mut Vec<AdapterLayer>,
    tensors: &mut Vec<SavedTensor>,
    mismatch: &mut Mismatch,
) -> Result<(), KeyMapError> {
    let mut seen = BTreeMap::new();
    let mut claim = |file: &str, model: &str| match seen.insert(model.to_string(), file.to_string())
    {
        Some(first) if first != file => Err(KeyMapError::Collision {
            first,
            second: file.to_string(),
            name: model.to_string(),
        }),
        _ => Ok(()),
    };
    let mut parts: BTreeMap<String, Parts<AdapterLayer>> = BTreeMap::new();
    for mut layer in std::mem::take(layers) {
        if let Some(part) = names.part(&layer.path) {
            parts
                .entry(part.whole.clone())
                .or_default()
                .add(part, layer);
            continue;
        }
        let path = names.model_path(&layer.path)?;
        claim(&layer.path, &path)?;
        layer.path = path;
        layers.push(layer);
    }
    for (whole, parts) in parts {
        let path = names.model_path(&whole)?;
        claim(&parts.names[0], &path)?;
        match parts.join(&whole, |parts| fuse_layers(parts, path)) {
            Ok(layer) => layers.push(layer),
            Err(why) => mismatch.wrong.push(why),
        }
    }
    let mut parts: BTreeMap<(String, String), Parts<SavedTensor>> = BTreeMap::new();
    for mut tensor in std::mem::take(tensors) {
        if let Some(part) = names.part(&tensor.module) {
            let key = (part.whole.clone(), tensor.name.clone());
            parts.entry(key).or_default().add(part, tensor);
            continue;
        }
        let module = names.model_path(&tensor.module)?;
        claim(&tensor.module, &module)?;
        tensor.module = module;
        tensors.push(tensor);
    }
    for ((whole, name), parts) in parts {
        let module = names.model_path(&whole)?;
        claim(&parts.names[0], &module)?;
        match parts.join(&whole, |parts| {
            let data = parts.iter().map(|part| &part.data);
            Ok(SavedTensor {
                module,
                name,
                data: concatenate(data).ok_or("their shapes differ")?,
            })
        }) {
            Ok(tensor) => tensors.push(tensor),
            Err(why) => mismatch.wrong.push(why),
        }
    }
    Ok(())
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

impl<T> Parts<T> {
    fn add(&mut self, part: Part, value: T) {
        self.names = part.parts;
        self.found.insert(part.index, value);
    }

    fn join<U>(
        self,
        whole: &str,
        join: impl FnOnce(Vec<T>) -> Result<U, &'static str>,
    ) -> Result<U, String> {
        let Self { names, found } = self;
        let absent: Vec<_> = (0..names.len())
            .filter(|index| !found.contains_key(index))
            .map(|index| format!("`{}`", names[index]))
            .collect();
        if !absent.is_empty() {
            let absent = absent.join(", ");
            return Err(format!(
                "`{whole}` is one layer here and {} in the file, which has nothing for {absent}",
                names.len()
            ));
        }
        let listed: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        let listed = listed.join(" and ");
        join(found.into_values().collect())
            .map_err(|why| format!("{listed} are one layer here, `{whole}`, and {why}"))
    }
}

/// The adapter of a fused layer: one rotation, and the scales one after the other.
fn fuse_layers(parts: Vec<AdapterLayer>, path: String) -> Result<AdapterLayer, &'static str> {
    let first = &parts[0];
    let alike = |part: &AdapterLayer| {
        (part.block_size, part.block_share, &part.skew)
            == (first.block_size, first.block_share, &first.skew)
    };
    if !parts.iter().all(alike) {
        return Err(
            "one layer has one rotation where theirs differ; merge the adapter in PEFT instead",
        );
    }
    let scales: Option<Vec<_>> = parts.iter().map(|part| part.scale.as_ref()).collect();
    let scale = match scales {
        Some(scales) => Some(concatenate(scales).ok_or("their scales differ in precision")?),
        None => None,
    };
    Ok(AdapterLayer {
        path,
        kind: first.kind,
        d_output: parts.iter().map(|part| part.d_output).sum(),
        scale,
        ..first.clone()
    })
}
