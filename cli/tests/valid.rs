//! Adapters of PEFT that are unusual and valid: targets that share their name with embeddings, and models that transformers 5
//! names otherwise than their files.

use std::fs;

use serde_json::json;

use crate::files::*;

/// A head that is adapted, with the copy of its weight that PEFT writes beside it.
#[test]
fn a_head_is_rotated_where_its_copy_in_the_adapter_is_the_models_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let config = json!({"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["lm_head"]});
    let weight = Tensor::random(&[20, 24], 1);
    let copy = "base_model.model.lm_head.base_layer.weight".to_string();
    let mut tensors = Tensors::from([
        (
            "base_model.model.lm_head.boft_R".to_string(),
            Tensor::random(&[1, 6, 4, 4], 2),
        ),
        (
            "base_model.model.lm_head.boft_s".to_string(),
            Tensor::random(&[20, 1], 3),
        ),
    ]);
    write(
        &path.join("base.safetensors"),
        &[
            ("lm_head.weight".to_string(), weight.clone()),
            (
                "model.embed_tokens.weight".to_string(),
                Tensor::random(&[20, 24], 4),
            ),
        ]
        .into(),
    );
    write_adapter(&path.join("without"), &config, &tensors);
    tensors.insert(copy.clone(), weight.clone());
    write_adapter(&path.join("with"), &config, &tensors);
    let expected = merged(path, "without");
    assert_ne!(expected["lm_head.weight"], weight);
    assert_eq!(merged(path, "with"), expected);

    // Trained in half precision, of which the model is the original.
    tensors.insert(copy.clone(), weight.cast(safetensors::Dtype::BF16));
    write_adapter(&path.join("half"), &config, &tensors);
    assert_eq!(merged(path, "half"), expected);

    let mut other = weight;
    other.numbers[479] += 0.01;
    tensors.insert(copy, other);
    write_adapter(&path.join("other"), &config, &tensors);
    let line = "base.safetensors: `lm_head.weight` has other numbers than the copy that the adapter keeps of it; name the \
                model that the adapter was trained on";
    assert_eq!(
        refused(
            path,
            &merge_command("base.safetensors", "other", "out.safetensors")
        ),
        line
    );
    let lora = "convert other --to-lora 2 --base base.safetensors --output lora";
    assert_eq!(refused(path, &lora.split(' ').collect::<Vec<_>>()), line);

    // The copy of the merged model would be another.
    let unmerge =
        "unmerge --merged with-merged.safetensors --adapter with --output back.safetensors";
    succeed(path, &unmerge.split(' ').collect::<Vec<_>>());
}

/// The names of a ViT's layers in a file, and those of the modules in transformers 5.
const VIT: [[&str; 2]; 2] = [
    [
        "vit.encoder.layer.0.attention.attention.query",
        "vit.layers.0.attention.q_proj",
    ],
    ["vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"],
];

#[test]
fn the_type_of_the_model_leads_from_the_names_of_transformers_5_to_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::create_dir(path.join("model")).unwrap();
    let weights = VIT.map(|[old, _]| {
        (
            format!("{old}.weight"),
            Tensor::random(&[20, 24], old.len() as u64),
        )
    });
    write(
        &path.join("model/model.safetensors"),
        &weights.clone().into(),
    );
    write_json(
        &path.join("model/config.json"),
        &json!({"model_type": "vit"}),
    );
    let adapter = |side: usize| -> Tensors {
        let tensors = VIT.iter().flat_map(|names| {
            let key = |tensor: &str| format!("base_model.model.{}.{tensor}", names[side]);
            let seed = names[0].len() as u64;
            [
                (key("boft_R"), Tensor::random(&[1, 6, 4, 4], seed + 1)),
                (key("boft_s"), Tensor::random(&[20, 1], seed + 2)),
            ]
        });
        tensors.collect()
    };
    let config = json!({"peft_type": "BOFT", "boft_block_size": 4, "target_modules": "all-linear"});
    write_adapter(&path.join("four"), &config, &adapter(0));
    write_adapter(&path.join("five"), &config, &adapter(1));
    let old = run(path, &merge_command("model", "four", "expected"));
    assert_eq!((old.code, old.stderr.as_str()), (0, ""));
    let new = run(path, &merge_command("model", "five", "found"));
    assert_eq!(
        (new.code, new.stderr.as_str()),
        (
            0,
            "note: the adapter has the names of transformers 5, and the file those of transformers 4: the rules for `vit`, \
             the type in config.json, found the tensors of 2 names; --map none turns them off\n"
        )
    );
    let model = |name: &str| read(&path.join(name).join("model.safetensors"));
    assert_eq!(model("found"), model("expected"));
    assert_ne!(model("found"), Tensors::from(weights));

    // Turned off, and named where the file is alone.
    let merge = merge_command("model", "five", "out");
    let line = refused(path, &[&merge[..], &["--map", "none"]].concat());
    assert!(
        line.starts_with("model has no `vit.layers.0.attention.q_proj.weight`"),
        "{line}"
    );
    fs::rename(
        path.join("model/model.safetensors"),
        path.join("alone.safetensors"),
    )
    .unwrap();
    let merge = merge_command("alone.safetensors", "five", "alone-merged.safetensors");
    let line = refused(path, &merge);
    assert!(line.contains("use --map to rename modules"), "{line}");
    succeed(path, &[&merge[..], &["--map", "vit"]].concat());
    assert_eq!(
        read(&path.join("alone-merged.safetensors")),
        model("expected")
    );
}
