//! How much memory there is, and how much a training step takes.

use crate::device::DeviceName;
use crate::model::Dinov2Config;

/// Numbers that a layer keeps for the backward pass, per token and channel. Measured on the processor with BOFT: 3.2 GB for
/// 32 images of 224 pixels in the small model.
const KEPT: u64 = 21;
/// Share of the free memory that a batch may take.
const SHARE: u64 = 2;

/// Bytes that an image takes in a training step, about.
pub fn per_image(config: &Dinov2Config, [height, width]: [usize; 2]) -> u64 {
    let patches = (height / config.patch_size) * (width / config.patch_size);
    let tokens = 1 + config.num_register_tokens + patches;
    (tokens * config.hidden_size * config.num_hidden_layers) as u64 * KEPT * 4
}

/// Bytes that a batch may take on a device; none where that is not known.
pub fn available(device: DeviceName) -> Option<u64> {
    if device != DeviceName::Cpu {
        return None;
    }
    // Only Linux says how much memory is free for new use.
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some((kibibytes << 10) / SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_model_takes_what_was_measured() {
        let image = per_image(&Dinov2Config::small(), [224, 224]);
        let batch = 32.0 * image as f64 / 1e9;
        assert!((3.0..3.4).contains(&batch), "{batch}");
    }
}
