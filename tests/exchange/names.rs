//! Key maps: names in files that differ from those in the model.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::DType;
use burn_boft::peft::{Folder, LoadError, LoadOptions, SaveOptions};
use burn_boft::{Adapter, Bias, BoftConfig, BoftLinear, KeyMap, Transformers, inject};
use serde_json::json;

use super::dinov2::Encoder;
use super::support::*;
use crate::common::models::{linear, numbers};

/// DINOv2 in small sizes, with a classifier. Nothing is computed with it.
#[derive(Module, Debug)]
struct Dino {
    encoder: Encoder,
    classifier: BoftLinear,
}

impl Dino {
    fn new() -> Self {
        let mut seed = 0;
        let mut layer = |sizes| {
            seed += 2;
            BoftLinear::from(linear(sizes, seed, DType::F32, &device()))
        };
        let encoder = Encoder::new(|path| {
            let name = path.rsplit('.').next().unwrap();
            layer(match name {
                "query" | "key" | "value" => [8, 12],
                "dense" => [12, 8],
                "weights_in" => [8, 20],
                "weights_out" => [12, 8],
                other => panic!("{other}"),
            })
        });
        Self {
            encoder,
            classifier: layer([8, 3]),
        }
    }
}

fn dino() -> BoftConfig {
    BoftConfig::new()
        .with_block_size(2)
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_bias(Bias::AdapterOnly)
        .with_target_modules([
            "query",
            "value",
            "output.dense",
            "weights_in",
            "weights_out",
        ])
        .with_modules_to_save(["classifier"])
}

#[test]
fn dinov2_adapters_are_saved_and_loaded_under_the_names_of_transformers_4_and_5() {
    let model = inject(Dino::new(), dino()).unwrap();
    let adapter = Adapter::extract_as(&model, dino()).unwrap();
    let mut written = Vec::new();
    for version in [Transformers::V4, Transformers::V5] {
        let folder = tempfile::tempdir().unwrap();
        let names = SaveOptions::new().with_key_map(KeyMap::dinov2(version));
        adapter.save_with(folder.path(), &names).unwrap();
        let modules: BTreeSet<_> = shapes(folder.path())
            .into_iter()
            .filter_map(|(key, _)| {
                let key = key
                    .strip_prefix("encoder.layer.1.")?
                    .strip_suffix(".boft_R")?;
                Some(key.to_string())
            })
            .collect();
        written.push(modules.into_iter().collect::<Vec<_>>());
        // Either map reads either file.
        for reader in [Transformers::V4, Transformers::V5] {
            let names = LoadOptions::new().with_key_map(KeyMap::dinov2(reader));
            let (loaded, report) = Adapter::load_with(folder.path(), &names).unwrap();
            assert!(report.converted.is_empty(), "{report}");
            let attached = loaded.attach(Dino::new()).unwrap();
            assert_eq!(
                numbers(&attached),
                numbers(&model),
                "{version:?} by {reader:?}"
            );
            let again = Adapter::extract_as(&attached, loaded.config()).unwrap();
            assert_eq!(again.layers(), adapter.layers());
        }
    }
    let v4 = [
        "attention.attention.query",
        "attention.attention.value",
        "attention.output.dense",
        "mlp.weights_in",
        "mlp.weights_out",
    ];
    let v5 = [
        "attention.o_proj",
        "attention.q_proj",
        "attention.v_proj",
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ];
    assert_eq!(written, [v4.to_vec(), v5.to_vec()]);
}

#[test]
fn saving_a_fused_layer_repeats_its_rotation_and_halves_its_scale_and_bias() {
    let adapter = Adapter::extract_as(&inject(Dino::new(), dino()).unwrap(), dino()).unwrap();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapter.save(whole.path()).unwrap();
    let names = SaveOptions::new().with_key_map(KeyMap::dinov2(Transformers::V5));
    adapter.save_with(parts.path(), &names).unwrap();
    let (whole, file) = (stored(whole.path()), stored(parts.path()));
    let key = |name: &str| format!("base_model.model.encoder.layer.0.mlp.{name}");
    let rotation = &whole[&key("weights_in.boft_R")];
    assert_eq!(&file[&key("gate_proj.boft_R")], rotation);
    assert_eq!(&file[&key("up_proj.boft_R")], rotation);
    for (name, shape) in [("boft_s", vec![10, 1]), ("base_layer.bias", vec![10])] {
        let all = single(&whole[&key(&format!("weights_in.{name}"))]);
        let gate = &file[&key(&format!("gate_proj.{name}"))];
        let up = &file[&key(&format!("up_proj.{name}"))];
        assert_eq!((&gate.1, &up.1), (&shape, &shape));
        assert_eq!(single(gate), all[..10]);
        assert_eq!(single(up), all[10..]);
    }
    let targets = &settings(parts.path())["target_modules"];
    assert_eq!(targets.as_array().unwrap().len(), 12);
    assert!(
        targets
            .to_string()
            .contains("\"encoder.layer.1.mlp.up_proj\""),
        "{targets}"
    );
}

#[test]
fn two_different_rotations_cannot_be_loaded_into_one_fused_layer() {
    let json = boft_json(json!({"boft_block_size": 2, "target_modules": ["gate_proj", "up_proj"]}));
    let key = |index: usize, name: &str| format!("encoder.layer.{index}.mlp.{name}");
    let keys = [
        (key(0, "gate_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(0, "gate_proj.boft_s"), vec![10, 1]),
        (key(0, "up_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(0, "up_proj.boft_s"), vec![10, 1]),
        (key(1, "gate_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(1, "gate_proj.boft_s"), vec![10, 1]),
    ];
    let tensors: Vec<_> = keys.iter().map(|(k, s)| (k.as_str(), s.clone())).collect();
    let folder = write(&json, &tensors);
    let names = LoadOptions::new()
        .with_key_map(KeyMap::dinov2(Transformers::V5))
        .allow_partial(true);
    let error = Adapter::load_with(folder.path(), &names).unwrap_err();
    let LoadError::Mismatch { mismatch, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(
        mismatch.to_string(),
        "wrong: `encoder.layer.0.mlp.gate_proj` and `encoder.layer.0.mlp.up_proj` are one layer in the model, \
         `encoder.layer.0.mlp.weights_in`, and one layer has one rotation where theirs differ; merge the adapter in \
         PEFT instead\n\
         wrong: `encoder.layer.1.mlp.weights_in` is one layer in the model and 2 in the file, which has nothing for \
         `encoder.layer.1.mlp.up_proj`"
    );
    // Without the map the two layers stay apart, and each may have its own rotation.
    assert_eq!(Adapter::load(folder.path()).unwrap().0.layers().len(), 3);
}

#[test]
fn a_fused_layer_of_which_only_one_part_has_a_scale_is_refused() {
    let adapter = Adapter::extract_as(&inject(Dino::new(), dino()).unwrap(), dino()).unwrap();
    let names = KeyMap::dinov2(Transformers::V5);
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions::new().with_key_map(names.clone());
    adapter.save_with(folder.path(), &options).unwrap();
    let mut files = Folder::read(folder.path()).unwrap();
    let up = |key: &String| key.ends_with("up_proj.boft_s");
    let key = files.tensors.keys().find(|key| up(key)).unwrap().clone();
    files.tensors.remove(&key);
    files.write(folder.path()).unwrap();
    let options = LoadOptions::new().with_key_map(names).allow_partial(true);
    let error = Adapter::load_with(folder.path(), &options).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("and only some of them have a scale"),
        "{error}"
    );
}

#[test]
fn a_file_with_a_fused_layer_and_its_parts_is_refused() {
    let json = boft_json(
        json!({"boft_block_size": 2, "target_modules": ["weights_in", "gate_proj", "up_proj"]}),
    );
    let layer = |name: &str| format!("mlp.{name}");
    let keys = ["weights_in", "gate_proj", "up_proj"].map(|name| {
        let outputs = if name == "weights_in" { 20 } else { 10 };
        [
            (layer(&format!("{name}.boft_R")), vec![1, 4, 2, 2]),
            (layer(&format!("{name}.boft_s")), vec![outputs, 1]),
        ]
    });
    let tensors: Vec<_> = keys
        .iter()
        .flatten()
        .map(|(k, s)| (k.as_str(), s.clone()))
        .collect();
    let folder = write(&json, &tensors);
    let names = LoadOptions::new().with_key_map(KeyMap::dinov2(Transformers::V4));
    let error = Adapter::load_with(folder.path(), &names).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the key map gives `mlp.weights_in` and `mlp.gate_proj` the same name, `mlp.weights_in`"
    );
}

#[test]
fn a_key_map_that_gives_two_layers_one_name_is_refused() {
    let folder = write(
        &boft_json(json!({"target_modules": ["up", "hidden"]})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", vec![16, 1]),
            ("up.boft_R", vec![1, 6, 4, 4]),
            ("up.boft_s", vec![16, 1]),
        ],
    );
    let names = KeyMap::new().with_to_model("^up$", "hidden").unwrap();
    let options = LoadOptions::new().with_key_map(names);
    let error = Adapter::load_with(folder.path(), &options).unwrap_err();
    assert!(matches!(error, LoadError::KeyMap(_)));
    assert_eq!(
        error.to_string(),
        "the key map gives `hidden` and `up` the same name, `hidden`"
    );
}

#[test]
fn target_modules_of_a_file_are_matched_against_the_names_in_the_file() {
    // `q_proj` names the last layer too, whose tensors are missing; the model itself has no `q_proj`.
    let json = boft_json(json!({"boft_block_size": 2, "target_modules": ["q_proj"]}));
    let folder = write(
        &json,
        &[
            ("encoder.layer.0.attention.q_proj.boft_R", vec![1, 4, 2, 2]),
            ("encoder.layer.0.attention.q_proj.boft_s", vec![12, 1]),
        ],
    );
    for version in [Transformers::V4, Transformers::V5] {
        let names = LoadOptions::new().with_key_map(KeyMap::dinov2(version));
        let (adapter, _) = Adapter::load_with(folder.path(), &names).unwrap();
        let error = adapter.attach(Dino::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing: the adapter of `encoder.layer.1.attention.attention.query`, which `target_modules` names"
        );
    }
}
