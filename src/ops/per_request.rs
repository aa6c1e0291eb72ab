//! A batch whose requests use different adapters: what each request takes, and the layer that they share.
//!
//! The rows of a matrix belong to requests: the first `rows/requests` to the first request, and so on. Every request
//! takes one of several rotations, scales and biases, or none.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::backend::{BoftBackend, is_listed};
use super::product::product;
use super::requests::{self, Taken};

/// Numbers of which every request of a batch takes one, or none: request `i` takes `values[choices[i]]`.
///
/// Tensors are shared, not copied, so that a batch costs no more than its list of choices.
#[derive(Debug, Clone)]
pub struct PerRequest<const D: usize> {
    values: Vec<Tensor<D>>,
    choices: Vec<Option<usize>>,
}

impl<const D: usize> PerRequest<D> {
    /// Numbers, and which of them each request takes.
    ///
    /// # Panics
    ///
    /// - If the values differ in shape or precision.
    /// - If a choice is not the index of a value.
    pub fn new(values: Vec<Tensor<D>>, choices: Vec<Option<usize>>) -> Self {
        for value in values.iter().skip(1) {
            let kind = |value: &Tensor<D>| (value.dims(), value.dtype());
            let (first, other) = (kind(&values[0]), kind(value));
            assert_eq!(
                first, other,
                "the requests of a batch take numbers of one shape"
            );
        }
        for choice in choices.iter().flatten() {
            let count = values.len();
            assert!(*choice < count, "a request takes value {choice} of {count}");
        }
        Self { values, choices }
    }

    /// Whether no request takes anything.
    fn is_empty(&self) -> bool {
        self.choices.iter().all(Option::is_none)
    }

    /// Panics unless a matrix of this shape holds equally many rows for each request.
    fn assert_divides(&self, operation: &str, [rows, columns]: [usize; 2]) {
        let requests = self.choices.len();
        assert!(
            requests > 0 && rows.is_multiple_of(requests),
            "{operation}: a [{rows}, {columns}] matrix does not hold the rows of {requests} requests"
        );
    }

    /// The values as the backend has them, and the choices.
    fn into_dispatch(self) -> Taken<Dispatch> {
        let values = self.values.into_iter().map(Tensor::into_dispatch);
        (values.collect(), self.choices)
    }
}

/// Rotates the rows of every request by the rotation that it takes, `x·R`. Rows of a request that takes none stay as
/// they are.
///
/// # Shapes
///
/// - input: `[rows, d]`, equally many rows for each request, one request after the other
/// - rotations: `[d/s, s, s]` each, as [`Blocks::spans`](super::Blocks::spans) makes them
/// - result: `[rows, d]`
///
/// # Numerics
///
/// Runs in the precision of the rotations, f32 or f64, and is rounded to that of the input once, at the end.
///
/// # Panics
///
/// - If the rotations do not rotate `d` channels, or the rows do not divide into requests.
///
/// # Examples
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_boft::ops::{Blocks, PerRequest, rotate_requests};
///
/// # let device = Device::flex();
/// let [a, b] = [0.1, 0.2].map(|t| Blocks::cayley(Tensor::full([1, 4, 1], t, &device), 2).spans());
/// // Three requests of two rows: the second passes as it is.
/// let rotations = PerRequest::new(vec![a, b], vec![Some(1), None, Some(0)]);
/// let x = Tensor::<2>::ones([6, 8], &device);
/// let rotated = rotate_requests(x.clone(), rotations);
/// assert_eq!(rotated.slice([2..4]).into_data(), x.slice([2..4]).into_data());
/// ```
pub fn rotate_requests(input: Tensor<2>, rotations: PerRequest<3>) -> Tensor<2> {
    rotations.assert_divides("rotate_requests", input.dims());
    let Some([count, span, _]) = rotations.values.first().map(Tensor::dims) else {
        return input;
    };
    let [_, d] = input.dims();
    assert_eq!(
        count * span,
        d,
        "rotate_requests: {count} spans of {span} do not rotate an axis of {d}"
    );
    let listed = is_listed(input.device().as_dispatch());
    let input = input.into_dispatch();
    let (rotations, choices) = rotations.into_dispatch();
    Tensor::from_dispatch(match listed {
        true => <Dispatch as BoftBackend>::boft_rotate_requests(input, rotations.into(), choices),
        false => requests::rotate::<Dispatch>(input, rotations, choices),
    })
}

/// Applies a linear layer to the rows of requests that take different adapters, `y = (x·R·W) ⊙ s + bias`.
///
/// A request without a rotation, a scale or a bias does without it.
///
/// # Shapes
///
/// - input: `[rows, d]`, equally many rows for each request, one request after the other
/// - weight: `[d, o]`, which may be quantized
/// - rotations: `[d/s, s, s]` each
/// - scales, biases: `[o]` each
/// - result: `[rows, o]`
///
/// # Numerics
///
/// As [`Blocks::linear`](super::Blocks::linear) on the activation route.
///
/// # Panics
///
/// - If a shape does not fit the weight, the rows do not divide into requests, or rotations, scales and biases are for different
///   numbers of requests.
pub fn linear_requests(
    input: Tensor<2>,
    weight: Tensor<2>,
    rotations: PerRequest<3>,
    scales: PerRequest<1>,
    biases: PerRequest<1>,
) -> Tensor<2> {
    let [rows, d_output] = [input.dims()[0], weight.dims()[1]];
    let requests = [
        rotations.choices.len(),
        scales.choices.len(),
        biases.choices.len(),
    ];
    assert!(
        requests.iter().all(|&count| count == requests[0]),
        "linear_requests: rotations, scales and biases are for {requests:?} requests"
    );
    for (name, vectors) in [("scale", &scales), ("bias", &biases)] {
        vectors.assert_divides("linear_requests", [rows, d_output]);
        for [count] in vectors.values.iter().map(Tensor::dims) {
            assert_eq!(
                count, d_output,
                "linear_requests: a {name} is a [{count}] tensor, for {d_output} outputs"
            );
        }
    }
    let rotated = match rotations.is_empty() {
        true => input,
        false => rotate_requests(input, rotations),
    };
    let output = product(rotated, weight, None);
    if scales.is_empty() && biases.is_empty() {
        return output;
    }
    let listed = is_listed(output.device().as_dispatch());
    let output = output.into_dispatch();
    let (scales, scaled) = scales.into_dispatch();
    let (biases, biased) = biases.into_dispatch();
    Tensor::from_dispatch(match listed {
        true => {
            let (scales, biases) = (scales.into(), biases.into());
            <Dispatch as BoftBackend>::boft_scale_requests(output, scales, scaled, biases, biased)
        }
        false => requests::scale::<Dispatch>(output, (scales, scaled), (biases, biased)),
    })
}
