//! Where the work is done.

use burn::prelude::*;
use clap::ValueEnum;

/// The devices that this build can use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
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

impl DeviceName {
    /// The device of that name.
    pub fn device(self) -> Device {
        match self {
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
        }
    }
}
