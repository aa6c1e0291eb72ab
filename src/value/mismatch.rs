//! [`Mismatch`]: everything that keeps tensors and a model apart.

use std::fmt::{self, Display, Formatter};

use crate::config::LayerKind;
use crate::model::{Unsupported, it_has};
use crate::rotation::{RotationError, factors};

/// Everything that keeps the tensors of a file from an adapter, or an adapter from a model.
///
/// `Display` has one line per entry, which says what it is, what is wrong with it, and what to do about it.
///
/// # Examples
///
/// ```
/// use burn::tensor::TensorData;
/// use burn_boft::value::AdapterLayer;
/// use burn_boft::value::{SizeError, Wrong};
///
/// let five = TensorData::new(vec![0.5f32; 5], [1, 1, 5]);
/// let mismatch = AdapterLayer::new("query", None, five, None).unwrap_err();
/// let [Wrong::Layer { path, reason, .. }] = &mismatch.wrong[..] else {
///     panic!("{mismatch}");
/// };
/// assert_eq!(path, "query");
/// assert_eq!(*reason, SizeError::Packed { numbers: 5 });
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Mismatch {
    /// What should be there and is not.
    pub missing: Vec<Missing>,
    /// What is there and belongs nowhere.
    pub unexpected: Vec<Unexpected>,
    /// What is there and cannot be used.
    pub wrong: Vec<Wrong>,
}

impl Mismatch {
    /// Whether everything fits.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong.is_empty()
    }

    /// Sorts what is wrong by its text.
    pub(crate) fn sort_wrong(&mut self) {
        self.wrong.sort_by_cached_key(ToString::to_string);
    }
}

impl From<Wrong> for Mismatch {
    fn from(wrong: Wrong) -> Self {
        Self {
            wrong: vec![wrong],
            ..Self::default()
        }
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let missing = self.missing.iter().map(|entry| format!("missing: {entry}"));
        let unexpected = self.unexpected.iter();
        let unexpected = unexpected.map(|entry| format!("unexpected: {entry}"));
        let wrong = self.wrong.iter().map(|entry| format!("wrong: {entry}"));
        let lines: Vec<_> = missing.chain(unexpected).chain(wrong).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for Mismatch {}

/// Something that should be there and is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// A file without any layer.
    #[error("the file holds no `{tensor}` at all")]
    AllLayers {
        /// The name of the tensor that every layer has.
        tensor: &'static str,
    },
    /// A tensor without which another one of its layer is of no use.
    #[error("`{key}`")]
    Tensor {
        /// Its key in the file.
        key: String,
    },
    /// The adapter of a layer.
    #[error("the adapter of `{path}`, which `target_modules` names")]
    Layer {
        /// The layer's path in the model.
        path: String,
    },
    /// A bias that was trained.
    #[error(
        "`{path}`, a bias that the configuration trains; PEFT 0.20 and older trained some and did not save them"
    )]
    Bias {
        /// Its path in the model.
        path: String,
    },
    /// A part of a module to save.
    #[error("`{path}`, a part of a module to save")]
    Saved {
        /// Its path in the model.
        path: String,
    },
}

/// Something that is there and belongs nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unexpected {
    /// A key that is not one of an adapter.
    #[error("`{key}`: keys of an adapter start with `{prefix}`")]
    Prefix {
        /// The key in the file.
        key: String,
        /// How it would start.
        prefix: &'static str,
    },
    /// Whole numbers where floats are kept.
    #[error("`{key}`: it holds integers")]
    Integers {
        /// The key in the file.
        key: String,
    },
    /// A tensor of a file that is not PEFT's, which belongs to no layer that the file has.
    #[error("`{key}`: it is no part of a layer of OFT or BOFT")]
    NoLayer {
        /// The key in the file.
        key: String,
    },
    /// A tensor of the other method.
    #[error("`{key}`: {found} tensor in {expected} adapter")]
    Method {
        /// The key in the file.
        key: String,
        /// The method of the tensor, with its article.
        found: &'static str,
        /// The method of the settings, with its article.
        expected: &'static str,
    },
    /// A rotation of an embedding, beside one of a linear layer or convolution for the same module.
    #[error("`{key}`: a second rotation of a module, as of an embedding")]
    SecondRotation {
        /// The key in the file.
        key: String,
    },
    /// A bias that the settings do not train.
    #[error("`{key}`: the bias of an adapted layer, where the configuration trains none")]
    Bias {
        /// The key in the file.
        key: String,
    },
    /// A weight of the base model.
    #[error("`{key}`: a base weight; only adapters and biases are read")]
    BaseWeight {
        /// The key in the file.
        key: String,
    },
    /// A tensor that nothing in the settings asks for.
    #[error("`{key}`: neither an adapter, nor a trained bias, nor part of a module to save")]
    Unclaimed {
        /// The key in the file.
        key: String,
    },
    /// The adapter of a layer that the model does not have.
    #[error(
        "an adapter of `{path}`, where the model has no layer that can carry it{}{}",
        reason.as_ref().map_or(String::new(), |reason| format!(", {reason}")),
        it_has(nearest)
    )]
    Layer {
        /// The layer's path.
        path: String,
        /// Why what the model has there cannot be adapted.
        reason: Option<Unsupported>,
        /// Layers of the model with similar names, each in backticks.
        nearest: Vec<String>,
    },
    /// A tensor that the model has no parameter for.
    #[error("`{path}`, which the model has no parameter for")]
    Parameter {
        /// Its path, with PyTorch's name of the tensor.
        path: String,
    },
}

/// Something that is there and cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Wrong {
    /// A tensor of a precision that is not read.
    #[error("`{key}` is {dtype}; f64, f32, f16 and bf16 are read")]
    Precision {
        /// The key in the file.
        key: String,
        /// Its precision.
        dtype: String,
    },
    /// A tensor of sizes that it cannot have.
    #[error("`{key}` is {shape:?}: {reason}")]
    Tensor {
        /// The key in the file.
        key: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Why no adapter has it.
        reason: SizeError,
    },
    /// A rotation of PEFT 0.13 or older.
    #[error(
        "`{key}` without `oft_s`: PEFT 0.13 or older wrote it, whose rotation is another; merge it with that version, or \
         train it anew"
    )]
    OldRotation {
        /// The key of the rotation.
        key: String,
    },
    /// Rotations of different versions of PEFT in one file.
    #[error("`{key}` beside layers of PEFT 0.14 to 0.15.2")]
    MixedVersions {
        /// The key of the newer one.
        key: String,
    },
    /// Numbers of a layer that make no rotation.
    #[error("the adapter of `{path}` has numbers {shape:?} {dtype}: {reason}")]
    Layer {
        /// The layer's path.
        path: String,
        /// The shape of the numbers.
        shape: Vec<usize>,
        /// Their precision.
        dtype: &'static str,
        /// Why no adapter has them.
        reason: SizeError,
    },
    /// A layer that OFT's settings do not allow.
    #[error(
        "the adapter of `{path}` has a scale, several factors or blocks that are not shared, and the settings say OFT \
         without"
    )]
    NotOft {
        /// The layer's path.
        path: String,
    },
    /// Settings that give no layer a rotation.
    #[error("the settings: {0}")]
    Rotation(#[from] RotationError),
    /// A tensor of a precision that no file keeps.
    #[error("`{path}` is {dtype}, which no file keeps")]
    Kept {
        /// Its path.
        path: String,
        /// Its precision.
        dtype: &'static str,
    },
    /// A bias of another size than its layer.
    #[error("the bias of `{path}` is {shape:?}, where its adapter has {d_output} outputs")]
    Bias {
        /// The layer's path.
        path: String,
        /// The shape of the bias.
        shape: Vec<usize>,
        /// The outputs that the adapter scales.
        d_output: usize,
    },
    /// A layer that the model fuses and of which the file lacks parts.
    #[error(
        "`{path}` is one layer in the model and {parts} in the file, which has nothing for {}",
        quoted(absent, ", ")
    )]
    AbsentParts {
        /// The path of the whole.
        path: String,
        /// How many parts there are.
        parts: usize,
        /// The paths of those that are absent, in the file's names.
        absent: Vec<String>,
    },
    /// A layer that the model fuses and whose parts do not join.
    #[error(
        "{} are one layer in the model, `{path}`, {reason}",
        quoted(parts, " and ")
    )]
    Parts {
        /// The path of the whole.
        path: String,
        /// The paths of the parts, in the file's names.
        parts: Vec<String>,
        /// Why they do not join.
        reason: PartsError,
    },
    /// An adapter that does not fit its layer.
    #[error("the adapter of `{path}`{reason}")]
    Fit {
        /// The layer's path.
        path: String,
        /// Why it does not fit.
        reason: FitError,
    },
    /// A saved tensor of another shape than the model's.
    #[error("`{path}` is {model:?} in the model, {file:?} in the file")]
    Parameter {
        /// Its path in the model.
        path: String,
        /// Its shape in the model, as Burn has it.
        model: Vec<usize>,
        /// Its shape in the file, as PyTorch has it.
        file: Vec<usize>,
    },
    /// A copy of a tensor of the base that differs from the model's.
    #[error(
        "`{path}` has other numbers in the model than in the copy that the file keeps of the base; use the model that the \
         adapter was trained on"
    )]
    Copy {
        /// Its path in the model.
        path: String,
    },
    /// A saved tensor for a parameter that is quantized.
    #[error("`{path}` is quantized and would have to be rewritten")]
    Quantized {
        /// Its path in the model.
        path: String,
    },
}

fn quoted(names: &[String], separator: &str) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(separator)
}

/// Why numbers make no rotation or no scale.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// Another number of axes.
    #[error("{expected}")]
    Axes {
        /// The axes that there should be.
        expected: &'static str,
    },
    /// Whole numbers.
    #[error("an adapter computes with floats")]
    NotFloat,
    /// No block has so many numbers.
    #[error("no block has {numbers} numbers, b(b−1)/2")]
    Packed {
        /// The numbers per block that there are.
        numbers: usize,
    },
    /// Blocks that are not squares, or none at all.
    #[error("{expected}")]
    Squares {
        /// What there should be.
        expected: &'static str,
    },
    /// Another number of blocks than the settings say.
    #[error("{expected} expected, {found} found")]
    Blocks {
        /// What there should be.
        expected: &'static str,
        /// How many there are.
        found: usize,
    },
    /// Factors, blocks and their size that do not go together.
    #[error(
        "{} of block size {block_size} and {block_num} blocks do not fit",
        factors(*n_butterfly_factor)
    )]
    Factors {
        /// Factors, `m`.
        n_butterfly_factor: usize,
        /// Blocks per factor, `n`.
        block_num: usize,
        /// Channels per block, `b`.
        block_size: usize,
    },
    /// More channels than any layer has.
    #[error("no layer has {block_num} blocks of {block_size} channels")]
    Width {
        /// Blocks per factor, `n`.
        block_num: usize,
        /// Channels per block, `b`.
        block_size: usize,
    },
    /// A scale for other outputs than those that are rotated.
    #[error("the blocks rotate {rotated} outputs")]
    Outputs {
        /// The outputs that the blocks rotate.
        rotated: usize,
    },
    /// The radius of old COFT cannot be computed.
    #[error(
        "the radius of a shared block depends on the number of blocks, which the file does not hold"
    )]
    SharedRadius,
}

/// Why the parts of a layer that the model fuses do not join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PartsError {
    /// The parts turn differently.
    #[error(
        "and one layer has one rotation where theirs differ; merge the adapter in PEFT instead"
    )]
    Rotations,
    /// Only some of the parts have a scale.
    #[error("and only some of them have a scale, which the others would lose or gain")]
    Scales,
    /// The parts are of different precisions or shapes.
    #[error("and their shapes or precisions differ")]
    Shapes,
}

/// Why an adapter does not fit a layer.
///
/// `Display` goes on after "the adapter of `path`".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// A layer of the other kind.
    #[error(" is for {}, the model has {}", adapter.in_words(), layer.in_words())]
    Kind {
        /// The kind that the adapter is for.
        adapter: LayerKind,
        /// The kind of the layer.
        layer: LayerKind,
    },
    /// An embedding, where the adapter does not say that it is for one.
    #[error(" is for a linear layer or a convolution, the model has an embedding")]
    Embedding,
    /// A weight that is neither a matrix nor that of a convolution.
    #[error(" is for a linear layer or a convolution, and a weight of {axes} axes is neither")]
    Axes {
        /// The axes of the weight.
        axes: usize,
    },
    /// A layer with another number of inputs.
    #[error(": it rotates {adapter} input features, the layer has {layer}")]
    Inputs {
        /// The input features that the adapter rotates.
        adapter: usize,
        /// Those that the layer has.
        layer: usize,
    },
    /// A layer whose inputs the blocks do not divide.
    #[error(
        ": {} of block size {block_size} and {d_input} input features do not fit",
        factors(*n_butterfly_factor)
    )]
    Blocks {
        /// Factors, `m`.
        n_butterfly_factor: usize,
        /// Channels per block, `b`.
        block_size: usize,
        /// The input features of the layer.
        d_input: usize,
    },
    /// A layer with another number of outputs.
    #[error(": it scales {adapter} outputs, the layer has {layer}")]
    Outputs {
        /// The outputs that the adapter scales.
        adapter: usize,
        /// Those that the layer has.
        layer: usize,
    },
    /// A layer with another number of outputs than the blocks rotate.
    #[error(": it rotates {adapter} outputs, the layer has {layer}")]
    Rotated {
        /// The outputs that the adapter rotates.
        adapter: usize,
        /// Those that the layer has.
        layer: usize,
    },
    /// A rotation of the outputs, where inputs are rotated.
    #[error(
        " rotates the outputs of the layer, and only rotations of inputs are attached; merge it with the tool `burn-boft`"
    )]
    OutputAxis,
    /// Blocks that do not rotate, with a scale.
    #[error(
        ": its blocks of one channel do not rotate, and a scale alone is not attached; merge it with the tool \
         `burn-boft`, or in PEFT"
    )]
    ScaleAlone,
}
