//! The precisions of a base, and how exactly each has to compute.

use burn::tensor::quantization::{QuantScheme, QuantStore, QuantValue};
use burn::tensor::{DType, Device};

/// How the base of a layer is stored. Activations have the same precision, or f32 where the base is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F64,
    F32,
    F16,
    BF16,
    /// Eight bits, with a scale per tensor.
    Q8,
    /// Four bits, with a scale per tensor.
    Q4,
}

impl Precision {
    pub const ALL: [Self; 6] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8,
        Self::Q4,
    ];

    /// As the tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// The precision that the layer computes in.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F32 | Self::Q8 | Self::Q4 => DType::F32,
        }
    }

    /// How a device packs the weight, if it is packed: GPU backends into words of 32 bits.
    pub fn packed(self, device: &Device) -> Option<QuantScheme> {
        let value = match self {
            Self::Q8 => QuantValue::Q8S,
            Self::Q4 => QuantValue::Q4S,
            _ => return None,
        };
        let scheme = Device::flex().settings().quantization.scheme;
        let scheme = scheme.with_value(value);
        Some(match is_on_gpu(device) {
            true => scheme.with_store(QuantStore::PackedU32(0)),
            false => scheme,
        })
    }

    /// Whether a device computes in this precision at all.
    pub fn is_on(self, device: &Device) -> bool {
        device.supports_dtype(self.dtype())
    }

    /// The largest differences allowed, each relative to the largest number of what is compared. A test reads them back
    /// from `docs/backends.md`, where the measured ones stand beside them.
    pub fn tolerance(self) -> Drift {
        let [output, gradient, merged] = match self {
            Self::F64 => [1e-13, 1e-12, 1e-13],
            Self::F32 | Self::Q8 | Self::Q4 => [2e-6, 5e-6, 2e-6],
            Self::F16 => [2e-3, 5e-3, 2e-3],
            Self::BF16 => [2e-2, 5e-2, 2e-2],
        };
        Drift {
            output,
            gradient,
            merged,
        }
    }
}

#[cfg(feature = "cubecl")]
fn is_on_gpu(device: &Device) -> bool {
    device.identity().is_some()
}

#[cfg(not(feature = "cubecl"))]
fn is_on_gpu(_: &Device) -> bool {
    false
}

/// How far a layer is from its reference.
#[derive(Clone, Copy, Debug, Default)]
pub struct Drift {
    /// The output, from that of a plain layer in f64 whose weight was rotated by hand.
    pub output: f64,
    /// The gradients of skew and scale, from those of the adapted layer in f64 on another backend.
    pub gradient: f64,
    /// The output of the merged layer, from that of the adapted one.
    pub merged: f64,
}

impl Drift {
    pub fn numbers(self) -> [f64; 3] {
        [self.output, self.gradient, self.merged]
    }

    pub fn max(self, other: Self) -> Self {
        Self {
            output: self.output.max(other.output),
            gradient: self.gradient.max(other.gradient),
            merged: self.merged.max(other.merged),
        }
    }
}
