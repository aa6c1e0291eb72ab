//! The tensors of one layer of a file, and what every dialect does with them.

use std::collections::BTreeMap;

use burn::tensor::TensorData;

use super::table::Dialect;
use crate::tensors::{from_values, is_float, values, widened};
use crate::value::AdapterLayer;
use crate::value::layer::check_sizes;
use crate::value::mismatch::{Mismatch, Missing, SizeError, Wrong};

/// The tensors of one layer, by their names behind the module's.
#[derive(Default)]
pub(super) struct Parts<'a> {
    pub module: &'a str,
    pub tensors: BTreeMap<&'a str, &'a TensorData>,
}

/// One layer of a file, understood.
pub(super) struct Read {
    pub layer: AdapterLayer,
    /// The bound of the norm of all blocks together, as the file has it.
    pub alpha: Option<f64>,
    /// Whether the norm is beyond the bound, so that the numbers were scaled back to it.
    pub is_bounded: bool,
    /// Whether the norm of a layer of LyCORIS is beyond `alpha` itself, where ComfyUI bounds it.
    pub exceeds_alpha: bool,
}

impl Parts<'_> {
    /// The key of a tensor in the file.
    pub fn key(&self, tensor: &str) -> String {
        format!("{}.{tensor}", self.module)
    }

    /// A tensor without which the layer cannot be read.
    ///
    /// # Errors
    ///
    /// [`Missing::Tensor`]
    pub fn required(&self, tensor: &str) -> Result<&TensorData, Mismatch> {
        self.tensors.get(tensor).copied().ok_or_else(|| Mismatch {
            missing: vec![Missing::Tensor {
                key: self.key(tensor),
            }],
            ..Mismatch::default()
        })
    }

    /// What is wrong with the sizes of a tensor.
    pub fn wrong(&self, tensor: &str, reason: SizeError) -> Mismatch {
        let shape = self.tensors.get(tensor).map(|data| data.shape().to_vec());
        Wrong::Tensor {
            key: self.key(tensor),
            shape: shape.unwrap_or_default(),
            reason,
        }
        .into()
    }

    /// The numbers of a tensor, which are floats.
    ///
    /// # Errors
    ///
    /// [`SizeError::NotFloat`]
    pub fn floats(&self, tensor: &str, data: &TensorData) -> Result<Vec<f64>, Mismatch> {
        match is_float(data.dtype()) {
            true => Ok(values(data)),
            false => Err(self.wrong(tensor, SizeError::NotFloat)),
        }
    }

    /// The square blocks of a rotation, with one factor where they have three axes.
    ///
    /// # Shapes
    ///
    /// - the tensor: `[n, b, b]` or `[m, n, b, b]`
    ///
    /// # Errors
    ///
    /// [`Wrong::Tensor`]: other axes, blocks that are not squares, or sizes that no layer has.
    pub fn squares(&self, dialect: Dialect) -> Result<Squares, Mismatch> {
        let (name, rank) = dialect.rotation();
        let data = self.required(name)?;
        let sizes = match (rank, &**data.shape()) {
            (3, &[n, b, c]) => [1, n, b, c],
            (4, &[m, n, b, c]) => [m, n, b, c],
            _ => {
                let expected = match rank {
                    3 => "blocks and their two sides are three axes",
                    _ => "factors, blocks and their two sides are four axes",
                };
                return Err(self.wrong(name, SizeError::Axes { expected }));
            }
        };
        let [m, n, b, columns] = sizes;
        if b != columns || b == 0 {
            let expected = "square blocks expected";
            return Err(self.wrong(name, SizeError::Squares { expected }));
        }
        check_sizes([m, n, b]).map_err(|reason| self.wrong(name, reason))?;
        Ok(Squares {
            sizes: [m, n, b],
            numbers: self.floats(name, data)?,
            dtype: widened(data.dtype()),
        })
    }

    /// A number per output, of which the other axes have length one.
    ///
    /// # Errors
    ///
    /// [`Wrong::Tensor`]: another axis has several numbers, or they are not floats.
    pub fn per_output(&self, tensor: &str) -> Result<Option<Vec<f64>>, Mismatch> {
        let Some(data) = self.tensors.get(tensor) else {
            return Ok(None);
        };
        let wide = data.shape().iter().filter(|length| **length != 1).count();
        if wide > 1 || data.num_elements() == 0 {
            let expected = "one number for each output expected";
            return Err(self.wrong(tensor, SizeError::Axes { expected }));
        }
        self.floats(tensor, data).map(Some)
    }

    /// The bound of the norm, `alpha`: one number that is not negative.
    ///
    /// # Errors
    ///
    /// - [`Missing::Tensor`]: there is none.
    /// - [`Wrong::Tensor`]: it is not one such number.
    pub fn alpha(&self) -> Result<f64, Mismatch> {
        const ALPHA: &str = "alpha";
        match values(self.required(ALPHA)?)[..] {
            [alpha] if alpha.is_finite() && alpha >= 0.0 => Ok(alpha),
            _ => {
                let expected = "one number of zero or more expected";
                Err(self.wrong(ALPHA, SizeError::Axes { expected }))
            }
        }
    }
}

/// Square blocks, `[m, n, b, b]` row by row.
pub(super) struct Squares {
    pub sizes: [usize; 3],
    pub numbers: Vec<f64>,
    dtype: burn::tensor::DType,
}

impl Squares {
    /// `A − Aᵀ` of every block `A`.
    pub fn differences(&self) -> Vec<f64> {
        let b = self.sizes[2];
        let blocks = self.numbers.chunks_exact(b * b);
        let difference = |a: &[f64]| {
            let at = |place: usize| a[place] - a[place % b * b + place / b];
            (0..b * b).map(at).collect::<Vec<_>>()
        };
        blocks.flat_map(difference).collect()
    }

    /// The layer of `Q`, whose strict upper triangles are kept.
    ///
    /// # Errors
    ///
    /// As [`AdapterLayer::new`].
    pub fn layer(
        &self,
        module: &str,
        q: &[f64],
        scale: Option<Vec<f64>>,
    ) -> Result<AdapterLayer, Mismatch> {
        let [m, n, b] = self.sizes;
        let packed = crate::value::layer::pack(q, b);
        let skew = from_values(packed, [m, n, b * (b - 1) / 2], self.dtype);
        let scale = scale.map(|scale| {
            let outputs = scale.len();
            from_values(scale, [outputs], self.dtype)
        });
        AdapterLayer::new(module, None, skew, scale)
    }
}

/// The Frobenius norm of all numbers.
pub(super) fn norm(numbers: &[f64]) -> f64 {
    numbers
        .iter()
        .map(|number| number * number)
        .sum::<f64>()
        .sqrt()
}

/// Every number times a factor.
pub(super) fn scaled(numbers: Vec<f64>, factor: f64) -> Vec<f64> {
    numbers.into_iter().map(|number| number * factor).collect()
}

/// What LyCORIS and sd-scripts add to norms before they divide by them.
pub(super) const EPSILON: f64 = 1e-8;
