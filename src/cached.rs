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
    pub(crate) fn get(&self, compute: impl FnOnce() -> Blocks) -> Blocks {
        self.0.get_or_init(compute).clone()
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
