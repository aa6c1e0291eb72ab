//! `merge`.

use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::json;

use crate::files::*;

/// Of the largest number in a tensor.
const TOLERANCE: f64 = 1e-5;

#[test]
fn merging_makes_what_peft_makes() {
    let cases = Case::all();
    assert!(cases.len() > 80, "the fixtures are there");
    for case in cases {
        let folder = case.folder();
        let arguments = [
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            case.adapter(),
            "--output",
            "merged.safetensors",
        ];
        succeed(folder.path(), &arguments);
        let merged = read(&folder.path().join("merged.safetensors"));
        assert_models(&merged, &case.merged, TOLERANCE, &case.name);
        assert_eq!(merged != case.base, case.changes(), "{}", case.name);
    }
}

#[test]
fn a_base_of_half_precision_keeps_it_and_is_rounded_once() {
    for name in [
        "cases/boft-conv-m2-b6",
        "cases/boft-mlp-bias-only-saved",
        "cases/oft-linear-neumann-5",
    ] {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut case = Case::open(name);
            let merge = |base: &Tensors| {
                let folder = tempfile::tempdir().unwrap();
                write(&folder.path().join("base.safetensors"), base);
                succeed(
                    folder.path(),
                    &[
                        "merge",
                        "--base",
                        "base.safetensors",
                        "--adapter",
                        case.adapter(),
                        "--output",
                        "out",
                    ],
                );
                read(&folder.path().join("out"))
            };
            let rounded = |base: &Tensors| -> Tensors {
                let tensors = base.iter();
                tensors
                    .map(|(key, tensor)| match tensor.dtype {
                        Dtype::F32 => (key.clone(), tensor.cast(dtype)),
                        _ => (key.clone(), tensor.clone()),
                    })
                    .collect()
            };
            let half = rounded(&case.base);
            let merged = merge(&half);
            let wide = half.iter().map(|(key, tensor)| match tensor.dtype {
                Dtype::I64 => (key.clone(), tensor.clone()),
                _ => (key.clone(), tensor.cast(Dtype::F32)),
            });
            let expected = rounded(&merge(&wide.collect()));
            assert_eq!(merged, expected, "{name} {dtype}");
            case.base = half;
            assert!(merged != case.base);
        }
    }
}

/// Blocks of one channel do not rotate, but PEFT scales with them: `W' = diag(s)·W`.
#[test]
fn a_scale_applies_where_blocks_of_one_channel_do_not_rotate() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (weight, scale) = (Tensor::random(&[4, 6], 1), Tensor::random(&[4, 1], 2));
    let base: Tensors = [("fc.weight".to_string(), weight.clone())].into();
    write(&path("base.safetensors"), &base);
    let config = json!({"peft_type": "BOFT", "boft_block_size": 1, "target_modules": ["fc"]});
    let tensors = [
        (
            "base_model.model.fc.boft_R",
            Tensor::random(&[1, 6, 1, 1], 3),
        ),
        ("base_model.model.fc.boft_s", scale.clone()),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write_adapter(&path("adapter"), &config, &tensors.into());
    let on = |command: &str, option: &str, input: &str, output: &str| {
        let arguments = [
            command,
            option,
            input,
            "--adapter",
            "adapter",
            "--output",
            output,
        ];
        let printed = succeed(folder.path(), &arguments);
        (printed, read(&path(output)))
    };
    let (printed, merged) = on("merge", "--base", "base.safetensors", "merged.safetensors");
    assert_eq!(printed, "merged.safetensors: 1 layer rotated\n");
    let numbers = weight.numbers.iter().zip(0..);
    let expected = numbers.map(|(x, at)| f64::from((*x as f32) * scale.numbers[at / 6] as f32));
    let expected = Tensor::new(&[4, 6], expected.collect());
    assert_eq!(merged["fc.weight"], expected);
    assert!(difference(&expected, &weight) > 0.5);

    let (_, restored) = on(
        "unmerge",
        "--merged",
        "merged.safetensors",
        "restored.safetensors",
    );
    assert!(difference(&restored["fc.weight"], &weight) < 1e-6);

    let record = ["convert", "adapter", "--to", "record", "--output", "a.bpk"];
    let refused = run(folder.path(), &record);
    assert_eq!(refused.code, 2);
    let line = "error: `fc` has blocks of one channel and a scale, which no injected layer has alone; merge it\n";
    assert!(refused.stderr.ends_with(line), "{}", refused.stderr);
}

#[test]
fn what_an_adapter_promises_and_lacks_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 2, "boft_n_butterfly_factor": 2, "bias": "all",
        "target_modules": ["fc", "fc2"], "modules_to_save": ["classifier"]
    });
    let tensors = [
        (
            "base_model.model.fc.boft_R",
            Tensor::random(&[1, 3, 2, 2], 3),
        ),
        ("base_model.model.fc.boft_s", Tensor::random(&[4, 1], 2)),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write_adapter(&folder.path().join("adapter"), &config, &tensors.into());
    let base = [("fc.weight".to_string(), Tensor::random(&[4, 6], 1))].into();
    write(&folder.path().join("base.safetensors"), &base);
    let expected = "\
note: `fc` has 1 factor, not the 2 of the configuration: PEFT without its CUDA kernel trains one and does not say so
warning: `target_modules` names `fc2`, and the file has no adapter of it
warning: `modules_to_save` names `classifier`, and the file has nothing of it
warning: the configuration trains biases, and the file has none: the layers have none, or PEFT 0.20 or older trained \
them and did not save them
";
    let merge = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        "adapter",
    ];
    for arguments in [
        &[&merge[..], &["--output", "merged.safetensors"]].concat()[..],
        &[&merge[..], &["--dry-run"]].concat(),
        &["inspect", "adapter"],
        &["convert", "adapter", "--to", "peft", "--output", "new"],
    ] {
        let run = run(folder.path(), arguments);
        assert_eq!(
            (run.code, run.stderr.as_str()),
            (0, expected),
            "{arguments:?}"
        );
    }
    let written = read_json(&folder.path().join("new/adapter_config.json"));
    assert_eq!(written["modules_to_save"], json!(["classifier"]));
}

/// The models of a case in two shards, with what else a folder holds.
fn sharded(case: &Case, folder: &Path) {
    let middle = case.base.len() / 2;
    let key = case.base.keys().nth(middle).unwrap().clone();
    let mut first = case.base.clone();
    let second = first.split_off(&key);
    write_shards(folder, &[first, second]);
    fs::create_dir_all(folder.join("tokenizer")).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("tokenizer/vocabulary.txt"), "a b").unwrap();
}

#[test]
fn shards_come_out_as_they_went_in_and_other_files_go_along() {
    let case = Case::open("cases/boft-mlp-bias-all-saved");
    let folder = tempfile::tempdir().unwrap();
    let (base, merged) = (folder.path().join("base"), folder.path().join("merged"));
    sharded(&case, &base);
    // These would be the model before the merge, or the merge once more.
    for weights in [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "diffusion_pytorch_model.bin",
        "consolidated.00.pth",
        "model.pt",
        "model.ckpt",
        "model.onnx",
        "model-Q4.gguf",
        "rust_model.ot",
        "tf_model.h5",
        "tf_model.h5.index.json",
        "flax_model.msgpack",
        "tokenizer/model.onnx",
    ] {
        fs::write(base.join(weights), "weights").unwrap();
    }
    fs::write(base.join("adapter_config.json"), "{}").unwrap();
    fs::write(base.join("adapter_model.safetensors"), "").unwrap();
    succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "base",
            "--adapter",
            case.adapter(),
            "--output",
            "merged",
        ],
    );
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    assert_eq!(
        names(&merged),
        [
            "config.json",
            shards[0],
            shards[1],
            "model.safetensors.index.json",
            "tokenizer"
        ]
    );
    assert_eq!(
        fs::read_to_string(merged.join("tokenizer/vocabulary.txt")).unwrap(),
        "a b"
    );
    assert_eq!(names(&merged.join("tokenizer")), ["vocabulary.txt"]);
    let index = "model.safetensors.index.json";
    assert_eq!(read_json(&merged.join(index)), read_json(&base.join(index)));
    let mut found = Tensors::new();
    for shard in shards {
        let (before, after) = (read(&base.join(shard)), read(&merged.join(shard)));
        assert!(before.keys().eq(after.keys()));
        found.extend(after);
    }
    assert_models(&found, &case.merged, TOLERANCE, "sharded");
    assert_eq!(names(folder.path()), ["base", "merged"]);
}

#[test]
fn a_new_head_is_added_and_one_for_other_classes_takes_the_place_of_the_old() {
    let case = Case::open("cases/boft-mlp-saved-classifier");
    let folder = tempfile::tempdir().unwrap();
    let index = |name: &str| {
        read_json(
            &folder
                .path()
                .join(name)
                .join("model.safetensors.index.json"),
        )
    };
    let file = |name: &str, shard: usize| {
        folder
            .path()
            .join(name)
            .join(format!("model-0000{shard}-of-00002.safetensors"))
    };

    let mut headless = case.base.clone();
    headless.retain(|key, _| !key.starts_with("classifier."));
    let headless = Case {
        base: headless,
        ..Case::open(&case.name)
    };
    sharded(&headless, &folder.path().join("base"));
    // As transformers 5 writes it, and tied: the count is not what the shards hold.
    let mut counted = index("base");
    counted["metadata"]["total_parameters"] = json!(1000);
    let path = folder.path().join("base/model.safetensors.index.json");
    write_json(&path, &counted);
    let printed = succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "base",
            "--adapter",
            case.adapter(),
            "--output",
            "merged",
        ],
    );
    assert_eq!(printed, "merged: 2 layers rotated, 2 tensors added\n");
    let last = read(&file("merged", 2));
    for key in ["classifier.weight", "classifier.bias"] {
        assert_eq!(last[key], case.merged[key]);
        assert_eq!(
            index("merged")["weight_map"][key],
            "model-00002-of-00002.safetensors"
        );
    }
    let added = 5 * 16 + 5;
    let total = |name: &str, what: &str| index(name)["metadata"][what].as_u64().unwrap();
    let size = "total_size";
    assert_eq!(total("merged", size), total("base", size) + 4 * added);
    assert_eq!(total("merged", "total_parameters"), 1000 + added);

    let mut other = case.base.clone();
    other.insert("classifier.weight".into(), Tensor::random(&[7, 16], 1));
    other.insert("classifier.bias".into(), Tensor::random(&[7], 2));
    write(&folder.path().join("other.safetensors"), &other);
    succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "other.safetensors",
            "--adapter",
            case.adapter(),
            "--output",
            "other-merged.safetensors",
        ],
    );
    assert_models(
        &read(&folder.path().join("other-merged.safetensors")),
        &case.merged,
        TOLERANCE,
        "another head",
    );
}

#[test]
fn a_dry_run_says_what_would_change_and_writes_nothing() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let printed = succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            case.adapter(),
            "--dry-run",
        ],
    );
    assert_eq!(
        printed,
        "\
classifier.bias    [5] F32       base.safetensors  replace
classifier.weight  [5, 16] F32   base.safetensors  replace
fc1.bias           [20] F32      base.safetensors  replace
fc1.weight         [20, 24] F32  base.safetensors  rotate block size 4, 1 factor, scale
fc2.bias           [16] F32      base.safetensors  replace
fc2.weight         [16, 20] F32  base.safetensors  rotate block size 4, 1 factor, scale
2 layers to rotate, 4 tensors to replace
"
    );
    assert_eq!(names(folder.path()), ["base.safetensors"]);
}

#[test]
fn rules_bridge_names() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let rename = |tensors: &Tensors| -> Tensors {
        let tensors = tensors.iter();
        tensors
            .map(|(key, tensor)| {
                (
                    format!("model.{}", key.replace("fc", "dense.")),
                    tensor.clone(),
                )
            })
            .collect()
    };
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("base.safetensors"), &rename(&case.base));
    let arguments = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        case.adapter(),
        "--output",
        "merged.safetensors",
        "--map",
        "^(?=[fnc])=model.",
        "--map",
        r"fc(\d)=dense.$1",
    ];
    succeed(folder.path(), &arguments);
    let merged = read(&folder.path().join("merged.safetensors"));
    assert_models(&merged, &rename(&case.merged), TOLERANCE, "renamed");
}

/// The fixtures of DINOv2 that PEFT and transformers wrote.
fn dinov2() -> std::path::PathBuf {
    fixtures().join("dinov2")
}

#[test]
fn dinov2_is_merged_under_the_names_of_both_transformers_with_and_without_its_prefix() {
    let fixtures = dinov2();
    let bare = |tensors: Tensors| -> Tensors {
        let tensors = tensors.into_iter();
        tensors
            .map(|(key, tensor)| (key.trim_start_matches("dinov2.").to_string(), tensor))
            .collect()
    };
    let (base, merged) = (
        read(&fixtures.join("base.safetensors")),
        read(&fixtures.join("merged.safetensors")),
    );
    for (base, merged) in [(base.clone(), merged.clone()), (bare(base), bare(merged))] {
        for version in ["transformers-4", "transformers-5"] {
            let folder = tempfile::tempdir().unwrap();
            write(&folder.path().join("base.safetensors"), &base);
            let adapter = fixtures.join(version);
            succeed(
                folder.path(),
                &[
                    "merge",
                    "--base",
                    "base.safetensors",
                    "--adapter",
                    adapter.to_str().unwrap(),
                    "--map",
                    "dinov2",
                    "--output",
                    "out.safetensors",
                ],
            );
            assert_models(
                &read(&folder.path().join("out.safetensors")),
                &merged,
                TOLERANCE,
                version,
            );
        }
    }
}

#[test]
fn two_rotations_in_one_fused_layer_are_merged_half_by_half() {
    let fixtures = dinov2();
    let folder = tempfile::tempdir().unwrap();
    let (layer, prefix) = ("dinov2.encoder.layer.0.mlp", "base_model.model.");
    let mut adapter = read(&fixtures.join("transformers-5/adapter_model.safetensors"));
    let key = |part: &str, tensor: &str| format!("{prefix}{layer}.{part}.{tensor}");
    adapter.insert(key("up_proj", "boft_R"), Tensor::random(&[1, 3, 4, 4], 5));
    let config = read_json(&fixtures.join("transformers-5/adapter_config.json"));
    write_adapter(&folder.path().join("adapter"), &config, &adapter);
    let base = read(&fixtures.join("base.safetensors"));
    write(&folder.path().join("base.safetensors"), &base);
    succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter",
            "--map",
            "dinov2",
            "--output",
            "merged.safetensors",
        ],
    );
    let found =
        &read(&folder.path().join("merged.safetensors"))[&format!("{layer}.weights_in.weight")];

    // Each half as a layer of its own.
    let mut expected = Vec::new();
    let whole = &base[&format!("{layer}.weights_in.weight")].numbers;
    for (part, numbers) in ["gate_proj", "up_proj"].iter().zip(whole.chunks(16 * 12)) {
        let tensors = ["boft_R", "boft_s"].map(|tensor| {
            (
                format!("{prefix}{part}.{tensor}"),
                adapter[&key(part, tensor)].clone(),
            )
        });
        let mut config = config.clone();
        config["bias"] = json!("none");
        config["modules_to_save"] = json!(null);
        write_adapter(&folder.path().join(part), &config, &tensors.into());
        let base = [(
            format!("{part}.weight"),
            Tensor::new(&[16, 12], numbers.to_vec()),
        )]
        .into();
        write(&folder.path().join("half.safetensors"), &base);
        let output = format!("{part}.safetensors");
        succeed(
            folder.path(),
            &[
                "merge",
                "--base",
                "half.safetensors",
                "--adapter",
                part,
                "--output",
                &output,
            ],
        );
        expected.extend(
            read(&folder.path().join(output))[&format!("{part}.weight")]
                .numbers
                .clone(),
        );
    }
    assert_eq!(found.numbers, expected);
    let peft = &read(&fixtures.join("merged.safetensors"))[&format!("{layer}.weights_in.weight")];
    let half = |numbers: &[f64], half: usize| {
        Tensor::new(
            &[16, 12],
            numbers[half * 16 * 12..(half + 1) * 16 * 12].to_vec(),
        )
    };
    let off = |part: usize| difference(&half(&expected, part), &half(&peft.numbers, part));
    assert!(off(0) < TOLERANCE, "the first half is PEFT's");
    assert!(off(1) > 0.01, "the second half is turned differently");
}

/// The most memory that merging took, by the kernel's count.
#[cfg(target_os = "linux")]
fn peak_of_merge(folder: &Path) -> u64 {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_burn-boft"))
        .args([
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter",
            "--output",
            "/dev/null",
        ])
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
#[cfg(target_os = "linux")]
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

#[cfg(target_os = "linux")]
#[test]
fn a_saved_module_is_in_memory_once_when_it_is_written() {
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
    let peak = peak_of_merge(folder.path());
    let bound = 2 * 4 * (WIDTHS[0] * WIDTHS[1]) as u64 + (200 << 20);
    assert!(peak < bound, "{} of {} MiB", peak >> 20, bound >> 20);
}

#[cfg(target_os = "linux")]
#[test]
fn memory_stays_small_whatever_the_size_of_the_model() {
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
    let peak = peak_of_merge(folder.path());
    assert!(peak > 1 << 20, "the count is read");
    assert!(peak < 200 << 20, "merging 768 MiB took {} MiB", peak >> 20);
}
