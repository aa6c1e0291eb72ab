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

/// Chooses the route of a linear layer by its shape.
///
/// Rotating the weight reads and writes `d_input·d_output` numbers, rotating the input
/// `tokens·d_input`, so the smaller of `tokens` and `d_output` decides. A quantized weight cannot be
/// rewritten: there the input is rotated always.
pub fn route(tokens: usize, d_output: usize, quantized: bool) -> Route {
    match quantized || tokens < d_output {
        true => Route::Activation,
        false => Route::Weight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_switches_where_tokens_reach_the_output_width() {
        assert_eq!(route(1, 4096, false), Route::Activation);
        assert_eq!(route(4095, 4096, false), Route::Activation);
        assert_eq!(route(4096, 4096, false), Route::Weight);
    }

    #[test]
    fn a_quantized_weight_is_never_rewritten() {
        assert_eq!(route(1 << 20, 16, true), Route::Activation);
    }
}
