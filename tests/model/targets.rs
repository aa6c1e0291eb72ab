//! What the names in `target_modules` must select, and the list of candidates.

use burn::module::Module;
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::Device;
use burn_boft::model::{InjectError, Misfit, Unsupported};
use burn_boft::{BoftConfig, LayerKind, candidates, inject, plan};

#[derive(Module, Debug)]
struct Block {
    query: Linear,
    value: Linear,
    norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Encoder {
    layer: Vec<Block>,
}

#[derive(Module, Debug)]
struct Model {
    c1: Conv1d,
    c2: Conv2d,
    encoder: Encoder,
    head: Linear,
}

fn model() -> Model {
    let device = Device::flex();
    let linear = |d_output| LinearConfig::new(16, d_output).init(&device);
    let block = || Block {
        query: linear(12),
        value: linear(20),
        norm: LayerNormConfig::new(16).init(&device),
    };
    Model {
        c1: Conv1dConfig::new(4, 8, 3).init(&device),
        c2: Conv2dConfig::new([4, 8], [3, 3]).init(&device),
        encoder: Encoder {
            layer: vec![block(), block(), block()],
        },
        head: linear(5),
    }
}

fn names(names: &[&str]) -> BoftConfig {
    BoftConfig::new().with_target_modules(names.to_vec())
}

fn refused(config: BoftConfig) -> InjectError {
    plan(&model(), config).unwrap_err()
}

fn paths(config: BoftConfig) -> Vec<String> {
    let plan = plan(&model(), config).unwrap();
    plan.layers.into_iter().map(|layer| layer.path).collect()
}

#[test]
fn a_name_that_selects_an_unsupported_layer_is_refused_beside_good_names() {
    let error = refused(names(&["c1", "c2", "head"]));
    assert_eq!(
        error.to_string(),
        "target_modules selects `c1`, which is a Conv1d; only Linear and Conv2d layers can be adapted, and by OFT \
         Embedding layers; leave it out"
    );
    assert_eq!(
        error.misfits(),
        [Misfit::UnsupportedTarget {
            path: "c1".to_string(),
            reason: Unsupported::Type {
                type_name: "Conv1d".to_string()
            },
        }]
    );
    let error = refused(names(&["norm", "head"]));
    assert!(
        error.to_string().contains("which is a LayerNorm"),
        "{error}"
    );
    // A module that only holds layers is no layer.
    let error = refused(names(&["encoder.layer.0", "head"]));
    assert!(
        error
            .to_string()
            .contains("`encoder.layer.0`, which is a Block that holds layers"),
        "{error}"
    );
}

#[test]
fn a_misspelt_name_is_refused_beside_good_names() {
    let error = refused(names(&["query", "valeu"]));
    assert_eq!(
        error.to_string(),
        "target_modules names `valeu`, which selects nothing in the model; it has `encoder.layer.0.value`; correct or remove \
         the name, or set allow_absent_targets"
    );
    let adapted = paths(names(&["query", "valeu"]).with_absent_targets_allowed(true));
    assert_eq!(
        adapted,
        [
            "encoder.layer.0.query",
            "encoder.layer.1.query",
            "encoder.layer.2.query"
        ]
    );
    // Names may be absent, but not all of them, and none may be of an unsupported layer.
    let error = refused(names(&["valeu"]).with_absent_targets_allowed(true));
    assert!(
        matches!(error.misfits(), [Misfit::NoTarget { .. }]),
        "{error}"
    );
    let error = refused(names(&["c1", "query"]).with_absent_targets_allowed(true));
    assert!(
        matches!(error.misfits(), [Misfit::UnsupportedTarget { .. }]),
        "{error}"
    );
}

#[test]
fn a_name_of_pytorch_gets_the_nearest_names_of_the_model() {
    let error = refused(names(&["q_proj"]));
    let [Misfit::UnknownTarget { name, nearest }] = error.misfits() else {
        panic!("{error}");
    };
    assert_eq!(name, "q_proj");
    assert!(!nearest.is_empty() && nearest.len() <= 3, "{nearest:?}");
}

#[test]
fn a_name_whose_layers_are_all_outside_of_layers_to_transform_is_refused() {
    let config = || names(&["query", "head"]);
    let error = refused(config().with_layers_to_transform([7]));
    assert_eq!(
        error.to_string(),
        "target_modules names `query`, and layers_to_transform leaves out all 3 layers of that name; correct the \
         indices or layers_pattern, or give full paths"
    );
    // `head` is a full path, which is taken whatever its layer.
    assert_eq!(
        paths(config().with_layers_to_transform([1])),
        ["encoder.layer.1.query", "head"]
    );
}

#[test]
fn an_excluded_name_has_selected_something() {
    let config = names(&["query", "value"]).with_exclude_modules(["query"]);
    assert_eq!(
        paths(config),
        [
            "encoder.layer.0.value",
            "encoder.layer.1.value",
            "encoder.layer.2.value"
        ]
    );
}

#[test]
fn candidates_lists_the_layers_and_why_the_others_are_none() {
    let found = candidates(&model());
    let layers = found
        .layers
        .iter()
        .map(|layer| (layer.path.as_str(), layer.kind));
    let linear = |path| (path, LayerKind::Linear);
    assert_eq!(
        layers.collect::<Vec<_>>(),
        [
            ("c2", LayerKind::Conv2d),
            linear("encoder.layer.0.query"),
            linear("encoder.layer.0.value"),
            linear("encoder.layer.1.query"),
            linear("encoder.layer.1.value"),
            linear("encoder.layer.2.query"),
            linear("encoder.layer.2.value"),
            linear("head"),
        ]
    );
    assert_eq!(found.layers[0].shape, [8, 4, 3, 3]);
    let other = |path: &str| {
        let found = found.others.iter().find(|other| other.path == path);
        found.unwrap_or_else(|| panic!("{path}")).reason.to_string()
    };
    assert_eq!(
        other("c1.weight"),
        "which is a Conv1d; only Linear and Conv2d layers can be adapted, and by OFT Embedding layers"
    );
    assert_eq!(
        other("encoder.layer.1.query.bias"),
        "which a Linear has beside its weight; only weights are rotated"
    );
    let adapted = inject(model(), names(&["head"])).unwrap();
    let found = candidates(&adapted);
    assert_eq!(found.layers.len(), 7);
    assert!(
        found
            .to_string()
            .contains("already carries the reparameterization `boft`"),
        "{found}"
    );
}
