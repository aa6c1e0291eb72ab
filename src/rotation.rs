//! What a configuration means, decided once: [`Method`] for every layer, [`Rotation`] for one.
//!
//! This is the only file that asks which kind of adapter a configuration is. Everything after it, from the dry run
//! to the files, reads a [`Rotation`].

use std::fmt::{self, Display, Formatter};

use burn::tensor::{Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution as _, Normal};
use serde::{Deserialize, Serialize};

use crate::config::{
    AdapterConfig, Block, BoftConfig, Cayley, Init, LayerKind, OftConfig, Selection,
};
use crate::ops::{self, Blocks};

/// Why a configuration gives a layer no rotation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The block size does not divide the input axis.
    #[error(
        "block size {block_size} does not divide {d_input} input features of {}{}",
        named(path),
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
        "block count {block_num} does not divide {d_input} input features of {}{}",
        named(path),
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
    /// The second and later factors pair half-blocks, which an odd block does not have.
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
    /// The span of the factors does not divide the input axis.
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
    /// The configuration asks for blocks of no channels, or for no blocks.
    #[error("the block {setting} is 0; set a block size or a block count of at least 1")]
    NoBlocks {
        /// Which of the two is 0: `size` or `count`.
        setting: &'static str,
    },
    /// The configuration asks for no factors.
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
}

impl RotationError {
    /// The layer that the error is about, unless it is about the configuration by itself.
    pub fn path(&self) -> Option<&str> {
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

/// A layer in a message.
pub(crate) fn named(path: &str) -> String {
    match path {
        "" => "the model itself".to_string(),
        path => format!("`{path}`"),
    }
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

/// The sizes of one layer's rotation. A value of this type always fits its layer.
///
/// Deserializing checks the sizes too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedSizes")]
pub struct ButterflyPlan {
    d_input: usize,
    d_output: usize,
    block_size: usize,
    n_butterfly_factor: usize,
    block_share: bool,
}

/// The fields of a [`ButterflyPlan`] before they are checked.
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
    /// `m` factors of `b × b` blocks on a `[d_input, d_output]` weight, where they fit.
    pub(crate) fn new((d_input, d_output): (usize, usize), b: usize, m: usize) -> Option<Self> {
        // The stored numbers must be countable too.
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

    /// Sets whether one stored block serves all.
    pub(crate) fn with_block_share(self, block_share: bool) -> Self {
        Self {
            block_share,
            ..self
        }
    }

    /// Length of the rotated axis, `d`.
    pub fn d_input(&self) -> usize {
        self.d_input
    }

    /// Output channels, `o`.
    pub fn d_output(&self) -> usize {
        self.d_output
    }

    /// Channels per block, `b ≥ 2`.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Factors, `m ≥ 1`.
    pub fn n_butterfly_factor(&self) -> usize {
        self.n_butterfly_factor
    }

    /// Whether one stored block serves all blocks of a factor.
    pub fn block_share(&self) -> bool {
        self.block_share
    }

    /// Blocks per factor, `n = d/b`.
    pub fn block_num(&self) -> usize {
        self.d_input / self.block_size
    }

    /// The neighbours that the rotation mixes, `b·2^(m−1)`.
    pub fn span(&self) -> usize {
        self.block_size << (self.n_butterfly_factor - 1)
    }

    /// The shape of the stored numbers, `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` with a shared block.
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

/// Whether `m` factors of `b × b` blocks rotate an axis of `d`: `b·2^(m−1)` divides `d`, and blocks are even where
/// `m > 1`.
pub(crate) fn fits(d: usize, b: usize, m: usize) -> bool {
    let shift = m.checked_sub(1).and_then(|shift| u32::try_from(shift).ok());
    let span = shift
        .and_then(|shift| 1usize.checked_shl(shift))
        .and_then(|distance| b.checked_mul(distance));
    let even = m == 1 || b.is_multiple_of(2);
    b >= 2 && even && span.is_some_and(|span| d.is_multiple_of(span))
}

/// The largest number of factors, at most `m`, that fits an axis of `d`.
fn largest_factors(d: usize, b: usize, m: usize) -> usize {
    // A span of more than all bits fits no axis.
    let bound = m.min(usize::BITS as usize + 1);
    (1..bound).rev().find(|&m| fits(d, b, m)).unwrap_or(1)
}

/// The nearest sizes below and above that fit, none larger than `max`.
fn neighbours(size: usize, max: usize, fits: impl Fn(usize) -> bool) -> Vec<usize> {
    let below = (1..size.min(max + 1)).rev().find(|&size| fits(size));
    let above = (size.saturating_add(1)..=max).find(|&size| fits(size));
    below.into_iter().chain(above).collect()
}

/// PEFT's adjustment of an OFT block size or count: the nearest divisor, the smaller on a tie.
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

/// The two families of adapter, of which a configuration is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Family {
    /// Sizes are exact, and there may be several factors and a scale.
    Boft,
    /// Sizes are adjusted to the layer; one factor and no scale.
    Oft,
}

/// What a configuration says of every layer, checked.
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
}

impl Method {
    /// Reads a configuration.
    ///
    /// # Errors
    ///
    /// Every setting that works in no layer.
    pub(crate) fn new(config: &AdapterConfig) -> Result<Self, Vec<RotationError>> {
        let method = Self::unchecked(config);
        let errors = method.errors();
        match errors.is_empty() {
            true => Ok(method),
            false => Err(errors),
        }
    }

    /// Reads a configuration whose [`errors`](Self::errors) are told together with those of the layers.
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
            },
        }
    }

    /// Whether there are sizes to compare with those of layers.
    pub(crate) fn has_sizes(&self) -> bool {
        let (Block::Size(number) | Block::Count(number)) = self.block;
        number > 0 && self.n_butterfly_factor > 0
    }

    /// Every setting that works in no layer.
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

    /// The configuration that means this: the inverse of [`Method::new`].
    pub(crate) fn config(&self, selection: Selection) -> AdapterConfig {
        match self.family {
            Family::Boft => BoftConfig {
                block: self.block,
                n_butterfly_factor: self.n_butterfly_factor,
                scale: self.scale,
                dropout: self.dropout,
                init: self.init,
                selection,
            }
            .into(),
            Family::Oft => OftConfig {
                block: self.block,
                cayley: self.map,
                coft_radius: self.coft_radius,
                block_share: self.block_share,
                init: self.init,
                selection,
            }
            .into(),
        }
    }

    /// Whether all blocks of a layer share their numbers.
    pub(crate) fn block_share(&self) -> bool {
        self.block_share
    }

    /// Whether the blocks of a layer share their numbers, given whether those of its file do: OFT's settings say it, and
    /// BOFT's leave it to the file, which may be an old OFT's.
    pub(crate) fn shares(&self, file: bool) -> bool {
        match self.family {
            Family::Boft => file,
            Family::Oft => self.block_share,
        }
    }

    /// The number of factors.
    pub(crate) fn n_butterfly_factor(&self) -> usize {
        self.n_butterfly_factor
    }

    /// Whether an adapter of this method may have so many factors, and a scale.
    pub(crate) fn allows(&self, factors: usize, scale: bool) -> bool {
        self.family == Family::Boft || (factors == 1 && !scale)
    }

    /// Numbers that PEFT stores for a layer of `m` factors of `n` stored blocks of `b` channels.
    ///
    /// PEFT's BOFT keeps full squares, and always a scale; its OFT packs as we do.
    pub(crate) fn stored_by_peft(&self, [m, n, b]: [usize; 3], d_output: usize) -> usize {
        match self.family {
            Family::Oft => m * n * (b * (b - 1) / 2),
            Family::Boft => m * n * b * b + d_output,
        }
    }

    /// The block size that the configuration asks for on an axis of `d`, before it is adjusted; none where the
    /// count does not divide the axis.
    fn asked_block_size(&self, d: usize) -> Option<usize> {
        match self.block {
            Block::Size(b) => Some(b),
            Block::Count(n) => (n > 0 && d.is_multiple_of(n)).then(|| d / n),
        }
    }

    /// The block size that the configuration means on an axis of `d`; none where it means none.
    pub(crate) fn block_size(&self, d: usize) -> Option<usize> {
        match (self.family, self.block) {
            (Family::Boft, _) => self.asked_block_size(d),
            (Family::Oft, Block::Size(b)) => Some(adjust(d, b)),
            (Family::Oft, Block::Count(n)) => Some(d / adjust(d, n).max(1)),
        }
    }

    /// The block size where it is the same for every axis.
    pub(crate) fn fixed_block_size(&self) -> Option<usize> {
        match (self.family, self.block) {
            (Family::Boft, Block::Size(b)) => Some(b),
            _ => None,
        }
    }

    /// The rotation of the layer at `path` with a `[d_input, d_output]` weight.
    ///
    /// # Errors
    ///
    /// Sizes that do not fit the layer, with those that would.
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

    /// The rotation of a layer whose sizes are known, as those of a file are, and with or without a scale.
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

    /// Where a trained adapter of this method is not one of the other; the initial values say nothing of it.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String)> {
        let (found, expected) = (self.facts(), other.facts());
        found
            .into_iter()
            .zip(expected)
            .find(|(found, expected)| found != expected)
    }

    /// The settings in words, most telling first.
    fn facts(&self) -> [String; 8] {
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
        ]
    }
}

/// Why `m` factors of `b × b` blocks do not rotate an axis of `d`.
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

/// What a configuration means for one layer: sizes, map, radius, dropout, scale.
///
/// Serde keeps every number exactly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rotation {
    kind: LayerKind,
    sizes: ButterflyPlan,
    scale: bool,
    method: Method,
}

impl Rotation {
    /// Linear or convolution.
    pub(crate) fn kind(&self) -> LayerKind {
        self.kind
    }

    /// The checked sizes.
    pub(crate) fn sizes(&self) -> ButterflyPlan {
        self.sizes
    }

    /// Whether a scale per output channel is trained.
    pub(crate) fn scale(&self) -> bool {
        self.scale
    }

    /// What it was made from.
    pub(crate) fn method(&self) -> &Method {
        &self.method
    }

    /// The share of one factor's blocks that a training step replaces by the identity.
    pub(crate) fn dropout(&self) -> f64 {
        self.method.dropout
    }

    /// The block size that the configuration asked for, where it was adjusted to the layer.
    pub(crate) fn adjusted_from(&self) -> Option<usize> {
        let d = self.sizes.d_input();
        let asked = match self.method.block {
            Block::Size(size) => size,
            Block::Count(count) => d / count.clamp(1, d),
        };
        (asked != self.sizes.block_size()).then_some(asked)
    }

    /// Trained numbers: packed skew, and scale.
    pub(crate) fn parameters(&self) -> usize {
        let skew: usize = self.sizes.skew_shape().iter().product();
        match self.scale {
            true => skew + self.sizes.d_output(),
            false => skew,
        }
    }

    /// Numbers that PEFT stores for the same rotation.
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

    /// What the adapter of the layer at `path` starts from.
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

    /// The blocks that these numbers mean.
    ///
    /// # Shapes
    ///
    /// - skew: `[m, n, b(b−1)/2]`, or `[m, 1, b(b−1)/2]` where one block is shared
    pub(crate) fn blocks(&self, skew: Tensor<3>) -> Blocks {
        let skew = match self.method.coft_radius {
            // PEFT projects the parameter before each forward pass and lets the gradient through. The difference
            // of a tensor with itself is exactly zero, so the value is the projected one to the last bit.
            Some(_) => self.project(skew.clone()).detach() + (skew.clone() - skew.detach()),
            None => skew,
        };
        let block_size = self.sizes.block_size();
        let blocks = match self.polynomial() {
            None => Blocks::cayley(skew, block_size),
            Some(coefficients) => Blocks::polynomial(skew, block_size, &coefficients),
        };
        match self.sizes.block_share() {
            true => blocks.share(self.sizes.block_num()),
            false => blocks,
        }
    }

    /// The coefficients of the polynomial that stands for the Cayley map, if one does.
    fn polynomial(&self) -> Option<Vec<f64>> {
        match self.method.map {
            Cayley::Exact => None,
            Cayley::Neumann { terms } => Some(ops::neumann_coefficients(terms)),
            Cayley::Neumann016 { terms } => Some(ops::neumann_016_coefficients(terms)),
        }
    }

    /// The angle in radians by which a block turns the plane of `‖Q‖₂`.
    pub(crate) fn angle(&self, norm: f64) -> f64 {
        let Some(coefficients) = self.polynomial() else {
            return 2.0 * norm.atan();
        };
        // The polynomial at the eigenvalue iλ: powers of i alternate between the parts.
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

    /// Whether COFT bounds the numbers.
    pub(crate) fn is_bounded(&self) -> bool {
        self.method.coft_radius.is_some()
    }

    /// Scales every `Q` with `‖Q‖_F` beyond `radius / √(stored blocks)` back to it; without a radius, nothing.
    pub(crate) fn project(&self, skew: Tensor<3>) -> Tensor<3> {
        let Some(radius) = self.method.coft_radius else {
            return skew;
        };
        let [_, stored, _] = skew.dims();
        let radius = radius / (stored as f64).sqrt();
        let norm = (skew.clone().square().sum_dim(2) * 2.0).sqrt();
        skew * (norm.clamp_min(radius).recip() * radius)
    }
}

impl Display for Rotation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (b, m) = (self.sizes.block_size(), self.sizes.n_butterfly_factor());
        write!(f, "b={b} m={m}, {}", self.method.map)
    }
}

/// The numbers of an adapter on the host.
pub(crate) struct Values {
    /// `[m, n, b(b−1)/2]`.
    pub(crate) skew: TensorData,
    /// `[d_output]`.
    pub(crate) scale: Option<TensorData>,
}

/// Skew from `N(0, 0.1)` and scale from `N(1, 0.1)`, by the seed and the layer's path alone.
fn random(seed: u64, path: &str, skew: usize, scale: usize) -> (Vec<f64>, Vec<f64>) {
    // FNV-1a, so that layers differ and no hasher of the platform takes part.
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
