//! Seeds that are made of others.

/// A seed for one use of another: a function of the seed and the numbers alone, and of their order.
pub fn mix(seed: u64, numbers: &[u64]) -> u64 {
    // The seed is scattered first, or a seed and a number could trade places.
    let scattered = scatter(seed);
    numbers
        .iter()
        .fold(scattered, |state, number| scatter(state ^ number))
}

/// A step of SplitMix64: its increment and its finaliser.
fn scatter(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_use_has_a_seed_of_its_own() {
        let uses = (0..50).flat_map(|seed| (0..50).map(move |number| mix(seed, &[number, 7])));
        assert_eq!(uses.collect::<BTreeSet<_>>().len(), 2500);
        assert_ne!(mix(1, &[2, 3]), mix(1, &[3, 2]));
    }
}
