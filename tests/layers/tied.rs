//! Weights that two places of a model share.

use burn::module::{Module, Param, ParamId};
use burn::nn;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Tensor};
use burn_boft::model::Misfit;
use burn_boft::{Adapter, AdapterConfig, BoftConfig, OftConfig, inject, merge};

use crate::check::{Verdict, adapted, boft, device, flat, oft, perturbed};
use crate::common::models::{linear, numbers, rows, set};
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("One weight in two layers, both of them targets", both),
    ("One weight in two layers, one of them a target", one),
    (
        "A weight that a layer shares with the forward pass of its owner",
        in_the_forward_pass,
    ),
];

#[derive(Module, Debug)]
struct Tied {
    first: nn::Linear,
    second: nn::Linear,
}

impl Tied {
    /// One weight in two layers, each with a bias of its own.
    fn new() -> Self {
        let first = linear([16, 10], 1, DType::F32, &device());
        let mut second = linear([16, 10], 3, DType::F32, &device());
        second.weight = first.weight.clone();
        Self { first, second }
    }

    fn forward(&self) -> Vec<Tensor<1>> {
        [(&self.first, 8), (&self.second, 9)]
            .map(|(layer, seed)| flat(layer.forward(rows([7, 16], seed, &device()))))
            .into()
    }

    fn ids(&self) -> [ParamId; 2] {
        [self.first.weight.id, self.second.weight.id]
    }
}

/// Both places would get an adapter. An adapter that both share would be trained at the first place only, so there is no
/// right way to do it.
fn both() -> Verdict {
    let texts = [boft(), oft()].map(|config| {
        let error = inject(Tied::new(), config).unwrap_err();
        let [Misfit::Tied { path, first }] = error.misfits() else {
            panic!("{error}");
        };
        assert_eq!((path.as_str(), first.as_str()), ("second", "first"));
        error.to_string()
    });
    assert_eq!(texts[0], texts[1]);
    Verdict::Refused(texts[0].clone())
}

/// Only the target is rotated, and it is saved and merged once; the other place keeps the base.
fn one() -> Verdict {
    let configs: [AdapterConfig; 2] = [
        BoftConfig::new()
            .with_n_butterfly_factor(2)
            .with_target_modules(["second"])
            .into(),
        OftConfig::new()
            .with_block_size(4)
            .with_target_modules(["second"])
            .into(),
    ];
    for config in &configs {
        let base = Tied::new();
        let model = perturbed(inject(base.clone(), config).unwrap());
        let adapter = Adapter::extract(&model).unwrap();
        let paths = adapter.layers().iter().map(|layer| layer.path());
        assert_eq!(paths.collect::<Vec<_>>(), ["second"]);
        let attached = adapter.attach(base.clone()).unwrap();
        assert_eq!(numbers(&attached), numbers(&model));
        let merged = numbers(&merge(model).unwrap());
        assert_eq!(merged["first.weight"], numbers(&base)["first.weight"]);
        assert_ne!(merged["second.weight"], merged["first.weight"]);
    }
    adapted(Tied::new(), &configs, Tied::forward)
}

/// A model that scores its hidden states against its embedding, as many language models do.
#[derive(Module, Debug)]
struct Language {
    embedding: nn::Embedding,
    hidden: nn::Linear,
    back: nn::Linear,
}

impl Language {
    fn forward(&self) -> Vec<Tensor<1>> {
        let tokens = Tensor::from_data([[3, 9, 0], [7, 7, 10]], &device());
        let hidden = self.hidden.forward(self.embedding.forward(tokens)).tanh();
        let hidden = self.back.forward(hidden);
        let table = self.embedding.weight.val().transpose().unsqueeze::<3>();
        vec![flat(hidden.matmul(table))]
    }
}

/// There is one parameter, so both uses read the rotated weight, and it is trained by the gradients of both.
fn in_the_forward_pass() -> Verdict {
    let base = Language {
        embedding: nn::EmbeddingConfig::new(11, 16).init(&device()),
        hidden: linear([16, 24], 2, DType::F32, &device()),
        back: linear([24, 16], 4, DType::F32, &device()),
    };
    adapted(base, &[oft()], Language::forward)
}

#[test]
fn a_tied_weight_can_be_untied_and_both_places_adapted() {
    let mut base = Tied::new();
    base.second.weight = Param::from_tensor(base.second.weight.val());
    let Verdict::Adapted(weights) = adapted(base, &[boft(), oft()], Tied::forward) else {
        panic!("not adapted");
    };
    assert_eq!(weights.len(), 2);
}

/// Records keep the ids of parameters, so that two layers from one record have the same ones.
#[test]
fn layers_from_one_record_that_were_trained_apart_are_not_tied() {
    let mut base = Tied::new();
    let record = base.first.clone().into_record();
    base.second = linear([16, 10], 3, DType::F32, &device()).load_record(record);
    let base = set(base, "second.weight", |old| {
        old.into_iter().map(|x| 1.25 * x).collect()
    });
    let [first, second] = base.ids();
    assert_eq!(
        first, second,
        "Burn gives layers from one record ids of their own"
    );
    let Verdict::Adapted(weights) = adapted(base, &[boft(), oft()], Tied::forward) else {
        panic!("not adapted");
    };
    assert_eq!(weights.len(), 2);
}

/// Why two adapters of one weight cannot share their numbers. If this fails, Burn steps tied parameters together, and tied
/// targets could share an adapter.
#[test]
fn burn_steps_a_tied_parameter_at_its_first_place_only() {
    let model = Tied::new();
    let before = numbers(&model);
    let losses = model
        .forward()
        .into_iter()
        .map(|output| output.square().sum());
    let loss = losses.reduce(|a, b| a + b).unwrap();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    let mut optimizer = SgdConfig::new().init();
    let after = numbers(&optimizer.step(0.1, model, grads).valid());
    assert_ne!(after["first.weight"], before["first.weight"]);
    assert_eq!(after["second.weight"], before["second.weight"]);
}
