//! The colours of the page. Charts hold the colours for light pages as attributes, and the style sheet replaces them on
//! dark pages.

use std::fmt::Write;

use plotters::style::RGBColor;

/// One colour on light and on dark pages. Each has a contrast of at least 4.5 : 1 to its page.
#[derive(Clone, Copy, Debug)]
pub struct Colour {
    light: [u8; 3],
    dark: [u8; 3],
}

/// Axes and their labels.
pub const INK: Colour = Colour::new([0x4a, 0x52, 0x5c], [0xb4, 0xbd, 0xc8]);
/// The lines behind a chart, which carry no information of their own.
pub const GRID: Colour = Colour::new([0xd9, 0xde, 0xe4], [0x36, 0x3d, 0x47]);
/// What is drawn thin, beside something more important.
pub const QUIET: Colour = Colour::new([0x6b, 0x74, 0x80], [0x8d, 0x98, 0xa5]);
/// The page, for the inside of hollow markers.
pub const PAPER: Colour = Colour::new([0xff, 0xff, 0xff], [0x1b, 0x1f, 0x25]);
/// Lines and markers, in the order in which they are given out.
pub const SERIES: [Colour; 8] = [
    Colour::new([0x1d, 0x5f, 0xd1], [0x6f, 0xa8, 0xff]),
    Colour::new([0xb8, 0x45, 0x0c], [0xff, 0x9d, 0x5c]),
    Colour::new([0x14, 0x78, 0x4a], [0x4c, 0xd1, 0x8e]),
    Colour::new([0x8a, 0x3f, 0xc4], [0xc7, 0x9b, 0xff]),
    Colour::new([0xbf, 0x2a, 0x68], [0xff, 0x8a, 0xb8]),
    Colour::new([0x0f, 0x73, 0x7d], [0x4d, 0xcb, 0xd6]),
    Colour::new([0x86, 0x64, 0x05], [0xe3, 0xc2, 0x4a]),
    Colour::new([0x5a, 0x52, 0x4c], [0xc4, 0xba, 0xb2]),
];

impl Colour {
    const fn new(light: [u8; 3], dark: [u8; 3]) -> Self {
        Self { light, dark }
    }

    /// The colour as charts are drawn.
    pub fn rgb(self) -> RGBColor {
        let [red, green, blue] = self.light;
        RGBColor(red, green, blue)
    }

    /// The colour as charts have it in their attributes.
    pub fn hex(self) -> String {
        hex(self.light)
    }
}

fn hex([red, green, blue]: [u8; 3]) -> String {
    format!("#{red:02X}{green:02X}{blue:02X}")
}

/// The rules that give charts their colours on dark pages.
pub fn dark_rules() -> String {
    let mut rules = String::from("@media (prefers-color-scheme: dark) {\n");
    for Colour { light, dark } in [INK, GRID, QUIET, PAPER].iter().chain(&SERIES) {
        let (light, dark) = (hex(*light), hex(*dark));
        for attribute in ["fill", "stroke"] {
            // Writing to a string cannot fail.
            _ = writeln!(
                rules,
                "svg [{attribute}=\"{light}\"] {{ {attribute}: {dark}; }}"
            );
        }
    }
    rules.push_str("}\n");
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contrast of two colours after WCAG 2.
    fn contrast(a: [u8; 3], b: [u8; 3]) -> f64 {
        let luminance = |colour: [u8; 3]| {
            let channel = |value: u8| {
                let value = f64::from(value) / 255.0;
                match value <= 0.04045 {
                    true => value / 12.92,
                    false => ((value + 0.055) / 1.055).powf(2.4),
                }
            };
            let [red, green, blue] = colour.map(channel);
            0.2126 * red + 0.7152 * green + 0.0722 * blue
        };
        let [a, b] = [luminance(a), luminance(b)];
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn every_colour_can_be_told_from_its_page() {
        for colour in SERIES.iter().chain(&[INK, QUIET]) {
            assert!(contrast(colour.light, PAPER.light) >= 4.5, "{colour:?}");
            assert!(contrast(colour.dark, PAPER.dark) >= 4.5, "{colour:?}");
        }
    }

    #[test]
    fn no_two_colours_are_the_same_on_light_pages() {
        // They would become one on dark pages.
        let all = [INK, GRID, QUIET, PAPER];
        let mut light: Vec<_> = all
            .iter()
            .chain(&SERIES)
            .map(|colour| colour.light)
            .collect();
        let count = light.len();
        light.sort();
        light.dedup();
        assert_eq!(light.len(), count);
    }
}
