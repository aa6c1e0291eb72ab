//! The header of a safetensors file, as the tool reads it: it agrees with the `safetensors` crate about every file.
//!
//! The input is the header and the numbers, with a zero byte between them.

#![no_main]

use std::io::{Seek, Write};
use std::path::Path;

use burn_boft_fuzz::{safetensors_file, split};
use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;

// The tool is a program without a library, so these are its sources.
#[allow(dead_code)]
#[path = "../../cli/src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../cli/src/header.rs"]
mod header;

fuzz_target!(|bytes: &[u8]| {
    let (text, numbers) = split(bytes);
    let bytes = safetensors_file(text, numbers);
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&bytes).expect("room for the file");
    file.rewind().expect("a file can be rewound");
    let own = header::read(Path::new("file"), &mut file);
    match (own, SafeTensors::deserialize(&bytes)) {
        (Ok(own), Ok(theirs)) => check(&bytes, &own, &theirs),
        // The tool passes metadata on as it is, and the crate wants it to be text.
        (Ok(own), Err(error)) => assert!(own.metadata.is_some(), "the crate refuses it: {error}"),
        // Of tensors with the same name, the crate takes the last.
        (Err(error), Ok(_)) => assert!(
            error.line().ends_with("stands in the header twice"),
            "the tool refuses what the crate reads: {}",
            error.line()
        ),
        (Err(error), Err(_)) => {
            let line = error.line();
            assert!(!line.contains('\n'), "more than one line: {line}");
        }
    }
});

/// Compares what the tool reads with what the crate reads, and what the tool writes with what it has read.
fn check(bytes: &[u8], own: &header::Header, theirs: &SafeTensors) {
    assert_eq!(own.entries.len(), theirs.len());
    let mut data = bytes.len();
    for entry in &own.entries {
        let view = theirs.tensor(&entry.key).expect("the tool has found it");
        assert_eq!(
            (entry.dtype, &entry.shape[..]),
            (view.dtype(), view.shape())
        );
        let start = entry.start as usize;
        assert_eq!(&bytes[start..start + entry.bytes as usize], view.data());
        data = data.min(start);
    }
    let tensors = own.entries.iter();
    let tensors = tensors.map(|entry| (&entry.key[..], entry.dtype, &entry.shape[..]));
    let written = header::to_bytes(own.metadata.as_ref(), tensors);
    let mut written = written.expect("the sizes were read from a file");
    written.extend(&bytes[data..]);
    let again = SafeTensors::deserialize(&written).expect("the tool has written it");
    for entry in &own.entries {
        let (old, new) = (theirs.tensor(&entry.key), again.tensor(&entry.key));
        assert_eq!(old.unwrap().data(), new.unwrap().data());
    }
}
