//! Models and adapters of Python, and what is written for Python, on the fixtures that `fixtures/weights/make.py` and
//! `fixtures/make.py` wrote.

mod adapters;
mod common;
mod mistakes;
mod models;
mod published;
mod python;
mod saved;
