//! [`rotate_once`] computes adapted weights ahead of a forward pass that reads them many times.

use std::collections::HashMap;

use burn::module::Module;

use super::walk::{Edit, Numbers, Path, rewrite, walk};

/// A copy of a model that holds every rotated weight, for one forward pass that reads the weights many times.
///
/// A plain layer of Burn rotates its weight whenever the weight is read, and an `Lstm` or `Gru` reads its weights in every
/// time step. The copy was rotated beforehand, so the rotation is differentiated once for the whole pass. (Burn takes an adapter
/// off by computing the weight once more, which adds a rotation without a backward pass.)
/// The gradients arrive at the adapters of the original model, so the loss of the copy trains the original.
///
/// Use it for the recurrent part of a model. A [`BoftLinear`](crate::BoftLinear) whose weight is read once loses its fast
/// route by it. A copy serves one backward pass: make another for the next step. For inference,
/// [`merge`](crate::merge()) does the same for good. Parameters without an adapter are shared with the model. A model
/// without adapters is copied as it is.
///
/// With multiplicative dropout, the copy keeps the blocks that were drawn for it.
///
/// # Examples
///
/// ```
/// use burn::nn::LstmConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Distribution, Tensor};
/// use burn_boft::{BoftConfig, inject, rotate_once};
///
/// # let device = burn::tensor::Device::flex().autodiff();
/// let lstm = LstmConfig::new(16, 8, true).init(&device);
/// let config = BoftConfig::new().with_target_modules("all-linear");
/// let lstm = inject(lstm, config)?;
///
/// let input = Tensor::<3>::random([2, 50, 16], Distribution::Default, &device);
/// let (output, _) = rotate_once(&lstm).forward(input, None); // sixteen rotations, not four hundred
/// let gradients = GradientsParams::from_grads(output.sum().backward(), &lstm);
/// assert!(!gradients.is_empty());
/// # Ok::<(), burn_boft::model::InjectError>(())
/// ```
pub fn rotate_once<M: Module>(model: &M) -> M {
    let walked = walk(model);
    let rotated = walked.adapted().filter_map(|(weight, attached, rotation)| {
        let adapter = attached.adapter(rotation)?;
        Some((weight.path().to_string(), weight.stored.rotated(&adapter)))
    });
    let mut rotated: HashMap<_, _> = rotated.collect();
    if rotated.is_empty() {
        return model.clone();
    }
    drop(walked);
    let edit = |path: &Path| Edit {
        numbers: rotated.remove(path.full()).map(Numbers::Computed),
        ..Edit::default()
    };
    rewrite(model.clone().materialize(), edit, |_| None)
}
