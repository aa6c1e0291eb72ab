//! An adapter's folder: it is refused with a reason, or loaded, and what is saved of it loads as the same.
//!
//! The input is the settings, the header of the tensors' file and the numbers, with a zero byte after the first two. Offsets in the
//! header are made to fit its shapes.

#![no_main]

use std::sync::LazyLock;

use burn_boft::peft::{LoadOptions, SaveOptions};
use burn_boft::{Adapter, KeyMap, Transformers};
use burn_boft_fuzz::{Scratch, assert_same_files, fitted_safetensors_file, split};
use libfuzzer_sys::fuzz_target;

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);
/// Compiling the patterns takes longer than everything else.
static NAMES: LazyLock<[KeyMap; 2]> =
    LazyLock::new(|| [Transformers::V4, Transformers::V5].map(KeyMap::dinov2));

fuzz_target!(|bytes: &[u8]| {
    let (settings, rest) = split(bytes);
    let (header, numbers) = split(rest);
    let folder = SCRATCH.adapter(settings, &fitted_safetensors_file(header, numbers));

    for names in NAMES.iter() {
        let options = LoadOptions::new()
            .with_key_map(names.clone())
            .allow_partial(true);
        match Adapter::load_with(&folder, &options) {
            Ok((adapter, report)) => {
                _ = report.to_string();
                let options = SaveOptions::new().with_key_map(names.clone());
                _ = adapter.save_with(SCRATCH.folder("written"), &options);
            }
            Err(error) => _ = error.to_string(),
        }
    }

    let (adapter, report) = match Adapter::load(&folder) {
        Ok(loaded) => loaded,
        Err(error) => {
            _ = error.to_string();
            return;
        }
    };
    _ = report.to_string();
    _ = adapter.is_orthogonal();
    let (written, again) = (SCRATCH.folder("written"), SCRATCH.folder("again"));
    if let Err(error) = adapter.save(&written) {
        _ = error.to_string();
        return;
    }
    let (adapter, _) = Adapter::load(&written).expect("it was saved so");
    adapter.save(&again).expect("it was saved before");
    assert_same_files(&written, &again);
});
