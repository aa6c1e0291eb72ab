//! Everything that is refused: with its line, the exit code 2, and nothing left behind.

use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::files::*;

/// A folder with `base.safetensors` and `adapter`, which fit.
struct Place {
    folder: tempfile::TempDir,
    config: Value,
    tensors: Tensors,
    base: Tensors,
}

impl Place {
    fn new() -> Self {
        let case = Case::open("cases/boft-mlp-bias-none");
        let place = Self {
            folder: case.folder(),
            config: read_json(&case.adapter.join("adapter_config.json")),
            tensors: read(&case.adapter.join("adapter_model.safetensors")),
            base: case.base,
        };
        write_adapter(&place.path().join("adapter"), &place.config, &place.tensors);
        place
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The line that merging `adapter` into `base.safetensors` is refused with.
    fn refused(&self) -> String {
        self.refused_with(&[])
    }

    fn refused_with(&self, more: &[&str]) -> String {
        let before = names(self.path());
        let mut arguments = vec!["merge", "--adapter", "adapter"];
        arguments.extend(more);
        if !more.contains(&"--base") {
            arguments.extend(["--base", "base.safetensors"]);
        }
        if !more.contains(&"--output") {
            arguments.extend(["--output", "out.safetensors"]);
        }
        let line = refused(self.path(), &arguments);
        assert_eq!(names(self.path()), before, "nothing is left behind");
        line
    }

    fn write_base(&self, tensors: &Tensors) {
        write(&self.path().join("base.safetensors"), tensors);
    }

    fn write_adapter(&self, config: &Value, tensors: &Tensors) {
        write_adapter(&self.path().join("adapter"), config, tensors);
    }

    /// Writes a base of these bytes.
    fn write_bytes(&self, header_length: u64, rest: &[u8]) {
        let mut bytes = header_length.to_le_bytes().to_vec();
        bytes.extend(rest);
        fs::write(self.path().join("base.safetensors"), bytes).unwrap();
    }
}

#[test]
fn files_that_are_not_there() {
    let place = Place::new();
    let merge = |base: &str, adapter: &str| {
        refused(
            place.path(),
            &[
                "merge",
                "--base",
                base,
                "--adapter",
                adapter,
                "--output",
                "out",
            ],
        )
    };
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
        "empty: no safetensors file in this folder; pickles run code, so save the model as safetensors first"
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
fn settings_that_are_none() {
    let place = Place::new();
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
fn adapters_with_tensors_that_have_no_place() {
    let place = Place::new();
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
            "{file}: unexpected: `base_model.model.fc1.lora_A.weight`: neither an adapter, nor a trained bias, nor part \
             of a module to save"
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

#[test]
fn bases_that_are_cut_off_or_hostile() {
    let place = Place::new();
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
        "base.safetensors: not a safetensors file: a header of 18446744073709551615 bytes in a file of 10"
    );
    place.write_bytes(1 << 40, b"{}");
    assert_eq!(
        place.refused(),
        "base.safetensors: not a safetensors file: a header of 1099511627776 bytes in a file of 10"
    );
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
            "`fc1.weight` is [2, 2] of F32, 16 bytes, and has the offsets 0 to 8",
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
fn adapters_that_are_cut_off_or_hostile() {
    let place = Place::new();
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
        let convert = ["convert", "adapter", "--to", "peft", "--output", "out"];
        let convert = refused(place.path(), &convert);
        for line in [place.refused(), inspect, convert] {
            let start = format!("{file} is not a safetensors file: ");
            assert!(line.starts_with(&start), "{what}: {line}");
        }
    }
    assert_eq!(names(place.path()), ["adapter", "base.safetensors"]);
}

#[test]
fn bases_without_the_layer_or_with_another() {
    let place = Place::new();
    let rename = |from: &str, to: &str| -> Tensors {
        let tensors = place.base.iter();
        tensors
            .map(|(key, tensor)| (key.replace(from, to), tensor.clone()))
            .collect()
    };
    place.write_base(&rename("fc1.", "fc_1."));
    assert_eq!(
        place.refused(),
        "base.safetensors: the adapter of `fc1` has no `fc1.weight`; it has `fc_1.weight`, `fc2.weight`, `norm.weight`; \
         --map bridges names"
    );
    place.write_base(&place.base);
    assert_eq!(
        place.refused_with(&["--map", "fc1=fc2"]),
        "base.safetensors: `fc2.weight` is [16, 20] F32, and the adapter of `fc1` rotates 24 input features"
    );
    let with = |tensor: Tensor| {
        let mut base = place.base.clone();
        base.insert("fc1.weight".into(), tensor);
        place.write_base(&base);
        place.refused()
    };
    let of = "and the adapter of `fc1`";
    assert_eq!(
        with(Tensor::random(&[21, 24], 1)),
        format!("base.safetensors: `fc1.weight` is [21, 24] F32, {of} scales 20 outputs")
    );
    assert_eq!(
        with(Tensor::random(&[20, 6, 2, 2], 1)),
        format!("base.safetensors: `fc1.weight` is [20, 6, 2, 2] F32, {of} is for a linear layer")
    );
    assert_eq!(
        with(Tensor::random(&[480], 1)),
        format!(
            "base.safetensors: `fc1.weight` is [480] F32, {of} is for a matrix or a convolution's four axes"
        )
    );
    assert_eq!(
        with(Tensor {
            dtype: Dtype::U8,
            ..Tensor::new(&[20, 24], vec![1.0; 480])
        }),
        format!(
            "base.safetensors: `fc1.weight` is [20, 24] U8, {of} rotates F32, F16 and BF16; merge into the model before it \
             is quantized"
        )
    );
    assert_eq!(
        with(Tensor::random(&[20, 24], 1).cast(Dtype::F64)),
        format!(
            "base.safetensors: `fc1.weight` is [20, 24] F64, {of} is less precise; save both in the same precision"
        )
    );
    place.write_base(&place.base);
    assert_eq!(
        place.refused_with(&["--map", "fc.=fc2"]),
        "base.safetensors: `fc2.weight` is [16, 20] F32, and the adapter of `fc1` rotates 24 input features"
    );
}

/// Suggestions are looked for as often as they are shown, not for every layer: that took minutes here.
#[test]
fn a_wrong_prefix_in_a_large_model_is_told_at_once() {
    const LAYERS: usize = 5000;
    let folder = tempfile::tempdir().unwrap();
    let name = |layer: usize| format!("layers.{layer}.self_attn.q_proj");
    let base = (0..LAYERS).map(|layer| {
        let key = format!("model.{}.weight", name(layer));
        (key, Tensor::new(&[1, 2], vec![1.0, 2.0]))
    });
    write(&folder.path().join("base.safetensors"), &base.collect());
    let config = json!({"peft_type": "OFT", "oft_block_size": 2, "target_modules": ["q_proj"], "peft_version": "0.21.2"});
    let adapter = (0..LAYERS).map(|layer| {
        let key = format!("base_model.model.{}.oft_R.weight", name(layer));
        (key, Tensor::new(&[1, 1], vec![0.5]))
    });
    write_adapter(&folder.path().join("adapter"), &config, &adapter.collect());
    let start = std::time::Instant::now();
    let line = refused(
        folder.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter",
            "--dry-run",
        ],
    );
    let first = "base.safetensors: the adapter of `layers.0.self_attn.q_proj` has no `layers.0.self_attn.q_proj.weight`; \
                 it has `model.layers.0.self_attn.q_proj.weight`, ";
    assert!(line.starts_with(first), "{line}");
    assert!(line.ends_with("; and 4997 more"), "{line}");
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn trained_biases_without_a_place() {
    let case = Case::open("cases/boft-mlp-bias-only");
    let folder = case.folder();
    let merge = |base: Tensors| {
        write(&folder.path().join("base.safetensors"), &base);
        refused(
            folder.path(),
            &[
                "merge",
                "--base",
                "base.safetensors",
                "--adapter",
                case.adapter(),
                "--output",
                "out",
            ],
        )
    };
    let mut base = case.base.clone();
    base.remove("fc1.bias");
    assert_eq!(
        merge(base),
        "base.safetensors: the adapter's `fc1.bias` has no `fc1.bias`; it has `fc2.bias`, `norm.bias`, \
         `classifier.bias`; --map bridges names"
    );
    let mut base = case.base.clone();
    base.insert("fc1.bias".into(), Tensor::random(&[7], 1));
    assert_eq!(
        merge(base),
        "base.safetensors: `fc1.bias` is [7] F32, and the adapter's `fc1.bias` is [20] F32"
    );
}

#[test]
fn saved_modules_without_a_place_of_their_own() {
    let case = Case::open("cases/boft-mlp-saved-classifier");
    let folder = case.folder();
    let merge = |base: &Tensors, adapter: &str, rules: &[&str]| {
        write(&folder.path().join("base.safetensors"), base);
        let arguments = [
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            adapter,
            "--output",
            "out",
        ];
        refused(folder.path(), &[&arguments, rules].concat())
    };

    // Two new heads under one name.
    let prefix = "base_model.model";
    let mut tensors = read(&case.adapter.join("adapter_model.safetensors"));
    for name in ["weight", "bias"] {
        let classifier = tensors[&format!("{prefix}.classifier.{name}")].clone();
        tensors.insert(format!("{prefix}.score.{name}"), classifier);
    }
    let mut config = read_json(&case.adapter.join("adapter_config.json"));
    config["modules_to_save"] = json!(["classifier", "score"]);
    write_adapter(&folder.path().join("two"), &config, &tensors);
    let mut headless = case.base.clone();
    headless.retain(|key, _| !key.starts_with("classifier."));
    assert_eq!(
        merge(&headless, "two", &["--map", "classifier|score=head"]),
        "base.safetensors: two parts of the adapter change `head.bias`; base.safetensors: two parts of the adapter \
         change `head.weight`"
    );

    // A head that the model has under a longer name.
    let longer = case.base.iter();
    let longer = longer.map(|(key, tensor)| (format!("model.{key}"), tensor.clone()));
    assert_eq!(
        merge(
            &longer.collect(),
            case.adapter(),
            &["--map", "^fc=model.fc"]
        ),
        "base.safetensors: the adapter's `classifier.bias` has no `classifier.bias`; it has `model.classifier.bias`, \
         `model.fc1.bias`, `model.fc2.bias`; --map bridges names; base.safetensors: the adapter's `classifier.weight` \
         has no `classifier.weight`; it has `model.classifier.weight`, `model.fc1.weight`, `model.fc2.weight`; --map \
         bridges names"
    );

    // A module of a layer that has another name in the file, as transformers 5 renamed Mixtral's router.
    let router = [("model.layers.0.mlp.gate.weight", Tensor::random(&[4, 8], 3))];
    let layer = "model.layers.0.self_attn.q_proj";
    let key = |key: &str| format!("base_model.model.{key}");
    let mut tensors: Tensors = router.map(|(name, tensor)| (key(name), tensor)).into();
    tensors.insert(
        key(&format!("{layer}.oft_R.weight")),
        Tensor::random(&[2, 6], 1),
    );
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["q_proj"],
        "modules_to_save": ["mlp.gate"]
    });
    write_adapter(&folder.path().join("mixtral"), &config, &tensors);
    let old = |key: &str| key.replace("model.", "");
    let mixtral = [
        (format!("{layer}.weight"), Tensor::random(&[8, 8], 1)),
        (
            "model.layers.0.block_sparse_moe.gate.weight".to_string(),
            Tensor::random(&[4, 8], 2),
        ),
    ];
    let mixtral: Tensors = mixtral.into();
    assert_eq!(
        merge(&mixtral, "mixtral", &[]),
        format!(
            "base.safetensors: the adapter's `model.layers.0.mlp.gate.weight` has no `model.layers.0.mlp.gate.weight`; it \
             has `model.layers.0.block_sparse_moe.gate.weight`, `{layer}.weight`; --map bridges names"
        )
    );
    let bare = mixtral
        .iter()
        .map(|(key, tensor)| (old(key), tensor.clone()));
    let line = merge(
        &bare.collect(),
        "mixtral",
        &["--map", r"^model\.layers\.0\.self=layers.0.self"],
    );
    let start = "base.safetensors: the adapter's `model.layers.0.mlp.gate.weight` has no ";
    assert!(line.starts_with(start), "{line}");

    // Heads for other classes have other rows, and nothing else.
    for shape in [&[5, 15][..], &[80], &[5, 16, 1]] {
        let mut other = case.base.clone();
        other.insert("classifier.weight".into(), Tensor::random(shape, 1));
        assert_eq!(
            merge(&other, case.adapter(), &[]),
            format!(
                "base.safetensors: `classifier.weight` is {shape:?} F32, and the adapter's `classifier.weight` is [5, 16] \
                 F32"
            )
        );
    }
}

#[test]
fn counts_of_another_precision() {
    let case = Case::open("cases/boft-mlp-saved-batch-norm");
    let folder = case.folder();
    let mut base = case.base.clone();
    let key = "norm.num_batches_tracked";
    base.get_mut(key).unwrap().dtype = Dtype::I32;
    write(&folder.path().join("base.safetensors"), &base);
    let merge = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        case.adapter(),
    ];
    for last in [&["--dry-run"][..], &["--output", "out"]] {
        assert_eq!(
            refused(folder.path(), &[&merge, last].concat()),
            format!("base.safetensors: `{key}` is [] I32, and the adapter's `{key}` is [] I64")
        );
    }
}

#[test]
fn numbers_that_are_not_finite() {
    let place = Place::new();
    let line = "would not be finite: it or the adapter holds NaN, infinity or numbers beyond its precision";
    for number in [f64::NAN, f64::INFINITY] {
        let mut base = place.base.clone();
        base.get_mut("fc2.weight").unwrap().numbers[3] = number;
        place.write_base(&base);
        assert_eq!(
            place.refused(),
            format!("base.safetensors: `fc2.weight` {line}")
        );
    }
    let mut base = place.base.clone();
    let weight = base.get_mut("fc1.weight").unwrap();
    weight.numbers.fill(65504.0);
    *weight = weight.cast(Dtype::F16);
    place.write_base(&base);
    assert_eq!(
        place.refused(),
        format!("base.safetensors: `fc1.weight` {line}")
    );

    place.write_base(&place.base);
    let mut tensors = place.tensors.clone();
    tensors
        .get_mut("base_model.model.fc1.boft_s")
        .unwrap()
        .numbers[3] = f64::NAN;
    place.write_adapter(&place.config, &tensors);
    let run = run(
        place.path(),
        &[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter",
            "--output",
            "out",
        ],
    );
    assert_eq!(run.code, 2);
    assert_eq!(
        run.stderr,
        format!(
            "warning: the adapter of `fc1` holds NaN or infinity\nerror: base.safetensors: `fc1.weight` {line}\n"
        )
    );
    assert_eq!(names(place.path()), ["adapter", "base.safetensors"]);
}

#[test]
fn indices_that_lie() {
    let place = Place::new();
    let base = place.path().join("model");
    let middle = place.base.keys().nth(4).unwrap().clone();
    let mut first = place.base.clone();
    let second = first.split_off(&middle);
    write_shards(&base, &[first, second]);
    let path = base.join("model.safetensors.index.json");
    let index = read_json(&path);
    let merge = || {
        let line = refused(
            place.path(),
            &[
                "merge",
                "--base",
                "model",
                "--adapter",
                "adapter",
                "--output",
                "out",
            ],
        );
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
        "model/model.safetensors.index.json: no object `weight_map`"
    );
    fs::remove_file(&path).unwrap();
    assert_eq!(
        merge(),
        format!("model: `{one}`, `{two}` are there and no single index; name the file to use")
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

#[test]
fn outputs_that_are_there_or_inside_the_input() {
    let place = Place::new();
    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    write(&model.join("model.safetensors"), &place.base);
    let merge = |base: &str, output: &str| {
        let before = [names(place.path()), names(&model)];
        let line = refused(
            place.path(),
            &[
                "merge",
                "--base",
                base,
                "--adapter",
                "adapter",
                "--output",
                output,
            ],
        );
        assert_eq!([names(place.path()), names(&model)], before);
        line
    };
    assert_eq!(
        merge("base.safetensors", "base.safetensors"),
        "base.safetensors is there already; name a file that is not there yet"
    );
    assert_eq!(
        merge("model", "model"),
        "model is there already; name a folder that is not there yet"
    );
    let inside = fs::canonicalize(&model).unwrap();
    assert_eq!(
        merge("model", "model/merged"),
        format!(
            "model/merged is inside {}, which it is made of",
            inside.display()
        )
    );
    let adapter = fs::canonicalize(place.path().join("adapter")).unwrap();
    assert_eq!(
        merge("model", "adapter/merged"),
        format!(
            "adapter/merged is inside {}, which it is made of",
            adapter.display()
        )
    );
    assert_eq!(
        merge("model", "out.safetensors"),
        "out.safetensors is the name of a file, and model is a folder; name a folder"
    );
    assert_eq!(
        merge("base.safetensors", "none/out.safetensors"),
        "none/out.safetensors is to be in none, which is no folder"
    );
    assert_eq!(
        merge("base.safetensors", "base.safetensors/out"),
        "base.safetensors/out is to be in base.safetensors, which is no folder"
    );
    let folder = "is the name of a folder; name a file";
    assert_eq!(merge("base.safetensors", "out/"), format!("out/ {folder}"));
    let there = "/dev/null is there already; name a folder that is not there yet";
    assert_eq!(merge("model", "/dev/null"), there);
    let other = |arguments: &[&str]| refused(place.path(), arguments);
    let convert =
        |to: &str, output: &str| other(&["convert", "adapter", "--to", to, "--output", output]);
    assert_eq!(convert("peft", "/dev/null"), there);
    assert_eq!(convert("record", "out/"), format!("out/ {folder}"));
    assert_eq!(
        other(&["inspect", "adapter", "--plot", "out/"]),
        format!("out/ {folder}")
    );
}

#[cfg(unix)]
#[test]
fn other_files_that_cannot_be_copied_are_refused_before_the_weights_are_written() {
    let place = Place::new();
    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    // Writing these weights would be refused, too.
    let mut base = place.base.clone();
    base.get_mut("fc1.weight").unwrap().numbers[0] = f64::NAN;
    write(&model.join("model.safetensors"), &base);
    std::os::unix::fs::symlink("none", model.join("vocabulary.txt")).unwrap();
    assert_eq!(
        place.refused_with(&["--base", "model", "--output", "out"]),
        "model/vocabulary.txt cannot be read: No such file or directory (os error 2)"
    );
}

#[test]
fn options_that_are_wrong() {
    let place = Place::new();
    let line = |arguments: &[&str]| refused(place.path(), arguments);
    assert_eq!(
        line(&[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter"
        ]),
        "the following required arguments were not provided: --output <PATH>"
    );
    assert_eq!(
        place.refused_with(&["--map", "fc"]),
        "--map fc: neither `dinov2` nor <regex>=<replacement>"
    );
    assert!(
        place
            .refused_with(&["--map", "(=x"])
            .starts_with("--map (=x: ")
    );
    assert_eq!(
        line(&["convert", "adapter", "--output", "out"]),
        "the following required arguments were not provided: --to <TO>"
    );
    assert_eq!(
        line(&[
            "convert",
            "adapter",
            "--to-lora",
            "0",
            "--base",
            "base.safetensors",
            "--output",
            "out"
        ]),
        "invalid value '0' for '--to-lora <RANK>': 0 is not in 1..=65536"
    );
    assert_eq!(line(&["fold"]), "unrecognized subcommand 'fold'");
    assert_eq!(
        line(&[]),
        "name a command: merge, unmerge, inspect or convert; burn-boft --help says what they do"
    );
}

/// A result that cannot be written is no fault of the input: the exit code is 1.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let place = Place::new();
    let full = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        "adapter",
        "--output",
        "/dev/full",
    ];
    let run = self::run(place.path(), &full);
    assert_eq!(
        (run.code, run.stderr.as_str()),
        (
            1,
            "error: /dev/full cannot be written: No space left on device (os error 28)\n"
        )
    );

    // No file can be made here, by anyone.
    let merge = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        "adapter",
    ];
    let run = self::run(
        place.path(),
        &[&merge[..], &["--output", "/proc/out"]].concat(),
    );
    assert_eq!(
        (run.code, run.stderr.as_str()),
        (1, "error: /proc/out cannot be written: entity not found\n")
    );

    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    write(&model.join("model.safetensors"), &place.base);
    fs::write(model.join("config.json"), "{}").unwrap();
    let oft = Case::open("cases/oft-linear-exact-b4");
    write(&place.path().join("linear.safetensors"), &oft.base);
    let kept = names(place.path());
    let fit = "--base base.safetensors";
    for (command, file) in [
        (
            format!("merge {fit} --adapter adapter --output out.safetensors"),
            "out.safetensors",
        ),
        (
            "merge --base model --adapter adapter --output out".into(),
            "out/model.safetensors",
        ),
        (
            "unmerge --merged model --adapter adapter --output out".into(),
            "out/model.safetensors",
        ),
        (
            "convert adapter --to peft --output out".into(),
            "out/adapter_model.safetensors",
        ),
        (
            "convert adapter --to record --output out.bpk".into(),
            "out.bpk",
        ),
        (
            format!("convert adapter --to-lora 2 {fit} --output out"),
            "out/adapter_model.safetensors",
        ),
        (
            format!(
                "convert {} --to boft --base linear.safetensors --output out",
                oft.adapter()
            ),
            "out/adapter_model.safetensors",
        ),
        ("inspect adapter --plot out.svg".into(), "out.svg"),
    ] {
        // A limit on the size of files stands for the disk: the signal that goes with it is ignored.
        let script = format!("trap '' XFSZ; ulimit -f 0; exec \"$0\" {command}");
        let run = std::process::Command::new("bash")
            .args(["-c", &script, env!("CARGO_BIN_EXE_burn-boft")])
            .current_dir(place.path())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(run.stderr).unwrap(),
            format!("error: {file} cannot be written: File too large (os error 27)\n"),
            "{command}"
        );
        assert_eq!(run.status.code(), Some(1), "{command}");
        assert_eq!(names(place.path()), kept, "{command}");
    }
}

/// A file cannot make the terminal obey it.
#[test]
fn names_with_control_characters_are_shown_without_them() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "OFT", "oft_block_size": 4, "target_modules": "all-linear"});
    let module = "f\u{1b}[2J\r\nc";
    let write_layer = |module: &str, name: &str| {
        let key = format!("base_model.model.{module}.oft_R.weight");
        let tensors = [(key, Tensor::random(&[2, 6], 1))];
        write_adapter(&folder.path().join(name), &config, &tensors.into());
    };
    write_layer(module, "adapter");
    write_layer("g\u{1b}[2J", "other");
    let base = [(format!("{module}.weight"), Tensor::random(&[3, 8], 2))];
    write(&folder.path().join("base.safetensors"), &base.into());
    let base = ["--base", "base.safetensors"];
    for (arguments, code) in [
        (&["inspect", "adapter", "--plot", "angles.svg"][..], 0),
        (
            &[&["merge", "--dry-run", "--adapter", "adapter"], &base[..]].concat(),
            0,
        ),
        (
            &[&["merge", "--dry-run", "--adapter", "other"], &base[..]].concat(),
            2,
        ),
        (
            &[
                &["convert", "adapter", "--to-lora", "1", "--output", "lora"],
                &base[..],
            ]
            .concat(),
            0,
        ),
    ] {
        let run = run(folder.path(), arguments);
        assert_eq!(run.code, code, "{}", run.stderr);
        let text = run.stdout + &run.stderr;
        assert!(text.contains("\u{fffd}[2J"), "{text:?}");
        assert!(
            !text.contains(|c: char| c.is_control() && c != '\n'),
            "{text:?}"
        );
    }
    let svg = fs::read_to_string(folder.path().join("angles.svg")).unwrap();
    assert!(svg.contains("f\u{fffd}[2J\u{fffd}\u{fffd}c"), "{svg:?}");
}

/// What cannot be printed is a failure, and a reader who has seen enough is none.
#[cfg(target_os = "linux")]
#[test]
fn a_standard_output_that_takes_nothing() {
    use std::process::{Command, Stdio};
    let place = Place::new();
    let run_into = |output: Stdio, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-boft"));
        command.args(arguments).current_dir(place.path());
        let child = command.stdout(output).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let fit = ["--base", "base.safetensors", "--adapter", "adapter"];
    for arguments in [
        &["inspect", "adapter"][..],
        &["inspect", "adapter", "--json"],
        &[&["merge"], &fit[..], &["--dry-run"]].concat(),
        &[&["merge"], &fit[..], &["--output", "merged"]].concat(),
        &[
            "unmerge",
            "--merged",
            "merged",
            "--adapter",
            "adapter",
            "--output",
            "restored",
        ],
        &["convert", "adapter", "--to", "peft", "--output", "peft"],
        &[
            "convert",
            "adapter",
            "--to-lora",
            "2",
            "--base",
            "base.safetensors",
            "--output",
            "lora",
        ],
        &["--version"],
        &["--help"],
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let line =
            "error: standard output cannot be written: No space left on device (os error 28)\n";
        assert_eq!(
            run_into(full.into(), arguments),
            (Some(1), line.into()),
            "{arguments:?}"
        );
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let inspect = ["inspect", "adapter"];
    assert_eq!(run_into(writer.into(), &inspect), (Some(0), String::new()));
}
