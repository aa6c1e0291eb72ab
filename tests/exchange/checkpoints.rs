//! Checkpoints of a training run: they hold what training changes and leave the base model out.

use std::collections::BTreeMap;
use std::path::Path;

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataset::InMemDataset;
use burn::module::{Module, ParamGroup, Quantizer};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::optim::AdamWConfig;
use burn::store::ModuleRecord;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Tensor};
use burn::train::checkpoint::{Checkpointer, FileCheckpointer, KeepLastNCheckpoints};
use burn::train::metric::LossMetric;
use burn::train::renderer::CliMetricsRenderer;
use burn::train::{
    InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
};
use burn_boft::{AdapterCheckpointer, Bias, BoftConfig, BoftLinear, inject};

use super::support::*;
use crate::common::models::{INPUT, linear, numbers, set};
use crate::common::noise;
use crate::common::training::{Batch, Item, Rows, regress};

/// A model whose batch norm is not part of the adapter but has running statistics, which training changes.
#[derive(Module, Debug)]
struct Tower {
    hidden: BoftLinear,
    norm: BatchNorm,
    head: BoftLinear,
}

impl Tower {
    fn new(seed: u64) -> Self {
        let layer = |sizes, seed| BoftLinear::from(linear(sizes, seed, DType::F32, &device()));
        Self {
            hidden: layer([INPUT, 16], seed),
            norm: BatchNormConfig::new(16).init(&device()),
            head: layer([16, 5], seed + 10),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(self.hidden.forward(input));
        self.head.forward(burn::tensor::activation::gelu(hidden))
    }
}

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_target_modules(["hidden"])
        .with_bias(Bias::AdapterOnly)
        .with_modules_to_save(["head", "norm"])
}

fn tower() -> Tower {
    inject(Tower::new(3), config()).unwrap()
}

impl TrainStep for Tower {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        let output = regress(|input| self.forward(input), batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Tower {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        regress(|input| self.forward(input), batch)
    }
}

/// Trains up to a number of epochs, resuming from the checkpoint of `resume` if it is given.
fn train(folder: &Path, epochs: usize, resume: Option<usize>) -> BTreeMap<String, Vec<f64>> {
    let items: Vec<Item> = (0..30u64)
        .map(|row| {
            let single = |values: Vec<f64>| values.iter().map(|x| *x as f32).collect();
            let input = noise(INPUT, 900 + row, 1.0);
            (single(input), single(noise(5, 300 + row, 1.0)))
        })
        .collect();
    let loader = || {
        DataLoaderBuilder::new(Rows)
            .batch_size(10)
            .build(InMemDataset::new(items.clone()))
    };
    let model = tower();
    let training = SupervisedTraining::new(folder, loader(), loader())
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .renderer(Box::new(CliMetricsRenderer::new()))
        .with_custom_checkpointers(
            AdapterCheckpointer::new(folder.join("kept"), &model).unwrap(),
            FileCheckpointer::new(folder.join("kept"), "optim"),
            FileCheckpointer::new(folder.join("kept"), "scheduler"),
        )
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(2))
        .num_epochs(epochs);
    let training = match resume {
        Some(epoch) => training.checkpoint(epoch),
        None => training,
    };
    let optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let result = training.launch(Learner::new(model, optimizer, 1e-2));
    assert!(result.error.is_none(), "{:?}", result.error);
    numbers(&result.model)
}

#[test]
fn a_training_run_resumes_bit_for_bit_from_an_adapter_checkpoint() {
    let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = train(whole.path(), 4, None);
    let halfway = train(halves.path(), 2, None);
    assert_ne!(expected, halfway);
    let resumed = train(halves.path(), 4, Some(2));
    assert_eq!(resumed, expected);

    let path = halves.path().join("kept/adapter-4.bpk");
    let reader = burn_pack::Reader::from_file(&path).unwrap();
    let mut kept = reader.tensor_names();
    kept.sort_unstable();
    assert_eq!(
        kept,
        [
            "head.bias",
            "head.weight",
            "hidden.bias",
            "hidden.weight.boft.scale",
            "hidden.weight.boft.skew",
            "norm.beta",
            "norm.gamma",
            "norm.running_mean",
            "norm.running_var",
        ]
    );
    assert!(!halves.path().join("kept/adapter-2.bpk").exists());
}

#[test]
fn a_checkpoint_of_another_base_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpointer = AdapterCheckpointer::new(folder.path(), &tower()).unwrap();
    // A trained model would have other numbers than a fresh one.
    let saved = ["hidden.weight.boft.skew", "head.weight"]
        .into_iter()
        .fold(tower(), |model, path| {
            set(model, path, |values| noise(values.len(), 81, 0.2))
        });
    let expected = numbers(&saved);
    checkpointer.save(1, saved.into_record()).unwrap();
    let other = inject(Tower::new(4), config()).unwrap();
    let other = AdapterCheckpointer::new(folder.path(), &other).unwrap();
    let restored = |checkpointer: &AdapterCheckpointer, epoch| {
        Checkpointer::<ModuleRecord>::restore(checkpointer, epoch)
    };
    let error = restored(&other, 1).unwrap_err().to_string();
    assert!(
        error.contains("was saved with another base model"),
        "{error}"
    );
    assert!(restored(&checkpointer, 2).is_err());
    let again = AdapterCheckpointer::new(folder.path(), &tower()).unwrap();
    let model = tower()
        .try_load_record(restored(&again, 1).unwrap())
        .unwrap();
    assert_eq!(numbers(&model), expected);
    assert_ne!(expected, numbers(&tower()));
    Checkpointer::<ModuleRecord>::delete(&again, 1).unwrap();
    Checkpointer::<ModuleRecord>::delete(&again, 1).unwrap();
    assert!(restored(&again, 1).is_err());
}

#[test]
fn a_checkpoint_leaves_a_quantized_base_out() {
    let scheme = device().settings().quantization.scheme;
    let packed = |seed| {
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme.with_value(QuantValue::Q8S));
        let weight = ParamGroup::from_path("hidden.weight");
        let model = Tower::new(seed).quantize_weights_group(&mut quantizer, weight);
        inject(model, config()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let checkpointer = AdapterCheckpointer::new(folder.path(), &packed(3)).unwrap();
    let saved = set(packed(3), "hidden.weight.boft.skew", |values| {
        noise(values.len(), 81, 0.2)
    });
    let expected = numbers(&saved);
    checkpointer.save(1, saved.into_record()).unwrap();
    let file = burn_pack::Reader::from_file(folder.path().join("adapter-1.bpk")).unwrap();
    assert!(!file.tensor_names().contains(&"hidden.weight"));
    let record = Checkpointer::<ModuleRecord>::restore(&checkpointer, 1).unwrap();
    let model = packed(3).try_load_record(record).unwrap();
    assert_eq!(numbers(&model), expected);
    let other = AdapterCheckpointer::new(folder.path(), &packed(4)).unwrap();
    assert!(Checkpointer::<ModuleRecord>::restore(&other, 1).is_err());
}
