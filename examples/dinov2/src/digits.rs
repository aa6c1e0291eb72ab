//! The UCI handwritten digits (E. Alpaydin and C. Kaynak, doi 10.24432/C50P49, CC BY 4.0).

use std::ops::RangeInclusive;

use crate::images::{Dataset, Format, Image, Task};

/// The digits that the backbone of the example has seen.
pub const OLD: RangeInclusive<u8> = 0..=4;
/// The digits that it is adapted to.
pub const NEW: RangeInclusive<u8> = 5..=9;

/// Pixels along each side of a digit.
pub const SIZE: usize = 8;
/// The grey value of full ink.
const INK: f32 = 16.0;

/// `[64 pixels, digit]` for each image; see `data/README.md`.
static DIGITS: &[u8] = include_bytes!("../data/digits.bin");

/// The images of a range of digits; the first digit of the range is class 0.
pub fn digits(range: RangeInclusive<u8>) -> Dataset {
    let images = DIGITS
        .chunks_exact(SIZE * SIZE + 1)
        .filter(|record| range.contains(&record[SIZE * SIZE]))
        .map(|record| Image {
            pixels: record[..SIZE * SIZE].into(),
            label: usize::from(record[SIZE * SIZE] - range.start()),
        })
        .collect();
    Dataset {
        images,
        format: Format {
            size: SIZE,
            white: INK,
            mean: vec![0.305],
            std: vec![0.376],
        },
        classes: range.map(|digit| digit.to_string()).collect(),
    }
}

/// The old digits. They are always split in the same way, because the backbone has seen the training part.
pub fn old_task() -> Task {
    digits(OLD).split(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_all_images_and_their_ink() {
        let all = digits(0..=9).images;
        assert_eq!(all.len(), 1797);
        let first: Vec<usize> = all[..10].iter().map(|image| image.label).collect();
        assert_eq!(first, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);

        let ink = |image: &Image| {
            image
                .pixels
                .iter()
                .map(|&value| u32::from(value))
                .sum::<u32>()
        };
        assert_eq!(ink(&all[0]), 294);
        assert_eq!(all.iter().map(ink).sum::<u32>(), 561_718);
        assert!(
            all.iter()
                .all(|image| image.pixels.iter().all(|&value| value <= 16))
        );
    }

    #[test]
    fn old_and_new_digits_share_nothing() {
        let (old, new) = (digits(OLD), digits(NEW));
        assert_eq!(old.images.len() + new.images.len(), 1797);
        assert_eq!(new.classes, ["5", "6", "7", "8", "9"]);
        assert_eq!(new.images[0].label, 0);
    }
}
