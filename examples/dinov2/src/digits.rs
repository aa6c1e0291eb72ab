//! The UCI handwritten digits (E. Alpaydin and C. Kaynak, doi 10.24432/C50P49, CC BY 4.0).

use std::ops::RangeInclusive;

use crate::images::{Sample, Source};

/// The digits that the backbone of the example has seen.
pub const OLD: RangeInclusive<u8> = 0..=4;
/// The digits that it is adapted to.
pub const NEW: RangeInclusive<u8> = 5..=9;

/// Pixels along each side of a digit.
pub const SIZE: usize = 8;
/// `[64 pixels, digit]` for each image; see `data/README.md`.
static DIGITS: &[u8] = include_bytes!("../data/digits.bin");

/// The images of a range of digits; the first digit of the range is class 0.
pub fn samples(range: RangeInclusive<u8>) -> Vec<Sample> {
    DIGITS
        .chunks_exact(SIZE * SIZE + 1)
        .filter(|record| range.contains(&record[SIZE * SIZE]))
        .map(|record| Sample {
            source: Source::Grey(record[..SIZE * SIZE].into()),
            label: usize::from(record[SIZE * SIZE] - range.start()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_all_images_and_their_ink() {
        let all = samples(0..=9);
        assert_eq!(all.len(), 1797);
        let first: Vec<usize> = all[..10].iter().map(|image| image.label).collect();
        assert_eq!(first, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);

        let ink = |sample: &Sample| match &sample.source {
            Source::Grey(pixels) => pixels.iter().map(|&value| u32::from(value)).sum::<u32>(),
            Source::File(path) => panic!("{} is no digit", path.display()),
        };
        assert_eq!(ink(&all[0]), 294);
        assert_eq!(all.iter().map(ink).sum::<u32>(), 561_718);
    }

    #[test]
    fn old_and_new_digits_share_nothing() {
        let (old, new) = (samples(OLD), samples(NEW));
        assert_eq!(old.len() + new.len(), 1797);
        assert_eq!(new[0].label, 0);
    }
}
