//! What a user writes: [`BoftConfig`], [`OftConfig`], [`AdapterConfig`] and their small enums.
//!
//! A configuration says what is wanted. Whether that fits a model is decided later, by `rotation` and `select`.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

/// How the rotated axis, of `d` channels, is cut into `n` blocks of `b` channels: `d = n·b`.
///
/// One of the two numbers is set, and the other follows from each layer. PEFT calls them `boft_block_size` and
/// `boft_block_num`, or `oft_block_size` and `r`, and writes 0 for the one that is not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Block {
    /// Channels per block, `b`. The number of blocks follows from the layer.
    Size(usize),
    /// Blocks per layer, `n`. The block size follows from the layer.
    Count(usize),
}

/// The kinds of layer that can carry an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LayerKind {
    /// A linear layer: its weight is a `[d_input, d_output]` tensor, and its input axis is rotated.
    Linear,
    /// A 2-D convolution: its weight is a `[c_out, c_in/groups, kh, kw]` tensor, and the three last axes are rotated as
    /// one of `c_in/groups·kh·kw` channels.
    Conv2d,
    /// An embedding: its weight is a `[n_embedding, d_model]` tensor, and the `d_model` numbers that it looks up are rotated.
    /// OFT adapts it and BOFT does not, as in PEFT.
    Embedding,
}

impl LayerKind {
    /// The kind of layer whose input is rotated and whose weights have this number of axes.
    pub fn of_rank(rank: usize) -> Option<Self> {
        [Self::Linear, Self::Conv2d]
            .into_iter()
            .find(|kind| kind.rank() == rank)
    }

    /// The kind in one word, for tables: `linear`, `conv2d` or `embedding`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Conv2d => "conv2d",
            Self::Embedding => "embedding",
        }
    }

    /// How many axes a weight of this kind has.
    pub(crate) fn rank(self) -> usize {
        match self {
            Self::Linear | Self::Embedding => 2,
            Self::Conv2d => 4,
        }
    }

    /// `d_input` and `d_output` of a weight of this kind: the length of the rotated axis, and what the others hold.
    ///
    /// An embedding is a linear layer whose input is the number of a token as a one among zeros, and its rows are what the
    /// rotation acts on. So its `d_input` is the length of a row.
    pub(crate) fn axes(self, shape: &[usize]) -> (usize, usize) {
        match self {
            Self::Linear => (shape[0], shape[1]),
            Self::Conv2d | Self::Embedding => (shape[1..].iter().product(), shape[0]),
        }
    }

    /// The kind with its article, for messages: `a linear layer`.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Linear => "a linear layer",
            Self::Conv2d => "a convolution",
            Self::Embedding => "an embedding",
        }
    }
}

/// Which biases are trained, in addition to the adapters.
///
/// A bias is a parameter called `bias`, or the `beta` of a normalisation layer of Burn.
/// A trained bias travels with the adapter: [`Adapter::extract`](crate::Adapter::extract) takes it along.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bias {
    /// No bias: PEFT's `"none"`.
    #[default]
    None,
    /// Every bias of the model: PEFT's `"all"`. This includes those of normalisation layers, which Burn calls `beta`.
    All,
    /// The biases of the adapted layers: PEFT's `"boft_only"` and `"oft_only"`.
    AdapterOnly,
}

/// How a skew-symmetric matrix `Q` becomes a block of the rotation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Cayley {
    /// The Cayley map, `C = (I − Q)(I + Q)⁻¹`, which is orthogonal for every `Q`.
    #[default]
    Exact,
    /// PEFT's Cayley-Neumann polynomial, for checkpoints that were trained with it.
    ///
    /// PEFT counts terms in its own way:
    ///
    /// | terms | block |
    /// |---|---|
    /// | 0, 1 | `I`, so nothing would train: [`inject`](crate::inject()) refuses it |
    /// | 2 | `I + 2Q` |
    /// | 3, 4 | `I + 2Q + 2Q² + Q³` |
    /// | t ≥ 4 | `I + 2Q + … + 2Q^(t−2) + Q^(t−1)` |
    ///
    /// # Numerics
    ///
    /// It approximates `(I + Q)(I − Q)⁻¹`, which is the *transpose* of [`Cayley::Exact`] for the same numbers. It is
    /// not orthogonal, and `max|CᵀC − I|` grows like `‖Q‖^(t−1)`. Even counts (4, 6) are closer to orthogonal than
    /// PEFT's default of 5.
    ///
    /// # References
    ///
    /// Qiu et al., *Orthogonal Finetuning Made Scalable*; PEFT's `tuners/oft/layer.py`.
    Neumann {
        /// PEFT's `num_cayley_neumann_terms`.
        terms: usize,
    },
    /// The polynomial of PEFT 0.16 and 0.17, `I + 2Q + … + 2Q^(t−1)`, for checkpoints that were trained with it.
    ///
    /// Fewer than 2 terms are `I` and are refused, as for [`Cayley::Neumann`].
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

/// The modules that a setting selects.
///
/// A string means what it means in PEFT: `"all-linear"`, in any case, is [`TargetModules::AllLinear`], and any other
/// string is a regular expression. An array or a vector is a list of names.
///
/// # Examples
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
    /// Paths of modules, in full or only their last components (`query`, `output.dense`).
    Names(Vec<String>),
    /// A regular expression in Python's syntax that must match the whole path.
    Regex(String),
    /// Every linear layer outside [`modules_to_save`](Selection::modules_to_save).
    AllLinear,
}

impl TargetModules {
    /// A regular expression that matches these paths and no other, where a list would also select paths that end with one.
    pub(crate) fn whole_paths<'a>(paths: impl IntoIterator<Item = &'a str>) -> Self {
        let escaped = paths.into_iter().map(|path| path.replace('.', r"\."));
        Self::Regex(escaped.collect::<Vec<_>>().join("|"))
    }
}

impl Display for TargetModules {
    /// The names, the regular expression, or `all-linear`, each in backticks.
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

/// The numbers that an adapter starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Init {
    /// A skew of zeros and a scale of ones: the adapted model computes exactly what it did before.
    #[default]
    Identity,
    /// A skew drawn from `N(0, 0.1)` and a scale from `N(1, 0.1)`. The model changes, so this is for tests.
    ///
    /// The numbers depend only on the seed and the path of the layer, and not on the device.
    Random {
        /// The seed of the random numbers.
        seed: u64,
    },
}

/// Which parts of a model are adapted or trained. [`BoftConfig`] and [`OftConfig`] share these settings.
///
/// Modules are named by their dotted paths in the Burn model, such as `encoder.layer.0.query`;
/// [`candidates`](crate::candidates()) lists those of the layers that can be adapted.
///
/// # References
///
/// PEFT's `check_target_module_exists` in `tuners/tuners_utils.py`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// The layers to adapt. Default: none, which [`inject`](crate::inject()) refuses.
    pub target_modules: Option<TargetModules>,
    /// Layers that are not adapted even if `target_modules` selects them. Default: none.
    pub exclude_modules: Option<TargetModules>,
    /// The indices of the layers to adapt, such as `3` of `encoder.layer.3.query`; empty means all. They apply to
    /// names that match by their ending, and not to full paths and regular expressions. Default: empty.
    pub layers_to_transform: Vec<usize>,
    /// The names of the lists that hold the layers, such as `layer`, which say where a path with several indices has
    /// the index of its layer. Default: empty, which takes the first index.
    pub layers_pattern: Vec<String>,
    /// Modules that are trained as a whole and travel with the adapter, such as a new head. Default: empty.
    pub modules_to_save: Vec<String>,
    /// Which biases are trained, in addition to the adapters. Default: [`Bias::None`].
    pub bias: Bias,
    /// Whether a name in `target_modules` may select no layer, as in a list that is made for many models. PEFT's file
    /// has no such setting. Default: `false`, so that such a name is an error.
    pub allow_absent_targets: bool,
    /// Layers that are not what the name of their type says, by type or full path; see
    /// [`with_layer_kind`](BoftConfig::with_layer_kind). PEFT's file has no such setting, so it is written as a line of text
    /// beside the tensors. Default: empty.
    pub layer_kinds: Vec<(String, Option<LayerKind>)>,
}

impl Selection {
    /// Whether `modules_to_save` names the module at `path`, or a module that contains it.
    ///
    /// ```
    /// use burn_boft::BoftConfig;
    ///
    /// let config = BoftConfig::new().with_modules_to_save(["head"]);
    /// assert!(config.selection.saves("model.head.dense"));
    /// assert!(!config.selection.saves("lm_head")); // names are compared between dots
    /// ```
    pub fn saves(&self, path: &str) -> bool {
        // Entries are compared between dots. PEFT does so where it decides what not to adapt. But where it decides what to
        // save, it only compares endings, so that its `head` also saves `lm_head`.
        let path = format!(".{path}.");
        let mut names = self.modules_to_save.iter();
        names.any(|name| path.contains(&format!(".{name}.")))
    }
}

/// Settings of BOFT: the input of each layer is rotated by a product of `m` factors of orthogonal blocks.
///
/// A factor cuts the `d` channels into `n = d/b` groups of `b` and rotates each by a block. The groups of the first
/// factor are neighbours. Those of every further factor reach twice as far, so that `m` factors mix `b·2^(m−1)`
/// channels at little cost: a butterfly, as in the fast Fourier transform. A size that does not fit a layer is an error
/// that proposes sizes that would; see [`OftConfig`] for sizes that adjust themselves.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `block` | `Size(4)` | block size `b`, or block count `n` | divides the input axis; even when `m > 1` |
/// | `n_butterfly_factor` | `1` | factors `m`; 1 is block-diagonal OFT | ≥ 1, `b·2^(m−1)` divides the input axis |
/// | `scale` | `true` | train a number per output channel that multiplies it | |
/// | `dropout` | `0.0` | share of the blocks of one factor that a training step replaces by `I` | `[0, 1)` |
/// | `init` | `Identity` | numbers that adapters start from | |
/// | `scaled_skew` | `false` | train `2√(b−1)` times the numbers of `Q`, so that one learning rate suits every block size | |
/// | `target_modules` | none | layers to adapt | names, regex or all linear |
/// | `exclude_modules` | none | layers that are not adapted, even if targeted | names, regex or all linear |
/// | `layers_to_transform` | all | indices of the layers to adapt | |
/// | `layers_pattern` | none | names of the layer lists | needs `layers_to_transform` |
/// | `modules_to_save` | none | modules trained as a whole | names of modules of the model |
/// | `bias` | `None` | biases trained in addition | |
/// | `allow_absent_targets` | `false` | whether a name of a target may select nothing | |
/// | `layer_kinds` | none | layers that are not what the name of their type says | types or full paths |
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
    /// The size of the blocks, or their number. Default: blocks of 4 channels.
    pub block: Block,
    /// The number of butterfly factors, `m`. Default: 1.
    pub n_butterfly_factor: usize,
    /// Whether a scale per output channel is trained. Default: `true`.
    pub scale: bool,
    /// The share of the blocks of one random factor that a training step replaces by the identity. Default: 0.
    pub dropout: f64,
    /// The numbers that adapters start from. Default: [`Init::Identity`].
    pub init: Init,
    /// Whether the trained numbers are `2√(b−1)` times those of `Q`. Default: `false`.
    pub scaled_skew: bool,
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
            scaled_skew: false,
            selection: Selection::default(),
        }
    }
}

/// Settings of OFT: the input of each layer is rotated by orthogonal blocks of neighbouring channels.
///
/// This is BOFT with one factor and no scale; for a trained magnitude per output channel behind the rotation, use
/// [`BoftConfig`] with one factor. As in PEFT, a block size that does not divide the input of a layer is
/// adjusted to the nearest size that does, the smaller of two; [`plan`](crate::plan()) shows the size in force.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `block` | `Size(32)` | block size `b`, or block count `n` (PEFT's `r`) | adjusted to the layer |
/// | `cayley` | `Exact` | how `Q` becomes a block | exact, or Neumann with ≥ 2 terms |
/// | `coft_radius` | none | bound on `‖Q‖_F` of COFT, constrained OFT (PEFT's `eps`) | > 0, finite |
/// | `block_share` | `false` | whether one block rotates all groups of channels | |
/// | `init` | `Identity` | numbers that adapters start from | |
/// | `scaled_skew` | `false` | train `2√(b−1)` times the numbers of `Q`, so that one learning rate suits every block size | |
/// | `target_modules` | none | layers to adapt | names, regex or all linear |
/// | `exclude_modules` | none | layers that are not adapted, even if targeted | names, regex or all linear |
/// | `layers_to_transform` | all | indices of the layers to adapt | |
/// | `layers_pattern` | none | names of the layer lists | needs `layers_to_transform` |
/// | `modules_to_save` | none | modules trained as a whole | names of modules of the model |
/// | `bias` | `None` | biases trained in addition | |
/// | `allow_absent_targets` | `false` | whether a name of a target may select nothing | |
/// | `layer_kinds` | none | layers that are not what the name of their type says | types or full paths |
///
/// The default of PEFT is the Neumann polynomial with 5 terms. The default here is the exact map, which costs no more
/// and is orthogonal. PEFT's `module_dropout` has had no effect since version 0.16, so there is no such setting.
///
/// # Examples
///
/// ```
/// use burn_boft::{Cayley, OftConfig};
///
/// // The settings that PEFT has by default.
/// let config = OftConfig::new()
///     .with_block_size(32)
///     .with_cayley(Cayley::Neumann { terms: 5 })
///     .with_target_modules("all-linear");
/// # drop(config);
/// ```
///
/// # References
///
/// Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, NeurIPS 2023; PEFT's
/// `OFTConfig`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct OftConfig {
    /// The size of the blocks, or their number. Default: blocks of 32 channels.
    pub block: Block,
    /// How the skew-symmetric `Q` becomes an orthogonal block. Default: [`Cayley::Exact`].
    pub cayley: Cayley,
    /// The radius of COFT, which bounds every block: `‖Q‖_F ≤ radius / √n` for `n` stored blocks. Default: no bound.
    pub coft_radius: Option<f64>,
    /// Whether all blocks of a layer share their numbers. Default: `false`.
    pub block_share: bool,
    /// The numbers that adapters start from. Default: [`Init::Identity`].
    pub init: Init,
    /// Whether the trained numbers are `2√(b−1)` times those of `Q`. Default: `false`.
    pub scaled_skew: bool,
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
            scaled_skew: false,
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

            /// Sets the channels per block, `b`. This replaces a number of blocks that was set before.
            pub fn with_block_size(mut self, block_size: usize) -> Self {
                self.block = Block::Size(block_size);
                self
            }

            /// Sets the number of blocks per layer, `n`. This replaces a block size that was set before.
            pub fn with_block_num(mut self, block_num: usize) -> Self {
                self.block = Block::Count(block_num);
                self
            }

            /// Sets the numbers that adapters start from.
            pub fn with_init(mut self, init: Init) -> Self {
                self.init = init;
                self
            }

            /// Sets whether the trained numbers are `2√(b−1)` times those of `Q`.
            ///
            /// An optimizer like Adam moves every number by about the learning rate. The norm `‖Q‖₂` of a block of `b`
            /// channels then moves by up to `2√(b−1)` times that, so that larger blocks turn faster and want a smaller
            /// learning rate. With a scaled skew, one learning rate suits every block size: it is about the norm by
            /// which a step changes `Q`, and so half the angle, in radians.
            ///
            /// The rotation is the same function of `Q`, and files of PEFT hold `Q` either way. A line of text beside
            /// the tensors, which PEFT does not read, lets [`Adapter::load`](crate::Adapter::load) know that the
            /// training was scaled. OneTrainer's scaled OFT is read as such.
            ///
            /// # References
            ///
            /// `oft_scaled` of OneTrainer.
            pub fn with_scaled_skew(mut self, scaled: bool) -> Self {
                self.scaled_skew = scaled;
                self
            }

            /// Sets the layers to adapt: names, a regular expression, or `"all-linear"`; see [`TargetModules`].
            pub fn with_target_modules(mut self, modules: impl Into<TargetModules>) -> Self {
                self.selection.target_modules = Some(modules.into());
                self
            }

            /// Sets the layers that are not adapted even if `target_modules` selects them.
            pub fn with_exclude_modules(mut self, modules: impl Into<TargetModules>) -> Self {
                self.selection.exclude_modules = Some(modules.into());
                self
            }

            /// Sets the indices of the layers to adapt; see [`Selection::layers_to_transform`].
            pub fn with_layers_to_transform(
                mut self,
                layers: impl IntoIterator<Item = usize>,
            ) -> Self {
                self.selection.layers_to_transform = layers.into_iter().collect();
                self
            }

            /// Sets the names of the lists that hold the layers; see [`Selection::layers_pattern`].
            pub fn with_layers_pattern(
                mut self,
                patterns: impl IntoIterator<Item = impl Into<String>>,
            ) -> Self {
                self.selection.layers_pattern = patterns.into_iter().map(Into::into).collect();
                self
            }

            /// Sets the modules that are trained as a whole and travel with the adapter, such as a new head.
            pub fn with_modules_to_save(
                mut self,
                modules: impl IntoIterator<Item = impl Into<String>>,
            ) -> Self {
                self.selection.modules_to_save = modules.into_iter().map(Into::into).collect();
                self
            }

            /// Sets whether a name in `target_modules` may select no layer of the model.
            pub fn with_absent_targets_allowed(mut self, allowed: bool) -> Self {
                self.selection.allow_absent_targets = allowed;
                self
            }

            /// Says of which kind the layers of a type are, or the layer at a full path.
            ///
            /// Layers are recognised by the name of their type, `Linear` or `Conv2d`, and by their fields. If a struct
            /// of your own has a field `weight` that is laid out as in one of these, name its type or its path here,
            /// and it can be adapted. With `None`, layers that only look like one of these are not. In a module to save,
            /// the weight of a layer that is declared linear is written as PyTorch has it. An adapter whose file does not
            /// say this is loaded with [`LoadOptions::with_layer_kind`](crate::peft::LoadOptions::with_layer_kind).
            ///
            /// # Examples
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

            /// Sets which biases are trained, in addition to the adapters.
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
    /// Sets the number of butterfly factors, `m`.
    ///
    /// The rotation then mixes `b·2^(m−1)` channels, which must divide the input of every adapted layer.
    pub fn with_n_butterfly_factor(mut self, factors: usize) -> Self {
        self.n_butterfly_factor = factors;
        self
    }

    /// Sets whether a scale per output channel is trained: `y = (x·R·W) ⊙ s + bias`.
    pub fn with_scale(mut self, scale: bool) -> Self {
        self.scale = scale;
        self
    }

    /// Sets the multiplicative dropout, a share in `[0, 1)`.
    ///
    /// In a training step, each layer draws one of its factors and replaces `floor(dropout·n)` of that factor's blocks by
    /// the identity. Nothing is rescaled, and the rotation stays orthogonal. A share below `1/n` therefore drops nothing.
    ///
    /// # References
    ///
    /// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*; PEFT's
    /// `MultiplicativeDropoutLayer` in `tuners/boft/layer.py`.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }
}

impl OftConfig {
    /// Sets how the skew-symmetric `Q` becomes a block.
    pub fn with_cayley(mut self, cayley: Cayley) -> Self {
        self.cayley = cayley;
        self
    }

    /// Bounds the rotation as COFT, constrained OFT, does.
    ///
    /// Where `Q` is longer than the radius allows, the forward pass uses `Q` scaled back to the radius. The gradient
    /// passes through unchanged, as in PEFT. Call [`project`](crate::project()) after an optimizer step to scale the
    /// stored numbers back as well.
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

/// The settings of an adapter, of BOFT or of OFT.
///
/// Serde reads and writes this, [`BoftConfig`] and [`OftConfig`] as PEFT's `adapter_config.json`, where `peft_type`
/// tells the two apart. Settings that PEFT does not have are not written: [`BoftConfig::scale`], `scaled_skew`, the seed of
/// [`Init::Random`], and those that [`Selection`] says are not in PEFT's file.
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
    /// Settings of BOFT.
    Boft(BoftConfig),
    /// Settings of OFT.
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

    /// How the learned numbers become blocks. BOFT's map is always exact.
    pub fn cayley(&self) -> Cayley {
        match self {
            Self::Boft(_) => Cayley::Exact,
            Self::Oft(config) => config.cayley,
        }
    }

    /// The radius of COFT, which BOFT does not have.
    pub fn coft_radius(&self) -> Option<f64> {
        match self {
            Self::Boft(_) => None,
            Self::Oft(config) => config.coft_radius,
        }
    }

    /// Whether one block serves all channels of a layer, which the settings of BOFT cannot say.
    pub fn block_share(&self) -> bool {
        match self {
            Self::Boft(_) => false,
            Self::Oft(config) => config.block_share,
        }
    }

    /// Whether layers have a scale beside their rotation. Those of OFT have none.
    pub fn scale(&self) -> bool {
        match self {
            Self::Boft(config) => config.scale,
            Self::Oft(_) => false,
        }
    }

    /// Whether the trained numbers are `2√(b−1)` times those of `Q`.
    pub fn scaled_skew(&self) -> bool {
        match self {
            Self::Boft(config) => config.scaled_skew,
            Self::Oft(config) => config.scaled_skew,
        }
    }

    /// Sets whether the trained numbers are `2√(b−1)` times those of `Q`.
    pub fn set_scaled_skew(&mut self, scaled: bool) {
        match self {
            Self::Boft(config) => config.scaled_skew = scaled,
            Self::Oft(config) => config.scaled_skew = scaled,
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

/// The method in a few words, such as `OFT, exact, COFT radius 0.001`.
impl Display for AdapterConfig {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Self::Boft(_) => f.write_str("BOFT")?,
            Self::Oft(config) => {
                write!(f, "OFT, {}", config.cayley)?;
                if let Some(radius) = config.coft_radius {
                    write!(f, ", COFT radius {radius}")?;
                }
                if config.block_share {
                    f.write_str(", one block per layer")?;
                }
            }
        }
        match self.scaled_skew() {
            true => f.write_str(", scaled skew"),
            false => Ok(()),
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
            ("scaled_skew", config.scaled_skew.to_string()),
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
            ("scaled_skew", config.scaled_skew.to_string()),
        ];
        assert_table("OftConfig", head, &config.selection);
    }
}
