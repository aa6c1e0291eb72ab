//! `merge`: what it computes, and the files that it writes.

use std::fs;

use crate::files::*;

#[test]
fn merging_makes_what_peft_makes() {
    let cases = Case::all();
    assert!(cases.len() > 80, "the fixtures are there");
    for case in cases {
        let folder = case.folder();
        let arguments = merge_command("base.safetensors", case.adapter(), "merged.safetensors");
        succeed(folder.path(), &arguments);
        let merged = read(&folder.path().join("merged.safetensors"));
        assert_models(&merged, &case.merged, TOLERANCE, &case.name);
        assert_eq!(merged != case.base, case.changes(), "{}", case.name);
    }
}

#[test]
fn shards_keep_their_layout_and_other_files_are_copied() {
    let case = Case::open("cases/boft-mlp-bias-all-saved");
    let folder = tempfile::tempdir().unwrap();
    let (base, merged) = (folder.path().join("base"), folder.path().join("merged"));
    write_sharded(&case, &base);
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
        &merge_command("base", case.adapter(), "merged"),
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
classifier.bias    [5] f32       base.safetensors  replace
classifier.weight  [5, 16] f32   base.safetensors  replace
fc1.bias           [20] f32      base.safetensors  replace
fc1.weight         [20, 24] f32  base.safetensors  rotate block size 4, 1 factor, scale
fc2.bias           [16] f32      base.safetensors  replace
fc2.weight         [16, 20] f32  base.safetensors  rotate block size 4, 1 factor, scale
2 layers to rotate, 4 tensors to replace
"
    );
    assert_eq!(names(folder.path()), ["base.safetensors"]);
}
