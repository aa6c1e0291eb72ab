//! The models of PEFT's fixtures, and their files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig,
    LinearConfig, PaddingConfig2d,
};
use burn::tensor::activation::{gelu, relu};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::models::Layer;

/// Tensors of a file, widened: shape and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// The tensors and the metadata of a file.
pub fn read(path: &Path) -> (Tensors, BTreeMap<String, String>) {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| {
        let bytes = view.data();
        let numbers = match view.dtype() {
            Dtype::F32 => {
                let numbers = bytes.as_chunks::<4>().0.iter();
                numbers.map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            Dtype::I64 => {
                let numbers = bytes.as_chunks::<8>().0.iter();
                numbers.map(|b| i64::from_le_bytes(*b) as f64).collect()
            }
            other => panic!("{key} is {other:?}"),
        };
        (key.to_string(), (view.shape().to_vec(), numbers))
    });
    (tensors.collect(), metadata.into_iter().collect())
}

// The models of the fixtures' README, with linear layers of either kind.

#[derive(Module, Debug)]
pub struct One<L: Layer> {
    layer: L,
}

#[derive(Module, Debug)]
pub struct Mlp<L: Layer, N: Norm> {
    fc1: L,
    fc2: L,
    norm: N,
    classifier: L,
}

#[derive(Module, Debug)]
pub struct Conv<L: Layer> {
    conv1: Conv2d,
    conv2: Conv2d,
    head: L,
}

#[derive(Module, Debug)]
pub struct Text<L: Layer> {
    embedding: Embedding,
    head: L,
}

#[derive(Module, Debug)]
pub struct Stack<L: Layer> {
    encoder: Encoder<L>,
}

#[derive(Module, Debug)]
pub struct Encoder<L: Layer> {
    layers: Vec<Block<L>>,
}

#[derive(Module, Debug)]
pub struct Block<L: Layer> {
    fc1: L,
    fc2: L,
}

/// A norm over 16 features.
pub trait Norm: Module + burn::module::ModuleDisplay + 'static {
    fn new(device: &Device) -> Self;
    fn apply(&self, input: Tensor<2>) -> Tensor<2>;
}

impl Norm for BatchNorm {
    fn new(device: &Device) -> Self {
        BatchNormConfig::new(16).init(device)
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

impl Norm for LayerNorm {
    fn new(device: &Device) -> Self {
        LayerNormConfig::new(16).init(device)
    }

    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

/// A model of the fixtures.
pub trait Model: Module {
    /// A model with the sizes of the fixture. [`SetBase`] gives it the numbers.
    fn new(base: &Tensors, device: &Device) -> Self;

    /// Computes on an input of any rank, given flat with its shape: rows of features, or images.
    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1>;
}

/// A linear layer with the sizes of a weight from PyTorch.
pub fn linear<L: Layer>(base: &Tensors, name: &str, device: &Device) -> L {
    let shape = &base[&format!("{name}.weight")].0;
    let config =
        LinearConfig::new(shape[1], shape[0]).with_bias(base.contains_key(&format!("{name}.bias")));
    L::from_linear(config.init(device))
}

fn tokens(input: Tensor<1>, shape: &[usize]) -> Tensor<2> {
    let features = *shape.last().unwrap();
    let rows = shape.iter().product::<usize>() / features;
    input.reshape([rows, features])
}

fn flat<const D: usize>(output: Tensor<D>) -> Tensor<1> {
    let count = output.shape().num_elements();
    output.reshape([count])
}

impl<L: Layer> Model for One<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            layer: linear(base, "layer", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        flat(self.layer.apply(tokens(input, shape)))
    }
}

impl<L: Layer, N: Norm> Model for Mlp<L, N> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            fc1: linear(base, "fc1", device),
            fc2: linear(base, "fc2", device),
            norm: N::new(device),
            classifier: linear(base, "classifier", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let hidden = gelu(self.fc1.apply(tokens(input, shape)));
        let hidden = self.norm.apply(self.fc2.apply(hidden));
        flat(self.classifier.apply(hidden))
    }
}

impl<L: Layer> Model for Text<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(11, 16).init(device),
            head: linear(base, "head", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let tokens = Tensor::from_data([[3, 9, 0], [7, 7, 10]], &input.device());
        let found = self.embedding.forward(tokens).reshape([6, 16]);
        flat(self.head.apply(found + self::tokens(input, shape)))
    }
}

impl<L: Layer> Model for Conv<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        Self {
            conv1: Conv2dConfig::new([4, 6], [3, 3])
                .with_stride([2, 2])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device),
            conv2: Conv2dConfig::new([6, 8], [3, 2]).init(device),
            head: linear(base, "head", device),
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let images: Tensor<4> = input.reshape([shape[0], shape[1], shape[2], shape[3]]);
        let features = self.conv2.forward(relu(self.conv1.forward(images)));
        let [batch, channels, height, width] = features.dims();
        let features = features.reshape([batch, channels, height * width]);
        flat(
            self.head
                .apply(features.mean_dim(2).reshape([batch, channels])),
        )
    }
}

impl<L: Layer> Model for Stack<L> {
    fn new(base: &Tensors, device: &Device) -> Self {
        let block = |index: usize| Block {
            fc1: linear(base, &format!("encoder.layers.{index}.fc1"), device),
            fc2: linear(base, &format!("encoder.layers.{index}.fc2"), device),
        };
        Self {
            encoder: Encoder {
                layers: (0..3).map(block).collect(),
            },
        }
    }

    fn forward(&self, input: Tensor<1>, shape: &[usize]) -> Tensor<1> {
        let mut hidden = tokens(input, shape);
        for block in &self.encoder.layers {
            hidden = block.fc2.apply(gelu(block.fc1.apply(hidden)));
        }
        flat(hidden)
    }
}

/// PyTorch's name of a parameter, and whether PyTorch stores it transposed.
fn in_pytorch(path: &[(String, String)]) -> (String, bool) {
    let mut names: Vec<_> = path.iter().map(|(name, _)| name.as_str()).collect();
    let (name, container) = path.last().unwrap();
    *names.last_mut().unwrap() = match name.as_str() {
        "gamma" => "weight",
        "beta" => "bias",
        name => name,
    };
    (
        names.join("."),
        container == "Struct:Linear" && name == "weight",
    )
}

/// Sets every number of a model.
pub struct SetBase<'a> {
    pub path: Vec<(String, String)>,
    pub base: &'a Tensors,
}

impl ModuleMapper for SetBase<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_string(), container.to_string()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (key, transposed) = in_pytorch(&self.path);
        let (shape, numbers) = &self.base[&key];
        param.map(|old| {
            let data = TensorData::new(numbers.clone(), shape.clone()).convert::<f32>();
            let tensor = Tensor::<D>::from_data(data, &old.device());
            match transposed {
                true => tensor.swap_dims(0, 1),
                false => tensor,
            }
        })
    }
}

/// Turns every flag off: norms use their running statistics, dropout does nothing.
pub struct Eval;

impl ModuleMapper for Eval {
    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        flag.with_value(false)
    }
}

/// A function of a model of any type.
pub trait UseModel {
    type Output;

    fn with<M: Model>(self) -> Self::Output;
}

/// Calls a function with the model type that the reference of a folder names.
pub fn with_model<L: Layer, U: UseModel>(folder: &Path, using: U) -> U::Output {
    let (_, metadata) = read(&folder.join("reference.safetensors"));
    let norm = metadata.get("norm").map(String::as_str);
    match (metadata["model"].as_str(), norm) {
        ("linear", _) => using.with::<One<L>>(),
        ("mlp", Some("batch")) => using.with::<Mlp<L, BatchNorm>>(),
        ("mlp", Some("layer")) => using.with::<Mlp<L, LayerNorm>>(),
        ("conv", _) => using.with::<Conv<L>>(),
        ("text", _) => using.with::<Text<L>>(),
        ("stack", _) => using.with::<Stack<L>>(),
        other => panic!("{other:?}"),
    }
}
