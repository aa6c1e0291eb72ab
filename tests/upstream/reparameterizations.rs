//! Reparameterizations, which are what an adapter is to Burn.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use burn::module::{Module, ModuleVisitor, Param, Quantizer, Reparameterization, Reparameterizer};
use burn::nn;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{BoftConfig, inject};

use super::{INPUTS, OUTPUTS, Scale, Scaling, pin, weight};
use crate::common::host;
use crate::common::models::{linear, precisions, rows};

/// Every column of a weight times its factor.
fn scaled(values: &[f64], factors: &[f64]) -> Vec<f64> {
    let product = |(value, factor): (&f64, &f64)| f64::from((*value as f32) * (*factor as f32));
    values
        .iter()
        .zip(factors.iter().cycle())
        .map(product)
        .collect()
}

fn factors() -> Vec<f64> {
    vec![-2.0, 0.5, 3.0]
}

#[test]
fn a_visitor_does_not_see_what_is_attached_to_a_weight() {
    #[derive(Default)]
    struct Seen(Vec<bool>);

    impl ModuleVisitor for Seen {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.reparameterization::<Scaling>().is_some());
        }
    }

    let weight = weight(&Device::flex()).apply_reparameterization(Scale(factors()));
    assert!(weight.reparameterization::<Scaling>().is_some());
    let mut seen = Seen::default();
    weight.visit(&mut seen);
    // The weight, and the factor that is shown after it.
    let name = "a_visitor_does_not_see_what_is_attached_to_a_weight";
    pin(name, seen.0, vec![false, false]);
}

#[test]
fn a_second_adapter_of_a_weight_is_dropped_without_an_error() {
    let weight = weight(&Device::flex());
    let base = host(weight.val());
    let twice = weight
        .apply_reparameterization(Scale(factors()))
        .apply_reparameterization(Scale(vec![7.0; OUTPUTS]));
    let name = "a_second_adapter_of_a_weight_is_dropped_without_an_error";
    pin(name, host(twice.val()), scaled(&base, &factors()));
}

#[test]
fn only_materializing_removes_an_adapter_and_folds_it_in() {
    let weight = weight(&Device::flex());
    let base = host(weight.val());
    let weight = weight.apply_reparameterization(Scale(factors()));
    let plain = weight.materialize();
    assert!(plain.reparameterization::<Scaling>().is_none());
    let name = "only_materializing_removes_an_adapter_and_folds_it_in";
    pin(name, host(plain.base()), scaled(&base, &factors()));
}

static READS: AtomicUsize = AtomicUsize::new(0);

/// Counts how often a weight is computed.
#[derive(Module, Debug)]
struct Counting {
    factor: Param<Tensor<1>>,
}

impl Reparameterization for Counting {
    const NAME: &'static str = "counting";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        READS.fetch_add(1, Ordering::SeqCst);
        base * self.factor.val().unsqueeze()
    }
}

struct Count;

impl Reparameterizer for Count {
    type Reparam = Counting;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Counting>) {
        let counting = (D == 2).then(|| Counting {
            factor: Param::from_tensor(Tensor::from_floats([1.5], &param.lazy_device())),
        });
        (param, counting)
    }
}

#[test]
fn an_adapted_weight_is_computed_whole_at_each_forward_pass() {
    let device = Device::flex();
    let layer = linear([INPUTS, OUTPUTS], 4, DType::F32, &device);
    let layer = layer.apply_reparameterization(Count);
    for tokens in [1, 2, 5] {
        layer.forward(rows([tokens, INPUTS], 8, &device));
    }
    let name = "an_adapted_weight_is_computed_whole_at_each_forward_pass";
    pin(name, READS.load(Ordering::SeqCst), 3);
}

static PACKED: AtomicBool = AtomicBool::new(false);

/// Notes whether the base that it gets is quantized.
#[derive(Module, Debug)]
struct Unpacking {
    factor: Param<Tensor<1>>,
}

impl Reparameterization for Unpacking {
    const NAME: &'static str = "unpacking";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let packed = matches!(base.dtype(), DType::QFloat(_));
        PACKED.store(packed, Ordering::SeqCst);
        match packed {
            true => base.dequantize() * self.factor.val().unsqueeze(),
            false => base * self.factor.val().unsqueeze(),
        }
    }
}

struct Unpack;

impl Reparameterizer for Unpack {
    type Reparam = Unpacking;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Unpacking>) {
        let unpacking = (D == 2).then(|| Unpacking {
            factor: Param::from_tensor(Tensor::from_floats([1.5], &Device::flex())),
        });
        (param, unpacking)
    }
}

fn quantizer(device: &Device) -> Quantizer {
    let scheme = device.settings().quantization.scheme;
    Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S))
}

/// A layer whose weight is large enough for every quantization.
fn layer(device: &Device) -> nn::Linear {
    linear([64, 32], 6, DType::F32, device)
}

#[test]
fn an_adapter_gets_a_quantized_base_packed() {
    let device = Device::flex();
    let layer = layer(&device).quantize_weights(&mut quantizer(&device));
    let layer = layer.apply_reparameterization(Unpack);
    layer.weight.val();
    let name = "an_adapter_gets_a_quantized_base_packed";
    pin(name, PACKED.load(Ordering::SeqCst), true);
}

#[test]
fn quantizing_a_model_quantizes_the_numbers_of_its_adapters() {
    let device = Device::flex();
    let config = BoftConfig::new()
        .with_block_size(8)
        .with_n_butterfly_factor(3)
        .with_target_modules("all-linear");
    let layer = inject(layer(&device), config).unwrap();
    let layer = layer.quantize_weights(&mut quantizer(&device));
    let skew = precisions(&layer)["weight.boft.skew"];
    let name = "quantizing_a_model_quantizes_the_numbers_of_its_adapters";
    pin(name, matches!(skew, DType::QFloat(_)), true);
}

#[test]
fn lora_starts_with_a_deviation_of_one_over_its_rank() {
    use burn::module::{Lora, LoraAdapter};

    let layer = layer(&Device::flex()).apply_lora(Lora::new(2, 4.0));
    let adapter = layer.weight.reparameterization::<LoraAdapter>().unwrap();
    let factor = host(adapter.a.val());
    let deviation = (factor.iter().map(|x| x * x).sum::<f64>() / factor.len() as f64).sqrt();
    // 128 numbers, so the estimate is within a few hundredths. PEFT's is 0.07 for 64 inputs.
    let name = "lora_starts_with_a_deviation_of_one_over_its_rank";
    pin(name, (0.3..0.7).contains(&deviation), true);
}
