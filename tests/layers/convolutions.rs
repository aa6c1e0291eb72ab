//! Linear layers and convolutions of every kind.

use burn::nn::conv::{
    Conv1dConfig, Conv2d, Conv2dConfig, Conv3dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig,
    ConvTranspose3dConfig, DeformConv2d, DeformConv2dConfig,
};
use burn::nn::{LinearConfig, LinearLayout, PaddingConfig2d};
use burn::tensor::{DType, Tensor};
use burn_boft::{AdapterConfig, BoftConfig, BoftConv2d, BoftLinear, LayerKind, OftConfig};

use crate::check::{Verdict, adapted, boft, device, flat, oft, refused};
use crate::common::models::{linear, rows};
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("Linear", a_linear_layer),
    ("BoftLinear", a_boft_linear_layer),
    ("Linear in column layout", a_linear_layer_in_column_layout),
    ("Conv2d", a_convolution),
    ("BoftConv2d", a_boft_convolution),
    ("Conv1d", || {
        refused(Conv1dConfig::new(16, 12, 3).init(&device()))
    }),
    ("Conv3d", || {
        refused(Conv3dConfig::new([8, 12], [3, 2, 2]).init(&device()))
    }),
    ("ConvTranspose1d", || {
        refused(ConvTranspose1dConfig::new([16, 12], 3).init(&device()))
    }),
    ("ConvTranspose2d", || {
        refused(ConvTranspose2dConfig::new([8, 12], [3, 2]).init(&device()))
    }),
    ("ConvTranspose3d", || {
        refused(ConvTranspose3dConfig::new([8, 12], [3, 2, 2]).init(&device()))
    }),
    ("DeformConv2d", || refused(deformable())),
    (
        "DeformConv2d declared as Conv2d",
        a_declared_deformable_convolution,
    ),
];

fn a_linear_layer() -> Verdict {
    let base = linear([24, 10], 1, DType::F32, &device());
    adapted(base, &[boft(), oft()], |layer| {
        // An input of any rank: its last axis is rotated.
        let four: Tensor<4> = rows([2, 3, 2, 24], 2, &device());
        vec![
            flat(layer.forward(rows([7, 24], 3, &device()))),
            flat(layer.forward(four)),
        ]
    })
}

fn a_boft_linear_layer() -> Verdict {
    let base = BoftLinear::from(linear([24, 10], 1, DType::F32, &device()));
    adapted(base, &[boft(), oft()], |layer| {
        // Few rows rotate the input, many the weight.
        vec![
            flat(layer.forward(rows([1, 24], 2, &device()))),
            flat(layer.forward(rows([64, 24], 3, &device()))),
        ]
    })
}

fn a_linear_layer_in_column_layout() -> Verdict {
    let config = LinearConfig::new(24, 10).with_layout(LinearLayout::Col);
    adapted(config.init(&device()), &[boft(), oft()], |layer| {
        vec![flat(layer.forward(rows([7, 24], 3, &device())))]
    })
}

/// A convolution in which no two sizes agree: 8 → 10 channels in two groups, 3 × 2 kernels.
fn convolution() -> Conv2d {
    Conv2dConfig::new([8, 10], [3, 2])
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(1, 2, 1, 2))
        .with_dilation([1, 2])
        .with_groups(2)
        .init(&device())
}

fn a_convolution() -> Verdict {
    adapted(convolution(), &[boft(), oft()], |layer: &Conv2d| {
        vec![flat(layer.forward(rows([3, 8, 9, 7], 2, &device())))]
    })
}

fn a_boft_convolution() -> Verdict {
    let base = BoftConv2d::from(convolution());
    adapted(base, &[boft(), oft()], |layer: &BoftConv2d| {
        vec![flat(layer.forward(rows([3, 8, 9, 7], 2, &device())))]
    })
}

fn deformable() -> DeformConv2d {
    DeformConv2dConfig::new([4, 6], [3, 2]).init(&device())
}

fn a_declared_deformable_convolution() -> Verdict {
    let declared: [AdapterConfig; 2] = [
        BoftConfig::new()
            .with_block_size(4)
            .with_n_butterfly_factor(2)
            .with_target_modules(".*")
            .with_layer_kind("DeformConv2d", LayerKind::Conv2d)
            .into(),
        OftConfig::new()
            .with_block_size(4)
            .with_target_modules(".*")
            .with_layer_kind("DeformConv2d", LayerKind::Conv2d)
            .into(),
    ];
    adapted(deformable(), &declared, |layer| {
        let input: Tensor<4> = rows([2, 4, 6, 7], 2, &device());
        // Two numbers for each tap of the kernel and each output pixel.
        let offsets: Tensor<4> = rows([2, 2 * 6, 4, 6], 3, &device());
        vec![flat(layer.forward(input, offsets * 0.3, None))]
    })
}
