//! `convert` to a folder of PEFT: the current layout, OFT, BOFT.

use std::path::Path;

use serde_json::json;

use crate::files::*;

#[test]
fn an_adapter_of_any_version_is_rewritten_in_the_current_layout() {
    let mut converted = 0;
    for case in Case::all() {
        let folder = case.folder();
        let convert = convert_command(case.adapter(), "peft", "new");
        // What 0.14 and 0.15 wrote does not tell a convolution from a linear layer.
        let is_square = case.name.contains("old/oft-square");
        if is_square {
            let line = run(folder.path(), &convert).stderr;
            assert!(
                line.ends_with("pass --base so that the layer type can be looked up\n"),
                "{line}"
            );
        }
        let base: &[&str] = if is_square {
            &["--base", "base.safetensors"]
        } else {
            &[]
        };
        let run = run(folder.path(), &[&convert, base].concat());
        assert_eq!(run.code, 0, "{}: {}", case.name, run.stderr);
        let keys = read(&folder.path().join("new/adapter_model.safetensors"));
        assert!(
            !keys
                .keys()
                .any(|key| key.ends_with("boft_P") || key.contains("oft_r.")),
            "{}",
            case.name
        );
        assert_models(
            &merged(folder.path(), "new"),
            &case.merged,
            1e-5,
            &case.name,
        );
        converted += 1;
    }
    assert!(converted > 80);
}

#[test]
fn blocks_of_one_channel_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": false, "target_modules": ["fc"]});
    let tensors = [(
        "base_model.model.fc.oft_R.weight".to_string(),
        Tensor::new(&[7, 0], Vec::new()),
    )];
    write_adapter(&folder.path().join("idle"), &config, &tensors.into());
    let base = [("fc.weight".to_string(), Tensor::random(&[5, 7], 1))].into();
    write(&folder.path().join("base.safetensors"), &base);
    let printed = succeed(
        folder.path(),
        &merge_command("base.safetensors", "idle", "merged.safetensors"),
    );
    assert_eq!(
        printed,
        "merged.safetensors: 0 layers rotated, 1 layer with blocks of one channel left as is\n"
    );
    assert_eq!(read(&folder.path().join("merged.safetensors")), base);
    succeed(
        folder.path(),
        &convert_for("base.safetensors", "idle", "boft", "boft"),
    );
    assert_eq!(merged(folder.path(), "boft"), base);
}

/// A LoRA has no part for such a layer, so PEFT looks for the bias at the layer itself. A record has nothing that says that the
/// bias belongs to the adapter.
#[test]
fn a_trained_bias_of_a_layer_that_does_not_rotate_is_kept_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": false, "target_modules": ["up", "down"],
        "bias": "oft_only"
    });
    let key = |name: &str| format!("base_model.model.{name}");
    let tensors = [
        (key("up.oft_R.weight"), Tensor::random(&[2, 3], 1)),
        (key("up.base_layer.bias"), Tensor::random(&[8], 2)),
        (key("down.oft_R.weight"), Tensor::new(&[7, 0], Vec::new())),
        (key("down.base_layer.bias"), Tensor::random(&[5], 3)),
    ];
    let tensors: Tensors = tensors.into();
    write_adapter(&folder.path().join("adapter"), &config, &tensors);
    let base = [("up.weight", [8, 6], 4), ("down.weight", [5, 7], 5)]
        .map(|(name, shape, seed)| (name.to_string(), Tensor::random(&shape, seed)));
    let biases = [("up.bias", 8, 6), ("down.bias", 5, 7)];
    let biases = biases.map(|(name, size, seed)| (name.to_string(), Tensor::random(&[size], seed)));
    let base = base.into_iter().chain(biases).collect();
    write(&folder.path().join("base.safetensors"), &base);
    let convert = [
        "convert",
        "adapter",
        "--base",
        "base.safetensors",
        "--output",
    ];
    succeed(
        folder.path(),
        &[&convert[..], &["lora", "--to-lora", "2"]].concat(),
    );
    let lora = read(&folder.path().join("lora/adapter_model.safetensors"));
    assert_eq!(
        lora[&key("down.bias")],
        tensors[&key("down.base_layer.bias")]
    );
    assert_eq!(
        lora[&key("up.base_layer.bias")],
        tensors[&key("up.base_layer.bias")]
    );
    let record = run(
        folder.path(),
        &[&convert[..], &["adapter.bpk", "--to", "record"]].concat(),
    );
    assert_eq!(record.code, 2);
    assert_eq!(
        record.stderr.lines().last().unwrap(),
        "error: `down` has blocks of one channel, which do not rotate, and a bias of its own, which a record cannot say; keep the \
         adapter in PEFT's folder, or merge it"
    );
    assert_eq!(
        names(folder.path()),
        ["adapter", "base.safetensors", "lora"]
    );
}

#[test]
fn oft_with_the_exact_map_is_boft_with_one_factor_and_a_scale_of_ones() {
    for name in [
        "oft-linear-exact-b4",
        "oft-linear-exact-b5",
        "oft-conv-exact-b4",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        succeed(
            folder.path(),
            &convert_for("base.safetensors", case.adapter(), "boft", "boft"),
        );
        assert_models(&merged(folder.path(), "boft"), &case.merged, 1e-5, name);
        let printed = succeed(folder.path(), &convert_command("boft", "oft", "oft"));
        assert_eq!(printed, "oft: 1 layer\n");
        assert_models(&merged(folder.path(), "oft"), &case.merged, 1e-5, name);
        let numbers = |folder: &Path| read(&folder.join("adapter_model.safetensors"));
        assert_eq!(
            numbers(&folder.path().join("oft")),
            numbers(&case.adapter),
            "{name}"
        );
    }
}

/// PEFT 0.14 and 0.15 wrote one block for a layer on request, and it is read as BOFT, which has no such setting.
#[test]
fn a_block_that_a_layer_shares_stays_one_or_is_refused() {
    let case = Case::open("old/oft-square-share");
    let folder = case.folder();
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    for (key, tensor) in &mut tensors {
        if key.ends_with("oft_s") {
            tensor.numbers.fill(1.0);
        }
    }
    let config = read_json(&case.adapter.join("adapter_config.json"));
    write_adapter(&folder.path().join("shared"), &config, &tensors);
    let convert = |input: &str, to: &str, output: &str| {
        let arguments = [
            "convert",
            input,
            "--to",
            to,
            "--output",
            output,
            "--base",
            "base.safetensors",
        ];
        run(folder.path(), &arguments)
    };
    assert_eq!(convert("shared", "oft", "oft").code, 0);
    let settings = read_json(&folder.path().join("oft/adapter_config.json"));
    assert_eq!(settings["block_share"], true);
    let expected = merged(folder.path(), "shared");
    assert_models(&merged(folder.path(), "oft"), &expected, 1e-6, "oft");
    assert!(expected != case.base);

    let refused = convert("shared", "record", "a.bpk");
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.ends_with(
            "error: `layer` has one block for all its channels, as PEFT 0.14 and 0.15 shared it, and BOFT's settings \
             cannot say that; convert it with --to peft --base first\n"
        ),
        "{}",
        refused.stderr
    );
    for (input, to, output) in [
        ("shared", "peft", "whole"),
        ("whole", "record", "b.bpk"),
        ("b.bpk", "peft", "back"),
    ] {
        assert_eq!(convert(input, to, output).code, 0, "{input}");
    }
    assert_models(&merged(folder.path(), "back"), &expected, 1e-6, "record");
}

#[test]
fn a_conversion_that_would_change_the_model_is_refused() {
    for (name, to, expected) in [
        (
            "boft-linear-m2-b4",
            "oft",
            "`layer` has 2 factors, and OFT has one; convert it with --to-lora, or merge it",
        ),
        (
            "boft-linear-m1-b4",
            "oft",
            "and OFT has none; convert it with --to-lora, or merge it",
        ),
        (
            "oft-linear-exact-b4",
            "oft",
            "the adapter is an OFT adapter already",
        ),
        (
            "boft-linear-m1-b4",
            "boft",
            "the adapter is a BOFT adapter already",
        ),
        (
            "oft-linear-neumann-5",
            "boft",
            "the adapter uses the Neumann polynomial of 5 terms, and BOFT the exact one; convert it with --to-lora, or \
             merge it",
        ),
        (
            "oft-linear-coft-on",
            "boft",
            "the adapter is bound to a COFT radius, and BOFT has none; convert it with --to-lora, or merge it",
        ),
        (
            "oft-text-exact-b4",
            "boft",
            "`embedding` is an embedding, and BOFT adapts none; merge the adapter instead",
        ),
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        let line = refused(
            folder.path(),
            &convert_for("base.safetensors", case.adapter(), to, "out"),
        );
        assert!(line.ends_with(expected), "{name}: {line}");
        assert_eq!(names(folder.path()), ["base.safetensors"]);
    }
    let case = Case::open("cases/oft-linear-exact-b4");
    let folder = case.folder();
    assert_eq!(
        refused(
            folder.path(),
            &convert_command(case.adapter(), "boft", "out")
        ),
        "--to boft needs --base, the model that the adapter is for"
    );
}

#[test]
fn a_weight_without_numbers_is_refused_whatever_its_axes_say() {
    let folder = tempfile::tempdir().unwrap();
    // One block for all, and blocks of one channel.
    let shared = json!({
        "peft_type": "OFT", "oft_block_size": 4, "block_share": true, "use_cayley_neumann": false,
        "target_modules": ["fc"]
    });
    let idle = json!({"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": false, "target_modules": ["fc"]});
    let base = [(
        "fc.weight".to_string(),
        Tensor::new(&[0, 1 << 62], Vec::new()),
    )];
    write(&folder.path().join("base.safetensors"), &base.into());
    let blocks = Tensor::random(&[1, 6], 1);
    let no_numbers = "error: base.safetensors: `fc.weight` has the shape [0, 4611686018427387904], which holds no numbers";
    let too_wide = "error: adapter/adapter_model.safetensors: wrong: `base_model.model.fc.oft_R.weight` is \
                    [4611686018427387904, 0]: no layer has 4611686018427387904 blocks of 1 channels";
    let empty = Tensor::new(&[1 << 62, 0], Vec::new());
    for (config, blocks, to, line) in [
        (&shared, &blocks, ["--to", "boft"], no_numbers),
        (&shared, &blocks, ["--to-lora", "2"], no_numbers),
        (&idle, &empty, ["--to", "boft"], too_wide),
    ] {
        let key = "base_model.model.fc.oft_R.weight".to_string();
        write_adapter(
            &folder.path().join("adapter"),
            config,
            &[(key, blocks.clone())].into(),
        );
        let convert = [
            "convert",
            "adapter",
            "--base",
            "base.safetensors",
            "--output",
            "out",
        ];
        let run = run(folder.path(), &[&convert, &to[..]].concat());
        assert_eq!(
            (run.code, run.stderr.lines().last()),
            (2, Some(line)),
            "{to:?}"
        );
    }
}
