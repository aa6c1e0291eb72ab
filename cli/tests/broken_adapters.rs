//! Adapter folders that cannot be read: refused in one line that names the file.

use std::fs;

use serde_json::{Value, json};

use crate::files::*;

#[test]
fn a_file_that_is_not_there_is_named() {
    let place = MergeFolder::new();
    let merge =
        |base: &str, adapter: &str| refused(place.path(), &merge_command(base, adapter, "out"));
    assert_eq!(
        merge("none", "adapter"),
        "none cannot be read: No such file or directory (os error 2)"
    );
    assert_eq!(
        merge("base.safetensors", "none"),
        "none/adapter_config.json cannot be read: No such file or directory (os error 2)"
    );
    fs::create_dir(place.path().join("empty")).unwrap();
    assert_eq!(
        merge("empty", "adapter"),
        "empty: the folder has no safetensors file; pickles run code, so save the model as safetensors first"
    );
    assert_eq!(
        merge("adapter", "adapter"),
        "adapter: the folder has `adapter_config.json` of an adapter and no model"
    );
    fs::remove_file(place.path().join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(
        merge("base.safetensors", "adapter"),
        "adapter/adapter_model.safetensors cannot be read: No such file or directory (os error 2)"
    );
    fs::write(place.path().join("adapter/adapter_model.bin"), "pickle").unwrap();
    assert_eq!(
        merge("base.safetensors", "adapter"),
        "adapter has adapter_model.bin and no adapter_model.safetensors; pickles run code, so load it in PEFT and save \
         it there as safetensors"
    );
}

#[test]
fn settings_that_cannot_be_understood_are_refused() {
    let place = MergeFolder::new();
    let config = place.path().join("adapter/adapter_config.json");
    fs::write(&config, "peft").unwrap();
    assert!(
        place
            .refused()
            .starts_with("adapter/adapter_config.json is not a JSON object: "),
        "{}",
        place.refused()
    );
    fs::write(&config, "[]").unwrap();
    assert!(
        place
            .refused()
            .starts_with("adapter/adapter_config.json is not a JSON object"),
        "{}",
        place.refused()
    );
    for (field, value, expected) in [
        (
            "peft_type",
            json!("LORA"),
            "`peft_type` is LORA, and only BOFT and OFT are supported",
        ),
        (
            "peft_type",
            Value::Null,
            "`peft_type` is missing; PEFT writes \"BOFT\" or \"OFT\" there",
        ),
        (
            "boft_block_size",
            json!("4"),
            "`boft_block_size` is \"4\", not a whole number, 0 or more",
        ),
    ] {
        let mut json = place.config.clone();
        json[field] = value;
        write_json(&config, &json);
        assert_eq!(
            place.refused(),
            format!("adapter/adapter_config.json: {expected}")
        );
    }
}

#[test]
fn an_adapter_that_lacks_tensors_or_holds_others_is_refused() {
    let place = MergeFolder::new();
    let file = "adapter/adapter_model.safetensors";
    let mut tensors = place.tensors.clone();
    tensors.insert(
        "base_model.model.fc1.lora_A.weight".into(),
        Tensor::random(&[2, 2], 1),
    );
    place.write_adapter(&place.config, &tensors);
    assert_eq!(
        place.refused(),
        format!(
            "{file}: tensors that belong nowhere, which --allow-unexpected leaves out: unexpected: \
             `base_model.model.fc1.lora_A.weight`: neither an adapter, nor a trained bias, nor part of a module to save"
        )
    );
    let mut tensors = place.tensors.clone();
    tensors.remove("base_model.model.fc1.boft_R");
    place.write_adapter(&place.config, &tensors);
    assert_eq!(
        place.refused(),
        format!("{file}: missing: `base_model.model.fc1.boft_R`")
    );
    fs::write(place.path().join(file), "x").unwrap();
    assert!(
        place
            .refused()
            .starts_with(&format!("{file} is not a safetensors file: ")),
        "{}",
        place.refused()
    );
}

/// PEFT 0.20 and older trained and saved every parameter whose name contains `boft_`.
#[test]
fn weights_that_leaked_into_an_adapter_are_left_out_where_that_is_allowed() {
    let place = MergeFolder::new();
    let folder = place.path();
    let mut base = place.base.clone();
    base.insert("my_boft_gate.weight".into(), Tensor::random(&[3, 2], 1));
    place.write_base(&base);
    let expected = merged(folder, "adapter");
    let gate = "base_model.model.my_boft_gate.weight";
    let mut tensors = place.tensors.clone();
    tensors.insert(gate.into(), Tensor::random(&[3, 2], 2));
    write_adapter(&folder.join("kept"), &place.config, &tensors);
    tensors.insert(
        "base_model.model.fc1.base_layer.weight".into(),
        Tensor::random(&[20, 24], 3),
    );
    write_adapter(&folder.join("leaky"), &place.config, &tensors);
    let lines = [
        "`base_model.model.fc1.base_layer.weight`: a base weight; only adapters and biases are read",
        "`base_model.model.my_boft_gate.weight`: neither an adapter, nor a trained bias, nor part of a module to save",
    ];
    let refusal = format!(
        "leaky/adapter_model.safetensors: tensors that belong nowhere, which --allow-unexpected leaves out: unexpected: {}; \
         unexpected: {}",
        lines[0], lines[1]
    );
    let warnings = format!(
        "warning: left out: {}\nwarning: left out: {}\nwarning: PEFT 0.20 and older may have trained what is left out; to keep \
         the weights of a module, name it in modules_to_save of adapter_config.json\n",
        lines[0], lines[1]
    );
    for arguments in [
        &merge_command("base.safetensors", "leaky", "out.safetensors")[..],
        &[
            "unmerge",
            "--merged",
            "out.safetensors",
            "--adapter",
            "leaky",
            "--output",
            "restored.safetensors",
        ],
        &["inspect", "leaky"],
        &convert_command("leaky", "peft", "clean"),
    ] {
        assert_eq!(refused(folder, arguments), refusal);
        let run = run(folder, &[arguments, &["--allow-unexpected"]].concat());
        assert_eq!(
            (run.code, run.stderr.as_str()),
            (0, warnings.as_str()),
            "{arguments:?}"
        );
    }
    assert_eq!(read(&folder.join("out.safetensors")), expected);
    let clean = read(&folder.join("clean/adapter_model.safetensors"));
    assert!(clean.keys().eq(place.tensors.keys()));
    let diff = ["diff", "adapter", "leaky"];
    assert_eq!(refused(folder, &diff), refusal);
    succeed(folder, &[&diff[..], &["--allow-unexpected"]].concat());
    let models = [
        "diff",
        "base.safetensors",
        "out.safetensors",
        "--allow-unexpected",
    ];
    assert_eq!(
        refused(folder, &models),
        "--allow-unexpected is for adapters; the tensors of two models are compared under their names"
    );

    // As the warning says, a module that the settings save is kept.
    let mut config = place.config.clone();
    config["modules_to_save"] = json!(["my_boft_gate"]);
    write_json(&folder.join("kept/adapter_config.json"), &config);
    let kept = merged(folder, "kept");
    assert_eq!(kept["my_boft_gate.weight"], tensors[gate]);

    // What is missing is an error all the same.
    tensors.remove("base_model.model.fc1.boft_s");
    write_adapter(&folder.join("leaky"), &place.config, &tensors);
    assert_eq!(
        refused(folder, &["inspect", "leaky", "--allow-unexpected"]),
        "leaky/adapter_model.safetensors: missing: `base_model.model.fc1.boft_s`"
    );
}

#[test]
fn an_adapter_file_that_is_cut_off_or_hostile_is_refused() {
    let place = MergeFolder::new();
    let file = "adapter/adapter_model.safetensors";
    let good = fs::read(place.path().join(file)).unwrap();
    let with = |length: u64, header: &[u8], data: usize| {
        [&length.to_le_bytes(), header, &vec![0; data][..]].concat()
    };
    let header = |entries: &str, data: usize| with(entries.len() as u64, entries.as_bytes(), data);
    let key = "base_model.model.fc1.boft_R";
    let entry = |offsets: [u64; 2]| {
        json!({"dtype": "F32", "shape": [4], "data_offsets": offsets}).to_string()
    };
    for (what, bytes) in [
        ("no bytes", Vec::new()),
        ("no header", good[..5].to_vec()),
        ("half a header", good[..40].to_vec()),
        ("a number less", good[..good.len() - 4].to_vec()),
        ("a number more", [&good[..], &[0; 4]].concat()),
        ("a header beyond the file", with(1 << 20, b"{}", 0)),
        ("a header beyond memory", with(u64::MAX, b"{}", 0)),
        ("no JSON", header("{]", 0)),
        ("no UTF-8", with(6, b"{\"\xff\":1}", 0)),
        (
            "an entry of no size",
            header(&format!("{{\"{key}\":1}}"), 16),
        ),
        (
            "numbers beyond the file",
            header(&format!("{{\"{key}\":{}}}", entry([0, 16])), 8),
        ),
        (
            "offsets that overlap",
            header(
                &format!("{{\"{key}\":{},\"b\":{}}}", entry([0, 16]), entry([8, 24])),
                24,
            ),
        ),
        (
            "offsets that run backwards",
            header(&format!("{{\"{key}\":{}}}", entry([16, 0])), 16),
        ),
        (
            "axes beyond all counts",
            header(
                &format!(
                    "{{\"{key}\":{{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,16]}}}}"
                ),
                16,
            ),
        ),
    ] {
        fs::write(place.path().join(file), bytes).unwrap();
        let inspect = refused(place.path(), &["inspect", "adapter"]);
        let convert = convert_command("adapter", "peft", "out");
        let convert = refused(place.path(), &convert);
        for line in [place.refused(), inspect, convert] {
            let start = format!("{file} is not a safetensors file: ");
            assert!(line.starts_with(&start), "{what}: {line}");
        }
    }
    assert_eq!(names(place.path()), ["adapter", "base.safetensors"]);
}
