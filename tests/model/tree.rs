//! Adapted layers in every place where a module can hold another: lists, options, tuples, arrays, enums.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::nn;
use burn::nn::conv::Conv2d;
use burn::tensor::{DType, Device, Int, Tensor};
use burn_boft::{BoftLinear, inject};

use super::oracle::{assert_merges_as_the_oracle, boft};
use crate::common::models::{linear, numbers};
use crate::common::{devices, host};

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
            project: crate::common::models::linear([16, 8], seed, DType::F32, device),
            norm: nn::LayerNormConfig::new(8).init(device),
        };
        let embedding = nn::EmbeddingConfig::new(40, 16).init(device);
        Self {
            embedding,
            first: linear(1),
            stack: vec![inner(2), inner(4)],
            present: Some(linear(6).into()),
            absent: None,
            pair: (linear(8), super::layers::convolution(device)),
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

#[test]
fn every_layer_of_a_module_tree_is_found_under_its_path() {
    for (backend, device) in devices() {
        let convolution = BTreeSet::from([CONVOLUTION]);
        let linear = BTreeSet::from(LINEAR);
        let all: BTreeSet<_> = linear.union(&convolution).copied().collect();
        for (config, expected) in [
            (boft(), &all),
            (boft().with_target_modules("all-linear"), &linear),
            (boft().with_exclude_modules(LINEAR), &convolution),
        ] {
            let model = Tree::new(&device);
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
fn an_embedding_is_not_adapted_by_a_pattern_that_matches_it() {
    let device = Device::flex();
    let model = Tree::new(&device);
    let tokens = Tensor::from_data([[3, 39, 0], [7, 7, 21]], &device);
    let expected = host(model.embed(tokens.clone()));
    let adapted = inject(model, boft()).unwrap();
    assert_eq!(host(adapted.embed(tokens)), expected);
    assert!(expected.iter().any(|&value| value != 0.0));
}
