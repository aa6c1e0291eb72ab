//! What a saved folder contains.

use std::fs;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_boft::peft::{LoadOptions, SaveOptions};
use burn_boft::{Adapter, BoftConfig, BoftLinear, LayerKind, OftConfig, inject};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::json;

use super::support::*;
use crate::common::models::{distance, linear, numbers, rows, set};

#[test]
fn a_saved_file_has_the_keys_and_shapes_of_peft() {
    let folder = saved(&Adapter::extract_as(&adapted::<BoftLinear>(boft()), boft()).unwrap());
    let expected = [
        ("head.bias", vec![5]),
        ("head.weight", vec![5, 12]),
        ("hidden.base_layer.bias", vec![16]),
        ("hidden.boft_R", vec![2, 6, 4, 4]),
        ("hidden.boft_s", vec![16, 1]),
        ("output.base_layer.bias", vec![12]),
        ("output.boft_R", vec![2, 4, 4, 4]),
        ("output.boft_s", vec![12, 1]),
    ];
    let expected = expected.map(|(key, shape)| (key.to_string(), shape));
    assert_eq!(shapes(folder.path()), expected);
    let bytes = fs::read(folder.path().join(TENSORS)).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    assert_eq!(metadata, [("format".to_string(), "pt".to_string())].into());

    let model = adapted::<BoftLinear>(boft());
    let numbers = numbers(&model);
    let file = stored(folder.path());
    let r = single(&file["base_model.model.hidden.boft_R"]);
    let skew = &numbers["hidden.weight.boft.skew"];
    assert_eq!((r[1], r[4], r[0]), (skew[0] as f32, -skew[0] as f32, 0.0));
    let head = single(&file["base_model.model.head.weight"]);
    let ours = &numbers["head.weight"];
    assert_eq!((head[1], head[12]), (ours[5] as f32, ours[1] as f32));

    let json = settings(folder.path());
    assert_eq!(json["bias"], "boft_only");
    assert_eq!(json["boft_n_butterfly_factor"], 2);
    assert_eq!(json["target_modules"], json!(["hidden", "output"]));
    assert_eq!(json["modules_to_save"], json!(["head"]));
}

#[test]
fn all_linear_is_saved_as_the_names_of_the_adapted_layers() {
    let config = boft().with_target_modules("all-linear");
    let folder = saved(&Adapter::extract_as(&adapted::<BoftLinear>(&config), &config).unwrap());
    assert_eq!(
        settings(folder.path())["target_modules"],
        json!(["hidden", "output"])
    );
}

/// The path of one layer ends that of another, which a list of names would select as well.
#[test]
fn what_is_excluded_from_all_linear_is_not_selected_by_the_saved_names() {
    #[derive(Module, Debug)]
    struct Block {
        fc: BoftLinear,
    }
    #[derive(Module, Debug)]
    struct Nested {
        fc: BoftLinear,
        block: Block,
    }
    let nested = || {
        let layer = |seed| linear([24, 16], seed, DType::F32, &device()).into();
        Nested {
            fc: layer(3),
            block: Block { fc: layer(4) },
        }
    };
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules("all-linear")
        .with_exclude_modules(["block.fc"]);
    let model = inject(nested(), &config).unwrap();
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    assert_eq!(settings(folder.path())["target_modules"], "fc");
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let attached = adapter.attach(nested()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
}

/// In `exclude_modules`, PEFT would take "all-linear" for a regular expression, which matches no path.
#[test]
fn linear_layers_that_are_all_excluded_stay_so_in_the_saved_names() {
    #[derive(Module, Debug)]
    struct Mixed {
        conv: Conv2d,
        fc: BoftLinear,
    }
    let mixed = || {
        let conv = Conv2dConfig::new([4, 6], [2, 2]).init(&device());
        let weight = Param::from_tensor(rows([6, 4, 2, 2], 2, &device()));
        Mixed {
            conv: Conv2d {
                weight,
                bias: None,
                ..conv
            },
            fc: linear([24, 16], 3, DType::F32, &device()).into(),
        }
    };
    let config = OftConfig::new()
        .with_block_size(4)
        .with_init(INIT)
        .with_target_modules(".*")
        .with_exclude_modules("all-linear");
    let model = inject(mixed(), &config).unwrap();
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let json = settings(folder.path());
    assert_eq!(json["target_modules"], "conv");
    assert_eq!(json["exclude_modules"], json!(null));
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let attached = adapter.attach(mixed()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));

    // A configuration alone has no layers to name.
    let error = serde_json::to_string(&config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`exclude_modules` is \"all-linear\", not names or a regular expression, which PEFT would take it for"
    );
}

/// PEFT saves by the endings of paths, and raises a `KeyError` where the file lacks a module that it saves.
#[test]
fn a_name_by_which_peft_would_save_another_module_is_not_written() {
    #[derive(Module, Debug)]
    struct Tower {
        hidden: BoftLinear,
        head: BoftLinear,
    }
    #[derive(Module, Debug)]
    struct Heads {
        tower: Tower,
        lm_head: BoftLinear,
    }
    let heads = || {
        let layer = |sizes, seed| linear(sizes, seed, DType::F32, &device()).into();
        Heads {
            tower: Tower {
                hidden: layer([24, 16], 3),
                head: layer([16, 5], 4),
            },
            lm_head: layer([16, 7], 5),
        }
    };
    let config = |saved: &[&str]| {
        BoftConfig::new()
            .with_init(INIT)
            .with_target_modules(["hidden"])
            .with_modules_to_save(saved.iter().copied())
    };
    let model = inject(heads(), config(&["head"])).unwrap();
    let adapter = Adapter::extract_as(&model, config(&["head"])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        adapter.save(folder.path()).unwrap_err().to_string(),
        "PEFT's format cannot hold `head`: PEFT saves every module whose path ends with a name in modules_to_save, with or \
         without a dot before it, and would look for `lm_head` in the file; write more of the path, or save `lm_head` too"
    );
    // What has nothing to do with files works.
    let attached = adapter.attach(heads()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));

    let (by_path, both) = (config(&["tower.head"]), config(&["head", "lm_head"]));
    let model = inject(heads(), &by_path).unwrap();
    saved(&Adapter::extract(&model).unwrap());
    saved(&Adapter::extract_as(&model, &by_path).unwrap());
    let model = inject(heads(), &both).unwrap();
    saved(&Adapter::extract_as(&model, &both).unwrap());
}

/// PyTorch has the weight of a linear layer as `[d_output, d_input]`, whatever the struct is called here.
#[test]
fn the_weight_of_a_saved_module_that_is_declared_linear_is_transposed() {
    #[derive(Module, Debug)]
    struct Gated {
        weight: Param<Tensor<2>>,
        gate: Param<Tensor<1>>,
    }
    #[derive(Module, Debug)]
    struct Declared {
        hidden: BoftLinear,
        gated: Gated,
    }
    let declared = || Declared {
        hidden: linear([24, 16], 3, DType::F32, &device()).into(),
        gated: Gated {
            weight: Param::from_tensor(rows([16, 12], 4, &device())),
            gate: Param::from_tensor(rows([12], 5, &device())),
        },
    };
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["hidden"])
        .with_modules_to_save(["gated"])
        .with_layer_kind("Gated", LayerKind::Linear);
    let model = inject(declared(), &config).unwrap();
    let model = set(model, "gated.weight", |values| {
        values.iter().map(|value| 2.0 * value + 1.0).collect()
    });
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let shapes = shapes(folder.path());
    assert!(
        shapes.contains(&("gated.weight".to_string(), vec![12, 16])),
        "{shapes:?}"
    );
    let weight = single(&stored(folder.path())["base_model.model.gated.weight"]);
    let ours = &numbers(&model)["gated.weight"];
    assert_eq!((weight[1], weight[16]), (ours[12] as f32, ours[1] as f32));
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let attached = adapter.attach(declared()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
}

#[test]
fn an_adapter_without_scale_is_saved_with_a_scale_of_ones() {
    let config = boft().with_scale(false);
    let model = adapted::<BoftLinear>(&config);
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let file = stored(folder.path());
    assert_eq!(single(&file["base_model.model.hidden.boft_s"]), [1.0; 16]);
    let attached = Adapter::load(folder.path())
        .unwrap()
        .0
        .attach(base::<BoftLinear>())
        .unwrap();
    assert_eq!(distance(outputs(&attached), outputs(&model)), 0.0);
}

#[test]
fn an_adapter_can_be_saved_in_half_precision() {
    let model = adapted::<BoftLinear>(boft());
    let adapter = Adapter::extract_as(&model, boft()).unwrap();
    for (dtype, stored_as, tolerance) in [
        (FloatDType::F16, Dtype::F16, 2e-3),
        (FloatDType::BF16, Dtype::BF16, 2e-2),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let options = SaveOptions::new().with_dtype(dtype);
        adapter.save_with(folder.path(), &options).unwrap();
        let file = stored(folder.path());
        assert_eq!(file["base_model.model.hidden.boft_R"].0, stored_as);
        assert_eq!(file["base_model.model.output.boft_s"].0, stored_as);
        assert_eq!(file["base_model.model.head.weight"].0, Dtype::F32);
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        assert_eq!(loaded.layers()[0].skew().dtype(), DType::F32);
        let attached = loaded.attach(base::<BoftLinear>()).unwrap();
        let drift = distance(outputs(&attached), outputs(&model));
        assert!(drift > 0.0 && drift < tolerance, "{dtype:?}: {drift}");
    }
}

#[test]
fn an_adapter_in_double_precision_is_saved_in_double_precision() {
    #[derive(Module, Debug)]
    struct One {
        hidden: BoftLinear,
    }
    let one = |device: &Device| One {
        hidden: linear([24, 16], 9, DType::F64, device).into(),
    };
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["hidden"]);
    let model = inject(one(&device()), &config).unwrap();
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let file = stored(folder.path());
    assert_eq!(file["base_model.model.hidden.boft_R"].0, Dtype::F64);
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        numbers(&loaded.attach(one(&device())).unwrap()),
        numbers(&model)
    );
}

#[test]
fn named_adapters_are_saved_in_folders_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let first = Adapter::extract_as(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let config = boft().with_block_size(2);
    let second = Adapter::extract_as(&adapted::<BoftLinear>(&config), &config).unwrap();
    first.save(folder.path()).unwrap();
    let named = SaveOptions::new().with_name("digits");
    second.save_with(folder.path(), &named).unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    first
        .save_with(folder.path(), &SaveOptions::new().with_name("default"))
        .unwrap();

    let load = |name: &str| {
        let options = LoadOptions::new().with_name(name);
        Adapter::load_with(folder.path(), &options).map(|(adapter, _)| adapter)
    };
    assert_eq!(load("default").unwrap().layers()[0].block_size(), 4);
    assert_eq!(load("digits").unwrap().layers()[0].block_size(), 2);
    assert!(folder.path().join("digits").join(TENSORS).exists());
    assert_eq!(fs::read(folder.path().join("notes.txt")).unwrap(), b"mine");
    let error = load("../digits").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`../digits` cannot name an adapter: it must be the name of one folder, without `.` and separators"
    );
}

/// PEFT trains the numbers of `Q`, so the file holds those, and a line of text that PEFT does not read.
#[test]
fn a_scaled_skew_is_saved_as_the_numbers_of_q_and_comes_back_scaled() {
    let config = boft().with_block_size(2).with_scaled_skew(true);
    let model = adapted::<BoftLinear>(&config);
    let adapter = Adapter::extract_as(&model, &config).unwrap();
    let folder = saved(&adapter);
    let skew = single(&stored(folder.path())["base_model.model.hidden.boft_R"])[1];
    // Blocks of two channels, so that what is trained is twice the number of `Q`.
    let trained = numbers(&model)["hidden.weight.boft.scaled_skew"][0] as f32;
    assert_eq!(skew, trained / 2.0);
    let json = settings(folder.path()).to_string();
    assert!(!json.contains("scaled"), "{json}");

    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert!(loaded.config().scaled_skew());
    let attached = loaded.attach(base::<BoftLinear>()).unwrap();
    let path = "hidden.weight.boft.scaled_skew";
    assert_eq!(numbers(&attached)[path], numbers(&model)[path]);

    // Without the line, as PEFT saves it again, the adapter is the same and is trained plainly.
    let file = folder.path().join(TENSORS);
    let bytes = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let plain = safetensors::serialize(tensors.iter(), None).unwrap();
    fs::write(&file, plain).unwrap();
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert!(!loaded.config().scaled_skew());
    let attached = loaded.attach(base::<BoftLinear>()).unwrap();
    assert!(distance(outputs(&attached), outputs(&model)) < 1e-6);
}
