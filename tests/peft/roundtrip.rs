//! PEFT → Burn → PEFT, for `tests/peft/roundtrip.py`: attaches an adapter of the fixtures to its model, computes an
//! output, and saves the adapter that it extracts from the model.
//!
//! `roundtrip <case folder> <output folder>`

#[path = "../common/mod.rs"]
mod common;

use std::error::Error;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use burn_boft::{Adapter, BoftLinear};
use common::host;
use common::peft::{Eval, Model, SetBase, Tensors, UseModel, read, with_model};
use safetensors::tensor::{Dtype, TensorView};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [case, output] = &arguments[..] else {
        return Err("usage: roundtrip <case folder> <output folder>".into());
    };
    let (case, output) = (Path::new(case), Path::new(output));
    with_model::<BoftLinear, _>(case, RoundTrip { case, output })
}

struct RoundTrip<'a> {
    case: &'a Path,
    output: &'a Path,
}

impl UseModel for RoundTrip<'_> {
    type Output = Result<(), Box<dyn Error>>;

    fn with<M: Model>(self) -> Self::Output {
        let (reference, _) = read(&self.case.join("reference.safetensors"));
        let base = reference.iter().filter_map(|(key, value)| {
            let key = key.strip_prefix("base.")?;
            Some((key.to_string(), value.clone()))
        });
        let base: Tensors = base.collect();
        let device = Device::flex();
        let model = M::new(&base, &device).map(&mut SetBase {
            path: Vec::new(),
            base: &base,
        });
        let (adapter, _) = Adapter::load(self.case)?;
        let model = adapter.attach(model)?.map(&mut Eval);

        let (shape, input) = &reference["input"];
        let data = TensorData::new(input.clone(), [input.len()]).convert::<f32>();
        let output = host(model.forward(Tensor::from_data(data, &device), shape));

        Adapter::extract_as(&model, adapter.config())?.save(self.output)?;
        let bytes: Vec<u8> = output
            .iter()
            .flat_map(|&number| (number as f32).to_le_bytes())
            .collect();
        let shape = reference["output"].0.clone();
        let view = TensorView::new(Dtype::F32, shape, &bytes)?;
        let bytes = safetensors::serialize([("output", view)], None)?;
        std::fs::write(self.output.join("output.safetensors"), bytes)?;
        Ok(())
    }
}
