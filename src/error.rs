//! Every error of the crate.

use std::fmt::{self, Display, Formatter};

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
