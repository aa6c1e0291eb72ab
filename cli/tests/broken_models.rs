//! Model files and folders that cannot be read: refused in one line that names the file and the tensor.

use std::fs;

use serde_json::json;

use crate::files::*;

#[test]
fn a_model_file_that_is_cut_off_or_hostile_is_refused() {
    let place = MergeFolder::new();
    let base = place.path().join("base.safetensors");
    let bytes = fs::read(&base).unwrap();
    fs::write(&base, &bytes[..bytes.len() - 1]).unwrap();
    let line = place.refused();
    let (file, reason) = line.split_once(": `").unwrap();
    assert_eq!(file, "base.safetensors");
    let expected = format!(
        "ends beyond the file, which has {} bytes; it is cut off",
        bytes.len() - 1
    );
    assert!(reason.ends_with(&expected), "{line}");
    fs::write(&base, &bytes[..4]).unwrap();
    assert_eq!(
        place.refused(),
        "base.safetensors: not a safetensors file: it has 4 bytes, fewer than the 8 that say how long its header is"
    );
    place.write_bytes(u64::MAX, b"{}");
    assert_eq!(
        place.refused(),
        "base.safetensors: not a safetensors file: it announces a header of 18446744073709551615 bytes, and the whole file has 10"
    );
    place.write_bytes(1 << 40, b"{}");
    assert_eq!(
        place.refused(),
        "base.safetensors: not a safetensors file: it announces a header of 1099511627776 bytes, and the whole file has 10"
    );
    for (start, what) in [
        (&b"GGUF\x03\0\0\0\0"[..], "of GGUF"),
        (
            b"PK\x03\x04\0\0\x08\x08",
            "an archive, as PyTorch's pickles are",
        ),
        (b"\x89HDF\r\n\x1a\n", "of HDF5, as Keras writes it"),
    ] {
        fs::write(&base, start).unwrap();
        assert_eq!(
            place.refused(),
            format!(
                "base.safetensors: not a safetensors file: it is {what}; save the model as safetensors first"
            )
        );
    }
    place.write_bytes(2, b"{]");
    assert!(
        place.refused().starts_with(
            "base.safetensors: not a safetensors file: its header is not a JSON object: "
        ),
        "{}",
        place.refused()
    );
    for (entry, expected) in [
        (
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#,
            "`fc1.weight` ends beyond the file, which has 85 bytes; it is cut off",
        ),
        (
            r#"{"dtype":"F32","shape":[2,2],"data_offsets":[0,8]}"#,
            "`fc1.weight` is [2, 2] of f32, 16 bytes, and has the offsets 0 to 8",
        ),
    ] {
        let header = format!("{{\"fc1.weight\":{entry}}}");
        place.write_bytes(header.len() as u64, &[header.as_bytes(), &[0; 8]].concat());
        let line = place.refused();
        let length = 8 + header.len() + 8;
        assert_eq!(
            line,
            format!(
                "base.safetensors: {}",
                expected.replace("85", &length.to_string())
            )
        );
    }
}

#[test]
fn an_index_that_contradicts_its_shards_is_refused() {
    let place = MergeFolder::new();
    let base = place.path().join("model");
    let middle = place.base.keys().nth(4).unwrap().clone();
    let mut first = place.base.clone();
    let second = first.split_off(&middle);
    write_shards(&base, &[first, second]);
    let path = base.join("model.safetensors.index.json");
    let index = read_json(&path);
    let merge = || {
        let line = refused(place.path(), &merge_command("model", "adapter", "out"));
        assert_eq!(
            names(place.path()),
            ["adapter", "base.safetensors", "model"]
        );
        line
    };
    let (one, two) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    for (name, expected) in [
        (
            "../base.safetensors",
            "`fc1.weight` is in \"../base.safetensors\", which is not the name of a file beside it",
        ),
        (
            "/etc/passwd",
            "`fc1.weight` is in \"/etc/passwd\", which is not the name of a file beside it",
        ),
        (
            "..",
            "`fc1.weight` is in \"..\", which is not the name of a file beside it",
        ),
    ] {
        let mut lie = index.clone();
        lie["weight_map"]["fc1.weight"] = json!(name);
        write_json(&path, &lie);
        assert_eq!(
            merge(),
            format!("model/model.safetensors.index.json: {expected}")
        );
    }
    let mut lie = index.clone();
    lie["weight_map"]["other"] = json!(two);
    write_json(&path, &lie);
    assert_eq!(
        merge(),
        format!("model/{two}: `other` is not there, and `model.safetensors.index.json` says it is")
    );
    let mut lie = index.clone();
    lie["weight_map"]["other"] = json!("model-3.safetensors");
    write_json(&path, &lie);
    assert_eq!(
        merge(),
        "model/model-3.safetensors cannot be read: No such file or directory (os error 2)"
    );
    write_json(&path, &json!({"weight_map": 1}));
    assert_eq!(
        merge(),
        "model/model.safetensors.index.json: it has no object `weight_map`"
    );
    fs::remove_file(&path).unwrap();
    assert_eq!(
        merge(),
        format!(
            "model: the folder has `{one}`, `{two}` and not a single index; name the file to use"
        )
    );
    write_json(&path, &index);
    write(&base.join("model.safetensors"), &place.base);
    assert_eq!(
        merge(),
        "model: `model.safetensors` is not in `model.safetensors.index.json`, and may be the same model; keep one of them"
    );
    fs::rename(base.join("model.safetensors"), base.join(two)).unwrap();
    assert!(
        merge().ends_with(&format!("is in `{one}` too")),
        "{}",
        merge()
    );
}
