//! What becomes of every layer of `burn-nn`, and of every way in which a model can hold one: the rows of `docs/layers.md`.

#[path = "../common/mod.rs"]
mod common;

mod check;
mod convolutions;
mod embeddings;
mod others;
mod own;
mod sequences;
mod structures;
mod table;
mod tied;
