//! Layers that are called as Burn's are, and are laid out in another way.

use burn::module::{Module, Param};
use burn::nn;
use burn::tensor::{DType, Device, Tensor};
use burn_boft::model::{Misfit, Unsupported};
use burn_boft::{Adapter, BoftConfig, Init, LayerKind, candidates, inject, merge, plan};

use crate::common::models::{linear, rows};
use crate::common::{assert_close, host, noise, tensor};

/// Other crates' layers of well-known names.
mod impostors {
    use super::*;

    fn numbers<const D: usize>(shape: [usize; D], seed: u64) -> Param<Tensor<D>> {
        let values = noise(shape.iter().product(), seed, 1.0);
        Param::from_tensor(tensor(&values, shape, DType::F32, &Device::flex()))
    }

    /// `[d_output, d_input]` as in PyTorch, and a gain.
    pub mod with_gain {
        use super::*;

        #[derive(Module, Debug)]
        pub struct Linear {
            pub weight: Param<Tensor<2>>,
            pub gain: Param<Tensor<1>>,
        }

        pub fn new() -> Linear {
            Linear {
                weight: numbers([12, 16], 1),
                gain: numbers([12], 2),
            }
        }
    }

    /// `[d_output, d_input]` as in PyTorch, with the fields of Burn's.
    pub mod turned {
        use super::*;

        #[derive(Module, Debug)]
        pub struct Linear {
            pub weight: Param<Tensor<2>>,
            pub bias: Option<Param<Tensor<1>>>,
        }

        pub fn new(bias: bool) -> Linear {
            Linear {
                weight: numbers([12, 16], 3),
                bias: bias.then(|| numbers([12], 4)),
            }
        }
    }

    /// Channels last.
    pub mod channels_last {
        use super::*;

        #[derive(Module, Debug)]
        pub struct Conv2d {
            pub weight: Param<Tensor<4>>,
            pub bias: Option<Param<Tensor<1>>>,
        }

        pub fn new() -> Conv2d {
            Conv2d {
                weight: numbers([3, 3, 4, 8], 5),
                bias: Some(numbers([8], 6)),
            }
        }
    }

    /// A weight of three axes.
    pub mod grouped {
        use super::*;

        #[derive(Module, Debug)]
        pub struct Linear {
            pub weight: Param<Tensor<3>>,
        }

        pub fn new() -> Linear {
            Linear {
                weight: numbers([2, 16, 12], 7),
            }
        }
    }
}

#[derive(Module, Debug)]
struct Model {
    gain: impostors::with_gain::Linear,
    turned: impostors::turned::Linear,
    silent: impostors::turned::Linear,
    conv: impostors::channels_last::Conv2d,
    grouped: impostors::grouped::Linear,
    real: nn::Linear,
}

fn model() -> Model {
    Model {
        gain: impostors::with_gain::new(),
        turned: impostors::turned::new(true),
        silent: impostors::turned::new(false),
        conv: impostors::channels_last::new(),
        grouped: impostors::grouped::new(),
        real: linear([16, 12], 8, DType::F32, &Device::flex()),
    }
}

#[test]
fn a_layer_whose_fields_or_axes_are_not_those_of_burn_is_refused() {
    for (name, expected) in [
        (
            "gain",
            "a Linear with a field `gain`, which Burn's does not have",
        ),
        (
            "turned",
            "a Linear whose bias [12] does not fit the output axis of its weight [12, 16]",
        ),
        (
            "conv",
            "a Conv2d whose bias [8] does not fit the output axis of its weight [3, 3, 4, 8]",
        ),
        (
            "grouped",
            "a Linear whose weight has 3 axes where Burn's has 2",
        ),
    ] {
        let config = BoftConfig::new().with_target_modules([name, "real"]);
        let error = plan(&model(), config).unwrap_err();
        let [Misfit::UnsupportedTarget { path, reason }] = error.misfits() else {
            panic!("{error}");
        };
        assert_eq!(path, name);
        assert!(reason.to_string().starts_with(expected), "{reason}");
    }
    // "all-linear" names them all.
    let config = BoftConfig::new().with_target_modules("all-linear");
    let error = plan(&model(), config).unwrap_err();
    assert_eq!(error.misfits().len(), 3, "{error}");
    let found = candidates(&model());
    let layers: Vec<_> = found
        .layers
        .iter()
        .map(|layer| layer.path.as_str())
        .collect();
    // Nothing tells the one without a bias from Burn's own: it has to be named.
    assert_eq!(layers, ["silent", "real"]);
}

#[test]
fn layers_can_be_taken_out_by_type_or_path() {
    let linears = BoftConfig::new()
        .with_target_modules("all-linear")
        .with_layer_kind("silent", None);
    let error = plan(&model(), &linears).unwrap_err();
    assert_eq!(error.misfits().len(), 3, "{error}");
    let config = linears
        .with_layer_kind("gain", None)
        .with_layer_kind("turned", None)
        .with_layer_kind("grouped", None);
    let plan = plan(&model(), config).unwrap();
    let paths: Vec<_> = plan
        .layers
        .iter()
        .map(|layer| layer.path.as_str())
        .collect();
    assert_eq!(paths, ["real"]);
    let config = BoftConfig::new()
        .with_target_modules(["real"])
        .with_layer_kind("Linear", None);
    let error = burn_boft::plan(&model(), config).unwrap_err();
    assert!(
        matches!(error.misfits(), [Misfit::NoTarget { .. }]),
        "{error}"
    );
}

/// A layer of another name, laid out as Burn's.
#[derive(Module, Debug)]
struct Projection {
    weight: Param<Tensor<2>>,
    temperature: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Named {
    projection: Projection,
    real: nn::Linear,
}

impl Named {
    fn new() -> Self {
        let device = Device::flex();
        Self {
            projection: Projection {
                weight: linear([16, 12], 1, DType::F32, &device).weight,
                temperature: Param::from_tensor(rows([12], 2, &device)),
            },
            real: linear([12, 5], 3, DType::F32, &device),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let Projection {
            weight,
            temperature,
        } = &self.projection;
        let hidden = input.matmul(weight.val()) * temperature.val().unsqueeze::<2>();
        self.real.forward(hidden)
    }
}

#[test]
fn a_layer_of_another_type_is_adapted_where_its_kind_is_declared() {
    let config = BoftConfig::new()
        .with_target_modules(["projection"])
        .with_init(Init::Random { seed: 6 });
    let error = plan(&Named::new(), &config).unwrap_err();
    let [Misfit::UnsupportedTarget { reason, .. }] = error.misfits() else {
        panic!("{error}");
    };
    assert!(matches!(reason, Unsupported::Type { type_name } if type_name == "Projection"));
    for name in ["Projection", "projection"] {
        let config = config.clone().with_layer_kind(name, LayerKind::Linear);
        let model = inject(Named::new(), &config).unwrap();
        let output = |model: &Named| host(model.forward(rows([3, 16], 9, &Device::flex())));
        let adapted = output(&model);
        assert!(
            adapted
                .iter()
                .zip(output(&Named::new()))
                .any(|(a, b)| (a - b).abs() > 0.05)
        );
        assert_close(
            name,
            &output(&merge(model.clone()).unwrap()),
            &adapted,
            1e-6,
        );
        // The model knows what was declared.
        let adapter = Adapter::extract(&model).unwrap();
        let attached = adapter.attach(Named::new()).unwrap();
        assert_eq!(output(&attached), adapted);
    }
}
