//! Adapters that PEFT wrote compute here what PEFT computed: outputs, gradients and merged weights.
//!
//! `fixtures/peft/README.md` says what the files hold.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    BatchNorm, BatchNormConfig, LayerNorm, LayerNormConfig, LinearConfig, PaddingConfig2d,
};
use burn::tensor::activation::{gelu, relu};
use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::{
    Adapter, BoftLinear, KeyMap, LoadOptions, LoadReport, SaveOptions, Transformers, merge,
};
use common::host;
use common::models::{Layer, gradients, numbers};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

/// Of the largest number in a tensor.
const FORWARD: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

/// Tensors of a file, widened: shape and numbers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

fn read(path: &Path) -> (Tensors, BTreeMap<String, String>) {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| {
        let bytes = view.data();
        let numbers = match view.dtype() {
            Dtype::F32 => {
                let numbers = bytes.as_chunks::<4>().0.iter();
                numbers.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            Dtype::I64 => {
                let numbers = bytes.as_chunks::<8>().0.iter();
                numbers.map(|b| i64::from_le_bytes(*b) as f64).collect()
            }
            other => panic!("{key} is {other:?}"),
        };
        (key.to_string(), (view.shape().to_vec(), numbers))
    });
    (tensors.collect(), metadata.into_iter().collect())
}

// The models of the fixtures' README, with linear layers of either kind.

#[derive(Module, Debug)]
struct One<L: Layer> {
    layer: L,
}

#[derive(Module, Debug)]
struct Mlp<L: Layer, N: Norm> {
    fc1: L,
    fc2: L,
    norm: N,
    classifier: L,
}

#[derive(Module, Debug)]
struct Conv<L: Layer> {
    conv1: Conv2d,
    conv2: Conv2d,
    head: L,
}

#[derive(Module, Debug)]
struct Stack<L: Layer> {
    encoder: Encoder<L>,
}

#[derive(Module, Debug)]
struct Encoder<L: Layer> {
    layers: Vec<Block<L>>,
}

#[derive(Module, Debug)]
struct Block<L: Layer> {
    fc1: L,
    fc2: L,
}

/// A norm over 16 features.
trait Norm: Module + burn::module::ModuleDisplay + 'static {
    fn new(device: &Device) -> Self;
    fn apply(&self, input: Tensor<2>) -> Tensor<2>;
}

impl Norm for BatchNorm {
    fn new(device: &Device) -> Self {
        BatchNormConfig::new(16).init(device)
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

impl Norm for LayerNorm {
    fn new(device: &Device) -> Self {
        LayerNormConfig::new(16).init(device)
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

/// A model of the fixtures.
trait Model: Module {
    /// With the sizes of the fixture; the numbers follow.
    fn new(base: &Tensors, device: &Device) -> Self;

    /// On the flat numbers of an input of any rank: rows of features, or images.
    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1>;
}

/// A linear layer of the sizes that a weight of PyTorch has.
fn linear<L: Layer>(base: &Tensors, name: &str, device: &Device) -> L {
    let shape = &base[&format!("{name}.weight")].0;
    let config =
        LinearConfig::new(shape[1], shape[0]).with_bias(base.contains_key(&format!("{name}.bias")));
    L::from_linear(config.init(device))
}

fn tokens(input: Tensor<1>, shape: &[usize]) -> Tensor<2> {
    let features = *shape.last().unwrap();
    let rows = shape.iter().product::<usize>() / features;
    input.reshape([rows, features])
}

fn flat<const D: usize>(output: Tensor<D>) -> Tensor<1> {
    let count = output.shape().num_elements();
    output.reshape([count])
}

impl<L: Layer> Model for One<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            layer: linear(base, "layer", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        flat(self.layer.apply(tokens(input, shape)))
    }
}

impl<L: Layer, N: Norm> Model for Mlp<L, N> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            fc1: linear(base, "fc1", device),
            fc2: linear(base, "fc2", device),
            norm: N::new(device),
            classifier: linear(base, "classifier", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let hidden = gelu(self.fc1.apply(tokens(input, shape)));
        let hidden = self.norm.apply(self.fc2.apply(hidden));
        flat(self.classifier.apply(hidden))
    }
}

impl<L: Layer> Model for Conv<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            conv1: Conv2dConfig::new([4, 6], [3, 3])
                .with_stride([2, 2])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device),
            conv2: Conv2dConfig::new([6, 8], [3, 2]).init(device),
            head: linear(base, "head", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let images: Tensor<4> = input.reshape([shape[0], shape[1], shape[2], shape[3]]);
        let features = self.conv2.forward(relu(self.conv1.forward(images)));
        let [batch, channels, height, width] = features.dims();
        let features = features.reshape([batch, channels, height * width]);
        flat(
            self.head
                .apply(features.mean_dim(2).reshape([batch, channels])),
        )
    }
}

impl<L: Layer> Model for Stack<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        let block = |index: usize| Block {
            fc1: linear(base, &format!("encoder.layers.{index}.fc1"), device),
            fc2: linear(base, &format!("encoder.layers.{index}.fc2"), device),
        };
        Self {
            encoder: Encoder {
                layers: (0..3).map(block).collect(),
            },
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let mut hidden = tokens(input, shape);
        for block in &self.encoder.layers {
            hidden = block.fc2.apply(gelu(block.fc1.apply(hidden)));
        }
        flat(hidden)
    }
}

/// PyTorch's name of a parameter, and whether its tensor there is the transpose.
fn in_pytorch(path: &[(String, String)]) -> (String, bool) {
    let mut names: Vec<_> = path.iter().map(|(name, _)| name.as_str()).collect();
    let (name, container) = path.last().unwrap();
    *names.last_mut().unwrap() = match name.as_str() {
        "gamma" => "weight",
        "beta" => "bias",
        name => name,
    };
    (
        names.join("."),
        container == "Struct:Linear" && name == "weight",
    )
}

/// Sets every number of a model.
struct SetBase<'a> {
    path: Vec<(String, String)>,
    base: &'a Tensors,
}

impl ModuleMapper for SetBase<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_string(), container.to_string()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (key, transposed) = in_pytorch(&self.path);
        let (shape, numbers) = &self.base[&key];
        param.map(|old| {
            let data = TensorData::new(numbers.clone(), shape.clone()).convert::<f32>();
            let tensor = Tensor::<D>::from_data(data, &old.device());
            match transposed {
                true => tensor.swap_dims(0, 1),
                false => tensor,
            }
        })
    }
}

/// Turns every flag off: norms use their running statistics, dropout does nothing.
struct Eval;

impl ModuleMapper for Eval {
    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        flag.with_value(false)
    }
}

/// Where a number of PEFT's file is in the model, and how PEFT's numbers become ours.
fn place(key: &str, shape: &[usize], numbers: &[f64]) -> (String, Vec<f64>) {
    let squares = |layer: &str| {
        let b = shape[shape.len() - 1];
        let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
        // `v = ½(A − Aᵀ)`: both triangles see the packed number.
        let packed = numbers
            .chunks(b * b)
            .flat_map(|a| upper.clone().map(|(i, j)| a[i * b + j] - a[j * b + i]));
        (format!("{layer}.weight.boft.skew"), packed.collect())
    };
    let plain = |path: String| (path, numbers.to_vec());
    for name in [".boft_R", ".oft_r"] {
        if let Some(layer) = key.strip_suffix(name) {
            return squares(layer);
        }
    }
    for name in [".boft_s", ".oft_s"] {
        if let Some(layer) = key.strip_suffix(name) {
            return plain(format!("{layer}.weight.boft.scale"));
        }
    }
    if let Some(layer) = key.strip_suffix(".oft_R.weight") {
        return plain(format!("{layer}.weight.boft.skew"));
    }
    if let Some(layer) = key.strip_suffix(".base_layer.bias") {
        return plain(format!("{layer}.bias"));
    }
    if shape.len() == 2 {
        let (rows, columns) = (shape[0], shape[1]);
        let transpose = (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c)));
        let numbers = transpose.map(|(r, c)| numbers[r * columns + c]).collect();
        return (key.to_string(), numbers);
    }
    let norm = key.strip_prefix("norm.").map(|name| match name {
        "weight" => "norm.gamma",
        "bias" => "norm.beta",
        "running_mean" => "norm.running_mean",
        "running_var" => "norm.running_var",
        other => panic!("{other}"),
    });
    plain(norm.unwrap_or(key).to_string())
}

/// Distances of one case, each in parts of its tolerance.
#[derive(Default)]
struct Comparison {
    failures: Vec<String>,
    forward: f64,
    gradient: f64,
}

impl Comparison {
    fn compare(&mut self, what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
        if actual.len() != expected.len() {
            let (a, b) = (actual.len(), expected.len());
            return self.failures.push(format!("{what}: {a} numbers, not {b}"));
        }
        let size = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let distance = actual.iter().zip(expected).fold(0.0f64, |max, (a, b)| {
            // A comparison with NaN keeps neither.
            if (a - b).abs() <= max {
                max
            } else {
                (a - b).abs()
            }
        });
        let error = if distance == 0.0 {
            0.0
        } else {
            distance / size
        };
        let largest = match tolerance == FORWARD {
            true => &mut self.forward,
            false => &mut self.gradient,
        };
        *largest = largest.max(error);
        if error.is_nan() || error > tolerance {
            self.failures.push(format!("{what}: {error:.2e}"));
        }
    }
}

fn run<M: Model>(folder: &Path) -> (Comparison, LoadReport) {
    let (reference, _) = read(&folder.join("reference.safetensors"));
    let part = |prefix: &str| -> Tensors {
        let entries = reference.iter();
        entries
            .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_string(), value.clone())))
            .collect()
    };
    let base = part("base.");
    let device = Device::flex().autodiff();
    let model = M::new(&base, &device).map(&mut SetBase {
        path: Vec::new(),
        base: &base,
    });
    let (adapter, report) = Adapter::load(folder).unwrap();
    let model = adapter.attach(model).unwrap().map(&mut Eval);

    let mut comparison = Comparison::default();
    let (shape, input) = &reference["input"];
    let flat = |numbers: &[f64], device: &Device| {
        let data = TensorData::new(numbers.to_vec(), [numbers.len()]).convert::<f32>();
        Tensor::<1>::from_data(data, device)
    };
    let leaf = flat(input, &device).require_grad();
    let output = model.forward(leaf.clone(), shape);
    let expected = &reference["output"].1;
    comparison.compare("output", &host(output.clone()), expected, FORWARD);

    let upstream = flat(&reference["upstream"].1, &device);
    let grads = (output * upstream).sum().backward();
    let actual = host(leaf.grad(&grads).unwrap());
    let expected = &reference["grad.input"].1;
    comparison.compare("grad.input", &actual, expected, GRADIENT);
    let actual = gradients(&model, &grads);
    let mut expected = BTreeMap::new();
    for (key, (shape, numbers)) in part("grad.") {
        if key != "input" && !numbers.is_empty() {
            let (path, numbers) = place(&key, &shape, &numbers);
            expected.insert(path, numbers);
        }
    }
    let paths = |map: &BTreeMap<String, Vec<f64>>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(&actual), paths(&expected), "{}", folder.display());
    for (path, expected) in &expected {
        comparison.compare(path, &actual[path], expected, GRADIENT);
    }

    let merged = part("merged.");
    let plain = model.valid();
    let plain = match adapter.layers().iter().all(|layer| layer.is_identity()) {
        true => plain,
        false => merge(plain).unwrap(),
    };
    let input = flat(input, &Device::flex());
    let actual = host(plain.forward(input, shape));
    comparison.compare("merged.output", &actual, &merged["output"].1, FORWARD);
    let actual = numbers(&plain);
    for (key, (shape, numbers)) in &merged {
        if key != "output" && !key.ends_with("num_batches_tracked") {
            let (path, numbers) = place(key, shape, numbers);
            comparison.compare(&format!("merged.{path}"), &actual[&path], &numbers, FORWARD);
        }
    }
    (comparison, report)
}

fn run_any<L: Layer>(folder: &Path) -> (Comparison, LoadReport) {
    let (_, metadata) = read(&folder.join("reference.safetensors"));
    match (
        metadata["model"].as_str(),
        metadata.get("norm").map(String::as_str),
    ) {
        ("linear", _) => run::<One<L>>(folder),
        ("mlp", Some("batch")) => run::<Mlp<L, BatchNorm>>(folder),
        ("mlp", Some("layer")) => run::<Mlp<L, LayerNorm>>(folder),
        ("conv", _) => run::<Conv<L>>(folder),
        ("stack", _) => run::<Stack<L>>(folder),
        other => panic!("{other:?}"),
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn folders(kind: &str) -> Vec<PathBuf> {
    let mut folders: Vec<_> = fs::read_dir(fixtures().join(kind))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    folders
}

/// Runs every folder with linear layers of either kind.
fn check(kind: &str, at_least: usize) -> BTreeMap<String, LoadReport> {
    let (mut failures, mut reports) = (Vec::new(), BTreeMap::new());
    let (mut forward, mut gradient) = (0.0f64, 0.0f64);
    for folder in folders(kind) {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for (layer, (comparison, report)) in [
            ("Linear", run_any::<burn::nn::Linear>(&folder)),
            ("BoftLinear", run_any::<BoftLinear>(&folder)),
        ] {
            forward = forward.max(comparison.forward);
            gradient = gradient.max(comparison.gradient);
            let lines = comparison.failures.iter();
            failures.extend(lines.map(|failure| format!("{name} with {layer}: {failure}")));
            reports.insert(name.clone(), report);
        }
    }
    println!(
        "{} folders: {forward:.1e} of outputs and merged weights, {gradient:.1e} of gradients",
        reports.len()
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(reports.len() >= at_least, "{} folders", reports.len());
    reports
}

#[test]
fn adapters_of_peft_compute_what_peft_computes() {
    let reports = check("cases", 77);
    for (name, report) in reports {
        // PEFT adjusts OFT's sizes by a rule, which is no conversion.
        let expected: &[&str] = match name.as_str() {
            "boft-mlp-bias-all-saved" => {
                &["classifier.modules_to_save", "classifier.original_module"]
            }
            _ => &[],
        };
        assert_eq!(report.converted.len(), expected.len(), "{name}: {report}");
        for (line, part) in report.converted.iter().zip(expected) {
            assert!(line.contains(part), "{name}: {report}");
        }
        assert!(!report.applied.is_empty(), "{name}");
        assert!(report.missing.is_empty() && report.unexpected.is_empty());
    }
}

#[test]
fn adapters_of_older_versions_compute_what_those_computed() {
    let reports = check("old", 13);
    for (name, report) in reports {
        let expected = match name.as_str() {
            name if name.starts_with("boft-permutations") => "the permutation",
            name if name.starts_with("oft-square") => "BOFT with one factor",
            name if name.starts_with("oft-neumann") => "the Neumann series of PEFT 0.16 and 0.17",
            _ => "0 ",
        };
        assert!(
            report.to_string().contains(expected) || expected == "0 ",
            "{name}: {report}"
        );
    }
}

/// The layers of DINOv2 with SwiGLU, named as in its files.
#[derive(Module, Debug)]
struct Dino {
    dinov2: Dinov2,
    classifier: BoftLinear,
}

#[derive(Module, Debug)]
struct Dinov2 {
    encoder: DinoEncoder,
}

#[derive(Module, Debug)]
struct DinoEncoder {
    layer: Vec<DinoLayer>,
}

#[derive(Module, Debug)]
struct DinoLayer {
    attention: DinoAttention,
    mlp: SwiGlu,
}

#[derive(Module, Debug)]
struct DinoAttention {
    attention: Projections,
    output: Dense,
}

#[derive(Module, Debug)]
struct Projections {
    query: BoftLinear,
    key: BoftLinear,
    value: BoftLinear,
}

#[derive(Module, Debug)]
struct Dense {
    dense: BoftLinear,
}

#[derive(Module, Debug)]
struct SwiGlu {
    weights_in: BoftLinear,
    weights_out: BoftLinear,
}

impl Dino {
    fn new(base: &Tensors, device: &Device) -> Self {
        let layer = |index: usize| {
            let linear = |name: &str| {
                linear(
                    base,
                    &format!("dinov2.encoder.layer.{index}.{name}"),
                    device,
                )
            };
            DinoLayer {
                attention: DinoAttention {
                    attention: Projections {
                        query: linear("attention.attention.query"),
                        key: linear("attention.attention.key"),
                        value: linear("attention.attention.value"),
                    },
                    output: Dense {
                        dense: linear("attention.output.dense"),
                    },
                },
                mlp: SwiGlu {
                    weights_in: linear("mlp.weights_in"),
                    weights_out: linear("mlp.weights_out"),
                },
            }
        };
        Self {
            dinov2: Dinov2 {
                encoder: DinoEncoder {
                    layer: (0..2).map(layer).collect(),
                },
            },
            classifier: linear(base, "classifier", device),
        }
    }
}

#[test]
fn dinov2_of_either_transformers_merges_as_peft_does() {
    let folder = fixtures().with_file_name("dinov2");
    let (base, _) = read(&folder.join("base.safetensors"));
    let (merged, _) = read(&folder.join("merged.safetensors"));
    let device = Device::flex().autodiff();
    let model = Dino::new(&base, &device).map(&mut SetBase {
        path: Vec::new(),
        base: &base,
    });
    let versions = [
        (Transformers::V4, "transformers-4"),
        (Transformers::V5, "transformers-5"),
    ];
    for (version, name) in versions {
        let names = KeyMap::dinov2(version);
        let options = LoadOptions::new().with_key_map(names.clone());
        let (adapter, report) = Adapter::load_with(folder.join(name), &options).unwrap();
        assert!(
            report.converted.is_empty() && report.warnings.is_empty(),
            "{report}"
        );
        let plain = merge(adapter.attach(model.clone()).unwrap().valid()).unwrap();
        let actual = numbers(&plain);
        let mut comparison = Comparison::default();
        assert_eq!(actual.len(), merged.len());
        for (key, (shape, numbers)) in &merged {
            let (path, numbers) = place(key, shape, numbers);
            comparison.compare(&path, &actual[&path], &numbers, FORWARD);
        }
        assert!(
            comparison.failures.is_empty(),
            "{name}: {}",
            comparison.failures.join("\n")
        );

        // Written under the other's names, it has the other's tensors.
        for (version, name) in versions {
            let again = tempfile::tempdir().unwrap();
            let options = SaveOptions::new().with_key_map(KeyMap::dinov2(version));
            adapter.save_with(again.path(), &options).unwrap();
            let file = "adapter_model.safetensors";
            let (written, _) = read(&again.path().join(file));
            let (expected, _) = read(&folder.join(name).join(file));
            assert_eq!(
                written.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>()
            );
            for (key, (shape, numbers)) in &expected {
                assert_eq!(&written[key].0, shape, "{key}");
                if !key.ends_with("boft_R") {
                    assert_eq!(&written[key].1, numbers, "{key}");
                }
            }
        }
    }
}
