//! Adapters that PEFT wrote give the outputs, gradients and merged weights that PEFT computed.
//!
//! `fixtures/peft/README.md` says what the files hold.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::dinov2::Encoder;
use crate::common::models::{Layer, gradients, numbers};
use crate::common::peft::{Eval, Model, SetBase, Tensors, UseModel, linear, read, with_model};
use crate::common::{assert_close, host};
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::peft::{LoadOptions, SaveOptions};
use burn_boft::value::LoadReport;
use burn_boft::{Adapter, BoftLinear, KeyMap, Transformers, merge};

/// Tolerances, relative to the largest number in a tensor.
const FORWARD: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

/// The path in the model of a tensor in PEFT's file, and its numbers in the order of the model.
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
    for name in [".oft_R.weight", ".oft_embedding_R.weight"] {
        if let Some(layer) = key.strip_suffix(name) {
            return plain(format!("{layer}.weight.boft.skew"));
        }
    }
    if let Some(layer) = key.strip_suffix(".base_layer.bias") {
        return plain(format!("{layer}.bias"));
    }
    // A linear layer: PyTorch's embeddings are laid out as Burn's.
    if shape.len() == 2 && !key.starts_with("embedding.") {
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

/// The comparisons of one case that failed, and the largest relative distances.
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
            // Written so that NaN counts as larger.
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

/// Runs the comparison in the model type that [`with_model`] chooses.
struct Compare<'a>(&'a Path);

impl UseModel for Compare<'_> {
    type Output = (Comparison, LoadReport);

    fn with<M: Model>(self) -> Self::Output {
        run::<M>(self.0)
    }
}

fn run_any<L: Layer>(folder: &Path) -> (Comparison, LoadReport) {
    with_model::<L, _>(folder, Compare(folder))
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
fn adapters_of_peft_give_the_outputs_gradients_and_merged_weights_of_peft() {
    let reports = check("cases", 81);
    for (name, report) in reports {
        // Sizes that PEFT adjusts by its rule for OFT are not reported as converted.
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
fn adapters_of_older_peft_versions_give_the_outputs_of_those_versions() {
    let reports = check("old", 13);
    for (name, report) in reports {
        let expected = match name.as_str() {
            name if name.starts_with("boft-permutations") => Some("the permutation"),
            name if name.starts_with("oft-square") => Some("BOFT with one factor"),
            name if name.starts_with("oft-neumann") => {
                Some("the Neumann series of PEFT 0.16 and 0.17")
            }
            "oft-exact" => None,
            other => panic!("nothing is known of {other}"),
        };
        let told = report.converted.iter().chain(&report.warnings);
        let told: Vec<_> = told.map(String::as_str).collect();
        match expected {
            Some(expected) => assert!(told.join("\n").contains(expected), "{name}: {report}"),
            None => assert_eq!(told, Vec::<&str>::new(), "{name}"),
        }
    }
}

/// DINOv2 with a classifier, named as in its files.
#[derive(Module, Debug)]
struct Dino {
    dinov2: Dinov2,
    classifier: BoftLinear,
}

#[derive(Module, Debug)]
struct Dinov2 {
    encoder: Encoder,
}

impl Dino {
    fn new(base: &Tensors, device: &Device) -> Self {
        let layer = |path: &str| linear(base, &format!("dinov2.encoder.{path}"), device);
        Self {
            dinov2: Dinov2 {
                encoder: Encoder::new(layer),
            },
            classifier: linear(base, "classifier", device),
        }
    }
}

#[test]
fn dinov2_adapters_named_as_in_transformers_4_and_5_merge_as_in_peft() {
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

        // Saved under the names of the other version, the adapter has that version's tensors.
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
                let (written_shape, written_numbers) = &written[key];
                assert_eq!(written_shape, shape, "{key}");
                if key.ends_with("boft_R") {
                    // Only the skew part has a meaning. `place` packs it; writing it rounds once.
                    let packed = |numbers: &[f64]| place(key, shape, numbers).1;
                    assert_close(key, &packed(written_numbers), &packed(numbers), 1e-7);
                } else {
                    assert_eq!(written_numbers, numbers, "{key}");
                }
            }
        }
    }
}
