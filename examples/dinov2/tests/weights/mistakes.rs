//! What is wrong with a model is said in one line.

use std::fs;

use dinov2::weights::HeadOrigin;
use serde_json::json;

use crate::common::*;

#[test]
fn a_checkpoint_of_another_size_is_one_sentence() {
    let folder = copy("mlp");
    edit_json(folder.path(), "config.json", |config| {
        config["hidden_size"] = json!(64);
        config["num_hidden_layers"] = json!(3);
    });
    complains(
        load(folder.path()),
        &[
            "model.safetensors: this checkpoint is 32 wide with 2 layers, but config.json says 64 wide with 3 layers",
        ],
    );
}

#[test]
fn tensors_that_are_missing_or_unexpected_have_the_names_of_the_file() {
    let folder = copy("registers");
    edit_tensors(folder.path(), |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.0 = tensor.0.replace("layernorm.bias", "layernorm.shift");
        }
    });
    complains(
        load(folder.path()),
        &[
            "missing: dinov2_with_registers.layernorm.bias",
            "unexpected: dinov2_with_registers.layernorm.shift",
        ],
    );
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let folder = copy("mlp");
    edit_tensors(folder.path(), |tensors| {
        let bias = tensors
            .iter_mut()
            .find(|tensor| tensor.0 == "dinov2.layernorm.bias")
            .unwrap();
        *bias = (bias.0.clone(), vec![16, 2], bias.2.clone());
    });
    complains(
        load(folder.path()),
        &["wrong: dinov2.layernorm.bias is [16, 2] where [32] is needed"],
    );

    let folder = copy("mlp");
    edit_tensors(folder.path(), |tensors| {
        let head = tensors
            .iter_mut()
            .find(|tensor| tensor.0 == "classifier.bias")
            .unwrap();
        *head = (head.0.clone(), vec![4], head.2[..16].to_vec());
    });
    complains(
        load(folder.path()),
        &["classifier.bias is [4] where [5] is needed"],
    );
}

#[test]
fn a_tensor_of_a_fresh_head_is_not_looked_at() {
    let folder = copy("mlp");
    edit_tensors(folder.path(), |tensors| {
        tensors.retain(|tensor| tensor.0 != "classifier.bias");
    });
    complains(load(folder.path()), &["missing: classifier.bias"]);
    let checkpoint = open_path(folder.path()).unwrap();
    let (_, head) = checkpoint.load(&strings(&["a"]), &device()).unwrap();
    assert!(matches!(head, HeadOrigin::Fresh { .. }));
}

#[test]
fn another_architecture_is_named() {
    let folder = copy("mlp");
    edit_json(folder.path(), "config.json", |config| {
        config["model_type"] = json!("vit")
    });
    complains(
        open_path(folder.path()),
        &["config.json describes a model of type `vit`", "`dinov2`"],
    );
}

#[test]
fn a_folder_that_is_no_model_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    complains(open_path(folder.path()), &["has no config.json"]);

    fs::copy(
        fixture("mlp").join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    complains(
        open_path(folder.path()),
        &["has no weights", "model.safetensors"],
    );

    let model = fixture("mlp").join("model.safetensors");
    complains(open_path(&model), &["is a file; give the folder"]);
    complains(
        open_path(&fixture("weights/lora_5")),
        &["holds an adapter", "--adapter"],
    );
    complains(
        open_path(&fixture("absent")),
        &["is no folder, and not the name of a published model"],
    );
}

#[test]
fn a_config_that_is_no_json_is_refused() {
    let folder = copy("mlp");
    fs::write(folder.path().join("config.json"), "<html>").unwrap();
    complains(
        open_path(folder.path()),
        &["config.json is not a JSON object"],
    );
}

#[test]
fn shards_that_are_missing_are_named() {
    for (name, index, shard) in [
        (
            "weights/sharded",
            "model.safetensors.index.json",
            "model-00002-of-00003.safetensors",
        ),
        (
            "weights/sharded_bin",
            "pytorch_model.bin.index.json",
            "pytorch_model-00003-of-00003.bin",
        ),
    ] {
        let folder = copy(name);
        fs::remove_file(folder.path().join(shard)).unwrap();
        complains(open_path(folder.path()), &[index, shard, "incomplete"]);
        fs::write(
            folder.path().join(index),
            r#"{"weight_map": {"a": "../b"}}"#,
        )
        .unwrap();
        complains(open_path(folder.path()), &[index, "no weight_map"]);
    }
}

#[test]
fn a_file_that_ends_early_is_refused() {
    for (name, file) in [
        ("mlp", "model.safetensors"),
        ("weights/bin", "pytorch_model.bin"),
        ("weights/sharded", "model-00002-of-00003.safetensors"),
    ] {
        let folder = copy(name);
        let path = folder.path().join(file);
        let bytes = fs::read(&path).unwrap();
        for length in [bytes.len() - 4, bytes.len() / 2, 5, 0] {
            fs::write(&path, &bytes[..length]).unwrap();
            complains(load(folder.path()), &[file, "holds no usable weights"]);
        }
    }
}

#[test]
fn a_pointer_of_git_lfs_is_called_by_its_name() {
    let folder = copy("mlp");
    let text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 88\n";
    fs::write(folder.path().join("model.safetensors"), text).unwrap();
    complains(load(folder.path()), &["pointer of Git LFS", "git lfs pull"]);
}
