//! The numbers of a model, counted and filled without any code of burn-boft.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// One parameter of a model, or one running statistic.
#[derive(Debug, Clone, PartialEq)]
pub struct Number {
    /// Its dotted path.
    pub path: String,
    /// What Burn calls the type of the module that it belongs to, such as `Struct:Linear`.
    pub owner_type: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
    /// Whether training changes it.
    pub trains: bool,
}

impl Number {
    /// How many numbers it consists of.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The path of the module that it belongs to.
    pub fn owner(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(owner, _)| owner)
    }

    /// Whether it is the weight of a layer of Burn that can be adapted.
    pub fn is_weight(&self) -> bool {
        let types = ["Struct:Linear", "Struct:Conv2d"];
        types.contains(&self.owner_type.as_str()) && self.path.ends_with("weight")
    }

    /// Whether it is a running statistic of a batch norm, which is no parameter.
    pub fn is_statistic(&self) -> bool {
        let endings = [".running_mean", ".running_var"];
        self.owner_type == "Struct:BatchNorm" && endings.iter().any(|end| self.path.ends_with(end))
    }

    /// How many inputs one output of the layer has, if this is a weight: the axis that is rotated.
    pub fn d_input(&self) -> usize {
        match self.owner_type == "Struct:Linear" {
            true => self.shape[0],
            false => self.shape[1..].iter().product(),
        }
    }

    /// How many output channels the layer has, if this is a weight.
    pub fn d_output(&self) -> usize {
        match self.owner_type == "Struct:Linear" {
            true => self.shape[1],
            false => self.shape[0],
        }
    }
}

/// Reads every parameter of a model, in its order.
pub fn read<M: Module>(model: &M) -> Vec<Number> {
    let mut reader = Reader::default();
    model.visit(&mut reader);
    reader.found
}

#[derive(Default)]
struct Reader {
    path: Vec<(String, String)>,
    found: Vec<Number>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (path, owner_type) = place(&self.path);
        let value = param.base();
        self.found.push(Number {
            path,
            owner_type,
            shape: value.dims().to_vec(),
            trains: value.is_require_grad(),
            values: host(value),
        });
    }
}

/// How many numbers the parameters have together, without running statistics.
pub fn parameters(numbers: &[Number]) -> usize {
    let parameters = numbers.iter().filter(|number| !number.is_statistic());
    parameters.map(Number::count).sum()
}

/// Gives every parameter other values, which depend on the seed and on nothing else.
///
/// Biases are not zero afterwards, and the scales of norms are not one, so that nothing cancels out.
pub fn fill<M: Module>(model: M, seed: u64) -> M {
    let rng = StdRng::seed_from_u64(seed);
    let path = Vec::new();
    model.map(&mut Filler { path, rng })
}

struct Filler {
    path: Vec<(String, String)>,
    rng: StdRng,
}

impl ModuleMapper for Filler {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (path, owner_type) = place(&self.path);
        let name = path.rsplit('.').next().unwrap_or_default();
        let shape = param.lazy_shape().to_vec();
        let inputs = match owner_type.as_str() {
            "Struct:Linear" => shape[0],
            "Struct:Embedding" => 1,
            _ => shape[1.min(D - 1)..].iter().product(),
        };
        let mut uniform = || self.rng.random_range(-1.0..1.0f32);
        let mut value = || match name {
            "gamma" => 1.0 + 0.2 * uniform(),
            "running_var" => 1.0 + 0.5 * uniform().abs(),
            "beta" | "bias" | "running_mean" => 0.2 * uniform(),
            _ => uniform() * (3.0 / inputs as f32).sqrt(),
        };
        let values: Vec<_> = (0..shape.iter().product()).map(|_| value()).collect();
        param.map(|old| {
            let data = TensorData::new(values, old.shape());
            Tensor::from_data(data, &old.device()).set_require_grad(old.is_require_grad())
        })
    }
}

/// The dotted path of a parameter, and the type of the module that it belongs to.
fn place(path: &[(String, String)]) -> (String, String) {
    let names: Vec<_> = path.iter().map(|(name, _)| name.as_str()).collect();
    let owner_type = path.last().map_or("", |(_, owner)| owner);
    (names.join("."), owner_type.to_string())
}

/// A tensor's values in the order of its rows.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Values that look random, in `-1..1`.
pub fn noise<const D: usize>(
    shape: [usize; D],
    seed: u64,
    device: &burn::tensor::Device,
) -> Tensor<D> {
    let mut rng = StdRng::seed_from_u64(seed);
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
