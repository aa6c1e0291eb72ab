//! The tool `burn-boft`, run on small models and on what PEFT wrote.

mod convert;
mod failures;
mod files;
mod inspect;
#[cfg(unix)]
mod interrupts;
mod merge;
mod tied;
mod unmerge;
