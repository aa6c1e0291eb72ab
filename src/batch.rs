//! [`BatchAdapter`]: what an [`AdapterBank`](crate::AdapterBank) attaches to a weight for one batch.

use burn::module::{Module, Reparameterization};
use burn::tensor::Tensor;

use crate::ops::{PerRequest, linear_requests, reshaped};

/// The adapters of one linear layer for one batch, whose requests may each use another one.
///
/// Burn shows a reparameterization the weight and never the input, so only [`BoftLinear`](crate::BoftLinear) can serve
/// several adapters: it asks its weight for this type, as it asks for a [`BoftAdapter`](crate::BoftAdapter).
#[derive(Module, Debug)]
pub(crate) struct BatchAdapter {
    /// The layer's path, for messages.
    path: String,
    /// The rotations of the adapters in the batch, `[d/s, s, s]` each.
    rotations: Vec<Tensor<3>>,
    /// Their scales and biases, `[d_output]` each.
    scales: Vec<Tensor<1>>,
    biases: Vec<Tensor<1>>,
    /// Which of them each request takes.
    #[module(skip)]
    choices: Vec<Choice>,
}

/// What one request takes: indices of a rotation, a scale and a bias.
#[derive(Debug, Clone, Copy, Default)]
struct Choice {
    rotation: Option<usize>,
    scale: Option<usize>,
    bias: Option<usize>,
}

/// The numbers of one adapter for one linear layer, on the device.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// The rotation of each span, a `[d/s, s, s]` tensor.
    pub(crate) rotation: Option<Tensor<3>>,
    /// The scale per output channel, a `[d_output]` tensor.
    pub(crate) scale: Option<Tensor<1>>,
    /// The bias that takes the place of the layer's, a `[d_output]` tensor.
    pub(crate) bias: Option<Tensor<1>>,
}

impl BatchAdapter {
    /// The adapters of the layer at `path` for a batch, where request `i` uses the part `requests[i]`; none if none of the
    /// adapters has a part for this layer, so that there is nothing to attach.
    pub(crate) fn new(
        path: &str,
        parts: &[Option<&Part>],
        requests: &[Option<usize>],
    ) -> Option<Self> {
        let mut adapter = Self {
            path: path.to_string(),
            rotations: Vec::new(),
            scales: Vec::new(),
            biases: Vec::new(),
            choices: Vec::new(),
        };
        let choices: Vec<_> = parts
            .iter()
            .map(|part| part.map_or(Choice::default(), |part| adapter.take(part)))
            .collect();
        let requests = requests.iter();
        adapter.choices = requests
            .map(|request| request.map_or(Choice::default(), |request| choices[request]))
            .collect();
        parts.iter().any(Option::is_some).then_some(adapter)
    }

    /// Adds the numbers of one adapter, and returns where they are.
    fn take(
        &mut self,
        Part {
            rotation,
            scale,
            bias,
        }: &Part,
    ) -> Choice {
        fn push<const D: usize>(
            all: &mut Vec<Tensor<D>>,
            one: &Option<Tensor<D>>,
        ) -> Option<usize> {
            all.push(one.clone()?);
            Some(all.len() - 1)
        }
        Choice {
            rotation: push(&mut self.rotations, rotation),
            scale: push(&mut self.scales, scale),
            bias: push(&mut self.biases, bias),
        }
    }

    /// Applies the layer, `y = (x·R·W) ⊙ s + bias` with the rotation, the scale and the bias of each request.
    ///
    /// # Shapes
    ///
    /// - input: `[requests, …, d_input]`
    /// - base: `[d_input, d_output]`
    /// - bias: `[d_output]`, for the requests whose adapter has none of its own
    /// - result: `[requests, …, d_output]`
    ///
    /// # Panics
    ///
    /// - If the first axis of `input` is not the requests.
    pub(crate) fn linear<const D: usize>(
        &self,
        input: Tensor<D>,
        base: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        let Self { path, choices, .. } = self;
        let [d_input, d_output] = base.dims();
        let mut shape = input.shape();
        assert_eq!(
            shape[0],
            choices.len(),
            "`{path}` serves a batch of {} requests, and the first axis of its input {:?} is not theirs",
            choices.len(),
            input.dims()
        );
        let rows = shape.num_elements() / d_input;
        shape[D - 1] = d_output;

        let mut biases = self.biases.clone();
        let own = bias.map(|bias| {
            biases.push(bias);
            biases.len() - 1
        });
        let choose = |of: fn(&Choice) -> Option<usize>| choices.iter().map(of).collect::<Vec<_>>();
        let biased = choices.iter().map(|choice| choice.bias.or(own)).collect();
        let output = linear_requests(
            reshaped(input, [rows, d_input]),
            base,
            PerRequest::new(self.rotations.clone(), choose(|choice| choice.rotation)),
            PerRequest::new(self.scales.clone(), choose(|choice| choice.scale)),
            PerRequest::new(biases, biased),
        );
        reshaped(output, shape)
    }
}

impl Reparameterization for BatchAdapter {
    const NAME: &'static str = "boft_batch";

    /// # Panics
    ///
    /// - Always: a layer that reads its weight computes all requests with the same one.
    fn apply<const D: usize>(&self, _: Tensor<D>) -> Tensor<D> {
        panic!(
            "`{}` read its weight, which is another one for each request of a batch: make it a BoftLinear",
            self.path
        )
    }
}
