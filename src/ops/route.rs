//! The route choice.

/// How a linear layer with a rotation is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Rotate the input, `(x·R)·W`: the weight is only read.
    Activation,
    /// Rotate the weight once, then multiply, `x·(R·W)`: the cost of the rotation does not depend on
    /// the number of tokens.
    Weight,
}

/// Chooses the route of a linear layer by the numbers that each moves through memory.
///
/// For a `[d, o]` weight and `T` tokens, beside the product itself:
///
/// | | weight route | activation route |
/// |---|---|---|
/// | inference | `2·d·o`: rotate and scale the weight | `2·T·d + 2·T·o`: rotate the input, scale the output |
/// | training | the same | `4·T·d + 5·T·o`: both again in the backward pass, and the scale's gradient |
///
/// The fewer win. A quantized weight cannot be rewritten: there the input is rotated always.
pub fn route(
    tokens: usize,
    [d_input, d_output]: [usize; 2],
    training: bool,
    quantized: bool,
) -> Route {
    let weight = 2 * d_input * d_output;
    let activation = match training {
        true => tokens * (4 * d_input + 5 * d_output),
        false => tokens * (2 * d_input + 2 * d_output),
    };
    match quantized || activation < weight {
        true => Route::Activation,
        false => Route::Weight,
    }
}

/// Whether the weight route keeps `R·W·diag(s)` for the backward pass, or computes it again there.
///
/// It keeps a weight of at most the size of the layer's input and output, `d·o ≤ T·(d + o)`: memory then
/// grows with the tokens, as it does anyway, and never with the model.
pub(super) fn keeps_weight(tokens: usize, [d_input, d_output]: [usize; 2]) -> bool {
    d_input * d_output <= tokens * (d_input + d_output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_weight_is_kept_where_the_activations_are_larger() {
        assert!(!keeps_weight(2047, [4096, 4096]));
        assert!(keeps_weight(2048, [4096, 4096]));
        assert!(keeps_weight(1028, [384, 1536]));
    }

    #[test]
    fn the_route_switches_where_the_numbers_moved_are_equal() {
        let shape = [4096, 4096];
        assert_eq!(route(1, shape, false, false), Route::Activation);
        assert_eq!(route(2047, shape, false, false), Route::Activation);
        assert_eq!(route(2048, shape, false, false), Route::Weight);
        assert_eq!(route(910, shape, true, false), Route::Activation);
        assert_eq!(route(911, shape, true, false), Route::Weight);
    }

    #[test]
    fn a_quantized_weight_is_never_rewritten() {
        assert_eq!(route(1 << 20, [16, 16], true, true), Route::Activation);
    }
}
