//! `diff`: two adapters or two models, layer by layer.

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::dense::{Matrix, factor, packed_skews, rotation, skews};
use crate::files::*;

const PREFIX: &str = "base_model.model";

/// The result of `diff` as JSON.
fn diff(folder: &std::path::Path, arguments: &[&str]) -> Value {
    let arguments = [&["diff", "--json"], arguments].concat();
    serde_json::from_str(&succeed(folder, &arguments)).unwrap()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// Settings of OFT with the exact map.
fn oft(b: usize) -> Value {
    json!({
        "peft_type": "OFT", "oft_block_size": b, "target_modules": "all-linear", "use_cayley_neumann": false
    })
}

fn packed(module: &str, n: usize, b: usize, seed: u64) -> (String, Tensor) {
    let key = format!("{PREFIX}.{module}.oft_R.weight");
    (key, Tensor::random(&[n, b * (b - 1) / 2], seed))
}

/// Largest and mean angle of `R_Aᵀ·R_B`.
fn expected(a: &Matrix, b: &Matrix) -> [f64; 2] {
    let angles = a.transposed().times(b).angles();
    let largest = angles.iter().copied().fold(0.0, f64::max);
    [largest, angles.iter().sum::<f64>() / angles.len() as f64]
}

/// BOFT with two factors of blocks of 4, spans of 8, against OFT with blocks of 6: both mix 24 channels.
#[test]
fn the_angles_between_rotations_with_other_blocks_are_those_of_their_product() {
    let folder = tempfile::tempdir().unwrap();
    let squares = Tensor::random(&[2, 12, 4, 4], 1);
    let mut scale = Tensor::random(&[5, 1], 2);
    scale
        .numbers
        .iter_mut()
        .for_each(|s| *s = f64::from((*s + 1.0) as f32));
    let tensors = [
        (format!("{PREFIX}.fc.boft_R"), squares.clone()),
        (format!("{PREFIX}.fc.boft_s"), scale.clone()),
    ];
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["fc"]
    });
    write_adapter(&folder.path().join("a"), &config, &tensors.into());
    let (key, numbers) = packed("fc", 8, 6, 3);
    write_adapter(
        &folder.path().join("b"),
        &oft(6),
        &[(key, numbers.clone())].into(),
    );
    let first = rotation(&skews(&squares), 1.0);
    let second = rotation(&[packed_skews(&numbers, 6)], 1.0);
    let found = diff(folder.path(), &["a", "b"]);
    let layer = &found["layers"][0];
    let [largest, mean] = expected(&first, &second);
    assert!(
        (number(&layer["largest_angle"]) - largest).abs() < 1e-6,
        "{layer} {largest}"
    );
    assert!(
        (number(&layer["mean_angle"]) - mean).abs() < 1e-6,
        "{layer} {mean}"
    );
    let scale = scale
        .numbers
        .iter()
        .map(|s| (s - 1.0).abs())
        .fold(0.0, f64::max);
    assert!(
        (number(&layer["scale"]) - scale).abs() < 1e-12,
        "{layer} {scale}"
    );
    assert_eq!(
        [&layer["path"], &layer["block_size"], &layer["factors"]],
        [&json!("fc"), &json!([4, 6]), &json!([2, 1])]
    );
    // The way back is as long.
    let back = diff(folder.path(), &["b", "a"]);
    let apart = number(&back["layers"][0]["mean_angle"]) - mean;
    assert!(apart.abs() < 1e-6, "{apart:e}");
    let text = succeed(folder.path(), &["diff", "a", "b"]);
    let rows: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .collect();
    assert_eq!(
        rows[1],
        [
            "fc",
            "4,",
            "6",
            "2,",
            "1",
            &format!("{largest:.4}"),
            &format!("{mean:.4}"),
            &format!("{scale:.2e}")
        ]
    );
}

/// Planes that are turned by known angles, half a turn among them.
#[test]
fn known_angles_are_found() {
    let folder = tempfile::tempdir().unwrap();
    // A block of two channels turns its plane by 2·atan of its number.
    let write = |name: &str, angles: [f64; 4]| {
        let numbers = angles.map(|angle: f64| (angle / 2.0).tan()).to_vec();
        let tensor = Tensor {
            dtype: Dtype::F64,
            ..Tensor::new(&[4, 1], numbers)
        };
        let tensors = [(format!("{PREFIX}.fc.oft_R.weight"), tensor)].into();
        write_adapter(&folder.path().join(name), &oft(2), &tensors);
    };
    let half = std::f64::consts::FRAC_PI_2;
    write("a", [0.3, half, -1.0, 1e-9]);
    write("b", [0.5, -half, -1.0, 3e-9]);
    let layer = &diff(folder.path(), &["a", "b"])["layers"][0];
    let [largest, mean] = [2.0 * half, (0.2 + 2.0 * half + 2e-9) / 4.0];
    assert!(
        (number(&layer["largest_angle"]) - largest).abs() < 1e-12,
        "{layer}"
    );
    assert!(
        (number(&layer["mean_angle"]) - mean).abs() < 1e-12,
        "{layer}"
    );
    assert_eq!(layer["scale"], json!(null));
    write("b", [0.3, half, -1.0, 3e-9]);
    let layer = &diff(folder.path(), &["a", "b"])["layers"][0];
    assert!(
        (number(&layer["largest_angle"]) / 2e-9 - 1.0).abs() < 1e-6,
        "{layer}"
    );
}

#[test]
fn an_adapter_is_no_angle_from_itself_and_its_own_from_none() {
    for name in [
        "cases/boft-mlp-bias-only-saved",
        "cases/oft-linear-neumann-5",
        "cases/oft-linear-coft-on",
        "cases/oft-linear-share-neumann",
    ] {
        let case = Case::open(name);
        let folder = case.folder();
        let same = diff(folder.path(), &[case.adapter(), case.adapter()]);
        for layer in same["layers"].as_array().unwrap() {
            assert!(number(&layer["largest_angle"]) < 1e-12, "{name}: {layer}");
            assert!(
                layer["scale"].as_f64().unwrap_or(0.0) == 0.0,
                "{name}: {layer}"
            );
        }
        // One factor and no rotation: the angle is the one that `inspect` shows.
        let none = "convert --to peft --strength 0 --output none --base base.safetensors";
        let none: Vec<_> = none.split(' ').chain([case.adapter()]).collect();
        succeed(folder.path(), &none);
        let own = diff(folder.path(), &["none", case.adapter()]);
        let inspected = succeed(folder.path(), &["inspect", case.adapter(), "--json"]);
        let inspected: Value = serde_json::from_str(&inspected).unwrap();
        let pairs = own["layers"].as_array().unwrap().iter();
        let pairs = pairs.zip(inspected["layers"].as_array().unwrap());
        for (found, expected) in pairs {
            assert_eq!(found["path"], expected["path"]);
            let [found, expected] = [found, expected].map(|layer| number(&layer["largest_angle"]));
            assert!(
                found > 1e-6 && (found / expected - 1.0).abs() < 1e-4,
                "{name}: {found} {expected}"
            );
        }
    }
}

#[test]
fn a_record_is_compared_with_the_folder_that_it_was_made_of() {
    let case = Case::open("cases/boft-linear-m2-b4");
    let folder = case.folder();
    succeed(
        folder.path(),
        &convert_command(case.adapter(), "record", "a.bpk"),
    );
    let found = diff(folder.path(), &["a.bpk", case.adapter()]);
    assert!(
        number(&found["layers"][0]["largest_angle"]) < 1e-12,
        "{found}"
    );
    let half = [
        "convert",
        case.adapter(),
        "--to",
        "record",
        "--strength",
        "0.5",
        "--output",
        "b.bpk",
    ];
    succeed(folder.path(), &half);
    let found = diff(folder.path(), &["a.bpk", "b.bpk"]);
    assert!(
        number(&found["layers"][0]["largest_angle"]) > 0.1,
        "{found}"
    );
    let arguments = ["diff", "a.bpk", "b.bpk", "--map", "a=b"];
    assert_eq!(
        refused(folder.path(), &arguments),
        "--map needs --base where a record is compared"
    );
}

#[test]
fn what_only_one_of_two_adapters_has_and_what_cannot_be_compared_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let layer = |index: usize, seed: u64| packed(&format!("h.{index}.fc"), 4, 4, seed);
    let both = [layer(2, 1), layer(10, 2), packed("out", 4, 4, 3)];
    write_adapter(
        &path("a"),
        &oft(4),
        &[both.to_vec(), vec![packed("in", 4, 4, 4)]]
            .concat()
            .into_iter()
            .collect(),
    );
    let narrow = packed("out", 5, 4, 5);
    let others = [
        both[0].clone(),
        layer(10, 6),
        narrow,
        packed("head", 4, 4, 7),
    ];
    write_adapter(&path("b"), &oft(4), &others.into());
    let found = diff(folder.path(), &["a", "b"]);
    assert_eq!(found["only_in_a"], json!(["in"]));
    assert_eq!(found["only_in_b"], json!(["head"]));
    let why = "has 16 inputs in the first and 20 in the second";
    assert_eq!(
        found["not_compared"],
        json!([{"name": "out", "reason": why}])
    );
    let layers = found["layers"].as_array().unwrap();
    let paths: Vec<_> = layers.iter().map(|layer| &layer["path"]).collect();
    assert_eq!(paths, ["h.2.fc", "h.10.fc"]);
    assert!(number(&layers[0]["largest_angle"]) < 1e-12);
    assert!(number(&layers[1]["largest_angle"]) > 0.1);
    let text = succeed(folder.path(), &["diff", "a", "b"]);
    assert!(
        text.ends_with("layers only in a: in\nlayers only in b: head\nnot compared: `out` has 16 inputs in the first and 20 in the second\n"),
        "{text}"
    );

    write_adapter(&path("c"), &oft(4), &[packed("other", 4, 4, 1)].into());
    assert_eq!(
        refused(folder.path(), &["diff", "c", "b"]),
        "no layer is in both c and b, of which the first has other and the second h.2.fc, h.10.fc, head, out; use --map or \
         --base where they only have different names"
    );
    assert_eq!(
        refused(folder.path(), &["diff", "c", "b", "--map", "^other$=out"]),
        format!("`out` {why}")
    );
}

#[test]
fn biases_and_saved_modules_of_two_adapters_are_compared() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    let key = format!("{PREFIX}.fc1.base_layer.bias");
    let before = tensors[&key].clone();
    tensors.get_mut(&key).unwrap().numbers[3] += 0.25;
    let after = tensors[&key].cast(Dtype::F32);
    let config = read_json(&case.adapter.join("adapter_config.json"));
    write_adapter(&folder.path().join("other"), &config, &tensors);
    let found = diff(folder.path(), &[case.adapter(), "other"]);
    let saved = found["saved"]["both"].as_array().unwrap();
    assert_eq!(saved.len(), 4);
    let bias = saved
        .iter()
        .find(|tensor| tensor["tensor"] == "fc1.bias")
        .unwrap();
    let change = (after.numbers[3] - before.numbers[3]).abs();
    let norm = before.numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!((number(&bias["absolute"]) - change).abs() < 1e-12, "{bias}");
    assert!(
        (number(&bias["relative"]) - change / norm).abs() < 1e-12,
        "{bias}"
    );
    let others = saved.iter().filter(|tensor| tensor["tensor"] != "fc1.bias");
    assert!(
        others
            .clone()
            .all(|tensor| number(&tensor["absolute"]) == 0.0),
        "{saved:?}"
    );
    let text = succeed(folder.path(), &["diff", case.adapter(), "other"]);
    let line = format!(
        "saved `fc1.bias` differs by {:.2e} of its norm, at most {change:.1e}\n",
        change / norm
    );
    assert!(text.ends_with(&line), "{text}");
}

/// The names of a file, and the sign of its convolutions, are clear only in a model.
#[test]
fn a_file_of_another_program_is_compared_with_peft_for_a_model() {
    let case = Case::open("cases/oft-conv-neumann-b9");
    let folder = case.folder();
    let convert = convert_for(
        "base.safetensors",
        case.adapter(),
        "sd-scripts",
        "a.safetensors",
    );
    succeed(folder.path(), &convert);
    assert_eq!(
        refused(folder.path(), &["diff", case.adapter(), "a.safetensors"]),
        "the two adapters are of different programs, which name modules differently; pass --base, the model that both are for"
    );
    let arguments = [
        "diff",
        case.adapter(),
        "a.safetensors",
        "--base",
        "base.safetensors",
        "--json",
    ];
    let run = run(folder.path(), &arguments);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(
        number(&found["layers"][0]["largest_angle"]) < 1e-12,
        "{found}"
    );
    assert_eq!(found["only_in_a"], json!([]));

    // Two files of one dialect need no model. Polynomials of numbers this small are nearly orthogonal.
    let tensors = read(&folder.path().join("a.safetensors"));
    let key = tensors.keys().next().unwrap();
    let write_times = |name: &str, times: f64| {
        let mut tensors = tensors.clone();
        let numbers = &mut tensors.get_mut(key).unwrap().numbers;
        numbers.iter_mut().for_each(|x| *x *= times);
        write(&folder.path().join(name), &tensors);
        let q = packed_skews(&read(&folder.path().join(name))[key], 9);
        factor(0, &q.iter().map(Matrix::neumann).collect::<Vec<_>>())
    };
    let small = write_times("small.safetensors", 0.05);
    let smaller = write_times("smaller.safetensors", 0.015);
    let found = diff(folder.path(), &["small.safetensors", "smaller.safetensors"]);
    let [largest, mean] = expected(&small, &smaller);
    let layer = &found["layers"][0];
    assert!(largest > 0.02, "{largest}");
    assert!(
        (number(&layer["largest_angle"]) / largest - 1.0).abs() < 1e-2,
        "{layer} {largest}"
    );
    assert!(
        (number(&layer["mean_angle"]) / mean - 1.0).abs() < 1e-2,
        "{layer} {mean}"
    );
}

#[test]
fn the_weights_of_two_models_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let count = |number: f64| Tensor {
        dtype: Dtype::I64,
        ..Tensor::new(&[], vec![number])
    };
    let bytes = |numbers: [f64; 2]| Tensor {
        dtype: Dtype::U8,
        ..Tensor::new(&[2], numbers.to_vec())
    };
    let [before, after] = [1, 2].map(|seed| Tensor::random(&[3, 50], seed));
    let same = Tensor::random(&[4], 3);
    let named = |tensors: &[(&str, &Tensor)]| -> Tensors {
        let tensors = tensors.iter();
        tensors
            .map(|(key, tensor)| (key.to_string(), (*tensor).clone()))
            .collect()
    };
    let zero = Tensor::new(&[2], vec![0.0; 2]);
    let one = Tensor::new(&[2], vec![0.0, 0.5]);
    let a = named(&[
        ("h.2.fc", &before),
        ("h.10.fc", &before),
        ("same", &same),
        ("count", &count(3.0)),
        ("mask", &bytes([1.0, 2.0])),
        ("flags", &bytes([1.0, 2.0])),
        ("zero", &zero),
        ("shape", &same),
        ("first", &same),
    ]);
    let b = named(&[
        ("h.2.fc", &after),
        ("h.10.fc", &before.cast(Dtype::BF16)),
        ("same", &same),
        ("count", &count(5.0)),
        ("mask", &bytes([1.0, 2.0])),
        ("flags", &bytes([1.0, 3.0])),
        ("zero", &one),
        ("shape", &before),
        ("second", &same),
    ]);
    let (first, second): (Tensors, Tensors) =
        b.into_iter().partition(|(key, _)| key.as_str() < "m");
    write(&path("a"), &a);
    write_shards(&path("b"), &[first, second]);
    let found = diff(folder.path(), &["a", "b"]);
    assert_eq!(found["kind"], "models");
    assert_eq!(
        [&found["only_in_a"], &found["only_in_b"]],
        [&json!(["first"]), &json!(["second"])]
    );
    assert_eq!(
        found["not_compared"],
        json!([
            {"name": "flags", "reason": "is u8 in the first and u8 in the second, and holds other bytes"},
            {"name": "shape", "reason": "is [4] in the first and [3, 50] in the second"}
        ])
    );
    let tensors = found["tensors"].as_array().unwrap();
    let of = |name: &str| {
        tensors
            .iter()
            .find(|tensor| tensor["tensor"] == name)
            .unwrap()
    };
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    for (name, after) in [("h.2.fc", after), ("h.10.fc", before.cast(Dtype::BF16))] {
        let pairs = || {
            after
                .numbers
                .iter()
                .zip(&before.numbers)
                .map(|(a, b)| a - b)
        };
        let relative = norm(&mut pairs()) / norm(&mut before.numbers.iter().copied());
        let absolute = pairs().map(f64::abs).fold(0.0, f64::max);
        assert!(relative > 1e-4, "{relative:e}");
        assert!(
            (number(&of(name)["relative"]) / relative - 1.0).abs() < 1e-12,
            "{name}"
        );
        assert_eq!(number(&of(name)["absolute"]), absolute, "{name}");
    }
    assert_eq!(
        [
            number(&of("same")["relative"]),
            number(&of("same")["absolute"])
        ],
        [0.0; 2]
    );
    assert_eq!(
        [
            number(&of("count")["absolute"]),
            number(&of("mask")["absolute"])
        ],
        [2.0, 0.0]
    );
    assert_eq!(
        [&of("zero")["relative"], &of("zero")["absolute"]],
        [&json!(null), &json!(0.5)]
    );
    assert_eq!(found["differ"], 4);
    let text = succeed(folder.path(), &["diff", "a", "b"]);
    let rows: Vec<_> = text
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(rows[..5], ["tensor", "count", "h.2.fc", "h.10.fc", "zero"]);
    assert!(
        text.contains(
            "\ndiffer: 4 of 6 tensors\ntensors only in a: first\ntensors only in b: second\n"
        ),
        "{text}"
    );
}

/// NaN is not taken for no difference.
#[test]
fn nan_in_a_model_or_an_adapter_shows() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let weight = Tensor::random(&[3, 4], 1);
    let mut broken = weight.clone();
    broken.numbers[5] = f64::NAN;
    for (name, tensor) in [("a", &weight), ("b", &broken), ("c", &broken)] {
        write(&path(name), &[("w".to_string(), tensor.clone())].into());
    }
    let text = succeed(folder.path(), &["diff", "a", "b"]);
    assert!(
        text.contains("w            NaN       NaN  [3, 4]\ndiffer: 1 of 1 tensor\n"),
        "{text}"
    );
    assert_eq!(diff(folder.path(), &["a", "b"])["differ"], 1);
    assert_eq!(diff(folder.path(), &["b", "c"])["differ"], 0);

    let (key, mut numbers) = packed("fc", 4, 4, 1);
    write_adapter(
        &path("one"),
        &oft(4),
        &[(key.clone(), numbers.clone())].into(),
    );
    numbers.numbers[2] = f64::INFINITY;
    write_adapter(&path("two"), &oft(4), &[(key, numbers)].into());
    let run = run(folder.path(), &["diff", "one", "two"]);
    assert_eq!(run.code, 2);
    assert!(
        run.stderr
            .ends_with("error: `fc` has a rotation with NaN or infinity\n"),
        "{}",
        run.stderr
    );
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let case = Case::open("cases/boft-mlp-bias-none");
    let folder = case.folder();
    let path = |name: &str| folder.path().join(name);
    let (key, numbers) = packed("fc1", 6, 4, 1);
    write_adapter(&path("adapter"), &oft(4), &[(key, numbers)].into());
    let line = |arguments: &[&str]| refused(folder.path(), &[&["diff"], arguments].concat());
    let unlike =
        "base.safetensors is a model and adapter an adapter; name two adapters or two models";
    assert_eq!(line(&["base.safetensors", "adapter"]), unlike);
    assert_eq!(line(&["adapter", "base.safetensors"]), unlike);
    assert_eq!(
        line(&["base.safetensors", "base.safetensors", "--map", "a=b"]),
        "--map is for adapters; the tensors of two models are compared under their names"
    );
    assert_eq!(
        line(&["adapter", "adapter", "--part", "lora_unet_"]),
        "--part is for files of other programs; an adapter of PEFT's is for one model"
    );
    let missing = line(&["adapter", "missing"]);
    assert!(missing.starts_with("missing cannot be read: "), "{missing}");
    std::fs::write(path("text"), "no tensors here").unwrap();
    let text = line(&["text", "base.safetensors"]);
    assert!(text.starts_with("text: not a safetensors file: "), "{text}");
    let other = [("w".to_string(), Tensor::random(&[2], 1))];
    write(&path("other"), &other.into());
    assert_eq!(
        line(&["base.safetensors", "other"]),
        format!(
            "no tensor is in both base.safetensors and other, of which the first has {} and the second w",
            case.base
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ")
        )
    );
    std::fs::copy(path("base.safetensors"), path("adapter/model.safetensors")).unwrap();
    std::fs::write(path("adapter/config.json"), "{}").unwrap();
    assert_eq!(
        line(&["adapter", "adapter"]),
        "adapter: it holds a model and an adapter; name a file of the one that is meant"
    );
    let files = [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ];
    assert_eq!(
        diff(folder.path(), &files)["layers"]
            .as_array()
            .unwrap()
            .len(),
        1
    );

    // Outputs and inputs.
    let tensors = [
        ("fc1.oft_blocks", Tensor::random(&[6, 4, 4], 2)),
        ("fc1.alpha", Tensor::new(&[], vec![0.0])),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write(&path("lycoris.safetensors"), &tensors.into());
    let base = [("fc1.weight".to_string(), Tensor::random(&[24, 24], 3))];
    write(&path("square.safetensors"), &base.into());
    let arguments = [
        "diff",
        files[0],
        "lycoris.safetensors",
        "--base",
        "square.safetensors",
    ];
    let run = run(folder.path(), &arguments);
    assert_eq!(run.code, 2);
    assert!(
        run.stderr.ends_with(
            "error: `fc1` has its inputs rotated in the first and its outputs in the second\n"
        ),
        "{}",
        run.stderr
    );
}
