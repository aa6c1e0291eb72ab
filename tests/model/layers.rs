//! Every kind of layer that can carry an adapter, compared with the dense oracle.

use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{self, LinearConfig, LinearLayout, PaddingConfig2d};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{AdapterConfig, BoftLinear, Cayley, Init, inject, merge, unload};

use super::oracle::{assert_merges_as_the_oracle, boft, oft};
use crate::common::models::{Net, distance, linear, numbers, rows};
use crate::common::{devices, noise, tensor};

#[test]
fn merging_a_linear_layer_gives_the_weight_of_the_dense_oracle() {
    for (backend, device) in devices() {
        for config in [boft(), boft().with_block_size(2).with_n_butterfly_factor(3)] {
            let base = linear([24, 10], 3, DType::F32, &device);
            let (adapted, merged, _) = assert_merges_as_the_oracle(base, config);
            let input = rows([7, 24], 4, &device);
            let drift = distance(adapted.forward(input.clone()), merged.forward(input));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

/// A convolution in which no two sizes agree: 8 → 10 channels in two groups, 3 × 2 kernels.
pub fn convolution(device: &Device) -> Conv2d {
    let mut convolution = Conv2dConfig::new([8, 10], [3, 2])
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(1, 2, 1, 2))
        .with_dilation([1, 2])
        .with_groups(2)
        .init(device);
    let (weight, bias) = (noise(10 * 4 * 6, 5, 0.4), noise(10, 6, 0.5));
    let weight = tensor(&weight, [10, 4, 3, 2], DType::F32, device);
    convolution.weight = Param::from_tensor(weight);
    convolution.bias = Some(Param::from_tensor(tensor(&bias, [10], DType::F32, device)));
    convolution
}

#[test]
fn merging_a_convolution_gives_the_weight_of_the_dense_oracle() {
    for (backend, device) in devices() {
        for config in [
            AdapterConfig::from(boft()),
            oft().with_block_size(12).into(),
        ] {
            let base = convolution(&device);
            let (adapted, merged, plan) = assert_merges_as_the_oracle(base.clone(), config);
            assert_eq!(
                (
                    plan.layers[0].butterfly.d_input(),
                    plan.layers[0].butterfly.d_output()
                ),
                (24, 10)
            );
            let input: Tensor<4> = rows([3, 8, 9, 7], 7, &device);
            let output = adapted.forward(input.clone());
            let drift = distance(output.clone(), merged.forward(input.clone()));
            assert!(drift <= 1e-5, "{drift} on {backend}");
            assert!(distance(output, base.forward(input)) > 0.1);
        }
    }
}

#[test]
fn merging_oft_gives_the_weight_of_the_dense_oracle_for_every_setting() {
    let cases = [
        (oft(), 24, Some(32)),
        (oft().with_block_size(10), 8, Some(10)),
        (oft().with_block_size(6), 6, None),
        (oft().with_block_num(7), 4, Some(3)),
        (oft().with_block_size(4).with_block_share(true), 4, None),
    ];
    let neumann = [2, 3, 4, 5, 6].into_iter().flat_map(|terms| {
        [Cayley::Neumann { terms }, Cayley::Neumann016 { terms }]
            .map(|cayley| (oft().with_block_size(4).with_cayley(cayley), 4, None))
    });
    let neumann: Vec<_> = neumann.collect();
    for (backend, device) in devices() {
        for (config, block_size, adjusted_from) in cases.iter().chain(&neumann) {
            let base = linear([24, 10], 3, DType::F32, &device);
            let (adapted, merged, plan) = assert_merges_as_the_oracle(base, config);
            let layer = &plan.layers[0];
            assert_eq!(layer.butterfly.block_size(), *block_size, "{config:?}");
            assert_eq!(layer.adjusted_from, *adjusted_from, "{config:?}");
            let stored = if config.block_share {
                1
            } else {
                24 / block_size
            };
            let packed = block_size * (block_size - 1) / 2;
            assert_eq!(numbers(&adapted)["weight.boft.skew"].len(), stored * packed);
            let input = rows([7, 24], 4, &device);
            let drift = distance(adapted.forward(input.clone()), merged.forward(input));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

#[test]
fn a_weight_in_column_layout_merges_like_one_in_row_layout() {
    for (backend, device) in devices() {
        let row = linear([24, 10], 3, DType::F32, &device);
        let column = || {
            let config = LinearConfig::new(24, 10).with_layout(LinearLayout::Col);
            config.init(&device).load_record(column_record(&row))
        };
        assert_eq!(numbers(&column()), numbers(&row), "{backend}");
        let (adapted, merged, _) = assert_merges_as_the_oracle(column(), boft());
        let (_, row, _) = assert_merges_as_the_oracle(row.clone(), boft());
        assert_eq!(numbers(&merged), numbers(&row), "{backend}");
        let input = rows([7, 24], 4, &device);
        let boft = BoftLinear::from(adapted.clone());
        for output in [adapted.forward(input.clone()), boft.forward(input.clone())] {
            let drift = distance(output, row.forward(input.clone()));
            assert!(drift <= 1e-5, "{drift} on {backend}");
        }
    }
}

/// The record of a layer in column layout, which stores the weight transposed.
fn column_record(row: &nn::Linear) -> burn::store::ModuleRecord {
    let transposed = nn::Linear {
        weight: Param::from_tensor(row.weight.val().transpose()),
        bias: row.bias.clone(),
    };
    transposed.into_record()
}

#[test]
fn several_adapters_share_one_base_without_changing_it() {
    for (_, device) in devices() {
        let base = Net::<BoftLinear>::new(1, &device);
        let before = numbers(&base);
        let config = |seed| {
            let init = Init::Random { seed };
            boft()
                .with_init(init)
                .with_target_modules(["hidden", "output"])
        };
        let [a, b] = [1, 2].map(|seed| inject(base.clone(), config(seed)).unwrap());
        let input = rows([7, 24], 4, &device);
        let outputs = [&base, &a, &b].map(|model| model.forward(input.clone()));
        for (x, y) in [(0, 1), (0, 2), (1, 2)] {
            assert!(distance(outputs[x].clone(), outputs[y].clone()) > 0.01);
        }
        let merged = merge(a.clone()).unwrap();
        assert!(distance(merged.forward(input.clone()), outputs[1].clone()) <= 1e-5);
        assert_eq!(distance(b.forward(input), outputs[2].clone()), 0.0);
        for model in [base, unload(a), unload(b)] {
            assert_eq!(numbers(&model), before);
        }
    }
}
