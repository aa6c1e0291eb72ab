//! The results as pictures: SVG on white, so that they can be read on light and dark pages.

use std::fmt::Display;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::error::EvidenceError;
use super::protocol::{Design, Protocol};
use super::statistics::Interval;
use super::summary::{Row, Summary};
use crate::method::Method;

/// Colours that people with the common kinds of colour blindness can tell apart (Okabe and Ito), darkest first.
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
/// The colour of words and axes.
pub const INK: RGBColor = RGBColor(40, 40, 40);
/// The colour of lines behind the marks.
pub const GRID: RGBColor = RGBColor(225, 225, 225);
const FONT: (&str, i32) = ("sans-serif", 15);
/// About the width of a character of that font, and the height of a line.
const CHARACTER: u32 = 9;
const LINE: i32 = 24;
const MARGIN: u32 = 14;
/// The size of the part of a picture that holds the marks, where nothing else fixes it.
const PANEL: [u32; 2] = [420, 340];
/// The most numbers that an axis has, about.
const TICKS: f64 = 8.0;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A picture and the name of the file that it may go to.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Such as `textiles-accuracy.svg`.
    pub name: String,
    pub svg: String,
}

/// Every figure of a comparison: accuracy with intervals, and accuracy against forgetting where that was measured. For a
/// sweep, accuracy and orthogonality defect over the learning rates.
///
/// # Errors
///
/// The drawing failed.
pub fn figures(protocol: &Protocol, summaries: &[Summary]) -> Result<Vec<Figure>, EvidenceError> {
    let mut figures = Vec::new();
    for summary in summaries {
        let mut add = |what: &str, svg| {
            let name = format!("{}-{what}.svg", file_name(&summary.task));
            figures.push(Figure { name, svg });
        };
        match protocol.design {
            Design::Choose => {
                add("accuracy", accuracy(summary)?);
                if summary.rows.iter().any(|row| row.forgetting.is_some()) {
                    let second = protocol.conditions.forgetting.as_deref();
                    add(
                        "forgetting",
                        forgetting(summary, second.unwrap_or("other data"))?,
                    );
                }
            }
            Design::Sweep => add("sweep", sweep(summary)?),
        }
    }
    Ok(figures)
}

/// What an axis shows, and the numbers beside it.
#[derive(Clone)]
struct Axis {
    title: String,
    range: Range<f64>,
    ticks: Vec<(f64, String)>,
}

/// What is drawn between the axes.
enum Mark {
    Line([(f64, f64); 2], RGBColor, u32),
    Dashes([(f64, f64); 2]),
    Dot((f64, f64), RGBColor),
    Ring((f64, f64), RGBColor),
}

/// One line for each method: the interval of the accuracy, the mean, and a ring for each seed.
fn accuracy(summary: &Summary) -> Result<String, EvidenceError> {
    let rows = &summary.rows;
    let labels: Vec<String> = rows.iter().map(|row| row.method.to_string()).collect();
    let mut marks = Vec::new();
    let mut seen = Vec::new();
    for (place, row) in rows.iter().enumerate() {
        let (y, colour) = (
            (rows.len() - 1 - place) as f64,
            COLOURS[place % COLOURS.len()],
        );
        let Interval { low, high } = row.accuracy.interval;
        let at = |share: f64| (100.0 * share, y);
        marks.push(Mark::Line([at(low), at(high)], colour, 3));
        let below = |share| (100.0 * share, y - 0.25);
        marks.extend(
            row.accuracies
                .iter()
                .map(|&share| Mark::Ring(below(share), colour)),
        );
        marks.push(Mark::Dot(at(row.accuracy.mean), colour));
        seen.extend([low, high]);
        seen.extend(&row.accuracies);
    }
    let x = Axis::percent(
        "test accuracy, %: mean, 95 % interval, and each seed",
        &seen,
    );
    let places = labels.iter().rev().cloned().enumerate();
    let y = Axis {
        title: String::new(),
        range: -0.6..rows.len() as f64 - 0.4,
        ticks: places.map(|(place, label)| (place as f64, label)).collect(),
    };
    let height = 2 * LINE as u32 * rows.len() as u32 + 110;
    let width = PANEL[0] + y.label_width() + 2 * MARGIN;
    draw([width, height], |root| {
        panel(root, &summary.task, &x, &y, &marks)
    })
}

/// Test accuracy against what nearest neighbours still make of the second data set, with intervals of both.
fn forgetting(summary: &Summary, second: &str) -> Result<String, EvidenceError> {
    let mut marks = Vec::new();
    let (mut seen_x, mut seen_y, mut before) = (Vec::new(), Vec::new(), Vec::new());
    let mut keys = Vec::new();
    for (place, row) in summary.rows.iter().enumerate() {
        let Some(change) = row.forgetting else {
            continue;
        };
        let colour = COLOURS[place % COLOURS.len()];
        let at = |x: f64, y: f64| (100.0 * x, 100.0 * y);
        let vertical = row.accuracy.interval;
        let mean = row.accuracy.mean;
        let line = |from, to| Mark::Line([from, to], colour, 2);
        marks.push(line(
            at(change.after, vertical.low),
            at(change.after, vertical.high),
        ));
        if let Some(horizontal) = change.interval {
            marks.push(line(at(horizontal.low, mean), at(horizontal.high, mean)));
            seen_x.extend([horizontal.low, horizontal.high]);
        }
        marks.push(Mark::Dot(at(change.after, mean), colour));
        seen_x.extend([change.before, change.after]);
        seen_y.extend([vertical.low, vertical.high]);
        before.push(change.before);
        keys.push((row.method.to_string(), Mark::Dot((0.0, 0.0), colour)));
    }
    let x = Axis::percent(
        &format!("nearest neighbours on {second} afterwards, %"),
        &seen_x,
    );
    let y = Axis::percent("test accuracy, %", &seen_y);
    if let Some(first) = before.first() {
        let at = |y| (100.0 * first, y);
        marks.insert(0, Mark::Dashes([at(y.range.start), at(y.range.end)]));
        keys.push(("before training".to_string(), Mark::Dashes([(0.0, 0.0); 2])));
    }
    let width = PANEL[0] + y.label_width();
    draw([width + legend_width(&keys), PANEL[1] + 90], |root| {
        let (left, right) = root.split_horizontally(width);
        panel(&left, &summary.task, &x, &y, &marks)?;
        legend(&right, &keys)
    })
}

/// Two panels over the learning rate: test accuracy with intervals, and orthogonality defect.
fn sweep(summary: &Summary) -> Result<String, EvidenceError> {
    let mut methods: Vec<&Method> = summary.rows.iter().map(|row| &row.method).collect();
    methods.dedup();
    let (mut top, mut bottom) = (Vec::new(), Vec::new());
    let (mut seen, mut rates, mut defects) = (Vec::new(), Vec::new(), Vec::new());
    let mut keys = Vec::new();
    for (place, method) in methods.iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let of_method = summary.rows.iter().filter(|row| row.method == **method);
        let rows: Vec<&Row> = of_method.collect();
        // Side by side, so that methods with the same accuracy do not hide each other.
        let x = |row: &Row| row.learning_rate.log10() + 0.025 * (place as f64 - 1.5);
        let means = rows.iter().map(|row| (x(row), 100.0 * row.accuracy.mean));
        curve(&mut top, means.collect(), colour);
        for row in &rows {
            let Interval { low, high } = row.accuracy.interval;
            top.push(Mark::Line(
                [(x(row), 100.0 * low), (x(row), 100.0 * high)],
                colour,
                1,
            ));
            seen.extend([low, high]);
            rates.push(row.learning_rate);
        }
        let positive = rows.iter().filter_map(|row| {
            let defect = row.rotation?.defect;
            (defect.is_finite() && defect > 0.0).then(|| (x(row), defect.log10()))
        });
        let positive: Vec<_> = positive.collect();
        defects.extend(positive.iter().map(|point| point.1));
        curve(&mut bottom, positive, colour);
        keys.push((method.to_string(), Mark::Dot((0.0, 0.0), colour)));
    }
    let x = Axis::rates(rates);
    let accuracy = Axis::percent("test accuracy, %", &seen);
    let defect = Axis::powers("orthogonality defect", &defects);
    let width = PANEL[0] + accuracy.label_width().max(defect.label_width());
    draw([2 * width + legend_width(&keys), PANEL[1] + 90], |root| {
        let (left, rest) = root.split_horizontally(width);
        let (middle, right) = rest.split_horizontally(width);
        panel(&left, &summary.task, &x, &accuracy, &top)?;
        panel(&middle, " ", &x, &defect, &bottom)?;
        legend(&right, &keys)
    })
}

fn curve(marks: &mut Vec<Mark>, points: Vec<(f64, f64)>, colour: RGBColor) {
    let steps = points
        .windows(2)
        .map(|pair| Mark::Line([pair[0], pair[1]], colour, 2));
    marks.extend(steps);
    marks.extend(points.iter().map(|&point| Mark::Dot(point, colour)));
}

impl Axis {
    /// A range of shares, in percent, with some room around it.
    fn percent(title: &str, shares: &[f64]) -> Self {
        let Range { start, end } = around(shares);
        let range = (100.0 * start)..(100.0 * end);
        let rough = (range.end - range.start) / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
        let step = steps
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let digits = usize::from(step < 1.0) + usize::from(step < 0.1);
        let first = (range.start / step).ceil() as i64;
        let last = (range.end / step).floor() as i64;
        let ticks = (first..=last).map(|tick| {
            let value = tick as f64 * step;
            (value, format!("{value:.digits$}"))
        });
        Self {
            title: title.to_string(),
            range,
            ticks: ticks.collect(),
        }
    }

    /// The learning rates themselves, by their logarithms.
    fn rates(mut rates: Vec<f64>) -> Self {
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        let logarithms: Vec<f64> = rates.iter().map(|rate| rate.log10()).collect();
        Self {
            title: "learning rate".to_string(),
            range: around(&logarithms),
            ticks: rates
                .iter()
                .map(|rate| (rate.log10(), format!("{rate:e}")))
                .collect(),
        }
    }

    /// Powers of ten, by their logarithms.
    fn powers(title: &str, logarithms: &[f64]) -> Self {
        let around = around(logarithms);
        let range = around.start.floor()..around.end.ceil();
        let every = ((range.end - range.start) / TICKS).ceil().max(1.0) as usize;
        let powers = (range.start as i32..=range.end as i32).step_by(every);
        Self {
            title: title.to_string(),
            ticks: powers
                .map(|power| (f64::from(power), format!("1e{power}")))
                .collect(),
            range,
        }
    }

    /// Pixels for the numbers or names, and for the title if there is one.
    fn label_width(&self) -> u32 {
        let longest = self
            .ticks
            .iter()
            .map(|(_, label)| label.chars().count())
            .max();
        let title = match self.title.is_empty() {
            true => 0,
            false => LINE as u32,
        };
        CHARACTER * longest.unwrap_or(0) as u32 + title + MARGIN
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        start + (share * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(value, _)| *value).collect()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        let found = self.ticks.iter().find(|(tick, _)| tick == value);
        found.map_or(String::new(), |(_, label)| label.clone())
    }
}

/// The range of some values, and a tenth more to both sides.
fn around(values: &[f64]) -> Range<f64> {
    let finite = values.iter().copied().filter(|value| value.is_finite());
    let low = finite.clone().reduce(f64::min).unwrap_or(0.0);
    let high = finite.reduce(f64::max).unwrap_or(1.0);
    let room = (0.1 * (high - low)).max(0.005);
    (low - room)..(high + room)
}

fn panel(
    area: &Area,
    caption: &str,
    x: &Axis,
    y: &Axis,
    marks: &[Mark],
) -> Result<(), EvidenceError> {
    let mut chart = ChartBuilder::on(area)
        .caption(caption, FONT.with_color(INK))
        .margin(MARGIN)
        .x_label_area_size(2 * LINE)
        .y_label_area_size(y.label_width())
        .build_cartesian_2d(x.clone(), y.clone())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(FONT.with_color(INK))
        .x_desc(&x.title)
        .y_desc(&y.title)
        .draw()
        .map_err(failed)?;
    for mark in marks {
        match *mark {
            Mark::Line(ends, colour, width) => chart
                .plotting_area()
                .draw(&PathElement::new(ends.to_vec(), colour.stroke_width(width))),
            Mark::Dashes(ends) => chart
                .plotting_area()
                .draw(&DashedPathElement::new(ends, 6, 5, INK)),
            Mark::Dot(at, colour) => {
                chart
                    .plotting_area()
                    .draw(&Circle::new(at, 5, colour.filled()))
            }
            Mark::Ring(at, colour) => chart.plotting_area().draw(&Circle::new(at, 3, colour)),
        }
        .map_err(failed)?;
    }
    Ok(())
}

/// A mark and a name in each line.
fn legend(area: &Area, keys: &[(String, Mark)]) -> Result<(), EvidenceError> {
    for ((name, mark), line) in keys.iter().zip(0..) {
        let y = LINE * (line + 2);
        match *mark {
            Mark::Dashes(_) => area.draw(&DashedPathElement::new([(0, y), (20, y)], 6, 5, INK)),
            Mark::Line(_, colour, _) | Mark::Dot(_, colour) | Mark::Ring(_, colour) => {
                area.draw(&Circle::new((10, y), 5, colour.filled()))
            }
        }
        .map_err(failed)?;
        let text = Text::new(name.clone(), (28, y - 7), FONT.into_font().color(&INK));
        area.draw(&text).map_err(failed)?;
    }
    Ok(())
}

fn legend_width(keys: &[(String, Mark)]) -> u32 {
    let longest = keys.iter().map(|(name, _)| name.chars().count()).max();
    CHARACTER * longest.unwrap_or(0) as u32 + 28 + MARGIN
}

fn draw(
    [width, height]: [u32; 2],
    content: impl FnOnce(&Area) -> Result<(), EvidenceError>,
) -> Result<String, EvidenceError> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        content(&root)?;
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(error: impl Display) -> EvidenceError {
    EvidenceError::Plot {
        reason: error.to_string(),
    }
}

/// The name of a task as a part of a file name that every system accepts.
fn file_name(task: &str) -> String {
    let allowed = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    task.chars()
        .map(|c| if allowed(c) { c } else { '_' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::statistics::Bootstrap;
    use crate::evidence::{Preset, Setting, examples};

    fn drawn(protocol: &Protocol) -> Vec<Figure> {
        let right = |method: usize, seed: u64, image: usize| {
            !(image + 3 * seed as usize).is_multiple_of(method + 4 + seed as usize % 2)
        };
        let outcomes = examples::finished(protocol, 200, right);
        let bootstrap = Bootstrap {
            resamples: 500,
            ..Bootstrap::default()
        };
        let summaries = Summary::of(protocol, &outcomes, &bootstrap).unwrap();
        figures(protocol, &summaries).unwrap()
    }

    /// Every position in the picture, and the size of the picture.
    fn positions(svg: &str, attribute: &str) -> Vec<f64> {
        let start = format!(" {attribute}=\"");
        svg.split(&start)
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
            .collect()
    }

    #[test]
    fn a_comparison_has_two_figures_for_each_task() {
        let mut protocol = examples::quick();
        protocol
            .conditions
            .tasks
            .insert("a/b".to_string(), "2".to_string());
        let figures = drawn(&protocol);
        let names: Vec<&str> = figures.iter().map(|figure| figure.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "a_b-accuracy.svg",
                "a_b-forgetting.svg",
                "textiles-accuracy.svg",
                "textiles-forgetting.svg"
            ]
        );
        // A mean and five seeds for each of five methods.
        assert_eq!(figures[2].svg.matches("<circle").count(), 30);
        // A mean for each method, and as many keys.
        assert_eq!(figures[3].svg.matches("<circle").count(), 10);
        for label in ["BOFT b=8 m=2", "linear probe", "full"] {
            assert!(figures[2].svg.contains(label) && figures[3].svg.contains(label));
        }
    }

    #[test]
    fn a_sweep_shows_accuracy_and_defect_of_every_map() {
        let figures = drawn(&Preset::Cayley.protocol(Setting::example(&["textiles"])));
        assert_eq!(figures.len(), 1);
        // Four maps at five learning rates in two panels, and four keys.
        assert_eq!(figures[0].svg.matches("<circle").count(), 44);
        for label in ["3e-2", "1e-7", "OFT b=32 Neumann 6", "orthogonality defect"] {
            assert!(figures[0].svg.contains(label), "{label}");
        }
    }

    #[test]
    fn nothing_lies_outside_of_the_picture() {
        let sweep = Preset::Cayley.protocol(Setting::example(&["textiles"]));
        for figure in [drawn(&examples::quick()), drawn(&sweep)].concat() {
            let svg = &figure.svg;
            let [width, height] = ["width", "height"].map(|name| positions(svg, name)[0]);
            for (attributes, limit) in [(["x", "cx"], width), (["y", "cy"], height)] {
                let all = attributes.map(|name| positions(svg, name)).concat();
                assert!(all.len() > 20);
                assert!(
                    all.iter().all(|at| (0.0..=limit).contains(at)),
                    "{}",
                    figure.name
                );
            }
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        let labels = |axis: Axis| {
            axis.ticks
                .into_iter()
                .map(|tick| tick.1)
                .collect::<Vec<_>>()
        };
        let axis = Axis::percent("", &[0.62, 0.9]);
        assert_eq!(labels(axis), ["60", "65", "70", "75", "80", "85", "90"]);
        let axis = Axis::percent("", &[0.9712, 0.9738]);
        assert_eq!(
            labels(axis),
            ["96.8", "97.0", "97.2", "97.4", "97.6", "97.8"]
        );
        assert_eq!(
            labels(Axis::powers("", &[-6.6, -0.3])).first().unwrap(),
            "1e-8"
        );
    }

    #[test]
    fn a_defect_that_is_zero_or_not_a_number_is_left_out_and_does_no_harm() {
        let protocol = Preset::Cayley.protocol(Setting::example(&["textiles"]));
        let mut outcomes = examples::finished(&protocol, 20, |_, _, image| image % 2 == 0);
        for (outcome, defect) in outcomes.iter_mut().zip([0.0, f64::NAN].into_iter().cycle()) {
            outcome.rotation.as_mut().unwrap().defect = defect;
        }
        let summaries = Summary::of(&protocol, &outcomes, &Bootstrap::default()).unwrap();
        let figures = figures(&protocol, &summaries).unwrap();
        // The accuracies and the keys.
        assert_eq!(figures[0].svg.matches("<circle").count(), 24);
        assert!(!figures[0].svg.contains("NaN"));
    }
}
