//! PyTorch's weight files, read and written by an adapted model.

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::store::{BurnToPyTorchAdapter, ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use burn::tensor::Device;
use burn_boft::{BoftLinearConfig, inject, unload};
use safetensors::SafeTensors;

use super::oracle::boft;
use crate::common::models::{Layer, numbers};
use crate::common::noise;

/// A safetensors file as PyTorch writes it: a header of JSON, then `weight` as `[out, in]` and `bias`.
fn pytorch_file(weight: &[f32], bias: &[f32], d_input: usize) -> Vec<u8> {
    let d_output = bias.len();
    let (middle, end) = (4 * weight.len(), 4 * (weight.len() + d_output));
    let header = format!(
        r#"{{"weight":{{"dtype":"F32","shape":[{d_output},{d_input}],"data_offsets":[0,{middle}]}},"bias":{{"dtype":"F32","shape":[{d_output}],"data_offsets":[{middle},{end}]}}}}"#
    );
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(
        weight
            .iter()
            .chain(bias)
            .flat_map(|value| value.to_le_bytes()),
    );
    file
}

fn from_pytorch<M: Module>(mut model: M, file: &[u8]) -> M {
    let mut store = SafetensorsStore::from_bytes(Some(file.to_vec()))
        .with_from_adapter(PyTorchToBurnAdapter)
        .allow_partial(true);
    let result = model.load_from(&mut store).unwrap();
    assert_eq!(result.applied.len(), 2, "{result:?}");
    assert!(
        result.errors.is_empty() && result.unused.is_empty(),
        "{result:?}"
    );
    model
}

#[test]
fn a_boft_linear_reads_and_writes_pytorch_files_as_a_linear_does() {
    let device = Device::flex();
    let (d_input, d_output) = (24, 10);
    let single = |values: Vec<f64>| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    let (weight, bias) = (single(noise(240, 1, 1.0)), single(noise(10, 2, 1.0)));
    let file = pytorch_file(&weight, &bias, d_input);

    let plain = from_pytorch(LinearConfig::new(d_input, d_output).init(&device), &file);
    let ours = from_pytorch(
        BoftLinearConfig::new(d_input, d_output).init(&device),
        &file,
    );
    let adapted = BoftLinearConfig::new(d_input, d_output).init(&device);
    let adapted = from_pytorch(inject(adapted, boft()).unwrap(), &file);
    assert!(adapted.adapter().is_some());
    for read in [numbers(&plain), numbers(&ours), numbers(&unload(adapted))] {
        for (i, row) in read["weight"].chunks(d_output).enumerate() {
            for (o, &value) in row.iter().enumerate() {
                assert_eq!(value, f64::from(weight[o * d_input + i]));
            }
        }
        assert!(
            read["bias"]
                .iter()
                .zip(&bias)
                .all(|(a, b)| *a == f64::from(*b))
        );
    }

    let mut store = SafetensorsStore::from_bytes(None).with_to_adapter(BurnToPyTorchAdapter);
    ours.save_into(&mut store).unwrap();
    let bytes = store.get_bytes().unwrap();
    let written = SafeTensors::deserialize(&bytes).unwrap();
    for (name, shape, numbers) in [
        ("weight", vec![d_output, d_input], &weight),
        ("bias", vec![d_output], &bias),
    ] {
        let tensor = written.tensor(name).unwrap();
        let numbers: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!((tensor.shape(), tensor.data()), (&shape[..], &numbers[..]));
    }
}
