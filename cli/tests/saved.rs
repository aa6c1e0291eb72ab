//! Biases and modules that an adapter saves as a whole, merged into a model.

use serde_json::json;

use crate::files::*;

#[test]
fn a_trained_bias_that_the_model_lacks_is_refused() {
    let case = Case::open("cases/boft-mlp-bias-only");
    let folder = case.folder();
    let merge = |base: Tensors| {
        write(&folder.path().join("base.safetensors"), &base);
        refused(
            folder.path(),
            &merge_command("base.safetensors", case.adapter(), "out"),
        )
    };
    let mut base = case.base.clone();
    base.remove("fc1.bias");
    assert_eq!(
        merge(base),
        "base.safetensors has no `fc1.bias` for the adapter's `fc1.bias`; it has `fc2.bias`, `norm.bias`, \
         `classifier.bias`; use --map to rename modules"
    );
    let mut base = case.base.clone();
    base.insert("fc1.bias".into(), Tensor::random(&[7], 1));
    assert_eq!(
        merge(base),
        "base.safetensors: `fc1.bias` is [7] f32, and the adapter's `fc1.bias` is [20] f32"
    );
}

#[test]
fn a_saved_module_that_does_not_fit_the_model_is_refused() {
    let case = Case::open("cases/boft-mlp-saved-classifier");
    let folder = case.folder();
    let merge = |base: &Tensors, adapter: &str, rules: &[&str]| {
        write(&folder.path().join("base.safetensors"), base);
        let arguments = merge_command("base.safetensors", adapter, "out");
        refused(folder.path(), &[&arguments, rules].concat())
    };

    // Two new heads under one name.
    let prefix = "base_model.model";
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    for name in ["weight", "bias"] {
        let classifier = tensors[&format!("{prefix}.classifier.{name}")].clone();
        tensors.insert(format!("{prefix}.score.{name}"), classifier);
    }
    let mut config = read_json(&case.adapter.join("adapter_config.json"));
    config["modules_to_save"] = json!(["classifier", "score"]);
    write_adapter(&folder.path().join("two"), &config, &tensors);
    let mut headless = case.base.clone();
    headless.retain(|key, _| !key.starts_with("classifier."));
    assert_eq!(
        merge(&headless, "two", &["--map", "classifier|score=head"]),
        "base.safetensors: two parts of the adapter change `head.bias`; base.safetensors: two parts of the adapter \
         change `head.weight`"
    );

    // A head that the model has under a longer name.
    let longer = case.base.iter();
    let longer = longer.map(|(key, tensor)| (format!("model.{key}"), tensor.clone()));
    assert_eq!(
        merge(
            &longer.collect(),
            case.adapter(),
            &["--map", "^fc=model.fc"]
        ),
        "base.safetensors has no `classifier.bias` for the adapter's `classifier.bias`; it has `model.classifier.bias`, \
         `model.fc1.bias`, `model.fc2.bias`; use --map to rename modules; base.safetensors has no `classifier.weight` for \
         the adapter's `classifier.weight`; it has `model.classifier.weight`, `model.fc1.weight`, `model.fc2.weight`; use \
         --map to rename modules"
    );

    // Heads for other classes have other rows, and nothing else.
    for shape in [&[5, 15][..], &[80], &[5, 16, 1]] {
        let mut other = case.base.clone();
        other.insert("classifier.weight".into(), Tensor::random(shape, 1));
        assert_eq!(
            merge(&other, case.adapter(), &[]),
            format!(
                "base.safetensors: `classifier.weight` is {shape:?} f32, and the adapter's `classifier.weight` is [5, 16] \
                 f32"
            )
        );
    }
}

/// As transformers 5 renamed Mixtral's router.
#[test]
fn a_saved_module_of_a_layer_is_not_added_where_the_file_has_it_under_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let merge = |base: &Tensors, adapter: &str, rules: &[&str]| {
        write(&folder.path().join("base.safetensors"), base);
        let arguments = merge_command("base.safetensors", adapter, "out");
        refused(folder.path(), &[&arguments, rules].concat())
    };
    let router = [("model.layers.0.mlp.gate.weight", Tensor::random(&[4, 8], 3))];
    let layer = "model.layers.0.self_attn.q_proj";
    let key = |key: &str| format!("base_model.model.{key}");
    let mut tensors: Tensors = router.map(|(name, tensor)| (key(name), tensor)).into();
    tensors.insert(
        key(&format!("{layer}.oft_R.weight")),
        Tensor::random(&[2, 6], 1),
    );
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["q_proj"],
        "modules_to_save": ["mlp.gate"]
    });
    write_adapter(&folder.path().join("mixtral"), &config, &tensors);
    let old = |key: &str| key.replace("model.", "");
    let mixtral = [
        (format!("{layer}.weight"), Tensor::random(&[8, 8], 1)),
        (
            "model.layers.0.block_sparse_moe.gate.weight".to_string(),
            Tensor::random(&[4, 8], 2),
        ),
    ];
    let mixtral: Tensors = mixtral.into();
    assert_eq!(
        merge(&mixtral, "mixtral", &[]),
        format!(
            "base.safetensors has no `model.layers.0.mlp.gate.weight` for the adapter's `model.layers.0.mlp.gate.weight`; it \
             has `model.layers.0.block_sparse_moe.gate.weight`, `{layer}.weight`; use --map to rename modules"
        )
    );
    let bare = mixtral
        .iter()
        .map(|(key, tensor)| (old(key), tensor.clone()));
    let line = merge(
        &bare.collect(),
        "mixtral",
        &["--map", r"^model\.layers\.0\.self=layers.0.self"],
    );
    let start = "base.safetensors has no `model.layers.0.mlp.gate.weight` for the adapter's ";
    assert!(line.starts_with(start), "{line}");
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
    write_sharded(&headless, &folder.path().join("base"));
    // As transformers 5 writes it, and tied: the count is not what the shards hold.
    let mut counted = index("base");
    counted["metadata"]["total_parameters"] = json!(1000);
    let path = folder.path().join("base/model.safetensors.index.json");
    write_json(&path, &counted);
    let printed = succeed(
        folder.path(),
        &merge_command("base", case.adapter(), "merged"),
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
        &merge_command(
            "other.safetensors",
            case.adapter(),
            "other-merged.safetensors",
        ),
    );
    assert_models(
        &read(&folder.path().join("other-merged.safetensors")),
        &case.merged,
        TOLERANCE,
        "another head",
    );
}

#[test]
fn what_an_adapter_announces_and_lacks_is_reported() {
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
        &convert_command("adapter", "peft", "new"),
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
