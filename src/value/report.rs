//! [`LoadReport`]: what a load did.

use std::fmt::{self, Display, Formatter};

use super::mismatch::{Missing, Unexpected};

/// What [`Adapter::load`](crate::Adapter::load) or [`Adapter::attach_partial`](crate::Adapter::attach_partial)
/// did. `Display` has one line per entry but the applied ones, which it counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// What was used: keys of the file, or parameters of the model.
    pub applied: Vec<String>,
    /// What should be there and is not. Empty unless a partial load was asked for.
    pub missing: Vec<Missing>,
    /// What is there and has no place, with the reason. Empty unless a partial load was asked for.
    pub unexpected: Vec<Unexpected>,
    /// What was read as something else than the file says, and why.
    pub converted: Vec<String>,
    /// What was read as it is and may surprise.
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
