//! [`CachedBlocks`]: the blocks of an adapter that is not trained, computed once.

use std::sync::{Arc, OnceLock};

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::Device;

use crate::ops::Blocks;

/// The blocks of an adapter, from when they are first needed until its numbers may change.
///
/// Nobody can change the numbers of an adapter without mapping it, moving it or taking it to another mode, as a
/// [`Module`]. This is a module beside those numbers, and each of these functions empties it. Clones have the same
/// numbers and share the blocks.
#[derive(Debug, Clone, Default)]
pub(crate) struct CachedBlocks(Arc<OnceLock<Blocks>>);

impl CachedBlocks {
    /// The blocks, which `compute` computes if they are not there.
    ///
    /// Two threads that ask at the same time may both compute them. If one waited for the other, it could wait forever: kernels
    /// share work among threads, and a thread that waits for its share may run another request of the same blocks meanwhile.
    pub(crate) fn get(&self, compute: impl FnOnce() -> Blocks) -> Blocks {
        if let Some(blocks) = self.0.get() {
            return blocks.clone();
        }
        let blocks = compute();
        self.0.get_or_init(|| blocks).clone()
    }
}

impl Module for CachedBlocks {
    fn visit<V: ModuleVisitor>(&self, _: &mut V) {}

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
        Self::default()
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        Self::default()
    }

    fn to_device(self, _: &Device) -> Self {
        Self::default()
    }

    fn materialize(self) -> Self {
        Self::default()
    }

    fn valid(&self) -> Self {
        Self::default()
    }

    fn train(self) -> Self {
        Self::default()
    }
}

impl ModuleDisplayDefault for CachedBlocks {
    fn content(&self, _: Content) -> Option<Content> {
        None
    }
}

impl ModuleDisplay for CachedBlocks {}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;

    #[test]
    fn blocks_that_are_asked_for_while_they_are_computed_are_there_afterwards() {
        let cached = CachedBlocks::default();
        let compute = |number: f64| {
            let skew = Tensor::full([1, 3, 1], number, &Device::default());
            Blocks::cayley(skew, 2)
        };
        let mut inner = None;
        let outer = cached.get(|| {
            inner = Some(cached.get(|| compute(0.5)));
            compute(0.25)
        });
        let found = [Some(outer), inner, Some(cached.get(|| compute(0.125)))];
        let expected = compute(0.5).values().into_data();
        for blocks in found {
            assert_eq!(blocks.unwrap().values().into_data(), expected);
        }
    }
}
