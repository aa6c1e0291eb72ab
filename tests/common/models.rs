//! Models to adapt, and ways to read every number of a model by its path.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleDisplay, ModuleMapper, ModuleVisitor, Param};
use burn::nn;
use burn::tensor::{DType, Device, Gradients, Tensor};
use burn_boft::{BoftAdapter, BoftLinear};

use super::{host, noise, tensor};

/// A linear layer of either kind.
pub trait Layer: Module + ModuleDisplay + 'static {
    fn from_linear(linear: nn::Linear) -> Self;
    fn apply(&self, input: Tensor<2>) -> Tensor<2>;
    fn adapter(&self) -> Option<&BoftAdapter>;
}

impl Layer for nn::Linear {
    fn from_linear(linear: nn::Linear) -> Self {
        linear
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }

    fn adapter(&self) -> Option<&BoftAdapter> {
        self.weight.reparameterization()
    }
}

impl Layer for BoftLinear {
    fn from_linear(linear: nn::Linear) -> Self {
        linear.into()
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }

    fn adapter(&self) -> Option<&BoftAdapter> {
        self.weight.reparameterization()
    }
}

/// A linear layer whose numbers depend on the seed only.
pub fn linear(sizes: [usize; 2], seed: u64, dtype: DType, device: &Device) -> nn::Linear {
    let [d_input, d_output] = sizes;
    let size = 1.0 / (d_input as f64).sqrt();
    let weight = noise(d_input * d_output, seed, 2.0 * size);
    let bias = noise(d_output, seed + 1, 0.5);
    nn::Linear {
        weight: Param::from_tensor(tensor(&weight, sizes, dtype, device)),
        bias: Some(Param::from_tensor(tensor(&bias, [d_output], dtype, device))),
    }
}

pub const INPUT: usize = 24;
pub const OUTPUT: usize = 5;

/// `24 → 16 → 12 → 5`, with a norm whose bias belongs to no adapted layer.
#[derive(Module, Debug)]
pub struct Net<L: Layer> {
    pub hidden: L,
    pub norm: nn::LayerNorm,
    pub output: L,
    pub head: L,
}

impl<L: Layer> Net<L> {
    pub fn new(seed: u64, device: &Device) -> Self {
        let layer = |sizes, seed| L::from_linear(linear(sizes, seed, DType::F32, device));
        Self {
            hidden: layer([INPUT, 16], seed),
            norm: nn::LayerNormConfig::new(16).init(device),
            output: layer([16, 12], seed + 10),
            head: layer([12, OUTPUT], seed + 20),
        }
    }

    pub fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let hidden = burn::tensor::activation::gelu(self.hidden.apply(input));
        let output = burn::tensor::activation::gelu(self.output.apply(self.norm.forward(hidden)));
        self.head.apply(output)
    }
}

/// Rows of noise.
pub fn rows<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = noise(shape.iter().product(), seed, 1.5);
    tensor(&values, shape, DType::F32, device)
}

/// The values of every parameter by path, adapters included.
pub fn numbers<M: Module>(model: &M) -> BTreeMap<String, Vec<f64>> {
    read(model, &|param| Some(param.values()))
}

/// The paths of the parameters that require a gradient.
pub fn trainable<M: Module>(model: &M) -> BTreeSet<String> {
    read(model, &|param| param.trains().then_some(()))
        .into_keys()
        .collect()
}

/// The gradient of every parameter that has one, by path.
pub fn gradients<M: Module>(model: &M, gradients: &Gradients) -> BTreeMap<String, Vec<f64>> {
    read(model, &|param| param.gradient(gradients))
}

/// The precision of every parameter by path.
pub fn precisions<M: Module>(model: &M) -> BTreeMap<String, DType> {
    read(model, &|param| Some(param.dtype()))
}

/// What a test reads from a parameter of any rank.
pub trait Number {
    fn values(&self) -> Vec<f64>;
    fn trains(&self) -> bool;
    fn gradient(&self, gradients: &Gradients) -> Option<Vec<f64>>;
    fn dtype(&self) -> DType;
}

impl<const D: usize> Number for Tensor<D> {
    fn values(&self) -> Vec<f64> {
        match self.dtype() {
            DType::QFloat(_) => host(self.clone().dequantize()),
            _ => host(self.clone()),
        }
    }

    fn trains(&self) -> bool {
        self.is_require_grad()
    }

    fn gradient(&self, gradients: &Gradients) -> Option<Vec<f64>> {
        self.grad(gradients).map(host)
    }

    fn dtype(&self) -> DType {
        self.dtype()
    }
}

fn read<M: Module, T>(model: &M, read: &dyn Fn(&dyn Number) -> Option<T>) -> BTreeMap<String, T> {
    let mut reader = Reader {
        path: Vec::new(),
        read,
        found: BTreeMap::new(),
    };
    model.visit(&mut reader);
    reader.found
}

struct Reader<'a, T> {
    path: Vec<String>,
    read: &'a dyn Fn(&dyn Number) -> Option<T>,
    found: BTreeMap<String, T>,
}

impl<T> ModuleVisitor for Reader<'_, T> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(value) = (self.read)(&param.base()) {
            self.found.insert(self.path.join("."), value);
        }
    }
}

/// Replaces the values of the parameter at one path.
pub fn set<M: Module>(model: M, path: &str, change: impl Fn(Vec<f64>) -> Vec<f64>) -> M {
    let mut setter = Setter {
        path: Vec::new(),
        target: path,
        change,
        found: false,
    };
    let model = model.map(&mut setter);
    assert!(setter.found, "the model has no `{path}`");
    model
}

struct Setter<'a, F> {
    path: Vec<String>,
    target: &'a str,
    change: F,
    found: bool,
}

impl<F: Fn(Vec<f64>) -> Vec<f64>> ModuleMapper for Setter<'_, F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.join(".") != self.target {
            return param;
        }
        self.found = true;
        param.map(|old| {
            let (dims, dtype, device) = (old.dims(), old.dtype(), old.device());
            let trains = old.is_require_grad();
            tensor(&(self.change)(host(old)), dims, dtype, &device).set_require_grad(trains)
        })
    }
}

/// The largest distance of two outputs.
pub fn distance<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f64 {
    let (a, b) = (host(a), host(b));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(&b).all(|value| value.is_finite()));
    a.iter()
        .zip(&b)
        .fold(0.0, |max, (a, b)| f64::max(max, (a - b).abs()))
}
