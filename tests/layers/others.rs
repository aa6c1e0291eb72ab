//! Layers of `burn-nn` that no adapter can rotate.

use burn::nn::{
    BatchNormConfig, DropoutConfig, GroupNormConfig, InstanceNormConfig, LayerNormConfig,
    PReluConfig, RmsNormConfig,
};

use crate::check::{Beside, Verdict, boft, device, error, refused};
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("LayerNorm", || {
        refused(LayerNormConfig::new(16).init(&device()))
    }),
    ("RmsNorm", || {
        refused(RmsNormConfig::new(16).init(&device()))
    }),
    ("BatchNorm", || {
        refused(BatchNormConfig::new(16).init(&device()))
    }),
    ("GroupNorm", || {
        refused(GroupNormConfig::new(4, 16).init(&device()))
    }),
    ("InstanceNorm", || {
        refused(InstanceNormConfig::new(16).init(&device()))
    }),
    ("PRelu", || refused(PReluConfig::new().init(&device()))),
    ("Layers without parameters, such as Dropout", || {
        let model = Beside::new(DropoutConfig::new(0.5).init());
        Verdict::Refused(error(&model, &boft(), ["layer", "linear"]))
    }),
];
