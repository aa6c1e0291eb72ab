//! One layer on one device in one precision: everything that has to hold before the table says so.

use std::collections::BTreeMap;

use burn::module::{Module, ParamGroup, Quantizer};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantStore};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{Adapter, inject, merge, merge_quantized, plan};

use crate::common::by_hand::{parameter, perturbed, relative, rotated_weight};
use crate::common::host;
use crate::common::models::{gradients, numbers, set, trainable};
use crate::layers::{Layer, exact};
use crate::precision::{Drift, Precision};

/// What was found out about a layer on a device.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It works, and computes this exactly.
    Works(Drift),
    /// The backend does not have it, for this reason.
    Absent(String),
    /// This library refuses it with this message.
    Refused(String),
}

/// Injects, computes, differentiates, trains, saves, loads and merges.
pub fn check<M: Module, const R: usize>(
    layer: &Layer<M, R>,
    precision: Precision,
    device: &Device,
) -> Outcome {
    if !precision.is_on(device) {
        return Outcome::Absent(format!("no arithmetic in {}", precision.name()));
    }
    let mut found = Vec::new();
    for device in [
        device.clone().autodiff(),
        device.clone().autodiff().gradient_checkpointing(),
    ] {
        let base = (layer.build)(precision.dtype(), &device);
        let base = match packed(base, layer, precision, &device) {
            Ok(base) => base,
            Err(reason) => return Outcome::Absent(reason),
        };
        let adapted = match inject(base.clone(), &layer.config) {
            Ok(adapted) => adapted,
            Err(error) => return Outcome::Refused(error.to_string()),
        };
        let bench = Bench {
            layer,
            precision,
            device,
        };
        found.push(bench.run(&base, adapted));
    }
    Outcome::Works(found[0].max(found[1]))
}

/// Packs the weight into fewer bits, if the precision says so.
///
/// What a backend on the CPU cannot pack, Burn panics about. A GPU backend does so on a thread of its own, which computes nothing
/// from then on, so that it is not asked for rows that do not fill its words.
fn packed<M: Module, const R: usize>(
    model: M,
    layer: &Layer<M, R>,
    precision: Precision,
    device: &Device,
) -> Result<M, String> {
    let Some(scheme) = precision.packed(device) else {
        return Ok(model);
    };
    let name = precision.name();
    let shape = &plan(&model, &layer.config).unwrap().layers[0].shape;
    let row = shape[shape.len() - 1];
    if matches!(scheme.store, QuantStore::PackedU32(_)) && !row.is_multiple_of(scheme.num_quants())
    {
        return Err(format!(
            "no words of 32 bits for rows of {row} numbers in {name}"
        ));
    }
    let quantized = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
        let weight = ParamGroup::from_paths(vec!["weight"]);
        let model = model.quantize_weights_group(&mut quantizer, weight);
        // Some backends take the tensor, and panic when it is read.
        drop(numbers(&model));
        model
    }));
    quantized.map_err(|_| format!("no quantized tensors of {name}"))
}

struct Bench<'a, M, const R: usize> {
    layer: &'a Layer<M, R>,
    precision: Precision,
    device: Device,
}

impl<M: Module, const R: usize> Bench<'_, M, R> {
    fn output(&self, model: &M) -> Tensor<1> {
        let dtype = self.precision.dtype();
        let input = exact(self.layer.input, 5, dtype, &self.device);
        (self.layer.forward)(model, input)
    }

    /// The gradients of the inner product of the output with fixed numbers.
    fn gradients(&self, model: &M) -> BTreeMap<String, Vec<f64>> {
        let output = self.output(model);
        let upstream = exact(output.dims(), 6, output.dtype(), &self.device);
        gradients(model, &(output * upstream).sum().backward())
    }

    fn run(&self, base: &M, start: M) -> Drift {
        let expected = host(self.output(base));
        let at_start = host(self.output(&start));
        let scheme = self.precision.packed(&self.device);
        match scheme.map(|scheme| scheme.store) {
            // A plain layer multiplies packed weights by a kernel of their own, which rounds otherwise.
            Some(QuantStore::PackedU32(_)) => {
                assert!(relative(&at_start, &expected) <= self.precision.tolerance().output);
            }
            _ => assert_eq!(
                at_start, expected,
                "an adapter at its start changes the output"
            ),
        }
        let adapted = perturbed(start.clone());
        let output = host(self.output(&adapted));
        assert!(
            relative(&output, &expected) > 0.1,
            "the adapter does nothing"
        );
        let reference = self.reference(&adapted);
        let merged = host(self.output(&merge(adapted.clone()).unwrap()));
        let drift = Drift {
            output: relative(&output, &reference.output),
            gradient: self.gradient_drift(&adapted, &reference.gradients),
            merged: relative(&merged, &output),
        };
        if let Some(scheme) = scheme {
            self.packs_again(&adapted, scheme, &merged);
        }
        self.keeps_files(base, &adapted);
        self.learns(start, &adapted);
        drift
    }

    fn gradient_drift(&self, adapted: &M, expected: &BTreeMap<String, Vec<f64>>) -> f64 {
        let found = self.gradients(adapted);
        assert!(found.keys().eq(expected.keys()));
        assert!(found.keys().eq(&trainable(adapted)));
        found
            .iter()
            .map(|(path, gradient)| relative(gradient, &expected[path]))
            .fold(0.0, f64::max)
    }

    /// The same layer in f64 on another backend: its output by a plain layer with a weight that was rotated by hand, its
    /// gradients by the adapted layer.
    #[allow(deprecated)] // Burn 0.22 deprecates ndarray and still ships it.
    fn reference(&self, adapted: &M) -> Reference {
        let device = match self.device.clone().inner() == Device::flex() {
            true => Device::ndarray(),
            false => Device::flex(),
        };
        let wide = Bench {
            layer: self.layer,
            precision: Precision::F64,
            device: device.autodiff(),
        };
        let values = numbers(adapted);
        let mut plain = (self.layer.build)(DType::F64, &wide.device);
        for (path, numbers) in values.iter().filter(|(path, _)| !path.contains(".boft.")) {
            plain = set(plain, path, |_| numbers.clone());
        }
        let mut copy = inject(plain.clone(), &self.layer.config).unwrap();
        for (path, numbers) in values.iter().filter(|(path, _)| path.contains(".boft.")) {
            copy = set(copy, path, |_| numbers.clone());
        }
        for layer in &plan(&plain, &self.layer.config).unwrap().layers {
            let weight = rotated_weight(layer, &self.layer.config, &values);
            let path = parameter(&layer.path, "weight");
            plain = set(plain, &path, |_| weight.clone());
        }
        Reference {
            output: host(wide.output(&plain)),
            gradients: wide.gradients(&copy),
        }
    }

    /// A merged weight that is packed like the base is as near to the exact one as its bits allow.
    fn packs_again(&self, adapted: &M, scheme: QuantScheme, merged: &[f64]) {
        let (packed, report) = merge_quantized(adapted.clone()).unwrap();
        let [layer] = &report.layers[..] else {
            panic!("one layer is packed: {report}");
        };
        assert_eq!(layer.scheme, scheme);
        let allowed = match self.precision {
            Precision::Q8 => 0.02,
            _ => 0.3,
        };
        let error = relative(&host(self.output(&packed)), merged);
        assert!(0.0 < error && error < allowed, "{error}");
    }

    /// What is saved and loaded gives the same output.
    fn keeps_files(&self, base: &M, adapted: &M) {
        let folder = tempfile::tempdir().unwrap();
        Adapter::extract(adapted)
            .unwrap()
            .save(folder.path())
            .unwrap();
        let (adapter, _) = Adapter::load(folder.path()).unwrap();
        let attached = adapter.attach(base.clone()).unwrap();
        let outputs = [adapted, &attached].map(|model| host(self.output(model)));
        assert_eq!(
            outputs[0], outputs[1],
            "a loaded adapter computes something else"
        );
    }

    /// Training from the start comes close to the outputs of another adapter, and moves nothing but the adapter.
    fn learns(&self, start: M, teacher: &M) {
        let target = self.output(teacher).detach().cast(DType::F32);
        let loss = |model: &M| {
            let error = self.output(model).cast(DType::F32) - target.clone();
            error.square().mean()
        };
        let before = numbers(&start);
        let first = host(loss(&start))[0];
        let (mut model, mut optimizer) = (start, AdamWConfig::new().with_weight_decay(0.0).init());
        for _ in 0..40 {
            let gradients = GradientsParams::from_grads(loss(&model).backward(), &model);
            model = optimizer.step(2e-2, model, gradients);
        }
        let last = host(loss(&model))[0];
        assert!(last < 0.25 * first, "the loss went from {first} to {last}");
        for (path, numbers) in numbers(&model) {
            let is_adapter = path.contains(".boft.");
            assert_eq!(numbers != before[&path], is_adapter, "{path}");
        }
    }
}

struct Reference {
    output: Vec<f64>,
    gradients: BTreeMap<String, Vec<f64>>,
}
