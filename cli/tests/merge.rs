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
    let merge = run(
        folder.path(),
        &merge_command("base", case.adapter(), "merged"),
    );
    assert_eq!(merge.code, 0, "{}", merge.stderr);
    let note = "\nnote: left behind, as weights from before the merge, adapters or no files of a model: adapter_config.json, \
                adapter_model.safetensors, consolidated.00.pth, diffusion_pytorch_model.bin, flax_model.msgpack, \
                model-Q4.gguf, model.ckpt, model.onnx and 7 more; copy by hand what you need\n";
    assert!(merge.stderr.ends_with(note), "{}", merge.stderr);
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

/// As sentence-transformers keeps the layers that come after its transformer.
#[test]
fn the_modules_of_a_sentence_transformer_are_copied_with_their_weights() {
    let place = MergeFolder::new();
    let model = place.path().join("model");
    for folder in ["1_Pooling", "2_Dense", "onnx"] {
        fs::create_dir_all(model.join(folder)).unwrap();
    }
    write(&model.join("model.safetensors"), &place.base);
    let modules = serde_json::json!([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]);
    write_json(&model.join("modules.json"), &modules);
    for file in [
        "1_Pooling/config.json",
        "2_Dense/pytorch_model.bin",
        "onnx/model.onnx",
    ] {
        fs::write(model.join(file), file).unwrap();
    }
    let merge = run(place.path(), &merge_command("model", "adapter", "merged"));
    assert_eq!(
        (merge.code, merge.stderr.as_str()),
        (
            0,
            "note: left behind, as weights from before the merge, adapters or no files of a model: onnx/model.onnx; copy by \
             hand what you need\n"
        )
    );
    let merged = place.path().join("merged");
    let dense = fs::read_to_string(merged.join("2_Dense/pytorch_model.bin")).unwrap();
    assert_eq!(dense, "2_Dense/pytorch_model.bin");
    assert_eq!(
        names(&merged),
        ["1_Pooling", "2_Dense", "model.safetensors", "modules.json"]
    );
}

/// What lies in folders below a model may be its weights once more, or those of another module, which it needs.
#[test]
fn weights_in_folders_below_are_copied_with_a_note_unless_they_are_those_of_the_model() {
    let place = MergeFolder::new();
    let model = place.path().join("model");
    for folder in ["checkpoint", "sharded", "speech_tokenizer"] {
        fs::create_dir_all(model.join(folder)).unwrap();
    }
    write(&model.join("model.safetensors"), &place.base);
    write(&model.join("checkpoint/model.safetensors"), &place.base);
    write_shards(&model.join("sharded"), std::slice::from_ref(&place.base));
    let speech = [("decoder.weight".to_string(), Tensor::random(&[3, 2], 1))];
    write(
        &model.join("speech_tokenizer/model.safetensors"),
        &speech.into(),
    );
    fs::write(model.join("speech_tokenizer/config.json"), "{}").unwrap();
    let merge = run(place.path(), &merge_command("model", "adapter", "merged"));
    assert_eq!(
        (merge.code, merge.stderr.as_str()),
        (
            0,
            "note: left behind, as weights from before the merge, adapters or no files of a model: \
             checkpoint/model.safetensors, sharded/model-00001-of-00001.safetensors, \
             sharded/model.safetensors.index.json; copy by hand what you need\n\
             note: copied as they are, since only weights of the folder itself are changed: \
             speech_tokenizer/model.safetensors\n"
        )
    );
    let merged = place.path().join("merged");
    assert_eq!(names(&merged), ["model.safetensors", "speech_tokenizer"]);
    let copied = names(&merged.join("speech_tokenizer"));
    assert_eq!(copied, ["config.json", "model.safetensors"]);
}

#[cfg(unix)]
#[test]
fn links_that_lead_nowhere_or_back_are_left_behind() {
    use std::os::unix::fs::symlink;

    let place = MergeFolder::new();
    let model = place.path().join("model");
    fs::create_dir_all(model.join("tokenizer")).unwrap();
    write(&model.join("model.safetensors"), &place.base);
    fs::write(place.path().join("words.txt"), "a b").unwrap();
    symlink("../../words.txt", model.join("tokenizer/words.txt")).unwrap();
    symlink("none", model.join(".#config.json")).unwrap();
    symlink(".", model.join("again")).unwrap();
    symlink("../../model", model.join("tokenizer/model")).unwrap();
    let merge = run(place.path(), &merge_command("model", "adapter", "merged"));
    assert_eq!(
        (merge.code, merge.stderr.as_str()),
        (
            0,
            "note: left behind, as weights from before the merge, adapters or no files of a model: .#config.json, again, \
             tokenizer/model; copy by hand what you need\n"
        )
    );
    let merged = place.path().join("merged");
    assert_eq!(names(&merged), ["model.safetensors", "tokenizer"]);
    assert_eq!(names(&merged.join("tokenizer")), ["words.txt"]);
    let words = fs::symlink_metadata(merged.join("tokenizer/words.txt")).unwrap();
    assert!(words.is_file(), "a copy, not a link");
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
