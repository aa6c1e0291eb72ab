//! PEFT's files: an [`Adapter`] out of a folder and into one.
//!
//! [`Adapter::load`] and [`Adapter::save`] are the verbs; here are their options, their errors, and the pieces of a folder
//! for tools that look at the files themselves.

mod config_json;
mod folder;
mod fused;
mod keys;
mod legacy;
mod load;
mod read;
mod save;
mod scale;
mod write;

use serde_json::{Map, Value};

pub use config_json::ConfigError;
pub use folder::{Folder, NameError, read_settings};
pub use keys::{CONFIG_FILE, PREFIX, TENSORS_FILE, key, saved_key};
pub use load::{LoadError, LoadOptions};
pub use save::{SaveError, SaveOptions, Unrepresentable};

pub(crate) use config_json::check as check_settings;

use crate::value::Adapter;

impl Adapter {
    /// The settings as PEFT's `adapter_config.json` says them.
    pub fn settings(&self) -> Map<String, Value> {
        config_json::write(&self.config, &self.about)
    }

    /// Takes over from PEFT's settings where it comes from; other settings are left out.
    pub fn with_about(mut self, settings: &Map<String, Value>) -> Self {
        let about = keys::ABOUT
            .iter()
            .filter_map(|key| Some((key.to_string(), settings.get(*key)?.clone())));
        self.about = about.collect();
        self
    }
}
