//! [`Adapter::load`]: an adapter out of PEFT's folder.

use std::path::Path;

use serde_json::Map;

use super::error::LoadError;
use super::folder;
use super::keys::{CONFIG_FILE, TENSORS_FILE};
use super::read::{Findings, Parsed, Reader};
use crate::config::LayerKind;
use crate::value::keymap::KeyMap;
use crate::value::{Adapter, LoadReport, Promise};

/// How [`Adapter::load_with`] reads.
///
/// # Examples
///
/// ```no_run
/// use burn_boft::peft::LoadOptions;
/// use burn_boft::{Adapter, KeyMap, Transformers};
///
/// let options = LoadOptions::new()
///     .with_name("digits")
///     .with_key_map(KeyMap::dinov2(Transformers::V5));
/// let (adapter, report) = Adapter::load_with("adapters", &options)?;
/// println!("{report}");
/// # drop(adapter);
/// # Ok::<(), burn_boft::peft::LoadError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The adapter's name; none for `default`.
    name: Option<String>,
    /// From the file's names to the model's.
    names: KeyMap,
    /// Whether missing and unexpected tensors are reported and not refused.
    allow_partial: bool,
    /// What layers are of the model that the adapter is for, after what the file says.
    layer_kinds: Vec<(String, Option<LayerKind>)>,
}

impl LoadOptions {
    /// Reads strictly: every tensor must have its place. Modules keep their names.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads the adapter of this name, which is a folder in the folder; `default` is the folder itself.
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Translates the names of modules in the file to those in the model.
    pub fn with_key_map(mut self, names: KeyMap) -> Self {
        self.names = names;
        self
    }

    /// Sets whether to load an adapter of which tensors are missing, or whose file has tensors that belong nowhere; the
    /// report lists them. Tensors that cannot be used are errors in any case.
    pub fn allow_partial(mut self, allow: bool) -> Self {
        self.allow_partial = allow;
        self
    }

    /// Says of which kind the layers of a type are, or the layer at a full path of the model, as
    /// [`BoftConfig::with_layer_kind`](crate::BoftConfig::with_layer_kind) does where an adapter is injected.
    ///
    /// [`Adapter::save`] writes what a configuration declares as a line of text beside the tensors. A file that PEFT wrote, or
    /// wrote again, has no such line. What is given here counts after the line of the file, so that it overrules it.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_boft::LayerKind;
    /// use burn_boft::peft::LoadOptions;
    ///
    /// let options = LoadOptions::new()
    ///     .with_layer_kind("MyLinear", LayerKind::Linear)
    ///     .with_layer_kind("decoder.output", None);
    /// # drop(options);
    /// ```
    pub fn with_layer_kind(
        mut self,
        type_or_path: impl Into<String>,
        kind: impl Into<Option<LayerKind>>,
    ) -> Self {
        let entry = (type_or_path.into(), kind.into());
        self.layer_kinds.push(entry);
        self
    }
}

impl Adapter {
    /// Reads the folder of an adapter that PEFT or [`Adapter::save`] wrote.
    ///
    /// The shapes of the tensors decide how many factors there are and how large the blocks are; where the
    /// configuration says otherwise, the report has a line about it. Files of older versions are converted where that
    /// is exact:
    ///
    /// | written by | what is done |
    /// |---|---|
    /// | PEFT 0.11, 0.12: BOFT with `boft_P` | the permutations are left out |
    /// | PEFT 0.13 and older: OFT | refused: its rotation is another |
    /// | PEFT 0.14 to 0.15.2: OFT with `oft_r`, `oft_s` | read as BOFT with one factor |
    /// | PEFT 0.16, 0.17: OFT with the Neumann polynomial | computed with the series of that time |
    ///
    /// # Errors
    ///
    /// - [`LoadError::Io`], [`LoadError::Pickle`]: a file is missing or cannot be read.
    /// - [`LoadError::Json`], [`LoadError::Safetensors`]: a file is malformed.
    /// - [`LoadError::Config`]: the settings are not supported.
    /// - [`LoadError::Mismatch`]: every tensor that is missing, unexpected or wrong. With
    ///   [`LoadOptions::allow_partial`], missing and unexpected tensors are reported instead.
    /// - [`LoadError::Busy`]: the folder was being written during every attempt.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use burn_boft::Adapter;
    ///
    /// let (adapter, report) = Adapter::load("my-adapter")?;
    /// println!("{} layers for {}", adapter.layers().len(), adapter.base_model().unwrap_or("any base"));
    /// for warning in &report.warnings {
    ///     eprintln!("{warning}");
    /// }
    /// # Ok::<(), burn_boft::peft::LoadError>(())
    /// ```
    ///
    /// # References
    ///
    /// `src/peft/utils/save_and_load.py` of PEFT 0.21.2.
    pub fn load(folder: impl AsRef<Path>) -> Result<(Self, LoadReport), LoadError> {
        Self::load_with(folder, &LoadOptions::new())
    }

    /// Reads the folder of an adapter: [`Adapter::load`] with options.
    ///
    /// # Errors
    ///
    /// - [`LoadError::Name`]: the name of the adapter cannot be the name of a folder.
    /// - [`LoadError::KeyMap`]: a pattern has no answer for a name, or gives two modules the same one.
    /// - All others as [`Adapter::load`].
    pub fn load_with(
        folder: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<(Self, LoadReport), LoadError> {
        let folder = folder::folder(folder.as_ref(), options.name.as_deref())?;
        let (files, unreadable) = folder::read(&folder)?;
        let settings = files.settings.clone();
        let mut findings = Findings::default();
        findings.mismatch.wrong = unreadable;
        let keys = files.tensors.keys();
        let reader = Reader::new(&files.settings, keys, &mut findings.report);
        let reader = reader.map_err(|reason| LoadError::Config {
            path: folder.join(CONFIG_FILE),
            reason,
        })?;
        let promise = Promise {
            selection: reader.selection().clone(),
            names: options.names.clone(),
        };
        let Parsed {
            mut config,
            layers,
            tensors,
            copies,
        } = reader.read(files, &options.names, &mut findings)?;
        let Findings { report, mismatch } = findings;
        let is_strict = !options.allow_partial || !mismatch.wrong.is_empty();
        if is_strict && !mismatch.is_empty() {
            let path = folder.join(TENSORS_FILE);
            return Err(LoadError::Mismatch { path, mismatch });
        }
        let report = LoadReport {
            missing: mismatch.missing,
            unexpected: mismatch.unexpected,
            ..report
        };
        let layer_kinds = &mut config.selection_mut().layer_kinds;
        layer_kinds.extend(options.layer_kinds.iter().cloned());
        let mut adapter = Self {
            config,
            layers,
            tensors,
            copies,
            about: Map::new(),
            promised: Some(promise),
            saved_too: Vec::new(),
        };
        adapter.sort();
        Ok((adapter.with_about(&settings), report))
    }
}
