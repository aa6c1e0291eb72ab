//! Swin Transformer V2: attention in shifted windows, and a stage of half the resolution.

use bunsen::burner::module::ModuleInit;
use bunsen::kits::images::swin::v2::{
    LayerConfig, SwinTransformerV2, SwinTransformerV2ContractConfig,
};
use burn_boft::Bias;

use crate::check::{Failure, Method, Row, Subject, check};
use crate::numbers::noise;

const DEPTHS: [usize; 2] = [2, 2];

pub fn run(method: Method) -> Result<Row, Failure> {
    let subject = Subject::<SwinTransformerV2> {
        name: "SwinV2",
        package: "bunsen",
        build: |device| {
            let stage = |(depth, num_heads)| LayerConfig { depth, num_heads };
            let stages = DEPTHS.into_iter().zip([2, 4]).map(stage).collect();
            SwinTransformerV2ContractConfig::new([32, 32], 4, 3, 5, 16, stages)
                .with_window_size(4)
                .with_drop_path_rate(0.0)
                .init(device)
        },
        forward: |model, device| model.forward(noise([3, 3, 32, 32], 1, device)),
        targets: &[
            "patch_embed.projection",
            "q_linear",
            "k_linear",
            "v_linear",
            "win_attn.proj",
            "fc1",
            "fc2",
            "reduction",
        ],
        // The patches, six layers in each block, and the reduction between the stages.
        layers: 1 + 6 * (DEPTHS[0] + DEPTHS[1]) + 1,
        saved: &["head"],
        bias: Bias::None,
        block_sizes: [4, 8],
    };
    check(&subject, method)
}
