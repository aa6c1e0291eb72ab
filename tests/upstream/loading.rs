//! Records and weight files.

use burn::module::{Module, Param};
use burn::nn::{self, LinearConfig};
use burn::store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use burn::tensor::{Bytes, DType, Device, Tensor};
use burn_pack::Reader;
use safetensors::tensor::{Dtype, TensorView};

use super::{INPUTS, OUTPUTS, Scale, pin};
use crate::common::models::{linear, numbers, precisions, trainable};
use crate::common::noise;

/// A safetensors file with one tensor, `weight`, a `[OUTPUTS, INPUTS]` matrix of PyTorch.
fn pytorch_file(dtype: Dtype, bytes: &[u8]) -> Vec<u8> {
    let view = TensorView::new(dtype, vec![OUTPUTS, INPUTS], bytes).unwrap();
    safetensors::serialize([("weight", view)], None).unwrap()
}

fn store(file: &[u8]) -> SafetensorsStore {
    SafetensorsStore::from_bytes(Some(file.to_vec()))
        .with_from_adapter(PyTorchToBurnAdapter)
        .allow_partial(true)
        .validate(false)
}

#[test]
fn only_a_struct_called_linear_is_turned_when_a_pytorch_file_is_read() {
    #[derive(Module, Debug)]
    struct Rotated {
        weight: Param<Tensor<2>>,
    }

    let values: Vec<f32> = noise(18, 5, 1.0).into_iter().map(|x| x as f32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let file = pytorch_file(Dtype::F32, &bytes);
    let device = Device::flex();

    let mut burns: nn::Linear = LinearConfig::new(INPUTS, OUTPUTS)
        .with_bias(false)
        .init(&device);
    burns.load_from(&mut store(&file)).unwrap();
    let turned: Vec<f64> = (0..INPUTS * OUTPUTS)
        .map(|index| f64::from(values[(index % OUTPUTS) * INPUTS + index / OUTPUTS]))
        .collect();
    assert_eq!(numbers(&burns)["weight"], turned);

    let mut other = Rotated {
        weight: super::weight(&device),
    };
    // The file has three rows, and the parameter six: it does not fit as it is.
    let fits = other
        .load_from(&mut store(&file))
        .is_ok_and(|result| result.errors.is_empty());
    let name = "only_a_struct_called_linear_is_turned_when_a_pytorch_file_is_read";
    pin(name, fits, false);
}

#[test]
fn a_parameter_takes_over_the_precision_of_the_file() {
    // 0.5 in half precision.
    let bytes = [0x00, 0x38].repeat(18);
    let mut layer: nn::Linear = LinearConfig::new(INPUTS, OUTPUTS)
        .with_bias(false)
        .init(&Device::flex());
    let file = pytorch_file(Dtype::F16, &bytes);
    layer.load_from(&mut store(&file)).unwrap();
    assert_eq!(numbers(&layer)["weight"], vec![0.5; 18]);
    let name = "a_parameter_takes_over_the_precision_of_the_file";
    pin(name, precisions(&layer)["weight"], DType::F16);
}

/// A layer with an adapter whose base is frozen.
fn adapted() -> nn::Linear {
    let device = Device::flex().autodiff();
    let layer = linear([INPUTS, OUTPUTS], 9, DType::F32, &device).set_require_grad(false);
    let layer = layer.apply_reparameterization(Scale(vec![2.0, -1.0, 0.5]));
    assert_eq!(
        trainable(&layer),
        ["weight.scaling.factor".to_string()].into()
    );
    layer
}

fn reader(layer: nn::Linear) -> Reader {
    let bytes: Bytes = layer.into_record().into_bytes().unwrap();
    Reader::from_bytes(bytes).unwrap()
}

#[test]
fn a_record_holds_what_training_does_not_change() {
    let reader = reader(adapted());
    let mut names = reader.tensor_names();
    names.sort_unstable();
    let name = "a_record_holds_what_training_does_not_change";
    pin(name, names, vec!["bias", "weight", "weight.scaling.factor"]);
}

#[test]
fn a_record_does_not_say_what_its_adapters_compute() {
    let reader = reader(adapted());
    let text = format!("{:?}", reader.metadata()).to_lowercase();
    let name = "a_record_does_not_say_what_its_adapters_compute";
    pin(name, text.contains("scaling"), false);
}

#[test]
fn a_record_with_less_than_the_model_loads_only_if_that_is_allowed() {
    let plain = linear([INPUTS, OUTPUTS], 1, DType::F32, &Device::flex().autodiff());
    let strict = adapted().try_load_record(plain.clone().into_record());
    let partial = adapted().try_load_record(plain.into_record().allow_partial(true));
    let name = "a_record_with_less_than_the_model_loads_only_if_that_is_allowed";
    pin(name, [strict.is_ok(), partial.is_ok()], [false, true]);
}
