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
mod notes;
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
    ///
    /// They are not checked, and have the model's names: [`Adapter::save`] refuses settings that could not be read
    /// back, and writes the file's names.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_boft::{Adapter, BoftConfig};
    ///
    /// let config = BoftConfig::new().with_block_size(8).with_target_modules(["query"]);
    /// let adapter = Adapter::from_parts(config, Vec::new(), Vec::new())?;
    /// let settings = adapter.with_base_model("facebook/dinov2-small").settings();
    /// assert_eq!(settings["boft_block_size"], 8);
    /// assert_eq!(settings["base_model_name_or_path"], "facebook/dinov2-small");
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn settings(&self) -> Map<String, Value> {
        config_json::write(&self.config, &self.about)
    }

    /// Takes over the settings that say where an adapter comes from; all others are left out.
    ///
    /// They are `auto_mapping`, `base_model_name_or_path`, `revision` and `task_type`. They take the place of those
    /// that the adapter has, also where they are not given.
    pub fn with_about(mut self, settings: &Map<String, Value>) -> Self {
        let about = keys::ABOUT
            .iter()
            .filter_map(|key| Some((key.to_string(), settings.get(*key)?.clone())));
        self.about = about.collect();
        self
    }
}
