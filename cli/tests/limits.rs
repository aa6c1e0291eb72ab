//! Inputs that would take minutes, gigabytes or for ever: refused, or done in time that grows with their size alone.

use std::fs;

use serde_json::json;

use crate::files::*;

/// The seconds of the processor that a run of the tool takes, which a busy machine stretches less than those of a clock.
#[cfg(target_os = "linux")]
fn seconds(folder: &std::path::Path, arguments: &[&str]) -> f64 {
    let output = std::process::Command::new("bash")
        .args([
            "-c",
            "TIMEFORMAT=%U; time \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_burn-boft"),
        ])
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{printed}");
    printed.lines().last().unwrap().parse().unwrap()
}

/// Asserts that a run on four times the input takes about four times as long, and not sixteen times.
#[cfg(target_os = "linux")]
fn assert_linear(mut run: impl FnMut(usize) -> f64, count: usize) {
    let (quarter, whole) = (run(count / 4), run(count));
    assert!(
        whole < 8.0 * quarter.max(0.1),
        "{quarter} s, then {whole} s"
    );
}

/// A named pipe blocks whoever opens it until somebody writes.
#[cfg(unix)]
#[test]
fn a_pipe_is_refused_by_name_wherever_a_file_is_read() {
    let place = MergeFolder::new();
    let path = place.path();
    let pipe = |name: &str| {
        let path = path.join(name);
        _ = fs::remove_file(&path);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&path, mode).unwrap();
    };
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    let refusal = |line: &str, name: &str| {
        assert_eq!(
            line,
            format!("{name} cannot be read: it is a pipe, and only files are read")
        );
    };
    pipe("pipe.safetensors");
    refusal(
        &place.refused_with(&["--base", "pipe.safetensors"]),
        "pipe.safetensors",
    );
    refusal(
        &refused(
            path,
            &convert_for("pipe.safetensors", "adapter", "boft", "out"),
        ),
        "pipe.safetensors",
    );
    for file in files {
        let name = format!("broken/{file}");
        place_adapter(&place, "broken");
        pipe(&name);
        refusal(&refused(path, &["inspect", "broken"]), &name);
    }
    refusal(
        &refused(path, &["inspect", "pipe.safetensors"]),
        "pipe.safetensors",
    );
    refusal(
        &place.refused_with(&["--adapter", "pipe.safetensors"]),
        "pipe.safetensors",
    );
    fs::create_dir(path.join("model")).unwrap();
    let base = ["--base", "model", "--output", "out"];
    write(&path.join("model/model.safetensors"), &place.base);
    pipe("model/config.json");
    refusal(&place.refused_with(&base), "model/config.json");
    fs::remove_file(path.join("model/config.json")).unwrap();
    pipe("model/model.safetensors.index.json");
    refusal(
        &place.refused_with(&base),
        "model/model.safetensors.index.json",
    );
    // A device has no end.
    assert_eq!(
        place.refused_with(&["--base", "/dev/zero"]),
        "/dev/zero cannot be read: it is a device, and only files are read"
    );
}

fn place_adapter(place: &MergeFolder, name: &str) {
    _ = fs::remove_dir_all(place.path().join(name));
    write_adapter(&place.path().join(name), &place.config, &place.tensors);
}

#[test]
fn headers_and_settings_longer_than_any_real_one_are_refused() {
    let place = MergeFolder::new();
    let long = |bytes: usize| " ".repeat(bytes);
    let header = 33 << 20;
    place.write_bytes(header, long(header as usize).as_bytes());
    assert_eq!(
        place.refused(),
        "base.safetensors cannot be read: its header has 34603008 bytes, and at most 32 MiB of it are read"
    );
    place.write_base(&place.base);
    let mut bytes = header.to_le_bytes().to_vec();
    bytes.extend(long(header as usize).as_bytes());
    fs::write(
        place.path().join("adapter/adapter_model.safetensors"),
        bytes,
    )
    .unwrap();
    assert_eq!(
        place.refused(),
        "adapter/adapter_model.safetensors cannot be read: its header has 34603008 bytes, and at most 32 MiB of it are read"
    );
    place.write_adapter(&place.config, &place.tensors);
    let targets: Vec<_> = (0..500_000)
        .map(|index| format!("layers.{index}.fc"))
        .collect();
    let mut config = place.config.clone();
    config["target_modules"] = json!(targets);
    place.write_adapter(&config, &place.tensors);
    let line = place.refused();
    let (start, end) = (
        "adapter/adapter_config.json cannot be read: it has ",
        " bytes, and at most 8 MiB of it are read",
    );
    assert!(line.starts_with(start) && line.ends_with(end), "{line}");
}

/// The largest took 4.4 s when each was compared with each.
#[cfg(target_os = "linux")]
#[test]
fn sixty_thousand_saved_modules_take_four_times_as_long_as_fifteen_thousand() {
    let place = MergeFolder::new();
    let merge = |count: usize| {
        let modules: Vec<_> = (0..count).map(|index| format!("norm{index}")).collect();
        let (mut config, mut tensors, mut base) = (
            place.config.clone(),
            place.tensors.clone(),
            place.base.clone(),
        );
        config["modules_to_save"] = json!(modules);
        for module in &modules {
            base.insert(format!("{module}.weight"), Tensor::new(&[1], vec![1.0]));
            let key = format!("base_model.model.{module}.weight");
            tensors.insert(key, Tensor::new(&[1], vec![2.0]));
        }
        place.write_adapter(&config, &tensors);
        place.write_base(&base);
        let output = format!("{count}.safetensors");
        let seconds = seconds(
            place.path(),
            &merge_command("base.safetensors", "adapter", &output),
        );
        let merged = read(&place.path().join(output));
        assert_eq!(merged[&format!("norm{}.weight", count - 1)].numbers, [2.0]);
        seconds
    };
    assert_linear(merge, 60_000);
}

/// The largest took 9.7 s when the layer of each bias was looked for among all.
#[cfg(target_os = "linux")]
#[test]
fn forty_thousand_layers_with_biases_take_four_times_as_long_as_ten_thousand() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 2, "use_cayley_neumann": false, "bias": "oft_only", "target_modules": ["fc"]
    });
    let convert = |count: usize| {
        let tensors = (0..count).flat_map(|layer| {
            let key = |tensor: &str| format!("base_model.model.{layer}.fc.{tensor}");
            [
                (key("oft_R.weight"), Tensor::new(&[1, 1], vec![0.5])),
                (key("base_layer.bias"), Tensor::new(&[3], vec![1.0; 3])),
            ]
        });
        let adapter = count.to_string();
        write_adapter(&folder.path().join(&adapter), &config, &tensors.collect());
        let output = format!("{adapter}-again");
        seconds(folder.path(), &convert_command(&adapter, "peft", &output))
    };
    assert_linear(convert, 40_000);
}

/// A rotation of that many channels, written out, would not fit any memory.
#[test]
fn a_weight_without_numbers_is_copied_however_wide_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let weight = |channels| {
        let weight = Tensor::new(&[0, channels], Vec::new());
        [("fc.weight".to_string(), weight)].into()
    };
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "block_share": true, "use_cayley_neumann": false,
        "target_modules": ["fc"]
    });
    let blocks = Tensor::random(&[1, 6], 1);
    let key = "base_model.model.fc.oft_R.weight".to_string();
    write_adapter(
        &folder.path().join("adapter"),
        &config,
        &[(key, blocks)].into(),
    );
    for channels in [1 << 40, 1 << 62] {
        let (base, output) = (format!("{channels}"), format!("{channels}-merged"));
        let paths = [base, output, format!("{channels}-restored")];
        let [base, merged, restored] = paths.each_ref().map(|name| format!("{name}.safetensors"));
        write(&folder.path().join(&base), &weight(channels));
        succeed(folder.path(), &merge_command(&base, "adapter", &merged));
        let unmerge = [
            "unmerge",
            "--merged",
            &merged,
            "--adapter",
            "adapter",
            "--output",
        ];
        succeed(folder.path(), &[&unmerge[..], &[&restored]].concat());
        for output in [merged, restored] {
            let shape = &read(&folder.path().join(output))["fc.weight"].shape;
            assert_eq!(shape, &[0, channels]);
        }
    }
}
