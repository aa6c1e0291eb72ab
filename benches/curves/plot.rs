//! The curves as a picture: SVG on white, so that it can be read on light and dark pages.

use std::fmt::Display;
use std::ops::Range;

use dinov2::evidence::plot::{COLOURS, GRID, INK};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::method::{Bits, Method};
use crate::table::{Curve, Point};

/// A colour for each method, grey for the head alone.
const METHOD_COLOURS: [RGBColor; Method::ALL.len()] = [
    RGBColor(110, 110, 110),
    COLOURS[0],
    COLOURS[2],
    COLOURS[1],
    COLOURS[4],
];
/// Plotters divides the size by 1.24.
const FONT: (&str, i32) = ("sans-serif", 16);
/// The size of a panel, and the height of a line of the legend.
const PANEL: (u32, u32) = (400, 300);
const LINE: u32 = 22;

/// What a panel shows, with its name.
type Shown = (&'static str, fn(&Point) -> f64);
/// A column of panels for each.
const SHOWN: [Shown; 2] = [
    ("loss of the training images", |point| point.train),
    ("loss of the test images", |point| point.test),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A row of panels for each precision: the losses over the steps.
pub fn svg(curves: &[Curve]) -> Result<String, String> {
    let mut svg = String::new();
    let (width, height) = (
        PANEL.0 * SHOWN.len() as u32,
        PANEL.1 * Bits::ALL.len() as u32,
    );
    let size = (width, height + LINE * (Method::ALL.len() as u32 + 1));
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let (panels, below) = area.split_vertically(height);
        let cells = panels.split_evenly((Bits::ALL.len(), SHOWN.len()));
        let contents = Bits::ALL
            .into_iter()
            .flat_map(|bits| SHOWN.map(|shown| (bits, shown)));
        for (cell, (bits, shown)) in cells.iter().zip(contents) {
            panel(cell, bits, shown, curves)?;
        }
        legend(&below)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

fn panel(area: &Area, bits: Bits, (name, part): Shown, curves: &[Curve]) -> Result<(), String> {
    let steps = curves
        .iter()
        .map(|curve| curve.end().step)
        .max()
        .unwrap_or(1);
    // All panels have the same range, so that they can be compared.
    let Range { start, end } = range(curves);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{bits}: {name}"), FONT.with_color(INK))
        .margin(10)
        .margin_right(20)
        .x_label_area_size(36)
        .y_label_area_size(46)
        .build_cartesian_2d(0..steps, (start..end).log_scale())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(FONT.with_color(INK))
        .x_labels(5)
        .y_label_formatter(&|loss| format!("{loss}"))
        .x_desc("step")
        .draw()
        .map_err(failed)?;
    for curve in curves.iter().filter(|curve| curve.bits == bits) {
        let points = curve.points.iter().map(|point| (point.step, part(point)));
        let points = points.filter(|(_, loss)| loss.is_finite());
        let style = colour(curve.method).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, style))
            .map_err(failed)?;
    }
    Ok(())
}

/// From the smallest loss of all panels to the largest, with some room.
fn range(curves: &[Curve]) -> Range<f64> {
    let points = curves.iter().flat_map(|curve| &curve.points);
    let losses = points.flat_map(|point| SHOWN.map(|(_, part)| part(point)));
    let losses: Vec<f64> = losses
        .filter(|loss| loss.is_finite() && *loss > 0.0)
        .collect();
    let smallest = losses.iter().copied().fold(1.0, f64::min);
    let largest = losses.iter().copied().fold(smallest, f64::max);
    smallest / 1.2..largest * 1.2
}

fn legend(area: &Area) -> Result<(), String> {
    for (row, method) in (0..).zip(Method::ALL) {
        let y = LINE as i32 * row + LINE as i32 / 2;
        let line = PathElement::new([(56, y), (84, y)], colour(method).stroke_width(2));
        area.draw(&line).map_err(failed)?;
        let font = FONT.into_font().color(&INK);
        let text = Text::new(method.to_string(), (94, y - 7), font);
        area.draw(&text).map_err(failed)?;
    }
    Ok(())
}

fn colour(method: Method) -> RGBColor {
    let place = Method::ALL.iter().position(|other| *other == method);
    METHOD_COLOURS[place.expect("every method is in the list")]
}

fn failed(error: impl Display) -> String {
    format!("the curves cannot be drawn: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{curves, tests::losses};

    #[test]
    fn a_curve_is_a_line_in_both_panels_of_its_precision() {
        let svg = svg(&curves(&losses())).unwrap();
        let stroke = format!("stroke=\"#{:02X}{:02X}{:02X}\"", 0, 158, 115);
        // Two panels and the legend.
        let lines = svg
            .lines()
            .filter(|line| line.contains("<polyline") && line.contains(&stroke));
        assert_eq!(lines.count(), 3, "{svg}");
        assert!(svg.contains("QOFT b=8") && svg.contains("4 bits: loss of the test images"));
    }
}
