//! PEFT's files: an [`Adapter`] out of a folder and into one.
//!
//! [`Adapter::load`] and [`Adapter::save`] are the verbs; here are their options, their errors, and the pieces of a folder
//! for tools that look at the files themselves.

mod config_json;
mod error;
mod folder;
mod fused;
mod keys;
mod legacy;
mod load;
mod pair;
mod read;
mod save;
mod scale;
mod write;

use serde_json::{Map, Value};

pub use config_json::ConfigError;
pub use error::{LoadError, NameError, SaveError, Unrepresentable};
pub use folder::{Folder, read_settings};
pub use keys::{CONFIG_FILE, PREFIX, TENSORS_FILE, key, saved_key};
pub use load::LoadOptions;
pub use save::SaveOptions;

use crate::value::Adapter;

impl Adapter {
    /// The settings as PEFT's `adapter_config.json` says them.
    pub fn settings(&self) -> Map<String, Value> {
        config_json::write(&self.config, &self.about)
    }

    /// Takes over the settings that say where an adapter comes from; all others are left out.
    ///
    /// They are `auto_mapping`, `base_model_name_or_path`, `revision` and `task_type`.
    pub fn with_about(mut self, settings: &Map<String, Value>) -> Self {
        let about = keys::ABOUT
            .iter()
            .filter_map(|key| Some((key.to_string(), settings.get(*key)?.clone())));
        self.about = about.collect();
        self
    }
}
