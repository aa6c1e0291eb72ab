//! Attention, GELU, layer normalization and scaled sums with backward passes of their own.
//!
//! Burn's fused attention and layer normalization have no backward pass, so that a model that is trained takes a dozen
//! operations for each, and Burn's CPU backend computes these and GELU on one thread. Here they are operations
//! of the graph, with kernels for single precision on the CPU. In all other cases, also for norms and scales that are
//! trained themselves, they are computed by Burn's own operations.

mod autodiff;
mod flex;

use burn::backend::{Backend, Dispatch, DispatchDevice, backend_extension, tensor::FloatTensor};
use burn::nn::LayerNorm;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor, activation, module};

/// The operations of a transformer for which this example has CPU kernels.
#[backend_extension(Flex, Autodiff)]
pub trait TransformerBackend: Backend {
    /// `x·Φ(x)`, with `Φ` the normal distribution.
    fn fused_gelu(input: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `g·(Φ(x) + x·φ(x))`.
    fn fused_gelu_backward(
        input: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `(x − mean) / √(variance + ε) ⊙ γ + β` over the last axis.
    fn fused_layer_norm(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// The gradient of the input of a layer norm.
    fn fused_layer_norm_backward(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// `tokens + update ⊙ scale`, with a scale for each channel.
    fn fused_add_scaled(
        tokens: FloatTensor<Self>,
        update: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `tokens ⊙ scale`, with a scale for each channel.
    fn fused_scale(tokens: FloatTensor<Self>, scale: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `softmax(Q·Kᵀ / √head_size)·V` for `[batch, heads, tokens, head_size]` tensors.
    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The gradients of query, key and value.
    fn fused_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// GELU without approximation by tanh.
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match has_kernels(&input) {
        true => {
            let output = <Dispatch as TransformerBackend>::fused_gelu(input.into_dispatch());
            Tensor::from_dispatch(output)
        }
        false => activation::gelu(input),
    }
}

/// The norm of every token, as the layer computes it.
///
/// Burn's layer keeps its epsilon to itself.
pub fn layer_norm<const D: usize>(layer: &LayerNorm, epsilon: f64, input: Tensor<D>) -> Tensor<D> {
    match &layer.beta {
        Some(beta) if has_kernels(&input) => {
            Tensor::from_dispatch(<Dispatch as TransformerBackend>::fused_layer_norm(
                input.into_dispatch(),
                layer.gamma.val().into_dispatch(),
                beta.val().into_dispatch(),
                epsilon,
            ))
        }
        _ => layer.forward(input),
    }
}

/// `tokens + update ⊙ scale`.
///
/// # Shapes
///
/// - `tokens`, `update`, output: `[…, channels]`
/// - `scale`: `[channels]`
pub fn add_scaled<const D: usize>(
    tokens: Tensor<D>,
    update: Tensor<D>,
    scale: Tensor<1>,
) -> Tensor<D> {
    match has_kernels(&tokens) {
        true => Tensor::from_dispatch(<Dispatch as TransformerBackend>::fused_add_scaled(
            tokens.into_dispatch(),
            update.into_dispatch(),
            scale.into_dispatch(),
        )),
        false => tokens + update * scale.unsqueeze(),
    }
}

/// Scaled dot-product attention, `softmax(Q·Kᵀ / √head_size)·V`.
///
/// # Shapes
///
/// - `query`, `key`, `value`, output: `[batch, heads, tokens, head_size]`
pub fn attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>) -> Tensor<4> {
    if has_kernels(&query) {
        return Tensor::from_dispatch(<Dispatch as TransformerBackend>::fused_attention(
            query.into_dispatch(),
            key.into_dispatch(),
            value.into_dispatch(),
        ));
    }
    match query.is_autodiff() {
        // Burn would differentiate its fallback for attention, including the maximum of every row, which the gradient of
        // a softmax does not need.
        true => {
            let scale = (query.dims()[3] as f64).powf(-0.5);
            let scores = (query * scale).matmul(key.transpose());
            softmax(scores, 3).matmul(value)
        }
        false => module::attention(query, key, value, None, None, Default::default()),
    }
}

fn has_kernels<const D: usize>(tensor: &Tensor<D>) -> bool {
    fn is_cpu(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Flex(_) => true,
            DispatchDevice::Autodiff(inner) => is_cpu(inner),
            #[allow(unreachable_patterns)] // Which devices exist depends on the features.
            _ => false,
        }
    }

    tensor.dtype() == DType::F32 && is_cpu(tensor.device().as_dispatch())
}

#[cfg(test)]
mod tests {
    use burn::module::{Module, Param};
    use burn::nn::LayerNormConfig;
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    use super::*;

    /// Values and gradients of `run` in f32, by the kernels, and in f64, by Burn's operations.
    fn both<const N: usize, const D: usize>(
        shape: [usize; D],
        run: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    ) -> [Vec<TensorData>; 2] {
        let device = Device::default().autodiff();
        let draw = || Tensor::<D>::random(shape, Distribution::Normal(0.0, 2.0), &device);
        let inputs = [(); N].map(|()| draw());
        let weights = draw();
        [DType::F32, DType::F64].map(|dtype| {
            let tracked = |tensor: &Tensor<D>| tensor.clone().cast(dtype).detach().require_grad();
            let inputs = inputs.each_ref().map(tracked);
            let output = run(inputs.clone());
            let weighted = output.clone() * weights.clone().cast(dtype);
            let gradients = weighted.sum().backward();
            let gradients = inputs.iter().map(|input| {
                let gradient = input.grad(&gradients);
                gradient.expect("every input has a gradient").into_data()
            });
            std::iter::once(output.into_data())
                .chain(gradients)
                .map(|data| data.convert::<f64>())
                .collect()
        })
    }

    /// Compares values and gradients, relative to the largest number of each, or to 1.
    ///
    /// The largest drift of 150 runs on 2 cores of x86-64 was 1.7e-7 for GELU and 2.2e-6 for attention.
    fn assert_close([kernels, burn]: [Vec<TensorData>; 2], tolerance: f64) {
        for (kernel, burn) in kernels.iter().zip(&burn) {
            let largest = burn.iter::<f64>().map(f64::abs).fold(1.0, f64::max);
            kernel.assert_approx_eq::<f64>(burn, Tolerance::absolute(tolerance * largest));
        }
    }

    #[test]
    fn gelu_is_that_of_burn() {
        assert_close(both([3, 5001], |[input]| gelu(input)), 1e-6);
    }

    #[test]
    fn attention_is_that_of_burn() {
        // The last has more tokens than attend at a time.
        for shape in [[2, 3, 7, 5], [1, 2, 67, 16], [2, 2, 1, 4], [1, 2, 401, 6]] {
            let outcome = both(shape, |[query, key, value]| attention(query, key, value));
            assert_close(outcome, 1e-5);
        }
    }

    #[test]
    fn attention_reads_heads_where_they_lie() {
        let heads = |tokens: Tensor<3>| tokens.reshape([2, 9, 3, 4]).swap_dims(1, 2);
        let outcome = both([2, 9, 12], |inputs: [Tensor<3>; 3]| {
            let [query, key, value] = inputs.map(heads);
            attention(query, key, value).swap_dims(1, 2).flatten(2, 3)
        });
        assert_close(outcome, 1e-5);
    }

    /// A norm with random numbers, in a precision.
    fn norm(width: usize, epsilon: f64) -> impl Fn(DType) -> LayerNorm {
        let device = Device::default();
        let draw = || Tensor::<1>::random([width], Distribution::Normal(1.0, 0.5), &device);
        let (gamma, beta) = (draw(), draw());
        move |dtype| {
            let parameter = |values: &Tensor<1>| {
                let values = Tensor::from_inner(values.clone().cast(dtype));
                Param::from_tensor(values).set_require_grad(false)
            };
            let mut norm = LayerNormConfig::new(width)
                .with_epsilon(epsilon)
                .init(&device);
            norm.gamma = parameter(&gamma);
            norm.beta = Some(parameter(&beta));
            norm
        }
    }

    #[test]
    fn layer_norm_is_that_of_burn() {
        // The last has more rows than one task computes.
        for shape in [[2, 3, 7], [1, 2, 32], [3, 5, 97], [4, 150, 384]] {
            let (width, epsilon) = (shape[2], 1e-2);
            let norm = norm(width, epsilon);
            let outcome = both(shape, |[input]| {
                // Far from zero, as the tokens of a trained model are in some channels.
                let input = input * 3.0 + 20.0;
                layer_norm(&norm(input.dtype()), epsilon, input)
            });
            assert_close(outcome, 1e-5);
        }
    }

    #[test]
    fn scaled_sums_are_those_of_burn() {
        for shape in [[2, 3, 7], [4, 150, 384]] {
            let device = Device::default();
            let scale = Tensor::<1>::random([shape[2]], Distribution::Normal(0.0, 1.0), &device);
            let outcome = both(shape, |[tokens, update]| {
                let scale = Tensor::from_inner(scale.clone().cast(tokens.dtype()));
                add_scaled(tokens, update, scale)
            });
            assert_close(outcome, 1e-6);
            // Whoever adds a tensor to itself gets the gradients of both.
            let outcome = both(shape, |[tokens]| {
                let scale = Tensor::from_inner(scale.clone().cast(tokens.dtype()));
                add_scaled(tokens.clone(), tokens, scale)
            });
            assert_close(outcome, 1e-6);
        }
    }

    #[test]
    fn norms_and_scales_that_are_trained_have_gradients() {
        let device = Device::default().autodiff();
        let draw = |shape: [usize; 2]| {
            let numbers = Tensor::<2>::random(shape, Distribution::Normal(0.5, 1.0), &device);
            numbers.require_grad()
        };
        let vector = || draw([1, 24]).reshape([24]).detach().require_grad();
        let (input, weights) = (draw([9, 24]), draw([9, 24]));
        let mut layer = LayerNormConfig::new(24).with_epsilon(1e-3).init(&device);
        layer.gamma = Param::from_tensor(vector());
        layer.beta = Some(Param::from_tensor(vector()));
        let scale = vector();
        let parameters = [
            layer.gamma.val(),
            layer.beta.as_ref().unwrap().val(),
            scale.clone(),
        ];

        let ours = add_scaled(
            input.clone(),
            layer_norm(&layer, 1e-3, input.clone()),
            scale.clone(),
        );
        let burns = input.clone() + layer.forward(input) * scale.unsqueeze();
        let [ours, burns] = [ours, burns].map(|output| {
            let gradients = (output * weights.clone()).sum().backward();
            let gradients = parameters
                .each_ref()
                .map(|parameter| parameter.grad(&gradients));
            gradients.map(|gradient| gradient.expect("a gradient").into_data())
        });
        for (ours, burns) in ours.iter().zip(&burns) {
            ours.assert_approx_eq::<f32>(burns, Tolerance::absolute(1e-4));
        }
    }

    /// Under gradient checkpointing the operations are computed a second time, on the way back.
    #[test]
    fn what_is_computed_again_has_the_same_gradients() {
        let gradient = |device: &Device| {
            let row = (0..48)
                .map(|i| (i * i % 13) as f32 - 5.0)
                .collect::<Vec<_>>();
            let input = Tensor::<1>::from_floats(row.as_slice(), device).reshape([2, 24]);
            let input: Tensor<2> = input.require_grad();
            let scale = Tensor::<1>::full([24], 0.7, device);
            let layer = LayerNormConfig::new(24).init(device).no_grad();
            // A chain of operations of which only the first finds its input.
            let hidden = layer_norm(&layer, 1e-5, input.clone());
            let hidden = add_scaled(hidden.clone(), gelu(hidden), scale);
            let hidden = layer_norm(&layer, 1e-5, hidden);
            let gradients = (hidden.clone() * hidden.clone() * hidden).sum().backward();
            input.grad(&gradients).expect("a gradient").into_data()
        };
        let device = Device::default().autodiff();
        let kept = gradient(&device);
        let again = gradient(&device.gradient_checkpointing());
        again.assert_approx_eq::<f32>(&kept, Tolerance::absolute(1e-6));
        assert!(
            kept.iter::<f32>().any(|number| number.abs() > 0.1),
            "{kept}"
        );
    }

    #[test]
    fn far_scores_and_large_numbers_stay_finite() {
        let device = Device::default();
        let row = |values: [f32; 4]| Tensor::<1>::from_data(values, &device);
        let query = row([1e4, -1e4, 2e3, 0.0]).reshape([1, 1, 4, 1]);
        let value = row([1.0, 2.0, 3.0, 4.0]).reshape([1, 1, 4, 1]);
        let output: Tensor<1> = attention(query.clone(), query, value).flatten(0, 3);
        output.into_data().assert_approx_eq::<f32>(
            &TensorData::from([1.0f32, 2.0, 1.0, 2.5]),
            Tolerance::absolute(1e-6),
        );
        gelu(row([1e30, -1e30, 40.0, -40.0]))
            .into_data()
            .assert_approx_eq::<f32>(
                &TensorData::from([1e30f32, 0.0, 40.0, 0.0]),
                Tolerance::relative(1e-6),
            );
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let device = Device::default();
        let tokens = Tensor::<1>::from_data([0.5, f32::NAN, 1.0], &device);
        let output = gelu(tokens.clone()).is_nan().into_data();
        assert_eq!(output, TensorData::from([false, true, false]));

        let tokens: Tensor<4> = tokens.reshape([1, 1, 3, 1]);
        let output = attention(tokens.clone(), tokens.clone(), tokens).is_nan();
        assert!(output.all().into_scalar::<bool>());
    }
}
