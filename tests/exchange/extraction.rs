//! Taking an adapter out of a model.

use burn::module::{Module, ParamGroup};
use burn::nn::activation::{Activation, ActivationConfig};
use burn::tensor::DType;
use burn_boft::value::ExtractError;
use burn_boft::{
    Adapter, AdapterConfig, Bias, BoftLinear, Cayley, OftConfig, TargetModules, inject,
};

use super::support::*;
use crate::common::host;
use crate::common::models::{INPUT, Net, linear, numbers};

#[test]
fn extraction_refuses_settings_that_differ_from_the_injection() {
    let error = Adapter::extract_as(&base::<BoftLinear>(), boft()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model carries no adapter; inject one first"
    );

    let oft = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["hidden"]);
    let model = inject(base::<BoftLinear>(), oft.clone().with_coft_radius(0.5)).unwrap();
    let refused =
        |config: AdapterConfig| Adapter::extract_as(&model, config).unwrap_err().to_string();
    assert_eq!(
        refused(oft.clone().into()),
        "the model was adapted with COFT radius 0.5, but the configuration says no COFT radius; extract without a \
         configuration, or give the one that the model was adapted with"
    );
    assert_eq!(
        refused(oft.clone().with_cayley(Cayley::Neumann { terms: 5 }).into()),
        "the model was adapted with the exact Cayley map, but the configuration says the Neumann polynomial of 5 terms; extract \
         without a configuration, or give the one that the model was adapted with"
    );
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract_as(&model, &oft).unwrap_err();
    let expect = |found: &str, expected: &str| ExtractError::Settings {
        found: found.to_string(),
        expected: expected.to_string(),
    };
    assert_eq!(error, expect("BOFT", "OFT"));
    for (config, found, expected) in [
        (boft().with_block_size(2), "block size 4", "block size 2"),
        (boft().with_n_butterfly_factor(1), "2 factors", "1 factor"),
        (boft().with_dropout(0.25), "dropout 0", "dropout 0.25"),
        (boft().with_scale(false), "a scale", "no scale"),
    ] {
        let error = Adapter::extract_as(&model, config).unwrap_err();
        assert_eq!(error, expect(found, expected));
    }
}

#[test]
fn extraction_refuses_a_configuration_of_other_layers() {
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract_as(&model, boft().with_target_modules(["hidden"])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration and the adapted layers differ: adapted and not selected: `output`."
    );
    let one = inject(base::<BoftLinear>(), boft().with_target_modules(["hidden"])).unwrap();
    let error = Adapter::extract_as(&one, boft()).unwrap_err();
    assert!(
        matches!(&error, ExtractError::Targets { not_adapted, .. } if not_adapted == &["output"]),
        "{error}"
    );
    let untrained = inject(base::<BoftLinear>(), boft().with_bias(Bias::None)).unwrap();
    let error = Adapter::extract_as(&untrained, boft()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration trains `hidden.bias`, `output.bias`, which the model has frozen"
    );
}

#[test]
fn extraction_without_settings_finds_those_of_the_injection() {
    for config in [
        AdapterConfig::from(boft()),
        boft()
            .with_bias(Bias::None)
            .with_modules_to_save(["norm", "head"])
            .into(),
        boft()
            .with_bias(Bias::All)
            .with_scale(false)
            .with_dropout(0.125)
            .into(),
        oft()
            .with_block_num(3)
            .with_coft_radius(0.381_889_671_742_117_24)
            .into(),
    ] {
        let model = adapted::<BoftLinear>(&config);
        let (found, given) = (
            Adapter::extract(&model).unwrap(),
            Adapter::extract_as(&model, &config).unwrap(),
        );
        // The names of these layers are their full paths.
        let mut expected = given.config().clone();
        if config.selection().bias == Bias::All {
            // Whatever of the head is not a bias is trained too.
            assert_eq!(found.config().selection().modules_to_save, ["head"]);
        }
        assert_eq!(found.layers(), given.layers());
        assert_eq!(found.tensors(), given.tensors());
        let mut found = found.config().clone();
        for config in [&mut expected, &mut found] {
            match config {
                AdapterConfig::Boft(config) => config.selection.modules_to_save.sort(),
                AdapterConfig::Oft(config) => config.selection.modules_to_save.sort(),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(found, expected);
        // What is extracted attaches to the base and computes the same.
        let adapter = Adapter::extract(&model).unwrap();
        let (again, _) = Adapter::load(saved(&adapter).path()).unwrap();
        let attached = again.attach(base::<BoftLinear>()).unwrap();
        assert_eq!(host(outputs(&attached)), host(outputs(&model)));
    }
}

#[test]
fn extraction_refuses_a_single_trained_bias() {
    let model = adapted::<BoftLinear>(boft().with_bias(Bias::None));
    let group = ParamGroup::from_path("hidden.bias");
    let model = model.set_require_grad_group(group, true);
    let error = Adapter::extract(&model).unwrap_err();
    assert!(
        matches!(&error, ExtractError::LeftBehind { paths } if paths == &["hidden.bias"]),
        "{error}"
    );
}

#[test]
fn extraction_refuses_to_leave_trained_parameters_behind() {
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract_as(&model, boft().with_bias(Bias::None)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`hidden.bias`, `output.bias` would be left behind: they are trained, and no adapter can say so unless whole \
         modules are trained, the biases of all adapted layers, or all biases; name modules in modules_to_save, or \
         freeze what is not meant"
    );
    // `valid()` does not change what was trained.
    let adapter = Adapter::extract_as(&model.valid(), boft()).unwrap();
    assert_eq!(adapter.tensors().len(), 4);
    assert!(Adapter::extract_as(&model.valid(), boft().with_bias(Bias::None)).is_err());
}

/// A layer whose path is also the ending of another's.
#[derive(Module, Debug)]
struct Nested {
    inner: Net<BoftLinear>,
    hidden: BoftLinear,
}

impl Nested {
    fn new() -> Self {
        Self {
            inner: base(),
            hidden: linear([INPUT, 10], 7, DType::F32, &device()).into(),
        }
    }
}

#[test]
fn extraction_names_an_adapted_layer_so_that_no_other_layer_is_meant() {
    let config = oft()
        .with_target_modules("hidden")
        .with_modules_to_save([""; 0])
        .with_bias(Bias::None);
    let model = inject(Nested::new(), config).unwrap();
    let adapter = Adapter::extract(&model).unwrap();
    let targets = adapter.config().selection().target_modules.clone();
    assert_eq!(targets, Some(TargetModules::Regex("hidden".to_string())));
    // A list with this name would miss the adapter of `inner.hidden`.
    let (again, _) = Adapter::load(saved(&adapter).path()).unwrap();
    let attached = again.attach(Nested::new()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
}

/// An activation has nothing to save, and a file that names it would be missing it.
#[test]
fn a_module_without_parameters_is_not_named() {
    #[derive(Module, Debug)]
    struct Block {
        query: BoftLinear,
        activation: Activation,
        head: BoftLinear,
    }
    let device = device();
    let base = Block {
        query: linear([INPUT, 8], 3, DType::F32, &device).into(),
        activation: ActivationConfig::Gelu.init(&device),
        head: linear([8, 5], 4, DType::F32, &device).into(),
    };
    let config = OftConfig::new()
        .with_block_size(4)
        .with_init(INIT)
        .with_target_modules(["query"])
        .with_modules_to_save(["head"]);
    let adapter = Adapter::extract(&inject(base, config).unwrap()).unwrap();
    assert_eq!(adapter.config().selection().modules_to_save, ["head"]);
    let (_, report) = Adapter::load(saved(&adapter).path()).unwrap();
    assert!(report.warnings.is_empty(), "{report}");
}
