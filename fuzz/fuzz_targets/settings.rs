//! `adapter_config.json`: whatever it says is refused with a reason, or read, and what is written is read back.

#![no_main]

use burn::module::Module;
use burn_boft::{AdapterConfig, plan};
use libfuzzer_sys::fuzz_target;

/// A model without layers. Patterns and names are compiled for it as for any other.
#[derive(Module, Debug)]
struct Empty {}

fuzz_target!(|settings: &[u8]| {
    let config: AdapterConfig = match serde_json::from_slice(settings) {
        Ok(config) => config,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains('\n'), "more than one line: {message}");
            return;
        }
    };
    _ = config.to_string();
    if let Err(error) = plan(&Empty {}, &config) {
        _ = error.to_string();
    }
    if let Ok(text) = serde_json::to_string(&config) {
        let read: AdapterConfig = serde_json::from_str(&text).expect("it was written so");
        assert_eq!(read, config, "what is read of {text}");
    }
});
