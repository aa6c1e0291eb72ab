//! A model of two precisions, as checkpoints have them: a body in half precision and a head in f32.

use burn::module::Module;
use burn::nn;
use burn::tensor::{DType, Tensor};
use burn_boft::{BoftConfig, BoftLinear, Init, inject, merge};

use crate::common::by_hand::relative;
use crate::common::models::{gradients, linear, precisions};
use crate::common::{host, kernel_devices};
use crate::layers::exact;
use crate::precision::Precision;

#[derive(Module, Debug)]
struct Mixed {
    fast: BoftLinear,
    plain: nn::Linear,
    head: nn::Linear,
}

impl Mixed {
    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = burn::tensor::activation::relu(self.fast.forward(input));
        self.head
            .forward(self.plain.forward(hidden).cast(DType::F32))
    }
}

#[test]
fn a_body_in_half_precision_is_adapted_under_a_head_in_full_precision() {
    for (backend, device) in kernel_devices() {
        let device = device.autodiff();
        let run = |dtype: DType| {
            let model = Mixed {
                fast: linear([24, 16], 3, dtype, &device).into(),
                plain: linear([16, 12], 13, dtype, &device),
                head: linear([12, 5], 23, DType::F32, &device),
            };
            let config = BoftConfig::new()
                .with_block_size(4)
                .with_n_butterfly_factor(2)
                .with_target_modules(["fast", "plain"])
                .with_modules_to_save(["head"])
                .with_init(Init::Random { seed: 7 });
            let model = inject(model, config).unwrap();
            let input = exact([7, 24], 5, dtype, &device);
            let output = model.forward(input.clone());
            let grads = gradients(&model, &output.clone().square().mean().backward());
            let merged = merge(model.clone()).unwrap();
            let merged_output = merged.forward(input);
            (model, [output, merged_output].map(host), grads, merged)
        };
        let (_, [expected, _], expected_gradients, _) = run(DType::F32);
        for precision in [Precision::F16, Precision::BF16] {
            if !precision.is_on(&device) {
                continue;
            }
            let dtype = precision.dtype();
            let (model, [output, merged_output], grads, merged) = run(dtype);
            for (path, found) in precisions(&model) {
                let is_body = !path.contains(".boft.") && !path.starts_with("head");
                let expected = if is_body { dtype } else { DType::F32 };
                assert_eq!(found, expected, "{path} on {backend}");
            }
            assert_eq!(precisions(&merged)["fast.weight"], dtype);
            assert_eq!(precisions(&merged)["head.weight"], DType::F32);
            // Rounding of the weights themselves, through two layers.
            let tolerance = precision.tolerance();
            let drift = relative(&output, &expected);
            println!("{backend}, {}: {drift:.1e}", precision.name());
            assert!(drift <= 2.0 * tolerance.output, "{drift} on {backend}");
            assert!(relative(&merged_output, &output) <= 2.0 * tolerance.merged);
            assert!(grads.keys().eq(expected_gradients.keys()));
            for (path, gradient) in &grads {
                let drift = relative(gradient, &expected_gradients[path]);
                assert!(
                    drift <= 2.0 * tolerance.gradient,
                    "{path}: {drift} on {backend}"
                );
            }
        }
    }
}
