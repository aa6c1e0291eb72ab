//! The verbs on a model, with their results and their errors.
//!
//! [`candidates`](candidates()) and [`plan`](plan()) look at a model before anything happens to it. [`inject`](inject()) attaches
//! adapters. [`merge`](merge()), [`merge_quantized`] and [`unload`] end with a plain model again, [`project`] keeps COFT within its radius,
//! [`rotate_once`] spares recurrent layers a rotation in every time step, and [`summary`] and [`diagnose`] report about an adapted model. All of them work on any Burn module and need to know
//! nothing of its type.

mod candidates;
#[cfg(feature = "train")]
mod checkpoint;
mod inject;
mod merge;
mod misfit;
mod once;
mod plan;
mod report;
mod requantize;
mod walk;

#[cfg(feature = "train")]
pub use checkpoint::AdapterCheckpointer;

pub use candidates::{Candidate, Candidates, OtherParameter, Unsupported, candidates};
pub use inject::inject;
pub use merge::{MergeError, merge, project, unload};
pub use misfit::{InjectError, Misfit};
pub use once::rotate_once;
pub use plan::{InjectPlan, LayerPlan, plan};
pub use report::{Diagnosis, LayerDiagnosis, LayerSummary, Summary, diagnose, summary};
pub use requantize::{LayerRequantization, Requantization, merge_quantized};

pub(crate) use candidates::verdicts;
pub(crate) use inject::Placement;
pub(crate) use misfit::{it_has, nearest};
pub(crate) use plan::{quantized, trained};
pub(crate) use report::{defect, norm};
pub(crate) use walk::{Edit, Parameter, Path, Stored, Walk, rewrite, walk};
