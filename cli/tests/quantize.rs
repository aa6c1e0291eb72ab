//! `merge --quantize-check`: what rounding the merged weights to eight and four bits would lose.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::dense::{Matrix, rotation, skews};
use crate::files::*;

const PREFIX: &str = "base_model.model";
/// The schemes of the report: their names, the largest level, and how many inputs share a scale.
const SCHEMES: [(&str, f64, usize); 3] = [
    ("int8", 127.0, usize::MAX),
    ("int4", 7.0, usize::MAX),
    ("int4_group_128", 7.0, 128),
];

/// `‖rounded − exact‖ / ‖exact‖` of rows of numbers.
fn loss(numbers: &[f64], d_input: usize, levels: f64, group: usize) -> f64 {
    let mut lost = 0.0;
    for row in numbers.chunks(d_input) {
        for group in row.chunks(group.min(d_input)) {
            let largest = group.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for x in group.iter().filter(|_| largest > 0.0) {
                let scale = largest / levels;
                let level = (x / scale).round_ties_even().clamp(-levels, levels);
                lost += (level * scale - x).powi(2);
            }
        }
    }
    (lost / numbers.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

fn assert_near(found: &Value, expected: f64, tolerance: f64, what: &str) {
    let found = found.as_f64().unwrap_or_else(|| panic!("{what}: {found}"));
    let apart = (found - expected).abs() / expected.abs().max(1e-12);
    assert!(apart <= tolerance, "{what}: {found} and {expected}");
}

/// The rows of a tensor that a line of the report is about, and how many numbers each has.
fn rows_of(tensors: &Tensors, layer: &Value) -> (Vec<f64>, usize) {
    let tensor = &tensors[layer["tensor"].as_str().unwrap()];
    let d_input = tensor.numbers.len() / tensor.shape[0];
    let at = |end: usize| layer["rows"][end].as_u64().unwrap() as usize * d_input;
    (tensor.numbers[at(0)..at(1)].to_vec(), d_input)
}

/// Merges with the check, and compares the losses of the base and of what was written with those computed here.
fn check(folder: &Path, merge: &[&str], base: &Tensors, what: &str) -> Value {
    let plain = [merge, &["--output", "plain"]].concat();
    succeed(folder, &plain);
    let checked = [
        merge,
        &["--output", "checked", "--quantize-check", "--json"],
    ]
    .concat();
    let printed: Value = serde_json::from_str(&succeed(folder, &checked)).unwrap();
    let merged = read(&folder.join("checked"));
    assert_eq!(
        merged,
        read(&folder.join("plain")),
        "{what}: the check changes what is written"
    );
    let check = &printed["quantize_check"];
    let layers = check["layers"].as_array().unwrap();
    assert!(!layers.is_empty(), "{what}");
    for layer in layers {
        for (name, levels, group) in SCHEMES {
            for (of, tensors) in [("base", base), ("merged", &merged)] {
                let (rows, d_input) = rows_of(tensors, layer);
                let expected = loss(&rows, d_input, levels, group);
                let what = format!("{what}: {} {name} {of}", layer["tensor"]);
                assert_near(&layer[name][of], expected, 1e-4, &what);
            }
        }
    }
    check.clone()
}

/// A weight with 264 inputs, which are two groups of 128 and one of 8, and a BOFT adapter with two factors and a scale.
fn wide(folder: &Path, dtype: Dtype) -> (Tensor, Matrix, Matrix) {
    let weight = Tensor::random(&[12, 264], 1).cast(dtype);
    // An adapter must not be less precise than the weight.
    let wide = match dtype {
        Dtype::F64 => Dtype::F64,
        _ => Dtype::F32,
    };
    let blocks = Tensor::random(&[2, 66, 4, 4], 2).cast(wide);
    let mut scale = Tensor::random(&[12, 1], 3).cast(wide);
    scale
        .numbers
        .iter_mut()
        .for_each(|s| *s = f64::from((*s + 1.0) as f32));
    let base: Tensors = [("fc.weight".to_string(), weight.clone())].into();
    write(&folder.join("base"), &base);
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["fc"]
    });
    let tensors = [("boft_R", blocks.clone()), ("boft_s", scale.clone())];
    let tensors = tensors.map(|(name, tensor)| (format!("{PREFIX}.fc.{name}"), tensor));
    write_adapter(&folder.join("adapter"), &config, &tensors.into());
    let exact = Matrix::of(&weight);
    let rotated = exact.times(&rotation(&skews(&blocks), 1.0).transposed());
    (weight, exact, rotated.with_rows_scaled(&scale.numbers))
}

const MERGE: [&str; 5] = ["merge", "--base", "base", "--adapter", "adapter"];

#[test]
fn the_losses_are_those_of_a_dense_computation() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F64] {
        let folder = tempfile::tempdir().unwrap();
        let (weight, exact, merged) = wide(folder.path(), dtype);
        let base: Tensors = [("fc.weight".to_string(), weight)].into();
        let check = check(folder.path(), &MERGE, &base, &dtype.to_string());
        let layer = &check["layers"][0];
        // 2·66·6 numbers of the skew and 12 of the scale, of which two ranks of 12 + 264 take 552.
        assert_eq!(layer["lora_rank"], 2);
        let change = merged.plus(-1.0, &exact);
        assert_near(
            &layer["change"],
            change.norm() / exact.norm(),
            1e-5,
            "change",
        );
        let low = change.of_rank(2);
        assert!(low.norm() < 0.7 * change.norm(), "the rank matters");
        let lora = exact
            .plus(change.norm() / low.norm(), &low)
            .tensor()
            .cast(dtype);
        for (name, levels, group) in SCHEMES {
            let expected = loss(&lora.numbers, 264, levels, group);
            let merged = layer[name]["merged"].as_f64().unwrap();
            assert!(
                (expected / merged - 1.0).abs() > 2e-3,
                "{name}: {expected} {merged}"
            );
            let what = format!("{dtype} {name} of the LoRA");
            assert_near(&layer[name]["lora"], expected, 1e-4, &what);
        }
        // One layer is the whole model.
        let mut total = layer.clone();
        for key in ["tensor", "rows", "lora_rank"] {
            total.as_object_mut().unwrap().remove(key);
        }
        assert_eq!(check["total"], total);
    }
}

/// Linear layers, convolutions, embeddings, shared blocks, fused rows; OFT, BOFT, and LyCORIS, which rotates outputs.
#[test]
fn every_rotated_weight_is_rounded_as_it_is_written() {
    let mut count = 0;
    for case in Case::all().iter().filter(|case| case.changes()) {
        let folder = case.folder();
        let merge = [
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            case.adapter(),
        ];
        let dry = [&merge[..], &["--dry-run", "--json"]].concat();
        let dry: Value = serde_json::from_str(&succeed(folder.path(), &dry)).unwrap();
        if dry["rotated"] == 0 {
            continue;
        }
        let check = check(folder.path(), &merge, &case.base, &case.name);
        count += check["layers"].as_array().unwrap().len();
    }
    assert!(count > 100, "{count}");
    let fixtures = fixtures();
    for (base, adapter) in [
        ("lycoris/cases/boft-bounded-rescaled", "adapter.safetensors"),
        ("lycoris/cases/diag-oft-d3-conv-d4", "adapter.safetensors"),
        ("dinov2", "transformers-5"),
    ] {
        let case = fixtures.join(base);
        let folder = tempfile::tempdir().unwrap();
        let (path, adapter) = (case.join("base.safetensors"), case.join(adapter));
        let (path, adapter) = (path.to_str().unwrap(), adapter.to_str().unwrap());
        let mut merge = vec!["merge", "--base", path, "--adapter", adapter];
        if base == "dinov2" {
            merge.extend(["--map", "dinov2"]);
        }
        let check = check(folder.path(), &merge, &read(Path::new(path)), base);
        let layers = check["layers"].as_array().unwrap();
        let parts = layers.iter().filter(|layer| layer["rows"][0] != 0);
        assert_eq!(parts.count() > 0, base == "dinov2", "{base}");
    }
}

/// The adapters of one weight are one merge, and their numbers are those of one LoRA.
#[test]
fn several_adapters_are_checked_together_at_their_strength() {
    let folder = tempfile::tempdir().unwrap();
    let (weight, ..) = wide(folder.path(), Dtype::F32);
    let base: Tensors = [("fc.weight".to_string(), weight)].into();
    let half = [&MERGE[..], &["--strength", "0.5"]].concat();
    let half = check(folder.path(), &half, &base, "half");
    std::fs::remove_file(folder.path().join("plain")).unwrap();
    std::fs::remove_file(folder.path().join("checked")).unwrap();
    let twice = [&MERGE[..], &["--adapter", "adapter", "--factors", "1"]].concat();
    let twice = check(folder.path(), &twice, &base, "twice");
    let of = |check: &Value, what: &str| check["layers"][0][what].as_f64().unwrap();
    assert!(of(&half, "change") < of(&twice, "change"));
    assert_eq!(
        (of(&half, "lora_rank"), of(&twice, "lora_rank")),
        (2.0, 5.0)
    );
}

/// `[7, −2.25, 0.5, 1.5]` and a quarter of it, turned by a right angle, which moves the numbers to other places. Each change is a
/// multiple of the other, so that a LoRA of rank 1 does the same.
#[test]
fn the_table_says_what_is_computed_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let row = [7.0, -2.25, 0.5, 1.5];
    let numbers = [row, row.map(|x| 0.25 * x)].concat();
    let base = [
        (
            "layers.0.fc.weight".to_string(),
            Tensor::new(&[2, 4], numbers),
        ),
        ("head.weight".to_string(), Tensor::random(&[3, 4], 1)),
    ];
    write(&folder.path().join("base"), &base.into());
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 2, "use_cayley_neumann": false, "target_modules": ["fc"]
    });
    let blocks = Tensor::new(&[2, 1], vec![1.0, -1.0]);
    let tensors = [(format!("{PREFIX}.layers.0.fc.oft_R.weight"), blocks)];
    write_adapter(&folder.path().join("adapter"), &config, &tensors.into());
    let before = names(folder.path());
    let dry = [&MERGE[..], &["--quantize-check", "--dry-run"]].concat();
    let printed = succeed(folder.path(), &dry);
    assert_eq!(names(folder.path()), before);
    // A right angle changes a vector by √2. In four bits the row loses 0.25, 0.5 and 0.5 of its norm √56.5625; in eight bits, of
    // which one level is 7/127, it loses 0.00984, 0.00394 and 0.01181. Four inputs are one group.
    let expected = "\
layers.0.fc.weight  [2, 4] f32  base  rotate block size 2, 1 factor
1 layer to rotate

what rounding to the nearest would lose, in % of each weight
                                    8 bits                    4 bits                    4 bits, groups of 128
weight               change  rank      base  merged    LoRA      base  merged    LoRA      base  merged    LoRA
layers.0.fc.weight  141.421     1     0.211   0.211   0.211     9.972   9.972   9.972     9.972   9.972   9.972
all 1 weight        141.421           0.211   0.211   0.211     9.972   9.972   9.972     9.972   9.972   9.972
";
    assert_eq!(printed, expected);
    let written = [&MERGE[..], &["--quantize-check", "--output", "merged"]].concat();
    let printed = succeed(folder.path(), &written);
    let (_, table) = expected.split_once("\n\n").unwrap();
    assert_eq!(printed, format!("merged: 1 layer rotated\n\n{table}"));
}

#[test]
fn weights_that_would_not_be_finite_are_refused_before_anything_is_written() {
    let place = MergeFolder::new();
    let mut base = place.base.clone();
    let key = "fc1.weight";
    base.get_mut(key).unwrap().numbers[3] = f64::NAN;
    place.write_base(&base);
    let expected = format!(
        "base.safetensors: `{key}` would not be finite: it or the adapter holds NaN, infinity or numbers beyond its precision"
    );
    assert_eq!(place.refused_with(&["--quantize-check"]), expected);
    assert_eq!(
        place.refused_with(&["--quantize-check", "--dry-run"]),
        expected
    );
}

#[test]
fn an_adapter_that_rotates_nothing_has_nothing_to_round() {
    let folder = tempfile::tempdir().unwrap();
    let weight = Tensor::random(&[3, 4], 1);
    write(
        &folder.path().join("base"),
        &[("fc.weight".to_string(), weight)].into(),
    );
    let config = json!({"peft_type": "BOFT", "boft_block_size": 1, "target_modules": ["fc"]});
    let blocks = Tensor::random(&[1, 4, 1, 1], 2);
    let tensors = [
        ("boft_R", blocks),
        ("boft_s", Tensor::new(&[3, 1], vec![1.0; 3])),
    ];
    let tensors = tensors.map(|(name, tensor)| (format!("{PREFIX}.fc.{name}"), tensor));
    write_adapter(&folder.path().join("adapter"), &config, &tensors.into());
    let dry = [&MERGE[..], &["--quantize-check", "--dry-run"]].concat();
    let printed = succeed(folder.path(), &dry);
    assert!(
        printed.ends_with("\n\nno weight is rotated, so none is rounded\n"),
        "{printed}"
    );
    let json = [&dry[..], &["--json"]].concat();
    let json: Value = serde_json::from_str(&succeed(folder.path(), &json)).unwrap();
    assert_eq!(json["quantize_check"]["layers"], json!([]));
    assert_eq!(json["quantize_check"]["total"]["int8"]["merged"], 0.0);
}
