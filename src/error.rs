//! Every error of the crate.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

use burn::tensor::DType;

pub use crate::select::PatternError;

/// One reason why an injection is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// The block size does not divide the input axis.
    #[error(
        "block size {block_size} does not divide {d_input} input features of `{path}`{}",
        would(proposals)
    )]
    BlockSize {
        /// The layer.
        path: String,
        /// The size asked for.
        block_size: usize,
        /// Length of the rotated axis.
        d_input: usize,
        /// The nearest sizes that fit.
        proposals: Vec<usize>,
    },
    /// The number of blocks does not divide the input axis.
    #[error(
        "block count {block_num} does not divide {d_input} input features of `{path}`{}",
        would(proposals)
    )]
    BlockCount {
        /// The layer.
        path: String,
        /// The count asked for.
        block_num: usize,
        /// Length of the rotated axis.
        d_input: usize,
        /// The nearest counts that fit.
        proposals: Vec<usize>,
    },
    /// Blocks are halved by the second factor on.
    #[error(
        "block size {block_size} of `{path}` is odd, and {n_butterfly_factor} factors pair half-blocks; \
         use an even block size or one factor"
    )]
    OddBlock {
        /// The layer.
        path: String,
        /// The block size.
        block_size: usize,
        /// The number of factors.
        n_butterfly_factor: usize,
    },
    /// The span of the factors does not divide the input axis.
    #[error(
        "{n_butterfly_factor} factors of block size {block_size} need a multiple of {block_size}·2^{} \
         input features, but `{path}` has {d_input}; use at most {largest} factors{}",
        n_butterfly_factor - 1,
        or_block_size(proposals)
    )]
    Factors {
        /// The layer.
        path: String,
        /// The number of factors asked for.
        n_butterfly_factor: usize,
        /// The block size.
        block_size: usize,
        /// Length of the rotated axis.
        d_input: usize,
        /// The largest number of factors that fits this block size.
        largest: usize,
        /// The nearest block sizes that fit this number of factors.
        proposals: Vec<usize>,
    },
    /// Blocks of one channel cannot rotate.
    #[error(
        "`{path}` would have blocks of one channel, which cannot rotate; choose a block size that \
         shares a divisor with its {d_input} input features, or exclude the layer"
    )]
    IdentityBlocks {
        /// The layer.
        path: String,
        /// Length of the rotated axis.
        d_input: usize,
    },
    /// No factors.
    #[error("n_butterfly_factor is 0; 1 is block-diagonal OFT, 2 and more are butterflies")]
    NoFactors,
    /// The dropout is not a share.
    #[error("dropout {dropout} is outside [0, 1)")]
    Dropout {
        /// The value given.
        dropout: f64,
    },
    /// The COFT radius is not a length.
    #[error("COFT radius {radius} is not a positive finite number; PEFT's default is 6e-5")]
    CoftRadius {
        /// The value given.
        radius: f64,
    },
    /// A polynomial without parameters.
    #[error(
        "{terms} Neumann terms leave every block at the identity; use 2 or more, PEFT's default is 5"
    )]
    NeumannTerms {
        /// The number of terms given.
        terms: usize,
    },
    /// A pattern that cannot be used.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// No targets are set.
    #[error("target_modules is not set; name the layers to adapt, or use \"all-linear\"")]
    NoTargetSetting,
    /// Nothing matches.
    #[error(
        "target_modules {targets} match none of the {layers} linear and convolution layers{}{}",
        excluded_count(excluded),
        nearest_names(nearest)
    )]
    NoTarget {
        /// The setting, as given.
        targets: String,
        /// How many layers could carry an adapter.
        layers: usize,
        /// How many of them `exclude_modules` or `modules_to_save` took out.
        excluded: usize,
        /// Layers with similar names.
        nearest: Vec<String>,
    },
    /// A module to save that the model does not have.
    #[error(
        "modules_to_save names `{name}`, which the model does not have{}",
        nearest_names(nearest)
    )]
    UnknownModuleToSave {
        /// The name given.
        name: String,
        /// Modules with similar names.
        nearest: Vec<String>,
    },
    /// The model carries a reparameterization already.
    #[error(
        "`{path}` already carries the reparameterization `{name}`, and Burn keeps one per parameter; \
         merge or unload it first"
    )]
    AlreadyAdapted {
        /// The parameter.
        path: String,
        /// The name of what it carries.
        name: String,
    },
    /// A quantized weight would have to be rewritten.
    #[error(
        "the weight of `{path}` is quantized ({dtype:?}), and rotating it would rewrite it; inject into \
         the float model and quantize the base afterwards, or exclude the layer"
    )]
    Quantized {
        /// The layer.
        path: String,
        /// Its precision.
        dtype: DType,
    },
}

fn would(proposals: &[usize]) -> String {
    match alternatives(proposals) {
        Some(sizes) => format!("; {sizes} would"),
        None => "; no other would".to_string(),
    }
}

fn or_block_size(proposals: &[usize]) -> String {
    alternatives(proposals).map_or(String::new(), |sizes| format!(", or block size {sizes}"))
}

fn alternatives(proposals: &[usize]) -> Option<String> {
    let sizes: Vec<_> = proposals.iter().map(usize::to_string).collect();
    (!sizes.is_empty()).then(|| sizes.join(" or "))
}

fn excluded_count(excluded: &usize) -> String {
    match excluded {
        0 => String::new(),
        n => format!(" ({n} of them are excluded by exclude_modules or modules_to_save)"),
    }
}

fn nearest_names(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; it has {}", names.join(", ")),
    }
}

/// Why [`inject`](crate::inject()) or [`plan`](crate::plan()) refuses: every misfit of the model and the settings.
///
/// `Display` has one line per misfit.
#[derive(Debug, Clone, PartialEq)]
pub struct InjectError {
    misfits: Vec<Misfit>,
}

impl InjectError {
    pub(crate) fn new(misfits: Vec<Misfit>) -> Self {
        Self { misfits }
    }

    /// What does not fit, in the model's order.
    pub fn misfits(&self) -> &[Misfit] {
        &self.misfits
    }
}

impl Display for InjectError {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, misfit) in self.misfits.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{misfit}")?;
        }
        Ok(())
    }
}

impl std::error::Error for InjectError {}

/// Why [`merge`](crate::merge()) refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is nothing to merge.
    #[error("the model carries no adapter; inject one, or use the model as it is")]
    NotAdapted,
    /// Merged weights are not finite.
    #[error(
        "merging makes weights that are not finite in {}; the base or the adapter holds NaN or infinity",
        quoted(paths)
    )]
    NotFinite {
        /// The layers.
        paths: Vec<String>,
    },
}

fn quoted(paths: &[String]) -> String {
    paths
        .iter()
        .map(|path| format!("`{path}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Why PEFT's settings are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nothing says what kind of adapter it is.
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
    /// Both a size and a count of blocks.
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
    /// OFT of PEFT 0.13 or older.
    #[error(
        "`oft_block_size` is missing, so PEFT 0.13 or older wrote this OFT adapter, whose rotation is another; \
         merge it with that version, or train it anew"
    )]
    OldOft,
}

/// Why a [`KeyMap`](crate::KeyMap) is refused, or has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyMapError {
    /// A pattern that does not compile.
    #[error("the key pattern `{pattern}` cannot be used: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// Why it is refused.
        reason: String,
    },
    /// A pattern without an answer for a path.
    #[error("the key pattern `{pattern}` has no answer for `{path}`: {reason}")]
    Undecided {
        /// The pattern as given.
        pattern: String,
        /// The module's path.
        path: String,
        /// Why there is none, such as a search that backtracks without end.
        reason: String,
    },
    /// Two modules would get one name.
    #[error("the key map gives `{first}` and `{second}` the same name, `{name}`")]
    Collision {
        /// The first path.
        first: String,
        /// The second path.
        second: String,
        /// The name of both.
        name: String,
    },
    /// What is written would not be read back.
    #[error("the key map writes `{path}` as `{written}`, and reads that as `{read}`")]
    OneWay {
        /// The path in the model.
        path: String,
        /// Its name in the file.
        written: String,
        /// What that name is read as.
        read: String,
    },
}

/// Everything that keeps tensors and a model apart. `Display` has one line per entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// What should be there and is not.
    pub missing: Vec<String>,
    /// What is there and has no place, with the reason.
    pub unexpected: Vec<String>,
    /// What is there and cannot be used, with the reason.
    pub wrong: Vec<String>,
}

impl Mismatch {
    /// Whether nothing is amiss.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong.is_empty()
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let lines = [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("wrong", &self.wrong),
        ];
        let lines = lines
            .into_iter()
            .flat_map(|(what, entries)| entries.iter().map(move |entry| (what, entry)));
        for (index, (what, entry)) in lines.enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{what}: {entry}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mismatch {}

/// Why [`Adapter::load`](crate::Adapter::load) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder has tensors in Python's pickle format only.
    #[error(
        "{} has adapter_model.bin and no adapter_model.safetensors; pickles run code, so load it in PEFT and \
         save it there as safetensors",
        folder.display()
    )]
    Pickle {
        /// The folder.
        folder: PathBuf,
    },
    /// The name of an adapter is not a folder's name.
    #[error("{0}")]
    Name(#[from] NameError),
    /// The settings are not JSON.
    #[error("{} is not a JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The settings are refused.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        reason: ConfigError,
    },
    /// The tensors are not safetensors.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file changed each time it was read.
    #[error("{} is being written; load it again when that is done", folder.display())]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// Tensors are missing, unexpected or wrong.
    #[error("{}: {mismatch}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Which tensors, and why.
        #[source]
        mismatch: Mismatch,
    },
}

/// The name of an adapter is not a folder's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` cannot name an adapter: it must be the name of one folder, without `.` and separators"
)]
pub struct NameError {
    /// The name given.
    pub name: String,
}

/// Why [`Adapter::save`](crate::Adapter::save) refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// A file cannot be written. What was there before is untouched.
    #[error("{} cannot be written: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name of an adapter is not a folder's name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
    /// The settings could not be read back.
    #[error("the settings cannot be written: {0}")]
    Config(#[from] ConfigError),
    /// PEFT's file has no place for it.
    #[error("PEFT's format cannot hold `{path}`: {reason}")]
    Unrepresentable {
        /// The layer.
        path: String,
        /// Why.
        reason: String,
    },
}

/// Why [`Adapter::extract`](crate::Adapter::extract) refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// There is nothing to extract.
    #[error("the model carries no adapter; inject one first")]
    NotAdapted,
    /// The configuration is not the one that the model was adapted with.
    #[error("`{path}` was adapted with {found}, but the configuration says {expected}")]
    Settings {
        /// The layer.
        path: String,
        /// What the model has.
        found: String,
        /// What the configuration says.
        expected: String,
    },
    /// Parameters that are trained and are not part of the adapter.
    #[error(
        "{} would be left behind, being trained while the configuration keeps neither their biases nor their modules; \
         name those in modules_to_save, or freeze them",
        quoted(paths)
    )]
    LeftBehind {
        /// The parameters.
        paths: Vec<String>,
    },
    /// A tensor that cannot be kept.
    #[error("`{path}` is {dtype:?}, and an adapter keeps float numbers only")]
    DType {
        /// The parameter.
        path: String,
        /// Its precision.
        dtype: DType,
    },
}

/// Why [`Adapter::attach`](crate::Adapter::attach) refuses. The model passed in is unchanged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The adapter and the model do not fit.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The settings do not work in any model, or the model cannot be adapted.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Names cannot be mapped.
    #[error(transparent)]
    KeyMap(#[from] KeyMapError),
}
