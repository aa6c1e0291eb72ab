//! How an adapter finds its layers in a model whose names differ.

use safetensors::tensor::Dtype;
use serde_json::json;

use crate::files::*;

#[test]
fn a_model_without_the_layer_or_with_one_of_another_shape_is_refused() {
    let place = MergeFolder::new();
    let rename = |from: &str, to: &str| -> Tensors {
        let tensors = place.base.iter();
        tensors
            .map(|(key, tensor)| (key.replace(from, to), tensor.clone()))
            .collect()
    };
    place.write_base(&rename("fc1.", "fc_1."));
    assert_eq!(
        place.refused(),
        "base.safetensors has no `fc1.weight` for the adapter of `fc1`; it has `fc_1.weight`, `fc2.weight`, `norm.weight`; \
         use --map to rename modules"
    );
    place.write_base(&place.base);
    assert_eq!(
        place.refused_with(&["--map", "fc1=fc2"]),
        "base.safetensors: the adapter of `fc1`: it rotates 24 input features, the layer has 20; `fc2.weight` is [16, 20] f32"
    );
    let with = |tensor: Tensor| {
        let mut base = place.base.clone();
        base.insert("fc1.weight".into(), tensor);
        place.write_base(&base);
        place.refused()
    };
    let of = "base.safetensors: the adapter of `fc1`";
    assert_eq!(
        with(Tensor::random(&[21, 24], 1)),
        format!("{of}: it scales 20 outputs, the layer has 21; `fc1.weight` is [21, 24] f32")
    );
    assert_eq!(
        with(Tensor::random(&[20, 6, 2, 2], 1)),
        format!(
            "{of} is for a linear layer, the model has a convolution; `fc1.weight` is [20, 6, 2, 2] f32"
        )
    );
    assert_eq!(
        with(Tensor::random(&[480], 1)),
        format!(
            "{of} is for a linear layer or a convolution, and a weight of 1 axes is neither; `fc1.weight` is [480] f32"
        )
    );
    assert_eq!(
        with(Tensor {
            dtype: Dtype::U8,
            ..Tensor::new(&[20, 24], vec![1.0; 480])
        }),
        format!(
            "{of} rotates weights in f64, f32, f16 and bf16 only; merge it into the model before the model is quantized; \
             `fc1.weight` is [20, 24] u8"
        )
    );
    assert_eq!(
        with(Tensor::random(&[20, 24], 1).cast(Dtype::F64)),
        format!(
            "{of} is less precise than the weight; save both in the same precision; `fc1.weight` is [20, 24] f64"
        )
    );
    place.write_base(&place.base);
    assert_eq!(
        place.refused_with(&["--map", "fc.=fc2"]),
        "base.safetensors: the adapter of `fc1`: it rotates 24 input features, the layer has 20; `fc2.weight` is [16, 20] f32"
    );
}

/// Suggestions are looked for as often as they are shown, not for every layer: that took minutes here.
#[test]
fn a_wrong_prefix_is_reported_quickly_in_a_large_model() {
    const LAYERS: usize = 5000;
    let folder = tempfile::tempdir().unwrap();
    let name = |layer: usize| format!("layers.{layer}.self_attn.q_proj");
    let base = (0..LAYERS).map(|layer| {
        let key = format!("model.{}.weight", name(layer));
        (key, Tensor::new(&[1, 2], vec![1.0, 2.0]))
    });
    write(&folder.path().join("base.safetensors"), &base.collect());
    let config = json!({"peft_type": "OFT", "oft_block_size": 2, "target_modules": ["q_proj"], "peft_version": "0.21.2"});
    let adapter = (0..LAYERS).map(|layer| {
        let key = format!("base_model.model.{}.oft_R.weight", name(layer));
        (key, Tensor::new(&[1, 1], vec![0.5]))
    });
    write_adapter(&folder.path().join("adapter"), &config, &adapter.collect());
    let start = std::time::Instant::now();
    let line = refused(
        folder.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter",
            "--dry-run",
        ],
    );
    let first = "base.safetensors has no `layers.0.self_attn.q_proj.weight` for the adapter of `layers.0.self_attn.q_proj`; \
                 it has `model.layers.0.self_attn.q_proj.weight`, ";
    assert!(line.starts_with(first), "{line}");
    assert!(line.ends_with("; and 4997 more"), "{line}");
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn map_rules_rename_the_adapters_modules() {
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

#[test]
fn dinov2_is_merged_under_the_names_of_both_transformers_with_and_without_its_prefix() {
    let fixtures = fixtures().join("dinov2");
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
    let fixtures = fixtures().join("dinov2");
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
            &merge_command("half.safetensors", part, &output),
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
