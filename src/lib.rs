//! OFT and BOFT adapters for Burn models.
mod adapter;
mod config;
mod error;
mod inject;
mod linear;
pub mod ops;
mod plan;
mod report;
mod target;

pub use adapter::BoftAdapter;
pub use config::{
    AdapterConfig, Bias, Block, BoftConfig, Cayley, Init, OftConfig, Selection, TargetModules,
};
pub use error::{InjectError, MergeError, Misfit, PatternError};
pub use inject::{inject, merge, plan, project, unload};
pub use linear::{Linear as BoftLinear, LinearConfig as BoftLinearConfig};
pub use plan::{ButterflyPlan, InjectPlan, LayerKind, LayerPlan};
pub use report::{Diagnosis, LayerDiagnosis, LayerSummary, Summary, diagnose, summary};
