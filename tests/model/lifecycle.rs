//! One model through everything that Burn does with a model: built, adapted, trained, stored, merged.

use std::collections::BTreeMap;

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataset::InMemDataset;
use burn::module::{Module, ParamGroup};
use burn::nn;
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Tensor};
use burn::train::metric::LossMetric;
use burn::train::renderer::CliMetricsRenderer;
use burn::train::{
    InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
};
use burn_boft::{Bias, BoftConfig, BoftLinear, Init, diagnose, inject, merge, summary, unload};

use crate::common::models::{
    INPUT, Layer, Net, OUTPUT, distance, gradients, numbers, rows, set, trainable,
};
use crate::common::training::{Batch, Item, Rows, regress};
use crate::common::{devices, host};

const RATE: f64 = 1e-2;
const TOKENS: usize = 7;
/// Parameters that no training step may change.
const FROZEN: [&str; 4] = ["hidden.weight", "output.weight", "norm.gamma", "norm.beta"];

fn config() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_dropout(0.25)
        .with_bias(Bias::AdapterOnly)
        .with_target_modules("all-linear")
        .with_modules_to_save(["head"])
}

fn learnt() -> Vec<&'static str> {
    vec![
        "head.bias",
        "head.weight",
        "hidden.bias",
        "hidden.weight.boft.scale",
        "hidden.weight.boft.skew",
        "output.bias",
        "output.weight.boft.scale",
        "output.weight.boft.skew",
    ]
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_weight_decay(0.0).init()
}

/// Outputs of the same base with other adapters, which training can reach.
fn targets<L: Layer>(base: &Net<L>, input: Tensor<2>) -> Tensor<2> {
    let config = config().with_init(Init::Random { seed: 3 });
    let teacher = inject(base.clone(), config).unwrap().valid();
    let input = input.without_autodiff();
    teacher.forward(input)
}

fn loss<L: Layer>(model: &Net<L>, input: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    let error = model.forward(input) - targets;
    error.square().mean()
}

/// Input and targets of a training step on a device.
fn batch<L: Layer>(base: &Net<L>, seed: u64, device: &Device) -> (Tensor<2>, Tensor<2>) {
    let input = rows([TOKENS, INPUT], seed, device);
    let targets = Tensor::from_data(targets(base, input.clone()).into_data(), device);
    (input, targets)
}

fn parameters_gradients<L: Layer>(
    model: &Net<L>,
    (input, targets): (Tensor<2>, Tensor<2>),
) -> GradientsParams {
    GradientsParams::from_grads(loss(model, input, targets).backward(), model)
}

/// The paths of the parameters that differ.
fn changed(before: &BTreeMap<String, Vec<f64>>, after: &BTreeMap<String, Vec<f64>>) -> Vec<String> {
    assert!(before.keys().eq(after.keys()));
    before
        .iter()
        .filter(|(path, values)| !same_bits(values, &after[*path]))
        .map(|(path, _)| path.clone())
        .collect()
}

fn same_bits(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[track_caller]
fn assert_same_bits(what: &str, a: Tensor<2>, b: Tensor<2>) {
    assert!(same_bits(&host(a), &host(b)), "{what} differ");
}

/// A model after a few training steps.
fn trained<L: Layer>(base: &Net<L>, device: &Device) -> Net<L> {
    let mut model = inject(base.clone(), config()).unwrap();
    let mut optimizer = optimizer();
    for step in 0..5 {
        let gradients = parameters_gradients(&model, batch(base, step, device));
        model = optimizer.step(RATE, model, gradients);
    }
    model
}

/// The same model without multiplicative dropout.
fn steady<L: Layer>(base: &Net<L>, model: &Net<L>) -> Net<L> {
    inject(base.clone(), config().with_dropout(0.0))
        .unwrap()
        .load_record(model.clone().into_record())
}

fn walk<L: Layer>() {
    for (backend, device) in devices() {
        println!("{backend}");
        let device = device.autodiff();
        let base = Net::<L>::new(1, &device);
        starts_at_the_base(&base, &device);
        trains_what_it_should(&base, &device);
        let model = trained(&base, &device);
        steps_change_what_is_trained(&base, &model);
        accumulates_gradients(&base, &model, &device);
        goes_to_inference_and_back(&base, &model, &device);
        moves(&model, &device);
        keeps_records(&base, &model, &device);
        keeps_the_optimizer(&base, &model, &device);
        checkpoints_gradients(&model, &device);
        let model = learns(&base, model, &device);
        leaves(&base, model, &device);
    }
}

fn starts_at_the_base<L: Layer>(base: &Net<L>, device: &Device) {
    let input = rows([TOKENS, INPUT], 2, device);
    let expected = base.forward(input.clone());
    // Dropout changes nothing yet, since every block is the identity.
    let adapted = inject(base.clone(), config()).unwrap();
    assert_same_bits("outputs", adapted.forward(input.clone()), expected);
    let input = input.without_autodiff();
    assert_same_bits(
        "outputs of valid()",
        adapted.valid().forward(input.clone()),
        base.valid().forward(input),
    );
    assert_eq!(numbers(&merge(adapted).unwrap()), numbers(base));
}

fn trains_what_it_should<L: Layer>(base: &Net<L>, device: &Device) {
    let model = inject(base.clone(), config()).unwrap();
    assert_eq!(Vec::from_iter(trainable(&model)), learnt());
    let (input, targets) = batch(base, 4, device);
    // Dropout may take the only gradient of a block, but never that of a whole layer.
    let gradients = gradients(&model, &loss(&model, input, targets).backward());
    assert_eq!(Vec::from_iter(gradients.keys()), learnt());
    for (path, gradient) in gradients {
        assert!(gradient.iter().any(|&value| value != 0.0), "{path}");
    }
    counts(&model);
    counts(&model.valid());
}

/// By hand: skew `m·(d/b)·6` and scale `o` of 24 → 16 and 16 → 12, two biases, the head of 12 → 5.
fn counts<L: Layer>(model: &Net<L>) {
    let summary = summary(model);
    let (hidden, output) = (2 * 6 * 6 + 16, 2 * 4 * 6 + 12);
    let head = 12 * 5 + 5;
    assert_eq!(summary.effective(), hidden + output);
    assert_eq!(summary.trainable, hidden + output + (16 + 12) + head);
    let base = (24 * 16 + 16) + 2 * 16 + (16 * 12 + 12) + head;
    assert_eq!(summary.total, base + hidden + output);
    let squares = (2 * 6 * 16 + 16) + (2 * 4 * 16 + 12);
    assert_eq!(summary.stored_by_peft(), squares);
    let rows = summary.layers.iter();
    let rows: Vec<_> = rows.map(|row| (row.path.as_str(), row.effective)).collect();
    assert_eq!(rows, [("hidden", hidden), ("output", output)]);
}

fn steps_change_what_is_trained<L: Layer>(base: &Net<L>, model: &Net<L>) {
    let fresh = inject(base.clone(), config()).unwrap();
    let (before, after) = (numbers(&fresh), numbers(model));
    assert_eq!(changed(&before, &after), learnt());
    for path in FROZEN {
        assert!(same_bits(&numbers(base)[path], &after[path]), "{path}");
    }
    assert_eq!(trainable(model), trainable(&fresh));
}

fn accumulates_gradients<L: Layer>(base: &Net<L>, model: &Net<L>, device: &Device) {
    let model = steady(base, model);
    let batches = [batch(base, 20, device), batch(base, 21, device)];
    let mut accumulator = GradientsAccumulator::new();
    for batch in batches.clone() {
        accumulator.accumulate(&model, parameters_gradients(&model, batch));
    }
    let [(a, x), (b, y)] = batches;
    let sum = loss(&model, a, x) + loss(&model, b, y);
    let sum = GradientsParams::from_grads(sum.backward(), &model);
    let accumulated = optimizer().step(RATE, model.clone(), accumulator.grads());
    let summed = optimizer().step(RATE, model.clone(), sum);
    assert_eq!(changed(&numbers(&model), &numbers(&accumulated)), learnt());
    // Both add the same two numbers, so nothing is rounded differently.
    assert!(changed(&numbers(&accumulated), &numbers(&summed)).is_empty());
}

fn goes_to_inference_and_back<L: Layer>(base: &Net<L>, model: &Net<L>, device: &Device) {
    let input = rows([TOKENS, INPUT], 5, device);
    let plain = input.clone().without_autodiff();
    let inference = model.valid();
    assert!(trainable(&inference).is_empty());
    let output = inference.forward(plain.clone());
    assert_same_bits("two inferences", inference.forward(plain), output.clone());
    // A backend may fuse norms and activations for inference only: 3e-7 on flex.
    let drift = distance(steady(base, model).forward(input.clone()), output);
    println!("inference and training: {drift:.1e}");
    assert!(drift <= 1e-5, "{drift}");

    let training = inference.train();
    assert_eq!(numbers(&training), numbers(model));
    assert_eq!(trainable(&training), trainable(model));
    // Six blocks and four blocks of two factors: 16 steps all alike would be a chance of 96⁻¹⁵.
    let first = host(training.forward(input.clone()));
    let differs = (0..15).any(|_| !same_bits(&host(training.forward(input.clone())), &first));
    assert!(differs, "dropout is off after train()");
    let gradients = parameters_gradients(&training, batch(base, 6, device));
    let stepped = optimizer().step(RATE, training, gradients);
    assert_eq!(changed(&numbers(model), &numbers(&stepped)), learnt());
}

fn moves<L: Layer>(model: &Net<L>, device: &Device) {
    let input = rows([TOKENS, INPUT], 7, device).without_autodiff();
    let expected = model.valid().forward(input.clone());
    let fork = model.clone().fork(device);
    assert_eq!(trainable(&fork), trainable(model));
    for moved in [fork, model.clone().to_device(device)] {
        assert_eq!(numbers(&moved), numbers(model));
        assert!(moved.hidden.adapter().is_some() && moved.output.adapter().is_some());
        assert_same_bits(
            "outputs after a move",
            moved.valid().forward(input.clone()),
            expected.clone(),
        );
    }
    for (other, device) in devices() {
        let moved = model.valid().to_device(&device);
        assert_eq!(numbers(&moved), numbers(model), "moved to {other}");
        let input = Tensor::from_data(input.to_data(), &device);
        // The backends sum in different orders: 7e-7.
        let drift = distance(moved.forward(input), expected.clone());
        println!("moved to {other}: {drift:.1e}");
        assert!(drift <= 1e-5, "{drift} on {other}");
    }
}

fn keeps_records<L: Layer>(base: &Net<L>, model: &Net<L>, device: &Device) {
    let input = rows([TOKENS, INPUT], 8, device).without_autodiff();
    let bytes = model.clone().into_record().into_bytes().unwrap();
    let other = inject(Net::<L>::new(50, device), config()).unwrap();
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_eq!(numbers(&loaded), numbers(model));
    assert_eq!(trainable(&loaded), trainable(model));
    assert_same_bits(
        "outputs of a loaded model",
        loaded.valid().forward(input.clone()),
        model.valid().forward(input),
    );

    let adapters = ParamGroup::from_regex(r"\.boft\.").unwrap();
    let record = model.clone().into_record_group(adapters);
    assert_eq!(record.len(), 4);
    let fresh = inject(base.clone(), config()).unwrap();
    let loaded = fresh.clone().load_record(record.allow_partial(true));
    let (before, after) = (numbers(&fresh), numbers(&loaded));
    let adapters: Vec<_> = learnt()
        .into_iter()
        .filter(|path| path.contains(".boft."))
        .collect();
    assert_eq!(changed(&before, &after), adapters);
    for path in adapters {
        assert!(same_bits(&after[path], &numbers(model)[path]), "{path}");
    }
}

fn keeps_the_optimizer<L: Layer>(base: &Net<L>, model: &Net<L>, device: &Device) {
    let model = steady(base, model);
    let gradients = |model: &Net<L>, seed| parameters_gradients(model, batch(base, seed, device));
    let mut first = optimizer();
    let model = first.step(RATE, model.clone(), gradients(&model, 30));
    let bytes = first.into_bytes().unwrap();
    let mut loaded = optimizer().from_bytes(bytes).unwrap();

    let step = |optimizer: &mut ModuleOptimizer| {
        numbers(&optimizer.step(RATE, model.clone(), gradients(&model, 31)))
    };
    let expected = step(&mut first);
    assert!(changed(&expected, &step(&mut loaded)).is_empty());
    assert_eq!(changed(&expected, &step(&mut optimizer())), learnt());
}

fn checkpoints_gradients<L: Layer>(model: &Net<L>, device: &Device) {
    let measure = |device: &Device| {
        let base = Net::<L>::new(1, device);
        let model = steady(&base, model);
        let (input, targets) = batch(&base, 9, device);
        gradients(&model, &loss(&model, input, targets).backward())
    };
    let plain = measure(device);
    let checkpointed = measure(&device.clone().gradient_checkpointing());
    assert_eq!(Vec::from_iter(plain.keys()), learnt());
    assert!(changed(&plain, &checkpointed).is_empty());
}

impl<L: Layer> TrainStep for Net<L> {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        let output = regress(|input| self.forward(input), batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl<L: Layer> InferenceStep for Net<L> {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        regress(|input| self.forward(input), batch)
    }
}

fn learns<L: Layer>(base: &Net<L>, model: Net<L>, device: &Device) -> Net<L> {
    const ITEMS: usize = 64;
    let input = rows([ITEMS, INPUT], 40, device);
    let targets = targets(base, input.clone());
    let single = |tensor: Tensor<2>| tensor.into_data().try_to_vec::<f32>().unwrap();
    let (inputs, outputs) = (single(input.clone()), single(targets.clone()));
    let items: Vec<Item> = inputs
        .chunks(INPUT)
        .zip(outputs.chunks(OUTPUT))
        .map(|(input, output)| (input.to_vec(), output.to_vec()))
        .collect();
    let loader = || {
        DataLoaderBuilder::new(Rows)
            .batch_size(10)
            .build(InMemDataset::new(items.clone()))
    };
    let measure = |model: &Net<L>| {
        let input = input.clone().without_autodiff();
        loss(model, input, targets.clone()).into_scalar::<f64>()
    };
    let (before, start) = (numbers(&model), measure(&model.valid()));
    let folder = tempfile::tempdir().unwrap();
    let result = SupervisedTraining::new(folder.path(), loader(), loader())
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .renderer(Box::new(CliMetricsRenderer::new()))
        .num_epochs(4)
        .launch(Learner::new(model, optimizer(), RATE));
    assert!(result.error.is_none(), "{:?}", result.error);
    let end = measure(&result.model);
    println!("loss: {start:.4} → {end:.4}");
    assert!(end < 0.7 * start, "{start} → {end}");
    let model = result.model.train();
    assert_eq!(changed(&before, &numbers(&model)), learnt());
    model
}

fn leaves<L: Layer>(base: &Net<L>, model: Net<L>, device: &Device) {
    counts(&model);
    let input = rows([TOKENS, INPUT], 10, device).without_autodiff();
    let expected = model.valid().forward(input.clone());
    let before = numbers(&model);

    let merged = merge(model.clone()).unwrap();
    assert!(merged.hidden.adapter().is_none() && merged.output.adapter().is_none());
    assert!(numbers(&merged).keys().eq(numbers(base).keys()));
    let drift = distance(merged.valid().forward(input), expected);
    // One rounding per weight, 7e-7.
    println!("merged: {drift:.1e}");
    assert!(drift <= 1e-5, "{drift}");
    assert!(!same_bits(
        &numbers(&merged)["hidden.weight"],
        &before["hidden.weight"]
    ));

    let unloaded = numbers(&unload(model));
    assert!(unloaded.keys().eq(numbers(base).keys()));
    for (path, values) in unloaded {
        assert!(same_bits(&values, &before[&path]), "{path}");
    }
}

#[test]
fn a_model_of_burn_linear_layers_trains_moves_stores_and_merges() {
    walk::<nn::Linear>();
}

#[test]
fn a_model_of_boft_linear_layers_trains_moves_stores_and_merges() {
    walk::<BoftLinear>();
}

#[test]
fn a_thousand_steps_keep_every_rotation_orthogonal() {
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = Net::<BoftLinear>::new(1, &device);
        let mut model = inject(base.clone(), config().with_dropout(0.0)).unwrap();
        let mut optimizer = optimizer();
        // No rotation reaches −3 times the base's output, so the skew grows without end.
        let input = rows([32, INPUT], 60, &device);
        let targets = base.forward(input.clone()) * -3.0;
        for _ in 0..1000 {
            let loss = loss(&model, input.clone(), targets.clone().detach());
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(5.0 * RATE, model, gradients);
        }
        let diagnosis = diagnose(&model);
        println!("{backend}\n{diagnosis}");
        assert_eq!(diagnosis.layers.len(), 2);
        for layer in &diagnosis.layers {
            assert!(layer.orthogonality_defect <= 1e-6, "{backend}: {layer:?}");
            assert!(layer.skew_norm > 1.0, "{backend}: {layer:?}");
            let energy = layer.energy_after / layer.energy_before - 1.0;
            assert!(energy.abs() <= 1e-5, "{backend}: {layer:?}");
        }
    }
}

/// Blocks are computed once on a device without autodiff, and again after whatever may change the numbers.
#[test]
fn a_model_in_inference_follows_every_change_of_its_adapter() {
    for (backend, device) in devices() {
        let base = Net::<BoftLinear>::new(1, &device);
        let adapted = |seed| {
            let config = config().with_dropout(0.0);
            inject(base.clone(), config.with_init(Init::Random { seed })).unwrap()
        };
        let (mut model, other) = (adapted(3), adapted(4));
        let input = rows([TOKENS, INPUT], 5, &device);
        let [before, expected] = [&model, &other].map(|model| host(model.forward(input.clone())));
        assert_eq!(host(model.forward(input.clone())), before);
        assert_ne!(before, expected, "{backend}");
        let kept = model.clone();
        // A record, a map of parameters, and modes and devices on the way.
        model = model.load_record(other.clone().into_record());
        assert_eq!(host(model.forward(input.clone())), expected, "{backend}");
        let mut same = kept.clone();
        for (path, numbers) in numbers(&other) {
            same = set(same, &path, |_| numbers.clone());
        }
        assert_eq!(host(same.forward(input.clone())), expected, "{backend}");
        let moved = kept.clone().train().valid().to_device(&device);
        assert_eq!(host(moved.forward(input.clone())), before, "{backend}");
        assert_eq!(host(kept.forward(input.clone())), before, "{backend}");
    }
}
