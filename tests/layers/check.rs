//! What a row of the table claims, found out by what a model computes.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::nn;
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{AdapterConfig, BoftConfig, Cayley, OftConfig, inject, merge, plan, summary};

use crate::common::by_hand::rotated_weight;
pub use crate::common::by_hand::{flat, parameter, perturbed, relative};
use crate::common::models::{gradients, linear, numbers, set, trainable};
use crate::common::{host, noise};

/// What was found out about a layer or a structure.
#[derive(Debug)]
pub enum Verdict {
    /// Adapters are attached to these weights, and everything that was computed with them is right.
    Adapted(BTreeSet<String>),
    /// The injection is refused with this message.
    Refused(String),
}

/// A device that differentiates.
pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Two factors, and a scale.
pub fn boft() -> AdapterConfig {
    let config = BoftConfig::new()
        .with_block_size(4)
        .with_n_butterfly_factor(2);
    config.with_target_modules(".*").into()
}

pub fn oft() -> AdapterConfig {
    let config = OftConfig::new().with_block_size(4);
    config.with_target_modules(".*").into()
}

/// The polynomial of PEFT's default, which is not orthogonal.
pub fn neumann() -> AdapterConfig {
    let config = OftConfig::new()
        .with_block_size(4)
        .with_cayley(Cayley::Neumann { terms: 5 });
    config.with_target_modules(".*").into()
}

/// Injects with each of these configurations and compares what the model computes.
///
/// 1. An adapter at its start changes no output.
/// 2. With other numbers it gives the outputs of a model whose weights were rotated by hand, and those differ from the
///    base's.
/// 3. Merging gives the same outputs, and the weights that were rotated by hand.
/// 4. Every number of the adapters gets a gradient, and nothing else does.
///
/// The weights are the same for every configuration.
pub fn adapted<M: Module>(
    base: M,
    configs: &[AdapterConfig],
    forward: impl Fn(&M) -> Vec<Tensor<1>>,
) -> Verdict {
    let mut verdicts = configs
        .iter()
        .map(|config| adapted_with(base.clone(), config, &forward));
    let first = verdicts.next().unwrap();
    verdicts.for_each(|other| assert_eq!(other, first));
    Verdict::Adapted(first)
}

fn adapted_with<M: Module>(
    base: M,
    config: &AdapterConfig,
    forward: impl Fn(&M) -> Vec<Tensor<1>>,
) -> BTreeSet<String> {
    let outputs = |model: &M| {
        forward(model)
            .into_iter()
            .flat_map(host)
            .collect::<Vec<_>>()
    };
    let expected = outputs(&base);
    let plan = plan(&base, config).unwrap();
    assert!(!plan.layers.is_empty());
    let start = inject(base.clone(), config).unwrap();
    assert!(relative(&outputs(&start), &expected) <= 1e-6);

    let adapted = perturbed(start);
    let moved = outputs(&adapted);
    assert!(
        relative(&moved, &expected) > 1e-2,
        "the adapters do nothing"
    );
    let (before, mut turned) = (numbers(&adapted), base.clone());
    for layer in &plan.layers {
        let weight = rotated_weight(layer, config, &before);
        turned = set(turned, &parameter(&layer.path, "weight"), |_| {
            weight.clone()
        });
    }
    let drift = relative(&moved, &outputs(&turned));
    assert!(
        drift <= 1e-5,
        "{drift:.1e} from the weights rotated by hand"
    );
    let merged = merge(adapted.clone()).unwrap();
    let drift = relative(&outputs(&merged), &moved);
    assert!(drift <= 1e-5, "{drift:.1e} by merging");
    let (merged, turned) = (numbers(&merged), numbers(&turned));
    assert!(merged.keys().eq(turned.keys()));
    for (path, numbers) in &merged {
        let size = turned[path].iter().fold(1.0f64, |max, x| max.max(x.abs()));
        let pairs = numbers.iter().zip(&turned[path]);
        let drift = pairs.fold(0.0f64, |max, (a, b)| max.max((a - b).abs())) / size;
        assert!(drift <= 2e-6, "{path}: {drift:.1e}");
    }

    let losses = forward(&adapted)
        .into_iter()
        .zip(30..)
        .map(|(output, seed)| {
            let upstream = noise(output.dims()[0], seed, 1.0);
            (output * crate::common::tensor(&upstream, [upstream.len()], DType::F32, &device()))
                .sum()
        });
    let grads = losses.reduce(|a, b| a + b).unwrap().backward();
    let parts = before.keys().filter(|path| path.contains(".boft."));
    let parts: BTreeSet<_> = parts.cloned().collect();
    let gradients = gradients(&adapted, &grads);
    assert_eq!(gradients.keys().cloned().collect::<BTreeSet<_>>(), parts);
    for (path, gradient) in gradients {
        let size = gradient.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        assert!(
            size > 1e-6 && size.is_finite(),
            "the gradient of {path} is {size:.1e}"
        );
    }
    assert_eq!(trainable(&adapted), parts);
    assert_eq!(summary(&adapted).layers.len(), plan.layers.len());
    let weights = plan
        .layers
        .iter()
        .map(|layer| parameter(&layer.path, "weight"));
    weights.collect()
}

/// A layer, and a linear layer that can be adapted.
#[derive(Module, Debug)]
pub struct Beside<T: Module> {
    pub layer: T,
    pub linear: nn::Linear,
}

impl<T: Module> Beside<T> {
    pub fn new(layer: T) -> Self {
        Self {
            layer,
            linear: linear([16, 10], 7, DType::F32, &device()),
        }
    }
}

/// Asks for a layer by its name, which is refused, and by a pattern that matches it, which passes over it.
///
/// The message is the one that names the layer.
pub fn refused<T: Module + burn::module::ModuleDisplay>(layer: T) -> Verdict {
    refused_by(layer, &[boft(), oft()])
}

/// [`refused`], for these configurations only.
pub fn refused_by<T: Module + burn::module::ModuleDisplay>(
    layer: T,
    configs: &[AdapterConfig],
) -> Verdict {
    let model = Beside::new(layer);
    let mut texts = configs.iter().map(|config| {
        let text = error(&model, config, ["layer", "linear"]);
        assert!(text.contains("`layer`"), "{text}");
        let before = numbers(&model);
        let adapted = perturbed(inject(model.clone(), config).unwrap());
        let paths = plan(&model, config).unwrap().layers.into_iter();
        assert_eq!(
            paths.map(|layer| layer.path).collect::<Vec<_>>(),
            ["linear"]
        );
        let after = numbers(&merge(adapted).unwrap());
        for (path, numbers) in &before {
            let is_same = after[path] == *numbers;
            assert_eq!(is_same, path != "linear.weight", "{path}");
        }
        text
    });
    let first = texts.next().unwrap();
    texts.for_each(|text| assert_eq!(text, first));
    Verdict::Refused(first)
}

/// The message by which a model refuses targets. It is one line about one misfit.
pub fn error<M: Module, const N: usize>(
    model: &M,
    config: &AdapterConfig,
    names: [&str; N],
) -> String {
    let config: AdapterConfig = match config.clone() {
        AdapterConfig::Boft(config) => config.with_target_modules(names).into(),
        AdapterConfig::Oft(config) => config.with_target_modules(names).into(),
        other => panic!("{other:?}"),
    };
    let error = inject(model.clone(), config).unwrap_err();
    let text = error.to_string();
    assert_eq!(
        (error.misfits().len(), text.lines().count()),
        (1, 1),
        "{text}"
    );
    text
}
