//! Models and adapters of Python, and what is written for Python, on the fixtures that `fixtures/weights/make.py` and
//! `fixtures/make.py` wrote.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::{ModuleStore, SafetensorsStore, bridge};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::Transformers;
use dinov2::method::Method;
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::{
    AdapterFolder, AdapterKind, Checkpoint, HeadOrigin, LabelOrigin, Saved, WeightsError,
    export_adapter, export_merged, save,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Largest difference allowed, relative to the largest expected value. Measured on flex: up to 7e-7.
const TOLERANCE: f32 = 1e-4;
/// The classes of the fixtures, in the order of the files.
const LABELS: [&str; 5] = ["eel", "ant", "cat", "dog", "bee"];

// ---- models ----

#[test]
fn every_kind_of_file_answers_as_transformers_does() {
    for name in [
        "weights/sharded",
        "weights/half",
        "weights/bin",
        "weights/sharded_bin",
    ] {
        let checkpoint = open(name);
        let (model, head) = checkpoint.load(&strings(&LABELS), &device()).unwrap();

        assert_eq!(checkpoint.labels().unwrap(), LABELS);
        assert_eq!(head, HeadOrigin::Checkpoint, "{name}");
        check(name, "logits", model.forward(answer(name, "pixels")));
        assert_eq!(model.dinov2.layernorm.gamma.val().dtype(), DType::F32);
    }
}

#[test]
fn what_pytorch_saved_of_transformers_5_in_memory_answers_alike() {
    let name = "weights/state_dict";
    let labels: Vec<String> = (0..5).map(|index| format!("LABEL_{index}")).collect();
    let (model, head) = open(name).load(&labels, &device()).unwrap();

    assert_eq!(head, HeadOrigin::Checkpoint);
    check(name, "logits", model.forward(answer(name, "pixels")));
}

#[test]
fn a_backbone_without_a_mask_token_gets_a_fresh_head() {
    let name = "weights/unmasked";
    let checkpoint = open(name);
    let (model, head) = checkpoint.load(&strings(&["a", "b"]), &device()).unwrap();

    assert_eq!(checkpoint.labels(), None);
    assert!(matches!(head, HeadOrigin::Fresh { reason } if reason.contains("has no head")));
    check(name, "features", model.features(answer(name, "pixels")));
}

#[test]
fn the_head_follows_the_order_of_the_classes() {
    let name = "weights/sharded";
    let mut sorted = strings(&LABELS);
    sorted.sort();
    let (model, head) = open(name).load(&sorted, &device()).unwrap();

    assert_eq!(head, HeadOrigin::Checkpoint);
    let logits = model.forward(answer(name, "pixels"));
    let expected: Tensor<2> = answer(name, "logits");
    let columns = sorted.iter().map(|label| {
        let column = LABELS.iter().position(|other| other == label).unwrap();
        expected.clone().narrow(1, column, 1)
    });
    close(logits, Tensor::cat(columns.collect(), 1), name);
}

#[test]
fn a_head_for_other_classes_starts_afresh_and_says_why() {
    for (labels, why) in [
        (vec!["eel", "ant"], "has 5 classes, and 2 are needed"),
        (
            vec!["eel", "ant", "cat", "dog", "fox"],
            "knows no class `fox`",
        ),
    ] {
        let (model, head) = open("mlp").load(&strings(&labels), &device()).unwrap();
        assert_eq!(model.classifier.weight.dims(), [64, labels.len()]);
        assert!(
            matches!(&head, HeadOrigin::Fresh { reason } if reason.contains(why)),
            "{head:?}"
        );
    }
}

#[test]
fn safetensors_are_preferred_to_pickles() {
    let folder = copy("mlp");
    fs::write(folder.path().join("pytorch_model.bin"), "no pickle").unwrap();
    open_path(folder.path())
        .unwrap()
        .load(&strings(&LABELS), &device())
        .unwrap();
}

#[test]
fn the_preprocessing_of_a_folder_is_read() {
    let folder = copy("mlp");
    assert_eq!(open_path(folder.path()).unwrap().preprocessor(), None);

    let path = folder.path().join("preprocessor_config.json");
    fs::write(&path, r#"{"do_resize": true}"#).unwrap();
    let checkpoint = open_path(folder.path()).unwrap();
    assert_eq!(checkpoint.preprocessor(), Some(&json!({"do_resize": true})));
    fs::write(&path, "{").unwrap();
    complains(
        open_path(folder.path()),
        &["preprocessor_config.json is not a JSON object"],
    );
}

// ---- what is wrong with a model ----

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

// ---- names of published models ----

/// Opens the model that `DINOV2_OPEN` names, in a process whose environment a test has set.
#[test]
#[ignore = "called by other tests"]
fn opens_what_the_environment_names() {
    let name = std::env::var("DINOV2_OPEN").expect("a test calls this");
    match Checkpoint::open(&name) {
        Ok(checkpoint) => println!("opened {} of {:?}", checkpoint.name(), checkpoint.labels()),
        Err(error) => println!("error: {error}"),
    }
}

/// What opening a published model prints, with this folder of Hugging Face and without a network.
fn opened_offline(home: &Path) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "opens_what_the_environment_names",
            "--ignored",
            "--nocapture",
        ])
        .env("DINOV2_OPEN", "facebook/dinov2-small")
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env_remove("HF_HUB_CACHE")
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_name_without_a_network_is_one_clear_line() {
    let home = tempfile::tempdir().unwrap();
    let output = opened_offline(home.path());
    let line = output
        .lines()
        .find_map(|line| line.split_once("error: "))
        .unwrap()
        .1;
    let cache = home.path().join("hub");
    let start = format!(
        "facebook/dinov2-small is no folder and not complete in the cache ({}), and http://127.0.0.1:9 cannot be reached: ",
        cache.display()
    );
    assert!(line.starts_with(&start), "{output}");
    assert!(
        line.ends_with("; give a folder, or try again online"),
        "{output}"
    );
}

#[test]
fn a_name_in_the_cache_needs_no_network() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("hub/models--facebook--dinov2-small");
    let (refs, snapshot) = (model.join("refs"), model.join("snapshots/0123abc"));
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), "0123abc").unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("mlp").join(file), snapshot.join(file)).unwrap();
    }
    let output = opened_offline(home.path());
    assert!(
        output.contains(&format!(
            "opened facebook/dinov2-small of {:?}",
            Some(LABELS)
        )),
        "{output}"
    );
}

// ---- adapters of Python ----

#[test]
fn adapters_of_both_generations_answer_as_peft_does() {
    for (name, base) in [
        ("lora_5", "mlp"),
        ("lora_swiglu_5", "swiglu"),
        ("lora_registers_5", "registers"),
        ("boft_5", "mlp"),
        ("boft_registers_4", "registers"),
        ("oft_swiglu_4", "swiglu"),
    ] {
        let name = &format!("weights/{name}");
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let (labels, origin) = adapter.labels_for(&open(base)).unwrap();

        assert_eq!(origin, LabelOrigin::Numbered, "{name}");
        assert_eq!(labels, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        assert_eq!(
            (adapter.num_labels(), adapter.base()),
            (Some(3), Some(base))
        );
        assert!(adapter.labels().is_none() && adapter.preprocessor().is_none());
        let model = attached(&adapter, base, &labels, &device());
        check(name, "logits", model.forward(answer(name, "pixels")));
    }
}

#[test]
fn an_adapter_without_a_head_uses_the_head_of_the_base() {
    let name = "weights/lora_4";
    let adapter = AdapterFolder::open(&fixture(name)).unwrap();
    let (labels, origin) = adapter.labels_for(&open("mlp")).unwrap();

    assert_eq!(origin, LabelOrigin::Checkpoint);
    assert_eq!((adapter.num_labels(), labels), (None, strings(&LABELS)));
    let model = attached(&adapter, "mlp", &strings(&LABELS), &device());
    check(name, "logits", model.forward(answer(name, "pixels")));
}

#[test]
fn an_adapter_of_a_bare_model_fits_the_model_under_a_head() {
    let name = "weights/lora_backbone_5";
    let adapter = AdapterFolder::open(&fixture(name)).unwrap();
    complains(adapter.labels_for(&open("backbone")), &["saves no head"]);

    let model = attached(&adapter, "backbone", &strings(&["a", "b"]), &device());
    check(name, "features", model.features(answer(name, "pixels")));
}

#[test]
fn an_adapter_trains_what_its_method_trains() {
    let device = device().autodiff();
    let trained = |name: &str| {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let labels = strings(&["a", "b", "c"]);
        let model = attached(&adapter, "mlp", &labels, &device);
        let gradients = model
            .forward(answer_on(name, "pixels", &device))
            .sum()
            .backward();
        let layer = &model.dinov2.encoder.layer[0];
        let query = &layer.attention.attention.query;
        let lora = query
            .weight
            .adapter()
            .map(|adapter| adapter.b.val().grad(&gradients).is_some());
        (
            lora,
            query.weight.base().grad(&gradients).is_some(),
            query
                .bias
                .as_ref()
                .unwrap()
                .val()
                .grad(&gradients)
                .is_some(),
            layer.norm1.gamma.val().grad(&gradients).is_some(),
            model.classifier.weight.val().grad(&gradients).is_some(),
        )
    };
    assert_eq!(
        trained("weights/lora_5"),
        (Some(true), false, true, false, true)
    );
    assert_eq!(trained("weights/boft_5"), (None, false, true, false, true));
}

#[test]
fn an_adapter_for_a_model_of_another_size_is_one_sentence() {
    for name in ["weights/lora_5", "weights/boft_5"] {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let model = open("backbone")
            .load(&strings(&["a", "b", "c"]), &device())
            .unwrap()
            .0;
        complains(
            adapter.attach(model),
            &[
                "this adapter is for a model 32 wide with 2 layers, but the model is 24 wide with 1 layer",
            ],
        );
    }
}

#[test]
fn a_head_with_another_number_of_classes_is_refused() {
    for name in ["weights/lora_5", "weights/boft_5"] {
        let adapter = AdapterFolder::open(&fixture(name)).unwrap();
        let model = open("mlp")
            .load(&strings(&["a", "b"]), &device())
            .unwrap()
            .0;
        complains(
            adapter.attach(model),
            &["the adapter's head has 3 classes, and the model's 2"],
        );
    }
}

#[test]
fn an_adapter_is_not_put_on_another() {
    let adapter = AdapterFolder::open(&fixture("weights/lora_5")).unwrap();
    let labels = strings(&["a", "b", "c"]);
    let model = attached(&adapter, "mlp", &labels, &device());
    complains(adapter.attach(model), &["still carries adapters"]);
}

#[test]
fn variants_of_lora_that_are_not_computed_are_refused_by_name() {
    for (setting, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("layer_replication", json!([[0, 1]])),
        ("alpha_pattern", json!({"layer\\.[01].*": 4})),
        ("lora_alpha", json!("four")),
        ("peft_type", json!("LOKR")),
    ] {
        let folder = copy("weights/lora_5");
        edit_json(folder.path(), "adapter_config.json", |config| {
            config[setting] = value.clone()
        });
        let opened = AdapterFolder::open(folder.path());
        complains(
            opened,
            &["adapter_config.json", &format!("{setting} is {value}")],
        );
    }
}

#[test]
fn tensors_that_do_not_belong_to_a_lora_are_named() {
    let prefix = "base_model.model.dinov2.encoder.layer.0.attention.q_proj";
    for (edit, complaint) in [
        (
            ".lora_C.weight",
            format!("unexpected: {prefix}.lora_C.weight"),
        ),
        (
            ".lora_magnitude_vector",
            format!("unexpected: {prefix}.lora_magnitude_vector"),
        ),
        ("", format!("missing: {prefix}.lora_A.weight")),
    ] {
        let folder = copy("weights/lora_5");
        edit_file(
            &folder.path().join("adapter_model.safetensors"),
            |tensors| {
                let name = format!("{prefix}.lora_A.weight");
                let index = tensors.iter().position(|tensor| tensor.0 == name).unwrap();
                match edit {
                    "" => drop(tensors.remove(index)),
                    edit => {
                        let (_, shape, bytes) = tensors[index].clone();
                        tensors.push((format!("{prefix}{edit}"), shape, bytes));
                    }
                }
            },
        );
        complains(AdapterFolder::open(folder.path()), &[&complaint]);
    }
    let folder = copy("weights/lora_5");
    edit_file(
        &folder.path().join("adapter_model.safetensors"),
        |tensors| {
            for tensor in tensors.iter_mut() {
                tensor.0 = tensor.0.replace("layer.1", "layer.one");
            }
        },
    );
    let adapter = AdapterFolder::open(folder.path()).unwrap();
    let model = open("mlp")
        .load(&strings(&["a", "b", "c"]), &device())
        .unwrap()
        .0;
    complains(
        adapter.attach(model),
        &["unexpected: dinov2.encoder.layer.one."],
    );
}

#[test]
fn a_folder_without_an_adapter_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    complains(
        AdapterFolder::open(folder.path()),
        &["holds no adapter", "adapter_config.json"],
    );
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    complains(AdapterFolder::open(&file), &["is a file"]);
    let adapter = copy("weights/boft_5");
    fs::remove_file(adapter.path().join("adapter_model.safetensors")).unwrap();
    complains(
        AdapterFolder::open(adapter.path()),
        &["adapter_model.safetensors cannot be read: no such file or directory"],
    );
    let absent = folder.path().join("absent");
    complains(
        AdapterFolder::open(&absent),
        &["cannot be read: no such file or directory"],
    );
}

// ---- what is saved here ----

#[test]
fn every_method_is_read_back_to_the_same_logits() {
    let base = [
        open("mlp"),
        open("swiglu"),
        open("registers"),
        Checkpoint::embedded(),
    ];
    let preprocessor = json!({"crop_size": {"height": 16, "width": 16}});
    let butterfly = Method::Boft {
        block_size: 4,
        factors: 2,
        dropout: 0.1,
    };
    let methods = [methods().as_slice(), &[butterfly]].concat();
    for (checkpoint, method) in base
        .iter()
        .flat_map(|base| methods.iter().map(move |method| (base, method)))
    {
        let name = format!("{} with {method}", checkpoint.name());
        let device = device().autodiff();
        let model = trained(method, checkpoint, &["b", "a", "c"], &device);
        let expected = model.valid().forward(pixels(checkpoint, &self::device()));
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("run");
        let labels = strings(&["b", "a", "c"]);
        let saved = Saved {
            model: &model.valid(),
            method,
            checkpoint,
            labels: &labels,
            preprocessor: &preprocessor,
            names: Transformers::V5,
        };
        let bytes = save(&saved, &folder).unwrap();

        assert!(
            bytes > 0 && fs::read_dir(&folder).unwrap().count() >= 3,
            "{name}"
        );
        let adapter = AdapterFolder::open(&folder).unwrap();
        let kind = match method {
            Method::Boft { .. } => AdapterKind::Boft,
            Method::Oft { .. } => AdapterKind::Oft,
            Method::Lora { .. } => AdapterKind::Lora,
            Method::Linear => AdapterKind::Linear,
            Method::Full => AdapterKind::Full,
        };
        assert_eq!(adapter.kind(), kind, "{name}");
        let (labels, origin) = adapter.labels_for(checkpoint).unwrap();
        assert_eq!(
            (labels.concat().as_str(), origin),
            ("bac", LabelOrigin::Adapter)
        );
        assert_eq!(adapter.preprocessor(), Some(&preprocessor));
        let base = (*method != Method::Full).then(|| checkpoint.name());
        assert_eq!(adapter.base(), base, "{name}");
        let plain = checkpoint.load(&labels, &device).unwrap().0;
        let model = adapter.attach(plain).unwrap();
        let logits = model.valid().forward(pixels(checkpoint, &self::device()));
        assert_eq!(logits.into_data(), expected.into_data(), "{name}");
    }
}

#[test]
fn a_fully_trained_model_is_a_model() {
    let checkpoint = open("registers");
    let device = device().autodiff();
    let model = trained(&Method::Full, &checkpoint, &["b", "a"], &device);
    let folder = tempfile::tempdir().unwrap();
    let labels = strings(&["b", "a"]);
    let saved = Saved {
        model: &model,
        method: &Method::Full,
        checkpoint: &checkpoint,
        labels: &labels,
        preprocessor: &json!({}),
        names: Transformers::V5,
    };
    save(&saved, folder.path()).unwrap();

    let checkpoint = open_path(folder.path()).unwrap();
    assert_eq!(checkpoint.labels().unwrap(), ["b", "a"]);
    let (read, head) = checkpoint.load(&labels, &device).unwrap();
    assert_eq!(head, HeadOrigin::Checkpoint);
    let pixels = pixels(&checkpoint, &device);
    assert_eq!(
        read.forward(pixels.clone()).into_data(),
        model.forward(pixels).into_data()
    );
}

#[test]
fn a_merged_model_has_the_settings_that_transformers_needs() {
    let checkpoint = open("registers");
    let method = Method::Lora { rank: 2 };
    let model = trained(&method, &checkpoint, &["b", "a"], &device());
    let (labels, folder) = (strings(&["b", "a"]), tempfile::tempdir().unwrap());
    let export = |model| {
        export_merged(
            model,
            &checkpoint,
            &labels,
            &json!({"size": 1}),
            folder.path(),
        )
    };
    complains(export(&model), &["merge them first"]);

    let merged = model.clone().materialize();
    export(&merged).unwrap();
    let config = read_json(&folder.path().join("config.json"));
    assert_eq!(
        config["architectures"],
        json!(["Dinov2WithRegistersForImageClassification"])
    );
    assert_eq!(config["id2label"], json!({"0": "b", "1": "a"}));
    assert_eq!(config["label2id"], json!({"a": 1, "b": 0}));
    assert_eq!(
        (&config["num_labels"], &config["torch_dtype"]),
        (&json!(2), &json!("float32"))
    );
    assert_eq!(config["num_register_tokens"], 3);
    let size = read_json(&folder.path().join("preprocessor_config.json"));
    assert_eq!(size, json!({"size": 1}));
    let names = tensor_names(&folder.path().join("model.safetensors"));
    assert_eq!(
        names,
        tensor_names(&fixture("registers").join("model.safetensors"))
    );
    let read = open_path(folder.path())
        .unwrap()
        .load(&labels, &device())
        .unwrap()
        .0;
    close(
        read.forward(pixels(&checkpoint, &device())),
        model.forward(pixels(&checkpoint, &device())),
        "merged",
    );
}

#[test]
fn a_model_without_a_mask_token_is_written_without_one() {
    let checkpoint = open("weights/unmasked");
    let labels = strings(&["a", "b"]);
    let model = checkpoint.load(&labels, &device()).unwrap().0;
    let folder = tempfile::tempdir().unwrap();
    export_merged(&model, &checkpoint, &labels, &json!({}), folder.path()).unwrap();

    let names = tensor_names(&folder.path().join("model.safetensors"));
    assert!(
        !names.iter().any(|name| name.contains("mask_token")),
        "{names:?}"
    );
    open_path(folder.path())
        .unwrap()
        .load(&labels, &device())
        .unwrap();
}

#[test]
fn an_adapter_is_exported_with_the_names_of_either_generation() {
    for (name, base, query) in [
        ("lora_5", "mlp", "dinov2."),
        ("lora_swiglu_5", "swiglu", "dinov2."),
        ("boft_5", "mlp", "dinov2."),
        ("boft_registers_4", "registers", "dinov2_with_registers."),
        ("lora_backbone_5", "backbone", ""),
    ] {
        let adapter = AdapterFolder::open(&fixture(&format!("weights/{name}"))).unwrap();
        let labels = strings(&["a", "b", "c"]);
        let expected = attached(&adapter, base, &labels, &device())
            .features(answer(&format!("weights/{name}"), "pixels"));
        for (version, ending) in [
            (Transformers::V4, "attention.attention.query"),
            (Transformers::V5, "attention.q_proj"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            export_adapter(&adapter, version, folder.path()).unwrap();
            let names = tensor_names(&folder.path().join("adapter_model.safetensors"));
            let start = format!("base_model.model.{query}encoder.layer.0.{ending}.");
            assert!(
                names.iter().any(|name| name.starts_with(&start)),
                "{start}: {names:?}"
            );

            let again = AdapterFolder::open(folder.path()).unwrap();
            let features = attached(&again, base, &labels, &device())
                .features(answer(&format!("weights/{name}"), "pixels"));
            close(features, expected.clone(), name);
        }
    }
}

#[test]
fn a_probe_has_no_layout_of_peft() {
    let checkpoint = open("mlp");
    let model = trained(&Method::Linear, &checkpoint, &["b", "a"], &device());
    let (labels, place) = (strings(&["b", "a"]), tempfile::tempdir().unwrap());
    let folder = place.path().join("probe");
    let saved = Saved {
        model: &model,
        method: &Method::Linear,
        checkpoint: &checkpoint,
        labels: &labels,
        preprocessor: &json!({}),
        names: Transformers::V5,
    };
    save(&saved, &folder).unwrap();
    let adapter = AdapterFolder::open(&folder).unwrap();
    let target = place.path().join("peft");
    complains(
        export_adapter(&adapter, Transformers::V5, &target),
        &["holds a linear probe", "export the merged model"],
    );
    assert!(!target.exists());
    complains(open_path(&folder), &["holds an adapter"]);
}

#[test]
fn names_of_classes_must_fit_the_head() {
    let checkpoint = open("mlp");
    let model = trained(&Method::Linear, &checkpoint, &["b", "a"], &device());
    let (labels, folder) = (strings(&["b", "a", "c"]), tempfile::tempdir().unwrap());
    let saved = Saved {
        model: &model,
        method: &Method::Linear,
        checkpoint: &checkpoint,
        labels: &labels,
        preprocessor: &json!({}),
        names: Transformers::V5,
    };
    complains(
        save(&saved, folder.path()),
        &["3 class names do not fit a head with 2 classes"],
    );

    let saved = Saved {
        labels: &labels[..2],
        method: &Method::Lora { rank: 2 },
        ..saved
    };
    complains(save(&saved, folder.path()), &["carries no LoRA"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    save(
        &Saved {
            method: &Method::Linear,
            ..saved
        },
        folder.path(),
    )
    .unwrap();
    for (text, why) in [
        ("{}", "not a list of class names"),
        ("[\"a\"]", "1 names for a head with 2"),
    ] {
        fs::write(folder.path().join("classes.json"), text).unwrap();
        complains(AdapterFolder::open(folder.path()), &["classes.json", why]);
    }
}

// ---- by hand, with Python ----

/// Writes adapters and merged models for `fixtures/weights/check.py`, which says how to call this.
#[test]
#[ignore = "writes for a script of Python; see fixtures/weights/check.py"]
fn writes_for_python() {
    let (place, checkpoint) = exchange();
    let labels = strings(&["cat", "ant", "bee"]);
    let preprocessor = match checkpoint.preprocessor() {
        Some(preprocessor) => preprocessor.clone(),
        None => json!({"image_processor_type": "BitImageProcessor"}),
    };
    for method in methods() {
        let name = method.to_string().replace([' ', '='], "-");
        let model = trained(&method, &checkpoint, &["cat", "ant", "bee"], &device());
        let pixels = pixels(&checkpoint, &device());
        let merged = match method.merged(model.clone()).unwrap() {
            Some(merged) => merged,
            None => model.clone(),
        };
        let written = |folder: PathBuf, model: &Dinov2ForImageClassification| {
            let logits = model.forward(pixels.clone()).into_data();
            let tensors = [("pixels", pixels.clone().into_data()), ("logits", logits)];
            write_answer(&folder.join("io.safetensors"), &tensors);
        };
        let folder = place.join(format!("merged-{name}"));
        export_merged(&merged, &checkpoint, &labels, &preprocessor, &folder).unwrap();
        written(folder, &model);
        for (version, generation) in [(Transformers::V4, 4), (Transformers::V5, 5)] {
            let folder = place.join(format!("adapter-{generation}-{name}"));
            let saved = Saved {
                model: &model,
                method: &method,
                checkpoint: &checkpoint,
                labels: &labels,
                preprocessor: &preprocessor,
                names: version,
            };
            save(&saved, &folder).unwrap();
            written(folder, &model);
        }
    }
}

/// Compares the logits of adapters that `fixtures/weights/check.py` made.
#[test]
#[ignore = "reads what a script of Python wrote; see fixtures/weights/check.py"]
fn reads_from_python() {
    let (place, checkpoint) = exchange();
    let mut read = 0;
    for entry in fs::read_dir(&place).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("python-") {
            continue;
        }
        let adapter = AdapterFolder::open(&folder).unwrap();
        let (labels, _) = adapter.labels_for(&checkpoint).unwrap();
        let model = adapter
            .attach(checkpoint.load(&labels, &device()).unwrap().0)
            .unwrap();
        let tensor = |key: &str| tensor_of(&folder.join("io.safetensors"), key, &device());
        let pixels: Tensor<4> = tensor_of(&folder.join("io.safetensors"), "pixels", &device());
        close(model.forward(pixels), tensor("logits"), &name);
        read += 1;
    }
    assert!(read > 0, "{} has no folder python-*", place.display());
}

/// The folder to exchange with Python, and the model.
fn exchange() -> (PathBuf, Checkpoint) {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("set {name}"));
    let checkpoint = Checkpoint::open(&variable("DINOV2_MODEL")).unwrap();
    (PathBuf::from(variable("DINOV2_EXCHANGE")), checkpoint)
}

// ---- helpers ----

fn device() -> Device {
    Device::flex()
}

fn strings(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|label| label.to_string()).collect()
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A copy of the files of a fixture.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn open(name: &str) -> Checkpoint {
    open_path(&fixture(name)).unwrap()
}

fn open_path(path: &Path) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(path.to_str().unwrap())
}

/// Loads the model in a folder with its own classes.
fn load(folder: &Path) -> Result<Dinov2ForImageClassification, WeightsError> {
    let checkpoint = open_path(folder)?;
    let labels = checkpoint.labels().unwrap().to_vec();
    Ok(checkpoint.load(&labels, &device())?.0)
}

/// The error's message, which has all `parts` and is one line.
#[track_caller]
fn complains<T>(result: Result<T, WeightsError>, parts: &[&str]) {
    let error = result.err().expect("the input is wrong");
    let text = error.to_string();
    println!("{text}");
    assert!(!text.contains('\n') && !text.contains("os error"), "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in `{text}`");
    }
}

fn attached(
    adapter: &AdapterFolder,
    base: &str,
    labels: &[String],
    device: &Device,
) -> Dinov2ForImageClassification {
    let (model, _) = open(base).load(labels, device).unwrap();
    adapter.attach(model).unwrap()
}

fn methods() -> [Method; 5] {
    [
        Method::Boft {
            block_size: 4,
            factors: 1,
            dropout: 0.0,
        },
        Method::oft(4),
        Method::Lora { rank: 2 },
        Method::Linear,
        Method::Full,
    ]
}

/// A model with everything that its method trains moved away from where it starts.
fn trained(
    method: &Method,
    checkpoint: &Checkpoint,
    labels: &[&str],
    device: &Device,
) -> Dinov2ForImageClassification {
    use burn::module::{ModuleMapper, Param};
    use burn::tensor::Distribution;

    struct Move;

    impl ModuleMapper for Move {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match param.is_require_grad() {
                false => param,
                true => param.map(|tensor| {
                    let noise = Distribution::Normal(0.0, 0.05);
                    let noise = Tensor::random(tensor.dims(), noise, &tensor.device());
                    (tensor + noise).detach().require_grad()
                }),
            }
        }
    }

    let plain = device.clone().autodiff();
    plain.seed(5);
    let (model, _) = checkpoint.load(&strings(labels), &plain).unwrap();
    let model = method.prepare(model).unwrap().map(&mut Move);
    match device.is_autodiff() {
        true => model,
        false => model.valid(),
    }
}

/// Pixels of three images that are unlike each other.
fn pixels(checkpoint: &Checkpoint, device: &Device) -> Tensor<4> {
    let (size, channels) = (
        checkpoint.config().image_size.min(56),
        checkpoint.config().num_channels,
    );
    let count = (3 * channels * size * size) as i64;
    let numbers = Tensor::<1, burn::tensor::Int>::arange(0..count, device).float();
    (numbers * 0.7).sin().reshape([3, channels, size, size])
}

fn answer<const D: usize>(name: &str, key: &str) -> Tensor<D> {
    answer_on(name, key, &device())
}

fn answer_on<const D: usize>(name: &str, key: &str, device: &Device) -> Tensor<D> {
    tensor_of(&fixture(name).join("io.safetensors"), key, device)
}

fn tensor_of<const D: usize>(path: &Path, key: &str, device: &Device) -> Tensor<D> {
    let mut store = SafetensorsStore::from_file(path);
    let tensor = store.get_tensor(key).unwrap();
    let tensor = tensor.unwrap_or_else(|| panic!("{} has no {key}", path.display()));
    Tensor::from_data(bridge::to_data(tensor).unwrap(), device)
}

fn check(name: &str, key: &str, found: Tensor<2>) {
    close(found, answer(name, key), name);
}

#[track_caller]
fn close(found: Tensor<2>, expected: Tensor<2>, name: &str) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let largest: f32 = expected.clone().abs().max().into_scalar();
    let difference: f32 = (found - expected).abs().max().into_scalar();
    let drift = difference / largest;
    println!("{name}: drift {drift:.1e}");
    // The comparison is this way round so that a NaN fails.
    assert!(drift < TOLERANCE, "{name} drifts by {drift}");
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn edit_json(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let mut json = read_json(&folder.join(file));
    edit(&mut json);
    fs::write(folder.join(file), json.to_string()).unwrap();
}

/// Name, shape and bytes of a tensor in f32.
type Named = (String, Vec<usize>, Vec<u8>);

fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Vec<Named>)) {
    edit_file(&folder.join("model.safetensors"), edit);
}

fn edit_file(path: &Path, edit: impl FnOnce(&mut Vec<Named>)) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<Named> = file
        .iter()
        .map(|(name, view)| {
            (
                name.to_string(),
                view.shape().to_vec(),
                view.data().to_vec(),
            )
        })
        .collect();
    edit(&mut tensors);
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn tensor_names(path: &Path) -> Vec<String> {
    SafetensorsStore::from_file(path).keys().unwrap()
}

fn write_answer(path: &Path, tensors: &[(&str, burn::tensor::TensorData)]) {
    let views = tensors.iter().map(|(name, data)| {
        let shape = data.shape().to_vec();
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, data.as_bytes());
        (*name, view.unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
