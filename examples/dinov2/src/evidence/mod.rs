//! The evidence behind a comparison of methods: what is run, what each run yielded, and what may be concluded from it.
//! Nothing here trains a model.
//!
//! A [`Protocol`] names everything that has to run. [`Protocol::next`] gives the run that is due, the caller trains it and
//! appends an [`Outcome`] to the [`Ledger`], until nothing is due. [`Summary`] turns the outcomes into rows and paired
//! differences, [`table`] and [`plot`] show them.

mod error;
#[cfg(test)]
mod examples;
mod ledger;
mod outcome;
mod plan;
pub mod plot;
mod preset;
mod protocol;
pub mod statistics;
mod summary;
pub mod table;

pub use error::EvidenceError;
pub use ledger::{Ledger, Results};
pub use outcome::{Cost, Forgetting, Measured, Outcome, Rotation, Test, Validation};
pub use plan::{Choice, Edge, Run, Stage};
pub use preset::{Preset, Setting};
pub use protocol::{Conditions, Design, Entry, Protocol};
pub use summary::{Pair, Row, Summary, Verdict};
