//! Where the work is done.

use burn::prelude::*;
use burn::tensor::{DType, DeviceType, FloatDType};
use clap::ValueEnum;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The devices that this build can use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceName {
    /// This machine's processor.
    #[default]
    Cpu,
    /// The first NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda,
    /// The first AMD GPU.
    #[cfg(feature = "rocm")]
    Rocm,
    /// The best device of any graphics API.
    #[cfg(feature = "wgpu")]
    Wgpu,
    /// The best Vulkan device.
    #[cfg(feature = "vulkan")]
    Vulkan,
    /// The best Metal device.
    #[cfg(feature = "metal")]
    Metal,
    /// The best WebGPU device.
    #[cfg(feature = "webgpu")]
    Webgpu,
}

/// The precision of the frozen weights and of the activations. What is trained has single precision, but for biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Half precision with the range of single precision.
    Bf16,
    /// Half precision.
    F16,
}

impl Precision {
    /// Burn's name for it.
    pub fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        }
    }

    /// Checks that a device computes in this precision.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn check(self, device: &Device) -> Result<(), Error> {
        if device.supports_dtype(DType::from(self.dtype())) {
            return Ok(());
        }
        Err(Error::Settings(format!(
            "--dtype {} is not supported by this device; f32 is",
            format!("{self:?}").to_lowercase()
        )))
    }
}

impl DeviceName {
    /// The device of that name.
    ///
    /// # Errors
    ///
    /// This machine has none.
    pub fn device(self) -> Result<Device, Error> {
        if Device::enumerate(self.kind()).is_empty() {
            return Err(Error::Settings(format!(
                "--device {} finds no such device on this machine",
                self.name()
            )));
        }
        Ok(match self {
            Self::Cpu => Device::flex(),
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::cuda(DeviceIndex::Default),
            #[cfg(feature = "rocm")]
            Self::Rocm => Device::rocm(DeviceIndex::Default),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::wgpu(DeviceKind::DefaultDevice),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Device::vulkan(DeviceKind::DefaultDevice),
            #[cfg(feature = "metal")]
            Self::Metal => Device::metal(DeviceKind::DefaultDevice),
            #[cfg(feature = "webgpu")]
            Self::Webgpu => Device::webgpu(DeviceKind::DefaultDevice),
        })
    }

    /// Burn's name for it.
    fn kind(self) -> DeviceType {
        match self {
            Self::Cpu => DeviceType::Flex,
            #[cfg(feature = "cuda")]
            Self::Cuda => DeviceType::Cuda,
            #[cfg(feature = "rocm")]
            Self::Rocm => DeviceType::Rocm,
            #[cfg(feature = "wgpu")]
            Self::Wgpu => DeviceType::Wgpu,
            #[cfg(feature = "vulkan")]
            Self::Vulkan => DeviceType::Vulkan,
            #[cfg(feature = "metal")]
            Self::Metal => DeviceType::Metal,
            #[cfg(feature = "webgpu")]
            Self::Webgpu => DeviceType::WebGpu,
        }
    }

    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_string())
    }
}
