//! What a configuration means, decided once: [`Method`] for every layer, [`Rotation`] for one.
//!
//! This is the only file that asks whether a configuration is BOFT or OFT. Everything after it, from the dry run to
//! the files, reads a [`Method`] or a [`Rotation`].

use std::fmt::{self, Display, Formatter};

use burn::tensor::{DType, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution as _, Normal};
use serde::{Deserialize, Serialize};

use crate::config::{
    AdapterConfig, Block, BoftConfig, Cayley, Init, LayerKind, OftConfig, Selection,
};
use crate::ops::{self, Blocks};

/// Why a configuration cannot rotate a layer, or any layer at all.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{BoftConfig, plan};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(100, 10).init(&device);
/// let config = BoftConfig::new().with_block_size(12).with_target_modules("all-linear");
/// let error = plan(&layer, config).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "block size 12 does not divide 100 input features of the model itself; 10 or 20 would"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The block size does not divide the rotated axis.
    #[error(
        "block size {block_size} does not divide {d_input} input features of {}{}",
        named(path),
        would(proposals)
    )]
    BlockSize {
        /// The layer.
        path: String,
        /// The size that the configuration asks for.
        block_size: usize,
        /// Length of the rotated axis.
        d_input: usize,
        /// The nearest sizes that fit: at most one smaller and one larger.
        proposals: Vec<usize>,
    },
    /// The number of blocks does not divide the rotated axis.
    #[error(
        "block count {block_num} does not divide {d_input} input features of {}{}",
        named(path),
        would(proposals)
    )]
    BlockCount {
        /// The layer.
        path: String,
        /// The number of blocks that the configuration asks for.
        block_num: usize,
        /// Length of the rotated axis.
        d_input: usize,
        /// The nearest numbers of blocks that fit: at most one smaller and one larger.
        proposals: Vec<usize>,
    },
    /// The second and every later factor pairs halves of blocks, and a block of odd size has no halves.
    #[error(
        "block size {block_size} of {} is odd, and {n_butterfly_factor} factors pair half-blocks; \
         use an even block size or one factor",
        named(path)
    )]
    OddBlock {
        /// The layer.
        path: String,
        /// The block size.
        block_size: usize,
        /// The number of factors.
        n_butterfly_factor: usize,
    },
    /// The span, the `b·2^(m−1)` channels that the factors mix, does not divide the rotated axis.
    #[error(
        "{n_butterfly_factor} factors of block size {block_size} need a multiple of {block_size}·2^{} \
         input features, but {} has {d_input}; use at most {}{}",
        n_butterfly_factor - 1,
        named(path),
        factors(*largest),
        or_block_size(proposals)
    )]
    Factors {
        /// The layer.
        path: String,
        /// The number of factors that the configuration asks for.
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
    /// The blocks would have one channel each. The only rotation of one channel is the identity.
    #[error(
        "{} would have blocks of one channel, which cannot rotate; choose a block size that \
         shares a divisor with its {d_input} input features, or exclude the layer",
        named(path)
    )]
    IdentityBlocks {
        /// The layer.
        path: String,
        /// Length of the rotated axis.
        d_input: usize,
    },
    /// The configuration asks for blocks of 0 channels, or for 0 blocks.
    #[error("the block {setting} is 0; set a block size or a block count of at least 1")]
    NoBlocks {
        /// Which of the two is 0: `size` or `count`.
        setting: &'static str,
    },
    /// The configuration asks for 0 factors.
    #[error("n_butterfly_factor is 0; 1 is block-diagonal OFT, 2 and more are butterflies")]
    NoFactors,
    /// The dropout is not a share in `[0, 1)`.
    #[error("dropout {dropout} is outside [0, 1)")]
    Dropout {
        /// The value given.
        dropout: f64,
    },
    /// The COFT radius is not a positive, finite number.
    #[error("COFT radius {radius} is not a positive finite number; PEFT's default is 6e-5")]
    CoftRadius {
        /// The value given.
        radius: f64,
    },
    /// The Neumann polynomial has too few terms to depend on the skew.
    #[error(
        "{terms} Neumann terms leave every block at the identity; use 2 or more, PEFT's default is 5"
    )]
    NeumannTerms {
        /// The number of terms given.
        terms: usize,
    },
}

impl RotationError {
    /// The path of the layer that the error is about; none if the configuration works in no layer.
    pub(crate) fn path_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::BlockSize { path, .. }
            | Self::BlockCount { path, .. }
            | Self::OddBlock { path, .. }
            | Self::Factors { path, .. }
            | Self::IdentityBlocks { path, .. } => Some(path),
            Self::NoBlocks { .. }
            | Self::NoFactors
            | Self::Dropout { .. }
            | Self::CoftRadius { .. }
            | Self::NeumannTerms { .. } => None,
        }
    }
}

/// How a message names the layer at a path. The path of a model that is itself a layer is empty.
pub(crate) fn named(path: &str) -> String {
    match path {
        "" => "the model itself".to_string(),
        path => format!("`{path}`"),
    }
}

/// The end of a message: which sizes would divide the axis.
fn would(proposals: &[usize]) -> String {
    match alternatives(proposals) {
        Some(sizes) => format!("; {sizes} would"),
        None => "; no other would".to_string(),
    }
}

/// The end of a message: which block sizes would fit instead.
fn or_block_size(proposals: &[usize]) -> String {
    alternatives(proposals).map_or(String::new(), |sizes| format!(", or block size {sizes}"))
}

/// The proposals as `10 or 20`.
fn alternatives(proposals: &[usize]) -> Option<String> {
    let sizes: Vec<_> = proposals.iter().map(usize::to_string).collect();
    (!sizes.is_empty()).then(|| sizes.join(" or "))
}

/// The sizes of the rotation of one layer.
///
/// A value of this type always fits its layer: `b ≥ 2`, `m ≥ 1`, the span `b·2^(m−1)` divides `d_input`, and `b` is even
/// where `m > 1`. Deserializing checks this as well.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::{BoftConfig, plan};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(64, 32).init(&device);
/// let config = BoftConfig::new()
///     .with_block_size(4)
///     .with_n_butterfly_factor(3)
///     .with_target_modules("all-linear");
/// let sizes = plan(&layer, config)?.layers[0].butterfly;
/// assert_eq!(sizes.block_num(), 16); // 64 channels in blocks of 4
/// assert_eq!(sizes.span(), 16); // 4·2²: each factor doubles the reach
/// assert_eq!(sizes.skew_shape(), [3, 16, 6]); // a 4 × 4 block has 6 numbers above its diagonal
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedSizes")]
pub struct ButterflyPlan {
    d_input: usize,
    d_output: usize,
    block_size: usize,
    n_butterfly_factor: usize,
    block_share: bool,
}

/// The fields of a [`ButterflyPlan`] that are not checked yet.
#[derive(Deserialize)]
struct UncheckedSizes {
    d_input: usize,
    d_output: usize,
    block_size: usize,
    n_butterfly_factor: usize,
    block_share: bool,
}

impl TryFrom<UncheckedSizes> for ButterflyPlan {
    type Error = String;

    fn try_from(sizes: UncheckedSizes) -> Result<Self, String> {
        let UncheckedSizes {
            d_input,
            d_output,
            block_size: b,
            n_butterfly_factor: m,
            block_share,
        } = sizes;
        Self::new((d_input, d_output), b, m)
            .map(|sizes| sizes.with_block_share(block_share))
            .ok_or_else(|| {
                format!("{m} factors of block size {b} do not rotate {d_input} input features")
            })
    }
}

impl ButterflyPlan {
    /// The sizes of `m` factors of `b × b` blocks for a `[d_input, d_output]` weight; none if they do not fit it.
    pub(crate) fn new((d_input, d_output): (usize, usize), b: usize, m: usize) -> Option<Self> {
        // The count of stored numbers must not overflow either.
        let countable = || {
            let per_block = b.checked_mul(b - 1)? / 2;
            m.checked_mul(d_input / b)?.checked_mul(per_block)
        };
        (d_input > 0 && fits(d_input, b, m) && countable().is_some()).then_some(Self {
            d_input,
            d_output,
            block_size: b,
            n_butterfly_factor: m,
            block_share: false,
        })
    }

    /// Sets whether one stored block serves all blocks of a factor.
    pub(crate) fn with_block_share(self, block_share: bool) -> Self {
        Self {
            block_share,
            ..self
        }
    }

    /// The length of the rotated axis, `d`.
    pub fn d_input(&self) -> usize {
        self.d_input
    }

    /// The number of output channels, `o`.
    pub fn d_output(&self) -> usize {
        self.d_output
    }

    /// The channels per block, `b ≥ 2`.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The number of factors, `m ≥ 1`.
    pub fn n_butterfly_factor(&self) -> usize {
        self.n_butterfly_factor
    }

    /// Whether one stored block serves all blocks of a factor, as OFT's `block_share` asks for.
    pub fn block_share(&self) -> bool {
        self.block_share
    }

    /// The number of blocks per factor, `n = d/b`.
    pub fn block_num(&self) -> usize {
        self.d_input / self.block_size
    }

    /// The number of neighbouring channels that the rotation mixes among themselves, `b·2^(m−1)`.
    pub fn span(&self) -> usize {
        self.block_size << (self.n_butterfly_factor - 1)
    }

    /// The shape of the skew, the numbers that are stored: `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` where one block is
    /// shared.
    pub fn skew_shape(&self) -> [usize; 3] {
        let stored = match self.block_share {
            true => 1,
            false => self.block_num(),
        };
        [
            self.n_butterfly_factor,
            stored,
            self.block_size * (self.block_size - 1) / 2,
        ]
    }
}

/// Whether `m` factors of `b × b` blocks can rotate an axis of `d` channels: `b ≥ 2`, `b·2^(m−1)` divides `d`, and `b`
/// is even where `m > 1`.
pub(crate) fn fits(d: usize, b: usize, m: usize) -> bool {
    let shift = m.checked_sub(1).and_then(|shift| u32::try_from(shift).ok());
    let span = shift
        .and_then(|shift| 1usize.checked_shl(shift))
        .and_then(|distance| b.checked_mul(distance));
    let even = m == 1 || b.is_multiple_of(2);
    b >= 2 && even && span.is_some_and(|span| d.is_multiple_of(span))
}

/// The largest number of factors below `m` that fits an axis of `d` channels; 1 if none does.
fn largest_factors(d: usize, b: usize, m: usize) -> usize {
    // More factors than bits have a span that overflows.
    let bound = m.min(usize::BITS as usize + 1);
    (1..bound).rev().find(|&m| fits(d, b, m)).unwrap_or(1)
}

/// The nearest smaller and the nearest larger size that fit, neither above `max`.
fn neighbours(size: usize, max: usize, fits: impl Fn(usize) -> bool) -> Vec<usize> {
    let below = (1..size.min(max + 1)).rev().find(|&size| fits(size));
    let above = (size.saturating_add(1)..=max).find(|&size| fits(size));
    below.into_iter().chain(above).collect()
}

/// The size that PEFT's OFT uses instead of one that does not divide `d`: the nearest divisor, the smaller of two that
/// are equally near.
///
/// # References
///
/// `adjust_oft_parameters` in PEFT's `tuners/oft/layer.py`.
fn adjust(d: usize, size: usize) -> usize {
    if size >= d {
        return d;
    }
    let is_divisor = |size: &usize| *size > 0 && d.is_multiple_of(*size);
    let above = (size..=d).find(is_divisor).unwrap_or(d);
    let below = (1..=size).rev().find(is_divisor).unwrap_or(above);
    match size.abs_diff(below) <= above - size {
        true => below,
        false => above,
    }
}

/// Whether a configuration is BOFT or OFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Family {
    /// Sizes are taken exactly as they are, and there may be several factors and a scale.
    Boft,
    /// Sizes are adjusted to the layer, and there is one factor and no scale.
    Oft,
}

/// The ways from a skew-symmetric matrix to a block. Whoever depends on the way matches this, so that the compiler asks
/// everywhere for an answer to a new one.
enum BlockMap {
    /// The exact Cayley map.
    Cayley,
    /// A polynomial with these coefficients in its place.
    Polynomial(Vec<f64>),
}

/// What a configuration means for every layer: everything but the sizes, which depend on the layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Method {
    family: Family,
    block: Block,
    n_butterfly_factor: usize,
    block_share: bool,
    map: Cayley,
    coft_radius: Option<f64>,
    dropout: f64,
    scale: bool,
    init: Init,
    scaled_skew: bool,
}

impl Method {
    /// Reads a configuration.
    ///
    /// # Errors
    ///
    /// All [`errors`](Self::errors).
    pub(crate) fn new(config: &AdapterConfig) -> Result<Self, Vec<RotationError>> {
        let method = Self::unchecked(config);
        let errors = method.errors();
        match errors.is_empty() {
            true => Ok(method),
            false => Err(errors),
        }
    }

    /// Reads a configuration without checking it, for callers that report [`errors`](Self::errors) together with others.
    pub(crate) fn unchecked(config: &AdapterConfig) -> Self {
        match config {
            AdapterConfig::Boft(config) => Self {
                family: Family::Boft,
                block: config.block,
                n_butterfly_factor: config.n_butterfly_factor,
                block_share: false,
                map: Cayley::Exact,
                coft_radius: None,
                dropout: config.dropout,
                scale: config.scale,
                init: config.init,
                scaled_skew: config.scaled_skew,
            },
            AdapterConfig::Oft(config) => Self {
                family: Family::Oft,
                block: config.block,
                n_butterfly_factor: 1,
                block_share: config.block_share,
                map: config.cayley,
                coft_radius: config.coft_radius,
                dropout: 0.0,
                scale: false,
                init: config.init,
                scaled_skew: config.scaled_skew,
            },
        }
    }

    /// Whether the configuration has sizes that can be compared with those of layers, which zeros cannot.
    pub(crate) fn has_sizes(&self) -> bool {
        let (Block::Size(number) | Block::Count(number)) = self.block;
        number > 0 && self.n_butterfly_factor > 0
    }

    /// Every setting that works in no layer, such as a dropout of 2.
    pub(crate) fn errors(&self) -> Vec<RotationError> {
        let mut errors = Vec::new();
        match self.block {
            Block::Size(0) => errors.push(RotationError::NoBlocks { setting: "size" }),
            Block::Count(0) => errors.push(RotationError::NoBlocks { setting: "count" }),
            Block::Size(_) | Block::Count(_) => {}
        }
        if self.n_butterfly_factor == 0 {
            errors.push(RotationError::NoFactors);
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let dropout = self.dropout;
            errors.push(RotationError::Dropout { dropout });
        }
        match self.map {
            Cayley::Neumann { terms } | Cayley::Neumann016 { terms } if terms < 2 => {
                errors.push(RotationError::NeumannTerms { terms });
            }
            Cayley::Exact | Cayley::Neumann { .. } | Cayley::Neumann016 { .. } => {}
        }
        if let Some(radius) = self.coft_radius.filter(|r| !r.is_finite() || *r <= 0.0) {
            errors.push(RotationError::CoftRadius { radius });
        }
        errors
    }

    /// The configuration that this was read from, with the layers of `selection`: the inverse of [`Method::new`].
    pub(crate) fn config(&self, selection: Selection) -> AdapterConfig {
        match self.family {
            Family::Boft => BoftConfig {
                block: self.block,
                n_butterfly_factor: self.n_butterfly_factor,
                scale: self.scale,
                dropout: self.dropout,
                init: self.init,
                scaled_skew: self.scaled_skew,
                selection,
            }
            .into(),
            Family::Oft => OftConfig {
                block: self.block,
                cayley: self.map,
                coft_radius: self.coft_radius,
                block_share: self.block_share,
                init: self.init,
                scaled_skew: self.scaled_skew,
                selection,
            }
            .into(),
        }
    }

    /// Whether all blocks of a layer share their numbers.
    pub(crate) fn block_share(&self) -> bool {
        self.block_share
    }

    /// Whether the blocks of a layer share their numbers. The settings of OFT say so. Those of BOFT do not, so the
    /// tensors of the file decide, which an old version of OFT may have written.
    pub(crate) fn shares(&self, file: bool) -> bool {
        match self.family {
            Family::Boft => file,
            Family::Oft => self.block_share,
        }
    }

    /// Whether layers of this kind are adapted: BOFT leaves embeddings out, as in PEFT.
    pub(crate) fn adapts(&self, kind: LayerKind) -> bool {
        match kind {
            LayerKind::Linear | LayerKind::Conv2d => true,
            LayerKind::Embedding => self.family == Family::Oft,
        }
    }

    /// Whether blocks are orthogonal whatever their numbers are.
    pub(crate) fn is_orthogonal(&self) -> bool {
        match self.block_map() {
            BlockMap::Cayley => true,
            BlockMap::Polynomial(_) => false,
        }
    }

    /// Whether there is a COFT radius.
    pub(crate) fn is_bounded(&self) -> bool {
        self.coft_radius.is_some()
    }

    /// The method without its COFT radius.
    pub(crate) fn unbounded(&self) -> Self {
        Self {
            coft_radius: None,
            ..self.clone()
        }
    }

    /// How the numbers of a block become its matrix.
    fn block_map(&self) -> BlockMap {
        match self.map {
            Cayley::Exact => BlockMap::Cayley,
            Cayley::Neumann { terms } => BlockMap::Polynomial(ops::neumann_coefficients(terms)),
            Cayley::Neumann016 { terms } => {
                BlockMap::Polynomial(ops::neumann_016_coefficients(terms))
            }
        }
    }

    /// The number of factors.
    pub(crate) fn n_butterfly_factor(&self) -> usize {
        self.n_butterfly_factor
    }

    /// Whether an adapter of this method can have this number of factors, and a scale or none.
    pub(crate) fn allows(&self, factors: usize, scale: bool) -> bool {
        self.family == Family::Boft || (factors == 1 && !scale)
    }

    /// How many numbers PEFT stores for a layer with `m` factors of `n` stored blocks of `b` channels.
    ///
    /// PEFT's BOFT stores whole squares, and always a scale. Its OFT stores packed triangles, as this crate does.
    pub(crate) fn stored_by_peft(&self, [m, n, b]: [usize; 3], d_output: usize) -> usize {
        match self.family {
            Family::Oft => m * n * (b * (b - 1) / 2),
            Family::Boft => m * n * b * b + d_output,
        }
    }

    /// The block size that the configuration asks for on an axis of `d` channels, before any adjustment; none if its
    /// number of blocks does not divide the axis.
    fn asked_block_size(&self, d: usize) -> Option<usize> {
        match self.block {
            Block::Size(b) => Some(b),
            Block::Count(n) => (n > 0 && d.is_multiple_of(n)).then(|| d / n),
        }
    }

    /// The block size that a layer of `d` channels gets; none if the number of blocks does not divide them.
    pub(crate) fn block_size(&self, d: usize) -> Option<usize> {
        match (self.family, self.block) {
            (Family::Boft, _) => self.asked_block_size(d),
            (Family::Oft, Block::Size(b)) => Some(adjust(d, b)),
            (Family::Oft, Block::Count(n)) => Some(d / adjust(d, n).max(1)),
        }
    }

    /// The number of blocks that the configuration asks for, if it asks for one; none for 0, which is no number of blocks.
    pub(crate) fn block_num(&self) -> Option<usize> {
        match self.block {
            Block::Count(n) => Some(n).filter(|n| *n > 0),
            Block::Size(_) => None,
        }
    }

    /// The block size, if it is the same in every layer; none if it depends on the layer.
    pub(crate) fn fixed_block_size(&self) -> Option<usize> {
        match (self.family, self.block) {
            (Family::Boft, Block::Size(b)) => Some(b),
            _ => None,
        }
    }

    /// The rotation of the layer at `path`, whose weight is `[d_input, d_output]`.
    ///
    /// # Errors
    ///
    /// [`RotationError`] where the sizes do not fit the layer, with sizes that would.
    pub(crate) fn rotation(
        &self,
        path: &str,
        kind: LayerKind,
        (d, d_output): (usize, usize),
    ) -> Result<Rotation, RotationError> {
        let m = self.n_butterfly_factor;
        let Some(b) = self.block_size(d) else {
            let (Block::Size(block_num) | Block::Count(block_num)) = self.block;
            return Err(RotationError::BlockCount {
                path: path.to_string(),
                block_num,
                d_input: d,
                proposals: neighbours(block_num, d, |n| d.is_multiple_of(n) && fits(d, d / n, m)),
            });
        };
        let sizes = ButterflyPlan::new((d, d_output), b, m)
            .ok_or_else(|| misfit(path, d, b, m))?
            .with_block_share(self.block_share);
        Ok(self.with_sizes(kind, sizes, self.scale))
    }

    /// The rotation of a layer whose sizes are known, and whether it has a scale: both as a file has them.
    pub(crate) fn with_sizes(
        &self,
        kind: LayerKind,
        sizes: ButterflyPlan,
        scale: bool,
    ) -> Rotation {
        Rotation {
            kind,
            sizes,
            scale,
            method: self.clone(),
        }
    }

    /// The first setting in which two methods differ, in words: this one's, and the other's.
    ///
    /// The initial numbers are not compared, since a trained adapter no longer has them.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String)> {
        let (found, expected) = (self.facts(), other.facts());
        found
            .into_iter()
            .zip(expected)
            .find(|(found, expected)| found != expected)
    }

    /// The settings in words, the most important ones first.
    fn facts(&self) -> [String; 9] {
        let block = match self.block {
            Block::Size(b) => format!("block size {b}"),
            Block::Count(n) => format!("{n} blocks"),
        };
        let radius = match self.coft_radius {
            Some(radius) => format!("COFT radius {radius}"),
            None => "no COFT radius".to_string(),
        };
        let either = |has: bool, yes: &str, no: &str| if has { yes } else { no }.to_string();
        [
            either(self.family == Family::Boft, "BOFT", "OFT"),
            block,
            factors(self.n_butterfly_factor),
            self.map.to_string(),
            radius,
            either(self.scale, "a scale", "no scale"),
            format!("dropout {}", self.dropout),
            either(self.block_share, "shared blocks", "blocks of their own"),
            either(self.scaled_skew, "a scaled skew", "no scaled skew"),
        ]
    }
}

/// Why `m` factors of `b × b` blocks cannot rotate an axis of `d` channels.
fn misfit(path: &str, d: usize, b: usize, m: usize) -> RotationError {
    let path = path.to_string();
    let proposals = || neighbours(b, d, |b| fits(d, b, m));
    if b == 1 {
        return RotationError::IdentityBlocks { path, d_input: d };
    }
    if b == 0 || !d.is_multiple_of(b) {
        return RotationError::BlockSize {
            path,
            block_size: b,
            d_input: d,
            proposals: proposals(),
        };
    }
    if m > 1 && !b.is_multiple_of(2) {
        return RotationError::OddBlock {
            path,
            block_size: b,
            n_butterfly_factor: m,
        };
    }
    RotationError::Factors {
        path,
        n_butterfly_factor: m,
        block_size: b,
        d_input: d,
        largest: largest_factors(d, b, m),
        proposals: proposals(),
    }
}

/// A number of factors in words.
pub(crate) fn factors(m: usize) -> String {
    match m {
        1 => "1 factor".to_string(),
        m => format!("{m} factors"),
    }
}

/// What a configuration means for one layer: its kind, its sizes, whether it has a scale, and the method.
///
/// Serde keeps every number exactly; `adapter` relies on that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rotation {
    kind: LayerKind,
    sizes: ButterflyPlan,
    scale: bool,
    method: Method,
}

impl Rotation {
    /// Whether the layer is linear, a convolution or an embedding.
    pub(crate) fn kind(&self) -> LayerKind {
        self.kind
    }

    /// The sizes, which fit the layer.
    pub(crate) fn sizes(&self) -> ButterflyPlan {
        self.sizes
    }

    /// Whether a scale per output channel is trained.
    pub(crate) fn scale(&self) -> bool {
        self.scale
    }

    /// The method that the rotation was made from.
    pub(crate) fn method(&self) -> &Method {
        &self.method
    }

    /// The share of the blocks of one factor that a training step replaces by the identity.
    pub(crate) fn dropout(&self) -> f64 {
        self.method.dropout
    }

    /// The block size that the configuration asks for, if the layer got another one.
    pub(crate) fn adjusted_from(&self) -> Option<usize> {
        let d = self.sizes.d_input();
        let asked = match self.method.block {
            Block::Size(size) => size,
            Block::Count(count) => d / count.clamp(1, d),
        };
        (asked != self.sizes.block_size()).then_some(asked)
    }

    /// How many numbers are trained: those of the skew and those of the scale.
    pub(crate) fn parameters(&self) -> usize {
        let skew: usize = self.sizes.skew_shape().iter().product();
        match self.scale {
            true => skew + self.sizes.d_output(),
            false => skew,
        }
    }

    /// How many numbers PEFT stores for the same rotation.
    pub(crate) fn stored_by_peft(&self) -> usize {
        let [m, stored, _] = self.sizes.skew_shape();
        // A shared block of an old file becomes one block for each that shares it.
        let n = match self.method.block_share {
            true => stored,
            false => self.sizes.block_num(),
        };
        let sizes = [m, n, self.sizes.block_size()];
        self.method.stored_by_peft(sizes, self.sizes.d_output())
    }

    /// The numbers that the adapter of the layer at `path` starts from.
    pub(crate) fn initial(&self, path: &str) -> Values {
        let shape = self.sizes.skew_shape();
        let (skew, outputs) = (shape.iter().product(), self.sizes.d_output());
        let (skew, scale) = match self.method.init {
            Init::Identity => (vec![0.0; skew], vec![1.0; outputs]),
            Init::Random { seed } => random(seed, path, skew, outputs),
        };
        Values {
            skew: TensorData::new(skew, shape),
            scale: self.scale.then(|| TensorData::new(scale, [outputs])),
        }
    }

    /// The orthogonal blocks of a skew, within the COFT radius if there is one.
    ///
    /// PEFT rotates what an embedding looks up, `W' = W·R`, and of other layers the input, which in the same orientation is
    /// `W' = W·Rᵀ`. A skew of the opposite sign gives the transposed blocks, whether the map is the exact one or a polynomial.
    /// So the sign is the whole difference, and whoever uses the blocks needs to know nothing of it.
    ///
    /// # Shapes
    ///
    /// - skew: `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` where one block is shared
    /// - result: `[m, n, b, b]`
    pub(crate) fn blocks(&self, skew: Tensor<3>) -> Blocks {
        let skew = match self.method.coft_radius {
            // PEFT projects the parameter before each forward pass and lets the gradient through. The difference
            // of a tensor with itself is exactly zero, so the value is the projected one to the last bit.
            Some(_) => self.project(skew.clone()).detach() + (skew.clone() - skew.detach()),
            None => skew,
        };
        let skew = match self.kind {
            LayerKind::Linear | LayerKind::Conv2d => skew,
            LayerKind::Embedding => skew.neg(),
        };
        let block_size = self.sizes.block_size();
        let blocks = match self.method.block_map() {
            BlockMap::Cayley => Blocks::cayley(skew, block_size),
            BlockMap::Polynomial(coefficients) => {
                Blocks::polynomial(skew, block_size, &coefficients)
            }
        };
        match self.sizes.block_share() {
            true => blocks.share(self.sizes.block_num()),
            false => blocks,
        }
    }

    /// The largest angle, in radians, by which a block turns a plane, from the norm `‖Q‖₂` of its skew.
    ///
    /// For the exact map that is `2·atan ‖Q‖₂`.
    pub(crate) fn angle(&self, norm: f64) -> f64 {
        let coefficients = match self.method.block_map() {
            BlockMap::Cayley => return 2.0 * norm.atan(),
            BlockMap::Polynomial(coefficients) => coefficients,
        };
        // `Q` has the eigenvalue i‖Q‖₂. Its powers are real and imaginary in turns, and the polynomial is their sum.
        let (mut real, mut imaginary) = (0.0, 0.0);
        for (power, coefficient) in coefficients.into_iter().enumerate() {
            let value = coefficient * norm.powi(power as i32);
            match power % 4 {
                0 => real += value,
                1 => imaginary += value,
                2 => real -= value,
                _ => imaginary -= value,
            }
        }
        f64::atan2(imaginary, real).abs()
    }

    /// What the trained numbers are divided by to become those of `Q`; none where they are those of `Q`.
    pub(crate) fn skew_divisor(&self) -> Option<f64> {
        let is_scaled = self.method.scaled_skew;
        is_scaled.then(|| skew_divisor(self.sizes.block_size()))
    }

    /// The numbers of `Q`, of those that are trained.
    pub(crate) fn skew_of(&self, trained: Tensor<3>) -> Tensor<3> {
        match self.skew_divisor() {
            Some(divisor) => trained.div_scalar(divisor),
            None => trained,
        }
    }

    /// The same on the host, to the last bit.
    pub(crate) fn skew_numbers(&self, trained: TensorData) -> TensorData {
        match self.skew_divisor() {
            Some(divisor) => divided(&trained, divisor),
            None => trained,
        }
    }

    /// The numbers that are trained, of those of `Q`.
    pub(crate) fn trained_numbers(&self, skew: TensorData) -> TensorData {
        match self.skew_divisor() {
            Some(divisor) => multiplied(&skew, divisor),
            None => skew,
        }
    }

    /// Whether there is a COFT radius.
    pub(crate) fn is_bounded(&self) -> bool {
        self.method.is_bounded()
    }

    /// Scales every `Q` whose `‖Q‖_F` is larger than `radius / √n` back to it, for `n` stored blocks. Without a radius
    /// nothing changes.
    pub(crate) fn project(&self, skew: Tensor<3>) -> Tensor<3> {
        match self.method.coft_radius {
            Some(radius) => within(radius, skew),
            None => skew,
        }
    }

    /// The same of the numbers that are trained, which may be a multiple of those of `Q`.
    pub(crate) fn project_trained(&self, trained: Tensor<3>) -> Tensor<3> {
        match self.method.coft_radius {
            Some(radius) => within(radius * self.skew_divisor().unwrap_or(1.0), trained),
            None => trained,
        }
    }
}

/// What the trained numbers of a scaled skew are divided by, `2√(b−1)`: about the norm `‖Q‖₂` of a block whose numbers are
/// drawn with a standard deviation of one.
pub(crate) fn skew_divisor(block_size: usize) -> f64 {
    2.0 * (block_size as f64 - 1.0).sqrt()
}

/// Numbers divided by one, in their precision.
pub(crate) fn divided(data: &TensorData, divisor: f64) -> TensorData {
    let quotient = |number: f64| match data.dtype() {
        DType::F64 => number / divisor,
        _ => f64::from(number as f32 / divisor as f32),
    };
    mapped(data, quotient)
}

/// Numbers times one, rounded once.
pub(crate) fn multiplied(data: &TensorData, factor: f64) -> TensorData {
    mapped(data, |number| number * factor)
}

fn mapped(data: &TensorData, change: impl Fn(f64) -> f64) -> TensorData {
    let numbers: Vec<_> = data.iter::<f64>().map(change).collect();
    TensorData::new(numbers, data.shape().clone()).convert_dtype(data.dtype())
}

/// Scales blocks of packed numbers back to a norm of `radius / √n`, for `n` blocks.
fn within(radius: f64, numbers: Tensor<3>) -> Tensor<3> {
    let [_, stored, _] = numbers.dims();
    // The reciprocal of a number beyond these is infinite or zero in f32. No skew is anywhere near them.
    let radius = (radius / (stored as f64).sqrt()).clamp(1e-37, 1e37);
    let norm = (numbers.clone().square().sum_dim(2) * 2.0).sqrt();
    numbers * (norm.clamp_min(radius).recip() * radius)
}

impl Display for Rotation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (b, m) = (self.sizes.block_size(), self.sizes.n_butterfly_factor());
        write!(f, "b={b} m={m}, {}", self.method.map)
    }
}

/// The numbers of an adapter on the host.
pub(crate) struct Values {
    /// The strict upper triangles of `Q`, a `[m, n, b(b−1)/2]` tensor.
    pub(crate) skew: TensorData,
    /// The scale per output channel, a `[d_output]` tensor; none if no scale is trained.
    pub(crate) scale: Option<TensorData>,
}

/// A skew from `N(0, 0.1)` and a scale from `N(1, 0.1)`, which depend only on the seed and the path of the layer.
fn random(seed: u64, path: &str, skew: usize, scale: usize) -> (Vec<f64>, Vec<f64>) {
    // FNV-1a, so that layers differ, and every platform and version of Rust draws the same numbers.
    let path = path.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut random = StdRng::seed_from_u64(seed ^ path);
    let noise = Normal::new(0.0, 0.1).expect("0.1 is a standard deviation");
    let skew = (0..skew).map(|_| noise.sample(&mut random)).collect();
    let scale = (0..scale).map(|_| 1.0 + noise.sample(&mut random));
    (skew, scale.collect())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tolerance};

    use super::*;

    fn sizes(config: impl Into<AdapterConfig>, d: usize) -> Result<ButterflyPlan, RotationError> {
        let method = Method::new(&config.into()).unwrap();
        let rotation = method.rotation("layer", LayerKind::Linear, (d, 10))?;
        Ok(rotation.sizes())
    }

    #[test]
    fn oft_adjusts_sizes_as_peft_does() {
        let cases = [
            (20, 8, 10),
            (10, 32, 10),
            (768, 100, 96),
            (10, 4, 5),
            (12, 5, 4),
            (45, 32, 45),
            (147, 32, 21),
            (27, 32, 27),
            (11008, 100, 86),
            (7, 3, 1),
            (13, 6, 1),
        ];
        for (d, size, adjusted) in cases {
            assert_eq!(adjust(d, size), adjusted, "{size} for an axis of {d}");
        }
    }

    #[test]
    fn a_size_that_does_not_divide_is_refused_with_sizes_that_would() {
        let error = sizes(BoftConfig::new().with_block_size(12), 100).unwrap_err();
        assert_eq!(
            error.to_string(),
            "block size 12 does not divide 100 input features of `layer`; 10 or 20 would"
        );
    }

    #[test]
    fn boft_never_adjusts_a_size() {
        let config = BoftConfig::new().with_n_butterfly_factor(2);
        assert!(sizes(config.clone().with_block_size(4), 24).is_ok());
        let odd = sizes(config.clone().with_block_size(3), 24).unwrap_err();
        assert!(
            matches!(odd, RotationError::OddBlock { block_size: 3, .. }),
            "{odd}"
        );
        let wide = sizes(config.clone().with_block_size(8), 24).unwrap_err();
        assert!(
            matches!(wide, RotationError::Factors { largest: 1, .. }),
            "{wide}"
        );
        let count = sizes(config.clone().with_block_num(5), 24).unwrap_err();
        assert!(
            matches!(count, RotationError::BlockCount { block_num: 5, .. }),
            "{count}"
        );
        assert!(sizes(config.clone().with_block_size(1), 24).is_err());
        assert!(sizes(config.clone().with_block_num(24), 24).is_err());
    }

    #[test]
    fn blocks_of_size_or_count_zero_are_refused_with_the_settings() {
        let configs: [AdapterConfig; 4] = [
            BoftConfig::new().with_block_size(0).into(),
            BoftConfig::new().with_block_num(0).into(),
            OftConfig::new().with_block_size(0).into(),
            OftConfig::new().with_block_num(0).into(),
        ];
        for config in configs {
            let errors = Method::new(&config).unwrap_err();
            assert!(
                matches!(errors[..], [RotationError::NoBlocks { .. }]),
                "{errors:?}"
            );
        }
    }

    #[test]
    fn any_number_of_factors_gets_its_answer_at_once() {
        for m in [65, 200, 1 << 40, usize::MAX] {
            let config = BoftConfig::new().with_n_butterfly_factor(m);
            let error = sizes(config, 24).unwrap_err();
            assert!(
                matches!(error, RotationError::Factors { largest: 2, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn a_block_count_is_the_other_way_to_say_a_size() {
        let config = BoftConfig::new()
            .with_block_num(6)
            .with_n_butterfly_factor(2);
        let plan = sizes(config, 24).unwrap();
        assert_eq!(
            (plan.block_size(), plan.block_num(), plan.span()),
            (4, 6, 8)
        );
        let plan = sizes(OftConfig::new().with_block_num(7), 20).unwrap();
        assert_eq!((plan.block_size(), plan.block_num()), (4, 5));
    }

    #[test]
    fn sizes_that_do_not_fit_are_not_deserialized() {
        let plan = sizes(BoftConfig::new().with_n_butterfly_factor(2), 24).unwrap();
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<ButterflyPlan>(&json).unwrap(), plan);
        for (from, to) in [
            (r#""block_size":4"#, r#""block_size":0"#),
            (r#""block_size":4"#, r#""block_size":5"#),
            (r#""d_input":24"#, r#""d_input":20"#),
            (r#""d_input":24"#, r#""d_input":0"#),
            (r#""n_butterfly_factor":2"#, r#""n_butterfly_factor":0"#),
            (
                r#""n_butterfly_factor":2"#,
                r#""n_butterfly_factor":18446744073709551615"#,
            ),
        ] {
            let wrong = json.replace(from, to);
            assert_ne!(wrong, json);
            let error = serde_json::from_str::<ButterflyPlan>(&wrong).unwrap_err();
            assert!(error.to_string().contains("do not rotate"), "{error}");
        }
    }

    #[test]
    fn a_radius_beyond_the_range_of_f32_gives_no_nan() {
        let numbers = Tensor::<3>::from_data([[[0.0; 6], [0.5; 6]]], &Device::flex());
        for (radius, expected) in [(1e-41, 0.0), (1e39, 0.5), (f64::MIN_POSITIVE, 0.0)] {
            let found = within(radius, numbers.clone()).into_data();
            let expected = TensorData::from([[[0.0; 6], [expected; 6]]]);
            found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-30).set_relative(1e-6));
        }
    }

    #[test]
    fn a_method_gives_its_configuration_back() {
        let selection = Selection {
            modules_to_save: vec!["head".to_string()],
            ..Selection::default()
        };
        let configs: [AdapterConfig; 2] = [
            BoftConfig {
                selection: selection.clone(),
                ..BoftConfig::new()
                    .with_block_num(3)
                    .with_n_butterfly_factor(4)
                    .with_scale(false)
                    .with_dropout(0.25)
                    .with_init(Init::Random { seed: 7 })
            }
            .into(),
            OftConfig {
                selection: selection.clone(),
                ..OftConfig::new()
                    .with_block_size(6)
                    .with_cayley(Cayley::Neumann016 { terms: 4 })
                    .with_coft_radius(0.381_889_671_742_117_24)
                    .with_block_share(true)
            }
            .into(),
        ];
        for config in configs {
            let method = Method::new(&config).unwrap();
            assert_eq!(method.config(selection.clone()), config);
        }
    }
}
