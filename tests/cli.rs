//! The tool `burn-boft`, driven as a user drives it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The shape and the numbers of a tensor.
type Numbers = (Vec<usize>, Vec<f32>);
type Tensors = BTreeMap<String, Numbers>;

/// What a run of the tool gave.
#[derive(Debug)]
struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Outcome {
    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// The one line of an error, with exit code 2.
    #[track_caller]
    fn refused(self) -> String {
        assert_eq!(self.code, 2, "{self:?}");
        let lines: Vec<_> = self.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{self:?}");
        lines[0].to_string()
    }
}

fn tool<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_burn-boft"))
        .args(arguments)
        .output()
        .unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// `burn-boft merge` of an adapter into a base.
fn merge(base: &Path, adapter: &Path, output: &Path, more: &[&str]) -> Outcome {
    let paths = [
        ("--base", base),
        ("--adapter", adapter),
        ("--output", output),
    ];
    let paths = paths
        .iter()
        .flat_map(|(name, path)| [name.as_ref(), path.as_os_str()]);
    let more = more.iter().map(|text| std::ffi::OsStr::new(*text));
    tool(
        [std::ffi::OsStr::new("merge")]
            .into_iter()
            .chain(paths)
            .chain(more),
    )
}

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = file.iter().filter(|(_, view)| view.dtype() == Dtype::F32);
    floats
        .map(|(key, view)| {
            let numbers = view.data().as_chunks::<4>().0.iter();
            let numbers = numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect();
            (key.to_string(), (view.shape().to_vec(), numbers))
        })
        .collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(key, (shape, numbers))| {
            let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
            (key.clone(), shape.clone(), bytes.collect())
        })
        .collect();
    let views = bytes.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (key.as_str(), view)
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// The tensors below a prefix of the keys.
fn below(tensors: &Tensors, prefix: &str) -> Tensors {
    let with = tensors.iter().filter_map(|(key, tensor)| {
        let key = key.strip_prefix(prefix)?;
        Some((key.to_string(), tensor.clone()))
    });
    with.collect()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn case(name: &str) -> PathBuf {
    fixtures().join("cases").join(name)
}

/// A folder with the base of a fixture as `base.safetensors`, and what PEFT's own merge made of it.
fn base_of(case: &Path) -> (TempDir, PathBuf, Tensors) {
    let reference = fs::read(case.join("reference.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&reference).unwrap();
    let tensors = tensors
        .iter()
        .filter_map(|(key, view)| Some((key.strip_prefix("base.")?, view)));
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.safetensors");
    fs::write(&base, serialize(tensors, None).unwrap()).unwrap();
    let reference = read(&case.join("reference.safetensors"));
    let mut merged = below(&reference, "merged.");
    merged.remove("output");
    (folder, base, merged)
}

/// `max|a − b|` of the largest number.
fn distance(actual: &Numbers, expected: &Numbers) -> f32 {
    assert_eq!(actual.0, expected.0);
    let size = expected.1.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let pairs = actual.1.iter().zip(&expected.1);
    pairs.fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / size
}

#[test]
fn merging_gives_what_peft_merges() {
    let mut tried = 0;
    for folder in ["cases", "old"] {
        for entry in fs::read_dir(fixtures().join(folder)).unwrap() {
            let case = entry.unwrap().path();
            if !case.join("reference.safetensors").exists() {
                continue;
            }
            let (folder, base, expected) = base_of(&case);
            let output = folder.path().join("merged.safetensors");
            merge(&base, &case, &output, &[]).done();
            let (before, after) = (read(&base), read(&output));
            assert_eq!(before.len(), after.len(), "{case:?}");
            let mut turned = 0;
            for (key, merged) in &expected {
                let distance = distance(&after[key], merged);
                assert!(distance <= 1e-5, "{case:?}: {key} is {distance:.1e} off");
                turned += usize::from(before[key] != after[key]);
            }
            // Blocks of one number turn nothing.
            let is_empty = case.ends_with("oft-linear-adjusted-empty");
            assert_eq!(turned == 0, is_empty, "{case:?} changes {turned} tensors");
            for (key, numbers) in &before {
                assert!(
                    expected.contains_key(key) || after[key] == *numbers,
                    "{key}"
                );
            }
            tried += 1;
        }
    }
    assert!(tried >= 80, "{tried} cases");
}

/// A sharded folder as `transformers` saves one, from the base of a fixture.
fn sharded(case: &Path) -> (TempDir, PathBuf) {
    let (folder, base, _) = base_of(case);
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    let mut map = BTreeMap::new();
    let tensors: Vec<_> = read(&base).into_iter().collect();
    for (index, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", index + 1);
        write(&model.join(&name), &part.iter().cloned().collect());
        map.extend(part.iter().map(|(key, _)| (key.clone(), name.clone())));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(
        model.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    fs::write(model.join("config.json"), "{\"hidden_size\": 16}").unwrap();
    (folder, model)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_sharded_folder_comes_out_sharded_the_same_way_and_back() {
    let case = case("boft-mlp-all-linear");
    let (folder, model) = sharded(&case);
    let (_, _, expected) = base_of(&case);
    let [merged, back] = ["merged", "back"].map(|name| folder.path().join(name));
    merge(&model, &case, &merged, &[]).done();
    assert_eq!(names(&merged), names(&model));
    assert_eq!(
        fs::read(merged.join("config.json")).unwrap(),
        fs::read(model.join("config.json")).unwrap()
    );
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let all = |folder: &Path| -> Tensors {
        shards
            .iter()
            .flat_map(|shard| read(&folder.join(shard)))
            .collect()
    };
    for (key, numbers) in &expected {
        assert!(distance(&all(&merged)[key], numbers) <= 1e-5, "{key}");
    }
    let arguments = ["unmerge", "--merged"].map(PathBuf::from).into_iter();
    let arguments = arguments.chain([
        merged,
        "--adapter".into(),
        case,
        "--output".into(),
        back.clone(),
    ]);
    let printed = tool(arguments).done();
    assert!(printed.contains("e-"), "no error is reported: {printed}");
    for (key, numbers) in &all(&model) {
        assert!(distance(&all(&back)[key], numbers) <= 1e-5, "{key}");
    }
}

#[test]
fn a_dry_run_names_the_changes_and_writes_nothing() {
    let case = case("boft-linear-m2-b4");
    let (folder, base, _) = base_of(&case);
    let before = names(folder.path());
    let output = folder.path().join("merged.safetensors");
    let printed = merge(&base, &case, &output, &["--dry-run"]).done();
    assert!(printed.contains("layer.weight"), "{printed}");
    assert_eq!(names(folder.path()), before);
}

#[test]
fn names_are_bridged_by_rules() {
    let case = case("boft-linear-m2-b4");
    let (folder, base, expected) = base_of(&case);
    let renamed = read(&base)
        .into_iter()
        .map(|(key, numbers)| (format!("model.{key}"), numbers));
    write(&base, &renamed.collect());
    let output = folder.path().join("merged.safetensors");
    let line = merge(&base, &case, &output, &[]).refused();
    assert!(
        line.contains("`layer") && line.contains("model.layer.weight"),
        "{line}"
    );
    merge(&base, &case, &output, &["--map", "^layer=model.layer"]).done();
    let merged = &read(&output)["model.layer.weight"];
    assert!(distance(merged, &expected["layer.weight"]) <= 1e-5);
}

#[test]
fn inspect_tells_what_an_adapter_is() {
    let case = case("boft-linear-m2-b4");
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("angles.svg");
    let arguments = [&case, Path::new("--plot"), &plot].map(|path| path.as_os_str().to_owned());
    let table = tool(std::iter::once("inspect".into()).chain(arguments)).done();
    assert!(table.contains("BOFT") && table.contains("layer"), "{table}");
    let picture = fs::read_to_string(plot).unwrap();
    assert!(
        picture.starts_with("<svg") && picture.contains("layer"),
        "{picture}"
    );

    let arguments = [Path::new("inspect"), &case, Path::new("--json")];
    let json: Value = serde_json::from_str(&tool(arguments).done()).unwrap();
    let layers = json["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 1, "{json}");
    let text = json.to_string();
    for word in ["BOFT", "norm", "defect", "angle"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
}

/// `burn-boft convert`.
fn convert(input: &Path, output: &Path, more: &[&str]) -> Outcome {
    let paths = [input.as_os_str(), "--output".as_ref(), output.as_os_str()];
    let more = more.iter().map(|text| std::ffi::OsStr::new(*text));
    tool(
        [std::ffi::OsStr::new("convert")]
            .into_iter()
            .chain(paths)
            .chain(more),
    )
}

#[test]
fn oft_becomes_boft_and_back_and_merges_the_same() {
    let case = case("oft-linear-exact-b4");
    let (folder, base, expected) = base_of(&case);
    let [boft, oft, merged] =
        ["boft", "oft", "merged.safetensors"].map(|name| folder.path().join(name));
    let base_text = base.to_str().unwrap();
    convert(&case, &boft, &["--to", "boft", "--base", base_text]).done();
    merge(&base, &boft, &merged, &[]).done();
    assert!(distance(&read(&merged)["layer.weight"], &expected["layer.weight"]) <= 1e-5);
    convert(&boft, &oft, &["--to", "oft"]).done();
    let tensors = |folder: &Path| read(&folder.join("adapter_model.safetensors"));
    assert_eq!(tensors(&oft), tensors(&case));

    let line = convert(
        &self::case("boft-linear-m2-b4"),
        &folder.path().join("no"),
        &["--to", "oft"],
    );
    let line = line.refused();
    assert!(line.contains("`layer` has 2 factors"), "{line}");
}

#[test]
fn a_record_holds_the_same_adapter() {
    let case = case("boft-linear-m2-b4");
    let (folder, base, expected) = base_of(&case);
    let record = folder.path().join("adapter.bpk");
    let [back, merged] = ["back", "merged.safetensors"].map(|name| folder.path().join(name));
    let base_text = base.to_str().unwrap();
    convert(&case, &record, &["--to", "record", "--base", base_text]).done();
    convert(&record, &back, &["--to", "peft", "--base", base_text]).done();
    merge(&base, &back, &merged, &[]).done();
    assert!(distance(&read(&merged)["layer.weight"], &expected["layer.weight"]) <= 1e-5);
}

#[test]
fn a_lora_of_full_rank_is_the_whole_change() {
    let case = case("boft-linear-m2-b4");
    let (folder, base, expected) = base_of(&case);
    let base_text = base.to_str().unwrap();
    let [o, d] = expected["layer.weight"].0[..] else {
        panic!("a matrix")
    };
    let lora = folder.path().join("lora");
    let rank = o.min(d).to_string();
    convert(&case, &lora, &["--to-lora", &rank, "--base", base_text]).done();
    let factors = read(&lora.join("adapter_model.safetensors"));
    let factor = |name: &str| &factors[&format!("base_model.model.layer.lora_{name}.weight")].1;
    let (a, b, rank) = (factor("A"), factor("B"), o.min(d));
    let mut sum = read(&base)["layer.weight"].clone();
    for row in 0..o {
        for column in 0..d {
            let change = (0..rank).map(|k| b[row * rank + k] * a[k * d + column]);
            sum.1[row * d + column] += change.sum::<f32>();
        }
    }
    assert!(distance(&sum, &expected["layer.weight"]) <= 1e-5);

    let small = folder.path().join("small");
    let printed = convert(&case, &small, &["--to-lora", "1", "--base", base_text]).done();
    assert!(printed.contains("of the change is left out"), "{printed}");
}

/// A copy of an adapter to spoil.
fn copy(case: &Path, folder: &Path) -> PathBuf {
    let copy = folder.join("adapter");
    fs::create_dir(&copy).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(case.join(name), copy.join(name)).unwrap();
    }
    copy
}

#[test]
fn spoiled_adapters_are_refused_in_one_line_and_leave_nothing() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil, &str); 7] = [
        (
            "no settings",
            |f| fs::remove_file(f.join("adapter_config.json")).unwrap(),
            "adapter_config.json",
        ),
        (
            "no tensors",
            |f| fs::remove_file(f.join("adapter_model.safetensors")).unwrap(),
            "adapter_model.safetensors",
        ),
        (
            "not JSON",
            |f| fs::write(f.join("adapter_config.json"), "{peft").unwrap(),
            "adapter_config.json",
        ),
        (
            "another method",
            |f| fs::write(f.join("adapter_config.json"), r#"{"peft_type": "IA3"}"#).unwrap(),
            "IA3",
        ),
        (
            "cut off",
            |f| {
                let path = f.join("adapter_model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 9]).unwrap();
            },
            "adapter_model.safetensors",
        ),
        (
            "a header without end",
            |f| {
                fs::write(f.join("adapter_model.safetensors"), [0xff; 16]).unwrap();
            },
            "adapter_model.safetensors",
        ),
        (
            "an unknown key",
            |f| {
                let path = f.join("adapter_model.safetensors");
                let mut tensors = read(&path);
                tensors.insert(
                    "base_model.model.layer.mystery".into(),
                    (vec![2], vec![1.0, 2.0]),
                );
                write(&path, &tensors);
            },
            "mystery",
        ),
    ];
    for (what, spoil, named) in spoils {
        let (folder, base, _) = base_of(&case("boft-linear-m2-b4"));
        let adapter = copy(&case("boft-linear-m2-b4"), folder.path());
        spoil(&adapter);
        let before = names(folder.path());
        let line = merge(&base, &adapter, &folder.path().join("out.safetensors"), &[]).refused();
        assert!(line.contains(named), "{what}: {line}");
        assert_eq!(names(folder.path()), before, "{what}");
    }
}

#[test]
fn spoiled_models_are_refused_in_one_line_and_leave_nothing() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil, &str); 6] = [
        (
            "not there",
            |base| fs::remove_file(base).unwrap(),
            "base.safetensors",
        ),
        (
            "cut off",
            |base| {
                let bytes = fs::read(base).unwrap();
                fs::write(base, &bytes[..bytes.len() - 5]).unwrap();
            },
            "base.safetensors",
        ),
        (
            "offsets out of range",
            |base| {
                let header = r#"{"layer.weight":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64000000000]}}"#;
                let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
                bytes.extend(header.as_bytes());
                fs::write(base, bytes).unwrap();
            },
            "base.safetensors",
        ),
        (
            "another layer",
            |base| {
                let tensors = read(base).into_iter();
                write(
                    base,
                    &tensors
                        .map(|(key, numbers)| (key.replace("layer", "later"), numbers))
                        .collect(),
                );
            },
            "later.weight",
        ),
        (
            "another shape",
            |base| {
                let mut tensors = read(base);
                tensors.insert("layer.weight".into(), (vec![3, 5], vec![0.5; 15]));
                write(base, &tensors);
            },
            "[3, 5]",
        ),
        (
            "not a number",
            |base| {
                let mut tensors = read(base);
                tensors.get_mut("layer.weight").unwrap().1[3] = f32::NAN;
                write(base, &tensors);
            },
            "layer.weight",
        ),
    ];
    for (what, spoil, named) in spoils {
        let adapter = case("boft-linear-m2-b4");
        let (folder, base, _) = base_of(&adapter);
        spoil(&base);
        let before = names(folder.path());
        let line = merge(&base, &adapter, &folder.path().join("out.safetensors"), &[]).refused();
        assert!(line.contains(named), "{what}: {line}");
        assert_eq!(names(folder.path()), before, "{what}");
    }
}

#[test]
fn outputs_that_would_lose_something_are_refused() {
    let adapter = case("boft-mlp-all-linear");
    let (folder, model) = sharded(&adapter);
    let before = names(&model);
    for output in [
        model.clone(),
        model.join("inside"),
        folder.path().join("no/such/place"),
    ] {
        merge(&model, &adapter, &output, &[]).refused();
    }
    let taken = folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    let line = merge(&model, &adapter, &taken, &[]).refused();
    assert!(line.contains("taken"), "{line}");
    assert_eq!(names(&model), before);
    assert!(names(&taken).is_empty());
}

#[test]
fn wrong_options_end_with_two() {
    for arguments in [
        vec!["merge"],
        vec!["mend"],
        vec!["convert", "x", "--output", "y"],
    ] {
        assert_eq!(tool(arguments).code, 2);
    }
    assert!(tool(["--help"]).done().contains("merge"));
}
