//! What PEFT's files hold beside what was trained: copies of embeddings and heads, and biases of the modules that it wraps.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, TensorData};
use burn_boft::peft::{Folder, LoadOptions};
use burn_boft::{Adapter, BoftConfig, BoftLinear, inject};
use serde_json::json;

use super::support::*;
use crate::common::models::{linear, numbers};

#[derive(Module, Debug)]
struct Language {
    hidden: BoftLinear,
    lm_head: BoftLinear,
}

impl Language {
    fn new() -> Self {
        let layer = |sizes, seed| linear(sizes, seed, DType::F32, &device()).into();
        Self {
            hidden: layer([24, 16], 3),
            lm_head: layer([16, 20], 5),
        }
    }
}

/// Adds tensors to an adapter's folder.
fn add(folder: &Path, tensors: impl IntoIterator<Item = (&'static str, TensorData)>) {
    let mut files = Folder::read(folder).unwrap();
    for (key, data) in tensors {
        files
            .tensors
            .insert(format!("base_model.model.{key}"), data);
    }
    files.write(folder).unwrap();
}

#[test]
fn a_head_with_an_adapter_has_a_copy_of_its_weight_beside_it() {
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["hidden", "lm_head"]);
    let model = inject(Language::new(), &config).unwrap();
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let weight = Language::new().lm_head.weight.val().transpose().into_data();
    let bias = Language::new().lm_head.bias.unwrap().val().into_data();
    let keys = ["lm_head.base_layer.weight", "lm_head.base_layer.bias"];
    add(folder.path(), [(keys[0], weight.clone()), (keys[1], bias)]);
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert!(report.warnings.is_empty() && report.converted.is_empty());
    assert_eq!(adapter.base_copies().len(), 2);
    assert!(adapter.tensors().is_empty());
    let attached = adapter.attach(Language::new()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));

    // They come back, so that PEFT finds a vocabulary of another size.
    let again = saved(&adapter);
    assert_eq!(stored(again.path()), stored(folder.path()));

    // In half precision they are the same numbers as far as it tells.
    add(
        folder.path(),
        [(keys[0], weight.clone().convert_dtype(DType::BF16))],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    adapter.attach(Language::new()).unwrap();

    let mut other = weight.as_slice::<f32>().unwrap().to_vec();
    other[7] += 0.01;
    add(
        folder.path(),
        [(keys[0], TensorData::new(other, weight.shape().clone()))],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        adapter.attach(Language::new()).unwrap_err().to_string(),
        "wrong: `lm_head.weight` has other numbers in the model than in the copy that the file keeps of the base; use the \
         model that the adapter was trained on"
    );
    add(
        folder.path(),
        [(keys[0], TensorData::new(vec![0.5f32; 16 * 21], [21, 16]))],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    assert!(adapter.attach(Language::new()).is_err());
}

#[test]
fn an_embedding_that_was_resized_is_a_copy_although_it_has_no_adapter() {
    let folder = write(
        &boft_json(json!({})),
        &[hidden(), vec![("model.embed_tokens.weight", vec![9, 24])]].concat(),
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let copies: Vec<_> = adapter
        .base_copies()
        .iter()
        .map(|copy| copy.module())
        .collect();
    assert_eq!(copies, ["model.embed_tokens"]);
    assert_eq!(
        adapter
            .attach(base::<BoftLinear>())
            .unwrap_err()
            .to_string(),
        "unexpected: `model.embed_tokens.weight`, which the model has no parameter for"
    );
}

#[test]
fn biases_inside_of_a_wrapped_module_are_left_out_where_all_are_saved() {
    let strays = [
        "bert.pooler.modules_to_save.default.dense.bias",
        "bert.pooler.original_module.dense.bias",
    ];
    let tensors = strays.map(|key| (key, vec![5]));
    let own = [
        ("bert.pooler.dense.weight", vec![5, 5]),
        ("bert.pooler.dense.bias", vec![5]),
    ];
    let settings = |bias| boft_json(json!({"bias": bias, "modules_to_save": ["pooler"]}));
    let all = [&hidden()[..], &own, &tensors].concat();
    let (adapter, report) = Adapter::load(write(&settings("all"), &all).path()).unwrap();
    let saved: Vec<_> = adapter
        .tensors()
        .iter()
        .map(|t| (t.module(), t.name()))
        .collect();
    assert_eq!(
        saved,
        [
            ("bert.pooler.dense", "bias"),
            ("bert.pooler.dense", "weight")
        ]
    );
    assert_eq!(
        report.converted,
        strays.map(|key| format!(
            "`base_model.model.{key}` is left out: a copy that PEFT keeps beside the module it saves"
        ))
    );
}

/// What PEFT 0.21.2 writes for a Llama whose vocabulary was resized: it collects every key that an embedding's name is in.
#[test]
fn weights_inside_of_a_wrapped_embedding_are_left_out_where_the_vocabulary_was_resized() {
    let copies = [
        "lm_head.modules_to_save.weight",
        "lm_head.original_module.weight",
        "model.embed_tokens.modules_to_save.weight",
        "model.embed_tokens.original_module.weight",
    ];
    let trained = [
        ("lm_head.weight", vec![9, 24]),
        ("model.embed_tokens.weight", vec![9, 24]),
    ];
    let tensors = [
        &hidden()[..],
        &trained,
        &copies.map(|key| (key, vec![9, 24])),
    ]
    .concat();
    for saved in [&["embed_tokens", "lm_head"][..], &["embed_tokens"]] {
        let settings = boft_json(json!({"modules_to_save": saved}));
        let (adapter, report) = Adapter::load(write(&settings, &tensors).path()).unwrap();
        let kept = adapter.tensors().iter().chain(adapter.base_copies());
        let mut kept: Vec<_> = kept.map(|tensor| tensor.module()).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["lm_head", "model.embed_tokens"]);
        assert_eq!(adapter.tensors().len(), saved.len());
        assert_eq!(
            report.converted,
            copies.map(|key| format!(
                "`base_model.model.{key}` is left out: a copy that PEFT keeps beside the module it saves"
            ))
        );
    }
}

#[test]
fn the_bias_of_an_adapted_layer_without_its_rotation_is_no_adapter() {
    for bias in ["all", "boft_only"] {
        let json = boft_json(json!({"bias": bias, "target_modules": ["hidden", "output"]}));
        let tensors = [
            ("hidden.base_layer.bias", vec![16]),
            ("output.base_layer.bias", vec![12]),
        ];
        let folder = write(&json, &[&hidden()[..], &tensors].concat());
        assert_eq!(
            amiss(folder.path()),
            "missing: `base_model.model.output.boft_R`"
        );
        let partial = LoadOptions::new().allow_partial(true);
        let (adapter, _) = Adapter::load_with(folder.path(), &partial).unwrap();
        // What is left can be written, and read again without a word.
        Adapter::load(saved(&adapter).path()).unwrap();
    }
}
