//! Settings: [`BoftConfig`], [`OftConfig`], [`AdapterConfig`] and their small enums.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

/// How the rotated axis is cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Block {
    /// Channels per block, `b`. The number of blocks follows from the layer.
    Size(usize),
    /// Blocks per layer, `n`. The block size follows from the layer.
    Count(usize),
}

/// The kinds of layer that carry an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayerKind {
    /// A linear layer, weight `[d_input, d_output]`.
    Linear,
    /// A 2-D convolution, weight `[c_out, c_in/groups, kh, kw]`, rotated along `c_in/groups·kh·kw`.
    Conv2d,
}

impl LayerKind {
    /// The kind whose weights have this number of axes.
    pub fn of_rank(rank: usize) -> Option<Self> {
        [Self::Linear, Self::Conv2d]
            .into_iter()
            .find(|kind| kind.rank() == rank)
    }

    /// The kind in one word, for tables: `linear` or `conv2d`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Conv2d => "conv2d",
        }
    }

    /// The number of axes of a weight of this kind.
    pub(crate) fn rank(self) -> usize {
        match self {
            Self::Linear => 2,
            Self::Conv2d => 4,
        }
    }

    /// `d_input` and `d_output` of a weight of this kind.
    pub(crate) fn axes(self, shape: &[usize]) -> (usize, usize) {
        match self {
            Self::Linear => (shape[0], shape[1]),
            Self::Conv2d => (shape[1..].iter().product(), shape[0]),
        }
    }

    /// The kind with its article, for messages: `a linear layer`.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Linear => "a linear layer",
            Self::Conv2d => "a convolution",
        }
    }
}

/// Which biases are trained beside the adapters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model, those of normalisation layers (`beta`) included.
    All,
    /// The biases of the adapted layers.
    AdapterOnly,
}

/// How a skew-symmetric matrix `Q` becomes a block of the rotation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Cayley {
    /// `C = (I − Q)(I + Q)⁻¹`, orthogonal for every `Q`.
    #[default]
    Exact,
    /// PEFT's Cayley-Neumann polynomial, for checkpoints trained with it.
    ///
    /// `terms` is PEFT's `num_cayley_neumann_terms`, counted as PEFT counts:
    ///
    /// | terms | block |
    /// |---|---|
    /// | 0, 1 | `I` (refused by [`inject`](crate::inject()): nothing would train) |
    /// | 2 | `I + 2Q` |
    /// | 3, 4 | `I + 2Q + 2Q² + Q³` |
    /// | t ≥ 4 | `I + 2Q + … + 2Q^(t−2) + Q^(t−1)` |
    ///
    /// It approximates `(I + Q)(I − Q)⁻¹`, the *transpose* of [`Cayley::Exact`] for the same numbers,
    /// and is not orthogonal: the defect grows like `‖Q‖^(t−1)`. Even counts (4, 6) are closer to
    /// orthogonal than PEFT's default of 5.
    Neumann {
        /// PEFT's `num_cayley_neumann_terms`.
        terms: usize,
    },
    /// The polynomial of PEFT 0.16 and 0.17, `I + 2Q + … + 2Q^(t−1)`, for checkpoints trained with it.
    ///
    /// Fewer than 2 terms are `I`, and refused as with [`Cayley::Neumann`].
    Neumann016 {
        /// PEFT's `num_cayley_neumann_terms`.
        terms: usize,
    },
}

impl Display for Cayley {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact => write!(f, "the exact Cayley map"),
            Self::Neumann { terms } => write!(f, "the Neumann polynomial of {terms} terms"),
            Self::Neumann016 { terms } => {
                write!(f, "the Neumann polynomial of PEFT 0.16 with {terms} terms")
            }
        }
    }
}

/// The modules that a setting names.
///
/// A string is read as PEFT reads it: `"all-linear"` (any case) is [`TargetModules::AllLinear`], any
/// other is a regular expression. A list is a list of names.
///
/// ```
/// use burn_boft::TargetModules;
///
/// assert_eq!(TargetModules::from("all-linear"), TargetModules::AllLinear);
/// assert_eq!(
///     TargetModules::from(["query", "value"]),
///     TargetModules::Names(vec!["query".into(), "value".into()]),
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetModules {
    /// Full module paths, or their last components (`query`, `output.dense`).
    Names(Vec<String>),
    /// A regular expression that must match the whole path.
    Regex(String),
    /// Every linear layer outside [`modules_to_save`](Selection::modules_to_save).
    AllLinear,
}

impl Display for TargetModules {
    /// The names, the regular expression, or `all-linear`, as a message says them.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => {
                let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
                write!(f, "{}", quoted.join(", "))
            }
            Self::Regex(pattern) => write!(f, "`{pattern}`"),
            Self::AllLinear => write!(f, "`all-linear`"),
        }
    }
}

impl From<&str> for TargetModules {
    fn from(value: &str) -> Self {
        if value.eq_ignore_ascii_case("all-linear") {
            Self::AllLinear
        } else {
            Self::Regex(value.to_string())
        }
    }
}

impl From<String> for TargetModules {
    fn from(value: String) -> Self {
        Self::from(value.as_str())
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// The values that an adapter starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Init {
    /// Zero skew and unit scale: the model computes exactly what it did before.
    #[default]
    Identity,
    /// Skew from `N(0, 0.1)` and scale from `N(1, 0.1)`, for tests: the model changes.
    ///
    /// The values depend on the seed and the layer's path only, not on the device.
    Random {
        /// Seed of the generator.
        seed: u64,
    },
}

/// What [`BoftConfig`] and [`OftConfig`] share: which parts of the model are adapted or trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// The layers to adapt. Default: none, which is an error at injection.
    pub target_modules: Option<TargetModules>,
    /// Layers left alone although targeted. Default: none.
    pub exclude_modules: Option<TargetModules>,
    /// Layer indices to adapt; empty means all. Applies to names that match by their ending. Default: empty.
    pub layers_to_transform: Vec<usize>,
    /// Names of the lists that hold the layers, for paths with several indices. Default: empty.
    pub layers_pattern: Vec<String>,
    /// Modules trained in full and kept with the adapter, such as a new head. Default: empty.
    pub modules_to_save: Vec<String>,
    /// Biases trained beside the adapters. Default: [`Bias::None`].
    pub bias: Bias,
    /// Whether names in `target_modules` may select no layer of the model, as in a list that is made for many
    /// models. Not part of PEFT's file. Default: `false`, such a name is an error.
    pub allow_absent_targets: bool,
    /// Layers that are not what their type's name says, by type or full path; see
    /// [`with_layer_kind`](BoftConfig::with_layer_kind). Not part of PEFT's file. Default: empty.
    pub layer_kinds: Vec<(String, Option<LayerKind>)>,
}

impl Selection {
    /// Whether `modules_to_save` lists the module at `path` or one that holds it.
    pub fn saves(&self, path: &str) -> bool {
        is_saved(&self.modules_to_save, path)
    }
}

/// Whether `modules_to_save` lists the module at `path` or one that holds it.
pub(crate) fn is_saved(modules_to_save: &[String], path: &str) -> bool {
    // The entries are names, bounded by dots. PEFT leaves adapters out by the same bounds, though it reads an entry
    // as a regular expression, but it wraps whatever merely ends with an entry: its `head` saves `lm_head` too.
    let path = format!(".{path}.");
    modules_to_save
        .iter()
        .any(|name| path.contains(&format!(".{name}.")))
}

/// Settings of BOFT: a butterfly of orthogonal blocks on each layer's input axis.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `block` | `Size(4)` | block size `b`, or block count `n` | divides the input axis; even when `m > 1` |
/// | `n_butterfly_factor` | `1` | factors `m`; 1 is block-diagonal OFT | ≥ 1, `b·2^(m−1)` divides the input axis |
/// | `scale` | `true` | train a factor per output channel | |
/// | `dropout` | `0.0` | share of one factor's blocks replaced by `I` in a training step | `[0, 1)` |
/// | `init` | `Identity` | initial values | |
/// | `target_modules` | none | layers to adapt | names, regex or all linear |
/// | `exclude_modules` | none | layers left alone | names, regex or all linear |
/// | `layers_to_transform` | all | layer indices to adapt | |
/// | `layers_pattern` | none | names of the layer lists | needs `layers_to_transform` |
/// | `modules_to_save` | none | modules trained in full | names present in the model |
/// | `bias` | `None` | biases trained beside | |
/// | `allow_absent_targets` | `false` | whether target names may select nothing | |
/// | `layer_kinds` | none | layers that are not what their type's name says | types or full paths |
///
/// # Examples
///
/// ```
/// use burn_boft::{Bias, BoftConfig};
///
/// let config = BoftConfig::new()
///     .with_block_size(8)
///     .with_n_butterfly_factor(2)
///     .with_target_modules(["query", "value"])
///     .with_bias(Bias::AdapterOnly);
/// assert_eq!(config.n_butterfly_factor, 2);
/// ```
///
/// # References
///
/// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, ICLR 2024;
/// PEFT's `BOFTConfig`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BoftConfig {
    /// Block size or block count.
    pub block: Block,
    /// Number of butterfly factors, `m`.
    pub n_butterfly_factor: usize,
    /// Whether a scale per output channel is trained.
    pub scale: bool,
    /// Share of the blocks of one random factor that a training step replaces by the identity.
    pub dropout: f64,
    /// Initial values.
    pub init: Init,
    /// Which parts of the model are adapted or trained.
    pub selection: Selection,
}

impl Default for BoftConfig {
    fn default() -> Self {
        Self {
            block: Block::Size(4),
            n_butterfly_factor: 1,
            scale: true,
            dropout: 0.0,
            init: Init::Identity,
            selection: Selection::default(),
        }
    }
}

/// Settings of OFT: orthogonal blocks on the diagonal of each layer's input axis.
///
/// The same engine as BOFT with one factor and no scale. As in PEFT, a block size that does not fit a
/// layer is adjusted to the nearest divisor; [`plan`](crate::plan()) shows the size in force.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `block` | `Size(32)` | block size `b`, or block count `n` (PEFT's `r`) | adjusted to the layer |
/// | `cayley` | `Exact` | how `Q` becomes a block | exact, or Neumann with ≥ 2 terms |
/// | `coft_radius` | none | bound on `‖Q‖_F` of COFT (PEFT's `eps`) | > 0, finite |
/// | `block_share` | `false` | one block shared by the whole layer | |
/// | `init` | `Identity` | initial values | |
/// | `target_modules` | none | layers to adapt | names, regex or all linear |
/// | `exclude_modules` | none | layers left alone | names, regex or all linear |
/// | `layers_to_transform` | all | layer indices to adapt | |
/// | `layers_pattern` | none | names of the layer lists | needs `layers_to_transform` |
/// | `modules_to_save` | none | modules trained in full | names present in the model |
/// | `bias` | `None` | biases trained beside | |
/// | `allow_absent_targets` | `false` | whether target names may select nothing | |
/// | `layer_kinds` | none | layers that are not what their type's name says | types or full paths |
///
/// PEFT's own default is the Neumann polynomial with 5 terms; ours is exact, which costs no more.
/// PEFT's `module_dropout` has no effect since 0.16 and is not offered.
///
/// # References
///
/// Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, NeurIPS 2023; PEFT's
/// `OFTConfig`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct OftConfig {
    /// Block size or block count.
    pub block: Block,
    /// How `Q` becomes a block.
    pub cayley: Cayley,
    /// COFT's radius: `‖Q‖_F ≤ radius / √(stored blocks)` for every block.
    pub coft_radius: Option<f64>,
    /// Whether all blocks of a layer share their numbers.
    pub block_share: bool,
    /// Initial values.
    pub init: Init,
    /// Which parts of the model are adapted or trained.
    pub selection: Selection,
}

impl Default for OftConfig {
    fn default() -> Self {
        Self {
            block: Block::Size(32),
            cayley: Cayley::Exact,
            coft_radius: None,
            block_share: false,
            init: Init::Identity,
            selection: Selection::default(),
        }
    }
}

/// The builder methods that both configurations share.
macro_rules! common_setters {
    ($config:ident) => {
        impl $config {
            /// The default settings.
            pub fn new() -> Self {
                Self::default()
            }

            /// Sets the block size `b`.
            pub fn with_block_size(mut self, block_size: usize) -> Self {
                self.block = Block::Size(block_size);
                self
            }

            /// Sets the number of blocks `n` per layer.
            pub fn with_block_num(mut self, block_num: usize) -> Self {
                self.block = Block::Count(block_num);
                self
            }

            /// Sets the initial values.
            pub fn with_init(mut self, init: Init) -> Self {
                self.init = init;
                self
            }

            /// Sets the layers to adapt.
            pub fn with_target_modules(mut self, modules: impl Into<TargetModules>) -> Self {
                self.selection.target_modules = Some(modules.into());
                self
            }

            /// Sets the layers left alone although targeted.
            pub fn with_exclude_modules(mut self, modules: impl Into<TargetModules>) -> Self {
                self.selection.exclude_modules = Some(modules.into());
                self
            }

            /// Sets the layer indices to adapt.
            pub fn with_layers_to_transform(
                mut self,
                layers: impl IntoIterator<Item = usize>,
            ) -> Self {
                self.selection.layers_to_transform = layers.into_iter().collect();
                self
            }

            /// Sets the names of the lists that hold the layers.
            pub fn with_layers_pattern(
                mut self,
                patterns: impl IntoIterator<Item = impl Into<String>>,
            ) -> Self {
                self.selection.layers_pattern = patterns.into_iter().map(Into::into).collect();
                self
            }

            /// Sets the modules trained in full.
            pub fn with_modules_to_save(
                mut self,
                modules: impl IntoIterator<Item = impl Into<String>>,
            ) -> Self {
                self.selection.modules_to_save = modules.into_iter().map(Into::into).collect();
                self
            }

            /// Sets whether names in `target_modules` may select no layer of the model.
            pub fn with_absent_targets_allowed(mut self, allowed: bool) -> Self {
                self.selection.allow_absent_targets = allowed;
                self
            }

            /// Says what the layers of a type, or the one at a full path, are.
            ///
            /// Layers are recognised by the name of their type, `Linear` or `Conv2d`, and by their fields. A struct
            /// of your own that holds its weight as one of these does, in a field called `weight`, is adapted when
            /// its type or path is named here; `None` takes out a layer that only looks like one of them.
            ///
            /// ```
            /// use burn_boft::{BoftConfig, LayerKind};
            ///
            /// let config = BoftConfig::new()
            ///     .with_target_modules(["query", "value"])
            ///     .with_layer_kind("MyLinear", LayerKind::Linear)
            ///     .with_layer_kind("decoder.output", None);
            /// # drop(config);
            /// ```
            pub fn with_layer_kind(
                mut self,
                type_or_path: impl Into<String>,
                kind: impl Into<Option<LayerKind>>,
            ) -> Self {
                let entry = (type_or_path.into(), kind.into());
                self.selection.layer_kinds.push(entry);
                self
            }

            /// Sets the biases trained beside the adapters.
            pub fn with_bias(mut self, bias: Bias) -> Self {
                self.selection.bias = bias;
                self
            }
        }
    };
}

common_setters!(BoftConfig);
common_setters!(OftConfig);

impl BoftConfig {
    /// Sets the number of butterfly factors `m`.
    pub fn with_n_butterfly_factor(mut self, factors: usize) -> Self {
        self.n_butterfly_factor = factors;
        self
    }

    /// Sets whether a scale per output channel is trained.
    pub fn with_scale(mut self, scale: bool) -> Self {
        self.scale = scale;
        self
    }

    /// Sets the multiplicative dropout.
    ///
    /// A training step draws one factor per layer and replaces `floor(dropout·n)` of its blocks, drawn
    /// uniformly, by the identity. Nothing is rescaled, and the rotation stays orthogonal.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }
}

impl OftConfig {
    /// Sets how `Q` becomes a block.
    pub fn with_cayley(mut self, cayley: Cayley) -> Self {
        self.cayley = cayley;
        self
    }

    /// Bounds the rotation as COFT does.
    ///
    /// The forward pass uses `Q` scaled back to the radius where it is longer, and the gradient passes
    /// through unchanged, as in PEFT. Call [`project`](crate::project()) after an optimizer step to scale the
    /// stored numbers back too.
    pub fn with_coft_radius(mut self, radius: f64) -> Self {
        self.coft_radius = Some(radius);
        self
    }

    /// Sets whether all blocks of a layer share their numbers.
    pub fn with_block_share(mut self, share: bool) -> Self {
        self.block_share = share;
        self
    }
}

/// The settings of either adapter.
///
/// Serde reads and writes PEFT's `adapter_config.json`, where `peft_type` tells the two apart; so it does
/// for [`BoftConfig`] and [`OftConfig`]. What PEFT has no setting for is not written:
/// [`BoftConfig::scale`], and the seed of [`Init::Random`].
///
/// # Examples
///
/// ```
/// use burn_boft::{AdapterConfig, Cayley, OftConfig};
///
/// let json = r#"{"peft_type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"],
///     "use_cayley_neumann": false}"#;
/// let config: AdapterConfig = serde_json::from_str(json)?;
/// let expected = OftConfig::new().with_block_size(8).with_target_modules(["q_proj"]);
/// assert_eq!(config, expected.into());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum AdapterConfig {
    /// BOFT.
    Boft(BoftConfig),
    /// OFT.
    Oft(OftConfig),
}

impl From<BoftConfig> for AdapterConfig {
    fn from(config: BoftConfig) -> Self {
        Self::Boft(config)
    }
}

impl From<OftConfig> for AdapterConfig {
    fn from(config: OftConfig) -> Self {
        Self::Oft(config)
    }
}

impl From<&BoftConfig> for AdapterConfig {
    fn from(config: &BoftConfig) -> Self {
        Self::Boft(config.clone())
    }
}

impl From<&OftConfig> for AdapterConfig {
    fn from(config: &OftConfig) -> Self {
        Self::Oft(config.clone())
    }
}

impl From<&AdapterConfig> for AdapterConfig {
    fn from(config: &AdapterConfig) -> Self {
        config.clone()
    }
}

impl AdapterConfig {
    /// Which parts of the model are adapted or trained.
    pub fn selection(&self) -> &Selection {
        match self {
            Self::Boft(config) => &config.selection,
            Self::Oft(config) => &config.selection,
        }
    }

    pub(crate) fn selection_mut(&mut self) -> &mut Selection {
        match self {
            Self::Boft(config) => &mut config.selection,
            Self::Oft(config) => &mut config.selection,
        }
    }

    /// Sets the factors and whether there is a scale. OFT has one factor and no scale.
    pub(crate) fn set_factors_and_scale(&mut self, factors: usize, scale: bool) {
        if let Self::Boft(config) = self {
            (config.n_butterfly_factor, config.scale) = (factors, scale);
        }
    }

    pub(crate) fn init(&self) -> Init {
        match self {
            Self::Boft(config) => config.init,
            Self::Oft(config) => config.init,
        }
    }

    /// Sets the block size or count.
    pub(crate) fn set_block(&mut self, block: Block) {
        match self {
            Self::Boft(config) => config.block = block,
            Self::Oft(config) => config.block = block,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the knob table in the documentation of a configuration: name and default.
    fn knob_table(config: &str) -> Vec<(String, String)> {
        let source = include_str!("config.rs");
        let end = source.find(&format!("pub struct {config} ")).unwrap();
        let start = source[..end].rfind("| Name | Default |").unwrap();
        source[start..end]
            .lines()
            .skip(2)
            .take_while(|line| line.starts_with("/// |"))
            .map(|line| {
                let cells: Vec<_> = line
                    .split('|')
                    .map(|c| c.trim().trim_matches('`'))
                    .collect();
                (cells[1].to_string(), cells[2].to_string())
            })
            .collect()
    }

    fn selection_defaults(selection: &Selection) -> Vec<(&'static str, String)> {
        let none = |empty: bool, word: &str| {
            if empty {
                word.into()
            } else {
                "set".to_string()
            }
        };
        vec![
            (
                "target_modules",
                none(selection.target_modules.is_none(), "none"),
            ),
            (
                "exclude_modules",
                none(selection.exclude_modules.is_none(), "none"),
            ),
            (
                "layers_to_transform",
                none(selection.layers_to_transform.is_empty(), "all"),
            ),
            (
                "layers_pattern",
                none(selection.layers_pattern.is_empty(), "none"),
            ),
            (
                "modules_to_save",
                none(selection.modules_to_save.is_empty(), "none"),
            ),
            ("bias", format!("{:?}", selection.bias)),
            (
                "allow_absent_targets",
                selection.allow_absent_targets.to_string(),
            ),
            (
                "layer_kinds",
                none(selection.layer_kinds.is_empty(), "none"),
            ),
        ]
    }

    fn assert_table(config: &str, head: Vec<(&'static str, String)>, selection: &Selection) {
        let expected: Vec<_> = head
            .into_iter()
            .chain(selection_defaults(selection))
            .map(|(name, default)| (name.to_string(), default))
            .collect();
        assert_eq!(knob_table(config), expected);
    }

    #[test]
    fn the_table_of_boft_states_the_defaults() {
        let config = BoftConfig::new();
        let head = vec![
            ("block", format!("{:?}", config.block)),
            ("n_butterfly_factor", config.n_butterfly_factor.to_string()),
            ("scale", config.scale.to_string()),
            ("dropout", format!("{:?}", config.dropout)),
            ("init", format!("{:?}", config.init)),
        ];
        assert_table("BoftConfig", head, &config.selection);
    }

    #[test]
    fn the_table_of_oft_states_the_defaults() {
        let config = OftConfig::new();
        let radius = config
            .coft_radius
            .map_or("none".to_string(), |r| r.to_string());
        let head = vec![
            ("block", format!("{:?}", config.block)),
            ("cayley", format!("{:?}", config.cayley)),
            ("coft_radius", radius),
            ("block_share", config.block_share.to_string()),
            ("init", format!("{:?}", config.init)),
        ];
        assert_table("OftConfig", head, &config.selection);
    }
}
