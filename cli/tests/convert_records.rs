//! `convert` to and from the records of Burn.

use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Tensor as Numbers, TensorData};
use burn_boft::value::AdapterLayer;
use burn_boft::{Adapter, AdapterConfig, BoftConfig, OftConfig, TargetModules, inject, merge};
use serde_json::{Value, json};

use crate::files::*;

#[test]
fn a_record_comes_back_as_the_adapter_it_was() {
    for name in [
        "boft-mlp-bias-only-saved",
        "boft-conv-m2-b6",
        "oft-linear-neumann-5",
        "oft-linear-share-coft",
        "oft-text-neumann-head",
        "boft-mlp-saved-batch-norm",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        succeed(
            folder.path(),
            &convert_command(case.adapter(), "record", "adapter.bpk"),
        );
        succeed(
            folder.path(),
            &convert_command("adapter.bpk", "peft", "back"),
        );
        assert_models(&merged(folder.path(), "back"), &case.merged, 1e-5, name);
        let file = "adapter_config.json";
        let (before, after) = (
            read_json(&case.adapter.join(file)),
            read_json(&folder.path().join("back").join(file)),
        );
        for key in [
            "peft_type",
            "bias",
            "target_modules",
            "modules_to_save",
            "base_model_name_or_path",
        ] {
            // PEFT's lists are sets.
            let sorted = |value: &Value| match value.as_array() {
                Some(names) => {
                    let mut names: Vec<_> = names.iter().map(Value::to_string).collect();
                    names.sort();
                    json!(names)
                }
                None => value.clone(),
            };
            assert_eq!(sorted(&before[key]), sorted(&after[key]), "{name}: {key}");
        }
    }
}

#[derive(Module, Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
    norm: LayerNorm,
    classifier: Linear,
}

impl Mlp {
    fn new(tensors: &Tensors, device: &Device) -> Self {
        let layer = |name: &str| {
            let weight = &tensors[&format!("{name}.weight")];
            let [o, d] = [weight.shape[0], weight.shape[1]];
            let transposed: Vec<f64> = (0..d * o)
                .map(|at| weight.numbers[at % o * d + at / o])
                .collect();
            let bias = tensors[&format!("{name}.bias")].numbers.clone();
            let mut layer = LinearConfig::new(d, o).init(device);
            layer.weight = layer.weight.map(|_| {
                burn::tensor::Tensor::from_data(
                    TensorData::new(transposed, [d, o]).convert::<f32>(),
                    device,
                )
            });
            layer.bias = layer.bias.map(|param| {
                param.map(|_| {
                    burn::tensor::Tensor::from_data(
                        TensorData::new(bias, [o]).convert::<f32>(),
                        device,
                    )
                })
            });
            layer
        };
        Self {
            fc1: layer("fc1"),
            fc2: layer("fc2"),
            norm: LayerNormConfig::new(16).init(device),
            classifier: layer("classifier"),
        }
    }

    /// The linear layers, in PyTorch's naming and orientation.
    fn tensors(&self) -> Tensors {
        let layers = [
            ("fc1", &self.fc1),
            ("fc2", &self.fc2),
            ("classifier", &self.classifier),
        ];
        let tensors = layers.into_iter().flat_map(|(name, layer)| {
            let weight = layer.weight.val().transpose();
            let [o, d] = weight.dims();
            let weight = weight.into_data().iter::<f64>().collect();
            let bias = layer
                .bias
                .as_ref()
                .unwrap()
                .val()
                .into_data()
                .iter::<f64>()
                .collect();
            [
                (format!("{name}.weight"), Tensor::new(&[o, d], weight)),
                (format!("{name}.bias"), Tensor::new(&[o], bias)),
            ]
        });
        tensors.collect()
    }
}

/// The model of a case with the record `adapter.bpk` in it. Its merged weights have to be those of PEFT.
fn loaded(case: &Case, folder: &Path, config: AdapterConfig) -> Mlp {
    let model = inject(Mlp::new(&case.base, &Device::flex()), config).unwrap();
    let record = ModuleRecord::load(folder.join("adapter.bpk")).unwrap();
    let model = model.try_load_record(record.allow_partial(true)).unwrap();
    let found = merge(model.clone()).unwrap().tensors();
    let mut expected = case.merged.clone();
    expected.retain(|key, _| found.contains_key(key));
    assert_models(&found, &expected, 1e-5, "in Burn");
    model
}

#[test]
fn a_record_loads_into_an_injected_model_and_one_of_it_becomes_pefts() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    succeed(
        folder.path(),
        &convert_command(case.adapter(), "record", "adapter.bpk"),
    );
    let (adapter, _) = Adapter::load(&case.adapter).unwrap();
    let model = loaded(&case, folder.path(), adapter.config().clone());

    // Burn's own record of the whole model says nothing of settings and kinds: those are given beside.
    model
        .into_record()
        .save(folder.path().join("model.bpk"))
        .unwrap();
    let convert = convert_command("model.bpk", "peft", "back");
    assert_eq!(
        refused(folder.path(), &convert),
        "model.bpk: it does not hold the settings of the adapter; pass --config with its adapter_config.json"
    );
    let config = case.adapter.join("adapter_config.json");
    let convert = [&convert[..], &["--config", config.to_str().unwrap()]].concat();
    assert_eq!(
        refused(folder.path(), &convert),
        "PEFT stores linear layers and convolutions differently, and nothing says which of them `fc1` is; pass --base so \
         that the layer type can be looked up"
    );
    succeed(
        folder.path(),
        &[&convert[..], &["--base", "base.safetensors"]].concat(),
    );
    assert_models(&merged(folder.path(), "back"), &case.merged, 1e-5, "back");
}

/// A record holds what is trained, under a name that says whether that is a multiple of the numbers of `Q`.
#[test]
fn a_record_of_a_scaled_skew_has_the_numbers_that_are_trained() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let (adapter, _) = Adapter::load(&case.adapter).unwrap();
    let mut config = adapter.config().clone();
    config.set_scaled_skew(true);
    let layers = adapter.layers().to_vec();
    let scaled = Adapter::from_parts(config.clone(), layers, adapter.tensors().to_vec()).unwrap();
    scaled.save(folder.path().join("scaled")).unwrap();
    succeed(
        folder.path(),
        &convert_command("scaled", "record", "adapter.bpk"),
    );

    let model = loaded(&case, folder.path(), config);

    // Burn's own record of the model, and the one from before, are read as what they are.
    model
        .into_record()
        .save(folder.path().join("model.bpk"))
        .unwrap();
    let settings = case.adapter.join("adapter_config.json");
    let beside = [
        "--config",
        settings.to_str().unwrap(),
        "--base",
        "base.safetensors",
    ];
    for (record, output) in [("model.bpk", "of the model"), ("adapter.bpk", "back")] {
        let convert = convert_command(record, "peft", output);
        succeed(folder.path(), &[&convert[..], &beside].concat());
        assert_models(&merged(folder.path(), output), &case.merged, 1e-5, output);
        let (back, _) = Adapter::load(folder.path().join(output)).unwrap();
        assert!(back.config().scaled_skew(), "{output}");
    }
}

#[test]
fn a_parameter_that_pytorch_itself_calls_gamma_is_not_put_into_a_record() {
    let case = Case::open("cases/boft-mlp-saved-batch-norm");
    let folder = case.folder();
    let tensors = read(&case.adapter.join("adapter_model.safetensors")).into_iter();
    let tensors = tensors.map(|(key, tensor)| (key.replace("norm.weight", "norm.gamma"), tensor));
    let config = read_json(&case.adapter.join("adapter_config.json"));
    write_adapter(&folder.path().join("gamma"), &config, &tensors.collect());
    assert_eq!(
        refused(
            folder.path(),
            &[
                "convert",
                "gamma",
                "--to",
                "record",
                "--output",
                "a.bpk",
                "--base",
                "base.safetensors"
            ]
        ),
        "`norm.gamma` has a name that means `weight` in Burn's norms, and would be read back as that; keep the adapter in \
         PEFT's folder"
    );
}

/// A PReLU and a norm without a bias have the same tensors in PyTorch, and Burn calls those of a PReLU otherwise.
#[test]
fn the_weight_of_an_activation_is_not_put_into_a_record_as_that_of_a_norm() {
    let case = Case::open("cases/boft-mlp-saved-batch-norm");
    let folder = case.folder();
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    tensors.retain(|key, _| !key.contains(".norm.") || key.ends_with("norm.weight"));
    let renamed = |name: &str| {
        let key = |key: &str| key.replace(".norm.", &format!(".{name}."));
        let tensors = tensors
            .iter()
            .map(|(old, tensor)| (key(old), tensor.clone()));
        let mut config = read_json(&case.adapter.join("adapter_config.json"));
        config["modules_to_save"] = json!([name, "classifier"]);
        write_adapter(&folder.path().join(name), &config, &tensors.collect());
        let command = ["convert", name, "--to", "record", "--output", "a.bpk"];
        command.map(str::to_string).to_vec()
    };
    assert_eq!(
        refused(folder.path(), &texts(&renamed("act1"))),
        "`act1.weight` may belong to a PReLU, whose weight Burn calls `alpha`, and a record cannot say so; attach the adapter \
         to its model in Rust and save that"
    );
    for norm in ["rms", "actor_norm"] {
        succeed(folder.path(), &texts(&renamed(norm)));
        fs::remove_file(folder.path().join("a.bpk")).unwrap();
    }
}

#[derive(Module, Debug)]
struct ScaledBlock {
    fc: Linear,
    /// A scale of the model's own, as ConvNeXt has it, which PyTorch calls by the same name.
    gamma: Param<Numbers<1>>,
}

#[test]
fn a_gamma_that_is_no_part_of_a_norm_keeps_its_name() {
    let folder = tempfile::tempdir().unwrap();
    #[derive(Module, Debug)]
    struct Model {
        hidden: Linear,
        block: ScaledBlock,
        norm: LayerNorm,
    }
    let device = Device::flex();
    let model = Model {
        hidden: LinearConfig::new(8, 6).init(&device),
        block: ScaledBlock {
            fc: LinearConfig::new(6, 6).init(&device),
            gamma: Param::from_tensor(Numbers::from_data([0.5f32, 2.0, 3.0], &device)),
        },
        norm: LayerNormConfig::new(6).init(&device),
    };
    let config = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["hidden"])
        .with_modules_to_save(["block", "norm"]);
    let settings = serde_json::to_value(AdapterConfig::from(config.clone())).unwrap();
    write_json(&folder.path().join("settings.json"), &settings);
    let record = inject(model, config).unwrap().into_record();
    record.save(folder.path().join("model.bpk")).unwrap();
    let convert = convert_command("model.bpk", "peft", "back");
    succeed(
        folder.path(),
        &[&convert[..], &["--config", "settings.json"]].concat(),
    );
    let tensors = read(&folder.path().join("back/adapter_model.safetensors"));
    let saved = tensors.keys().filter(|key| !key.contains("oft_R"));
    let saved: Vec<_> = saved
        .map(|key| key.trim_start_matches("base_model.model."))
        .collect();
    assert_eq!(
        saved,
        [
            "block.fc.bias",
            "block.fc.weight",
            "block.gamma",
            "norm.bias",
            "norm.weight"
        ]
    );
    let gamma = &tensors["base_model.model.block.gamma"];
    assert_eq!(gamma.numbers, [0.5, 2.0, 3.0]);
}

/// The path of such a layer is empty, so the names in its record start with those of the adapter.
#[test]
fn the_record_of_a_model_that_is_one_layer_is_converted() {
    let folder = tempfile::tempdir().unwrap();
    let layer = LinearConfig::new(8, 6).init(&Device::flex());
    let config = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(TargetModules::AllLinear);
    let settings = serde_json::to_value(AdapterConfig::from(config.clone())).unwrap();
    write_json(&folder.path().join("settings.json"), &settings);
    let record = inject(layer, config).unwrap().into_record();
    record.save(folder.path().join("layer.bpk")).unwrap();
    succeed(
        folder.path(),
        &[
            "convert",
            "layer.bpk",
            "--config",
            "settings.json",
            "--to",
            "peft",
            "--output",
            "adapter",
        ],
    );
    let (adapter, _) = Adapter::load(folder.path().join("adapter")).unwrap();
    let layers = adapter.layers().iter().map(AdapterLayer::path);
    assert_eq!(layers.collect::<Vec<_>>(), [""]);
}

#[test]
fn a_file_that_is_not_a_record_of_an_adapter_is_refused() {
    let case = Case::open("cases/boft-linear-m1-b4");
    let folder = case.folder();
    std::fs::write(folder.path().join("a.bpk"), "nothing").unwrap();
    let convert = |input: &str| refused(folder.path(), &convert_command(input, "peft", "out"));
    assert!(
        convert("a.bpk").starts_with("a.bpk: not a Burn record: "),
        "{}",
        convert("a.bpk")
    );
    let device = Device::flex();
    let layer = LinearConfig::new(8, 6).init(&device);
    layer
        .into_record()
        .save(folder.path().join("b.bpk"))
        .unwrap();
    let config = case.adapter.join("adapter_config.json");
    assert_eq!(
        refused(
            folder.path(),
            &[
                "convert",
                "b.bpk",
                "--config",
                config.to_str().unwrap(),
                "--to",
                "peft",
                "--output",
                "out"
            ]
        ),
        "b.bpk: it holds no adapter: no tensor has a name that ends with `weight.boft.skew`"
    );
    let plain = BoftConfig::new()
        .with_scale(false)
        .with_target_modules(["fc1"]);
    let model = inject(
        Mlp::new(&Case::open("cases/boft-mlp-bias-only-saved").base, &device),
        plain,
    )
    .unwrap();
    model
        .into_record()
        .save(folder.path().join("c.bpk"))
        .unwrap();
    assert_eq!(
        refused(
            folder.path(),
            &[
                "convert",
                "c.bpk",
                "--config",
                config.to_str().unwrap(),
                "--to",
                "peft",
                "--output",
                "out"
            ]
        ),
        "c.bpk: `fc1` has no scale, and PEFT's BOFT has one"
    );
    assert_eq!(
        refused(
            folder.path(),
            &[
                "convert",
                case.adapter(),
                "--config",
                "x",
                "--to",
                "peft",
                "--output",
                "out"
            ]
        ),
        "--config is for a record; a folder has its own settings"
    );
}

#[test]
fn map_rules_give_a_record_the_names_of_its_model() {
    let fixtures = fixtures().join("dinov2");
    let folder = tempfile::tempdir().unwrap();
    let keys = |version: &str, rules: &[&str]| -> Vec<String> {
        let (adapter, output) = (fixtures.join(version), format!("{version}.bpk"));
        let convert = convert_command(adapter.to_str().unwrap(), "record", &output);
        succeed(folder.path(), &[&convert[..], rules].concat());
        let reader = burn_pack::Reader::from_file(folder.path().join(output)).unwrap();
        let mut names: Vec<_> = reader
            .tensor_names()
            .into_iter()
            .map(str::to_string)
            .collect();
        names.sort();
        names
    };
    let old = keys("transformers-4", &["--map", r"^dinov2\.=backbone."]);
    let new = keys(
        "transformers-5",
        &["--map", "dinov2", "--map", r"^dinov2\.=backbone."],
    );
    assert_eq!(old, new);
    let skew = "backbone.encoder.layer.0.mlp.weights_in.weight.boft.skew";
    assert!(old.contains(&skew.to_string()), "{old:?}");
}

#[test]
fn a_record_whose_metadata_is_malformed_is_refused() {
    let case = Case::open("cases/boft-mlp-saved-batch-norm");
    let folder = case.folder();
    let convert = |input: &str, to: &str, output: &str| {
        let options = convert_command(input, to, output);
        run(folder.path(), &options)
    };
    assert_eq!(convert(case.adapter(), "record", "good.bpk").code, 0);
    let path = folder.path().join("good.bpk");
    for (key, value, expected) in [
        (
            "layer_kinds",
            "[1",
            "`layer_kinds` of its metadata is not a JSON object",
        ),
        (
            "num_batches_tracked",
            "7",
            "`num_batches_tracked` of its metadata is not a JSON object",
        ),
        (
            "num_batches_tracked",
            r#"{"norm": "many"}"#,
            "the count of batches of `norm` is \"many\", not a whole number",
        ),
    ] {
        let reader = burn_pack::Reader::from_file(&path).unwrap();
        let mut metadata = reader.metadata().clone();
        assert!(
            metadata
                .insert(key.to_string(), value.to_string())
                .is_some()
        );
        let writer = burn_pack::Writer::new(reader.into_tensors().unwrap());
        let writer = metadata.iter().fold(writer, |writer, (key, value)| {
            writer.with_metadata(key, value)
        });
        writer.write_to_file(folder.path().join("bad.bpk")).unwrap();
        let refused = convert("bad.bpk", "peft", "out");
        assert_eq!(refused.code, 2, "{key}: {}", refused.stderr);
        assert!(refused.stderr.contains(expected), "{}", refused.stderr);
        assert!(!folder.path().join("out").exists());
    }
}
