//! Loading folders with missing, broken or odd content.

use std::fs;

use burn_boft::{Adapter, BoftLinear};
use serde_json::{Value, json};

use super::support::*;
use crate::common::models::set;

#[test]
fn loading_names_the_file_that_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let not_found = "No such file or directory (os error 2)";
    assert_eq!(
        refusal(folder.path()),
        format!("…/{CONFIG} cannot be read: {not_found}")
    );
    fs::write(folder.path().join(CONFIG), boft_json(json!({})).to_string()).unwrap();
    assert_eq!(
        refusal(folder.path()),
        format!("…/{TENSORS} cannot be read: {not_found}")
    );
    fs::write(folder.path().join("adapter_model.bin"), "pickle").unwrap();
    assert_eq!(
        refusal(folder.path()),
        "… has adapter_model.bin and no adapter_model.safetensors; pickles run code, so load it in PEFT and save it \
         there as safetensors"
    );
    // It is there, and cannot be opened.
    #[cfg(target_os = "linux")]
    {
        std::os::unix::fs::symlink(TENSORS, folder.path().join(TENSORS)).unwrap();
        assert_eq!(
            refusal(folder.path()),
            format!("…/{TENSORS} cannot be read: Too many levels of symbolic links (os error 40)")
        );
    }
}

#[test]
fn loading_refuses_a_broken_adapter_config() {
    let folder = write(&boft_json(json!({})), &hidden());
    let refused = |text: &str| {
        fs::write(folder.path().join(CONFIG), text).unwrap();
        refusal(folder.path())
    };
    assert_eq!(
        refused("{\"peft_type\": "),
        format!("…/{CONFIG} is not a JSON object: EOF while parsing a value at line 1 column 14")
    );
    assert_eq!(
        refused("[1]"),
        format!(
            "…/{CONFIG} is not a JSON object: invalid type: sequence, expected a map at line 1 column 0"
        )
    );
    assert_eq!(
        refused(r#"{"peft_type": "LORA"}"#),
        format!("…/{CONFIG}: `peft_type` is LORA, and only BOFT and OFT are supported")
    );
    assert!(refused("\u{feff}{}").contains("is not a JSON object"));
    assert!(refused("").contains("is not a JSON object"));
}

/// A safetensors file with any header.
fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    bytes
}

#[test]
fn loading_refuses_broken_safetensors_files() {
    let folder = write(&boft_json(json!({})), &hidden());
    let good = fs::read(folder.path().join(TENSORS)).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(folder.path().join(TENSORS), bytes).unwrap();
        refusal(folder.path())
    };
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let huge = u64::MAX;
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("", Vec::new()),
        ("three bytes", vec![1, 2, 3]),
        (
            "a header beyond the file",
            1_000_000u64.to_le_bytes().to_vec(),
        ),
        ("a header of all there is", huge.to_le_bytes().to_vec()),
        ("no JSON", safetensors_file("nonsense", 0)),
        (
            "no UTF-8",
            [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(),
        ),
        ("cut", good[..good.len() - 1].to_vec()),
        ("too long", [&good[..], &[0]].concat()),
        (
            "an overflow",
            safetensors_file(&entry(&format!("[{huge},{huge}]"), "[0,4]"), 4),
        ),
        (
            "a wrong length",
            safetensors_file(&entry("[3]", "[0,4]"), 4),
        ),
        (
            "offsets backwards",
            safetensors_file(&entry("[1]", "[4,0]"), 4),
        ),
        (
            "offsets outside",
            safetensors_file(&entry("[1]", "[0,400]"), 4),
        ),
        (
            "a negative shape",
            safetensors_file(&entry("[-1]", "[0,4]"), 4),
        ),
        (
            "an unknown precision",
            safetensors_file(&entry("[1]", "[0,4]").replace("F32", "F7"), 4),
        ),
        ("deep nesting", safetensors_file(&"[".repeat(100_000), 0)),
    ];
    for (what, bytes) in files {
        let error = refused(&bytes);
        let start = format!("…/{TENSORS} is not a safetensors file: ");
        assert!(error.starts_with(&start), "{what}: {error}");
        assert!(
            error.len() < 400 && !error.contains('\n'),
            "{what}: {error}"
        );
    }
    // Any prefix of a file is an error; a changed byte of its header may be one, but never panics.
    for end in 0..good.len().min(400) {
        assert!(refused(&good[..end]).contains("is not a safetensors file"));
    }
    for position in 0..200 {
        let mut bytes = good.clone();
        bytes[position] ^= 0x15;
        fs::write(folder.path().join(TENSORS), bytes).unwrap();
        _ = Adapter::load(folder.path());
    }
}

#[test]
fn loading_refuses_tensors_of_impossible_shapes() {
    let boft = |tensors: &[(&str, Vec<usize>)]| amiss(write(&boft_json(json!({})), tensors).path());
    for (shape, why) in [
        (
            vec![6, 4, 4],
            "factors, blocks, rows and columns are four axes",
        ),
        (vec![1, 6, 4, 3], "factors and blocks of squares expected"),
        (vec![0, 6, 4, 4], "factors and blocks of squares expected"),
        (vec![1, 0, 4, 4], "factors and blocks of squares expected"),
        (vec![1, 6, 0, 0], "factors and blocks of squares expected"),
        (
            vec![3, 6, 4, 4],
            "3 factors of block size 4 and 6 blocks do not fit",
        ),
        (
            vec![2, 6, 3, 3],
            "2 factors of block size 3 and 6 blocks do not fit",
        ),
    ] {
        let expected = format!("wrong: `base_model.model.hidden.boft_R` is {shape:?}: {why}");
        let error = boft(&[("hidden.boft_R", shape), ("hidden.boft_s", vec![16, 1])]);
        assert_eq!(error, expected);
    }
    for shape in [vec![16], vec![4, 4], vec![0, 1], vec![16, 1, 1], vec![]] {
        let expected = format!(
            "wrong: `base_model.model.hidden.boft_s` is {shape:?}: (outputs, 1) or (1, outputs) expected"
        );
        let error = boft(&[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", shape),
        ]);
        assert_eq!(error, expected);
    }
    assert_eq!(
        boft(&[("hidden.oft_R.weight", vec![6, 6])]),
        "unexpected: `base_model.model.hidden.oft_R.weight`: an OFT tensor in a BOFT adapter"
    );
    assert_eq!(boft(&[]), "missing: the file holds no `boft_R` at all");

    let oft = |fields: Value, tensors: &[(&str, Vec<usize>)]| {
        let mut json = json!({"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.21.2"});
        let object = json.as_object_mut().unwrap();
        object.extend(fields.as_object().unwrap().clone());
        amiss(write(&json, tensors).path())
    };
    let packed = |shape: &[usize], why: &str| {
        format!("wrong: `base_model.model.hidden.oft_R.weight` is {shape:?}: {why}")
    };
    let one = |shape: &[usize]| oft(json!({}), &[("hidden.oft_R.weight", shape.to_vec())]);
    assert_eq!(
        one(&[6, 5]),
        packed(&[6, 5], "no block has 5 numbers, b(b−1)/2")
    );
    assert_eq!(
        one(&[6]),
        packed(&[6], "blocks and packed numbers are two axes")
    );
    assert_eq!(one(&[0, 6]), packed(&[0, 6], "blocks expected, 0 found"));
    assert_eq!(
        oft(
            json!({"block_share": true}),
            &[("hidden.oft_R.weight", vec![2, 6])]
        ),
        packed(&[2, 6], "one block expected, 2 found")
    );
    assert_eq!(
        oft(json!({}), &[("hidden.oft_r", vec![6, 4, 4])]),
        "wrong: `base_model.model.hidden.oft_r` without `oft_s`: PEFT 0.13 or older wrote it, whose rotation is another; \
         merge it with that version, or train it anew"
    );
    assert_eq!(
        oft(
            json!({}),
            &[
                ("hidden.oft_r", vec![6, 4, 3]),
                ("hidden.oft_s", vec![16, 1])
            ]
        ),
        "wrong: `base_model.model.hidden.oft_r` is [6, 4, 3]: blocks must be squares"
    );
    assert_eq!(
        oft(
            json!({"coft": true, "block_share": true}),
            &[
                ("hidden.oft_r", vec![1, 4, 4]),
                ("hidden.oft_s", vec![16, 1])
            ]
        ),
        "wrong: `base_model.model.hidden.oft_r` is [1, 4, 4]: the radius of a shared block depends on the number of \
         blocks, which the file does not hold"
    );
    let mixed = [
        ("hidden.oft_R.weight", vec![6, 6]),
        ("output.oft_r", vec![4, 4, 4]),
        ("output.oft_s", vec![12, 1]),
    ];
    assert_eq!(
        oft(json!({}), &mixed),
        "wrong: `base_model.model.hidden.oft_R.weight` beside layers of PEFT 0.14 to 0.15.2"
    );
}

#[test]
fn keys_are_split_at_dots_and_not_searched_for_substrings() {
    // `soft_gate` contains `oft_`, and a layer may have the name of an adapter tensor.
    let folder = write(
        &boft_json(
            json!({"target_modules": ["soft_gate.boft_s", "hidden"], "modules_to_save": ["gate"]}),
        ),
        &[
            ("soft_gate.boft_s.boft_R", vec![1, 6, 4, 4]),
            ("soft_gate.boft_s.boft_s", vec![16, 1]),
            ("gate.weight", vec![3, 2]),
            ("soft_gate.weight", vec![3, 2]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.layers()[0].path(), "soft_gate.boft_s");
    let modules: Vec<_> = adapter.tensors().iter().map(|t| t.module()).collect();
    // PEFT saves every module whose path ends with an entry.
    assert_eq!(modules, ["gate", "soft_gate"]);
    assert_eq!(report.applied.len(), 4);
    let names = &adapter.config().selection().modules_to_save;
    assert_eq!(names, &["gate", "soft_gate"]);
}

#[test]
fn loading_warns_of_nan_in_an_adapter() {
    let model = set(
        adapted::<BoftLinear>(boft()),
        "hidden.weight.boft.scale",
        |mut values| {
            values[3] = f64::NAN;
            values
        },
    );
    let folder = saved(&Adapter::extract_as(&model, boft()).unwrap());
    let (_, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["the adapter of `hidden` holds NaN or infinity"]
    );
}

#[test]
fn attaching_reports_why_a_target_pattern_is_invalid() {
    let folder = write(
        &boft_json(json!({"target_modules": "hidden|(out"})),
        &hidden(),
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "target_modules: the pattern `hidden|(out` cannot be used: Parsing error at position 11: Opening parenthesis \
         without closing parenthesis"
    );
    let folder = write(
        &boft_json(json!({"target_modules": r"(?!head)\w*dden"})),
        &hidden(),
    );
    Adapter::load(folder.path())
        .unwrap()
        .0
        .attach(base::<BoftLinear>())
        .unwrap();
}
