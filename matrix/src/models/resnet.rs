//! ResNet with both kinds of blocks: convolutions and batch norms inside of enums.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::images::resnet::{ResNet, ResNetContractConfig};
use burn::tensor::{Device, Tensor};
use burn_boft::Bias;

use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

pub fn basic(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<ResNet> {
        name: "ResNet",
        package: "bunsen",
        build: |device| {
            ResNetContractConfig::new(vec![2, 2], 5)
                .with_stem_width(8)
                .init(device)
        },
        forward,
        targets: &["cb1.conv", "cb2.conv", "downsample.conv"],
        // Two convolutions in each of four blocks, and the one that halves the resolution.
        layers: 2 * 4 + 1,
        saved: &["output_fc"],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}

pub fn bottleneck(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<ResNet> {
        name: "ResNet, bottlenecks",
        package: "bunsen",
        build: |device| {
            ResNetContractConfig::new(vec![1, 1], 5)
                .with_stem_width(16)
                .with_bottleneck(true)
                .init(device)
        },
        forward,
        targets: &["cb1.conv", "cb2.conv", "cb3.conv", "downsample.conv"],
        // Both blocks change the number of channels, so each has a convolution beside its three.
        layers: 2 * 4,
        saved: &["output_fc"],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}

fn forward(model: &ResNet, device: &Device) -> Tensor<2> {
    model.forward(noise([3, 3, 32, 32], 1, device))
}
