//! Adapters in models that a program wrote: what the example does, on models of other kinds.

// The helpers of the library's tests read every number of a model by its path.
#[path = "../../../tests/common/mod.rs"]
mod common;

mod convolution;
mod lifecycle;
mod program;
mod transformer;
