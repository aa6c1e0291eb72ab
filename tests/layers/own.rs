//! Layers and parameters that a user writes.

use burn::module::{Module, ModuleDisplay, Param};
use burn::nn;
use burn::tensor::{DType, Tensor};
use burn_boft::peft::{Folder, LoadOptions};
use burn_boft::{Adapter, AdapterConfig, BoftConfig, LayerKind, OftConfig, inject};

use crate::check::{Verdict, adapted, boft, device, error, flat, oft, perturbed, refused};
use crate::common::models::{linear, numbers, rows};
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    (
        "A struct of your own called Linear, laid out as Burn's",
        a_twin,
    ),
    (
        "A struct of your own called Linear, laid out in another way",
        an_impostor,
    ),
    (
        "A struct of your own called Linear, with other fields",
        || refused_as_a_target(gain()),
    ),
    ("A struct of your own under another name", || {
        refused(Projection::new().scaled)
    }),
    (
        "A struct of your own under another name, declared by with_layer_kind",
        a_declared_layer,
    ),
    (
        "A parameter that no layer owns, by its path",
        a_bare_parameter,
    ),
    (
        "A list of parameters, one of them by its path",
        parameters_in_a_list,
    ),
    ("The weight of a layer, by its path", || {
        let model = crate::check::Beside::new(nn::LayerNormConfig::new(16).init(&device()));
        Verdict::Refused(error(&model, &boft(), ["linear.weight"]))
    }),
    ("The bias of a layer, by its path", || {
        let model = crate::check::Beside::new(nn::LayerNormConfig::new(16).init(&device()));
        Verdict::Refused(error(&model, &boft(), ["linear.bias"]))
    }),
];

fn parameter<const D: usize>(shape: [usize; D], seed: u64) -> Param<Tensor<D>> {
    Param::from_tensor(rows(shape, seed, &device()))
}

mod twin {
    use super::*;

    /// Another crate's linear layer, which multiplies as Burn's does.
    #[derive(Module, Debug)]
    pub struct Linear {
        pub weight: Param<Tensor<2>>,
        pub bias: Option<Param<Tensor<1>>>,
        pub name: String,
    }
}

fn a_twin() -> Verdict {
    let base = twin::Linear {
        weight: parameter([16, 10], 1),
        bias: Some(parameter([10], 2)),
        name: "constants are no fields of a traversal".to_string(),
    };
    adapted(base, &[boft(), oft()], |layer| {
        let output = rows([7, 16], 3, &device()).matmul(layer.weight.val());
        vec![flat(
            output + layer.bias.as_ref().unwrap().val().unsqueeze::<2>(),
        )]
    })
}

/// `[d_output, d_input]` as in PyTorch: the length of the bias tells.
fn an_impostor() -> Verdict {
    refused_as_a_target(twin::Linear {
        weight: parameter([10, 16], 1),
        bias: Some(parameter([10], 2)),
        name: String::new(),
    })
}

mod with_gain {
    use super::*;

    #[derive(Module, Debug)]
    pub struct Linear {
        pub weight: Param<Tensor<2>>,
        pub gain: Param<Tensor<1>>,
    }
}

fn gain() -> with_gain::Linear {
    with_gain::Linear {
        weight: parameter([16, 10], 1),
        gain: parameter([10], 2),
    }
}

/// A layer that looks like one of Burn's is refused even where only a pattern selects it, since passing over it would
/// leave out a layer that the pattern means.
fn refused_as_a_target<T: Module + ModuleDisplay>(layer: T) -> Verdict {
    let model = crate::check::Beside::new(layer);
    let texts = [boft(), oft()].map(|config| error(&model, &config, ["layer", "linear"]));
    assert_eq!(texts[0], texts[1]);
    let by_pattern = burn_boft::inject(model, boft()).unwrap_err();
    assert_eq!(by_pattern.to_string(), texts[0]);
    Verdict::Refused(texts[0].clone())
}

#[derive(Module, Debug)]
struct Scaled {
    weight: Param<Tensor<2>>,
    temperature: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Projection {
    scaled: Scaled,
    linear: nn::Linear,
}

impl Projection {
    fn new() -> Self {
        Self {
            scaled: Scaled {
                weight: parameter([16, 24], 1),
                temperature: parameter([24], 2),
            },
            linear: linear([24, 10], 3, DType::F32, &device()),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = input.matmul(self.scaled.weight.val());
        let temperature = self.scaled.temperature.val().unsqueeze::<2>();
        self.linear.forward(hidden * temperature)
    }
}

fn a_declared_layer() -> Verdict {
    let declared: [AdapterConfig; 2] = [
        BoftConfig::new()
            .with_block_size(4)
            .with_n_butterfly_factor(2)
            .with_target_modules(".*")
            .with_layer_kind("Scaled", LayerKind::Linear)
            .into(),
        OftConfig::new()
            .with_block_size(4)
            .with_target_modules(".*")
            .with_layer_kind("scaled", LayerKind::Linear)
            .into(),
    ];
    adapted(Projection::new(), &declared, |model| {
        vec![flat(model.forward(rows([7, 16], 4, &device())))]
    })
}

/// No type says what was declared, and PEFT's settings have no place for it.
#[test]
fn declared_kinds_survive_saving_loading_and_attaching() {
    let config = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(".*")
        .with_layer_kind("Scaled", LayerKind::Linear)
        .with_layer_kind("linear", None);
    let model = perturbed(inject(Projection::new(), &config).unwrap());
    for adapter in [
        Adapter::extract(&model).unwrap(),
        Adapter::extract_as(&model, &config).unwrap(),
    ] {
        let folder = tempfile::tempdir().unwrap();
        adapter.save(folder.path()).unwrap();
        let (loaded, report) = Adapter::load(folder.path()).unwrap();
        assert!(report.warnings.is_empty(), "{report}");
        assert_eq!(loaded.config(), adapter.config());
        let attached = loaded.attach(Projection::new()).unwrap();
        assert_eq!(numbers(&attached), numbers(&model));
    }
}

/// PEFT leaves the metadata out when it saves an adapter again.
#[test]
fn kinds_that_a_file_has_lost_are_declared_where_it_is_loaded() {
    let config = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["scaled"])
        .with_layer_kind("Scaled", LayerKind::Linear);
    let model = perturbed(inject(Projection::new(), &config).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let adapter = Adapter::extract_as(&model, &config).unwrap();
    adapter.save(folder.path()).unwrap();
    let path = folder.path();
    let options = LoadOptions::new().with_layer_kind("Scaled", LayerKind::Linear);
    // What is declared here counts after what the file says.
    let taken_out = LoadOptions::new().with_layer_kind("scaled", None);
    let (loaded, _) = Adapter::load_with(path, &taken_out).unwrap();
    let error = loaded.attach(Projection::new()).unwrap_err().to_string();
    assert!(
        error.contains("which layer_kinds says is not to be adapted"),
        "{error}"
    );

    let mut files = Folder::read(path).unwrap();
    files.metadata.remove("burn_boft.layer_kinds").unwrap();
    files.write(path).unwrap();
    let (loaded, _) = Adapter::load(path).unwrap();
    let error = loaded.attach(Projection::new()).unwrap_err().to_string();
    assert!(error.contains("an adapter of `scaled`"), "{error}");
    let (loaded, report) = Adapter::load_with(path, &options).unwrap();
    assert!(report.warnings.is_empty(), "{report}");
    assert_eq!(loaded.config(), adapter.config());
    let attached = loaded.attach(Projection::new()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
    // Saved here, it has the line again.
    loaded.save(path).unwrap();
    let (again, _) = Adapter::load(path).unwrap();
    assert_eq!(again.config(), adapter.config());
}

#[test]
fn loading_warns_of_declared_kinds_that_it_cannot_read() {
    let config = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["scaled"])
        .with_layer_kind("Scaled", LayerKind::Linear);
    let model = inject(Projection::new(), &config).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let adapter = Adapter::extract_as(&model, &config).unwrap();
    adapter.save(folder.path()).unwrap();
    let mut files = Folder::read(folder.path()).unwrap();
    let kinds = files.metadata.get_mut("burn_boft.layer_kinds").unwrap();
    assert_eq!(kinds, r#"[["Scaled","Linear"]]"#);
    *kinds = r#"[["Scaled","Conv9d"]]"#.to_string();
    files.write(folder.path()).unwrap();
    let (loaded, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "`burn_boft.layer_kinds` in the metadata of the tensors cannot be read, so layers are taken for what \
             their types say"
        ]
    );
    assert!(loaded.config().selection().layer_kinds.is_empty());
}

#[derive(Module, Debug)]
struct Bare {
    projection: Param<Tensor<2>>,
    heads: Vec<Param<Tensor<2>>>,
    linear: nn::Linear,
}

fn bare() -> Bare {
    Bare {
        projection: parameter([16, 24], 1),
        heads: vec![parameter([16, 24], 2), parameter([16, 24], 3)],
        linear: linear([24, 10], 4, DType::F32, &device()),
    }
}

fn a_bare_parameter() -> Verdict {
    Verdict::Refused(error(&bare(), &boft(), ["projection", "linear"]))
}

fn parameters_in_a_list() -> Verdict {
    Verdict::Refused(error(&bare(), &boft(), ["heads.1", "linear"]))
}
