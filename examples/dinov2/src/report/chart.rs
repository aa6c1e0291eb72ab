//! Charts of lines and markers, as SVG.

use maud::{Markup, PreEscaped, html};
use plotters::coord::cartesian::Cartesian2d;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::axis::Axis;
use super::palette::{Colour, GRID, INK, PAPER, QUIET, SERIES};
use super::{ReportError, short};

/// The size of a chart in its own pixels. On the page, it is as wide as its column.
const SIZE: (u32, u32) = (480, 280);
/// Plotters divides the size by 1.24.
const FONT: (&str, i32) = ("sans-serif", 19);
/// The width of a letter of an axis.
const LETTER: usize = 9;
/// Half the size of a marker.
const MARKER: i32 = 4;
/// Beyond this many points, a line without markers is drawn through means of neighbouring points.
const POINTS: usize = 400;

type Failure = DrawingAreaErrorKind<std::io::Error>;

/// The shape of a marker, which tells series apart without their colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
}

impl Marker {
    const ALL: [Self; 4] = [Self::Circle, Self::Square, Self::Triangle, Self::Diamond];

    /// The corners of a closed line around a marker of this size; a circle has none.
    fn corners(self, size: i32) -> Vec<(i32, i32)> {
        let (a, b) = (size, size + 1);
        match self {
            Self::Circle => vec![],
            Self::Square => vec![(-a, -a), (a, -a), (a, a), (-a, a), (-a, -a)],
            Self::Triangle => vec![(0, -b), (b, a), (-b, a), (0, -b)],
            Self::Diamond => vec![(0, -b), (b, 0), (0, b), (-b, 0), (0, -b)],
        }
    }
}

/// How a series looks.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    colour: Colour,
    marker: Option<Marker>,
    is_hollow: bool,
    is_line: bool,
}

impl Look {
    /// The look of a series by its number. Colours repeat with other markers, so that 32 series differ.
    pub fn numbered(index: usize) -> Self {
        let count = SERIES.len();
        Self {
            colour: SERIES[index % count],
            marker: Some(Marker::ALL[(index + index / count) % Marker::ALL.len()]),
            is_hollow: false,
            is_line: true,
        }
    }

    /// A line without markers.
    pub fn line() -> Self {
        Self {
            marker: None,
            ..Self::numbered(0)
        }
    }

    /// The same without a line between the markers, which are empty inside, and large enough to be seen behind filled
    /// ones.
    pub fn hollow(self) -> Self {
        Self {
            is_hollow: true,
            is_line: false,
            ..self
        }
    }

    /// The same without a line between the markers.
    pub fn unconnected(self) -> Self {
        Self {
            is_line: false,
            ..self
        }
    }

    fn size(&self) -> i32 {
        match (self.is_line, self.is_hollow) {
            (true, _) => MARKER,
            (false, true) => MARKER + 1,
            (false, false) => MARKER - 3,
        }
    }

    /// What a marker is filled with.
    fn fill(&self) -> Colour {
        if self.is_hollow { PAPER } else { self.colour }
    }
}

/// Points under one name. Points that an axis cannot show are gaps in the line.
pub struct Series {
    pub name: String,
    pub look: Look,
    pub points: Vec<(f64, f64)>,
    /// Whether the legend has it.
    pub is_listed: bool,
}

/// A chart.
pub struct Chart {
    pub title: &'static str,
    /// What the numbers upwards are, with their unit.
    pub about: &'static str,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// A value on the x axis that is marked, and its name.
    pub mark: Option<(f64, String)>,
}

impl Chart {
    /// The chart with its title and its legend.
    ///
    /// # Errors
    ///
    /// Plotters cannot draw it.
    pub fn figure(&self) -> Result<Markup, ReportError> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|error| ReportError::Chart {
            title: self.title,
            reason: error.to_string(),
        })?;
        Ok(html! {
            figure.chart {
                figcaption { strong { (self.title) } " " (self.about) }
                div role="img" aria-label=(self.description()) { (PreEscaped(svg)) }
                (self.legend())
            }
        })
    }

    /// What the chart shows, for those who cannot see it.
    fn description(&self) -> String {
        let describe = |series: &Series| {
            let shown = |point: &&(f64, f64)| self.place(point).is_some();
            let first = series.points.iter().find(shown);
            let last = series.points.iter().rfind(shown);
            match first.zip(last) {
                Some(((_, first), (_, last))) => {
                    format!("{} from {} to {}", series.name, short(*first), short(*last))
                }
                None => format!("{} without points", series.name),
            }
        };
        let series: Vec<_> = self.series.iter().map(describe).collect();
        format!("{}: {}", self.title, series.join("; "))
    }

    fn legend(&self) -> Markup {
        html! {
            @if self.series.len() > 1 || self.mark.is_some() {
                ul.legend {
                    @for series in self.series.iter().filter(|series| series.is_listed) {
                        li { (key(series.look)) (series.name) }
                    }
                    @if let Some((_, name)) = &self.mark {
                        li {
                            svg viewBox="0 0 24 12" aria-hidden="true" {
                                path d="M12 0V12" stroke=(QUIET.hex()) stroke-width="2" stroke-dasharray="3 2" {}
                            }
                            (name)
                        }
                    }
                }
            }
        }
    }

    fn draw(&self, svg: &mut String) -> Result<(), Failure> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let letters = self.y.longest_label();
        let label = FONT.into_font().color(&INK.rgb());
        let mut chart = ChartBuilder::on(&area)
            .margin_top(10)
            .margin_right(16)
            .x_label_area_size(if self.x.title.is_empty() { 26 } else { 46 })
            .y_label_area_size((LETTER * letters + 12) as u32)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID.rgb())
            .axis_style(INK.rgb())
            .x_desc(self.x.title)
            .label_style(label.clone())
            .axis_desc_style(label)
            .draw()?;
        if let Some(x) = self.mark.as_ref().and_then(|(x, _)| self.x.place(*x)) {
            let (low, high) = self.y.ends();
            let style = QUIET.rgb().stroke_width(2);
            let line = DashedPathElement::new([(x, low), (x, high)], 5, 4, style);
            chart.draw_series([line])?;
        }
        for series in &self.series {
            self.draw_series(&mut chart, series)?;
        }
        area.present()
    }

    fn draw_series(
        &self,
        chart: &mut ChartContext<SVGBackend, Cartesian2d<Axis, Axis>>,
        series: &Series,
    ) -> Result<(), Failure> {
        let (runs, look) = (self.runs(series), series.look);
        let line = look.colour.rgb().stroke_width(2);
        if look.is_line {
            let lines = runs.iter().filter(|run| run.len() > 1);
            chart.draw_series(lines.map(|run| PathElement::new(run.clone(), line)))?;
        }
        // A point without neighbours has no line that shows it.
        let is_marked = |run: &&Vec<_>| look.marker.is_some() || run.len() == 1;
        let points = runs.iter().filter(is_marked).flatten().copied();
        let marker = look.marker.unwrap_or(Marker::Circle);
        let (corners, fill) = (marker.corners(look.size()), look.fill().rgb().filled());
        match marker {
            Marker::Circle => chart.draw_series(points.map(|point| {
                EmptyElement::at(point)
                    + Circle::new((0, 0), look.size(), fill)
                    + Circle::new((0, 0), look.size(), line)
            }))?,
            _ => chart.draw_series(points.map(|point| {
                EmptyElement::at(point)
                    + Polygon::new(corners.clone(), fill)
                    + PathElement::new(corners.clone(), line)
            }))?,
        };
        Ok(())
    }

    fn place(&self, (x, y): &(f64, f64)) -> Option<(f64, f64)> {
        self.x.place(*x).zip(self.y.place(*y))
    }

    /// The places of the points of a series, in runs without a gap.
    fn runs(&self, series: &Series) -> Vec<Vec<(f64, f64)>> {
        let places: Vec<_> = series
            .points
            .iter()
            .map(|point| self.place(point))
            .collect();
        let runs = places.split(Option::is_none).filter(|run| !run.is_empty());
        runs.map(|run| {
            let run: Vec<_> = run.iter().flatten().copied().collect();
            match series.look.marker {
                None => thinned(run),
                Some(_) => run,
            }
        })
        .collect()
    }
}

/// At most [`POINTS`] points: the means of neighbours.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let sum = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>();
        (sum(|point| point.0) / count, sum(|point| point.1) / count)
    };
    points.chunks(group).map(mean).collect()
}

/// A small picture of how a series looks.
pub fn key(look: Look) -> Markup {
    let (colour, fill) = (look.colour.hex(), look.fill().hex());
    let corners = look
        .marker
        .map_or(Vec::new(), |marker| marker.corners(look.size()));
    let points: Vec<_> = corners
        .iter()
        .map(|(x, y)| format!("{},{}", x + 12, y + 6))
        .collect();
    html! {
        svg viewBox="0 0 24 12" aria-hidden="true" {
            @if look.is_line {
                path d="M0 6H24" stroke=(colour) stroke-width="2" {}
            }
            @if look.marker == Some(Marker::Circle) {
                circle cx="12" cy="6" r=(look.size()) fill=(fill) stroke=(colour) stroke-width="2" {}
            } @else if look.marker.is_some() {
                polygon points=(points.join(" ")) fill=(fill) stroke=(colour) stroke-width="2" {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, look: Look) -> Chart {
        let y = Axis::linear(points.iter().map(|point| point.1));
        let x = Axis::whole("step", points.iter().map(|point| point.0));
        let series = vec![Series {
            name: "loss".into(),
            look,
            points,
            is_listed: true,
        }];
        Chart {
            title: "Loss",
            about: "per step",
            x,
            y,
            series,
            mark: None,
        }
    }

    #[test]
    fn a_number_that_is_not_finite_is_a_gap() {
        let points = vec![
            (0.0, 1.0),
            (1.0, 2.0),
            (2.0, f64::NAN),
            (3.0, 1.0),
            (4.0, f64::INFINITY),
            (5.0, 2.0),
            (6.0, 1.0),
        ];
        let figure = chart(points, Look::line()).figure().unwrap().into_string();
        let blue = format!("stroke=\"{}\"", SERIES[0].hex());
        let of_series = figure
            .lines()
            .filter(|line| line.starts_with("<polyline") && line.contains(&blue));
        assert_eq!(of_series.count(), 2, "{figure}");
        // The point between two gaps.
        assert_eq!(figure.matches("<circle").count(), 2, "{figure}");
        assert!(figure.contains("loss from 1 to 1"), "{figure}");
        assert!(
            !figure.contains("NaN") && !figure.contains("inf"),
            "{figure}"
        );
    }

    #[test]
    fn a_long_line_is_thinned_to_means_and_keeps_its_ends() {
        let points: Vec<_> = (0..100_000)
            .map(|step| (f64::from(step), f64::from(step % 2)))
            .collect();
        let thin = thinned(points);
        assert_eq!(thin.len(), POINTS);
        assert!(thin.iter().all(|(_, y)| *y == 0.5));
        assert!(thin[0].0 < 125.0 && thin[POINTS - 1].0 > 99_874.0);
        assert_eq!(thinned(vec![(1.0, 2.0)]), [(1.0, 2.0)]);
    }

    #[test]
    fn markers_and_colours_together_tell_32_series_apart() {
        let mut looks: Vec<_> = (0..32)
            .map(|index| {
                let look = Look::numbered(index);
                (look.colour.hex(), format!("{:?}", look.marker))
            })
            .collect();
        looks.sort();
        looks.dedup();
        assert_eq!(looks.len(), 32);
    }
}
