//! The two ways to compute a rotated linear layer, and the choice between them.

use burn::tensor::{DType, Device};

use super::precision::is_quantized;

/// How a linear layer with a rotation is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Rotate the input, `(x·R)·W`. The weight is only read.
    Activation,
    /// Rotate the weight once, then multiply, `x·(R·W)`. The cost of the rotation does not depend on the number of
    /// tokens.
    Weight,
}

/// Whether a backward pass follows the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// No backward pass follows.
    Inference,
    /// A backward pass follows.
    Training,
}

impl Pass {
    /// Training on a device that records operations for a backward pass, inference on any other.
    pub fn on(device: &Device) -> Self {
        match device.is_autodiff() {
            true => Self::Training,
            false => Self::Inference,
        }
    }
}

/// How the base weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// As floating-point numbers.
    Float,
    /// Quantized, so that a rotated weight could not be stored in its place.
    Quantized,
}

impl Base {
    /// How a weight of this precision is stored.
    pub fn of(dtype: DType) -> Self {
        match is_quantized(dtype) {
            true => Self::Quantized,
            false => Self::Float,
        }
    }
}

/// Chooses the route of a linear layer by the numbers that each moves through memory.
///
/// For a `[d, o]` weight and `T` tokens, in addition to the product itself:
///
/// | | weight route | activation route |
/// |---|---|---|
/// | inference | `2·d·o`: rotate and scale the weight | `2·T·d + 2·T·o`: rotate the input, scale the output |
/// | training | the same | `4·T·d + 5·T·o`: both again in the backward pass, and the scale's gradient |
///
/// The route with fewer numbers wins. With a quantized weight it is always the activation route, since a rotated
/// weight could not be stored in its place.
///
/// # Examples
///
/// ```
/// use burn_boft::ops::{Base, Pass, Route, route};
///
/// // One token through a wide layer: rotate the token. A batch of images: rotate the weight.
/// assert_eq!(route(1, [4096, 4096], Pass::Inference, Base::Float), Route::Activation);
/// assert_eq!(route(1028, [384, 1536], Pass::Training, Base::Float), Route::Weight);
/// ```
pub fn route(tokens: usize, [d_input, d_output]: [usize; 2], pass: Pass, base: Base) -> Route {
    let weight = 2 * d_input * d_output;
    let activation = match pass {
        Pass::Training => tokens * (4 * d_input + 5 * d_output),
        Pass::Inference => tokens * (2 * d_input + 2 * d_output),
    };
    match base == Base::Quantized || activation < weight {
        true => Route::Activation,
        false => Route::Weight,
    }
}

/// Whether a convolution keeps its rotated weight for the backward pass, or computes it again there.
///
/// What a layer keeps for its adapter is this weight and, for the gradient of a trained scale, its output. Together they are to be no
/// larger than the layer's input and output, whose tokens are pixels, `d·o (+ T·o) ≤ T·(d + o)`, so that the memory kept grows with the tokens, as it does
/// anyway, and not with the model.
pub(super) fn keeps_weight(
    tokens: usize,
    [d_input, d_output]: [usize; 2],
    keeps_output: bool,
) -> bool {
    let output = match keeps_output {
        true => tokens * d_output,
        false => 0,
    };
    d_input * d_output + output <= tokens * (d_input + d_output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_weight_is_kept_where_the_activations_are_larger() {
        assert!(!keeps_weight(2047, [4096, 4096], false));
        assert!(keeps_weight(2048, [4096, 4096], false));
        assert!(keeps_weight(1028, [384, 1536], false));
    }

    #[test]
    fn beside_an_output_that_is_kept_a_rotated_weight_is_kept_for_as_many_tokens_as_outputs() {
        assert!(!keeps_weight(4095, [4096, 4096], true));
        assert!(keeps_weight(4096, [4096, 4096], true));
        assert!(!keeps_weight(1028, [384, 1536], true));
        assert!(keeps_weight(1028, [1536, 384], true));
    }

    #[test]
    fn the_route_switches_where_the_numbers_moved_are_equal() {
        let shape = [4096, 4096];
        assert_eq!(
            route(1, shape, Pass::Inference, Base::Float),
            Route::Activation
        );
        assert_eq!(
            route(2047, shape, Pass::Inference, Base::Float),
            Route::Activation
        );
        assert_eq!(
            route(2048, shape, Pass::Inference, Base::Float),
            Route::Weight
        );
        assert_eq!(
            route(910, shape, Pass::Training, Base::Float),
            Route::Activation
        );
        assert_eq!(
            route(911, shape, Pass::Training, Base::Float),
            Route::Weight
        );
    }

    #[test]
    fn a_quantized_weight_is_never_rewritten() {
        assert_eq!(
            route(1 << 20, [16, 16], Pass::Training, Base::Quantized),
            Route::Activation
        );
    }
}
