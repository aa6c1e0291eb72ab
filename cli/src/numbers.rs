//! The numbers of a tensor: bytes of a file, and data to compute with.

use std::ops::Range;

use burn::tensor::{DType, TensorData, bf16, f16};
use safetensors::Dtype;

/// The numbers of float bytes, in their own precision.
pub fn decode(dtype: Dtype, bytes: &[u8], shape: Vec<usize>) -> Option<TensorData> {
    Some(match dtype {
        Dtype::F64 => TensorData::new(read(bytes, f64::from_le_bytes), shape),
        Dtype::F32 => TensorData::new(read(bytes, f32::from_le_bytes), shape),
        Dtype::F16 => TensorData::new(read(bytes, f16::from_le_bytes), shape),
        Dtype::BF16 => TensorData::new(read(bytes, bf16::from_le_bytes), shape),
        _ => return None,
    })
}

/// Numbers in the order of a tensor, without its axes.
pub fn part(data: &TensorData, numbers: Range<usize>) -> TensorData {
    let width = data.dtype().size();
    let bytes = &data.as_bytes()[numbers.start * width..numbers.end * width];
    TensorData::from_bytes_vec(bytes.to_vec(), [numbers.len()], data.dtype())
}

/// The bytes of numbers, in their own precision.
pub fn encode(data: &TensorData) -> Option<Vec<u8>> {
    Some(match data.dtype() {
        DType::F64 => write(data.as_slice().ok()?, f64::to_le_bytes),
        DType::F32 => write(data.as_slice().ok()?, f32::to_le_bytes),
        DType::F16 => write(data.as_slice().ok()?, f16::to_le_bytes),
        DType::BF16 => write(data.as_slice().ok()?, bf16::to_le_bytes),
        DType::I64 => write(data.as_slice().ok()?, i64::to_le_bytes),
        _ => return None,
    })
}

/// Burn's name of a precision of a file.
pub fn burn_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        _ => return None,
    })
}

/// The file's name of a precision of Burn.
pub fn file_dtype(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        _ => return None,
    })
}

/// Whether no number is NaN or infinite.
pub fn is_finite(data: &TensorData) -> bool {
    match data.dtype() {
        DType::F32 => data
            .as_slice::<f32>()
            .is_ok_and(|all| all.iter().all(|x| x.is_finite())),
        DType::F16 => data
            .as_slice::<f16>()
            .is_ok_and(|all| all.iter().all(|x| x.is_finite())),
        DType::BF16 => data
            .as_slice::<bf16>()
            .is_ok_and(|all| all.iter().all(|x| x.is_finite())),
        _ => data.iter::<f64>().all(f64::is_finite),
    }
}

fn read<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().copied().map(from).collect()
}

fn write<T: Copy, const N: usize>(numbers: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
    numbers
        .iter()
        .map(|number| to(*number))
        .collect::<Vec<_>>()
        .into_flattened()
}
