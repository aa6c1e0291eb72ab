//! The dense oracle: `R` as a product of literal `P·B·Pᵀ` matrices on the host, in f64.
#![allow(dead_code)] // Each test binary uses its part.

pub mod by_hand;
pub mod models;
pub mod peft;
pub mod training;

#[cfg(any(
    feature = "wgpu",
    feature = "webgpu",
    feature = "vulkan",
    feature = "metal"
))]
use burn::tensor::DeviceKind;
use burn::tensor::{DType, Device, Tensor, TensorData};

/// A row-major matrix in f64.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Matrix {
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), rows * columns);
        Self {
            rows,
            columns,
            values,
        }
    }

    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, vec![0.0; rows * columns])
    }

    pub fn identity(size: usize) -> Self {
        let mut matrix = Self::zeros(size, size);
        (0..size).for_each(|i| *matrix.at(i, i) = 1.0);
        matrix
    }

    pub fn at(&mut self, row: usize, column: usize) -> &mut f64 {
        &mut self.values[row * self.columns + column]
    }

    pub fn get(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    pub fn transpose(&self) -> Self {
        let mut result = Self::zeros(self.columns, self.rows);
        for row in 0..self.rows {
            for column in 0..self.columns {
                *result.at(column, row) = self.get(row, column);
            }
        }
        result
    }

    pub fn matmul(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows);
        let mut result = Self::zeros(self.rows, other.columns);
        for row in 0..self.rows {
            for inner in 0..self.columns {
                let factor = self.get(row, inner);
                if factor != 0.0 {
                    for column in 0..other.columns {
                        *result.at(row, column) += factor * other.get(inner, column);
                    }
                }
            }
        }
        result
    }

    /// Gauss-Jordan elimination with partial pivoting.
    pub fn inverse(&self) -> Self {
        let size = self.rows;
        let (mut a, mut inverse) = (self.clone(), Self::identity(size));
        for k in 0..size {
            let pivot = (k..size)
                .max_by(|&i, &j| a.get(i, k).abs().total_cmp(&a.get(j, k).abs()))
                .unwrap();
            for column in 0..size {
                a.values.swap(k * size + column, pivot * size + column);
                inverse
                    .values
                    .swap(k * size + column, pivot * size + column);
            }
            let factor = a.get(k, k);
            for column in 0..size {
                *a.at(k, column) /= factor;
                *inverse.at(k, column) /= factor;
            }
            for row in (0..size).filter(|&row| row != k) {
                let factor = a.get(row, k);
                for column in 0..size {
                    let (from_a, from_inverse) = (a.get(k, column), inverse.get(k, column));
                    *a.at(row, column) -= factor * from_a;
                    *inverse.at(row, column) -= factor * from_inverse;
                }
            }
        }
        inverse
    }

    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Tensor<2> {
        tensor(&self.values, [self.rows, self.columns], dtype, device)
    }
}

/// The sizes of one rotation.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub d: usize,
    pub b: usize,
    pub m: usize,
}

impl Sizes {
    pub fn blocks(&self) -> usize {
        self.d / self.b
    }

    pub fn packed(&self) -> usize {
        self.b * (self.b - 1) / 2
    }

    pub fn skew_shape(&self) -> [usize; 3] {
        [self.m, self.blocks(), self.packed()]
    }

    pub fn skew_len(&self) -> usize {
        self.m * self.blocks() * self.packed()
    }
}

/// The skew-symmetric matrix of one packed block.
pub fn skew_matrix(packed: &[f64], b: usize) -> Matrix {
    let mut q = Matrix::zeros(b, b);
    let mut numbers = packed.iter();
    for row in 0..b {
        for column in row + 1..b {
            let value = *numbers.next().unwrap();
            *q.at(row, column) = value;
            *q.at(column, row) = -value;
        }
    }
    q
}

/// `(I − Q)(I + Q)⁻¹`.
pub fn cayley(packed: &[f64], b: usize) -> Matrix {
    let q = skew_matrix(packed, b);
    let (mut plus, mut minus) = (Matrix::identity(b), Matrix::identity(b));
    for i in 0..b * b {
        plus.values[i] += q.values[i];
        minus.values[i] -= q.values[i];
    }
    minus.matmul(&plus.inverse())
}

/// PEFT's `perm_i`: inside chunks of `b·2^i`, groups of `b/2` in the order evens first, then odds.
fn permutation(sizes: Sizes, stage: usize) -> Matrix {
    let mut p = Matrix::zeros(sizes.d, sizes.d);
    let (r, h) = (sizes.b / 2, 1 << stage);
    for a in 0..sizes.d {
        let target = if stage == 0 {
            a
        } else {
            let chunk = sizes.b * h;
            let (c, g, o) = (a / chunk, (a % chunk) / r, a % r);
            let seq = if g < h { 2 * g } else { 2 * (g - h) + 1 };
            c * chunk + seq * r + o
        };
        *p.at(a, target) = 1.0;
    }
    p
}

/// `R = F_{m−1} ··· F_0`; blocks where `dropped` says so are the identity.
pub fn rotation_with(sizes: Sizes, skew: &[f64], dropped: impl Fn(usize, usize) -> bool) -> Matrix {
    let mut rotation = Matrix::identity(sizes.d);
    for stage in 0..sizes.m {
        let mut diagonal = Matrix::identity(sizes.d);
        for k in (0..sizes.blocks()).filter(|&k| !dropped(stage, k)) {
            let start = (stage * sizes.blocks() + k) * sizes.packed();
            let block = cayley(&skew[start..start + sizes.packed()], sizes.b);
            for row in 0..sizes.b {
                for column in 0..sizes.b {
                    *diagonal.at(k * sizes.b + row, k * sizes.b + column) = block.get(row, column);
                }
            }
        }
        let p = permutation(sizes, stage);
        rotation = p.matmul(&diagonal).matmul(&p.transpose()).matmul(&rotation);
    }
    rotation
}

pub fn rotation(sizes: Sizes, skew: &[f64]) -> Matrix {
    rotation_with(sizes, skew, |_, _| false)
}

/// Reproducible values of no particular pattern, roughly uniform in `±amplitude`.
pub fn noise(count: usize, seed: u64, amplitude: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * amplitude
        })
        .collect()
}

pub fn tensor<const D: usize>(
    values: &[f64],
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, dtype))
}

pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert::<f64>().try_to_vec().unwrap()
}

/// `max|a − b| / max(1, max|b|)`.
pub fn drift(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    assert!(actual.iter().all(|value| value.is_finite()));
    let size = expected
        .iter()
        .fold(1.0f64, |max, value| max.max(value.abs()));
    let distance = actual
        .iter()
        .zip(expected)
        .fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
    distance / size
}

#[track_caller]
pub fn assert_close(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    let drift = drift(actual, expected);
    assert!(
        drift <= tolerance,
        "{what}: drift {drift:.3e} exceeds {tolerance:.1e}"
    );
}

/// The CPU backends, by name; or the one that the environment chooses with `BURN_DEVICE`.
///
/// Burn panics if `BURN_DEVICE` names a backend that this build does not have.
#[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
pub fn devices() -> Vec<(&'static str, Device)> {
    match std::env::var("BURN_DEVICE") {
        Ok(name) => vec![(name.to_lowercase().leak(), Device::default())],
        Err(_) => vec![("flex", Device::flex()), ("ndarray", Device::ndarray())],
    }
}

/// Whether `BURN_BOFT_SIZES` asks for few sizes. A software adapter takes a minute to compile the kernels for each.
pub fn few_sizes() -> bool {
    match std::env::var("BURN_BOFT_SIZES").as_deref() {
        Ok("few") => true,
        Ok(other) => panic!("BURN_BOFT_SIZES is `few` or not set, and not `{other}`"),
        Err(_) => false,
    }
}

/// Every backend of this build, by name: those that the kernels are tested on. `BURN_DEVICE` chooses one of them.
pub fn kernel_devices() -> Vec<(&'static str, Device)> {
    #[allow(unused_mut)] // Without a GPU backend the list is complete.
    let mut devices = devices();
    if std::env::var("BURN_DEVICE").is_err() {
        #[cfg(feature = "wgpu")]
        devices.push(("wgpu", Device::wgpu(DeviceKind::DefaultDevice)));
        #[cfg(feature = "webgpu")]
        devices.push(("webgpu", Device::webgpu(DeviceKind::DefaultDevice)));
        #[cfg(feature = "vulkan")]
        devices.push(("vulkan", Device::vulkan(DeviceKind::DefaultDevice)));
        #[cfg(feature = "metal")]
        devices.push(("metal", Device::metal(DeviceKind::DefaultDevice)));
        #[cfg(feature = "cuda")]
        devices.push(("cuda", Device::cuda(0)));
        #[cfg(feature = "rocm")]
        devices.push(("rocm", Device::rocm(0)));
    }
    devices
}
