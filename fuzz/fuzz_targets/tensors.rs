//! `adapter_model.safetensors`, any bytes beside settings that are right: it is refused with a reason, or read, and what
//! is written of it is read as the same.

#![no_main]

use std::sync::LazyLock;

use burn_boft::Adapter;
use burn_boft::peft::Folder;
use burn_boft_fuzz::Scratch;
use libfuzzer_sys::fuzz_target;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

const SETTINGS: &str = r#"{"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2,
    "target_modules": ["query"], "bias": "boft_only", "modules_to_save": ["head"]}"#;

fuzz_target!(|bytes: &[u8]| {
    let path = SCRATCH.adapter(SETTINGS.as_bytes(), bytes);
    if let Err(error) = Adapter::load(&path) {
        _ = error.to_string();
    }
    match Folder::read(&path) {
        Ok(folder) => {
            let written = SCRATCH.folder("written");
            folder
                .write(&written)
                .expect("what was read can be written");
            let again = Folder::read(&written).expect("it was written so");
            // Numbers may be NaN, which equals nothing, so they are compared as they are printed.
            assert_eq!(folder.settings, again.settings);
            assert_eq!(folder.metadata, again.metadata);
            assert_eq!(
                format!("{:?}", folder.tensors),
                format!("{:?}", again.tensors)
            );
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains('\n') || message.len() < 100_000);
        }
    }
});
