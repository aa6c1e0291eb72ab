//! The random part of preparing an image for training.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::pixels::Pixels;
use super::resample::Area;

/// The share of the image that a crop covers, and its width over its height: torchvision's `RandomResizedCrop`.
const SCALE: std::ops::RangeInclusive<f64> = 0.08..=1.0;
const RATIO: std::ops::RangeInclusive<f64> = 3.0 / 4.0..=4.0 / 3.0;
/// How many crops are tried before the centre is taken.
const TRIES: usize = 10;

/// A random crop and whether to flip it from left to right.
pub(super) fn crop_and_flip(width: usize, height: usize, seed: u64) -> (Area, bool) {
    let mut rng = StdRng::seed_from_u64(seed);
    let area = crop(width, height, &mut rng);
    (area, rng.random_bool(0.5))
}

fn crop(width: usize, height: usize, rng: &mut StdRng) -> Area {
    let total = (width * height) as f64;
    for _ in 0..TRIES {
        let target = total * rng.random_range(SCALE);
        let ratio = rng
            .random_range(RATIO.start().ln()..=RATIO.end().ln())
            .exp();
        let w = (target * ratio).sqrt().round() as usize;
        let h = (target / ratio).sqrt().round() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let left = rng.random_range(0..=width - w);
            let top = rng.random_range(0..=height - h);
            return at(left, top, w, h);
        }
    }
    centre(width, height)
}

/// The largest crop in the centre with an allowed ratio.
fn centre(width: usize, height: usize) -> Area {
    let ratio = width as f64 / height as f64;
    let (w, h) = if ratio < *RATIO.start() {
        (width, (width as f64 / RATIO.start()).round() as usize)
    } else if ratio > *RATIO.end() {
        ((height as f64 * RATIO.end()).round() as usize, height)
    } else {
        (width, height)
    };
    at((width - w) / 2, (height - h) / 2, w, h)
}

fn at(left: usize, top: usize, width: usize, height: usize) -> Area {
    Area {
        columns: left..left + width,
        rows: top..top + height,
    }
}

/// Moves a digit by up to one pixel in each direction. A digit is not flipped or cut: it would be another one.
pub(super) fn shift(digit: &[u8], side: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let [right, down]: [i32; 2] = [rng.random_range(-1..=1), rng.random_range(-1..=1)];
    let side = side as i32;
    (0..side * side)
        .map(|index| {
            let (x, y) = (index % side - right, index / side - down);
            let inside = (0..side).contains(&x) && (0..side).contains(&y);
            if inside {
                digit[(y * side + x) as usize]
            } else {
                0
            }
        })
        .collect()
}

/// Mirrors an image from left to right.
pub(super) fn flip(image: &mut Pixels) {
    let (width, channels) = (image.width, image.channels);
    for row in image.data.chunks_exact_mut(width * channels) {
        for x in 0..width / 2 {
            for channel in 0..channels {
                row.swap(x * channels + channel, (width - 1 - x) * channels + channel);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_stay_inside_and_in_torchvisions_ranges() {
        let (mut smallest, mut largest) = (1.0_f64, 0.0_f64);
        let mut flips = 0;
        for seed in 0..2000 {
            let (area, flipped) = crop_and_flip(200, 150, seed);
            assert!(area.columns.end <= 200 && area.rows.end <= 150);
            let (w, h) = (area.columns.len() as f64, area.rows.len() as f64);
            assert!((0.72..1.39).contains(&(w / h)), "{area:?}");
            smallest = smallest.min(w * h / 30_000.0);
            largest = largest.max(w * h / 30_000.0);
            flips += usize::from(flipped);
        }
        assert!((0.075..0.1).contains(&smallest), "{smallest}");
        assert!((0.9..=1.0).contains(&largest), "{largest}");
        assert!((900..1100).contains(&flips), "{flips}");
    }

    #[test]
    fn a_strip_is_cropped_in_its_centre() {
        assert_eq!(crop_and_flip(1000, 3, 5).0, at(498, 0, 4, 3));
        assert_eq!(crop_and_flip(1, 1, 5).0, at(0, 0, 1, 1));
    }

    #[test]
    fn flipping_mirrors_pixels_and_keeps_their_channels() {
        let mut image = Pixels {
            width: 3,
            height: 2,
            channels: 3,
            data: (0..18).collect(),
        };
        flip(&mut image);
        assert_eq!(image.data[..9], [6, 7, 8, 3, 4, 5, 0, 1, 2]);
        assert_eq!(image.data[9..], [15, 16, 17, 12, 13, 14, 9, 10, 11]);
    }

    #[test]
    fn digits_move_by_all_nine_steps() {
        let mut digit = [0; 9];
        digit[4] = 7;
        let found: std::collections::BTreeSet<usize> = (0..200)
            .map(|seed| {
                let moved = shift(&digit, 3, seed);
                assert_eq!(moved.iter().filter(|&&value| value == 7).count(), 1);
                moved.iter().position(|&value| value == 7).unwrap()
            })
            .collect();
        assert_eq!(found.len(), 9);
    }
}
