//! Small models and adapters on disk, and the tool run on them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// What merging may differ from PEFT by, relative to the largest number of a tensor.
pub const TOLERANCE: f64 = 1e-5;

/// What a run of the tool said.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the tool in a folder, so that its messages hold the paths as they are given here.
pub fn run(folder: &Path, arguments: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_burn-boft"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    Run {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs the tool, which succeeds; what it prints.
pub fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let run = run(folder, arguments);
    assert_eq!(run.code, 0, "{arguments:?}: {}", run.stderr);
    run.stdout
}

/// Runs the tool, which refuses the input; its one line.
pub fn refused(folder: &Path, arguments: &[&str]) -> String {
    let run = run(folder, arguments);
    assert_eq!(run.code, 2, "{arguments:?}: {}{}", run.stdout, run.stderr);
    assert_eq!(run.stdout, "", "{arguments:?}");
    let line = run.stderr.trim_end().to_string();
    assert_eq!(line.lines().count(), 1, "{line}");
    line.strip_prefix("error: ").unwrap_or(&line).to_string()
}

/// The arguments that merge an adapter into a model.
pub const fn merge_command<'a>(base: &'a str, adapter: &'a str, output: &'a str) -> [&'a str; 7] {
    [
        "merge",
        "--base",
        base,
        "--adapter",
        adapter,
        "--output",
        output,
    ]
}

/// The arguments of a command in one line, with `--adapter` before each of these.
pub fn arguments(command: &str, adapters: &[&str]) -> Vec<String> {
    let mut all: Vec<_> = command.split(' ').map(str::to_string).collect();
    let adapters = adapters.iter();
    all.extend(adapters.flat_map(|adapter| ["--adapter".to_string(), adapter.to_string()]));
    all
}

pub fn texts(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The arguments that convert an adapter.
pub const fn convert_command<'a>(adapter: &'a str, to: &'a str, output: &'a str) -> [&'a str; 6] {
    ["convert", adapter, "--to", to, "--output", output]
}

/// The arguments that convert an adapter with the help of the model that it is for.
pub const fn convert_for<'a>(
    base: &'a str,
    adapter: &'a str,
    to: &'a str,
    output: &'a str,
) -> [&'a str; 8] {
    [
        "convert", adapter, "--to", to, "--base", base, "--output", output,
    ]
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub numbers: Vec<f64>,
}

pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    pub fn new(shape: &[usize], numbers: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), numbers.len());
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            numbers,
        }
    }

    /// Numbers without a pattern, from a seed.
    pub fn random(shape: &[usize], seed: u64) -> Self {
        let count = shape.iter().product::<usize>();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f64::from(((state >> 11) as f64 / (1u64 << 53) as f64 - 0.5) as f32)
        };
        (0..16).for_each(|_| _ = next());
        Self::new(shape, (0..count).map(|_| next()).collect())
    }

    /// The tensor rounded to a precision.
    pub fn cast(&self, dtype: Dtype) -> Self {
        let numbers = self.numbers.iter().map(|number| match dtype {
            Dtype::F32 => f64::from(*number as f32),
            Dtype::F16 => f16::from_f64(*number).to_f64(),
            Dtype::BF16 => bf16::from_f64(*number).to_f64(),
            _ => *number,
        });
        Self {
            dtype,
            shape: self.shape.clone(),
            numbers: numbers.collect(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let each = self.numbers.iter().copied();
        match self.dtype {
            Dtype::F64 => each.flat_map(f64::to_le_bytes).collect(),
            Dtype::F32 => each.flat_map(|x| (x as f32).to_le_bytes()).collect(),
            Dtype::F16 => each.flat_map(|x| f16::from_f64(x).to_le_bytes()).collect(),
            Dtype::BF16 => each.flat_map(|x| bf16::from_f64(x).to_le_bytes()).collect(),
            Dtype::I64 => each.flat_map(|x| (x as i64).to_le_bytes()).collect(),
            Dtype::I32 => each.flat_map(|x| (x as i32).to_le_bytes()).collect(),
            Dtype::U8 => each.map(|x| x as u8).collect(),
            other => panic!("{other} is not written here"),
        }
    }
}

/// Writes a safetensors file.
pub fn write(path: &Path, tensors: &Tensors) {
    let bytes: Vec<_> = tensors.values().map(Tensor::bytes).collect();
    let views = tensors.iter().zip(&bytes).map(|((key, tensor), bytes)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), bytes);
        (key.as_str(), view.unwrap())
    });
    let metadata = [("format".to_string(), "pt".to_string())].into();
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Reads a safetensors file.
pub fn read(path: &Path) -> Tensors {
    fn each<const N: usize>(bytes: &[u8], from: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| from(*bytes))
            .collect()
    }
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| {
        let bytes = view.data();
        let numbers = match view.dtype() {
            Dtype::F64 => each(bytes, f64::from_le_bytes),
            Dtype::F32 => each(bytes, |bytes| f32::from_le_bytes(bytes).into()),
            Dtype::F16 => each(bytes, |bytes| f16::from_le_bytes(bytes).to_f64()),
            Dtype::BF16 => each(bytes, |bytes| bf16::from_le_bytes(bytes).to_f64()),
            Dtype::I64 => each(bytes, |bytes| i64::from_le_bytes(bytes) as f64),
            Dtype::U8 | Dtype::BOOL => bytes.iter().map(|byte| f64::from(*byte)).collect(),
            other => panic!("{key} is {other}"),
        };
        let shape = view.shape().to_vec();
        let tensor = Tensor {
            dtype: view.dtype(),
            shape,
            numbers,
        };
        (key.to_string(), tensor)
    });
    tensors.collect()
}

/// Writes a folder with shards and their index.
pub fn write_shards(folder: &Path, shards: &[Tensors]) {
    fs::create_dir_all(folder).unwrap();
    let mut map = serde_json::Map::new();
    for (index, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write(&folder.join(&name), tensors);
        map.extend(tensors.keys().map(|key| (key.clone(), json!(name))));
    }
    let size: usize = shards
        .iter()
        .flat_map(Tensors::values)
        .map(|tensor| tensor.bytes().len())
        .sum();
    let index = json!({"metadata": {"total_size": size}, "weight_map": map});
    write_json(&folder.join("model.safetensors.index.json"), &index);
}

pub fn write_json(path: &Path, json: &Value) {
    fs::write(path, json.to_string()).unwrap();
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Writes an adapter's folder.
pub fn write_adapter(folder: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    write_json(&folder.join("adapter_config.json"), config);
    write(&folder.join("adapter_model.safetensors"), tensors);
}

/// The names in a folder.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The largest difference over the largest number, of tensors of one shape.
pub fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.shape, expected.shape);
    let largest = expected
        .numbers
        .iter()
        .fold(0.0f64, |largest, x| largest.max(x.abs()));
    let pairs = found.numbers.iter().zip(&expected.numbers);
    let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(found.numbers.iter().all(|number| number.is_finite()));
    difference / largest.max(f64::MIN_POSITIVE)
}

/// The library's folder of files that PEFT wrote.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// A case of `fixtures/peft`: an adapter that PEFT wrote, its base, and what PEFT makes of the base.
pub struct Case {
    pub name: String,
    pub adapter: PathBuf,
    pub base: Tensors,
    /// The whole merged model.
    pub merged: Tensors,
}

impl Case {
    /// One case, by its folder below `fixtures/peft`.
    pub fn open(name: &str) -> Self {
        let fixtures = fixtures().join("peft");
        let adapter = fixtures.join(name);
        let reference = read(&adapter.join("reference.safetensors"));
        let part = |prefix: &str| -> Tensors {
            let tensors = reference.iter();
            tensors
                .filter_map(|(key, tensor)| {
                    Some((key.strip_prefix(prefix)?.to_string(), tensor.clone()))
                })
                .collect()
        };
        let base = part("base.");
        let mut merged = base.clone();
        let changed = part("merged.").into_iter();
        merged.extend(changed.filter(|(key, _)| base.contains_key(key)));
        Self {
            name: name.to_string(),
            adapter,
            base,
            merged,
        }
    }

    /// All cases.
    pub fn all() -> Vec<Self> {
        let fixtures = fixtures().join("peft");
        let of = |kind: &str| {
            names(&fixtures.join(kind))
                .into_iter()
                .map(move |name| format!("{kind}/{name}"))
                .collect::<Vec<_>>()
        };
        let names = [of("cases"), of("old")].concat();
        names.iter().map(|name| Self::open(name)).collect()
    }

    /// A folder with the base in it, as `base.safetensors`.
    pub fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("base.safetensors"), &self.base);
        folder
    }

    /// The adapter's folder, for an argument.
    pub fn adapter(&self) -> &str {
        self.adapter.to_str().unwrap()
    }

    /// Whether merging changes anything.
    pub fn changes(&self) -> bool {
        self.base != self.merged
    }
}

/// Asserts that two models are one to a tolerance.
pub fn assert_models(found: &Tensors, expected: &Tensors, tolerance: f64, what: &str) {
    assert!(found.keys().eq(expected.keys()), "{what}");
    for (key, expected) in expected {
        assert_eq!(found[key].dtype, expected.dtype, "{what}: {key}");
        let difference = difference(&found[key], expected);
        assert!(
            difference <= tolerance,
            "{what}: {key} is off by {difference:e}"
        );
    }
}

/// A folder with `base.safetensors` and an `adapter` that fits it.
pub struct MergeFolder {
    pub folder: tempfile::TempDir,
    pub config: Value,
    pub tensors: Tensors,
    pub base: Tensors,
}

impl MergeFolder {
    pub fn new() -> Self {
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

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The line that merging `adapter` into `base.safetensors` is refused with.
    pub fn refused(&self) -> String {
        self.refused_with(&[])
    }

    pub fn refused_with(&self, more: &[&str]) -> String {
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

    pub fn write_base(&self, tensors: &Tensors) {
        write(&self.path().join("base.safetensors"), tensors);
    }

    pub fn write_adapter(&self, config: &Value, tensors: &Tensors) {
        write_adapter(&self.path().join("adapter"), config, tensors);
    }

    /// Writes a base of these bytes.
    pub fn write_bytes(&self, header_length: u64, rest: &[u8]) {
        let mut bytes = header_length.to_le_bytes().to_vec();
        bytes.extend(rest);
        fs::write(self.path().join("base.safetensors"), bytes).unwrap();
    }
}

/// The models of a case in two shards, with what else a folder holds.
pub fn write_sharded(case: &Case, folder: &Path) {
    let middle = case.base.len() / 2;
    let key = case.base.keys().nth(middle).unwrap().clone();
    let mut first = case.base.clone();
    let second = first.split_off(&key);
    write_shards(folder, &[first, second]);
    fs::create_dir_all(folder.join("tokenizer")).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("tokenizer/vocabulary.txt"), "a b").unwrap();
}

/// What merging an adapter makes of a case's base.
pub fn merged(folder: &Path, adapter: &str) -> Tensors {
    let output = format!("{adapter}-merged.safetensors");
    succeed(folder, &merge_command("base.safetensors", adapter, &output));
    read(&folder.join(output))
}
