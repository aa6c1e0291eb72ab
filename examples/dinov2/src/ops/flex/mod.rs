//! CPU kernels, in f32.
//!
//! Loops that the compiler turns into the widest vectors of the processor; chunks and heads are shared among
//! threads.

mod attention;
mod elementwise;
mod matrix;
mod norm;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Bytes, DType, Shape};

use super::TransformerBackend;
use attention::by_head;
use elementwise::{map, map_rows, normal_density, normal_distribution};

impl TransformerBackend for Flex {
    fn fused_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        let input = input.to_contiguous();
        let output = map([values(&input)], |[x]| x * normal_distribution(x));
        tensor(output, input.shape())
    }

    fn fused_gelu_backward(
        input: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (input, gradient) = (input.to_contiguous(), gradient.to_contiguous());
        let gradients = map([values(&input), values(&gradient)], |[x, gradient]| {
            gradient * (normal_distribution(x) + x * normal_density(x))
        });
        tensor(gradients, input.shape())
    }

    fn fused_layer_norm(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let [input, gamma, beta] = [input, gamma, beta].map(|tensor| tensor.to_contiguous());
        let columns = [values(&gamma), values(&beta)];
        tensor(
            norm::forward(values(&input), columns, epsilon as f32),
            input.shape(),
        )
    }

    fn fused_layer_norm_backward(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let [input, gamma, gradient] =
            [input, gamma, gradient].map(|tensor| tensor.to_contiguous());
        let rows = [values(&input), values(&gradient)];
        tensor(
            norm::backward(rows, values(&gamma), epsilon as f32),
            input.shape(),
        )
    }

    fn fused_add_scaled(
        tokens: FloatTensor<Self>,
        update: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [tokens, update, scale] = [tokens, update, scale].map(|tensor| tensor.to_contiguous());
        let (rows, scale) = ([values(&tokens), values(&update)], values(&scale));
        let add = |(): &(), [token, update]: [f32; 2], [scale]: [f32; 1]| token + update * scale;
        tensor(
            map_rows(rows, [scale], scale.len(), |_, _| (), add),
            tokens.shape(),
        )
    }

    fn fused_scale(tokens: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self> {
        let [tokens, scale] = [tokens, scale].map(|tensor| tensor.to_contiguous());
        let (rows, scale) = ([values(&tokens)], values(&scale));
        let scaled = |(): &(), [token]: [f32; 1], [scale]: [f32; 1]| token * scale;
        tensor(
            map_rows(rows, [scale], scale.len(), |_, _| (), scaled),
            tokens.shape(),
        )
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
