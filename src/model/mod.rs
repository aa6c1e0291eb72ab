//! The verbs on a model.

#[cfg(feature = "train")]
mod checkpoint;
pub(crate) mod inject;
pub(crate) mod plan;
pub(crate) mod report;
pub(crate) mod walk;

#[cfg(feature = "train")]
pub use checkpoint::AdapterCheckpointer;
pub use inject::{inject, merge, plan, project, unload};
pub use plan::{ButterflyPlan, InjectPlan, LayerKind, LayerPlan};
pub use report::{Diagnosis, LayerDiagnosis, LayerSummary, Summary, diagnose, summary};
