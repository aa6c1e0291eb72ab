//! A network of convolutions with rectangular kernels and of linear layers.

use burn::tensor::{Device, Tensor};
use burn_boft::{Bias, BoftConfig, LayerKind, OftConfig, candidates, inject};
use burn_boft_onnx_example::Classifier;

use crate::lifecycle::{Learnt, computes_what_pytorch_computed, walk};

#[allow(clippy::all, dead_code)]
mod conv {
    include!(concat!(env!("OUT_DIR"), "/conv.rs"));
}

impl Classifier for conv::Model {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self.forward(images)
    }
}

fn model() -> (conv::Model, Device) {
    let device = Device::flex().autodiff();
    (conv::Model::from_embedded(&device), device)
}

#[test]
fn the_importer_keeps_what_pytorch_computes() {
    let (model, device) = model();
    computes_what_pytorch_computed(&model, "conv", &device);
}

#[test]
fn boft_trains_travels_and_merges() {
    let (model, device) = model();
    let config = BoftConfig::new()
        .with_block_size(4)
        .with_n_butterfly_factor(2)
        .with_target_modules(["conv2d2", "linear1", "linear2"])
        .with_bias(Bias::AdapterOnly);
    let learnt = Learnt {
        paths: &[
            "conv2d2.weight.boft.scale",
            "conv2d2.weight.boft.skew",
            "linear1.bias",
            "linear1.weight.boft.scale",
            "linear1.weight.boft.skew",
            "linear2.bias",
            "linear2.weight.boft.scale",
            "linear2.weight.boft.skew",
        ],
        // Two factors of six numbers a block, the scales, and the two biases.
        count: 2 * (72 + 96 + 40) / 4 * 6 + (20 + 40 + 10) + (40 + 10),
    };
    walk(&model, config, learnt, &device);
}

#[test]
fn oft_trains_travels_and_merges() {
    let (model, device) = model();
    let config = OftConfig::new()
        .with_block_size(6)
        .with_target_modules(["conv2d1", "conv2d2", "linear1"])
        .with_modules_to_save(["linear2"]);
    let learnt = Learnt {
        paths: &[
            "conv2d1.weight.boft.skew",
            "conv2d2.weight.boft.skew",
            "linear1.weight.boft.skew",
            "linear2.bias",
            "linear2.weight",
        ],
        // Fifteen numbers a block, and the head.
        count: (6 + 72 + 96) / 6 * 15 + (40 * 10 + 10),
    };
    walk(&model, config, learnt, &device);
}

/// A weight that multiplies from the left is a parameter of the generated model and no layer.
#[test]
fn what_is_no_layer_is_refused_by_name() {
    let (model, _) = model();
    let found = candidates(&model);
    let layers = found.layers.iter();
    let layers: Vec<_> = layers
        .map(|layer| (layer.path.as_str(), layer.kind, &layer.shape[..]))
        .collect();
    assert_eq!(
        layers,
        [
            ("conv2d1", LayerKind::Conv2d, &[12, 1, 3, 2][..]),
            ("conv2d2", LayerKind::Conv2d, &[20, 12, 2, 3][..]),
            ("linear1", LayerKind::Linear, &[96, 40][..]),
            ("linear2", LayerKind::Linear, &[40, 10][..]),
        ]
    );
    let [mix, ..] = &found.others[..] else {
        panic!("{found}");
    };
    assert_eq!(
        (mix.path.as_str(), &mix.shape[..]),
        ("constant1", &[6, 20][..])
    );

    let config = BoftConfig::new().with_target_modules(["linear1", "constant1"]);
    let error = inject(model, config).unwrap_err();
    assert_eq!(error.misfits().len(), 1, "{error}");
    assert!(error.to_string().contains("`constant1`"), "{error}");
}
