//! A picture of an adapter: how far each layer turns.

use std::path::Path;

use plotters::prelude::*;

use crate::error::Error;
use crate::output::OutputFile;

const WIDTH: u32 = 900;
/// The height of a layer's bar, and of everything around the bars.
const ROW: u32 = 18;
const AROUND: u32 = 90;
/// The width of a letter of a label.
const LETTER: usize = 7;
const FONT: u32 = 20;

/// Draws the largest angle of each layer as an SVG.
pub fn angles(path: &Path, angles: &[(String, f64)]) -> Result<(), Error> {
    let mut svg = String::new();
    draw(&mut svg, angles)
        .map_err(|reason| Error::malformed(path, format!("cannot be drawn: {reason}")))?;
    let mut file = OutputFile::create(path)?;
    file.write(svg.as_bytes())?;
    file.finish()
}

fn draw(svg: &mut String, angles: &[(String, f64)]) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let height = AROUND + ROW * u32::try_from(angles.len()).map_err(|error| failed(&error))?;
    let longest = angles.iter().map(|(path, _)| path.len()).max().unwrap_or(0);
    let largest = angles.iter().map(|(_, angle)| *angle).fold(0.0, f64::max);
    let largest = if largest > 0.0 { 1.05 * largest } else { 1.0 };
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    // A row is two high, with its label in the middle.
    let labels = (0..angles.len()).map(|row| 2 * row + 1).collect();
    let rows = (0..2 * angles.len()).with_key_points(labels);
    let mut chart = ChartBuilder::on(&area)
        .caption("largest rotation angle per layer", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(35)
        .y_label_area_size((LETTER * longest).clamp(40, WIDTH as usize / 2) as u32)
        .build_cartesian_2d(0.0..largest, rows)
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
        .label_style(("sans-serif", FONT))
        .axis_desc_style(("sans-serif", FONT))
        .draw()
        .map_err(|error| failed(&error))?;
    let bars = angles.iter().rev().enumerate().map(|(row, (_, angle))| {
        let length = if angle.is_finite() { *angle } else { 0.0 };
        let ends = [(0.0, 2 * row), (length, 2 * row + 2)];
        let mut bar = Rectangle::new(ends, BLUE.mix(0.6).filled());
        bar.set_margin(2, 2, 0, 0);
        bar
    });
    chart.draw_series(bars).map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}
