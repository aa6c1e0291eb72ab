//! [`AdapterConfig`] to and from the settings in PEFT's `adapter_config.json`.
//!
//! A setting that is missing has the default of PEFT's configuration classes. What is written can be read back: settings that
//! could not be are refused.
//!
//! | PEFT's setting | ours |
//! |---|---|
//! | `boft_block_size`, `boft_block_num`; `oft_block_size`, `r` | `block`; the one of the pair that is not used is 0 |
//! | `boft_n_butterfly_factor` | `n_butterfly_factor` |
//! | `boft_dropout` | `dropout` |
//! | `use_cayley_neumann`, `num_cayley_neumann_terms`, `peft_version` | `cayley`: the series changed with PEFT 0.18 |
//! | `coft`, `eps` | `coft_radius` |
//! | `block_share` | `block_share` |
//! | `init_weights` | `init`, without the seed |
//! | `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern` | the same in `selection` |
//! | `modules_to_save`, `bias` | the same in `selection`; `boft_only` and `oft_only` are `Bias::AdapterOnly` |
//! | `fan_in_fan_out` | nothing where it is false; refused where it is true |
//! | `inference_mode`, `module_dropout` | nothing: they change no result of PEFT 0.16 and later |
//!
//! PEFT's files: `src/peft/tuners/boft/config.py` and `src/peft/tuners/oft/config.py`.
//!
//! Values are read more strictly than PEFT reads them: its classes do not check types, so a string where a number
//! belongs fails later and elsewhere, or not at all. Ranges, such as that of the dropout, are checked with the model,
//! by `rotation`.

use std::collections::{BTreeMap, HashSet};

use serde::de::{self, Deserialize, Deserializer};
use serde::ser::{Error as _, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::keys::{ABOUT, BOFT, COMMON, Format, OFT};
use crate::config::{
    AdapterConfig, Bias, Block, BoftConfig, Cayley, Init, OftConfig, Selection, TargetModules,
};

/// The version whose formats are written. Since 0.18, PEFT warns of the old Neumann series where a file has no version
/// or an older one.
const PEFT_VERSION: &str = "0.21.2";
/// The last version that computed [`Cayley::Neumann016`]. PEFT itself wrote no version then; ours makes PEFT 0.18
/// and later warn that they compute another series.
const PEFT_VERSION_016: &str = "0.17.1";
/// PEFT's default COFT radius, `eps`. It is written where there is no radius, with `coft` false.
const EPS: f64 = 6e-5;
/// PEFT's default number of Neumann terms, written for the exact map as well, with `use_cayley_neumann` false.
const TERMS: usize = 5;

/// The most terms that are computed: further ones are zero in every precision.
const MOST_TERMS: u64 = 100;
/// The most factors that blocks of two channels can have before their span is no integer.
const MOST_FACTORS: u64 = 63;

/// Why PEFT's settings are refused.
///
/// # Examples
///
/// ```
/// use burn_boft::AdapterConfig;
///
/// let settings = r#"{"peft_type": "BOFT", "boft_block_num": 8}"#;
/// // PEFT's default block size is 4, so a count alone makes two sizes.
/// let error = serde_json::from_str::<AdapterConfig>(settings).unwrap_err();
/// assert!(error.to_string().starts_with("`boft_block_size` is 4 and `boft_block_num` is 8"));
/// let settings = r#"{"peft_type": "BOFT", "boft_block_num": 8, "boft_block_size": 0}"#;
/// assert!(serde_json::from_str::<AdapterConfig>(settings).is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nothing says what kind of adapter it is: `peft_type` is missing or `null`. PEFT has no default for it either.
    #[error("`peft_type` is missing; PEFT writes \"BOFT\" or \"OFT\" there")]
    NoPeftType,
    /// An adapter of another kind.
    #[error("`peft_type` is {peft_type}, and only BOFT and OFT are supported")]
    OtherPeftType {
        /// The kind found.
        peft_type: String,
    },
    /// A value that its field cannot have.
    #[error("`{field}` is {value}, not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// Neither a size nor a count of blocks.
    #[error(
        "`{size_field}` and `{count_field}` are both 0; one of them must say how blocks are cut"
    )]
    NoSize {
        /// The field of the size.
        size_field: &'static str,
        /// The field of the count.
        count_field: &'static str,
    },
    /// Both a size and a count of blocks. Where BOFT's size is missing it is PEFT's default, 4, so it must be given as
    /// 0 where the count is meant.
    #[error("`{size_field}` is {size} and `{count_field}` is {count}; one of them must be 0")]
    TwoSizes {
        /// The field of the size.
        size_field: &'static str,
        /// The size.
        size: usize,
        /// The field of the count.
        count_field: &'static str,
        /// The count.
        count: usize,
    },
    /// OFT of PEFT 0.13 or older, which did not write `oft_block_size`. PEFT 0.14 and later refuse it too.
    #[error(
        "`oft_block_size` is missing, so PEFT 0.13 or older wrote this OFT adapter, whose rotation is another; \
         merge it with that version, or train it anew"
    )]
    OldOft,
    /// Layers whose weights are stored as `[d_input, d_output]`, such as transformers' `Conv1D`. PEFT's OFT and BOFT adapt none,
    /// and set the field to false where they adapt an `nn.Linear`.
    #[error(
        "`fan_in_fan_out` is true, which is for weights stored as [d_input, d_output], such as those of GPT-2's Conv1D, and \
         neither PEFT's OFT and BOFT nor this program adapts those; set it to false if the layers are nn.Linear"
    )]
    FanInFanOut,
}

/// Settings read from PEFT's JSON.
pub(super) struct Settings {
    pub(super) config: AdapterConfig,
    /// The method, which says how tensors are stored.
    pub(super) format: Format,
    /// Whether one stored block serves a layer.
    pub(super) block_share: bool,
    /// What is read as it is and may surprise.
    pub(super) warnings: Vec<String>,
}

/// Reads PEFT's settings.
///
/// A setting that neither PEFT 0.21.2 nor an older OFT has is ignored with a warning, as PEFT ignores it, so that files
/// of later versions load. Settings that change no result, such as `inference_mode`, are passed over without one.
///
/// # Errors
///
/// [`ConfigError`] for the first setting that is refused.
///
/// # References
///
/// `from_peft_type` in `src/peft/config.py` of PEFT 0.21.2 for settings that are not known; `check_kwargs` in
/// `src/peft/tuners/oft/config.py` for OFT of PEFT 0.13 and older.
pub(super) fn read(object: &Map<String, Value>) -> Result<Settings, ConfigError> {
    let fields = Fields(object);
    let format = fields.format()?;
    if fields.flag("fan_in_fan_out", false)? {
        return Err(ConfigError::FanInFanOut);
    }
    let config = match format {
        Format::Boft => read_boft(&fields)?.into(),
        Format::Oft => read_oft(&fields)?.into(),
    };
    let own: &[&str] = match format {
        Format::Boft => &BOFT,
        Format::Oft => &OFT,
    };
    let mut warnings = Vec::new();
    let unknown: Vec<_> = object
        .keys()
        .map(String::as_str)
        .filter(|key| !COMMON.contains(key) && !ABOUT.contains(key) && !own.contains(key))
        .map(|key| format!("`{key}`"))
        .collect();
    if !unknown.is_empty() {
        let unknown = unknown.join(", ");
        warnings.push(format!(
            "settings that are not known are ignored: {unknown}"
        ));
    }
    let has_dropout = || Ok::<_, ConfigError>(fields.number("module_dropout", 0.0)? != 0.0);
    if format == Format::Oft && has_dropout()? && !fields.is_before((0, 16)) {
        warnings.push("`module_dropout` has no effect in PEFT 0.16 and later, nor here".into());
    }
    Ok(Settings {
        config,
        format,
        block_share: format == Format::Oft && fields.flag("block_share", false)?,
        warnings,
    })
}

/// The method of a configuration, which says how its tensors are stored.
pub(super) fn format(config: &AdapterConfig) -> Format {
    match config {
        AdapterConfig::Boft(_) => Format::Boft,
        AdapterConfig::Oft(_) => Format::Oft,
    }
}

/// The warning for layers that are computed with the polynomial of PEFT 0.16. None for any other configuration.
///
/// PEFT 0.18 and later warn in the same case, and then compute the new polynomial from the old numbers. Here the series
/// of the file's version is used, so the model computes what was trained.
pub(super) fn warn_of_old_series(
    config: &AdapterConfig,
    object: &Map<String, Value>,
) -> Option<String> {
    let AdapterConfig::Oft(OftConfig {
        cayley: Cayley::Neumann016 { terms },
        ..
    }) = config
    else {
        return None;
    };
    let fields = Fields(object);
    let version = fields.version().unwrap_or("none");
    Some(format!(
        "the Neumann series of PEFT 0.16 and 0.17 is used with {terms} terms (peft_version: {version}); \
         PEFT 0.18 and later would compute another from the same numbers"
    ))
}

/// BOFT's settings.
///
/// The number of factors may be 0: without its CUDA kernel, PEFT accepts that and trains one. The tensors correct it.
///
/// # Errors
///
/// [`ConfigError::Field`], [`ConfigError::NoSize`] and [`ConfigError::TwoSizes`], as `__post_init__` of PEFT's
/// `BOFTConfig` has them.
fn read_boft(fields: &Fields) -> Result<BoftConfig, ConfigError> {
    let size = fields.count("boft_block_size", 4)?;
    let count = fields.count("boft_block_num", 0)?;
    let mut config = BoftConfig::new();
    config.block = block(("boft_block_size", size), ("boft_block_num", count))?;
    config.n_butterfly_factor = fields.up_to(
        MOST_FACTORS,
        "boft_n_butterfly_factor",
        1,
        "a whole number from 0 to 63",
    )?;
    config.dropout = fields.number("boft_dropout", 0.0)?;
    config.init = fields.init()?;
    config.selection = fields.selection()?;
    Ok(config)
}

/// OFT's settings, in files of PEFT 0.14 and later. Those of 0.14 to 0.15.2 lack the settings of the Neumann
/// polynomial, whose default would be wrong for them: `legacy` takes the other settings only.
///
/// # Errors
///
/// - [`ConfigError::OldOft`]: `oft_block_size` is missing. PEFT refuses the file by the same rule, and a default would
///   read numbers of another rotation.
/// - [`ConfigError::Field`], [`ConfigError::NoSize`] and [`ConfigError::TwoSizes`], as `__post_init__` of PEFT's
///   `OFTConfig` has them.
pub(super) fn read_oft(fields: &Fields) -> Result<OftConfig, ConfigError> {
    if !fields.0.contains_key("oft_block_size") {
        return Err(ConfigError::OldOft);
    }
    let size = fields.count("oft_block_size", 32)?;
    let count = fields.count("r", 0)?;
    let mut config = OftConfig::new();
    config.block = block(("oft_block_size", size), ("r", count))?;
    let terms = fields.up_to(
        MOST_TERMS,
        "num_cayley_neumann_terms",
        TERMS,
        "a whole number from 0 to 100",
    )?;
    config.cayley = match fields.flag("use_cayley_neumann", true)? {
        false => Cayley::Exact,
        // PEFT names its version since 0.18, which changed the series.
        true if fields.is_before((0, 18)) => Cayley::Neumann016 { terms },
        true => Cayley::Neumann { terms },
    };
    let eps = fields.number("eps", EPS)?;
    config.coft_radius = fields.flag("coft", false)?.then_some(eps);
    config.block_share = fields.flag("block_share", false)?;
    config.init = fields.init()?;
    config.selection = fields.selection()?;
    Ok(config)
}

/// How the axis is cut, from PEFT's pair of a size and a count, of which exactly one must not be 0.
///
/// BOFT's missing size has PEFT's default, 4, so a file with a count must have the size as 0. OFT's must be there in any
/// case. PEFT refuses the others by the same rule.
fn block(
    (size_field, size): (&'static str, usize),
    (count_field, count): (&'static str, usize),
) -> Result<Block, ConfigError> {
    match (size, count) {
        (0, 0) => Err(ConfigError::NoSize {
            size_field,
            count_field,
        }),
        (size, 0) => Ok(Block::Size(size)),
        (0, count) => Ok(Block::Count(count)),
        (size, count) => Err(ConfigError::TwoSizes {
            size_field,
            size,
            count_field,
            count,
        }),
    }
}

/// A JSON object that is read field by field, a missing field being its default. `null` is no missing field: only the
/// settings that PEFT lets be `None` may have it.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    /// The method that `peft_type` names. It is upper case in every version of PEFT, and the only setting without a
    /// default.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::NoPeftType`]: it is missing or `null`.
    /// - [`ConfigError::OtherPeftType`]: it names another method, or is no string.
    fn format(&self) -> Result<Format, ConfigError> {
        match self.0.get("peft_type") {
            None | Some(Value::Null) => Err(ConfigError::NoPeftType),
            Some(Value::String(name)) if name == Format::Boft.peft_type() => Ok(Format::Boft),
            Some(Value::String(name)) if name == Format::Oft.peft_type() => Ok(Format::Oft),
            Some(other) => {
                let peft_type = shortened(other).trim_matches('"').to_string();
                Err(ConfigError::OtherPeftType { peft_type })
            }
        }
    }

    /// A field by a function that is `None` for values that it cannot have; `expected` says in a message which ones it
    /// can.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Field`]: the field is there and has such a value.
    fn read<T>(
        &self,
        field: &'static str,
        default: T,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, ConfigError> {
        match self.0.get(field) {
            None => Ok(default),
            Some(value) => read(value).ok_or_else(|| ConfigError::Field {
                field,
                value: shortened(value),
                expected,
            }),
        }
    }

    /// A whole number of at least 0. `4.0` is not one: PEFT would use it in a shape and fail.
    fn count(&self, field: &'static str, default: usize) -> Result<usize, ConfigError> {
        self.read(field, default, "a whole number, 0 or more", |value| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
        })
    }

    /// A whole number from 0 to `most`, for counts that a loop or a power of two would otherwise take at their word.
    fn up_to(
        &self,
        most: u64,
        field: &'static str,
        default: usize,
        expected: &'static str,
    ) -> Result<usize, ConfigError> {
        self.read(field, default, expected, |value| {
            let number = value.as_u64().filter(|number| *number <= most)?;
            usize::try_from(number).ok()
        })
    }

    /// A number. JSON has neither NaN nor infinity, so it is finite.
    pub(super) fn number(&self, field: &'static str, default: f64) -> Result<f64, ConfigError> {
        self.read(field, default, "a number", Value::as_f64)
    }

    /// `true` or `false`, and nothing that Python would take for one of them.
    fn flag(&self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        self.read(field, default, "true or false", Value::as_bool)
    }

    /// `init_weights`: PEFT starts from the identity where it is true, and else from `N(0, 0.1)` without a seed of its
    /// own.
    fn init(&self) -> Result<Init, ConfigError> {
        Ok(match self.flag("init_weights", true)? {
            true => Init::Identity,
            false => Init::Random { seed: 0 },
        })
    }

    /// Which layers, biases and modules are meant. A name alone is a list of one, except in `target_modules` and
    /// `exclude_modules`, where PEFT takes a string for a regular expression.
    ///
    /// What PEFT has no setting for, such as `layer_kinds`, has its default; `notes` knows the kinds.
    fn selection(&self) -> Result<Selection, ConfigError> {
        const MODULES: &str = "null, a string or a list of strings";
        let mut modules_to_save = self.read("modules_to_save", Vec::new(), MODULES, names)?;
        // PEFT extends the list on each load, so files repeat themselves.
        let mut seen = HashSet::new();
        modules_to_save.retain(|name| seen.insert(name.clone()));
        let mut layers_pattern = self.read("layers_pattern", Vec::new(), MODULES, names)?;
        // Beside an empty list, PEFT passes over the pattern. Beside `null`, it refuses it.
        if self.0.get("layers_to_transform") == Some(&json!([])) {
            layers_pattern.clear();
        }
        Ok(Selection {
            target_modules: self.read("target_modules", None, MODULES, |value| {
                modules(value, TargetModules::from)
            })?,
            // PEFT gives "all-linear" no meaning here.
            exclude_modules: self.read("exclude_modules", None, MODULES, |value| {
                modules(value, TargetModules::Regex)
            })?,
            layers_to_transform: self.read(
                "layers_to_transform",
                Vec::new(),
                "null, a layer index or a list of them",
                indices,
            )?,
            layers_pattern,
            modules_to_save,
            bias: self.read(
                "bias",
                Bias::None,
                "\"none\", \"all\" or \"…_only\"",
                |value| match value.as_str()? {
                    "none" => Some(Bias::None),
                    "all" => Some(Bias::All),
                    other => other.ends_with("_only").then_some(Bias::AdapterOnly),
                },
            )?,
            ..Selection::default()
        })
    }

    /// `peft_version`, which PEFT writes since 0.18: `0.21.2`, or `0.18.2.dev0@` and a commit.
    fn version(&self) -> Option<&str> {
        self.0.get("peft_version").and_then(Value::as_str)
    }

    /// Whether an earlier version of PEFT wrote this: one that says so, or that did not say yet.
    ///
    /// Only the first two numbers count, so `0.18.0.dev0` is 0.18. A version that cannot be read is 0, since every
    /// version that writes one writes it in this form.
    fn is_before(&self, minor: (u64, u64)) -> bool {
        let number = |part: Option<&str>| -> u64 {
            let digits = part.unwrap_or_default();
            let end = digits
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(digits.len());
            digits[..end].parse().unwrap_or(0)
        };
        let mut parts = self.version().unwrap_or("0").split('.');
        (number(parts.next()), number(parts.next())) < minor
    }
}

/// `null`, one name, or several. An empty string is no name.
fn names(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::String(name) if name.is_empty() => Some(Vec::new()),
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(names) => names
            .iter()
            .map(|name| name.as_str().map(str::to_string))
            .collect(),
        _ => None,
    }
}

/// Modules by a list of names, or by a string that `from_string` understands. The outer `None` is a value that the
/// field cannot have, the inner one no modules at all: `null` or an empty string. An empty list is a list, and selects
/// nothing.
fn modules(
    value: &Value,
    from_string: impl Fn(String) -> TargetModules,
) -> Option<Option<TargetModules>> {
    match value {
        Value::String(name) if !name.is_empty() => Some(Some(from_string(name.clone()))),
        Value::Null | Value::String(_) => Some(None),
        _ => names(value).map(|names| Some(TargetModules::Names(names))),
    }
}

/// `layers_to_transform`: `null`, one index, or several. Neither a missing list nor an empty one restricts anything.
fn indices(value: &Value) -> Option<Vec<usize>> {
    let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => values.iter().map(index).collect(),
        value => Some(vec![index(value)?]),
    }
}

/// A value for a message, cut where it is long: a list of targets can have thousands of names.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Refuses settings that [`read`] would not read back as they are.
///
/// It writes and reads them, so that the rules are in one place. Numbers that are not finite are found first, since JSON
/// would hold `null` in their place, and so is `all-linear` where it would be read as a regular expression.
///
/// # Errors
///
/// [`ConfigError`], which names the setting as PEFT does.
pub(super) fn check(config: &AdapterConfig) -> Result<(), ConfigError> {
    let number = match config {
        AdapterConfig::Boft(config) => ("boft_dropout", config.dropout),
        AdapterConfig::Oft(config) => ("eps", config.coft_radius.unwrap_or(EPS)),
    };
    if let (field, value) = number
        && !value.is_finite()
    {
        return Err(ConfigError::Field {
            field,
            value: value.to_string(),
            expected: "a finite number",
        });
    }
    if config.selection().exclude_modules == Some(TargetModules::AllLinear) {
        return Err(ConfigError::Field {
            field: "exclude_modules",
            value: "\"all-linear\"".to_string(),
            expected: "names or a regular expression, which PEFT would take it for",
        });
    }
    read(&write(config, &Map::new())).map(drop)
}

/// PEFT's settings, with what is carried along.
///
/// Every setting that PEFT 0.21.2 writes is there, also where it has its default, since the default may change.
/// `inference_mode` is true, as in every file that PEFT saves. Settings about the origin that are not in `about` are
/// `null`.
pub(super) fn write(config: &AdapterConfig, about: &Map<String, Value>) -> Map<String, Value> {
    let about = ABOUT.map(|key| (key, about.get(key).cloned().unwrap_or(Value::Null)));
    let init = ("init_weights", json!(config.init() == Init::Identity));
    let common = write_selection(config.selection(), format(config));
    let own = match config {
        AdapterConfig::Boft(config) => write_boft(config),
        AdapterConfig::Oft(config) => write_oft(config),
    };
    let fields = about.into_iter().chain([init]).chain(common).chain(own);
    fields
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

type Field = (&'static str, Value);

/// The settings that both methods have. Empty lists are `null`, which is what PEFT has where nothing was given.
fn write_selection(selection: &Selection, format: Format) -> Vec<Field> {
    let list = |names: &[String]| match names {
        [] => Value::Null,
        names => json!(names),
    };
    let bias = match selection.bias {
        Bias::None => "none",
        Bias::All => "all",
        Bias::AdapterOnly => format.bias_only(),
    };
    let layers = match selection.layers_to_transform.as_slice() {
        [] => Value::Null,
        layers => json!(layers),
    };
    vec![
        ("bias", json!(bias)),
        ("exclude_modules", json_modules(&selection.exclude_modules)),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("layers_pattern", list(&selection.layers_pattern)),
        ("layers_to_transform", layers),
        ("modules_to_save", list(&selection.modules_to_save)),
        ("peft_type", json!(format.peft_type())),
        ("target_modules", json_modules(&selection.target_modules)),
    ]
}

/// The settings that only BOFT has, and the version.
fn write_boft(config: &BoftConfig) -> Vec<Field> {
    let (size, count) = sizes(config.block);
    vec![
        ("boft_block_num", json!(count)),
        ("boft_block_size", json!(size)),
        ("boft_dropout", json!(config.dropout)),
        ("boft_n_butterfly_factor", json!(config.n_butterfly_factor)),
        ("peft_version", json!(PEFT_VERSION)),
    ]
}

/// The settings that only OFT has, and the version, which tells the two Neumann series apart.
///
/// `module_dropout` is 0: PEFT 0.16 and later make a dropout of it and do not call it.
fn write_oft(config: &OftConfig) -> Vec<Field> {
    let (size, count) = sizes(config.block);
    let (terms, version) = match config.cayley {
        Cayley::Exact => (None, PEFT_VERSION),
        Cayley::Neumann { terms } => (Some(terms), PEFT_VERSION),
        Cayley::Neumann016 { terms } => (Some(terms), PEFT_VERSION_016),
    };
    vec![
        ("block_share", json!(config.block_share)),
        ("coft", json!(config.coft_radius.is_some())),
        ("eps", json!(config.coft_radius.unwrap_or(EPS))),
        ("module_dropout", json!(0.0)),
        ("num_cayley_neumann_terms", json!(terms.unwrap_or(TERMS))),
        ("oft_block_size", json!(size)),
        ("peft_version", json!(version)),
        ("r", json!(count)),
        ("use_cayley_neumann", json!(terms.is_some())),
    ]
}

/// PEFT's pair of size and count, of which one is 0. PEFT refuses a pair without a 0.
fn sizes(block: Block) -> (usize, usize) {
    match block {
        Block::Size(size) => (size, 0),
        Block::Count(count) => (0, count),
    }
}

/// Modules as PEFT has them: a list of names, or a string that is a regular expression or `all-linear`.
fn json_modules(modules: &Option<TargetModules>) -> Value {
    match modules {
        None => Value::Null,
        Some(TargetModules::Names(names)) => json!(names),
        Some(TargetModules::Regex(pattern)) => json!(pattern),
        Some(TargetModules::AllLinear) => json!("all-linear"),
    }
}

/// PEFT's `adapter_config.json`, with the settings about the origin as `null`.
///
/// # Errors
///
/// Settings that would not be read back, as a custom error of the serializer with the text of [`ConfigError`].
impl Serialize for AdapterConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        check(self).map_err(S::Error::custom)?;
        // Sorted, as PEFT sorts them, whichever map `serde_json` is built with.
        let fields: BTreeMap<_, _> = write(self, &Map::new()).into_iter().collect();
        serializer.collect_map(fields)
    }
}

/// PEFT's `adapter_config.json`. Warnings of settings that are not known are dropped;
/// [`Adapter::load`](crate::Adapter::load) reports them.
///
/// # Errors
///
/// Settings that are refused, as a custom error of the deserializer with the text of [`ConfigError`].
impl<'de> Deserialize<'de> for AdapterConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Map::deserialize(deserializer)?;
        read(&object)
            .map(|read| read.config)
            .map_err(de::Error::custom)
    }
}

/// Serde of one of the two by way of [`AdapterConfig`].
macro_rules! by_adapter_config {
    ($config:ident, $variant:ident, $name:literal) => {
        impl Serialize for $config {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                AdapterConfig::from(self).serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $config {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                match AdapterConfig::deserialize(deserializer)? {
                    AdapterConfig::$variant(config) => Ok(config),
                    _ => Err(de::Error::custom(concat!("peft_type is not ", $name))),
                }
            }
        }
    };
}

by_adapter_config!(BoftConfig, Boft, "BOFT");
by_adapter_config!(OftConfig, Oft, "OFT");

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: Value) -> Result<Settings, ConfigError> {
        read(json.as_object().unwrap())
    }

    fn boft(fields: Value) -> Result<BoftConfig, ConfigError> {
        let mut json = json!({"peft_type": "BOFT"});
        let object = json.as_object_mut().unwrap();
        object.extend(fields.as_object().unwrap().clone());
        match parse(json)?.config {
            AdapterConfig::Boft(config) => Ok(config),
            AdapterConfig::Oft(_) => panic!("BOFT was asked for"),
        }
    }

    fn oft(fields: Value) -> Result<Settings, ConfigError> {
        let mut json = json!({"peft_type": "OFT", "oft_block_size": 32});
        let object = json.as_object_mut().unwrap();
        object.extend(fields.as_object().unwrap().clone());
        parse(json)
    }

    fn configs() -> Vec<AdapterConfig> {
        let boft = BoftConfig::new().with_target_modules(["query", "output.dense"]);
        let oft = OftConfig::new().with_target_modules(r".*\.(?!lm_head)\w+_proj");
        vec![
            boft.clone().into(),
            boft.clone()
                .with_block_num(6)
                .with_n_butterfly_factor(3)
                .with_dropout(0.125)
                .with_bias(Bias::AdapterOnly)
                .with_modules_to_save(["classifier", "norm"])
                .with_exclude_modules("layers\\.[01]\\..*")
                .with_layers_to_transform([0, 4])
                .with_layers_pattern(["layers", "blocks"])
                .into(),
            boft.with_target_modules("all-linear")
                .with_init(Init::Random { seed: 0 })
                .into(),
            oft.clone().into(),
            oft.clone()
                .with_block_num(3)
                .with_cayley(Cayley::Neumann { terms: 6 })
                .with_coft_radius(0.25)
                .with_block_share(true)
                .with_bias(Bias::All)
                .into(),
            oft.with_cayley(Cayley::Neumann016 { terms: 4 }).into(),
        ]
    }

    #[test]
    fn settings_survive_their_json() {
        for config in configs() {
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(
                serde_json::from_str::<AdapterConfig>(&json).unwrap(),
                config,
                "{json}"
            );
            match &config {
                AdapterConfig::Boft(boft) => {
                    assert_eq!(serde_json::to_string(boft).unwrap(), json);
                    assert_eq!(&serde_json::from_str::<BoftConfig>(&json).unwrap(), boft);
                    let error = serde_json::from_str::<OftConfig>(&json).unwrap_err();
                    assert!(
                        error.to_string().contains("peft_type is not OFT"),
                        "{error}"
                    );
                }
                AdapterConfig::Oft(oft) => {
                    assert_eq!(&serde_json::from_str::<OftConfig>(&json).unwrap(), oft);
                }
            }
        }
    }

    #[test]
    fn settings_that_could_not_be_read_back_are_not_written() {
        let boft = BoftConfig::new;
        let oft = OftConfig::new;
        let huge = Cayley::Neumann { terms: 101 };
        for (config, expected) in [
            (
                AdapterConfig::from(oft().with_block_num(0)),
                "`oft_block_size` and `r` are both 0; one of them must say how blocks are cut",
            ),
            (
                boft().with_block_size(0).into(),
                "`boft_block_size` and `boft_block_num` are both 0; one of them must say how blocks are cut",
            ),
            (
                oft().with_coft_radius(f64::NAN).into(),
                "`eps` is NaN, not a finite number",
            ),
            (
                boft().with_dropout(f64::INFINITY).into(),
                "`boft_dropout` is inf, not a finite number",
            ),
            (
                boft().with_n_butterfly_factor(usize::MAX).into(),
                "`boft_n_butterfly_factor` is 18446744073709551615, not a whole number from 0 to 63",
            ),
            (
                oft().with_cayley(huge).into(),
                "`num_cayley_neumann_terms` is 101, not a whole number from 0 to 100",
            ),
        ] {
            assert_eq!(check(&config).unwrap_err().to_string(), expected);
            let error = serde_json::to_string(&config).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_json_is_the_one_that_peft_writes() {
        let config = BoftConfig::new()
            .with_target_modules(["q_proj"])
            .with_bias(Bias::AdapterOnly);
        let about = json!({"task_type": "SEQ_CLS", "base_model_name_or_path": "facebook/dinov2"});
        let json = write(&config.into(), about.as_object().unwrap());
        let json: BTreeMap<_, _> = json.into_iter().collect();
        assert_eq!(
            serde_json::to_string_pretty(&json).unwrap(),
            r#"{
  "auto_mapping": null,
  "base_model_name_or_path": "facebook/dinov2",
  "bias": "boft_only",
  "boft_block_num": 0,
  "boft_block_size": 4,
  "boft_dropout": 0.0,
  "boft_n_butterfly_factor": 1,
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "modules_to_save": null,
  "peft_type": "BOFT",
  "peft_version": "0.21.2",
  "revision": null,
  "target_modules": [
    "q_proj"
  ],
  "task_type": "SEQ_CLS"
}"#
        );
    }

    #[test]
    fn the_neumann_series_goes_by_the_version() {
        let cayley = |fields: Value| match oft(fields).unwrap().config {
            AdapterConfig::Oft(config) => config.cayley,
            AdapterConfig::Boft(_) => panic!("OFT was asked for"),
        };
        let (new, old) = (
            Cayley::Neumann { terms: 5 },
            Cayley::Neumann016 { terms: 5 },
        );
        assert_eq!(cayley(json!({})), old, "PEFT names its version since 0.18");
        for (version, expected) in [
            ("0.16.0", old),
            ("0.17.1", old),
            ("0.18.0", new),
            ("0.18.2.dev0@UNKNOWN", new),
            ("0.21.2", new),
            ("1.0rc1", new),
            ("nonsense", old),
        ] {
            assert_eq!(
                cayley(json!({"peft_version": version})),
                expected,
                "{version}"
            );
        }
        let exact = json!({"use_cayley_neumann": false, "num_cayley_neumann_terms": 7});
        assert_eq!(cayley(exact), Cayley::Exact);
        let version = |config: &AdapterConfig| write(config, &Map::new())["peft_version"].clone();
        assert_eq!(version(&configs()[4]), "0.21.2");
        assert_eq!(version(&configs()[5]), "0.17.1");
    }

    #[test]
    fn values_are_read_as_peft_reads_them() {
        let selection = |fields| boft(fields).unwrap().selection;
        let names = |modules: &[&str]| Some(TargetModules::from(modules.to_vec()));
        assert_eq!(
            selection(json!({"target_modules": ["a", "b"]})).target_modules,
            names(&["a", "b"])
        );
        assert_eq!(
            selection(json!({"target_modules": "All-Linear"})).target_modules,
            Some(TargetModules::AllLinear)
        );
        assert_eq!(
            selection(json!({"exclude_modules": "all-linear"})).exclude_modules,
            Some(TargetModules::Regex("all-linear".into())),
            "a pattern like any other"
        );
        assert_eq!(
            selection(json!({"target_modules": null})).target_modules,
            None
        );
        assert_eq!(
            selection(json!({"layers_to_transform": 0})).layers_to_transform,
            [0]
        );
        assert_eq!(
            selection(json!({"layers_pattern": "h"})).layers_pattern,
            ["h"]
        );
        assert_eq!(
            selection(json!({"modules_to_save": ["classifier", "score", "classifier"]}))
                .modules_to_save,
            ["classifier", "score"]
        );
        for (bias, expected) in [
            ("none", Bias::None),
            ("all", Bias::All),
            ("boft_only", Bias::AdapterOnly),
            ("lora_only", Bias::AdapterOnly),
        ] {
            assert_eq!(selection(json!({"bias": bias})).bias, expected);
        }
        let defaults = boft(json!({})).unwrap();
        assert_eq!(defaults, BoftConfig::new());
    }

    #[test]
    fn what_is_ignored_is_told() {
        let warnings = |json| parse(json).unwrap().warnings;
        assert_eq!(
            warnings(json!({"peft_type": "BOFT", "runtime_config": {}, "r": 8})),
            ["settings that are not known are ignored: `r`, `runtime_config`"]
        );
        let told = oft(json!({"module_dropout": 0.1, "peft_version": "0.19.0"})).unwrap();
        assert_eq!(
            told.warnings,
            ["`module_dropout` has no effect in PEFT 0.16 and later, nor here"]
        );
    }

    #[test]
    fn every_bad_setting_is_an_error_that_names_it() {
        let refused = |fields| boft(fields).unwrap_err().to_string();
        for (fields, expected) in [
            (
                json!({"boft_block_size": -1}),
                "`boft_block_size` is -1, not a whole number, 0 or more",
            ),
            (
                json!({"boft_block_size": 4.5}),
                "`boft_block_size` is 4.5, not a whole number, 0 or more",
            ),
            (
                json!({"boft_n_butterfly_factor": u64::MAX}),
                "`boft_n_butterfly_factor` is 18446744073709551615, not a whole number from 0 to 63",
            ),
            (
                json!({"boft_block_size": 0}),
                "`boft_block_size` and `boft_block_num` are both 0; one of them must say how blocks are cut",
            ),
            (
                json!({"boft_block_num": 2}),
                "`boft_block_size` is 4 and `boft_block_num` is 2; one of them must be 0",
            ),
            (
                json!({"boft_dropout": "0.1"}),
                "`boft_dropout` is \"0.1\", not a number",
            ),
            (
                json!({"bias": "some"}),
                "`bias` is \"some\", not \"none\", \"all\" or \"…_only\"",
            ),
            (
                json!({"target_modules": [1]}),
                "`target_modules` is [1], not null, a string or a list of strings",
            ),
            (
                json!({"layers_to_transform": "0"}),
                "`layers_to_transform` is \"0\", not null, a layer index or a list of them",
            ),
            (
                json!({"init_weights": "gaussian"}),
                "`init_weights` is \"gaussian\", not true or false",
            ),
            (
                json!({"fan_in_fan_out": true}),
                "`fan_in_fan_out` is true, which is for weights stored as [d_input, d_output], such as those of GPT-2's \
                 Conv1D, and neither PEFT's OFT and BOFT nor this program adapts those; set it to false if the layers are \
                 nn.Linear",
            ),
        ] {
            assert_eq!(refused(fields), expected);
        }
        let long = refused(json!({"target_modules": vec![0; 100]}));
        assert!(long.len() < 160 && long.contains('…'), "{long}");

        let refused = |json| parse(json).err().unwrap().to_string();
        assert_eq!(
            refused(json!({})),
            "`peft_type` is missing; PEFT writes \"BOFT\" or \"OFT\" there"
        );
        assert_eq!(
            refused(json!({"peft_type": "LORA"})),
            "`peft_type` is LORA, and only BOFT and OFT are supported"
        );
        assert_eq!(
            refused(json!({"peft_type": "BOFT\nor OFT"})),
            "`peft_type` is BOFT\\nor OFT, and only BOFT and OFT are supported"
        );
        assert_eq!(
            refused(json!({"peft_type": "OFT", "r": 8})),
            "`oft_block_size` is missing, so PEFT 0.13 or older wrote this OFT adapter, whose rotation is another; \
             merge it with that version, or train it anew"
        );
        assert_eq!(
            refused(
                json!({"peft_type": "OFT", "oft_block_size": 4, "num_cayley_neumann_terms": 1e12 as u64})
            ),
            "`num_cayley_neumann_terms` is 1000000000000, not a whole number from 0 to 100"
        );
    }
}
