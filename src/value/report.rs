//! [`LoadReport`]: what a load did.

use std::fmt::{self, Display, Formatter};

/// What [`Adapter::load`](crate::Adapter::load) or [`Adapter::attach_partial`](crate::Adapter::attach_partial)
/// did. `Display` has one line per entry but the applied ones, which it counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// What was used: keys of the file, or parameters of the model.
    pub applied: Vec<String>,
    /// What should be there and is not. Empty unless a partial load was asked for.
    pub missing: Vec<String>,
    /// What is there and has no place, with the reason. Empty unless a partial load was asked for.
    pub unexpected: Vec<String>,
    /// What was read as something else than the file says, and why.
    pub converted: Vec<String>,
    /// What was read as it is and may surprise.
    pub warnings: Vec<String>,
}

impl Display for LoadReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors applied", self.applied.len())?;
        let lines = [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("converted", &self.converted),
            ("warning", &self.warnings),
        ];
        for (what, entries) in lines {
            for entry in entries {
                write!(f, "\n{what}: {entry}")?;
            }
        }
        Ok(())
    }
}
