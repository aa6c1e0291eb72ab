//! Which pretrained model is adapted.

use std::path::PathBuf;

use burn::prelude::*;
use burn::store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use clap::ValueEnum;

use crate::digits;
use crate::error::Error;
use crate::model::{Dinov2Config, Dinov2ForImageClassification, Head, load_safetensors};

/// The backbone that comes with the example, as `--pretrain` wrote it.
static EMBEDDED: &[u8] = include_bytes!("../data/backbone.safetensors");

/// Register tokens of the published models that have them.
const REGISTERS: usize = 4;

/// The sizes of DINOv2's published models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Size {
    #[default]
    Small,
    Base,
    Large,
    Giant,
}

/// A pretrained model.
#[derive(Clone, Debug)]
pub enum Backbone {
    /// The one that comes with the example and has seen the digits 0 to 4.
    Embedded,
    /// A published checkpoint.
    File {
        path: PathBuf,
        size: Size,
        registers: bool,
        image_size: usize,
    },
}

impl Backbone {
    /// The model with a new head, its weights on a device.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or was written for another model.
    pub fn load(
        &self,
        num_labels: usize,
        device: &Device,
    ) -> Result<Dinov2ForImageClassification, Error> {
        let model = self.config().with_num_labels(num_labels).init(device);
        match self {
            Self::Embedded => load_embedded(model),
            Self::File { path, .. } => {
                load_safetensors(model, path, Head::New).map_err(|source| Error::Backbone {
                    path: path.clone(),
                    source,
                })
            }
        }
    }

    fn config(&self) -> Dinov2Config {
        match self {
            Self::Embedded => embedded_config(),
            Self::File {
                size, registers, ..
            } => {
                let config = match size {
                    Size::Small => Dinov2Config::small(),
                    Size::Base => Dinov2Config::base(),
                    Size::Large => Dinov2Config::large(),
                    Size::Giant => Dinov2Config::giant(),
                };
                config.with_num_register_tokens(if *registers { REGISTERS } else { 0 })
            }
        }
    }
}

/// The shape of the example's backbone: 17 tokens of width 64 through 4 layers.
pub fn embedded_config() -> Dinov2Config {
    Dinov2Config::new(64, 4, 4)
        .with_image_size(digits::SIZE)
        .with_patch_size(2)
        .with_num_channels(1)
}

fn load_embedded(
    mut model: Dinov2ForImageClassification,
) -> Result<Dinov2ForImageClassification, Error> {
    let mut store = SafetensorsStore::from_bytes(Some(EMBEDDED.to_vec()))
        .with_from_adapter(PyTorchToBurnAdapter)
        .allow_partial(true);
    model
        .load_from(&mut store)
        .map_err(|source| Error::Backbone {
            path: PathBuf::from("backbone.safetensors"),
            source: source.into(),
        })?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use burn::module::Module;

    use super::*;

    #[test]
    fn the_ordinary_loader_reads_the_embedded_file_alike() {
        let device = Device::flex();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/backbone.safetensors");
        let embedded = Backbone::Embedded.load(5, &device).unwrap();
        let model = embedded_config().with_num_labels(5).init(&device);
        let read = load_safetensors(model, path, Head::New).unwrap();

        let pixels = Tensor::ones([2, 1, digits::SIZE, digits::SIZE], &device);
        assert_eq!(
            embedded.features(pixels.clone()).into_data(),
            read.features(pixels).into_data(),
        );
        assert!(embedded.num_params() < 500_000 && EMBEDDED.len() < 2_000_000);
    }
}
