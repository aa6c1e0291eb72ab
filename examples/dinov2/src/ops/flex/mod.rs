//! CPU kernels, in f32.
//!
//! Loops that the compiler turns into the widest vectors of the processor; chunks and heads are shared among
//! threads.

mod attention;
mod elementwise;
mod matrix;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Bytes, DType, Shape};

use super::TransformerBackend;
use attention::by_head;
use elementwise::{map, normal_density, normal_distribution};

impl TransformerBackend for Flex {
    fn fused_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        let input = input.to_contiguous();
        let output = map(values(&input), values(&input), |x, _| {
            x * normal_distribution(x)
        });
        tensor(output, input.shape())
    }

    fn fused_gelu_backward(
        input: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (input, gradient) = (input.to_contiguous(), gradient.to_contiguous());
        let gradients = map(values(&input), values(&gradient), |x, gradient| {
            gradient * (normal_distribution(x) + x * normal_density(x))
        });
        tensor(gradients, input.shape())
    }

    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [output] = by_head([query, key, value], attention::forward);
        output
    }

    fn fused_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [query, key, value] = by_head([query, key, value, gradient], attention::backward);
        (query, key, value)
    }
}

/// The numbers of a contiguous tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("the tensor is contiguous and in single precision")
}

fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::F32,
    )
}
