//! [`AdapterLayer`] and [`SavedTensor`]: the numbers of an adapter, on the host.

use burn::tensor::TensorData;

use super::mismatch::{FitError, Mismatch, SizeError, Wrong};
use crate::config::LayerKind;
use crate::ops::upper_triangle;
use crate::rotation::{ButterflyPlan, divided, fits, multiplied, skew_divisor};
use crate::tensors::{is_float, transposed, widened};

/// Which axis of a weight an adapter rotates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Axis {
    /// The inputs, as PEFT and this crate do: `W' = diag(s)·W·Rᵀ` for a `[d_output, d_input]` weight.
    #[default]
    Input,
    /// The outputs, as LyCORIS does: `W' = diag(s)·R·W` for a `[d_output, …]` weight.
    Output,
}

impl Axis {
    /// The name in messages and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
        }
    }
}

/// One adapted layer of an [`Adapter`](crate::Adapter): its rotation, and its scale where it has one.
///
/// The rotation is stored as the strict upper triangles of `Q` row by row: in a block of `b` channels, `Q[i, j]` with `i < j` is
/// number `i·b − i(i+1)/2 + j − i − 1`, and `Q[j, i] = −Q[i, j]`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterLayer {
    /// The layer's dotted path in the model.
    pub(crate) path: String,
    /// The kind of the layer, where it is known.
    pub(crate) kind: Option<LayerKind>,
    /// The axis that is rotated.
    pub(crate) axis: Axis,
    /// Channels per block, `b`. It is 1 where the skew has no numbers.
    pub(crate) block_size: usize,
    /// Whether the one stored block of each factor serves all.
    pub(crate) block_share: bool,
    /// Output channels, where they are known.
    pub(crate) d_output: Option<usize>,
    /// A `[m, n, b(b−1)/2]` tensor in f32 or f64, `n = 1` where one block is shared.
    pub(crate) skew: TensorData,
    /// A `[d_output]` tensor in the precision of the skew.
    pub(crate) scale: Option<TensorData>,
}

impl AdapterLayer {
    /// Where a record of the adapted model keeps the skew of a layer, behind the layer's path and a dot.
    pub const SKEW: &str = "weight.boft.skew";
    /// Where it keeps the trained numbers of a layer whose skew is scaled, in place of the skew.
    pub const SCALED_SKEW: &str = "weight.boft.scaled_skew";
    /// Where a record of the adapted model keeps the scale of a layer, behind the layer's path and a dot.
    pub const SCALE: &str = "weight.boft.scale";

    /// A layer of packed numbers.
    ///
    /// # Shapes
    ///
    /// - `skew`: `[m, n, b(b−1)/2]`
    /// - `scale`: `[d_output]`
    ///
    /// # Numerics
    ///
    /// Numbers narrower than f32 are widened to it, and the scale gets the precision of the skew.
    ///
    /// # Errors
    ///
    /// [`Mismatch`]: shapes that no adapter has, and numbers that are not floats.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::LayerKind;
    /// use burn_boft::value::AdapterLayer;
    ///
    /// // Two factors of six blocks of 4 channels, for 24 inputs and 3 outputs.
    /// let skew = TensorData::new(vec![0.1f32; 2 * 6 * 6], [2, 6, 6]);
    /// let scale = TensorData::new(vec![1.0f32; 3], [3]);
    /// let layer = AdapterLayer::new("query", Some(LayerKind::Linear), skew, Some(scale))?;
    /// assert_eq!((layer.block_size(), layer.n_butterfly_factor()), (4, 2));
    /// assert_eq!(layer.check_fit(&[3, 24]), Ok(LayerKind::Linear));
    /// assert_eq!(
    ///     layer.check_fit(&[3, 32]).unwrap_err().to_string(),
    ///     ": it rotates 24 input features, the layer has 32",
    /// );
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn new(
        path: impl Into<String>,
        kind: Option<LayerKind>,
        skew: TensorData,
        scale: Option<TensorData>,
    ) -> Result<Self, Mismatch> {
        let path = path.into();
        let wrong = |data: &TensorData, reason| {
            Mismatch::from(Wrong::Layer {
                path: path.clone(),
                shape: data.shape().to_vec(),
                dtype: data.dtype().name(),
                reason,
            })
        };
        for data in [Some(&skew), scale.as_ref()].into_iter().flatten() {
            if !is_float(data.dtype()) {
                return Err(wrong(data, SizeError::NotFloat));
            }
        }
        let b = sizes(skew.shape()).map_err(|reason| wrong(&skew, reason))?;
        if let Some(scale) = scale.as_ref().filter(|scale| scale.rank() != 1) {
            let expected = "a scale has one axis";
            return Err(wrong(scale, SizeError::Axes { expected }));
        }
        let dtype = widened(skew.dtype());
        Ok(Self {
            path,
            kind,
            axis: Axis::Input,
            block_size: b,
            block_share: false,
            d_output: scale.as_ref().map(TensorData::num_elements),
            skew: skew.convert_dtype(dtype),
            scale: scale.map(|scale| scale.convert_dtype(dtype)),
        })
    }

    /// A layer of the numbers that a scaled skew trains, which are `2√(b−1)` times those of `Q`.
    ///
    /// # Shapes
    ///
    /// As [`AdapterLayer::new`].
    ///
    /// # Errors
    ///
    /// As [`AdapterLayer::new`].
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::AdapterLayer;
    ///
    /// // Blocks of 5 channels, so that the numbers of `Q` are a quarter.
    /// let trained = TensorData::new(vec![0.2f32; 3 * 10], [1, 3, 10]);
    /// let layer = AdapterLayer::from_scaled_skew("query", None, trained.clone(), None)?;
    /// assert_eq!(layer.skew(), &TensorData::new(vec![0.05f32; 3 * 10], [1, 3, 10]));
    /// assert_eq!(layer.scaled_skew(), trained);
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn from_scaled_skew(
        path: impl Into<String>,
        kind: Option<LayerKind>,
        trained: TensorData,
        scale: Option<TensorData>,
    ) -> Result<Self, Mismatch> {
        let layer = Self::new(path, kind, trained, scale)?;
        let skew = divided(&layer.skew, skew_divisor(layer.block_size));
        Ok(Self { skew, ..layer })
    }

    /// The same numbers for a rotation of the outputs, `W' = diag(s)·R·W` in PyTorch's orientation.
    ///
    /// Only a merge computes it. Such a layer is not attached or saved in PEFT's format, which both rotate inputs.
    ///
    /// # Errors
    ///
    /// [`Mismatch`]: the scale does not have a number for every channel that the blocks rotate.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::LayerKind;
    /// use burn_boft::value::{AdapterLayer, FitError};
    ///
    /// let skew = TensorData::new(vec![0.1f32; 6 * 6], [1, 6, 6]);
    /// let layer = AdapterLayer::new("query", Some(LayerKind::Linear), skew, None)?.with_output_axis()?;
    /// assert_eq!((layer.d_input(), layer.d_output()), (None, Some(24)));
    /// assert_eq!(layer.check_fit(&[24, 7]), Ok(LayerKind::Linear));
    /// assert_eq!(layer.check_fit(&[32, 7]), Err(FitError::Rotated { adapter: 24, layer: 32 }));
    /// # Ok::<(), burn_boft::value::Mismatch>(())
    /// ```
    pub fn with_output_axis(mut self) -> Result<Self, Mismatch> {
        let d = self.skew.shape()[1].saturating_mul(self.block_size);
        if let Some(scale) = self.scale.as_ref().filter(|_| self.d_output != Some(d)) {
            return Err(Wrong::Layer {
                path: self.path,
                shape: scale.shape().to_vec(),
                dtype: scale.dtype().name(),
                reason: SizeError::Outputs { rotated: d },
            }
            .into());
        }
        (self.axis, self.d_output) = (Axis::Output, Some(d));
        Ok(self)
    }

    /// The layer's dotted path in the model.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The kind of the layer, where the file tells: OFT's does not tell a linear layer from a convolution.
    pub fn kind(&self) -> Option<LayerKind> {
        self.kind
    }

    /// Which axis of the weight it rotates.
    pub fn axis(&self) -> Axis {
        self.axis
    }

    /// Channels per block, `b`. Blocks of one channel do not rotate.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Factors, `m`.
    pub fn n_butterfly_factor(&self) -> usize {
        self.skew.shape()[0]
    }

    /// Whether one stored block serves all.
    pub fn block_share(&self) -> bool {
        self.block_share
    }

    /// Neighbouring channels that the rotation mixes among themselves, `b·2^(m−1)`.
    pub fn span(&self) -> usize {
        self.block_size << (self.n_butterfly_factor() - 1)
    }

    /// Length of the rotated input axis, `d`, unless a shared block leaves it open. A rotation of the outputs does not
    /// tell the inputs.
    pub fn d_input(&self) -> Option<usize> {
        let blocks = self.skew.shape()[1];
        let is_told = self.axis == Axis::Input && !self.block_share;
        is_told.then(|| blocks.saturating_mul(self.block_size))
    }

    /// Output channels, `o`, where the adapter tells: one with a scale does, and one that rotates them.
    pub fn d_output(&self) -> Option<usize> {
        self.d_output
    }

    /// The strict upper triangles of `Q` row by row, `[m, n, b(b−1)/2]` (`n = 1` where one block is shared), in
    /// f32 or f64.
    pub fn skew(&self) -> &TensorData {
        &self.skew
    }

    /// The numbers that a scaled skew trains for this rotation: `2√(b−1)` times the skew, in its shape and precision.
    pub fn scaled_skew(&self) -> TensorData {
        multiplied(&self.skew, skew_divisor(self.block_size))
    }

    /// The scale per output channel, `[o]`, in the precision of the skew.
    pub fn scale(&self) -> Option<&TensorData> {
        self.scale.as_ref()
    }

    /// Whether its sizes leave the weight as it is: blocks of one channel, which PEFT's OFT makes where no other
    /// size fits, and no scale but ones.
    pub fn is_identity(&self) -> bool {
        !self.rotates() && !self.scales()
    }

    /// Whether blocks have more than one channel.
    pub(crate) fn rotates(&self) -> bool {
        self.block_size > 1
    }

    /// Whether there is a scale other than ones.
    pub(crate) fn scales(&self) -> bool {
        let is_one = |scale: &TensorData| scale.iter::<f64>().all(|scale| scale == 1.0);
        self.scale.as_ref().is_some_and(|scale| !is_one(scale))
    }

    /// The numbers that are free to change: the packed skew, and the scale.
    pub fn effective(&self) -> usize {
        self.skew.num_elements() + self.scale.as_ref().map_or(0, TensorData::num_elements)
    }

    /// The kind of the layer whose weight this is, if the adapter fits it.
    ///
    /// # Shapes
    ///
    /// - `weight`: as PyTorch has it, `[d_output, d_input]` or `[d_output, c_in/groups, kh, kw]`
    ///
    /// # Errors
    ///
    /// - [`FitError::Axes`]: the weight has neither two axes nor four.
    /// - [`FitError::Kind`]: the adapter is for a layer of another kind.
    /// - [`FitError::Inputs`], [`FitError::Blocks`]: the inputs are not those that the blocks rotate.
    /// - [`FitError::Outputs`]: the outputs are not those that the scale has.
    pub fn check_fit(&self, weight: &[usize]) -> Result<LayerKind, FitError> {
        let kind = match weight.len() {
            2 if self.kind == Some(LayerKind::Embedding) => LayerKind::Embedding,
            2 => LayerKind::Linear,
            4 => LayerKind::Conv2d,
            axes => return Err(FitError::Axes { axes }),
        };
        self.check_kind(kind)?;
        self.check_widths(weight[1..].iter().product(), weight[0])?;
        Ok(kind)
    }

    /// Refuses a rotation of the outputs, where a model computes with rotations of inputs.
    ///
    /// # Errors
    ///
    /// [`FitError::OutputAxis`]
    pub(crate) fn check_axis(&self) -> Result<(), FitError> {
        match self.axis {
            Axis::Input => Ok(()),
            Axis::Output => Err(FitError::OutputAxis),
        }
    }

    /// Refuses a layer of another kind. An adapter of OFT's from a file fits a linear layer and a convolution, for which PEFT
    /// writes the same tensors.
    pub(crate) fn check_kind(&self, layer: LayerKind) -> Result<(), FitError> {
        match self.kind {
            Some(adapter) if adapter != layer => Err(FitError::Kind { adapter, layer }),
            None if layer == LayerKind::Embedding => Err(FitError::Embedding),
            _ => Ok(()),
        }
    }

    /// Refuses a layer of other widths.
    ///
    /// # Errors
    ///
    /// - [`FitError::Inputs`]: the blocks cover another number of inputs.
    /// - [`FitError::Blocks`]: a shared block, or the span of the factors, does not divide the inputs.
    /// - [`FitError::Outputs`]: the scale has another number of outputs. Without a scale, any number fits.
    /// - [`FitError::Rotated`]: the blocks rotate another number of outputs.
    fn check_widths(&self, d_input: usize, d_output: usize) -> Result<(), FitError> {
        if self.axis == Axis::Output {
            let adapter = self.d_output.unwrap_or(0);
            let layer = d_output;
            return match adapter == layer && d_input > 0 {
                true => Ok(()),
                false => Err(FitError::Rotated { adapter, layer }),
            };
        }
        let (b, m) = (self.block_size, self.n_butterfly_factor());
        if let Some(adapter) = self.d_input().filter(|d| *d != d_input) {
            let layer = d_input;
            return Err(FitError::Inputs { adapter, layer });
        }
        if self.rotates() && !fits(d_input, b, m) || d_input == 0 {
            return Err(FitError::Blocks {
                n_butterfly_factor: m,
                block_size: b,
                d_input,
            });
        }
        match self.d_output.filter(|o| *o != d_output) {
            Some(adapter) => Err(FitError::Outputs {
                adapter,
                layer: d_output,
            }),
            None => Ok(()),
        }
    }

    /// The sizes of the rotation in a layer of these widths. Where it rotates the outputs, they take the place of the
    /// inputs.
    ///
    /// # Errors
    ///
    /// [`FitError::ScaleAlone`] for blocks of one channel, and otherwise as [`AdapterLayer::check_fit`] for the widths.
    pub(crate) fn butterfly(
        &self,
        d_input: usize,
        d_output: usize,
    ) -> Result<ButterflyPlan, FitError> {
        if !self.rotates() {
            return Err(FitError::ScaleAlone);
        }
        self.check_widths(d_input, d_output)?;
        let (b, m) = (self.block_size, self.n_butterfly_factor());
        let (rotated, other) = match self.axis {
            Axis::Input => (d_input, d_output),
            Axis::Output => (d_output, d_input),
        };
        let sizes = ButterflyPlan::new((rotated, other), b, m);
        let sizes = sizes.ok_or(FitError::Blocks {
            n_butterfly_factor: m,
            block_size: b,
            d_input: rotated,
        })?;
        Ok(sizes.with_block_share(self.block_share))
    }

    /// The sizes of the rotation as far as the adapter alone says them; none where blocks of one channel do not rotate.
    ///
    /// One block stands for all that share it, and where the outputs are rotated, any inputs do.
    pub(crate) fn own_sizes(&self) -> Option<ButterflyPlan> {
        let d_input = self.d_input().unwrap_or(self.block_size);
        self.butterfly(d_input, self.d_output.unwrap_or(1)).ok()
    }
}

/// A tensor that travels with an adapter: a trained bias, or a part of a module to save.
///
/// It has PyTorch's name and orientation: the weight of a linear layer is `[d_output, d_input]`, and a norm has
/// `weight` and `bias` where Burn's has `gamma` and `beta`.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedTensor {
    pub(crate) module: String,
    pub(crate) name: String,
    pub(crate) data: TensorData,
}

/// What owns a tensor, as far as names and orientation differ between PyTorch and Burn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorOwner {
    /// A linear layer: Burn has the transpose of PyTorch's weight.
    Linear,
    /// A normalisation layer: Burn says `gamma` and `beta` where PyTorch says `weight` and `bias`.
    Norm,
    /// Any other module: names and orientation are the same.
    Other,
}

/// PyTorch's and Burn's names of the parameters of norms.
const NORM_NAMES: [(&str, &str); 2] = [("weight", "gamma"), ("bias", "beta")];

impl SavedTensor {
    /// A tensor of a Burn module, which gets PyTorch's name and orientation.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn::tensor::TensorData;
    /// use burn_boft::value::{SavedTensor, TensorOwner};
    ///
    /// let weight = TensorData::new(vec![1f32, 2., 3., 4., 5., 6.], [3, 2]);
    /// let tensor = SavedTensor::from_burn("head", "weight", weight.clone(), TensorOwner::Linear);
    /// assert_eq!(tensor.data().shape().to_vec(), [2, 3]);
    /// assert_eq!(tensor.to_burn(TensorOwner::Linear), ("weight", weight));
    ///
    /// let gamma = TensorData::new(vec![1f32; 4], [4]);
    /// let tensor = SavedTensor::from_burn("norm", "gamma", gamma, TensorOwner::Norm);
    /// assert_eq!(tensor.name(), "weight");
    /// ```
    pub fn from_burn(
        module: impl Into<String>,
        name: &str,
        data: TensorData,
        owner: TensorOwner,
    ) -> Self {
        let norm = NORM_NAMES.iter().find(|(_, burn)| *burn == name);
        let torch = match (owner, norm) {
            (TensorOwner::Norm, Some((torch, _))) => torch,
            _ => name,
        };
        Self::new(module, torch, turned(data, name, owner))
    }

    /// Burn's name of the tensor, and its numbers in Burn's orientation: the inverse of [`SavedTensor::from_burn`] for
    /// the same owner.
    pub fn to_burn(&self, owner: TensorOwner) -> (&str, TensorData) {
        let norm = NORM_NAMES.iter().find(|(torch, _)| *torch == self.name);
        let name = match (owner, norm) {
            (TensorOwner::Norm, Some((_, burn))) => burn,
            _ => self.name.as_str(),
        };
        (name, turned(self.data.clone(), &self.name, owner))
    }

    /// A tensor of a module, named and turned as PyTorch's is.
    pub fn new(module: impl Into<String>, name: impl Into<String>, data: TensorData) -> Self {
        Self {
            module: module.into(),
            name: name.into(),
            data,
        }
    }

    /// The dotted path in the model of the module that owns it.
    pub fn module(&self) -> &str {
        &self.module
    }

    /// Its name in the module, as PyTorch says it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its numbers.
    pub fn data(&self) -> &TensorData {
        &self.data
    }
}

/// No layer is wider; an empty tensor could claim any width.
pub(crate) const WIDEST: usize = 1 << 24;

/// The block size of packed numbers of this shape, `[m, n, b(b−1)/2]`.
fn sizes(skew: &[usize]) -> Result<usize, SizeError> {
    let [m, n, numbers] = skew[..] else {
        let expected = "factors, blocks and packed numbers are three axes";
        return Err(SizeError::Axes { expected });
    };
    let b = block_size(numbers).ok_or(SizeError::Packed { numbers })?;
    check_sizes([m, n, b])?;
    Ok(b)
}

/// Refuses factors, blocks and block sizes that no layer has, in the order `[m, n, b]`.
///
/// # Errors
///
/// - [`SizeError::Width`]: `n·b` is more than [`WIDEST`].
/// - [`SizeError::Factors`]: the span `b·2^(m−1)` does not divide `n·b`, `b` is odd with several factors, or one of
///   them is 0.
pub(crate) fn check_sizes([m, n, b]: [usize; 3]) -> Result<(), SizeError> {
    let (block_num, block_size) = (n, b);
    let d = n.checked_mul(b).filter(|d| *d <= WIDEST);
    let d = d.ok_or(SizeError::Width {
        block_num,
        block_size,
    })?;
    // Blocks of one channel do not rotate, and more factors need halves of blocks.
    let is_rotation = match b {
        1 => m == 1,
        _ => m > 0 && fits(d, b, m),
    };
    match n > 0 && is_rotation {
        true => Ok(()),
        false => Err(SizeError::Factors {
            n_butterfly_factor: m,
            block_num,
            block_size,
        }),
    }
}

/// The weight of a linear layer turned from PyTorch's orientation to Burn's or back, and any other tensor as it is.
fn turned(data: TensorData, name: &str, owner: TensorOwner) -> TensorData {
    match owner {
        TensorOwner::Linear if name == "weight" => transposed(&data).unwrap_or(data),
        _ => data,
    }
}

/// The block size whose strict upper triangle has this many numbers; no numbers are blocks of one.
pub(crate) fn block_size(packed: usize) -> Option<usize> {
    let root = packed.checked_mul(8)?.checked_add(1)?.isqrt();
    let b = root.div_ceil(2);
    (b > 0 && b.checked_mul(b - 1)? / 2 == packed).then_some(b)
}

/// The packed numbers of square matrices, `½(A − Aᵀ)` above the diagonal.
///
/// # Shapes
///
/// - `squares`: `[…, b, b]`
/// - result: `[…, b(b−1)/2]`
pub(crate) fn pack(squares: &[f64], b: usize) -> Vec<f64> {
    squares
        .chunks_exact((b * b).max(1))
        .flat_map(|a| upper_triangle(b).map(move |(i, j)| 0.5 * (a[i * b + j] - a[j * b + i])))
        .collect()
}

/// Square matrices of packed numbers, skew-symmetric so that [`pack`] gives the numbers back.
///
/// # Shapes
///
/// - `packed`: `[…, b(b−1)/2]` with `b ≥ 2`
/// - result: `[…, b, b]`
pub(crate) fn unpack(packed: &[f64], b: usize) -> Vec<f64> {
    let mut squares = Vec::with_capacity(packed.len() * 3);
    for block in packed.chunks_exact((b * (b - 1) / 2).max(1)) {
        let start = squares.len();
        squares.resize(start + b * b, 0.0);
        for (value, (i, j)) in block.iter().zip(upper_triangle(b)) {
            squares[start + i * b + j] = *value;
            squares[start + j * b + i] = -value;
        }
    }
    squares
}
