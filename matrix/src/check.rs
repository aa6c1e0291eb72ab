//! [`check`]: what must hold for every model.

use std::fmt::{self, Display, Formatter};

use burn::module::Module;
use burn::nn::loss::{MseLoss, Reduction};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use burn_boft::{
    Adapter, AdapterConfig, Bias, BoftConfig, Init, OftConfig, TargetModules, diagnose, inject,
    merge, plan, summary,
};

use crate::numbers::{Number, fill, host, parameters, read};

/// A model of somebody else's, and how it is adapted.
pub struct Subject<M> {
    /// The name of the model.
    pub name: &'static str,
    /// The package that it comes from.
    pub package: &'static str,
    /// Builds it by its own API. Its values do not matter, since they are replaced.
    pub build: fn(&Device) -> M,
    /// Its output for inputs that never change, a row for each item or token.
    pub forward: fn(&M, &Device) -> Tensor<2>,
    /// The names of the layers to adapt, or `all-linear` alone.
    pub targets: &'static [&'static str],
    /// How many layers that is, counted from the sizes that the model was built with.
    pub layers: usize,
    /// The modules that are trained as a whole.
    pub saved: &'static [&'static str],
    /// Which biases are trained.
    pub bias: Bias,
    /// The block size of BOFT with two factors, and the one of OFT.
    pub block_sizes: [usize; 2],
}

/// How a model is adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// BOFT with two factors.
    Boft,
    /// OFT.
    Oft,
}

/// Why a check did not pass.
pub type Failure = Box<dyn std::error::Error>;

/// What a check measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub model: &'static str,
    pub package: &'static str,
    pub version: String,
    /// The number of adapted layers of each kind, in words.
    pub layers: String,
    /// The method with its sizes, in words.
    pub method: String,
    pub trainable: usize,
    pub total: usize,
    /// The loss before the first step and after the last one.
    pub losses: [f64; 2],
    /// How far the output moved by `inject`, relative to its largest number.
    pub injected: f64,
    /// How far the output of the loaded adapter on another model is from that of the trained model.
    pub loaded: f64,
    /// How far the output of the merged model is from that of the trained model.
    pub merged: f64,
}

const STEPS: usize = 20;
const LEARNING_RATE: f64 = 1e-2;

/// Fails with a message if a condition does not hold.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($message)+).into());
        }
    };
}

/// Adapts a model, trains it, saves and loads the adapter, and merges it, and checks all of that.
///
/// # Errors
///
/// A message that says what does not hold.
pub fn check<M: Module>(subject: &Subject<M>, method: Method) -> Result<Row, Failure> {
    let (device, plain) = (Device::flex().autodiff(), Device::flex());
    let config = subject.config(method);
    // Every call makes tensors of its own: clones of a model share the running statistics of its batch norms.
    let pretrained = || fill((subject.build)(&device), 11);
    let output = |model: &M| (subject.forward)(model, &plain);

    let model = pretrained();
    let base = read(&model);
    let expected = Expected::new(subject, method, &base)?;
    let before = output(&model.valid());
    ensure!(spread(&before) > 1e-2, "the outputs are all alike");

    let planned = plan(&model, &config)?;
    let paths: Vec<_> = planned.layers.iter().map(|layer| &layer.path).collect();
    ensure!(
        paths == expected.layers.iter().collect::<Vec<_>>(),
        "planned {paths:?} instead of {:?}",
        expected.layers
    );

    let model = inject(model, &config)?;
    let injected = distance(&output(&model.valid()), &before);
    ensure!(injected <= 1e-6, "inject moved the output by {injected:e}");

    let start = read(&model);
    let total = parameters(&start);
    let counted = summary(&model);
    ensure!(
        (counted.trainable, counted.total) == (expected.trainable, expected.total)
            && counted.total == total
            && counted.layers.len() == subject.layers,
        "the summary says {counted}, but {} of {} numbers are trainable by the sizes of the layers, and {total} are \
         there",
        expected.trainable,
        expected.total
    );
    for number in &start {
        ensure!(
            number.trains == expected.trains(&number.path),
            "`{}` is trainable: {}",
            number.path,
            number.trains
        );
    }

    // What another adapter of the same kind makes of the model is a task that this one can solve.
    let teacher = inject(
        pretrained(),
        subject.config_from(method, Init::Random { seed: 5 }),
    )?;
    let goal = (subject.forward)(&teacher, &device).detach();
    let (model, losses) = train(subject, model, &goal, &device);
    ensure!(
        losses[1] < 0.9 * losses[0],
        "{STEPS} steps took the loss from {} to {}",
        losses[0],
        losses[1]
    );
    for (number, old) in read(&model).iter().zip(&start) {
        ensure!(
            number.values.iter().all(|value| value.is_finite()),
            "`{}` is not finite after training",
            number.path
        );
        let moved = number.values != old.values;
        ensure!(
            moved == expected.trains(&number.path),
            "training moved `{}`: {moved}",
            number.path
        );
    }
    for layer in &diagnose(&model).layers {
        let (defect, angle) = (layer.orthogonality_defect, layer.largest_angle);
        ensure!(
            defect <= 1e-5 && angle > 1e-3,
            "`{}` turns by {angle} with a defect of {defect:e}",
            layer.path
        );
    }

    let trained = output(&model.valid());
    let change = distance(&trained, &before);
    ensure!(
        change > 1e-3,
        "training moved the output by only {change:e}"
    );

    let folder = tempfile::tempdir()?;
    Adapter::extract(&model)?.save(folder.path())?;
    let (adapter, report) = Adapter::load(folder.path())?;
    ensure!(report.warnings.is_empty(), "loading warns: {report}");
    let fresh = adapter.attach(pretrained())?;
    let loaded = distance(&output(&fresh.valid()), &trained);
    ensure!(loaded <= 1e-6, "the loaded adapter differs by {loaded:e}");

    let plain_model = merge(model.valid())?;
    let merged = distance(&output(&plain_model), &trained);
    ensure!(merged <= 1e-5, "the merged model differs by {merged:e}");
    let shapes = |numbers: &[Number]| -> Vec<_> {
        let shape = |number: &Number| (number.path.clone(), number.shape.clone());
        numbers.iter().map(shape).collect()
    };
    ensure!(
        shapes(&read(&plain_model)) == shapes(&base),
        "the merged model has other parameters than the one before inject"
    );

    Ok(Row {
        model: subject.name,
        package: subject.package,
        version: version(subject.package),
        layers: expected.in_words,
        method: subject.method_in_words(method),
        trainable: counted.trainable,
        total: counted.total,
        losses,
        injected,
        loaded,
        merged,
    })
}

impl<M> Subject<M> {
    fn config(&self, method: Method) -> AdapterConfig {
        self.config_from(method, Init::Identity)
    }

    fn config_from(&self, method: Method, init: Init) -> AdapterConfig {
        let targets = match self.targets {
            ["all-linear"] => TargetModules::AllLinear,
            names => TargetModules::Names(names.iter().map(ToString::to_string).collect()),
        };
        let [boft, oft] = self.block_sizes;
        match method {
            Method::Boft => BoftConfig::new()
                .with_block_size(boft)
                .with_n_butterfly_factor(2)
                .with_target_modules(targets)
                .with_modules_to_save(self.saved.iter().copied())
                .with_bias(self.bias)
                .with_init(init)
                .into(),
            Method::Oft => OftConfig::new()
                .with_block_size(oft)
                .with_target_modules(targets)
                .with_modules_to_save(self.saved.iter().copied())
                .with_bias(self.bias)
                .with_init(init)
                .into(),
        }
    }

    fn method_in_words(&self, method: Method) -> String {
        let [boft, oft] = self.block_sizes;
        match method {
            Method::Boft => format!("BOFT, b = {boft}, m = 2"),
            Method::Oft => format!("OFT, b = {oft}"),
        }
    }

    /// How many numbers the adapter of a weight has.
    fn adapter_count(&self, method: Method, weight: &Number) -> usize {
        let [boft, oft] = self.block_sizes;
        let triangles = |block: usize| weight.d_input() / block * (block * (block - 1) / 2);
        match method {
            Method::Boft => 2 * triangles(boft) + weight.d_output(),
            Method::Oft => triangles(oft),
        }
    }

    fn is_saved(&self, path: &str) -> bool {
        let path = format!(".{path}.");
        self.saved
            .iter()
            .any(|name| path.contains(&format!(".{name}.")))
    }

    fn is_target(&self, weight: &Number) -> bool {
        let owner = format!(".{}", weight.owner());
        weight.is_weight()
            && !self.is_saved(&weight.path)
            && match self.targets {
                ["all-linear"] => weight.owner_type == "Struct:Linear",
                names => names
                    .iter()
                    .any(|name| owner.ends_with(&format!(".{name}"))),
            }
    }
}

/// What the sizes of a model say about its adapter.
struct Expected {
    /// The paths of the layers to adapt, in the model's order.
    layers: Vec<String>,
    /// The paths of the base's own parameters that are trained.
    trained: Vec<String>,
    trainable: usize,
    total: usize,
    in_words: String,
}

impl Expected {
    fn new<M>(subject: &Subject<M>, method: Method, base: &[Number]) -> Result<Self, Failure> {
        let weights: Vec<_> = base
            .iter()
            .filter(|number| subject.is_target(number))
            .collect();
        let layers: Vec<_> = weights
            .iter()
            .map(|weight| weight.owner().to_string())
            .collect();
        ensure!(
            layers.len() == subject.layers,
            "{} layers have the names to adapt instead of {}: {layers:?}",
            layers.len(),
            subject.layers
        );
        let biases = layers.iter().map(|layer| format!("{layer}.bias"));
        let biases: Vec<_> = match subject.bias {
            Bias::AdapterOnly => biases.collect(),
            _ => Vec::new(),
        };
        let is_trained =
            |number: &&Number| biases.contains(&number.path) || subject.is_saved(&number.path);
        let trained: Vec<_> = base.iter().filter(is_trained).collect();
        ensure!(
            subject.saved.is_empty() || base.iter().any(|number| subject.is_saved(&number.path)),
            "no parameter is in {:?}",
            subject.saved
        );
        let adapters: usize = weights
            .iter()
            .map(|weight| subject.adapter_count(method, weight))
            .sum();
        let linear = weights
            .iter()
            .filter(|weight| weight.owner_type == "Struct:Linear")
            .count();
        let kinds = [
            (linear, "linear"),
            (weights.len() - linear, "convolutional"),
        ];
        let kinds = kinds.iter().filter(|(count, _)| *count > 0);
        let kinds: Vec<_> = kinds
            .map(|(count, kind)| format!("{count} {kind}"))
            .collect();
        Ok(Self {
            trainable: adapters + trained.iter().map(|number| number.count()).sum::<usize>(),
            total: adapters + parameters(base),
            trained: trained.iter().map(|number| number.path.clone()).collect(),
            in_words: kinds.join(", "),
            layers,
        })
    }

    /// Whether training changes the parameter of the adapted model with this path.
    fn trains(&self, path: &str) -> bool {
        let own = ["boft.skew", "boft.scale"];
        let of_adapter = own.iter().any(|name| path.ends_with(name));
        of_adapter || self.trained.iter().any(|trained| trained == path)
    }
}

/// The model after some steps towards a goal, with the loss before them and after them.
fn train<M: Module>(
    subject: &Subject<M>,
    mut model: M,
    goal: &Tensor<2>,
    device: &Device,
) -> (M, [f64; 2]) {
    let loss = |model: &M| {
        let output = (subject.forward)(model, device);
        MseLoss::new().forward(output, goal.clone(), Reduction::Mean)
    };
    let first = loss(&model).into_scalar::<f32>();
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..STEPS {
        let gradients = GradientsParams::from_grads(loss(&model).backward(), &model);
        model = optimizer.step(LEARNING_RATE, model, gradients);
    }
    let last = loss(&model).into_scalar::<f32>();
    (model, [first, last].map(f64::from))
}

/// The largest distance of two outputs, relative to the largest number of the second one.
fn distance(output: &Tensor<2>, reference: &Tensor<2>) -> f64 {
    let (output, reference) = (host(output.clone()), host(reference.clone()));
    assert_eq!(output.len(), reference.len());
    let largest = reference
        .iter()
        .fold(0.0, |max, value| f32::max(max, value.abs()));
    let distances = output.iter().zip(&reference).map(|(a, b)| (a - b).abs());
    // A number that is not one must not get lost in a maximum.
    let distance = distances.fold(0.0, |max, distance| match distance.is_nan() {
        true => f32::INFINITY,
        false => f32::max(max, distance),
    });
    f64::from(distance) / f64::from(largest)
}

/// How far the largest number of an output is from the smallest.
fn spread(output: &Tensor<2>) -> f32 {
    let values = host(output.clone());
    let largest = values.iter().copied().fold(f32::MIN, f32::max);
    largest - values.iter().copied().fold(f32::MAX, f32::min)
}

/// The version of a package that this one was built with.
fn version(package: &str) -> String {
    let lock = include_str!("../Cargo.lock");
    let entry = format!("name = \"{package}\"\nversion = \"");
    let version = lock
        .split_once(&entry)
        .and_then(|(_, rest)| rest.split_once('"'));
    version
        .map_or("unknown", |(version, _)| version)
        .to_string()
}

/// The heading of the table of [`Row`]s.
const HEADING: &str = "\
| model | crate | adapted layers | method | trainable of all | loss | inject moves | loaded differs | merged differs | result |
|---|---|---|---|--:|--:|--:|--:|--:|---|";

/// The table of these results in Markdown.
pub fn table(results: &[(&str, Method, Result<Row, String>)]) -> String {
    let lines = results.iter().map(|(model, method, result)| match result {
        Ok(row) => row.to_string(),
        Err(reason) => format!("| {model} | | | {method:?} | | | | | | fails: {reason} |"),
    });
    let lines: Vec<_> = [HEADING.to_string()].into_iter().chain(lines).collect();
    lines.join("\n")
}

impl Row {
    /// The columns that are the same on every machine.
    pub fn facts(&self) -> String {
        format!(
            "| {} | {} {} | {} | {} | {} of {} |",
            self.model,
            self.package,
            self.version,
            self.layers,
            self.method,
            self.trainable,
            self.total
        )
    }
}

impl Display for Row {
    /// A line of the table.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let distance = |value: f64| match value {
            0.0 => "0".to_string(),
            value => format!("{value:.0e}"),
        };
        write!(
            f,
            "{} {:.2e} → {:.2e} | {} | {} | {} | passes |",
            self.facts(),
            self.losses[0],
            self.losses[1],
            distance(self.injected),
            distance(self.loaded),
            distance(self.merged)
        )
    }
}
