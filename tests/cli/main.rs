//! The tool `burn-boft`, run on small models and on what PEFT wrote.

mod convert;
mod failures;
mod files;
mod inspect;
mod merge;
mod unmerge;
