//! [`LoadReport`]: what a load did.

use std::fmt::{self, Display, Formatter};

use super::mismatch::{Missing, Unexpected};

/// What [`Adapter::load`](crate::Adapter::load) or [`Adapter::attach_partial`](crate::Adapter::attach_partial) did.
///
/// `Display` counts what was applied, and has one line for every other entry.
///
/// PEFT returns the keys that are missing and unexpected (`load_adapter` in `src/peft/peft_model.py`); what it converts
/// or ignores, it does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// What was used: keys of the file, or parameters of the model.
    pub applied: Vec<String>,
    /// What should be there and is not. Empty unless a partial result was asked for.
    pub missing: Vec<Missing>,
    /// What belongs nowhere. Empty unless a partial result was asked for.
    pub unexpected: Vec<Unexpected>,
    /// What was read differently from what the file says, and why.
    pub converted: Vec<String>,
    /// What was read as it is, although it may not be what somebody meant.
    pub warnings: Vec<String>,
}

impl Display for LoadReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied", self.applied.len())?;
        for entry in &self.missing {
            write!(f, "\nmissing: {entry}")?;
        }
        for entry in &self.unexpected {
            write!(f, "\nunexpected: {entry}")?;
        }
        for (what, entries) in [("converted", &self.converted), ("warning", &self.warnings)] {
            for entry in entries {
                write!(f, "\n{what}: {entry}")?;
            }
        }
        Ok(())
    }
}
