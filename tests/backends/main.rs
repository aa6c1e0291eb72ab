//! What works where: every kind of layer on every device and in every precision, from the injection to the merged model.
//!
//! Without more said, the suite runs on all backends of the build. `BURN_DEVICE` chooses one of them, and Burn panics if
//! the build does not have it. The tables in the documentation are read back, and written with `BURN_BOFT_TABLES=write`.

#[path = "../common/mod.rs"]
mod common;

mod cell;
mod layers;
mod mixed;
mod precision;
mod table;

/// A test that names the device cannot pass on another one: run it with `--nocapture` to see the name.
#[test]
fn every_device_has_a_name() {
    for (backend, device) in common::kernel_devices() {
        println!("{backend}: {}", adapter(&device));
        if let Ok(expected) = std::env::var("EXPECT_ADAPTER") {
            let found = adapter(&device);
            assert!(
                found.contains(&expected),
                "expected {expected}, found {found}"
            );
        }
    }
}

/// The hardware behind a device, as its driver calls it.
fn adapter(device: &burn::tensor::Device) -> String {
    #[cfg(feature = "cubecl")]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    let name = format!("{device:?}");
    name.trim_start_matches("Device<")
        .trim_end_matches('>')
        .to_string()
}
