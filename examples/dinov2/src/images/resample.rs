//! Pillow's resizing, to the bit.
//!
//! General resizers are close to Pillow but not equal (up to five levels of 255 when a small image is enlarged): they
//! run the passes in another order and round the weights to 16 bits. Here the weights have 22 bits and the result of the
//! first pass is rounded to eight, as in Pillow.

use std::ops::Range;

use super::pixels::Pixels;

/// The bits of a weight behind the point: 32, less eight for a value and two for sums that exceed it.
const PRECISION: u32 = 32 - 8 - 2;

/// The filters of `PIL.Image.resize`, but for nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

/// Pillow's numbers of the filters.
const NUMBERS: [(Filter, u64); 5] = [
    (Filter::Lanczos, 1),
    (Filter::Bilinear, 2),
    (Filter::Bicubic, 3),
    (Filter::Box, 4),
    (Filter::Hamming, 5),
];

impl Filter {
    /// The filter that Pillow gives this number.
    pub fn from_number(number: u64) -> Option<Self> {
        let filter = NUMBERS.iter().find(|(_, known)| *known == number);
        filter.map(|&(filter, _)| filter)
    }

    /// Pillow's number, which `preprocessor_config.json` holds as `resample`.
    pub fn number(self) -> u64 {
        let known = NUMBERS.iter().find(|(filter, _)| *filter == self);
        known.map_or(0, |&(_, number)| number)
    }

    /// How far from its centre the filter is not zero, in pixels of the coarser image.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bicubic => 2.0,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Box => 0.5,
        }
    }

    fn at(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |x: f64| {
            let angle = x * std::f64::consts::PI;
            if x == 0.0 { 1.0 } else { angle.sin() / angle }
        };
        let distance = x.abs();
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bilinear if distance < 1.0 => 1.0 - distance,
            Self::Bicubic if distance < 1.0 => {
                ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0
            }
            Self::Bicubic if distance < 2.0 => {
                (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A
            }
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            Self::Hamming if distance < 1.0 => {
                sinc(distance) * (0.54 + 0.46 * (distance * std::f64::consts::PI).cos())
            }
            _ => 0.0,
        }
    }
}

/// A rectangle of pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub columns: Range<usize>,
    pub rows: Range<usize>,
}

impl Area {
    pub(super) fn whole(width: usize, height: usize) -> Self {
        Self {
            columns: 0..width,
            rows: 0..height,
        }
    }
}

/// Cuts `area` out of the image, resizes it to `[width, height]`, and returns the part of the result that `window`
/// asks for; nothing outside of the window is computed.
pub(super) fn resize(
    image: &Pixels,
    area: &Area,
    [width, height]: [usize; 2],
    window: &Area,
    filter: Filter,
) -> Pixels {
    let mut across = weights(&area.columns, width, &window.columns, filter);
    let mut down = weights(&area.rows, height, &window.rows, filter);
    if columns_first(area, [width, height]) {
        let columns = used(&across);
        let between = resize_columns(image, columns.clone(), &down);
        move_to_zero(&mut across, columns.start);
        return resize_rows(&between, 0..between.height, &across);
    }
    let rows = used(&down);
    let between = resize_rows(image, rows.clone(), &across);
    move_to_zero(&mut down, rows.start);
    resize_columns(&between, 0..between.width, &down)
}

/// The order of the passes, which shows in the rounding. Pillow resizes rows first, except that Pillow 13 begins with
/// the columns where the height shrinks by more than twice as many pixels as the width.
fn columns_first(area: &Area, [width, height]: [usize; 2]) -> bool {
    let shrinks = |from: &Range<usize>, to: usize| from.len() as i64 - to as i64;
    let (rows, columns) = (shrinks(&area.rows, height), shrinks(&area.columns, width));
    rows > 0 && rows > 2 * columns
}

/// The pixels that one pixel of the result is made of, and their weights.
struct Taps {
    start: usize,
    weights: Vec<i32>,
}

impl Taps {
    fn end(&self) -> usize {
        self.start + self.weights.len()
    }
}

/// The pixels that are read: only what the window needs.
fn used(taps: &[Taps]) -> Range<usize> {
    let start = taps.iter().map(|taps| taps.start).min().unwrap_or(0);
    let end = taps.iter().map(Taps::end).max().unwrap_or(start);
    start..end
}

fn move_to_zero(taps: &mut [Taps], start: usize) {
    for taps in taps {
        taps.start -= start;
    }
}

/// The weights for the part `window` of a side that is resized from `source` to `length`.
fn weights(
    source: &Range<usize>,
    length: usize,
    window: &Range<usize>,
    filter: Filter,
) -> Vec<Taps> {
    // Pillow leaves out the pass along a side that keeps its length.
    if source.len() == length {
        return window
            .clone()
            .map(|index| Taps {
                start: source.start + index,
                weights: vec![1 << PRECISION],
            })
            .collect();
    }
    let scale = source.len() as f64 / length as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    window
        .clone()
        .map(|index| {
            let centre = (index as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(source.len());
            let taps: Vec<f64> = (start..end)
                .map(|at| filter.at((at as f64 - centre + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = taps.iter().sum();
            Taps {
                start: source.start + start,
                weights: taps.iter().map(|tap| fixed(tap / sum)).collect(),
            }
        })
        .collect()
}

fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION);
    (scaled + 0.5_f64.copysign(scaled)) as i32
}

fn rounded(sum: i32) -> u8 {
    ((sum + (1 << (PRECISION - 1))) >> PRECISION).clamp(0, 255) as u8
}

/// Resizes the given rows of an image, each for itself.
fn resize_rows(image: &Pixels, rows: Range<usize>, across: &[Taps]) -> Pixels {
    let stride = image.width * image.channels;
    let data = &image.data[rows.start * stride..rows.end * stride];
    Pixels {
        width: across.len(),
        height: rows.len(),
        channels: image.channels,
        data: match image.channels {
            1 => rows_of::<1>(data, stride, across),
            _ => rows_of::<3>(data, stride, across),
        },
    }
}

fn rows_of<const C: usize>(data: &[u8], stride: usize, across: &[Taps]) -> Vec<u8> {
    let mut result = Vec::with_capacity(data.len() / stride * across.len() * C);
    for row in data.chunks_exact(stride) {
        let (pixels, _) = row.as_chunks::<C>();
        for taps in across {
            let mut sums = [0i32; C];
            for (pixel, weight) in pixels[taps.start..].iter().zip(&taps.weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            result.extend(sums.map(rounded));
        }
    }
    result
}

/// Resizes the given columns of an image, each for itself.
fn resize_columns(image: &Pixels, columns: Range<usize>, down: &[Taps]) -> Pixels {
    let stride = image.width * image.channels;
    let part = columns.start * image.channels..columns.end * image.channels;
    let mut data = Vec::with_capacity(down.len() * part.len());
    let mut sums = vec![0i32; part.len()];
    for taps in down {
        sums.fill(0);
        let rows = image.data[taps.start * stride..].chunks_exact(stride);
        for (row, weight) in rows.zip(&taps.weights) {
            for (sum, &value) in sums.iter_mut().zip(&row[part.clone()]) {
                *sum += i32::from(value) * weight;
            }
        }
        data.extend(sums.iter().copied().map(rounded));
    }
    Pixels {
        width: columns.len(),
        height: down.len(),
        channels: image.channels,
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(width: usize, height: usize, channels: usize) -> Pixels {
        Pixels {
            width,
            height,
            channels,
            data: (0..width * height * channels)
                .map(|index| (index * 37 % 251) as u8)
                .collect(),
        }
    }

    #[test]
    fn a_row_is_enlarged_as_pillow_does() {
        // Image.fromarray(numpy.array([[0, 100, 50]], "uint8")).resize((5, 1), Image.BICUBIC)
        let image = Pixels {
            width: 3,
            height: 1,
            channels: 1,
            data: vec![0, 100, 50],
        };
        let all = Area::whole(5, 1);
        let row = resize(&image, &Area::whole(3, 1), [5, 1], &all, Filter::Bicubic);
        assert_eq!(row.data, [0, 37, 100, 72, 46]);
    }

    #[test]
    fn a_window_is_that_part_of_the_whole_result() {
        let image = ramp(23, 31, 3);
        let area = Area {
            columns: 3..20,
            rows: 1..30,
        };
        let window = Area {
            columns: 7..31,
            rows: 4..11,
        };
        for (height, first) in [(40, false), (19, true)] {
            let size = [40, height];
            assert_eq!(columns_first(&area, size), first);
            let all = Area::whole(40, height);
            let whole = resize(&image, &area, size, &all, Filter::Bicubic);
            let part = resize(&image, &area, size, &window, Filter::Bicubic);
            assert_eq!([part.width, part.height], [24, 7]);
            for (y, row) in part.data.chunks_exact(24 * 3).enumerate() {
                let start = ((y + 4) * 40 + 7) * 3;
                assert_eq!(row, &whole.data[start..start + 24 * 3]);
            }
        }
    }

    #[test]
    fn what_lies_outside_the_area_has_no_influence() {
        let image = ramp(20, 20, 1);
        let area = Area {
            columns: 5..12,
            rows: 6..18,
        };
        let mut other = image.clone();
        for (index, value) in other.data.iter_mut().enumerate() {
            if !(area.columns.contains(&(index % 20)) && area.rows.contains(&(index / 20))) {
                *value = 255 - *value;
            }
        }
        let all = Area::whole(9, 9);
        assert_eq!(
            resize(&image, &area, [9, 9], &all, Filter::Lanczos),
            resize(&other, &area, [9, 9], &all, Filter::Lanczos)
        );
    }

    #[test]
    fn every_filter_keeps_an_even_image() {
        for (filter, number) in NUMBERS {
            assert_eq!(Filter::from_number(number), Some(filter));
            let image = Pixels {
                width: 7,
                height: 5,
                channels: 1,
                data: vec![93; 35],
            };
            for size in [[3, 2], [7, 5], [20, 11]] {
                let all = Area::whole(size[0], size[1]);
                let result = resize(&image, &Area::whole(7, 5), size, &all, filter);
                assert_eq!(result.data, vec![93; size[0] * size[1]], "{filter:?}");
            }
        }
    }
}
