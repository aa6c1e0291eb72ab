//! Reading pictures beside Pillow and `transformers`, on what `fixtures/images/make.py` wrote; scanning folders; loading.

mod common;
mod decoding;
mod folders;
mod loading;
