//! `convert`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::store::ModuleRecord;
use burn::tensor::{Device, TensorData};
use burn_boft::{Adapter, BoftConfig, inject, merge};
use serde_json::{Value, json};

use crate::files::*;

/// What merging an adapter makes of a case's base.
fn merged(folder: &Path, adapter: &str) -> Tensors {
    let output = format!("{adapter}-merged.safetensors");
    succeed(
        folder,
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            adapter,
            "--output",
            &output,
        ],
    );
    read(&folder.join(output))
}

#[test]
fn every_layout_becomes_todays_and_means_the_same() {
    let mut converted = 0;
    for case in Case::all() {
        let folder = case.folder();
        let convert = ["convert", case.adapter(), "--to", "peft", "--output", "new"];
        // What 0.14 and 0.15 wrote does not tell a convolution from a linear layer.
        let is_square = case.name.contains("old/oft-square");
        if is_square {
            let line = run(folder.path(), &convert).stderr;
            assert!(
                line.ends_with("which PEFT stores differently; --base tells\n"),
                "{line}"
            );
        }
        let base: &[&str] = if is_square {
            &["--base", "base.safetensors"]
        } else {
            &[]
        };
        let run = run(folder.path(), &[&convert, base].concat());
        assert_eq!(run.code, 0, "{}: {}", case.name, run.stderr);
        let keys = read(&folder.path().join("new/adapter_model.safetensors"));
        assert!(
            !keys
                .keys()
                .any(|key| key.ends_with("boft_P") || key.contains("oft_r.")),
            "{}",
            case.name
        );
        assert_models(
            &merged(folder.path(), "new"),
            &case.merged,
            1e-5,
            &case.name,
        );
        converted += 1;
    }
    assert!(converted > 80);
}

#[test]
fn a_record_comes_back_as_the_adapter_it_was() {
    for name in [
        "boft-mlp-bias-only-saved",
        "boft-conv-m2-b6",
        "oft-linear-neumann-5",
        "oft-linear-share-coft",
        "boft-mlp-saved-batch-norm",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        succeed(
            folder.path(),
            &[
                "convert",
                case.adapter(),
                "--to",
                "record",
                "--output",
                "adapter.bpk",
            ],
        );
        succeed(
            folder.path(),
            &["convert", "adapter.bpk", "--to", "peft", "--output", "back"],
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

#[test]
fn a_record_loads_into_an_injected_model_and_one_of_it_becomes_pefts() {
    let device = Device::flex();
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    succeed(
        folder.path(),
        &[
            "convert",
            case.adapter(),
            "--to",
            "record",
            "--output",
            "adapter.bpk",
        ],
    );
    let (adapter, _) = Adapter::load(&case.adapter).unwrap();
    let model = inject(Mlp::new(&case.base, &device), adapter.config().clone()).unwrap();
    let record = ModuleRecord::load(folder.path().join("adapter.bpk")).unwrap();
    let model = model.try_load_record(record.allow_partial(true)).unwrap();
    let found = merge(model.clone()).unwrap().tensors();
    let mut expected = case.merged.clone();
    expected.retain(|key, _| found.contains_key(key));
    assert_models(&found, &expected, 1e-5, "in Burn");

    // Burn's own record of the whole model says nothing of settings and kinds: those are given beside.
    model
        .into_record()
        .save(folder.path().join("model.bpk"))
        .unwrap();
    let convert = ["convert", "model.bpk", "--to", "peft", "--output", "back"];
    assert_eq!(
        refused(folder.path(), &convert),
        "model.bpk: it does not say how the adapter was made; --config names an adapter_config.json that does"
    );
    let config = case.adapter.join("adapter_config.json");
    let convert = [&convert[..], &["--config", config.to_str().unwrap()]].concat();
    assert_eq!(
        refused(folder.path(), &convert),
        "`fc1` is a linear layer or a convolution, which PEFT stores differently; --base tells"
    );
    succeed(
        folder.path(),
        &[&convert[..], &["--base", "base.safetensors"]].concat(),
    );
    assert_models(&merged(folder.path(), "back"), &case.merged, 1e-5, "back");
}

#[test]
fn blocks_of_one_channel_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": false, "target_modules": ["fc"]});
    let tensors = [(
        "base_model.model.fc.oft_R.weight".to_string(),
        Tensor::new(&[7, 0], Vec::new()),
    )];
    write_adapter(&folder.path().join("idle"), &config, &tensors.into());
    let base = [("fc.weight".to_string(), Tensor::random(&[5, 7], 1))].into();
    write(&folder.path().join("base.safetensors"), &base);
    let printed = succeed(
        folder.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "idle",
            "--output",
            "merged.safetensors",
        ],
    );
    assert_eq!(
        printed,
        "merged.safetensors: 0 layers rotated, 1 layer with blocks of one channel left as is\n"
    );
    assert_eq!(read(&folder.path().join("merged.safetensors")), base);
    succeed(
        folder.path(),
        &[
            "convert",
            "idle",
            "--to",
            "boft",
            "--base",
            "base.safetensors",
            "--output",
            "boft",
        ],
    );
    assert_eq!(merged(folder.path(), "boft"), base);
}

#[test]
fn oft_with_the_exact_map_is_boft_with_one_factor_and_a_scale_of_ones() {
    for name in [
        "oft-linear-exact-b4",
        "oft-linear-exact-b5",
        "oft-conv-exact-b4",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        succeed(
            folder.path(),
            &[
                "convert",
                case.adapter(),
                "--to",
                "boft",
                "--base",
                "base.safetensors",
                "--output",
                "boft",
            ],
        );
        assert_models(&merged(folder.path(), "boft"), &case.merged, 1e-5, name);
        let printed = succeed(
            folder.path(),
            &["convert", "boft", "--to", "oft", "--output", "oft"],
        );
        assert_eq!(printed, "oft: 1 layer\n");
        assert_models(&merged(folder.path(), "oft"), &case.merged, 1e-5, name);
        let numbers = |folder: &Path| read(&folder.join("adapter_model.safetensors"));
        assert_eq!(
            numbers(&folder.path().join("oft")),
            numbers(&case.adapter),
            "{name}"
        );
    }
}

/// PEFT 0.14 and 0.15 wrote one block for a layer on request, and it is read as BOFT, which has no such setting.
#[test]
fn a_block_that_a_layer_shares_stays_one_or_is_refused() {
    let case = Case::open("old/oft-square-share");
    let folder = case.folder();
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    for (key, tensor) in &mut tensors {
        if key.ends_with("oft_s") {
            tensor.numbers.fill(1.0);
        }
    }
    let config = read_json(&case.adapter.join("adapter_config.json"));
    write_adapter(&folder.path().join("shared"), &config, &tensors);
    let convert = |input: &str, to: &str, output: &str| {
        let arguments = [
            "convert",
            input,
            "--to",
            to,
            "--output",
            output,
            "--base",
            "base.safetensors",
        ];
        run(folder.path(), &arguments)
    };
    assert_eq!(convert("shared", "oft", "oft").code, 0);
    let settings = read_json(&folder.path().join("oft/adapter_config.json"));
    assert_eq!(settings["block_share"], true);
    let expected = merged(folder.path(), "shared");
    assert_models(&merged(folder.path(), "oft"), &expected, 1e-6, "oft");
    assert!(expected != case.base);

    let refused = convert("shared", "record", "a.bpk");
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.ends_with(
            "error: `layer` has one block for all its channels, as PEFT 0.14 and 0.15 shared it, and BOFT's settings \
             cannot say that; convert it with --to peft --base first\n"
        ),
        "{}",
        refused.stderr
    );
    for (input, to, output) in [
        ("shared", "peft", "whole"),
        ("whole", "record", "b.bpk"),
        ("b.bpk", "peft", "back"),
    ] {
        assert_eq!(convert(input, to, output).code, 0, "{input}");
    }
    assert_models(&merged(folder.path(), "back"), &expected, 1e-6, "record");
}

#[test]
fn what_means_something_else_is_refused() {
    for (name, to, expected) in [
        (
            "boft-linear-m2-b4",
            "oft",
            "`layer` has 2 factors, and OFT has one; convert it with --to-lora, or merge it",
        ),
        (
            "boft-linear-m1-b4",
            "oft",
            "and OFT has none; convert it with --to-lora, or merge it",
        ),
        ("oft-linear-exact-b4", "oft", "the adapter is OFT already"),
        ("boft-linear-m1-b4", "boft", "the adapter is BOFT already"),
        (
            "oft-linear-neumann-5",
            "boft",
            "the adapter's Neumann polynomial is not orthogonal, and BOFT's map is exact; convert it with --to-lora, or \
             merge it",
        ),
        (
            "oft-linear-coft-on",
            "boft",
            "the adapter is bound to a COFT radius, and BOFT has none; convert it with --to-lora, or merge it",
        ),
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        let line = refused(
            folder.path(),
            &[
                "convert",
                case.adapter(),
                "--to",
                to,
                "--base",
                "base.safetensors",
                "--output",
                "out",
            ],
        );
        assert!(line.ends_with(expected), "{name}: {line}");
        assert_eq!(names(folder.path()), ["base.safetensors"]);
    }
    let case = Case::open("cases/oft-linear-exact-b4");
    let folder = case.folder();
    assert_eq!(
        refused(
            folder.path(),
            &["convert", case.adapter(), "--to", "boft", "--output", "out"]
        ),
        "--to boft needs --base, the model that the adapter is for"
    );
}

/// `base + B·A` of every layer of a LoRA.
fn with_lora(base: &Tensors, lora: &Tensors, rank: usize) -> Tensors {
    let mut result = base.clone();
    for (key, a) in lora {
        let Some(path) = key
            .strip_prefix("base_model.model.")
            .and_then(|key| key.strip_suffix(".lora_A.weight"))
        else {
            continue;
        };
        let b = &lora[&key.replace("lora_A", "lora_B")];
        let weight = result.get_mut(&format!("{path}.weight")).unwrap();
        let (o, d) = (weight.shape[0], weight.numbers.len() / weight.shape[0]);
        assert_eq!(a.shape[0], rank);
        assert_eq!(a.shape[1..], weight.shape[1..]);
        assert_eq!(b.shape[..2], [o, rank]);
        assert_eq!(b.shape.len(), weight.shape.len());
        for i in 0..o {
            for j in 0..d {
                let product: f64 = (0..rank)
                    .map(|k| b.numbers[i * rank + k] * a.numbers[k * d + j])
                    .sum();
                weight.numbers[i * d + j] += product;
            }
        }
    }
    result
}

#[test]
fn a_lora_of_full_rank_is_the_adapter_and_a_lower_one_leaves_out_what_is_said() {
    for name in [
        "boft-conv-m2-b6",
        "oft-stack-layers",
        "oft-linear-neumann-5",
        "boft-linear-m3-b8",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        let convert = |rank: usize| {
            let (rank, output) = (rank.to_string(), format!("lora-{rank}"));
            let printed = succeed(
                folder.path(),
                &[
                    "convert",
                    case.adapter(),
                    "--to-lora",
                    &rank,
                    "--base",
                    "base.safetensors",
                    "--output",
                    &output,
                ],
            );
            let config = read_json(&folder.path().join(&output).join("adapter_config.json"));
            assert_eq!(
                (&config["peft_type"], &config["r"], &config["lora_alpha"]),
                (
                    &json!("LORA"),
                    &json!(rank.parse::<u32>().unwrap()),
                    &config["r"]
                )
            );
            (
                printed,
                read(
                    &folder
                        .path()
                        .join(&output)
                        .join("adapter_model.safetensors"),
                ),
            )
        };
        let (_, full) = convert(80);
        assert_models(&with_lora(&case.base, &full, 80), &case.merged, 1e-5, name);

        let (printed, low) = convert(2);
        let found = with_lora(&case.base, &low, 2);
        let left_out: BTreeMap<_, f64> = printed
            .lines()
            .filter_map(|line| {
                let (path, rest) = line.split_once(": ")?;
                Some((path, rest.split_once(" of the change")?.0.parse().ok()?))
            })
            .collect();
        assert!(!left_out.is_empty());
        for (path, left_out) in left_out {
            let key = format!("{path}.weight");
            let norm = |a: &Tensors, b: &Tensors| {
                let pairs = a[&key].numbers.iter().zip(&b[&key].numbers);
                pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
            };
            let expected = norm(&found, &case.merged) / norm(&case.base, &case.merged);
            assert!(
                expected > 0.01 && (left_out / expected - 1.0).abs() < 0.01,
                "{name} {path}: {left_out} {expected}"
            );
        }
    }
}

/// The LoRA keeps the names of the adapter, and its changes are those of the layers that the rules find.
#[test]
fn rules_find_the_layers_of_a_lora_in_the_model() {
    let fixtures = fixtures().join("dinov2");
    let folder = tempfile::tempdir().unwrap();
    let (base, expected) = (
        read(&fixtures.join("base.safetensors")),
        read(&fixtures.join("merged.safetensors")),
    );
    write(&folder.path().join("base.safetensors"), &base);
    let adapter = fixtures.join("transformers-5");
    let convert = [
        "convert",
        adapter.to_str().unwrap(),
        "--to-lora",
        "12",
        "--base",
        "base.safetensors",
        "--output",
        "lora",
        "--map",
        "dinov2",
    ];
    succeed(folder.path(), &convert);
    let lora = read(&folder.path().join("lora/adapter_model.safetensors"));
    let path = |key: &str| {
        let module = key.strip_suffix(".lora_A.weight")?;
        Some(module.strip_prefix("base_model.model.")?.to_string())
    };
    let mut paths: Vec<_> = lora.keys().filter_map(|key| path(key)).collect();
    let file = read(&adapter.join("adapter_model.safetensors"));
    let adapted = file.keys().filter_map(|key| {
        let module = key.strip_suffix(".boft_R")?;
        Some(module.strip_prefix("base_model.model.")?.to_string())
    });
    assert_eq!(paths, adapted.collect::<Vec<_>>());
    paths.retain(|path| path.contains(".mlp."));

    // The two halves of the layer that the file has in one.
    for (half, part) in ["gate_proj", "up_proj"].iter().enumerate() {
        let path = paths.iter().find(|path| path.ends_with(part)).unwrap();
        let whole = path.replace(part, "weights_in.weight");
        let rows = |tensors: &Tensors| {
            let whole = &tensors[&whole];
            let [o, d] = [whole.shape[0] / 2, whole.shape[1]];
            let numbers = whole.numbers[half * o * d..(half + 1) * o * d].to_vec();
            Tensor::new(&[o, d], numbers)
        };
        let layer = [(format!("{path}.weight"), rows(&base))].into();
        let mut own = lora.clone();
        own.retain(|key, _| key.contains(path.as_str()));
        let found = &with_lora(&layer, &own, 12)[&format!("{path}.weight")];
        assert!(difference(found, &rows(&expected)) < 1e-5, "{path}");
        assert!(difference(&rows(&base), &rows(&expected)) > 0.01, "{path}");
    }
}

#[test]
fn what_is_saved_travels_with_a_lora() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    succeed(
        folder.path(),
        &[
            "convert",
            case.adapter(),
            "--to-lora",
            "4",
            "--base",
            "base.safetensors",
            "--output",
            "lora",
        ],
    );
    let (lora, own) = (
        read(&folder.path().join("lora/adapter_model.safetensors")),
        read(&case.adapter.join("adapter_model.safetensors")),
    );
    for (key, tensor) in own.iter().filter(|(key, _)| !key.contains("boft_")) {
        assert_eq!(lora[key], *tensor, "{key}");
    }
    let config = read_json(&folder.path().join("lora/adapter_config.json"));
    assert_eq!(
        (&config["bias"], &config["modules_to_save"]),
        (&json!("lora_only"), &json!(["classifier"]))
    );
}

#[test]
fn what_pytorch_itself_calls_gamma_is_in_no_record() {
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
        "`norm.gamma` has a name that means `weight` in Burn's norms, and would come back as that; keep the adapter in \
         PEFT's folder"
    );
}

#[test]
fn records_that_are_none_are_refused() {
    let case = Case::open("cases/boft-linear-m1-b4");
    let folder = case.folder();
    std::fs::write(folder.path().join("a.bpk"), "nothing").unwrap();
    let convert = |input: &str| {
        refused(
            folder.path(),
            &["convert", input, "--to", "peft", "--output", "out"],
        )
    };
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
        "b.bpk: no adapter: no name ends with `.weight.boft.skew`"
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
fn rules_give_a_record_the_names_of_its_model() {
    let fixtures = fixtures().join("dinov2");
    let folder = tempfile::tempdir().unwrap();
    let keys = |version: &str, rules: &[&str]| -> Vec<String> {
        let (adapter, output) = (fixtures.join(version), format!("{version}.bpk"));
        let convert = [
            "convert",
            adapter.to_str().unwrap(),
            "--to",
            "record",
            "--output",
            &output,
        ];
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
fn axes_of_any_length_without_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    // One block for all, and blocks of one channel.
    let shared = json!({
        "peft_type": "OFT", "oft_block_size": 4, "block_share": true, "use_cayley_neumann": false,
        "target_modules": ["fc"]
    });
    let idle = json!({"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": false, "target_modules": ["fc"]});
    let base = [(
        "fc.weight".to_string(),
        Tensor::new(&[0, 1 << 62], Vec::new()),
    )];
    write(&folder.path().join("base.safetensors"), &base.into());
    let blocks = Tensor::random(&[1, 6], 1);
    for (config, blocks, to) in [
        (&shared, &blocks, ["--to", "boft"]),
        (&shared, &blocks, ["--to-lora", "2"]),
        (
            &idle,
            &Tensor::new(&[1 << 62, 0], Vec::new()),
            ["--to", "boft"],
        ),
    ] {
        let key = "base_model.model.fc.oft_R.weight".to_string();
        write_adapter(
            &folder.path().join("adapter"),
            config,
            &[(key, blocks.clone())].into(),
        );
        let convert = [
            "convert",
            "adapter",
            "--base",
            "base.safetensors",
            "--output",
            "out",
        ];
        let run = run(folder.path(), &[&convert, &to[..]].concat());
        let line = "error: base.safetensors: `fc.weight` is [0, 4611686018427387904], which has no numbers";
        assert_eq!(
            (run.code, run.stderr.lines().last()),
            (2, Some(line)),
            "{to:?}"
        );
    }
}
