//! PEFT's tensors, written.
//!
//! BOFT's squares are skew-symmetric, `A = Q`, so that PEFT's `½(A − Aᵀ)` gives the numbers back; OFT's blocks are packed as ours
//! are. A layer that the model fuses is written as several layers: each has the whole rotation, which acts on the input that
//! they share, and its part of the scale.
//!
//! Biases and saved modules are written as they are: an adapter keeps them in PyTorch's orientation. Of base weights only the
//! copies are written that a file of PEFT's had, and no permutation, which follows from the sizes: PEFT 0.11 and 0.12 stored `boft_P`, `[m, d, d]`
//! numbers for each layer, and leave it out since 0.13.
//!
//! PEFT's files: `src/peft/tuners/boft/layer.py` and `src/peft/tuners/oft/layer.py` for the shapes,
//! `src/peft/utils/save_and_load.py` for the keys, all of PEFT 0.21.2.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{FloatDType, TensorData};

use super::error::{SaveError, Unrepresentable};
use super::keys::{EMBEDDING_ROTATION, Format, Layout, key, saved_key};
use crate::config::{AdapterConfig, Block, LayerKind};
use crate::rotation::Method;
use crate::tensors::{from_values, split, values};
use crate::value::Adapter;
use crate::value::keymap::{KeyMap, KeyMapError, join};
use crate::value::layer::{AdapterLayer, Axis, unpack};
use crate::value::reconcile::other_blocks;

/// The tensors of an adapter as PEFT writes them, by their keys.
///
/// A `dtype` rounds the numbers of the rotations and scales only. Biases and saved modules take the place of numbers of
/// the base model, whose precision is not the adapter's to choose.
///
/// # Errors
///
/// - [`SaveError::KeyMap`]: a name would be read back as another one, or two modules would get the same key.
/// - [`SaveError::Unrepresentable`]: the format has no place for a layer, or a tensor of a fused layer does not split
///   into the layers of the file.
pub(super) fn tensors(
    format: Format,
    adapter: &Adapter,
    names: &KeyMap,
    dtype: Option<FloatDType>,
) -> Result<BTreeMap<String, TensorData>, SaveError> {
    let mut file = File::default();
    for layer in &adapter.layers {
        let paths = names.file_paths(&layer.path)?;
        let stored = Stored::new(format, layer, paths.len());
        let stored = stored.map_err(|reason| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        })?;
        let rounded = |data: &TensorData| match dtype {
            Some(dtype) => data.clone().convert_dtype(dtype.into()),
            None => data.clone(),
        };
        let (layout, name) = (stored.layout, stored.name);
        for (index, path) in paths.iter().enumerate() {
            let rotation = rounded(&stored.rotation);
            file.insert(key(path, name), rotation, &layer.path)?;
            if let (Some(name), Some(scale)) = (layout.scale(), stored.scales.get(index)) {
                file.insert(key(path, name), rounded(scale), &layer.path)?;
            }
        }
    }
    let layers = adapter.layers.iter();
    let adapted: BTreeSet<&str> = layers.map(|layer| layer.path.as_str()).collect();
    for tensor in adapter.tensors.iter().chain(&adapter.copies) {
        let paths = names.file_paths(&tensor.module)?;
        let parts = split(&tensor.data, paths.len());
        let parts = parts.ok_or_else(|| SaveError::Unrepresentable {
            path: join(&tensor.module, &tensor.name),
            reason: Unrepresentable::Rows {
                shape: tensor.data.shape().to_vec(),
                parts: paths.len(),
            },
        })?;
        let is_adapted = adapted.contains(tensor.module.as_str());
        for (path, data) in paths.iter().zip(parts) {
            let key = saved_key(path, &tensor.name, is_adapted);
            file.insert(key, data, &tensor.module)?;
        }
    }
    Ok(file.tensors)
}

/// The tensors of a file, and the modules that they are of.
#[derive(Default)]
struct File {
    /// The tensors by the keys that they are written under.
    tensors: BTreeMap<String, TensorData>,
    /// The module of the model that each key is of, to name both modules of a collision.
    modules: BTreeMap<String, String>,
}

impl File {
    /// Adds a tensor of this module of the model.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Collision`]: the key is taken. Writing over it would lose numbers.
    fn insert(&mut self, key: String, data: TensorData, module: &str) -> Result<(), KeyMapError> {
        match self.modules.insert(key.clone(), module.to_string()) {
            Some(first) => Err(KeyMapError::Collision {
                first,
                second: module.to_string(),
                name: key,
            }),
            None => {
                self.tensors.insert(key, data);
                Ok(())
            }
        }
    }
}

/// A layer as PEFT stores it.
struct Stored {
    /// Which layout the tensors have.
    layout: Layout,
    /// The name of the rotation: the one of the layout, unless the layer is an embedding.
    name: &'static str,
    /// `[m, n, b, b]` of BOFT, `[n, b(b−1)/2]` of OFT, and the same in every layer of the file.
    rotation: TensorData,
    /// One for each layer of the file.
    scales: Vec<TensorData>,
}

impl Stored {
    /// Lays a layer out for a file that has it in `parts` layers, 1 where nothing is fused.
    fn new(format: Format, layer: &AdapterLayer, parts: usize) -> Result<Self, Unrepresentable> {
        match format {
            Format::Boft => Self::boft(layer, parts),
            Format::Oft => Self::oft(layer),
        }
    }

    /// BOFT's squares, and a scale for each of the `parts`.
    ///
    /// PEFT has a scale in every layer and copies the file into it, so ones are written where none is trained. The
    /// shape of the scale is the only thing in the file that tells a convolution from a linear layer.
    ///
    /// # Shapes
    ///
    /// - rotation: `[m, n, b, b]`
    /// - scales: `[d_output/parts, 1]` each, of a convolution `[1, d_output/parts]`
    ///
    /// # Errors
    ///
    /// - [`Unrepresentable::SharedBlocks`]: only a layer that was read from a file of PEFT 0.14 to 0.15.2 can have them
    ///   in BOFT. How many blocks it stands for is not known without the model.
    /// - [`Unrepresentable::NoScale`]: nothing says how many ones to write.
    /// - [`Unrepresentable::UnknownKind`]: nothing says how the scale is turned.
    /// - [`Unrepresentable::Outputs`]: the scale does not split evenly.
    /// - [`Unrepresentable::Embedding`]: PEFT's BOFT adapts no embedding.
    fn boft(layer: &AdapterLayer, parts: usize) -> Result<Self, Unrepresentable> {
        if layer.kind == Some(LayerKind::Embedding) {
            return Err(Unrepresentable::Embedding);
        }
        if layer.block_share {
            return Err(Unrepresentable::SharedBlocks);
        }
        let (b, dtype) = (layer.block_size, layer.skew.dtype());
        let (m, n) = (layer.n_butterfly_factor(), layer.skew.shape()[1]);
        let squares = match b {
            1 => vec![0.0; m * n],
            _ => unpack(&values(&layer.skew), b),
        };
        let scale = match (&layer.scale, layer.d_output) {
            (Some(scale), _) => values(scale),
            (None, Some(o)) => vec![1.0; o],
            (None, None) => return Err(Unrepresentable::NoScale),
        };
        let outputs = scale.len();
        if !outputs.is_multiple_of(parts) {
            return Err(Unrepresentable::Outputs { outputs, parts });
        }
        // One number has the same shape in either.
        if layer.kind.is_none() && outputs > 1 {
            return Err(Unrepresentable::UnknownKind);
        }
        let each = outputs / parts;
        let scales = scale.chunks(each.max(1)).map(|scale| {
            let shape = match layer.kind {
                Some(LayerKind::Conv2d) => [1, each],
                Some(LayerKind::Linear | LayerKind::Embedding) | None => [each, 1],
            };
            from_values(scale.to_vec(), shape, dtype)
        });
        Ok(Self {
            layout: Layout::Boft,
            name: Layout::Boft.rotation(),
            rotation: from_values(squares, [m, n, b, b], dtype),
            scales: scales.collect(),
        })
    }

    /// OFT's packed blocks, which are the numbers of the layer without the axis of factors.
    ///
    /// # Shapes
    ///
    /// - rotation: `[n, b(b−1)/2]`, or `[1, b(b−1)/2]` where one block is shared
    ///
    /// # Errors
    ///
    /// [`Unrepresentable::NotOft`]: several factors, or a scale, for which the file has no key.
    fn oft(layer: &AdapterLayer) -> Result<Self, Unrepresentable> {
        let [m, rows, packed] = layer.skew.shape().dims::<3>();
        if m != 1 || layer.scale.is_some() {
            return Err(Unrepresentable::NotOft);
        }
        let rotation = from_values(values(&layer.skew), [rows, packed], layer.skew.dtype());
        Ok(Self {
            layout: Layout::Oft,
            name: match layer.kind {
                Some(LayerKind::Embedding) => EMBEDDING_ROTATION,
                Some(LayerKind::Linear | LayerKind::Conv2d) | None => Layout::Oft.rotation(),
            },
            rotation,
            scales: Vec::new(),
        })
    }
}

/// Refuses what PEFT would not make of the configuration: rotations of outputs, and sizes of which it builds other ones. It builds the layers first, from the configuration, and
/// then fails to copy tensors of other shapes into them.
///
/// This crate reads sizes from the tensors and could read such a file. It is refused all the same, because a folder
/// that [`Adapter::save`](crate::Adapter::save) writes is promised to load in PEFT, apart from factors without its CUDA
/// kernel.
///
/// # Errors
///
/// [`SaveError::Unrepresentable`] for the first layer with sizes of its own.
pub(super) fn check_sizes(
    config: &AdapterConfig,
    layers: &[AdapterLayer],
) -> Result<(), SaveError> {
    for layer in layers {
        check_layer(config, layer).map_err(|reason| SaveError::Unrepresentable {
            path: layer.path.clone(),
            reason,
        })?;
    }
    Ok(())
}

/// Compares one layer with what PEFT would build from the configuration. The block size is compared where the axis is
/// known: where one shared block leaves it open, only a size that is the same in every layer is.
///
/// # Errors
///
/// - [`Unrepresentable::OutputAxis`]: the layer rotates its outputs, and PEFT builds rotations of inputs.
/// - [`Unrepresentable::Factors`]: the layer has another number of factors.
/// - [`Unrepresentable::BlockSize`]: the layer has another block size, after the adjustment that PEFT's OFT makes.
/// - [`Unrepresentable::BlockCount`]: the configuration has a count of blocks that PEFT's BOFT refuses for the layer.
fn check_layer(config: &AdapterConfig, layer: &AdapterLayer) -> Result<(), Unrepresentable> {
    if layer.axis == Axis::Output {
        return Err(Unrepresentable::OutputAxis);
    }
    let method = Method::unchecked(config);
    let (m, settings) = (layer.n_butterfly_factor(), method.n_butterfly_factor());
    // Of OFT, several factors have no place in the file at all.
    if method.allows(m, true) && m != settings {
        return Err(Unrepresentable::Factors { layer: m, settings });
    }
    match other_blocks(&method, layer) {
        Some(Block::Size(settings)) => Err(Unrepresentable::BlockSize {
            layer: layer.block_size,
            settings,
        }),
        Some(Block::Count(settings)) => Err(Unrepresentable::BlockCount {
            layer: layer.skew.shape()[1],
            settings,
        }),
        None => Ok(()),
    }
}
