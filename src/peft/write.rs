//! PEFT's tensors written.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{FloatDType, TensorData};

use super::read::PREFIX;
use crate::config::AdapterConfig;
use crate::error::{KeyMapError, SaveError};
use crate::model::plan::LayerKind;
use crate::tensors::{from_values, split, values};
use crate::value::keymap::{KeyMap, join};
use crate::value::layer::{AdapterLayer, SavedTensor, factors, unpack};
use crate::value::reconcile::expected_block_size;

/// The tensors of an adapter as PEFT writes them.
pub(crate) fn tensors(
    config: &AdapterConfig,
    layers: &[AdapterLayer],
    saved: &[SavedTensor],
    names: &KeyMap,
    dtype: Option<FloatDType>,
) -> Result<BTreeMap<String, TensorData>, SaveError> {
    let mut file = BTreeMap::new();
    for layer in layers {
        let paths = names.file_paths(&layer.path)?;
        let unrepresentable = |reason: String| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        };
        let entries = match config {
            AdapterConfig::Boft(_) => write_boft(layer, paths.len()),
            AdapterConfig::Oft(_) => write_oft(layer),
        };
        let (name, rotation, scales) = entries.map_err(unrepresentable)?;
        let stored = |data: TensorData| match dtype {
            Some(dtype) => data.convert_dtype(dtype.into()),
            None => data,
        };
        for (index, path) in paths.iter().enumerate() {
            let key = |name: &str| format!("{PREFIX}{}", join(path, name));
            let mut entries = vec![(key(name), stored(rotation.clone()))];
            if let Some(scale) = scales.get(index) {
                entries.push((key("boft_s"), stored(scale.clone())));
            }
            insert(&mut file, entries, &layer.path)?;
        }
    }
    let adapted: BTreeSet<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
    for tensor in saved {
        let paths = names.file_paths(&tensor.module)?;
        let parts = split(&tensor.data, paths.len()).ok_or_else(|| SaveError::Unrepresentable {
            path: join(&tensor.module, &tensor.name),
            reason: format!(
                "its {:?} do not split into {}",
                &**tensor.data.shape(),
                paths.len()
            ),
        })?;
        let base_layer = match adapted.contains(tensor.module.as_str()) {
            true => "base_layer",
            false => "",
        };
        for (path, data) in paths.iter().zip(parts) {
            let name = join(&join(path, base_layer), &tensor.name);
            insert(
                &mut file,
                vec![(format!("{PREFIX}{name}"), data)],
                &tensor.module,
            )?;
        }
    }
    Ok(file)
}

fn insert(
    file: &mut BTreeMap<String, TensorData>,
    entries: Vec<(String, TensorData)>,
    path: &str,
) -> Result<(), SaveError> {
    for (key, data) in entries {
        if file.contains_key(&key) {
            return Err(SaveError::KeyMap(KeyMapError::Collision {
                first: path.to_string(),
                second: "another module".to_string(),
                name: key,
            }));
        }
        file.insert(key, data);
    }
    Ok(())
}

type Entries = (&'static str, TensorData, Vec<TensorData>);

fn write_boft(layer: &AdapterLayer, parts: usize) -> Result<Entries, String> {
    if layer.block_share {
        return Err(
            "its blocks share their numbers, and BOFT's have their own; attach the adapter to its \
             model and extract it there"
                .to_string(),
        );
    }
    let (b, dtype) = (layer.block_size, layer.skew.dtype());
    let (m, n) = (layer.n_butterfly_factor(), layer.skew.shape()[1]);
    let squares = match b {
        1 => vec![0.0; m * n],
        _ => unpack(&values(&layer.skew), b),
    };
    let rotation = from_values(squares, vec![m, n, b, b], dtype);
    let scale = match (&layer.scale, layer.d_output) {
        (Some(scale), _) => values(scale),
        (None, Some(o)) => vec![1.0; o],
        (None, None) => return Err("it has no scale, and BOFT has one".to_string()),
    };
    if !scale.len().is_multiple_of(parts) {
        return Err(format!(
            "its {} outputs do not split into {parts}",
            scale.len()
        ));
    }
    // One number has the same shape in either.
    if layer.kind.is_none() && scale.len() > 1 {
        return Err(
            "its file does not tell a linear layer from a convolution, whose scales PEFT stores differently; attach the \
             adapter to its model and extract it there"
                .to_string(),
        );
    }
    let each = scale.len() / parts;
    let scales = scale.chunks(each.max(1)).map(|scale| {
        let shape = match layer.kind {
            Some(LayerKind::Conv2d) => vec![1, each],
            Some(LayerKind::Linear) | None => vec![each, 1],
        };
        from_values(scale.to_vec(), shape, dtype)
    });
    Ok(("boft_R", rotation, scales.collect()))
}

fn write_oft(layer: &AdapterLayer) -> Result<Entries, String> {
    let [m, rows, packed] = layer.skew.shape().dims::<3>();
    if m != 1 || layer.scale.is_some() {
        return Err("OFT has one factor and no scale".to_string());
    }
    let numbers = from_values(values(&layer.skew), vec![rows, packed], layer.skew.dtype());
    Ok(("oft_R.weight", numbers, Vec::new()))
}

/// Refuses sizes that PEFT would not make of the configuration: it could not read them back.
pub(crate) fn check_sizes(
    config: &AdapterConfig,
    layers: &[AdapterLayer],
) -> Result<(), SaveError> {
    for layer in layers {
        let unrepresentable = |reason: String| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        };
        let (b, m) = (layer.block_size, layer.n_butterfly_factor());
        if let AdapterConfig::Boft(config) = config
            && config.n_butterfly_factor != m
        {
            let said = config.n_butterfly_factor;
            return Err(unrepresentable(format!(
                "it has {} where the configuration says {said}, and PEFT has one number for all layers",
                factors(m)
            )));
        }
        let expected = expected_block_size(config, layer.d_input());
        if let Some(expected) = expected.filter(|expected| *expected != b) {
            return Err(unrepresentable(format!(
                "it has blocks of {b}, and PEFT makes blocks of {expected} of the configuration"
            )));
        }
    }
    Ok(())
}
