//! The verbs on a model: the dry run, the injection, what becomes of an adapted model, and reports about it.

mod candidates;
#[cfg(feature = "train")]
mod checkpoint;
mod inject;
mod merge;
mod misfit;
mod plan;
mod report;
mod walk;

#[cfg(feature = "train")]
pub use checkpoint::AdapterCheckpointer;

pub use candidates::{Candidate, Candidates, OtherParameter, Unsupported, candidates};
pub use inject::inject;
pub use merge::{MergeError, merge, project, unload};
pub use misfit::{InjectError, Misfit};
pub use plan::{InjectPlan, LayerPlan, plan};
pub use report::{Diagnosis, LayerDiagnosis, LayerSummary, Summary, diagnose, summary};

pub(crate) use candidates::verdicts;
pub(crate) use inject::Placement;
pub(crate) use misfit::{it_has, nearest};
pub(crate) use plan::trained;
pub(crate) use report::{defect, norm};
pub(crate) use walk::{Parameter, Walk, walk};
