//! A picture of an adapter: how far each layer turns.

use std::fmt::Display;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::error::Error;
use crate::layers::kind;
use crate::output::OutputFile;

/// The width of the bars, and the margin around everything.
const BARS: u32 = 520;
const MARGIN: u32 = 16;
/// The height of a layer's bar, of a line of the legend, and of the axis.
const ROW: u32 = 18;
const LINE: u32 = 22;
const AXIS: u32 = 46;
const CAPTION: u32 = 34;
/// The width of a letter. Letters are narrower on average, and the widest have room.
const LETTER: u32 = 8;
/// Plotters divides the size by 1.24.
const FONT: u32 = 16;
/// The colours of the kinds of layers, in the order in which they first appear.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x1d, 0x5f, 0xd1),
    RGBColor(0xc8, 0x5a, 0x17),
    RGBColor(0x14, 0x78, 0x4a),
    RGBColor(0x8a, 0x3f, 0xc4),
    RGBColor(0xbf, 0x2a, 0x68),
    RGBColor(0x0f, 0x73, 0x7d),
    RGBColor(0x86, 0x64, 0x05),
    RGBColor(0x5a, 0x52, 0x4c),
];

/// With a single kind or more than this, all bars have one colour and there is no legend.
const KINDS: usize = 16;

/// Draws the largest angle of each layer as an SVG, the layers from top to bottom as they are given.
pub fn angles(path: &Path, angles: &[(String, f64)]) -> Result<(), Error> {
    let mut svg = String::new();
    draw(&mut svg, angles)
        .map_err(|reason| Error::malformed(path, format!("cannot be drawn: {reason}")))?;
    let mut file = OutputFile::create(path)?;
    file.write(svg.as_bytes())?;
    file.finish()
}

fn draw(svg: &mut String, angles: &[(String, f64)]) -> Result<(), String> {
    let failed = |error: &dyn Display| error.to_string();
    let picture = Picture::new(angles)?;
    let size = (picture.labels + BARS, picture.above + picture.below);
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let text = ("sans-serif", FONT).into_text_style(&area);
    picture
        .legend(&area, &text)
        .map_err(|error| failed(&error))?;

    let (_, below) = area.split_vertically(picture.above);
    // A row is two high, with its label in the middle.
    let labels = (0..angles.len()).map(|row| 2 * row + 1).collect();
    let rows = (0..2 * angles.len()).with_key_points(labels);
    let mut chart = ChartBuilder::on(&below)
        .margin_right(MARGIN)
        .x_label_area_size(AXIS)
        .y_label_area_size(picture.labels)
        .build_cartesian_2d(0.0..picture.longest, rows)
        .map_err(|error| failed(&error))?;
    // The first layer is on top.
    let label = |middle: &usize| {
        let angle = angles.iter().rev().nth(*middle / 2);
        angle.map_or(String::new(), |(path, _)| path.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_label_formatter(&label)
        .x_desc("radians")
        .label_style(text.clone())
        .axis_desc_style(text)
        .draw()
        .map_err(|error| failed(&error))?;
    let bars = angles.iter().rev().enumerate().map(|(row, (path, angle))| {
        let length = if angle.is_finite() { *angle } else { 0.0 };
        let ends = [(0.0, 2 * row), (length, 2 * row + 2)];
        let mut bar = Rectangle::new(ends, picture.colour(path).filled());
        bar.set_margin(2, 2, 0, 0);
        bar
    });
    chart.draw_series(bars).map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

/// The kinds of layers, and the sizes of what is drawn, in pixels.
struct Picture<'a> {
    kinds: Vec<&'a str>,
    /// The width of the labels.
    labels: u32,
    /// The height of the caption and the legend, and that of the bars and their axis.
    above: u32,
    below: u32,
    /// The angle at the right end of the axis.
    longest: f64,
}

impl<'a> Picture<'a> {
    fn new(angles: &'a [(String, f64)]) -> Result<Self, String> {
        let mut kinds = Vec::new();
        for (path, _) in angles {
            if !kinds.contains(&kind(path)) {
                kinds.push(kind(path));
            }
        }
        if !(2..=KINDS).contains(&kinds.len()) {
            kinds.clear();
        }
        let letters = angles.iter().map(|(path, _)| path.chars().count()).max();
        let count = |count: usize, size: u32| {
            let count = u32::try_from(count).ok();
            count.and_then(|count| count.checked_mul(size))
        };
        let sizes = || {
            let labels = count(letters.unwrap_or(0), LETTER)?.checked_add(2 * MARGIN)?;
            labels.checked_add(BARS)?;
            let above = count(kinds.len(), LINE)?.checked_add(CAPTION + MARGIN)?;
            let below = count(angles.len(), ROW)?.checked_add(AXIS)?;
            above.checked_add(below)?;
            Some((labels, above, below))
        };
        let (labels, above, below) = sizes().ok_or("the picture would be too large")?;
        let longest = angles.iter().map(|(_, angle)| *angle).fold(0.0, f64::max);
        Ok(Self {
            kinds,
            labels,
            above,
            below,
            longest: if longest > 0.0 { 1.05 * longest } else { 1.0 },
        })
    }

    /// The colour of a layer.
    fn colour(&self, path: &str) -> RGBColor {
        let place = self.kinds.iter().position(|other| *other == kind(path));
        COLOURS[place.unwrap_or(0) % COLOURS.len()]
    }

    /// Draws the caption, and below it the kinds with their colours.
    fn legend(
        &self,
        area: &DrawingArea<SVGBackend, Shift>,
        text: &TextStyle,
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        const KEY: i32 = 12;
        let left = MARGIN as i32;
        let caption = ("sans-serif", FONT + 4).into_text_style(area);
        area.draw_text("largest rotation angle per layer", &caption, (left, left))?;
        for (line, kind) in self.kinds.iter().enumerate() {
            let top = (MARGIN + CAPTION + LINE * line as u32) as i32;
            let key = [(left, top), (left + KEY, top + KEY)];
            let colour = COLOURS[line % COLOURS.len()];
            area.draw(&Rectangle::new(key, colour.filled()))?;
            area.draw_text(kind, text, (left + 2 * KEY, top))?;
        }
        Ok(())
    }
}
