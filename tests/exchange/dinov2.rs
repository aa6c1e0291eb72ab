//! The encoder of DINOv2 with SwiGLU, named as in the files of transformers 4.

use burn::module::Module;
use burn_boft::BoftLinear;

#[derive(Module, Debug)]
pub struct Encoder {
    layer: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    attention: Attention,
    mlp: SwiGlu,
}

#[derive(Module, Debug)]
struct Attention {
    attention: Projections,
    output: Dense,
}

#[derive(Module, Debug)]
struct Projections {
    query: BoftLinear,
    key: BoftLinear,
    value: BoftLinear,
}

#[derive(Module, Debug)]
struct Dense {
    dense: BoftLinear,
}

#[derive(Module, Debug)]
struct SwiGlu {
    weights_in: BoftLinear,
    weights_out: BoftLinear,
}

impl Encoder {
    /// Two layers. `linear` makes the linear layer of each path, which starts below the encoder.
    pub fn new(mut linear: impl FnMut(&str) -> BoftLinear) -> Self {
        let mut layer = |index: usize| {
            let mut linear = |name: &str| linear(&format!("layer.{index}.{name}"));
            Layer {
                attention: Attention {
                    attention: Projections {
                        query: linear("attention.attention.query"),
                        key: linear("attention.attention.key"),
                        value: linear("attention.attention.value"),
                    },
                    output: Dense {
                        dense: linear("attention.output.dense"),
                    },
                },
                mlp: SwiGlu {
                    weights_in: linear("mlp.weights_in"),
                    weights_out: linear("mlp.weights_out"),
                },
            }
        };
        Self {
            layer: vec![layer(0), layer(1)],
        }
    }
}
