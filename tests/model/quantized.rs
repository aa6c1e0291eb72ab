//! Quantized bases: injection before and after, training, files, reports, and merging.

use burn::module::{Module, Param, ParamGroup, Quantizer};
use burn::nn;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_boft::value::ExtractError;
use burn_boft::{
    Adapter, BoftConfig, BoftLinear, Init, OftConfig, diagnose, inject, merge, merge_quantized,
    summary,
};

use crate::common::models::{
    INPUT, Layer, Net, distance, gradients, linear, numbers, precisions, rows, set, trainable,
};
use crate::common::{devices, host, noise, tensor};

/// Weights in eight and in four bits, with a scale per tensor and a scale per four numbers.
fn schemes() -> [QuantScheme; 4] {
    let plain = Device::flex().settings().quantization.scheme;
    let block = plain.per_block([4], ScaleDtype::F32);
    [
        plain.with_value(QuantValue::Q8S),
        plain.with_value(QuantValue::Q4S),
        block.with_value(QuantValue::Q8S),
        block.with_value(QuantValue::Q4S),
    ]
}

/// Every scheme on every backend that has it. Burn's `ndarray` knows eight bits with a scale per tensor only.
fn cases() -> impl Iterator<Item = (Device, QuantScheme)> {
    devices().into_iter().flat_map(|(name, device)| {
        let count = if name == "ndarray" { 1 } else { 4 };
        let schemes = schemes().into_iter().take(count);
        schemes.map(move |scheme| (device.clone(), scheme))
    })
}

fn quantized<M: Module>(model: M, paths: &[&str], scheme: QuantScheme) -> M {
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    model.quantize_weights_group(&mut quantizer, ParamGroup::from_paths(paths.to_vec()))
}

fn is_quantized(dtype: DType) -> bool {
    matches!(dtype, DType::QFloat(_))
}

/// The same layer with its quantized weight as floats.
fn dense(layer: &nn::Linear) -> nn::Linear {
    nn::Linear {
        weight: Param::from_tensor(layer.weight.val().dequantize()),
        bias: layer.bias.clone(),
    }
}

fn boft() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(Init::Random { seed: 7 })
        .with_target_modules("all-linear")
}

fn weights() -> [&'static str; 2] {
    ["hidden.weight", "output.weight"]
}

/// A model whose adapted weights are quantized, and the adapter that it gets.
fn model<L: Layer>(scheme: QuantScheme, device: &Device) -> (Net<L>, BoftConfig) {
    let base = quantized(Net::<L>::new(3, device), &weights(), scheme);
    let config = boft()
        .with_target_modules(["hidden", "output"])
        .with_modules_to_save(["head"]);
    (base, config)
}

#[test]
fn quantizing_before_and_after_the_injection_gives_the_same_layer() {
    fn check<L: Layer>(scheme: QuantScheme, device: &Device) {
        let base = L::from_linear(linear([24, 16], 3, DType::F32, device));
        let input = rows([7, 24], 4, device);
        let before = inject(quantized(base.clone(), &["weight"], scheme), boft()).unwrap();
        let after = quantized(inject(base.clone(), boft()).unwrap(), &["weight"], scheme);
        for adapted in [&before, &after] {
            let weight = precisions(adapted)["weight"];
            assert!(is_quantized(weight), "{weight:?}");
        }
        assert_eq!(numbers(&before), numbers(&after));
        let outputs = [&before, &after].map(|layer| host(layer.apply(input.clone())));
        assert_eq!(outputs[0], outputs[1], "{scheme:?}");
        let moved = distance(before.apply(input.clone()), base.apply(input));
        assert!(moved > 0.1, "{moved}");
    }
    for (device, scheme) in cases() {
        check::<BoftLinear>(scheme, &device);
        check::<nn::Linear>(scheme, &device);
    }
}

/// The reference is the adapter on floats that are equal to the quantized weight.
#[test]
fn a_quantized_layer_computes_and_learns_what_its_floats_would() {
    fn check<L: Layer>(scheme: QuantScheme, device: &Device) {
        let device = device.clone().autodiff();
        let base = quantized(
            linear([24, 16], 3, DType::F32, &device),
            &["weight"],
            scheme,
        );
        let floats = dense(&base);
        let input = rows([7, 24], 4, &device);
        let target = rows([7, 16], 5, &device);
        let run = |layer: nn::Linear| {
            let layer = inject(L::from_linear(layer), boft()).unwrap();
            let output = layer.apply(input.clone());
            let loss = (output.clone() - target.clone()).square().mean();
            let gradients = gradients(&layer, &loss.backward());
            (host(output), gradients)
        };
        let (output, gradients) = run(base);
        let (expected, expected_gradients) = run(floats);
        assert_close(&output, &expected, "output");
        let paths: Vec<_> = gradients.keys().map(String::as_str).collect();
        assert_eq!(paths, ["weight.boft.scale", "weight.boft.skew"]);
        for (path, gradient) in &gradients {
            assert!(gradient.iter().any(|value| value.abs() > 1e-4), "{path}");
            assert_close(gradient, &expected_gradients[path], path);
        }
    }
    for (device, scheme) in cases() {
        check::<BoftLinear>(scheme, &device);
        check::<nn::Linear>(scheme, &device);
    }
}

fn assert_close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        // The order of sums differs between the routes. Measured: up to 5e-7.
        assert!(
            difference <= 1e-5 * largest,
            "{what}: {found} for {expected}"
        );
    }
}

#[test]
fn a_convolution_may_be_quantized() {
    let device = Device::flex();
    let numbers = noise(10 * 4 * 3 * 2, 3, 0.5);
    let mut conv = nn::conv::Conv2dConfig::new([4, 10], [3, 2]).init(&device);
    conv.weight = Param::from_tensor(tensor(&numbers, [10, 4, 3, 2], DType::F32, &device));
    let config = boft().with_target_modules(["conv"]);
    let scheme = schemes()[0];
    let packed = quantized(Conv { conv }, &["conv.weight"], scheme);
    let mut floats = packed.clone();
    floats.conv.weight = Param::from_tensor(packed.conv.weight.val().dequantize());
    let input = rows([2, 4, 5, 6], 4, &device);
    let expected = inject(floats.clone(), &config).unwrap();
    let adapted = inject(packed, &config).unwrap();
    assert!(is_quantized(precisions(&adapted)["conv.weight"]));
    let output = adapted.conv.forward(input.clone());
    assert!(distance(output.clone(), expected.conv.forward(input.clone())) <= 1e-6);
    assert!(distance(output.clone(), floats.conv.forward(input.clone())) > 0.1);
    let (merged, report) = merge_quantized(adapted).unwrap();
    assert!(is_quantized(precisions(&merged)["conv.weight"]));
    assert_eq!(report.layers[0].path, "conv");
    let merged = merged.conv.weight.val().dequantize();
    let exact = merge(expected).unwrap().conv.weight.val();
    let error = norm(&host(merged - exact.clone())) / norm(&host(exact));
    assert!((report.layers[0].error - error).abs() < 1e-6, "{report}");
}

#[derive(Module, Debug)]
struct Conv {
    conv: nn::conv::Conv2d,
}

#[test]
fn an_embedding_may_be_quantized() {
    let device = Device::flex();
    let numbers = noise(10 * 12, 3, 0.5);
    let mut embedding = nn::EmbeddingConfig::new(10, 12).init(&device);
    embedding.weight = Param::from_tensor(tensor(&numbers, [10, 12], DType::F32, &device));
    let config = OftConfig::new()
        .with_block_size(4)
        .with_init(Init::Random { seed: 7 })
        .with_target_modules(["embedding"]);
    let packed = quantized(Embedded { embedding }, &["embedding.weight"], schemes()[0]);
    let mut floats = packed.clone();
    floats.embedding.weight = Param::from_tensor(packed.embedding.weight.val().dequantize());
    let tokens = Tensor::<2, Int>::from_data([[3, 0, 9], [7, 3, 1]], &device);
    let expected = inject(floats.clone(), &config).unwrap();
    let adapted = inject(packed, &config).unwrap();
    let output = adapted.embedding.forward(tokens.clone());
    assert!(distance(output.clone(), expected.embedding.forward(tokens.clone())) <= 1e-6);
    assert!(distance(output, floats.embedding.forward(tokens)) > 0.1);
    let (merged, report) = merge_quantized(adapted).unwrap();
    let merged = merged.embedding.weight.val().dequantize();
    let exact = merge(expected).unwrap().embedding.weight.val();
    let error = norm(&host(merged - exact.clone())) / norm(&host(exact));
    assert!((report.layers[0].error - error).abs() < 1e-6, "{report}");
}

#[derive(Module, Debug)]
struct Embedded {
    embedding: nn::Embedding,
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn a_quantized_model_is_trained_saved_and_loaded() {
    fn check<L: Layer>(scheme: QuantScheme) {
        let device = Device::flex().autodiff();
        let (base, config) = model::<L>(scheme, &device);
        let mut adapted = inject(base.clone(), &config).unwrap();
        let learnt = [
            "head.bias",
            "head.weight",
            "hidden.weight.boft.scale",
            "hidden.weight.boft.skew",
            "output.weight.boft.scale",
            "output.weight.boft.skew",
        ];
        assert_eq!(Vec::from_iter(trainable(&adapted)), learnt);
        let counts = summary(&adapted);
        // 6 + 4 blocks of 4 channels in each of two factors, and the scales.
        assert_eq!(counts.effective(), 2 * 6 * 6 + 16 + 2 * 4 * 6 + 12);

        let input = rows([7, INPUT], 4, &device);
        let target = rows([7, 5], 5, &device);
        let before = numbers(&adapted);
        let mut optimizer = AdamWConfig::new().init();
        let mut losses = Vec::new();
        for _ in 0..30 {
            let loss = (adapted.forward(input.clone()) - target.clone())
                .square()
                .mean();
            losses.push(loss.clone().into_scalar::<f64>());
            let gradients = GradientsParams::from_grads(loss.backward(), &adapted);
            adapted = optimizer.step(1e-2, adapted, gradients);
        }
        assert!(losses[29] < 0.7 * losses[0], "{losses:?}");
        let after = numbers(&adapted);
        let moved: Vec<_> = after
            .keys()
            .filter(|path| before[*path] != after[*path])
            .collect();
        assert_eq!(moved, learnt);
        let kept = precisions(&adapted);
        assert!(weights().iter().all(|path| is_quantized(kept[*path])));

        let folder = tempfile::tempdir().unwrap();
        Adapter::extract(&adapted)
            .unwrap()
            .save(folder.path())
            .unwrap();
        let fresh = Adapter::load(folder.path())
            .unwrap()
            .0
            .attach(base)
            .unwrap();
        let inputs = input.without_autodiff();
        let (fresh, adapted) = (fresh.valid(), adapted.valid());
        let output = adapted.forward(inputs.clone());
        assert_eq!(host(fresh.forward(inputs.clone())), host(output.clone()));

        let measured = diagnose(&adapted);
        assert_eq!(measured.layers.len(), 2);
        for layer in measured.layers {
            assert!(layer.orthogonality_defect < 1e-6 && layer.largest_angle > 0.01);
            let energies = layer.energy_before - layer.energy_after;
            assert!(energies.abs() < 1e-3 * layer.energy_before, "{layer:?}");
        }
        let merged = merge(adapted).unwrap();
        assert!(
            !precisions(&merged)
                .values()
                .any(|dtype| is_quantized(*dtype))
        );
        assert!(distance(merged.forward(inputs), output) <= 1e-5);
    }
    for scheme in schemes() {
        check::<BoftLinear>(scheme);
        check::<nn::Linear>(scheme);
    }
}

#[test]
fn merged_weights_are_quantized_again_and_the_cost_is_told() {
    let device = Device::flex();
    for scheme in schemes() {
        let (base, config) = model::<BoftLinear>(scheme, &device);
        let adapted = inject(base.clone(), &config).unwrap();
        let exact = merge(adapted.clone()).unwrap();
        let (merged, report) = merge_quantized(adapted).unwrap();
        println!("{report}");
        let paths: Vec<_> = report
            .layers
            .iter()
            .map(|layer| layer.path.as_str())
            .collect();
        assert_eq!(paths, ["hidden", "output"]);
        for (layer, path) in report.layers.iter().zip(weights()) {
            let DType::QFloat(again) = precisions(&merged)[path] else {
                panic!("{path} of the merged model is not quantized");
            };
            assert_eq!(again, layer.scheme);
            let (exact, merged) = (&numbers(&exact)[path], &numbers(&merged)[path]);
            let base = &numbers(&base)[path];
            assert_near(layer.error, relative(merged, exact));
            assert_near(layer.change, relative(exact, base));
            // The numbers of the skew and the scale. A LoRA of rank r has r·(d_input + d_output).
            let (count, [d_input, d_output]) = match layer.path.as_str() {
                "hidden" => (2 * 6 * 6 + 16, [24, 16]),
                _ => (2 * 4 * 6 + 12, [16, 12]),
            };
            assert_eq!(layer.lora_rank, count / (d_input + d_output));
            let change: Vec<_> = exact.iter().zip(base).map(|(a, b)| a - b).collect();
            let lora = nearest_of_rank(&change, d_output, layer.lora_rank);
            let with_lora: Vec<_> = base
                .iter()
                .zip(lora)
                .map(|(x, change)| x + change)
                .collect();
            let expected = relative(&rounded(&with_lora, &layer.scheme), &with_lora);
            // Single precision moves the nearest matrix by up to 2.2e-4 of this, and another rank or length by percents.
            assert!(
                (layer.lora_error - expected).abs() <= 1e-3 * expected,
                "{} for {expected}",
                layer.lora_error
            );
        }
        let kept = "head.weight";
        assert_eq!(numbers(&base)[kept], numbers(&merged)[kept]);
    }
    let config = boft().with_target_modules(["hidden", "output"]);
    let dense = inject(Net::<BoftLinear>::new(3, &device), config).unwrap();
    let (merged, report) = merge_quantized(dense.clone()).unwrap();
    assert!(report.layers.is_empty());
    assert_eq!(numbers(&merged), numbers(&merge(dense).unwrap()));
}

/// The nearest matrix of this rank, made as long as the matrix itself: one singular vector after the other is found by power
/// iteration and taken away.
fn nearest_of_rank(matrix: &[f64], columns: usize, rank: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let mut rest = matrix.to_vec();
    for seed in 0..rank as u64 {
        let mut right = noise(columns, seed + 1, 1.0);
        for _ in 0..3000 {
            let mut next = vec![0.0; columns];
            for row in rest.chunks(columns) {
                let left = dot(row, &right);
                next.iter_mut()
                    .zip(row)
                    .for_each(|(sum, x)| *sum += left * x);
            }
            let length = norm(&next);
            right = next.into_iter().map(|x| x / length).collect();
        }
        for row in rest.chunks_mut(columns) {
            let left = dot(row, &right);
            row.iter_mut()
                .zip(&right)
                .for_each(|(x, right)| *x -= left * right);
        }
    }
    let nearest: Vec<_> = matrix.iter().zip(&rest).map(|(x, rest)| x - rest).collect();
    let factor = norm(matrix) / norm(&nearest);
    nearest.into_iter().map(|x| factor * x).collect()
}

/// What a scheme keeps of numbers: of all of them, or of every four, the largest is 127 or 7 steps.
fn rounded(numbers: &[f64], scheme: &QuantScheme) -> Vec<f64> {
    let steps = match scheme.value {
        QuantValue::Q8S => 127.0,
        QuantValue::Q4S => 7.0,
        other => panic!("{other:?}"),
    };
    let group = match scheme.block_size() {
        None => numbers.len(),
        Some(_) => 4,
    };
    let groups = numbers.chunks(group).flat_map(|group| {
        let largest = group.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let step = largest / steps;
        group.iter().map(move |x| (x / step).round() * step)
    });
    groups.collect()
}

fn relative(found: &[f64], exact: &[f64]) -> f64 {
    let difference: Vec<_> = found.iter().zip(exact).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(exact)
}

fn assert_near(found: f64, expected: f64) {
    assert!(
        (found - expected).abs() <= 1e-4 * expected,
        "{found} for {expected}"
    );
}

/// The claim of the OFTv2 paper: a rotation keeps the range of the numbers, and a LoRA of equal size widens it. With a
/// scale for every few numbers, the range of all of them hardly matters.
#[test]
fn rotated_weights_lose_less_in_rounding_than_weights_with_a_lora() {
    let device = Device::flex();
    for scheme in schemes() {
        let base = BoftLinear::from(linear([256, 192], 3, DType::F32, &device));
        let base = quantized(base, &["weight"], scheme);
        for size in [0.25, 1.0] {
            let config = OftConfig::new()
                .with_block_size(32)
                .with_init(Init::Random { seed: 7 })
                .with_target_modules("all-linear");
            let adapted = inject(base.clone(), config).unwrap();
            let adapted = set(adapted, "weight.boft.skew", |skew| {
                skew.into_iter().map(|x| x * size).collect()
            });
            let (_, report) = merge_quantized(adapted).unwrap();
            println!("{report}");
            let layer = &report.layers[0];
            let limit = match scheme.block_size() {
                None => 1.0,
                Some(_) => 1.02,
            };
            assert!(layer.error < limit * layer.lora_error, "{report}");
        }
    }
}

#[test]
fn quantizing_a_whole_adapted_model_still_computes_and_cannot_be_saved() {
    let device = Device::flex();
    let base = nn::LinearConfig::new(24, 16).with_bias(false).init(&device);
    let base = nn::Linear {
        weight: linear([24, 16], 3, DType::F32, &device).weight,
        ..base
    };
    let adapted = inject(BoftLinear::from(base), boft()).unwrap();
    let input = rows([7, 24], 4, &device);
    let output = adapted.forward(input.clone());
    let scheme = schemes()[0];

    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let whole = adapted.clone().quantize_weights(&mut quantizer);
    assert!(
        precisions(&whole)
            .values()
            .all(|dtype| is_quantized(*dtype))
    );
    let drift = distance(whole.forward(input.clone()), output.clone());
    assert!(drift > 0.0 && drift < 0.1, "{drift}");
    assert!(diagnose(&whole).layers[0].orthogonality_defect < 1e-6);
    let merged = merge(whole.clone()).unwrap();
    let drift = distance(merged.forward(input.clone()), whole.forward(input.clone()));
    assert!(drift <= 1e-5, "{drift}");
    let error = Adapter::extract(&whole).unwrap_err();
    assert!(matches!(error, ExtractError::Quantized { .. }));
    assert_eq!(
        error.to_string(),
        "`weight.boft.skew` is quantized, and an adapter keeps float numbers only; leave it out of the quantization"
    );

    let adapters = ParamGroup::from_predicate(".boft.");
    let group = ParamGroup::all().exclude(adapters);
    let packed = adapted.quantize_weights_group(&mut quantizer, group);
    let quantized: Vec<_> = precisions(&packed)
        .into_iter()
        .filter(|(_, dtype)| is_quantized(*dtype))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(quantized, ["weight"]);
    assert!(Adapter::extract(&packed).is_ok());
}

#[test]
fn a_quantized_parameter_cannot_be_trained() {
    let device = Device::flex();
    let base = Net::<BoftLinear>::new(3, &device);
    let base = quantized(base, &["head.weight", "hidden.weight"], schemes()[0]);
    let config = boft()
        .with_target_modules(["hidden"])
        .with_modules_to_save(["head"]);
    let message = "`head.weight` is to be trained and is quantized, so no optimizer can change it; leave it out of the \
                   quantization, or do not train it";
    let error = inject(base.clone(), &config).unwrap_err();
    assert_eq!(error.to_string(), message);

    let adapter = inject(Net::<BoftLinear>::new(3, &device), &config).unwrap();
    let adapter = Adapter::extract(&adapter).unwrap();
    let error = adapter.attach(base).unwrap_err().to_string();
    assert!(error.contains("`head.weight` is quantized"), "{error}");
}
