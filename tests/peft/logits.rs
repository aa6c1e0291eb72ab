//! The logits of an adapted backbone, for `tests/peft/roundtrip.py`.
//!
//! `logits <adapter folder> <input file> <output file>`: attaches the adapter, which has the names of
//! transformers 5, to the backbone of the example; reads the tensor `pixels`, writes the tensor `logits`.

use std::error::Error;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::peft::LoadOptions;
use burn_boft::{Adapter, KeyMap, Transformers};
use dinov2::weights::Checkpoint;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [folder, input, output] = &arguments[..] else {
        return Err("usage: logits <adapter folder> <input file> <output file>".into());
    };
    let names = LoadOptions::new().with_key_map(KeyMap::dinov2(Transformers::V5));
    let (adapter, _) = Adapter::load_with(Path::new(folder), &names)?;
    let head = adapter
        .tensors()
        .iter()
        .find(|tensor| tensor.module() == "classifier" && tensor.name() == "bias");
    let labels = head.ok_or("the adapter has no head")?.data().num_elements();

    let device = Device::flex();
    let labels: Vec<String> = (0..labels).map(|label| label.to_string()).collect();
    let (model, _) = Checkpoint::embedded().load(&labels, &device)?;
    let model = adapter.attach(model)?;

    let bytes = std::fs::read(input)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let pixels = file.tensor("pixels")?;
    let numbers = pixels.data().as_chunks::<4>().0.iter();
    let numbers: Vec<f32> = numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let data = TensorData::new(numbers, pixels.shape().to_vec());
    let logits = model.forward(Tensor::from_data(data, &device));

    let shape = logits.dims().to_vec();
    let numbers: Vec<f32> = logits.into_data().iter::<f32>().collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, shape, &bytes)?;
    std::fs::write(output, safetensors::serialize([("logits", view)], None)?)?;
    Ok(())
}
