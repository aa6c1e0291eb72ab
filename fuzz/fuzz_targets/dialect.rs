//! An adapter file of another program: it is refused with a reason, or read, and what is made of it is saved.
//!
//! The input is the header of the file and the numbers, with a zero byte between them. Offsets in the header are made to fit its
//! shapes.

#![no_main]

use std::fs;
use std::sync::LazyLock;

use burn_boft::dialects::AdapterFile;
use burn_boft_fuzz::{Scratch, fitted_safetensors_file, split};
use libfuzzer_sys::fuzz_target;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|bytes: &[u8]| {
    let (header, numbers) = split(bytes);
    let path = SCRATCH.folder("read").join("adapter.safetensors");
    let content = fitted_safetensors_file(header, numbers);
    fs::write(&path, content).expect("room for the file");
    let file = match AdapterFile::read(&path) {
        Ok(file) => file,
        Err(error) => {
            _ = error.to_string();
            return;
        }
    };
    _ = (file.program(), file.key_styles(), file.notes().concat());
    if let Err(error) = file.unplaced().save(SCRATCH.folder("written")) {
        _ = error.to_string();
    }
});
