//! burn-boft on models that other people wrote, taken from the registry as they are.
//!
//! [`entries`] lists the models. Each has a file in `models/` that says how it is built, at tiny sizes, and which of its
//! layers are adapted. [`check`] makes the same assertions about all of them.

mod check;
pub mod models;
mod numbers;

pub use check::{Failure, Method, Row, Subject, check, table};
pub use models::{Entry, entries};
