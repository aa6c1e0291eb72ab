//! A model on a device without autodiff.

use burn::module::Module;
use burn::tensor::Device;
use burn_boft::{BoftConfig, BoftLinear, Init, inject, plan, summary};

use crate::common::models::{Net, gradients, rows, trainable};

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_target_modules(["hidden"])
        .with_modules_to_save(["head"])
        .with_init(Init::Random { seed: 4 })
}

#[test]
fn a_model_of_a_plain_device_trains_after_train() {
    let model = Net::<BoftLinear>::new(1, &Device::flex());
    let on_autodiff = Net::<BoftLinear>::new(1, &Device::flex().autodiff());
    let planned = plan(&model, config()).unwrap();
    assert!(!planned.is_autodiff);
    let advice = "call `train()` on the injected model before the first backward pass";
    assert!(planned.to_string().contains(advice), "{planned}");
    let planned = plan(&on_autodiff, config()).unwrap();
    assert!(planned.is_autodiff && !planned.to_string().contains(advice));

    let expected = inject(on_autodiff, config()).unwrap();
    let model = inject(model, config()).unwrap();
    assert_eq!(summary(&model), summary(&expected));
    let model = model.train();
    assert_eq!(trainable(&model), trainable(&expected));
    let loss = |model: &Net<BoftLinear>| {
        let device = Device::flex().autodiff();
        let output = model.forward(rows([6, 24], 2, &device));
        gradients(model, &output.powi_scalar(3).sum().backward())
    };
    assert_eq!(loss(&model), loss(&expected));
}
