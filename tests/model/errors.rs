//! Every error of `plan`, `inject` and `merge`: what it names, and that the model is unchanged.

use burn::module::{Lora, Module, ParamGroup};
use burn::nn;
use burn::tensor::{DType, Device};
use burn_boft::model::{InjectError, MergeError, Misfit};
use burn_boft::{
    AdapterConfig, BoftConfig, Cayley, Init, OftConfig, PatternError, RotationError, inject, merge,
    plan, unload,
};

use crate::common::models::{Net, linear, numbers, set, trainable};

type Model = Net<nn::Linear>;

/// `hidden` 24 → 16, `output` 16 → 12, `head` 12 → 5.
fn model() -> Model {
    Net::new(1, &Device::flex().autodiff())
}

fn boft() -> BoftConfig {
    BoftConfig::new().with_target_modules(["hidden"])
}

fn oft() -> OftConfig {
    OftConfig::new().with_target_modules(["hidden"])
}

/// The error of `inject`, after checking that `plan` gives the same one and that the model is unchanged.
#[track_caller]
fn refusal(model: &Model, config: impl Into<AdapterConfig>) -> InjectError {
    let config = config.into();
    let (before, trained) = (numbers(model), trainable(model));
    let error = inject(model.clone(), &config).unwrap_err();
    let planned = plan(model, &config).unwrap_err();
    // Compared as text, since a NaN in a misfit does not equal itself.
    assert_eq!(error.to_string(), planned.to_string());
    assert_eq!(numbers(model), before);
    assert_eq!(trainable(model), trained);
    error
}

#[track_caller]
fn assert_refused(model: &Model, config: impl Into<AdapterConfig>, message: &str) -> Misfit {
    let error = refusal(model, config);
    assert_eq!(error.to_string(), message);
    let [misfit] = error.misfits() else {
        panic!("{error:?}");
    };
    misfit.clone()
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_sizes_that_would() {
    let misfit = assert_refused(
        &model(),
        boft().with_block_size(5),
        "block size 5 does not divide 24 input features of `hidden`; 4 or 6 would",
    );
    assert!(
        matches!(misfit, Misfit::Rotation(RotationError::BlockSize { proposals, .. }) if proposals == [4, 6])
    );
    let misfit = assert_refused(
        &model(),
        boft().with_block_num(5),
        "block count 5 does not divide 24 input features of `hidden`; 4 or 6 would",
    );
    assert!(
        matches!(misfit, Misfit::Rotation(RotationError::BlockCount { proposals, .. }) if proposals == [4, 6])
    );
    let misfit = assert_refused(
        &model(),
        boft().with_block_size(3).with_n_butterfly_factor(2),
        "block size 3 of `hidden` is odd, and 2 factors pair half-blocks; use an even block size or \
         one factor",
    );
    assert!(matches!(
        misfit,
        Misfit::Rotation(RotationError::OddBlock { .. })
    ));
    let misfit = assert_refused(
        &model(),
        boft().with_block_size(4).with_n_butterfly_factor(3),
        "3 factors of block size 4 need a multiple of 4·2^2 input features, but `hidden` has 24; use at \
         most 2 factors, or block size 2 or 6",
    );
    assert!(matches!(
        misfit,
        Misfit::Rotation(RotationError::Factors { largest: 2, .. })
    ));
}

#[test]
fn the_proposed_sizes_are_accepted() {
    for (config, [block_size, block_num, factors]) in [
        (boft().with_block_size(4), [4, 6, 1]),
        (boft().with_block_size(6), [6, 4, 1]),
        (boft().with_block_num(4), [6, 4, 1]),
        (boft().with_block_num(6), [4, 6, 1]),
        (
            boft().with_block_size(2).with_n_butterfly_factor(3),
            [2, 12, 3],
        ),
        (
            boft().with_block_size(6).with_n_butterfly_factor(3),
            [6, 4, 3],
        ),
        (
            boft().with_block_size(4).with_n_butterfly_factor(2),
            [4, 6, 2],
        ),
    ] {
        let plan = plan(&model(), &config).unwrap();
        let butterfly = plan.layers[0].butterfly;
        assert_eq!(
            [
                butterfly.block_size(),
                butterfly.block_num(),
                butterfly.n_butterfly_factor()
            ],
            [block_size, block_num, factors]
        );
        let packed = factors * block_num * block_size * (block_size - 1) / 2;
        let numbers = numbers(&inject(model(), config).unwrap());
        assert_eq!(numbers["hidden.weight.boft.skew"].len(), packed);
    }
}

#[test]
fn blocks_of_one_channel_are_refused() {
    let message = "`hidden` would have blocks of one channel, which cannot rotate; choose a block size \
                   that shares a divisor with its 24 input features, or exclude the layer";
    for config in [
        AdapterConfig::from(boft().with_block_size(1)),
        boft().with_block_num(24).into(),
        oft().with_block_size(1).into(),
        oft().with_block_num(24).into(),
    ] {
        let misfit = assert_refused(&model(), config, message);
        assert!(matches!(
            misfit,
            Misfit::Rotation(RotationError::IdentityBlocks { .. })
        ));
    }
}

#[test]
fn settings_out_of_their_range_are_refused() {
    for dropout in [1.0, -0.1, f64::NAN] {
        let message = format!("dropout {dropout} is outside [0, 1)");
        assert_refused(&model(), boft().with_dropout(dropout), &message);
    }
    for radius in [f64::NAN, 0.0, -1e-3, f64::INFINITY] {
        let message =
            format!("COFT radius {radius} is not a positive finite number; PEFT's default is 6e-5");
        assert_refused(&model(), oft().with_coft_radius(radius), &message);
    }
    for terms in [0, 1] {
        let message = format!(
            "{terms} Neumann terms leave every block at the identity; use 2 or more, PEFT's default is 5"
        );
        for cayley in [Cayley::Neumann { terms }, Cayley::Neumann016 { terms }] {
            assert_refused(&model(), oft().with_cayley(cayley), &message);
        }
    }
}

#[test]
fn zero_factors_are_refused_once_and_not_for_every_layer() {
    let misfit = assert_refused(
        &model(),
        boft()
            .with_n_butterfly_factor(0)
            .with_target_modules("all-linear"),
        "n_butterfly_factor is 0; 1 is block-diagonal OFT, 2 and more are butterflies",
    );
    assert_eq!(misfit, Misfit::Rotation(RotationError::NoFactors));
}

#[test]
fn names_that_select_no_layer_are_refused() {
    assert_refused(
        &model(),
        BoftConfig::new(),
        "target_modules is not set; name the layers to adapt, or use \"all-linear\"",
    );
    assert_refused(
        &model(),
        BoftConfig::new().with_target_modules(["hiden"]),
        "target_modules names `hiden`, which selects nothing in the model; it has `hidden`; correct or remove the name, \
         or set allow_absent_targets",
    );
    let misfit = assert_refused(
        &model(),
        boft().with_exclude_modules("h.*"),
        "target_modules `hidden` match none of the 3 layers that can be adapted (2 of them \
         are excluded by exclude_modules or modules_to_save); it has `hidden`",
    );
    assert!(matches!(misfit, Misfit::NoTarget { excluded: 2, .. }));
    let misfit = assert_refused(
        &model(),
        boft().with_modules_to_save(["heads"]),
        "modules_to_save names `heads`, which the model does not have; it has `head`",
    );
    assert!(matches!(misfit, Misfit::UnknownModuleToSave { .. }));
}

#[test]
fn invalid_patterns_are_refused_with_their_setting() {
    let error = refusal(
        &model(),
        boft()
            .with_target_modules("(hidden")
            .with_exclude_modules("["),
    );
    let settings: Vec<_> = error
        .misfits()
        .iter()
        .map(|misfit| match misfit {
            Misfit::Pattern(PatternError::Invalid {
                setting, pattern, ..
            }) => (*setting, pattern.as_str()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        settings,
        [("target_modules", "(hidden"), ("exclude_modules", "[")]
    );
    for line in error.to_string().lines() {
        assert!(
            line.contains("the pattern `") && line.contains("cannot be used: "),
            "{line}"
        );
    }
    let error = refusal(&model(), boft().with_layers_pattern(["layers"]));
    assert!(error.to_string().starts_with("layers_pattern: "), "{error}");
    assert!(error.to_string().contains("layers_to_transform"), "{error}");
}

#[derive(Module, Debug)]
struct Attention {
    key: nn::Linear,
}

#[derive(Module, Debug)]
struct Stack {
    h: Vec<Attention>,
}

#[derive(Module, Debug)]
struct Decoder {
    model: Stack,
}

#[test]
fn a_layers_pattern_that_finds_no_index_names_the_layer() {
    let key = linear([24, 16], 1, DType::F32, &Device::flex());
    let h = vec![Attention { key }];
    let model = Decoder { model: Stack { h } };
    let config = BoftConfig::new()
        .with_target_modules(["key"])
        .with_layers_to_transform([0]);
    assert!(plan(&model, config.clone().with_layers_pattern(["h"])).is_ok());
    assert!(plan(&model, config.clone().with_layers_pattern(["(h|layers)"])).is_ok());
    // Without the parentheses, `h` ends the first choice, and no index belongs to it.
    let error = inject(model, config.with_layers_pattern(["h|layers"])).unwrap_err();
    let [Misfit::Pattern(PatternError::Undecided { setting, path, .. })] = error.misfits() else {
        panic!("{error:?}");
    };
    assert_eq!(
        (*setting, path.as_str()),
        ("layers_pattern", "model.h.0.key")
    );
    let start = "layers_pattern: the pattern `h|layers` has no answer for `model.h.0.key`: ";
    assert!(error.to_string().starts_with(start), "{error}");
}

#[test]
fn a_weight_that_already_carries_an_adapter_is_refused() {
    let device = Device::flex().autodiff();
    let ours = inject(model(), boft().with_init(Init::Random { seed: 1 })).unwrap();
    let lora = Lora::new(2, 4.0).set_param_group(ParamGroup::from_path("hidden.weight"));
    let theirs = Model::new(1, &device).apply_lora(lora);
    for (model, name) in [(&ours, "boft"), (&theirs, "lora")] {
        let message = format!(
            "`hidden.weight` already carries the reparameterization `{name}`, and Burn keeps one per \
             parameter; merge or unload it first"
        );
        let misfit = assert_refused(model, boft(), &message);
        assert!(matches!(misfit, Misfit::AlreadyAdapted { .. }));
        // Targets elsewhere do not help: a model is injected once.
        assert_refused(model, boft().with_target_modules(["output"]), &message);
    }
    // What is removed leaves the base as it was, of whatever kind it is.
    let base = numbers(&Model::new(1, &device));
    assert_eq!(numbers(&unload(theirs.clone())), base);
    for adapted in [&ours, &theirs] {
        assert!(inject(unload(adapted.clone()), boft()).is_ok());
    }
    assert!(inject(merge(ours).unwrap(), boft()).is_ok());
}

#[test]
fn every_misfit_is_reported_at_once() {
    let config = BoftConfig::new()
        .with_block_size(8)
        .with_n_butterfly_factor(2)
        .with_dropout(1.5)
        .with_modules_to_save(["tail"])
        .with_target_modules("all-linear");
    let error = refusal(&model(), config);
    assert_eq!(error.misfits().len(), 4);
    let lines = [
        "dropout 1.5 is outside [0, 1)",
        "modules_to_save names `tail`, which the model does not have; it has `head`, `hidden`, `output`",
        "2 factors of block size 8 need a multiple of 8·2^1 input features, but `hidden` has 24; use at \
         most 1 factor, or block size 6 or 12",
        "block size 8 does not divide 12 input features of `head`; 6 would",
    ];
    assert_eq!(error.to_string(), lines.join("\n"));
}

#[test]
fn merging_a_model_without_adapters_is_refused() {
    let error = merge(model()).unwrap_err();
    assert_eq!(error, MergeError::NotAdapted);
    assert_eq!(
        error.to_string(),
        "the model carries no adapter; inject one, or use the model as it is"
    );
}

#[test]
fn merging_names_every_layer_that_is_not_finite() {
    let config = BoftConfig::new()
        .with_target_modules(["hidden", "output"])
        .with_init(Init::Random { seed: 1 });
    let model = inject(model(), config).unwrap();
    let spoilt = |path: &str, value: f64| {
        let model = set(model.clone(), path, |mut values| {
            values[1] = value;
            values
        });
        merge(model)
    };
    for (path, layer) in [
        ("hidden.weight", "hidden"),
        ("hidden.weight.boft.skew", "hidden"),
        ("output.weight.boft.scale", "output"),
    ] {
        for value in [f64::NAN, f64::INFINITY] {
            let error = spoilt(path, value).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "merging makes weights that are not finite in `{layer}`; the base or the adapter \
                     holds NaN or infinity"
                ),
                "{value} in {path}"
            );
        }
    }
    // Merging does not check weights without an adapter.
    assert!(spoilt("head.weight", f64::NAN).is_ok());
    let paths = ["hidden.weight", "output.weight"];
    let both = paths.iter().fold(model.clone(), |model, path| {
        set(model, path, |mut values| {
            values[0] = f64::NAN;
            values
        })
    });
    let MergeError::NotFinite { paths } = merge(both).unwrap_err() else {
        panic!();
    };
    assert_eq!(paths, ["hidden", "output"]);
}
