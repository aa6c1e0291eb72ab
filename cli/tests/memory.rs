//! How much memory merging takes.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::files::*;

/// The most memory that merging took, by the kernel's count, with these options beside the usual ones.
fn peak_of_merge(folder: &Path, options: &[&str]) -> u64 {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_burn-boft"))
        .args(merge_command("base.safetensors", "adapter", "/dev/null"))
        .args(options)
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(kib.unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    peak * 1024
}

/// Writes zeros that take no room on the disk.
fn write_zeros(path: &Path, tensors: impl Iterator<Item = (String, [usize; 2])>) {
    let mut end = 0;
    let entries = tensors.map(|(key, [rows, columns])| {
        let start = end;
        end += 4 * rows * columns;
        let entry = json!({"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]});
        (key, entry)
    });
    let header = serde_json::Value::Object(entries.collect()).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(path, &bytes).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();
}

#[test]
fn a_saved_module_is_held_in_memory_only_once() {
    const WIDTHS: [usize; 2] = [32768, 2048];
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    let (layer, head) = ("fc.weight".to_string(), "lm_head.weight".to_string());
    let base = [(layer, [8, 8]), (head.clone(), WIDTHS)];
    write_zeros(&folder.path().join("base.safetensors"), base.into_iter());
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["fc"],
        "modules_to_save": ["lm_head"]
    });
    write_adapter(&adapter, &config, &Tensors::new());
    let own = [("fc.oft_R.weight".to_string(), [2, 6]), (head, WIDTHS)];
    let own = own.map(|(key, shape)| (format!("base_model.model.{key}"), shape));
    write_zeros(&adapter.join("adapter_model.safetensors"), own.into_iter());
    let peak = peak_of_merge(folder.path(), &[]);
    let bound = 2 * 4 * (WIDTHS[0] * WIDTHS[1]) as u64 + (200 << 20);
    assert!(peak < bound, "{} of {} MiB", peak >> 20, bound >> 20);
}

#[test]
fn merging_a_large_model_takes_little_memory() {
    const LAYERS: usize = 12;
    const WIDTHS: [usize; 2] = [8192, 2048];
    let folder = tempfile::tempdir().unwrap();
    let base = (0..LAYERS).map(|layer| (format!("{layer}.weight"), WIDTHS));
    write_zeros(&folder.path().join("base.safetensors"), base);

    let config = json!({"peft_type": "BOFT", "boft_block_size": 4, "target_modules": "all-linear"});
    let adapter = (0..LAYERS).flat_map(|layer| {
        let key = |name: &str| format!("base_model.model.{layer}.{name}");
        [
            (key("boft_R"), Tensor::random(&[1, WIDTHS[1] / 4, 4, 4], 1)),
            (key("boft_s"), Tensor::random(&[WIDTHS[0], 1], 2)),
        ]
    });
    write_adapter(&folder.path().join("adapter"), &config, &adapter.collect());
    let peak = peak_of_merge(folder.path(), &[]);
    assert!(peak > 1 << 20, "the count is read");
    assert!(peak < 200 << 20, "merging 768 MiB took {} MiB", peak >> 20);
    // Every adapter is in memory, and of the model no more than before.
    let several = peak_of_merge(folder.path(), &["--adapter=adapter"; 4]);
    let one = (WIDTHS[0] * 4 + WIDTHS[1] * 4 * 4) * LAYERS;
    let bound = peak + 4 * (4 * one as u64) + (16 << 20);
    assert!(
        several < bound,
        "merging five adapters took {} MiB, and one took {}",
        several >> 20,
        peak >> 20
    );
    // The check holds the change of one layer in f32, and a copy of it on the way.
    let checked = peak_of_merge(folder.path(), &["--quantize-check"]);
    let bound = peak + 2 * 4 * (WIDTHS[0] * WIDTHS[1]) as u64 + (16 << 20);
    assert!(
        checked < bound,
        "the check took {} MiB, and the merge {}",
        checked >> 20,
        peak >> 20
    );
}
