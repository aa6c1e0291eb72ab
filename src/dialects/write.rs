//! An adapter as sd-scripts stores it: the tensors of `networks.oft_v2` and `networks.boft`.
//!
//! Both compute what PEFT computes, except that `networks.oft_v2` always takes the Neumann polynomial of five terms and rotates
//! convolutions the other way. OneTrainer reads and writes the same tensors of OFT.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::oft_v2;
use super::table::Dialect;
use crate::config::{Cayley, LayerKind};
use crate::tensors::{from_values, values};
use crate::value::layer::unpack;
use crate::value::{Adapter, AdapterLayer, Axis};

/// Why [`Adapter::to_sd_scripts`] refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A map that the programs do not compute.
    #[error(
        "the adapter uses {map}, and sd-scripts the exact Cayley map or the Neumann polynomial of 5 terms; merge it"
    )]
    Map {
        /// The map.
        map: Cayley,
    },
    /// A COFT radius, which a file cannot carry.
    #[error("the adapter is bound to a COFT radius, which these files do not carry; merge it")]
    Radius,
    /// A trained bias, or a part of a saved module.
    #[error("`{path}` travels with the adapter, and these files hold rotations alone; merge it")]
    Tensor {
        /// Its path.
        path: String,
    },
    /// A layer that the programs do not adapt.
    #[error("`{path}` {reason}")]
    Layer {
        /// Its path.
        path: String,
        /// Why.
        reason: &'static str,
    },
    /// Two modules whose names become the same.
    #[error("`{first}` and `{second}` would both be `{name}`")]
    Collision {
        /// One module.
        first: String,
        /// The other.
        second: String,
        /// Their name in the file.
        name: String,
    },
}

impl Adapter {
    /// The tensors of a file that sd-scripts reads, with `networks.oft_v2` or `networks.boft`, and of OFT OneTrainer too.
    ///
    /// `start` is how the programs call the model: `lora_unet_` for a UNet or a transformer, `lora_te_` for a text encoder.
    ///
    /// # Errors
    ///
    /// - [`WriteError::Map`], [`WriteError::Radius`]: the programs would compute other rotations.
    /// - [`WriteError::Tensor`]: biases or saved modules travel with the adapter.
    /// - [`WriteError::Layer`]: an embedding, a rotation of outputs, a layer whose kind or number of outputs is not known.
    /// - [`WriteError::Collision`]: two modules have the same name once dots are `_`.
    pub fn to_sd_scripts(&self, start: &str) -> Result<BTreeMap<String, TensorData>, WriteError> {
        if let Some(tensor) = self.tensors.first() {
            let path = crate::value::join(&tensor.module, &tensor.name);
            return Err(WriteError::Tensor { path });
        }
        if self.config.coft_radius().is_some() {
            return Err(WriteError::Radius);
        }
        // The exact map is BOFT's there, also with one factor and a scale of ones.
        let is_polynomial = match self.config.cayley() {
            Cayley::Exact => false,
            map if map == oft_v2::MAP => true,
            map => return Err(WriteError::Map { map }),
        };
        let (mut tensors, mut modules) = (BTreeMap::new(), BTreeMap::<String, String>::new());
        for layer in &self.layers {
            let path = layer.path.clone();
            let name = format!("{start}{}", path.replace('.', "_"));
            if let Some(first) = modules.insert(name.clone(), path.clone()) {
                let second = path;
                return Err(WriteError::Collision {
                    first,
                    second,
                    name,
                });
            }
            let stored = match is_polynomial {
                true => oft(layer),
                false => boft(layer),
            };
            let stored = stored.map_err(|reason| WriteError::Layer { path, reason })?;
            let named = stored
                .into_iter()
                .map(|(tensor, data)| (format!("{name}.{tensor}"), data));
            tensors.extend(named);
        }
        Ok(tensors)
    }
}

/// The kind of a layer that the programs adapt.
fn kind(layer: &AdapterLayer) -> Result<LayerKind, &'static str> {
    match (layer.axis, layer.kind) {
        (Axis::Output, _) => Err("rotates its outputs, and these files rotate inputs; merge it"),
        (_, Some(LayerKind::Embedding)) => {
            Err("is an embedding, and sd-scripts adapts none; merge it")
        }
        (_, None) => Err("may be a linear layer or a convolution, which turn differently there"),
        (_, Some(kind)) => Ok(kind),
    }
}

type Stored = Vec<(&'static str, TensorData)>;

/// Packed triangles, of a convolution those of `−Q`.
fn oft(layer: &AdapterLayer) -> Result<Stored, &'static str> {
    let skew = match kind(layer)? {
        LayerKind::Conv2d => oft_v2::reversed(&layer.skew),
        _ => layer.skew.clone(),
    };
    let [_, n, packed] = skew.shape().dims::<3>();
    let (name, _) = Dialect::OftV2.rotation();
    let data = from_values(values(&skew), [n, packed], skew.dtype());
    Ok(vec![(name, data)])
}

/// Squares, and a scale of `[outputs, 1]` also where none is trained.
fn boft(layer: &AdapterLayer) -> Result<Stored, &'static str> {
    kind(layer)?;
    if layer.block_share {
        return Err("shares one block among its channels, and BOFT does not");
    }
    let (b, dtype) = (layer.block_size, layer.skew.dtype());
    let [m, n, _] = layer.skew.shape().dims::<3>();
    let squares = match b {
        1 => vec![0.0; m * n],
        _ => unpack(&values(&layer.skew), b),
    };
    let scale = match (&layer.scale, layer.d_output) {
        (Some(scale), _) => values(scale),
        (None, Some(outputs)) => vec![1.0; outputs],
        (None, None) => return Err("has no scale, and these files have one for each output"),
    };
    let outputs = scale.len();
    let (name, _) = Dialect::SdScriptsBoft.rotation();
    Ok(vec![
        (name, from_values(squares, [m, n, b, b], dtype)),
        ("boft_s", from_values(scale, [outputs, 1], dtype)),
    ])
}
