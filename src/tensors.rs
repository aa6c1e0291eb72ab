//! Numbers on the host: their precisions, bytes and orientation.
//!
//! What a file holds and what a model holds meet here: the names of precisions, the bytes of safetensors files, and the
//! transpose between PyTorch's linear layers and Burn's. Shapes and precisions in messages are said as this module says
//! them.

use std::ops::Range;

use burn::tensor::{Bytes, DType, TensorData, bf16, f16};
use safetensors::Dtype;

use crate::ops;

/// The precision that numbers of this one are computed in: f32 or f64.
pub fn widened(dtype: DType) -> DType {
    ops::widened(dtype)
}

/// Whether a precision is one of the floats that files of adapters hold: f64, f32, f16 or bf16. Quantized and 8-bit
/// floats are none of them.
pub fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// Whether no number is NaN or infinite. Integers are finite, and so is a tensor without numbers.
pub fn is_finite(data: &TensorData) -> bool {
    fn all<T: burn::tensor::Element>(data: &TensorData, is_finite: impl Fn(T) -> bool) -> bool {
        // Without a branch for every number, the compiler looks at several at once.
        let all_in = |part: &[T]| {
            part.iter()
                .fold(true, |all, number| all & is_finite(*number))
        };
        data.as_slice::<T>()
            .is_ok_and(|numbers| numbers.chunks(4096).all(all_in))
    }
    match data.dtype() {
        DType::F32 => all(data, f32::is_finite),
        DType::F16 => all(data, f16::is_finite),
        DType::BF16 => all(data, bf16::is_finite),
        _ => data.iter::<f64>().all(f64::is_finite),
    }
}

/// The numbers of a tensor in f64, which holds every number of the narrower floats exactly.
pub fn values(data: &TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}

/// A tensor of these numbers, rounded to a precision. Floats that came out of [`values`] in the same precision come
/// back exactly.
///
/// # Panics
///
/// If the shape has another number of elements.
///
/// # Examples
///
/// ```
/// use burn::tensor::{DType, TensorData};
/// use burn_boft::tensors::{from_values, values};
///
/// let half = TensorData::new(vec![0.1f32, -3.0], [2]).convert_dtype(DType::BF16);
/// assert_eq!(from_values(values(&half), [2], DType::BF16), half);
/// ```
pub fn from_values(values: Vec<f64>, shape: impl Into<Vec<usize>>, dtype: DType) -> TensorData {
    TensorData::new(values, shape.into()).convert_dtype(dtype)
}

/// The transpose of a matrix: the weight of a linear layer is `[d_output, d_input]` in PyTorch and
/// `[d_input, d_output]` in Burn. None where the tensor is not a matrix.
///
/// # Shapes
///
/// - input: `[rows, columns]`
/// - result: `[columns, rows]`
///
/// # Numerics
///
/// The numbers go through f64, which keeps every float of an adapter's file. Integers above 2⁵³ would be rounded.
///
/// # Examples
///
/// ```
/// use burn::tensor::TensorData;
/// use burn_boft::tensors::transposed;
///
/// let pytorch = TensorData::new(vec![1f32, 2., 3., 4., 5., 6.], [2, 3]); // two outputs of three inputs
/// let burn = transposed(&pytorch).unwrap();
/// assert_eq!(burn, TensorData::new(vec![1f32, 4., 2., 5., 3., 6.], [3, 2]));
/// ```
pub fn transposed(matrix: &TensorData) -> Option<TensorData> {
    let [rows, columns] = **matrix.shape() else {
        return None;
    };
    if matrix.num_elements() == 0 {
        // The other axis can claim any length.
        return Some(from_values(Vec::new(), [columns, rows], matrix.dtype()));
    }
    let numbers = values(matrix);
    let places = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
    let transpose = places.map(|place| numbers[place]).collect();
    Some(from_values(transpose, [columns, rows], matrix.dtype()))
}

/// Some of the numbers of a tensor in their order, a `[numbers.len()]` tensor in its precision. The range counts
/// numbers, not rows, in row-major order.
///
/// # Panics
///
/// If the tensor has fewer numbers, or the range ends before it starts.
pub fn part(data: &TensorData, numbers: Range<usize>) -> TensorData {
    let width = data.dtype().size();
    let bytes = &data.as_bytes()[numbers.start * width..numbers.end * width];
    TensorData::from_bytes_vec(bytes.to_vec(), [numbers.len()], data.dtype())
}

/// Whether two tensors have the same shape and the same numbers, as far as the coarser of their precisions tells: one of them
/// rounded to the precision of the other is the other.
///
/// # Examples
///
/// ```
/// use burn::tensor::{DType, TensorData};
/// use burn_boft::tensors::is_same;
///
/// let fine = TensorData::new(vec![0.1f32, -3.0], [2]);
/// assert!(is_same(&fine, &fine.clone().convert_dtype(DType::BF16)));
/// assert!(!is_same(&fine, &TensorData::new(vec![0.1000001f32, -3.0], [2])));
/// ```
pub fn is_same(a: &TensorData, b: &TensorData) -> bool {
    let rounds_to = |a: &TensorData, b: &TensorData| a.clone().convert_dtype(b.dtype()) == *b;
    a.shape() == b.shape() && (rounds_to(a, b) || rounds_to(b, a))
}

/// Joins tensors along their first axis. None where their precisions or their other axes differ, where one has no axis,
/// or where there are none.
///
/// # Shapes
///
/// - input: `[rows, …]` each
/// - result: `[Σ rows, …]`
pub fn concatenate<'a>(parts: impl IntoIterator<Item = &'a TensorData>) -> Option<TensorData> {
    let parts: Vec<_> = parts.into_iter().collect();
    let first = parts.first()?;
    let (dtype, mut shape) = (first.dtype(), first.shape().to_vec());
    let is_alike = |part: &&TensorData| {
        part.dtype() == dtype && part.rank() > 0 && part.shape()[1..] == shape[1..]
    };
    if shape.is_empty() || !parts.iter().all(is_alike) {
        return None;
    }
    shape[0] = parts
        .iter()
        .try_fold(0usize, |rows, part| rows.checked_add(part.shape()[0]))?;
    let numbers = parts.iter().flat_map(|part| part.iter::<f64>()).collect();
    Some(from_values(numbers, shape, dtype))
}

/// Splits a tensor along its first axis into equal parts. None where that axis does not split into so many. One part is
/// the tensor itself, also where it has no axis.
///
/// # Shapes
///
/// - input: `[rows, …]`
/// - result: `[rows/parts, …]` each
///
/// # Examples
///
/// ```
/// use burn::tensor::TensorData;
/// use burn_boft::tensors::{concatenate, split};
///
/// let scale = TensorData::new(vec![1f32, 2., 3., 4.], [4]);
/// let halves = split(&scale, 2).unwrap();
/// assert_eq!(halves[1], TensorData::new(vec![3f32, 4.], [2]));
/// assert_eq!(concatenate(&halves), Some(scale.clone()));
/// assert_eq!(split(&scale, 3), None);
/// ```
pub fn split(tensor: &TensorData, parts: usize) -> Option<Vec<TensorData>> {
    if parts == 1 {
        return Some(vec![tensor.clone()]);
    }
    let mut shape = tensor.shape().to_vec();
    let rows = *shape.first()?;
    if parts == 0 || !rows.is_multiple_of(parts) {
        return None;
    }
    shape[0] = rows / parts;
    let numbers = values(tensor);
    let each = numbers.len() / parts;
    let part = |index: usize| {
        let numbers = numbers[index * each..(index + 1) * each].to_vec();
        from_values(numbers, shape.clone(), tensor.dtype())
    };
    Some((0..parts).map(part).collect())
}

/// Burn's precision for one of a safetensors file: the floats, and i64 for counts. None for all others.
pub fn from_file(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        _ => return None,
    })
}

/// The precision of a safetensors file for one of Burn's: the floats, and i64 for counts. The inverse of [`from_file`].
/// None for precisions that no adapter's file has.
pub fn to_file(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        _ => return None,
    })
}

/// The name of a precision of a safetensors file, spelt as Burn spells its own: `f32`.
pub fn file_name(dtype: Dtype) -> String {
    dtype.to_string().to_lowercase()
}

/// The tensor that little-endian bytes of a safetensors file hold. None where its precision is not read.
///
/// # Panics
///
/// If the bytes are not those of the shape.
pub fn decode(dtype: Dtype, bytes: &[u8], shape: impl Into<Vec<usize>>) -> Option<TensorData> {
    fn numbers<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().copied().map(from).collect()
    }
    let shape = shape.into();
    Some(match dtype {
        Dtype::F64 => TensorData::new(numbers(bytes, f64::from_le_bytes), shape),
        Dtype::F32 => TensorData::new(numbers(bytes, f32::from_le_bytes), shape),
        Dtype::F16 => TensorData::new(numbers(bytes, f16::from_le_bytes), shape),
        Dtype::BF16 => TensorData::new(numbers(bytes, bf16::from_le_bytes), shape),
        Dtype::I64 => TensorData::new(numbers(bytes, i64::from_le_bytes), shape),
        _ => return None,
    })
}

/// The little-endian bytes of a tensor, as a safetensors file holds them: its own bytes on a machine that has them in this
/// order, without a copy. None where [`to_file`] has no precision.
///
/// # Examples
///
/// ```
/// use burn::tensor::TensorData;
/// use burn_boft::tensors::{decode, encode, to_file};
///
/// let data = TensorData::new(vec![1f32, -0.5], [2]);
/// let dtype = to_file(data.dtype()).unwrap();
/// let bytes = encode(data.clone()).unwrap();
/// assert_eq!(decode(dtype, &bytes, [2]), Some(data));
/// ```
pub fn encode(data: TensorData) -> Option<Bytes> {
    to_file(data.dtype())?;
    let width = data.dtype().size();
    let (mut bytes, ..) = data.into_parts();
    if cfg!(target_endian = "big") {
        bytes.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_precision_is_read_as_it_was_written() {
        let numbers = [0.1f32, -7.25, f32::MIN_POSITIVE, 3.0e38, 1.0, 0.0];
        let data = TensorData::new(numbers.to_vec(), [2, 3]);
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let data = data.clone().convert_dtype(dtype);
            let stored = to_file(dtype).unwrap();
            assert_eq!(from_file(stored), Some(dtype));
            assert_eq!(file_name(stored), dtype.name());
            let bytes = encode(data.clone()).unwrap();
            assert_eq!(decode(stored, &bytes, [2, 3]), Some(data));
        }
        let scalar = TensorData::new(vec![-3i64], Vec::<usize>::new());
        let bytes = encode(scalar.clone()).unwrap();
        assert_eq!(decode(Dtype::I64, &bytes, []), Some(scalar));
        let flags = TensorData::new(vec![true], [1]);
        assert_eq!((encode(flags), decode(Dtype::U8, &[1], [1])), (None, None));
    }

    #[test]
    fn a_tensor_splits_into_the_parts_that_it_is_joined_of() {
        let whole = TensorData::new((0..12).map(|x| x as f32).collect(), [4, 3]);
        let parts = split(&whole, 2).unwrap();
        assert_eq!(
            parts[1],
            TensorData::new(vec![6f32, 7., 8., 9., 10., 11.], [2, 3])
        );
        assert_eq!(concatenate(&parts), Some(whole.clone()));
        assert_eq!(part(&whole, 3..5), TensorData::new(vec![3f32, 4.], [2]));
        assert_eq!(split(&whole, 3), None);
        assert_eq!(
            concatenate([&whole, &parts[0].clone().convert_dtype(DType::F16)]),
            None
        );
        let empty = TensorData::new(Vec::<f32>::new(), [4, 0]);
        assert_eq!(split(&empty, 2).unwrap()[0].shape().to_vec(), [2, 0]);
    }

    #[test]
    fn only_a_matrix_has_a_transpose() {
        let matrix = TensorData::new((0..6).map(|x| x as f32).collect(), [2, 3]);
        let transpose = TensorData::new(vec![0f32, 3., 1., 4., 2., 5.], [3, 2]);
        assert_eq!(transposed(&matrix).as_ref(), Some(&transpose));
        assert_eq!(transposed(&transpose), Some(matrix));
        assert_eq!(transposed(&TensorData::new(vec![1f32], [1])), None);
    }

    #[test]
    fn one_number_that_is_not_finite_is_found_in_every_precision() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let finite = TensorData::new(vec![1f32, -2.0], [2]).convert_dtype(dtype);
            assert!(is_finite(&finite), "{}", dtype.name());
            for bad in [f32::NAN, f32::NEG_INFINITY] {
                let data = TensorData::new(vec![1f32, bad], [2]).convert_dtype(dtype);
                assert!(!is_finite(&data), "{}", dtype.name());
            }
        }
    }
}
