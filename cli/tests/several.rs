//! Several adapters, merged in one pass over the model and taken out again.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::json;

use crate::dense::{Matrix, factor, packed_skews, rotation, skews};
use crate::files::*;

const PREFIX: &str = "base_model.model";

/// What a command writes to this file.
fn written(folder: &Path, command: &str, adapters: &[&str], output: &str) -> Tensors {
    let mut all = arguments(command, adapters);
    all.extend(["--output".to_string(), output.to_string()]);
    succeed(folder, &texts(&all));
    read(&folder.join(output))
}

fn refused_with(folder: &Path, command: &str, adapters: &[&str]) -> String {
    let before = names(folder);
    let line = refused(folder, &texts(&arguments(command, adapters)));
    assert_eq!(names(folder), before, "nothing is left behind");
    line
}

/// Merges one adapter after the other through files.
fn in_turn(folder: &Path, base: &str, adapters: &[(&str, &str)]) -> Tensors {
    let mut input = base.to_string();
    for (index, (adapter, options)) in adapters.iter().enumerate() {
        let output = format!("turn{index}-of-{}", names(folder).len());
        let command = format!("merge --base {input} {options}");
        written(folder, command.trim_end(), &[*adapter], &output);
        input = output;
    }
    read(&folder.join(input))
}

/// A model of two layers: `fc1` has 24 inputs and 10 outputs, and `fc2` 8 inputs and 6.
fn base() -> Tensors {
    let tensors = [
        ("fc1.weight", Tensor::random(&[10, 24], 1)),
        ("fc1.bias", Tensor::random(&[10], 2)),
        ("fc2.weight", Tensor::random(&[6, 8], 3)),
        ("fc2.bias", Tensor::random(&[6], 4)),
    ];
    tensors
        .map(|(key, tensor)| (key.to_string(), tensor))
        .into()
}

/// BOFT with two factors of `fc1`, a scale and the trained bias.
fn write_boft(folder: &Path, name: &str, seed: u64) -> Tensors {
    let mut scale = Tensor::random(&[10, 1], seed + 1);
    scale
        .numbers
        .iter_mut()
        .for_each(|s| *s = f64::from((*s + 1.0) as f32));
    let tensors = [
        ("boft_R", Tensor::random(&[2, 6, 4, 4], seed)),
        ("boft_s", scale),
        ("base_layer.bias", Tensor::random(&[10], seed + 2)),
    ];
    let tensors = tensors.map(|(name, tensor)| (format!("{PREFIX}.fc1.{name}"), tensor));
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["fc1"],
        "bias": "boft_only"
    });
    write_adapter(&folder.join(name), &config, &tensors.clone().into());
    tensors.into()
}

/// OFT of both layers, with PEFT's polynomial.
fn write_oft(folder: &Path, name: &str, seed: u64) -> Tensors {
    let small = |shape: &[usize], seed: u64| {
        let mut tensor = Tensor::random(shape, seed);
        tensor
            .numbers
            .iter_mut()
            .for_each(|x| *x = f64::from((*x * 0.4) as f32));
        tensor
    };
    let tensors = [
        ("fc1", small(&[8, 3], seed)),
        ("fc2", small(&[4, 1], seed + 1)),
    ];
    let tensors = tensors.map(|(name, tensor)| (format!("{PREFIX}.{name}.oft_R.weight"), tensor));
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 3, "target_modules": ["fc1", "fc2"], "peft_version": "0.21.2"
    });
    write_adapter(&folder.join(name), &config, &tensors.clone().into());
    tensors.into()
}

/// A folder with the model, and one adapter of each kind.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("base"), &base());
    write_boft(folder.path(), "boft", 10);
    write_oft(folder.path(), "oft", 20);
    folder
}

#[test]
fn one_pass_makes_what_one_merge_after_the_other_makes() {
    let place = place();
    let folder = place.path();
    let both = written(folder, "merge --base base", &["boft", "oft"], "both");
    let turns = in_turn(folder, "base", &[("boft", ""), ("oft", "")]);
    assert_models(&both, &turns, 1e-6, "boft, oft");
    let opposite = written(folder, "merge --base base", &["oft", "boft"], "opposite");
    let turns = in_turn(folder, "base", &[("oft", ""), ("boft", "")]);
    assert_models(&opposite, &turns, 1e-6, "oft, boft");
    assert!(difference(&both["fc1.weight"], &opposite["fc1.weight"]) > 0.01);
    assert_eq!(both["fc2.weight"], opposite["fc2.weight"]);

    // `diag(s)·W·R_BOFTᵀ·R_OFTᵀ`: the first is folded in first.
    let boft = read(&folder.join("boft/adapter_model.safetensors"));
    let oft = read(&folder.join("oft/adapter_model.safetensors"));
    let of = |tensors: &Tensors, name: &str| tensors[&format!("{PREFIX}.{name}")].clone();
    let first = rotation(&skews(&of(&boft, "fc1.boft_R")), 1.0);
    let q = packed_skews(&of(&oft, "fc1.oft_R.weight"), 3);
    let blocks: Vec<_> = q.iter().map(Matrix::neumann).collect();
    let second = factor(0, &blocks);
    let expected = Matrix::of(&base()["fc1.weight"])
        .times(&first.transposed())
        .times(&second.transposed())
        .with_rows_scaled(&of(&boft, "fc1.boft_s").numbers);
    assert!(difference(&both["fc1.weight"], &expected.tensor()) < 1e-6);
    assert_eq!(
        both["fc1.bias"].numbers,
        of(&boft, "fc1.base_layer.bias").numbers
    );
}

#[test]
fn each_adapter_has_its_own_strength_and_factors_where_they_are_given_for_each() {
    let place = place();
    let folder = place.path();
    let adapters = ["boft", "oft"];
    let each = "merge --base base --strength 0.5 --strength -1.5 --factors 2 --factors 1";
    let both = written(folder, each, &adapters, "each");
    let turns = [("boft", "--strength 0.5"), ("oft", "--strength -1.5")];
    assert_models(&both, &in_turn(folder, "base", &turns), 1e-6, "each");
    let one = "merge --base base --strength 0.5 --factors 1";
    let both = written(folder, one, &adapters, "one");
    let turns = [
        ("boft", "--strength 0.5 --factors 1"),
        ("oft", "--strength 0.5"),
    ];
    assert_models(&both, &in_turn(folder, "base", &turns), 1e-6, "one");

    let merge = "merge --base base --dry-run";
    for (option, value) in [("strength", "0.5"), ("factors", "1"), ("part", "lora_")] {
        let three = vec![format!("--{option} {value}"); 3].join(" ");
        let mut adapters = adapters.to_vec();
        assert_eq!(
            refused_with(folder, &format!("{merge} {three}"), &adapters),
            format!(
                "--{option} is given 3 times and --adapter 2 times; give it once for all adapters, or once for each in their \
                 order"
            )
        );
        adapters.truncate(1);
        let line = refused_with(folder, &format!("{merge} {three}"), &adapters);
        assert!(
            line.starts_with(&format!("--{option} is given 3 times and --adapter once;")),
            "{line}"
        );
    }
    let run = run(
        folder,
        &texts(&arguments(&format!("{merge} --strength 0.5"), &adapters)),
    );
    assert_eq!(
        run.stdout,
        "\
fc1.bias    [10] f32      base  replace
fc1.weight  [10, 24] f32  base  rotate block size 4, 2 factors, scale, strength 0.5, from boft
fc1.weight  [10, 24] f32  base  rotate block size 3, 1 factor, strength 0.5, from oft
fc2.weight  [6, 8] f32    base  rotate block size 2, 1 factor, strength 0.5, from oft
3 layers of 2 adapters to rotate, 1 tensor to replace
"
    );
    let notes: Vec<_> = run.stderr.lines().collect();
    assert!(
        notes[0].starts_with("note: 1 tensor of biases and saved modules in boft "),
        "{notes:?}"
    );
    assert!(
        notes[1].starts_with("note: oft has polynomials for rotations, "),
        "{notes:?}"
    );
    let json = format!("{merge} --json --strength 0.5 --strength 2");
    let json = succeed(folder, &texts(&arguments(&json, &adapters)));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        json["adapters"],
        json!([
            {"path": "boft", "strength": 0.5, "factors": null},
            {"path": "oft", "strength": 2.0, "factors": null}
        ])
    );
    assert_eq!(
        [
            &json["changes"][1]["adapter"],
            &json["changes"][2]["adapter"]
        ],
        ["boft", "oft"]
    );
    assert_eq!(
        [&json["changes"][0]["adapter"], &json["rotated"]],
        [&json!("boft"), &json!(3)]
    );
}

/// Through files a model in half precision is rounded after every adapter.
#[test]
fn half_precision_is_rounded_once() {
    let place = place();
    let folder = place.path();
    let adapters = ["boft", "oft"];
    for dtype in [Dtype::F16, Dtype::BF16] {
        let rounded = |tensors: &Tensors| -> Tensors {
            let tensors = tensors.iter();
            tensors
                .map(|(key, tensor)| (key.clone(), tensor.cast(dtype)))
                .collect()
        };
        let half = rounded(&base());
        let name = |what: &str| format!("{what}-{dtype}");
        write(&folder.join(name("half")), &half);
        let wide = half
            .iter()
            .map(|(key, tensor)| (key.clone(), tensor.cast(Dtype::F32)));
        write(&folder.join(name("wide")), &wide.collect());
        let merge = |base: &str, output: &str| {
            let command = format!("merge --base {}", name(base));
            written(folder, &command, &adapters, &name(output))
        };
        let merged = merge("half", "merged");
        assert_eq!(merged, rounded(&merge("wide", "merged-wide")), "{dtype}");
        let turns = in_turn(folder, &name("half"), &[("boft", ""), ("oft", "")]);
        assert_ne!(merged["fc1.weight"], turns["fc1.weight"], "{dtype}");
    }
}

#[test]
fn adapters_are_taken_out_again_the_last_one_first() {
    let place = place();
    let folder = place.path();
    // A bias can be replaced only once, so the second BOFT has none.
    let mut tensors = write_boft(folder, "plain", 30);
    tensors.remove(&format!("{PREFIX}.fc1.base_layer.bias"));
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["fc1"]
    });
    write_adapter(&folder.join("plain"), &config, &tensors);
    let adapters = ["boft", "oft", "plain"];
    let options =
        "--strength 0.5 --strength 1.25 --strength -0.5 --factors 2 --factors 1 --factors 1";
    let merged = written(
        folder,
        &format!("merge --base base {options}"),
        &adapters,
        "merged",
    );
    assert!(difference(&merged["fc1.weight"], &base()["fc1.weight"]) > 0.1);
    let unmerge = format!("unmerge --merged merged --keep-saved {options}");
    let restored = written(folder, &unmerge, &adapters, "restored");
    for key in ["fc1.weight", "fc2.weight"] {
        let off = difference(&restored[key], &base()[key]);
        assert!(off < 3e-6, "{key}: {off:e}");
    }
    let unmerge = "unmerge --merged merged --keep-saved";
    for (name, adapters) in [("opposite", ["plain", "oft", "boft"]), ("whole", adapters)] {
        let wrong = written(folder, unmerge, &adapters, name);
        assert!(
            difference(&wrong["fc1.weight"], &base()["fc1.weight"]) > 0.01,
            "{name}"
        );
    }
    let line = refused_with(folder, "unmerge --merged merged --output out", &adapters);
    assert!(line.starts_with("the merge replaced `fc1.bias`"), "{line}");
}

/// Rows that one adapter rotates as one layer and another as two.
#[test]
fn parts_of_a_fused_layer_and_the_whole_are_rotated_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let layer = "dinov2.encoder.layer.0.mlp";
    let base = [(
        format!("{layer}.weights_in.weight"),
        Tensor::random(&[14, 12], 1),
    )];
    write(&folder.join("base"), &base.into());
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "target_modules": "all-linear", "use_cayley_neumann": false
    });
    let adapter = |name: &str, parts: &[(&str, u64)]| {
        let tensors = parts.iter().map(|(part, seed)| {
            let key = format!("{PREFIX}.{layer}.{part}.oft_R.weight");
            (key, Tensor::random(&[3, 6], *seed))
        });
        write_adapter(&folder.join(name), &config, &tensors.collect());
    };
    adapter("parts", &[("gate_proj", 2), ("up_proj", 3)]);
    adapter("half", &[("up_proj", 4)]);
    adapter("whole", &[("weights_in", 5)]);
    let map = "--map dinov2";
    for adapters in [
        &["whole", "parts"][..],
        &["parts", "whole"],
        &["half", "whole", "parts"],
        &["parts", "half"],
    ] {
        let name = adapters.join("-");
        let merge = format!("merge --base base {map}");
        let merged = written(folder, &merge, adapters, &name);
        let turns: Vec<_> = adapters.iter().map(|adapter| (*adapter, map)).collect();
        assert_models(&merged, &in_turn(folder, "base", &turns), 1e-6, &name);
        let unmerge = format!("unmerge --merged {name} {map}");
        let restored = written(folder, &unmerge, adapters, &format!("{name}-restored"));
        assert_models(&restored, &read(&folder.join("base")), 3e-6, &name);
    }
    let dry = arguments(
        &format!("merge --base base {map} --dry-run"),
        &["whole", "parts"],
    );
    let table = succeed(folder, &texts(&dry));
    assert_eq!(table.lines().count(), 4, "each rotation once: {table}");
    assert!(
        table.contains("rotate rows 7 to 13 block size 4, 1 factor, from parts\n"),
        "{table}"
    );
}

/// An adapter that rotates outputs, and one that rotates the inputs of the same layer, in a weight of more numbers than are
/// computed with at a time.
#[test]
fn rotations_of_outputs_and_of_inputs_are_merged_in_one_pass() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (rows, columns) = (48, 120_000);
    let base = [("w.weight".to_string(), Tensor::random(&[rows, columns], 1))];
    write(&folder.join("base"), &base.into());
    // Spans of 8 rows and of 12.
    for (name, n, b, seed) in [("eight", 6, 8, 2), ("twelve", 4, 12, 3)] {
        let tensors = [
            ("w.oft_blocks", Tensor::random(&[n, b, b], seed)),
            ("w.alpha", Tensor::new(&[], vec![0.0])),
        ];
        let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
        write(&folder.join(format!("{name}.safetensors")), &tensors.into());
    }
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "target_modules": ["w"], "use_cayley_neumann": false
    });
    let key = format!("{PREFIX}.w.oft_R.weight");
    let tensors = [(key, Tensor::random(&[columns / 4, 6], 4))].into();
    write_adapter(&folder.join("inputs"), &config, &tensors);
    let adapters = ["eight.safetensors", "inputs", "twelve.safetensors"];
    let merged = written(folder, "merge --base base", &adapters, "merged");
    let turns = adapters.map(|adapter| (adapter, ""));
    assert_models(
        &merged,
        &in_turn(folder, "base", &turns),
        1e-6,
        "outputs and inputs",
    );
    let restored = written(folder, "unmerge --merged merged", &adapters, "restored");
    assert_models(&restored, &read(&folder.join("base")), 3e-6, "restored");
}

#[test]
fn what_only_one_adapter_can_decide_is_refused_with_both_names() {
    let place = place();
    let folder = place.path();
    write_boft(folder, "other", 40);
    let merge = "merge --base base --output out";
    let end = "and only one of the two can be kept; merge one after the other, through a file, if the later is meant to decide";
    assert_eq!(
        refused_with(folder, merge, &["boft", "oft", "other"]),
        format!("base: `fc1.bias` is replaced by boft and replaced by other, {end}")
    );

    // One saves the layer that the other rotates, in either order.
    let saved = [
        (
            format!("{PREFIX}.fc2.oft_R.weight"),
            Tensor::random(&[2, 6], 1),
        ),
        (format!("{PREFIX}.fc1.weight"), Tensor::random(&[10, 24], 2)),
        (format!("{PREFIX}.fc1.bias"), Tensor::random(&[10], 3)),
    ];
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "target_modules": ["fc2"], "modules_to_save": ["fc1"],
        "use_cayley_neumann": false
    });
    write_adapter(&folder.join("saved"), &config, &saved.into());
    assert_eq!(
        refused_with(folder, merge, &["oft", "saved"]),
        format!("base: `fc1.weight` is rotated by oft and replaced by saved, {end}")
    );
    assert_eq!(
        refused_with(folder, merge, &["saved", "boft"]),
        format!(
            "base: `fc1.bias` is replaced by saved and replaced by boft, {end}; base: `fc1.weight` is replaced by saved and rotated \
             by boft, {end}"
        )
    );
    assert!(!folder.join("out").exists());
}

/// Two adapters that rotate a tied embedding make one model with a head of its own. One that gives the model a head and another
/// that does so too cannot both be kept.
#[test]
fn a_head_is_untied_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let embedding = "model.embed_tokens";
    let base = [(format!("{embedding}.weight"), Tensor::random(&[7, 8], 1))];
    write_shards(&folder.join("base"), &[base.clone().into()]);
    let config = json!({"model_type": "llama", "tie_word_embeddings": true});
    write_json(&folder.join("base/config.json"), &config);
    let settings = |saved: &[&str]| {
        json!({
            "peft_type": "OFT", "oft_block_size": 4, "target_modules": ["embed_tokens"], "modules_to_save": saved,
            "use_cayley_neumann": false, "peft_version": "0.21.2"
        })
    };
    let rotation = |seed: u64| {
        let key = format!("{PREFIX}.{embedding}.oft_embedding_R.weight");
        (key, Tensor::random(&[2, 6], seed))
    };
    let head = |seed: u64| {
        (
            format!("{PREFIX}.lm_head.weight"),
            Tensor::random(&[7, 8], seed),
        )
    };
    write_adapter(&folder.join("one"), &settings(&[]), &[rotation(2)].into());
    write_adapter(&folder.join("two"), &settings(&[]), &[rotation(3)].into());
    for (name, seed) in [("head", 4), ("other", 5)] {
        let tensors = [rotation(seed), head(seed + 10)].into();
        write_adapter(&folder.join(name), &settings(&["lm_head"]), &tensors);
    }
    let shard = "model-00001-of-00001.safetensors";
    let merge = |base: &str, adapters: &[&str], output: &str| {
        let command = format!("merge --base {base} --output {output}");
        succeed(folder, &texts(&arguments(&command, adapters)));
        let config = read_json(&folder.join(output).join("config.json"));
        assert_eq!(config["tie_word_embeddings"], false);
        read(&folder.join(output).join(shard))
    };
    for (first, second) in [("one", "two"), ("head", "two"), ("one", "head")] {
        let name = format!("{first}-{second}");
        let both = merge("base", &[first, second], &name);
        merge("base", &[first], &format!("{name}-first"));
        let turns = merge(
            &format!("{name}-first"),
            &[second],
            &format!("{name}-turns"),
        );
        assert_models(&both, &turns, 1e-6, &name);
    }
    assert_eq!(
        read(&folder.join("one-two").join(shard))["lm_head.weight"],
        base[0].1
    );
    let line = refused_with(folder, "merge --base base --output out", &["head", "other"]);
    let expected = "base: `lm_head.weight` is added by head and added by other, and only one of the two can be kept; ";
    assert!(line.starts_with(expected), "{line}");

    // A copy of the embedding says which model an adapter was trained on, and that is not the one before the merge.
    let mut tensors: Tensors = [rotation(6)].into();
    let copy = format!("{PREFIX}.{embedding}.weight");
    tensors.insert(copy, base[0].1.clone());
    write_adapter(&folder.join("copy"), &settings(&[]), &tensors);
    merge("base", &["copy"], "copied");
    assert_eq!(
        refused_with(folder, "merge --base base --output out", &["one", "copy"]),
        format!(
            "base: `{embedding}.weight` is changed by one, and copy keeps a copy of it that the model must agree with; merge one \
             after the other, through a file"
        )
    );
}

#[test]
fn adapters_that_do_not_fit_are_refused_as_one_alone_is() {
    let place = place();
    let folder = place.path();
    let key = format!("{PREFIX}.fc1.oft_R.weight");
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "target_modules": ["fc1"], "use_cayley_neumann": false
    });
    let tensors = [(key, Tensor::random(&[5, 6], 1))].into();
    write_adapter(&folder.join("narrow"), &config, &tensors);
    let run = run(
        folder,
        &texts(&arguments(
            "merge --base base --output out",
            &["oft", "narrow"],
        )),
    );
    assert_eq!(run.code, 2);
    assert!(
        run.stderr.ends_with(
            "error: base: the adapter of `fc1`: it rotates 20 input features, the layer has 24; `fc1.weight` is [10, 24] f32\n"
        ),
        "{}",
        run.stderr
    );
    assert!(!folder.join("out").exists());
}

/// A file for several models and a folder of PEFT's, which is for one.
#[test]
fn a_part_is_given_for_each_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write(&folder.join("base"), &base());
    write_oft(folder, "oft", 20);
    let tensors = ["lora_unet_fc1", "lora_te1_fc1"].map(|module| {
        [
            (
                format!("{module}.oft_blocks"),
                Tensor::random(&[5, 2, 2], 2),
            ),
            (format!("{module}.alpha"), Tensor::new(&[], vec![0.0])),
        ]
    });
    let tensors = tensors.into_iter().flatten().collect();
    write(&folder.join("file.safetensors"), &tensors);
    let adapters = ["file.safetensors", "oft"];
    let turns = in_turn(
        folder,
        "base",
        &[("file.safetensors", "--part lora_te1_"), ("oft", "")],
    );
    let command = "merge --base base --output both --part lora_te1_ --part";
    let mut all: Vec<_> = command.split(' ').collect();
    all.extend(["", "--adapter", adapters[0], "--adapter", adapters[1]]);
    succeed(folder, &all);
    assert_models(&read(&folder.join("both")), &turns, 1e-6, "parts");
    let both = arguments("merge --base base --output out --part lora_te1_", &adapters);
    let run = run(folder, &texts(&both));
    assert!(
        run.stderr.ends_with(
            "error: --part is for files of other programs; an adapter of PEFT's is for one model\n"
        ),
        "{}",
        run.stderr
    );
}
