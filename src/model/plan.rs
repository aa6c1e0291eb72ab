//! Checked sizes of one layer ([`ButterflyPlan`]) and the dry run of an injection ([`InjectPlan`]).

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use crate::config::{AdapterConfig, Block, BoftConfig, OftConfig};
use crate::error::Misfit;

/// The kinds of layer that carry an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LayerKind {
    /// A linear layer, weight `[d_input, d_output]`.
    Linear,
    /// A 2-D convolution, weight `[c_out, c_in/groups, kh, kw]`, rotated along `c_in/groups·kh·kw`.
    Conv2d,
}

impl LayerKind {
    /// `d_input` and `d_output` of a weight of this kind.
    pub(crate) fn axes(self, shape: &[usize]) -> (usize, usize) {
        match self {
            Self::Linear => (shape[0], shape[1]),
            Self::Conv2d => (shape[1..].iter().product(), shape[0]),
        }
    }
}

/// The sizes of one layer's rotation, checked: a value of this type always fits its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ButterflyPlan {
    /// Length of the rotated axis, `d`.
    pub d_input: usize,
    /// Output channels, `o`.
    pub d_output: usize,
    /// Channels per block, `b`.
    pub block_size: usize,
    /// Factors, `m`.
    pub n_butterfly_factor: usize,
    /// Whether one stored block serves all.
    pub block_share: bool,
}

impl ButterflyPlan {
    /// The sizes of a layer under a configuration.
    pub(crate) fn new(
        config: &AdapterConfig,
        path: &str,
        (d_input, d_output): (usize, usize),
    ) -> Result<Self, Misfit> {
        match config {
            AdapterConfig::Boft(config) => Self::boft(config, path, d_input, d_output),
            AdapterConfig::Oft(config) => Self::oft(config, path, d_input, d_output),
        }
    }

    fn boft(config: &BoftConfig, path: &str, d: usize, d_output: usize) -> Result<Self, Misfit> {
        let m = config.n_butterfly_factor;
        let fits = |b: usize| fits(d, b, m);
        let path = || path.to_string();
        let block_size = match config.block {
            Block::Size(b) => b,
            Block::Count(n) if n > 0 && d.is_multiple_of(n) => d / n,
            Block::Count(block_num) => {
                let proposals = neighbours(block_num, d, |n| d.is_multiple_of(n) && fits(d / n));
                return Err(Misfit::BlockCount {
                    path: path(),
                    block_num,
                    d_input: d,
                    proposals,
                });
            }
        };
        if block_size == 1 {
            return Err(Misfit::IdentityBlocks {
                path: path(),
                d_input: d,
            });
        }
        if block_size == 0 || !d.is_multiple_of(block_size) {
            let proposals = neighbours(block_size, d, fits);
            return Err(Misfit::BlockSize {
                path: path(),
                block_size,
                d_input: d,
                proposals,
            });
        }
        if m > 1 && !block_size.is_multiple_of(2) {
            return Err(Misfit::OddBlock {
                path: path(),
                block_size,
                n_butterfly_factor: m,
            });
        }
        if !fits(block_size) {
            return Err(Misfit::Factors {
                path: path(),
                n_butterfly_factor: m,
                block_size,
                d_input: d,
                largest: (1..m)
                    .rev()
                    .find(|&m| self::fits(d, block_size, m))
                    .unwrap_or(1),
                proposals: neighbours(block_size, d, fits),
            });
        }
        Ok(Self {
            d_input: d,
            d_output,
            block_size,
            n_butterfly_factor: m,
            block_share: false,
        })
    }

    fn oft(config: &OftConfig, path: &str, d: usize, d_output: usize) -> Result<Self, Misfit> {
        let block_size = match config.block {
            Block::Size(b) => adjust(d, b),
            Block::Count(n) => d / adjust(d, n),
        };
        if block_size < 2 {
            return Err(Misfit::IdentityBlocks {
                path: path.to_string(),
                d_input: d,
            });
        }
        Ok(Self {
            d_input: d,
            d_output,
            block_size,
            n_butterfly_factor: 1,
            block_share: config.block_share,
        })
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
        let stored = if self.block_share {
            1
        } else {
            self.block_num()
        };
        [
            self.n_butterfly_factor,
            stored,
            self.block_size * (self.block_size - 1) / 2,
        ]
    }
}

/// Whether `m` factors of `b × b` blocks rotate an axis of `d`.
pub(crate) fn fits(d: usize, b: usize, m: usize) -> bool {
    let span = u32::try_from(m - 1)
        .ok()
        .and_then(|shift| b.checked_shl(shift));
    let even = m == 1 || b.is_multiple_of(2);
    b >= 2 && even && span.is_some_and(|span| span >> (m - 1) == b && d.is_multiple_of(span))
}

/// The nearest sizes below and above that fit.
fn neighbours(size: usize, max: usize, fits: impl Fn(usize) -> bool) -> Vec<usize> {
    let below = (1..size.min(max + 1)).rev().find(|&size| fits(size));
    let above = (size + 1..=max).find(|&size| fits(size));
    below.into_iter().chain(above).collect()
}

/// PEFT's adjustment of an OFT block size or count: the nearest divisor, the smaller on a tie.
pub(crate) fn adjust(d: usize, size: usize) -> usize {
    if size >= d {
        return d;
    }
    let is_divisor = |size: &usize| *size > 0 && d.is_multiple_of(*size);
    let above = (size..=d).find(is_divisor).unwrap_or(d);
    let below = (1..=size).rev().find(is_divisor).unwrap_or(above);
    if size.abs_diff(below) <= above - size {
        below
    } else {
        above
    }
}

/// One layer of an [`InjectPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerPlan {
    /// The layer's dotted path.
    pub path: String,
    /// Linear or convolution.
    pub kind: LayerKind,
    /// Shape of the weight as Burn holds it.
    pub shape: Vec<usize>,
    /// The rotation's sizes.
    pub butterfly: ButterflyPlan,
    /// Whether a scale is trained.
    pub scale: bool,
    /// The block size that was asked for, where OFT adjusted it.
    pub adjusted_from: Option<usize>,
}

impl LayerPlan {
    /// Trained numbers of the adapter: packed skew, and scale.
    pub fn parameters(&self) -> usize {
        let skew: usize = self.butterfly.skew_shape().iter().product();
        skew + if self.scale {
            self.butterfly.d_output
        } else {
            0
        }
    }
}

/// What [`inject`](crate::inject()) would do, made by [`plan`](crate::plan()). `Display` is a table.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InjectPlan {
    /// The adapted layers, in the model's order.
    pub layers: Vec<LayerPlan>,
    /// Paths of the parameters trained beside them: biases and modules to save.
    pub trained: Vec<String>,
}

impl InjectPlan {
    /// Trained numbers of all adapters.
    pub fn parameters(&self) -> usize {
        self.layers.iter().map(LayerPlan::parameters).sum()
    }
}

impl Display for InjectPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let width = self
            .layers
            .iter()
            .map(|layer| layer.path.len())
            .max()
            .unwrap_or(0)
            .max(5);
        let shapes: Vec<_> = self
            .layers
            .iter()
            .map(|layer| format!("{:?}", layer.shape))
            .collect();
        let shape_width = shapes.iter().map(String::len).max().unwrap_or(0).max(5);
        writeln!(
            f,
            "{:width$}  {:shape_width$}  {:>5}  {:>6}  {:>7}  {:>10}",
            "layer", "shape", "block", "blocks", "factors", "parameters"
        )?;
        for (layer, shape) in self.layers.iter().zip(&shapes) {
            let ButterflyPlan {
                block_size,
                n_butterfly_factor,
                ..
            } = layer.butterfly;
            write!(
                f,
                "{:width$}  {shape:shape_width$}  {block_size:>5}  {:>6}  {n_butterfly_factor:>7}  {:>10}",
                layer.path,
                layer.butterfly.block_num(),
                layer.parameters(),
            )?;
            match layer.adjusted_from {
                Some(size) => writeln!(f, "  (block size adjusted from {size})")?,
                None => writeln!(f)?,
            }
        }
        write!(
            f,
            "{} layers, {} parameters",
            self.layers.len(),
            self.parameters()
        )?;
        match self.trained.is_empty() {
            true => Ok(()),
            false => write!(f, "; also trained: {}", self.trained.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boft(config: BoftConfig, d: usize) -> Result<ButterflyPlan, Misfit> {
        ButterflyPlan::new(&config.into(), "layer", (d, 10))
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
        let error = boft(BoftConfig::new().with_block_size(12), 100).unwrap_err();
        assert_eq!(
            error.to_string(),
            "block size 12 does not divide 100 input features of `layer`; 10 or 20 would"
        );
    }

    #[test]
    fn boft_never_adjusts() {
        let config = BoftConfig::new().with_n_butterfly_factor(2);
        assert!(boft(config.clone().with_block_size(4), 24).is_ok());
        let odd = boft(config.clone().with_block_size(3), 24).unwrap_err();
        assert!(
            matches!(odd, Misfit::OddBlock { block_size: 3, .. }),
            "{odd}"
        );
        let wide = boft(config.clone().with_block_size(8), 24).unwrap_err();
        assert!(matches!(wide, Misfit::Factors { largest: 1, .. }), "{wide}");
        let count = boft(config.clone().with_block_num(5), 24).unwrap_err();
        assert!(
            matches!(count, Misfit::BlockCount { block_num: 5, .. }),
            "{count}"
        );
        for block in [0, 1] {
            assert!(boft(config.clone().with_block_size(block), 24).is_err());
            assert!(boft(config.clone().with_block_num(block * 24), 24).is_err());
        }
        let deep = BoftConfig::new().with_n_butterfly_factor(200);
        assert!(
            boft(deep, 24).is_err(),
            "a span beyond the integers is refused, not wrapped"
        );
    }

    #[test]
    fn a_block_count_is_the_other_way_to_say_a_size() {
        let plan = boft(
            BoftConfig::new()
                .with_block_num(6)
                .with_n_butterfly_factor(2),
            24,
        )
        .unwrap();
        assert_eq!((plan.block_size, plan.block_num(), plan.span()), (4, 6, 8));
        let oft = OftConfig::new().with_block_num(7);
        let plan = ButterflyPlan::new(&oft.into(), "layer", (20, 10)).unwrap();
        assert_eq!((plan.block_size, plan.block_num()), (4, 5));
    }
}
