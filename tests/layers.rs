//! Every layer that carries an adapter, wherever a model holds it, against the dense oracle and PEFT's
//! numbers.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, Param, ParamGroup, Quantizer};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{self, LinearConfig, LinearLayout, PaddingConfig2d};
use burn::store::{
    BurnToPyTorchAdapter, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, SafetensorsStore,
};
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::ops::{Blocks, Direction, Side};
use burn_boft::{
    AdapterConfig, BoftConfig, BoftLinear, BoftLinearConfig, Cayley, Init, InjectPlan, LayerKind,
    LayerPlan, OftConfig, inject, merge, plan, project, unload,
};
use common::models::{Layer, Net, distance, linear, numbers, precisions, rows, set};
use common::{Matrix, Sizes, assert_close, cayley, devices, host, noise, skew_matrix, tensor};

const INIT: Init = Init::Random { seed: 11 };

fn boft() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_target_modules(".*")
}

fn oft() -> OftConfig {
    OftConfig::new().with_init(INIT).with_target_modules(".*")
}

/// The coefficients of PEFT's polynomial, from the table of `Cayley::Neumann`.
fn neumann(terms: usize) -> &'static [f64] {
    match terms {
        2 => &[1.0, 2.0],
        3 | 4 => &[1.0, 2.0, 2.0, 1.0],
        5 => &[1.0, 2.0, 2.0, 2.0, 1.0],
        6 => &[1.0, 2.0, 2.0, 2.0, 2.0, 1.0],
        _ => panic!("{terms}"),
    }
}

/// The coefficients of the polynomial of PEFT 0.16 and 0.17.
fn neumann_016(terms: usize) -> &'static [f64] {
    &[1.0, 2.0, 2.0, 2.0, 2.0, 2.0][..terms]
}

fn polynomial(packed: &[f64], b: usize, coefficients: &[f64]) -> Matrix {
    let q = skew_matrix(packed, b);
    let (mut block, mut power) = (Matrix::zeros(b, b), Matrix::identity(b));
    for &coefficient in coefficients {
        let scaled = power.values.iter().map(|value| coefficient * value);
        block
            .values
            .iter_mut()
            .zip(scaled)
            .for_each(|(sum, value)| *sum += value);
        power = power.matmul(&q);
    }
    block
}

/// The path of a layer's number; a model that is the layer itself has no path.
fn number_of(layer: &LayerPlan, name: &str) -> String {
    match layer.path.as_str() {
        "" => name.to_string(),
        path => format!("{path}.{name}"),
    }
}

/// The rotation that a layer's numbers mean.
fn rotation(layer: &LayerPlan, config: &AdapterConfig, skew: &[f64]) -> Matrix {
    let butterfly = layer.butterfly;
    let sizes = Sizes {
        d: butterfly.d_input,
        b: butterfly.block_size,
        m: butterfly.n_butterfly_factor,
    };
    let copies = if butterfly.block_share {
        butterfly.block_num()
    } else {
        1
    };
    let skew = skew.repeat(copies);
    assert_eq!(skew.len(), sizes.skew_len());
    let AdapterConfig::Oft(OftConfig { cayley: map, .. }) = config else {
        return common::rotation(sizes, &skew);
    };
    let mut rotation = Matrix::zeros(sizes.d, sizes.d);
    for (k, packed) in skew.chunks(sizes.packed()).enumerate() {
        let block = match *map {
            Cayley::Exact => cayley(packed, sizes.b),
            Cayley::Neumann { terms } => polynomial(packed, sizes.b, neumann(terms)),
            Cayley::Neumann016 { terms } => polynomial(packed, sizes.b, neumann_016(terms)),
        };
        for row in 0..sizes.b {
            for column in 0..sizes.b {
                let start = k * sizes.b;
                *rotation.at(start + row, start + column) = block.get(row, column);
            }
        }
    }
    rotation
}

/// `R·W·diag(s)` of a linear layer, `diag(s)·W·Rᵀ` of a convolution.
fn oracle(
    layer: &LayerPlan,
    config: &AdapterConfig,
    before: &BTreeMap<String, Vec<f64>>,
) -> Vec<f64> {
    let number = |name: &str| before.get(&number_of(layer, name)).cloned();
    let (d, o) = (layer.butterfly.d_input, layer.butterfly.d_output);
    let rotation = rotation(layer, config, &number("weight.boft.skew").unwrap());
    let scale = number("weight.boft.scale").unwrap_or(vec![1.0; o]);
    assert_eq!(layer.scale, matches!(config, AdapterConfig::Boft(_)));
    let base = number("weight").unwrap();
    match layer.kind {
        LayerKind::Linear => {
            let mut weight = rotation.matmul(&Matrix::new(d, o, base));
            weight
                .values
                .iter_mut()
                .enumerate()
                .for_each(|(i, value)| *value *= scale[i % o]);
            weight.values
        }
        LayerKind::Conv2d => {
            let mut weight = Matrix::new(o, d, base).matmul(&rotation.transpose());
            weight
                .values
                .iter_mut()
                .enumerate()
                .for_each(|(i, value)| *value *= scale[i / d]);
            weight.values
        }
    }
}

/// Injects, merges, and compares every number with the oracle. f32 drifts by 5e-7.
fn assert_merges_as_the_oracle<M: Module>(
    model: M,
    config: impl Into<AdapterConfig>,
) -> (M, M, InjectPlan) {
    let config = config.into();
    let plan = plan(&model, &config).unwrap();
    let base = numbers(&model);
    let adapted = inject(model, &config).unwrap();
    let merged = merge(adapted.clone()).unwrap();
    let (before, after) = (numbers(&adapted), numbers(&merged));
    assert!(after.keys().eq(base.keys()));
    let mut untouched: BTreeSet<_> = base.keys().cloned().collect();
    for layer in &plan.layers {
        let weight = number_of(layer, "weight");
        let expected = oracle(layer, &config, &before);
        assert_close(&weight, &after[&weight], &expected, 2e-6);
        let moved = after[&weight].iter().zip(&base[&weight]);
        assert!(
            moved.fold(0.0, |max, (a, b)| f64::max(max, (a - b).abs())) > 0.01,
            "{weight}"
        );
        assert_eq!(before[&weight], base[&weight]);
        untouched.remove(&weight);
    }
    for path in untouched {
        assert_eq!(after[&path], base[&path], "{path}");
    }
    (adapted, merged, plan)
}

#[test]
fn a_linear_layer_merges_as_the_oracle_says() {
    for (backend, device) in devices() {
        for config in [boft(), boft().with_block_size(2).with_n_butterfly_factor(3)] {
            let base = linear([24, 10], 3, DType::F32, &device);
            let (adapted, merged, _) = assert_merges_as_the_oracle(base, config);
            let input = rows([7, 24], 4, &device);
            let drift = distance(adapted.forward(input.clone()), merged.forward(input));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

/// A convolution that is square in nothing: 8 → 10 channels in two groups, 3 × 2 kernels.
fn convolution(device: &Device) -> Conv2d {
    let mut convolution = Conv2dConfig::new([8, 10], [3, 2])
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(1, 2, 1, 2))
        .with_dilation([1, 2])
        .with_groups(2)
        .init(device);
    let (weight, bias) = (noise(10 * 4 * 6, 5, 0.4), noise(10, 6, 0.5));
    let weight = tensor(&weight, [10, 4, 3, 2], DType::F32, device);
    convolution.weight = Param::from_tensor(weight);
    convolution.bias = Some(Param::from_tensor(tensor(&bias, [10], DType::F32, device)));
    convolution
}

#[test]
fn a_convolution_merges_as_the_oracle_says() {
    for (backend, device) in devices() {
        for config in [
            AdapterConfig::from(boft()),
            oft().with_block_size(12).into(),
        ] {
            let base = convolution(&device);
            let (adapted, merged, plan) = assert_merges_as_the_oracle(base.clone(), config);
            assert_eq!(
                (
                    plan.layers[0].butterfly.d_input,
                    plan.layers[0].butterfly.d_output
                ),
                (24, 10)
            );
            let input: Tensor<4> = rows([3, 8, 9, 7], 7, &device);
            let output = adapted.forward(input.clone());
            let drift = distance(output.clone(), merged.forward(input.clone()));
            assert!(drift <= 1e-5, "{drift} on {backend}");
            assert!(distance(output, base.forward(input)) > 0.1);
        }
    }
}

/// Every way for a module to hold another, behind private fields.
mod tree {
    use super::*;
    use burn::tensor::Int;

    #[derive(Module, Debug)]
    struct Inner {
        project: nn::Linear,
        norm: nn::LayerNorm,
    }

    #[derive(Module, Debug)]
    #[allow(clippy::large_enum_variant)]
    enum Choice {
        #[allow(dead_code)] // The variant that is not there has no path.
        Narrow(nn::Linear),
        Deep(Inner),
    }

    #[derive(Module, Debug)]
    pub struct Tree {
        embedding: nn::Embedding,
        first: nn::Linear,
        stack: Vec<Inner>,
        present: Option<BoftLinear>,
        absent: Option<nn::Linear>,
        pair: (nn::Linear, Conv2d),
        array: [nn::Linear; 2],
        nested: Vec<Option<(Inner, nn::Linear)>>,
        choice: Choice,
    }

    impl Tree {
        pub fn new(device: &Device) -> Self {
            let linear = |seed| linear([16, 16 + seed as usize], seed, DType::F32, device);
            let inner = |seed| Inner {
                project: super::linear([16, 8], seed, DType::F32, device),
                norm: nn::LayerNormConfig::new(8).init(device),
            };
            let embedding = nn::EmbeddingConfig::new(40, 16).init(device);
            Self {
                embedding,
                first: linear(1),
                stack: vec![inner(2), inner(4)],
                present: Some(linear(6).into()),
                absent: None,
                pair: (linear(8), convolution(device)),
                array: [linear(10), linear(12)],
                nested: vec![None, Some((inner(14), linear(16)))],
                choice: Choice::Deep(inner(18)),
            }
        }

        pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
            self.embedding.forward(tokens)
        }
    }

    pub const LINEAR: [&str; 10] = [
        "first",
        "stack.0.project",
        "stack.1.project",
        "present",
        "pair.0",
        "array.0",
        "array.1",
        "nested.1.0.project",
        "nested.1.1",
        "choice.Deep.project",
    ];
    pub const CONVOLUTION: &str = "pair.1";
}

#[test]
fn every_layer_of_a_module_tree_is_found_under_its_path() {
    for (backend, device) in devices() {
        let convolution = BTreeSet::from([tree::CONVOLUTION]);
        let linear = BTreeSet::from(tree::LINEAR);
        let all: BTreeSet<_> = linear.union(&convolution).copied().collect();
        for (config, expected) in [
            (boft(), &all),
            (boft().with_target_modules("all-linear"), &linear),
            (boft().with_exclude_modules(tree::LINEAR), &convolution),
        ] {
            let model = tree::Tree::new(&device);
            let (adapted, _, plan) = assert_merges_as_the_oracle(model, config);
            let paths: BTreeSet<_> = plan
                .layers
                .iter()
                .map(|layer| layer.path.as_str())
                .collect();
            assert_eq!(&paths, expected, "{backend}");
            let numbers = numbers(&adapted);
            let carriers = numbers
                .keys()
                .filter_map(|path| path.strip_suffix(".weight.boft.skew"));
            assert_eq!(&carriers.collect::<BTreeSet<_>>(), expected, "{backend}");
        }
    }
}

#[test]
fn an_embedding_is_never_touched() {
    let device = Device::flex();
    let model = tree::Tree::new(&device);
    let tokens = Tensor::from_data([[3, 39, 0], [7, 7, 21]], &device);
    let expected = host(model.embed(tokens.clone()));
    let adapted = inject(model, boft()).unwrap();
    assert_eq!(host(adapted.embed(tokens)), expected);
    assert!(expected.iter().any(|&value| value != 0.0));
}

#[test]
fn oft_blocks_are_adjusted_shared_and_approximated_as_asked() {
    let cases = [
        (oft(), 24, Some(32)),
        (oft().with_block_size(10), 8, Some(10)),
        (oft().with_block_size(6), 6, None),
        (oft().with_block_num(7), 4, Some(3)),
        (oft().with_block_size(4).with_block_share(true), 4, None),
    ];
    let neumann = [2, 3, 4, 5, 6].into_iter().flat_map(|terms| {
        [Cayley::Neumann { terms }, Cayley::Neumann016 { terms }]
            .map(|cayley| (oft().with_block_size(4).with_cayley(cayley), 4, None))
    });
    let neumann: Vec<_> = neumann.collect();
    for (backend, device) in devices() {
        for (config, block_size, adjusted_from) in cases.iter().chain(&neumann) {
            let base = linear([24, 10], 3, DType::F32, &device);
            let (adapted, merged, plan) = assert_merges_as_the_oracle(base, config);
            let layer = &plan.layers[0];
            assert_eq!(layer.butterfly.block_size, *block_size, "{config:?}");
            assert_eq!(layer.adjusted_from, *adjusted_from, "{config:?}");
            let stored = if config.block_share {
                1
            } else {
                24 / block_size
            };
            let packed = block_size * (block_size - 1) / 2;
            assert_eq!(numbers(&adapted)["weight.boft.skew"].len(), stored * packed);
            let input = rows([7, 24], 4, &device);
            let drift = distance(adapted.forward(input.clone()), merged.forward(input));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

#[test]
fn boft_gives_the_numbers_of_peft() {
    // PEFT's parameter is the whole square with t above the diagonal, and Q = ½(A − Aᵀ).
    let skew: Vec<f64> = (0..3)
        .flat_map(|i| (0..4).map(move |k| 0.1 * f64::from(4 * i + k + 1) / 2.0))
        .collect();
    let input: Vec<f64> = (1..=8).map(f64::from).collect();
    let golden = [
        [
            1.1945137, 1.8902743, 3.7326733, 3.3267327, 6.5403423, 4.2689487, 9.5384615, 4.6923077,
        ],
        [
            2.6688662, 3.6234104, 2.5766458, 1.7632205, 10.8033243, 7.0004790, 2.8096389, 0.6224206,
        ],
        [
            8.3786977, 9.1407322, 5.2944336, 3.1763959, 3.1156817, 0.7284711, -1.0662335,
            -0.8654047,
        ],
    ];
    for (backend, device) in devices() {
        for (dtype, tolerance) in [(DType::F64, 1e-7), (DType::F32, 1e-6)] {
            for (m, golden) in (1..).zip(&golden) {
                let skew = tensor(&skew[..4 * m], [m, 4, 1], dtype, &device);
                let input = tensor(&input, [1, 8], dtype, &device);
                let output = Blocks::cayley(skew, 2).rotate(input, Side::Right, Direction::Forward);
                assert_close(
                    &format!("{m} factors, {backend}"),
                    &host(output),
                    golden,
                    tolerance,
                );
            }
        }
    }
}

#[test]
fn oft_gives_the_numbers_of_peft() {
    let new = |terms| Cayley::Neumann { terms };
    let golden = [
        (Cayley::Exact, [2.2631579, 2.8421053, 0.8947368]),
        (new(2), [-0.6, 0.4, 4.6]),
        (new(3), [-0.648, -0.128, 3.688]),
        (new(4), [-0.648, -0.128, 3.688]),
        (new(5), [-0.5248, 0.0288, 3.632]),
        (new(6), [-0.52928, 0.05792, 3.70368]),
        (Cayley::Neumann016 { terms: 5 }, [-0.5136, 0.0736, 3.688]),
    ];
    for (backend, device) in devices() {
        for (dtype, tolerance) in [(DType::F64, 1e-7), (DType::F32, 1e-6)] {
            for (cayley, golden) in &golden {
                let skew = tensor(&[0.1, 0.2, 0.3], [1, 1, 3], dtype, &device);
                let blocks = match *cayley {
                    Cayley::Exact => Blocks::cayley(skew, 3),
                    Cayley::Neumann { terms } => Blocks::neumann(skew, 3, terms),
                    Cayley::Neumann016 { terms } => Blocks::polynomial(skew, 3, neumann_016(terms)),
                };
                let input = tensor(&[1.0, 2.0, 3.0], [1, 3], dtype, &device);
                let output = blocks.rotate(input, Side::Right, Direction::Forward);
                assert_close(
                    &format!("{cayley:?}, {backend}"),
                    &host(output),
                    golden,
                    tolerance,
                );
            }
        }
    }
}

#[test]
fn coft_gives_the_numbers_of_peft() {
    for (backend, device) in devices() {
        let config = oft().with_block_size(3).with_coft_radius(0.1);
        let model = inject(linear([6, 5], 3, DType::F32, &device), config).unwrap();
        let model = set(model, "weight.boft.skew", |_| [0.1, 0.2, 0.3].repeat(2));
        let skew = &numbers(&project(model))["weight.boft.skew"];
        let golden = [0.0133631, 0.0267261, 0.0400892].repeat(2);
        assert_close(backend, skew, &golden, 1e-7);
    }
}

#[test]
fn a_column_layout_changes_nothing_but_the_file() {
    for (backend, device) in devices() {
        let row = linear([24, 10], 3, DType::F32, &device);
        let column = || {
            let config = LinearConfig::new(24, 10).with_layout(LinearLayout::Col);
            config.init(&device).load_record(column_record(&row))
        };
        assert_eq!(numbers(&column()), numbers(&row), "{backend}");
        let (adapted, merged, _) = assert_merges_as_the_oracle(column(), boft());
        let (_, row, _) = assert_merges_as_the_oracle(row.clone(), boft());
        assert_eq!(numbers(&merged), numbers(&row), "{backend}");
        let input = rows([7, 24], 4, &device);
        let boft = BoftLinear::from(adapted.clone());
        for output in [adapted.forward(input.clone()), boft.forward(input.clone())] {
            let drift = distance(output, row.forward(input.clone()));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

/// The record that a column layout reads: it keeps the weight transposed.
fn column_record(row: &nn::Linear) -> burn::store::ModuleRecord {
    let transposed = nn::Linear {
        weight: Param::from_tensor(row.weight.val().transpose()),
        bias: row.bias.clone(),
    };
    transposed.into_record()
}

#[test]
fn a_half_precision_base_stays_so_and_is_rounded_once() {
    let device = Device::flex();
    for (dtype, digits) in [(DType::F16, 11), (DType::BF16, 8)] {
        let base = linear([24, 10], 3, dtype, &device);
        let values = numbers(&base);
        let wide = set_precision(&base, DType::F32);
        assert_eq!(numbers(&wide), values);
        let adapted = inject(base, boft()).unwrap();
        let precisions = precisions(&adapted);
        for (path, precision) in &precisions {
            let expected = if path.contains(".boft.") {
                DType::F32
            } else {
                dtype
            };
            assert_eq!(*precision, expected, "{path}");
        }
        let merged = merge(adapted.clone()).unwrap();
        assert_eq!(merged.weight.val().dtype(), dtype);
        let exact = numbers(&merge(inject(wide, boft()).unwrap()).unwrap());
        let half_unit = 2f64.powi(-digits);
        let pairs = numbers(&merged)["weight"]
            .clone()
            .into_iter()
            .zip(&exact["weight"]);
        let mut rounded = 0;
        for (actual, expected) in pairs {
            // A value next to a tie may round either way; subnormals of f16 have fewer digits.
            let bound = expected.abs() * half_unit * 1.01 + 1e-7;
            assert!(
                (actual - expected).abs() <= bound,
                "{actual} for {expected} in {dtype:?}"
            );
            rounded += usize::from(actual != *expected);
        }
        assert!(rounded > 100, "{dtype:?}");

        let input = rows([7, 24], 4, &device).cast(dtype);
        let expected = merged.forward(input.clone());
        for output in [
            adapted.forward(input.clone()),
            BoftLinear::from(adapted).forward(input),
        ] {
            assert_eq!(output.dtype(), dtype);
            let size = host(expected.clone())
                .iter()
                .fold(0.0, |max, v| f64::max(max, v.abs()));
            let drift = distance(output, expected.clone()) / size;
            println!("{dtype:?}: {drift:.1e}");
            assert!(drift <= 4.0 * half_unit, "{drift} in {dtype:?}");
        }
    }
}

fn set_precision(layer: &nn::Linear, dtype: DType) -> nn::Linear {
    nn::Linear {
        weight: Param::from_tensor(layer.weight.val().cast(dtype)),
        bias: layer
            .bias
            .as_ref()
            .map(|bias| Param::from_tensor(bias.val().cast(dtype))),
    }
}

#[test]
fn many_adapters_share_one_base() {
    for (_, device) in devices() {
        let base = Net::<BoftLinear>::new(1, &device);
        let before = numbers(&base);
        let config = |seed| {
            let init = Init::Random { seed };
            boft()
                .with_init(init)
                .with_target_modules(["hidden", "output"])
        };
        let [a, b] = [1, 2].map(|seed| inject(base.clone(), config(seed)).unwrap());
        let input = rows([7, 24], 4, &device);
        let outputs = [&base, &a, &b].map(|model| model.forward(input.clone()));
        for (x, y) in [(0, 1), (0, 2), (1, 2)] {
            assert!(distance(outputs[x].clone(), outputs[y].clone()) > 0.01);
        }
        let merged = merge(a.clone()).unwrap();
        assert!(distance(merged.forward(input.clone()), outputs[1].clone()) <= 1e-5);
        assert_eq!(distance(b.forward(input), outputs[2].clone()), 0.0);
        for model in [base, unload(a), unload(b)] {
            assert_eq!(numbers(&model), before);
        }
    }
}

/// A safetensors file as PyTorch writes it: a header of JSON, then `weight` as `[out, in]` and `bias`.
fn pytorch_file(weight: &[f32], bias: &[f32], d_input: usize) -> Vec<u8> {
    let d_output = bias.len();
    let (middle, end) = (4 * weight.len(), 4 * (weight.len() + d_output));
    let header = format!(
        r#"{{"weight":{{"dtype":"F32","shape":[{d_output},{d_input}],"data_offsets":[0,{middle}]}},"bias":{{"dtype":"F32","shape":[{d_output}],"data_offsets":[{middle},{end}]}}}}"#
    );
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(
        weight
            .iter()
            .chain(bias)
            .flat_map(|value| value.to_le_bytes()),
    );
    file
}

fn from_pytorch<M: Module>(mut model: M, file: &[u8]) -> M {
    let mut store = SafetensorsStore::from_bytes(Some(file.to_vec()))
        .with_from_adapter(PyTorchToBurnAdapter)
        .allow_partial(true);
    let result = model.load_from(&mut store).unwrap();
    assert_eq!(result.applied.len(), 2, "{result:?}");
    assert!(
        result.errors.is_empty() && result.unused.is_empty(),
        "{result:?}"
    );
    model
}

#[test]
fn a_boft_linear_reads_and_writes_pytorch_files_as_a_linear_does() {
    let device = Device::flex();
    let (d_input, d_output) = (24, 10);
    let single = |values: Vec<f64>| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    let (weight, bias) = (single(noise(240, 1, 1.0)), single(noise(10, 2, 1.0)));
    let file = pytorch_file(&weight, &bias, d_input);

    let plain = from_pytorch(LinearConfig::new(d_input, d_output).init(&device), &file);
    let ours = from_pytorch(
        BoftLinearConfig::new(d_input, d_output).init(&device),
        &file,
    );
    let adapted = BoftLinearConfig::new(d_input, d_output).init(&device);
    let adapted = from_pytorch(inject(adapted, boft()).unwrap(), &file);
    assert!(adapted.adapter().is_some());
    for read in [numbers(&plain), numbers(&ours), numbers(&unload(adapted))] {
        for (i, row) in read["weight"].chunks(d_output).enumerate() {
            for (o, &value) in row.iter().enumerate() {
                assert_eq!(value, f64::from(weight[o * d_input + i]));
            }
        }
        assert!(
            read["bias"]
                .iter()
                .zip(&bias)
                .all(|(a, b)| *a == f64::from(*b))
        );
    }

    let mut store = SafetensorsStore::from_bytes(None).with_to_adapter(BurnToPyTorchAdapter);
    ours.save_into(&mut store).unwrap();
    let bytes = store.get_bytes().unwrap();
    let mut read = SafetensorsStore::from_bytes(Some(bytes));
    let stored = read.get_tensor("weight").unwrap().unwrap();
    assert_eq!(stored.shape.to_vec(), [d_output, d_input]);
}

#[test]
fn a_base_quantized_after_injection_keeps_the_adapter_and_nearly_the_output() {
    let device = Device::flex();
    let scheme = device
        .settings()
        .quantization
        .scheme
        .with_value(QuantValue::Q8S);
    let base = BoftLinear::from(linear([24, 16], 3, DType::F32, &device));
    let adapted = inject(base.clone(), boft()).unwrap();
    let group = ParamGroup::from_path("weight");
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let quantized = adapted
        .clone()
        .quantize_weights_group(&mut quantizer, group);
    assert!(matches!(precisions(&quantized)["weight"], DType::QFloat(_)));
    assert_eq!(
        numbers(&quantized)["weight.boft.skew"],
        numbers(&adapted)["weight.boft.skew"]
    );

    let input = rows([7, 24], 4, &device);
    let output = adapted.forward(input.clone());
    let drift = distance(quantized.forward(input.clone()), output.clone());
    println!("quantized: {drift:.1e}");
    // Eight bits of weights up to 0.41 err by up to 0.0016 each: 1e-2 over 24 inputs.
    assert!(drift > 0.0 && drift <= 0.02, "{drift}");
    assert!(distance(base.forward(input.clone()), output) > 0.1);

    let merged = merge(quantized.clone()).unwrap();
    assert_eq!(merged.weight.val().dtype(), DType::F32);
    let drift = distance(merged.forward(input.clone()), quantized.forward(input));
    assert!(drift <= 1e-5, "{drift}");
}
