//! How far training turned each layer, and what that did to its weights.

use maud::{Markup, html};

use super::axis::Axis;
use super::chart::{Chart, Look, Series};
use super::{LayerPoint, Report, ReportError, natural, short};
use crate::scores::printable;

/// The width on the x axis over which the markers of one place are spread.
const BETWEEN: f64 = 0.8;

/// Angles, defects and energies, if layers rotate.
pub fn section(report: &Report) -> Result<Option<Markup>, ReportError> {
    if report.layers.is_empty() {
        return Ok(None);
    }
    let layers = Layers::new(&report.layers);
    let mut charts = vec![layers.angles()];
    charts.extend(layers.defects());
    charts.extend(layers.energies());
    let figures = charts
        .iter()
        .map(Chart::figure)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(html! {
        section id="rotations" {
            h2 { "Rotations" }
            p {
                "An orthogonal adapter turns the weights of a layer and leaves the angles between its neurons as they \
                 were, so that their hyperspherical energy, a measure of how similar the neurons are, stays the same. "
                (layers.change())
            }
            div.charts { @for figure in figures { (figure) } }
            (layers.table())
        }
    }))
}

/// The layers in natural order, by their kind and by their place in the model.
struct Layers<'a> {
    /// The layers, each with the numbers of its place and its kind.
    sorted: Vec<(usize, usize, &'a LayerPoint)>,
    places: Vec<String>,
    kinds: Vec<String>,
}

impl<'a> Layers<'a> {
    fn new(layers: &'a [LayerPoint]) -> Self {
        let mut sorted: Vec<_> = layers.iter().collect();
        sorted.sort_by(|a, b| natural::compare(&a.path, &b.path));
        let (mut places, mut kinds) = (Vec::new(), Vec::new());
        let sorted = sorted.into_iter().map(|layer| {
            let (place, kind) = parts(&layer.path);
            let number = |known: &mut Vec<String>, name: String| {
                let found = known.iter().position(|other| *other == name);
                found.unwrap_or_else(|| {
                    known.push(name);
                    known.len() - 1
                })
            };
            (number(&mut places, place), number(&mut kinds, kind), layer)
        });
        Self {
            sorted: sorted.collect(),
            places,
            kinds,
        }
    }

    fn angles(&self) -> Chart {
        let series = self.series(|layer| layer.angle);
        let zero = [0.0];
        let y = Axis::linear(values(&series).into_iter().chain(zero));
        self.chart("Angle", "the largest of each layer, in radians", y, series)
    }

    /// The defects, unless all are zero.
    fn defects(&self) -> Option<Chart> {
        let series = self.series(|layer| layer.defect);
        let values = values(&series);
        let about = "the largest entry of RᵀR − I of each layer";
        let is_any = values.iter().any(|defect| *defect > 0.0);
        is_any.then(|| {
            self.chart(
                "Orthogonality defect",
                about,
                Axis::logarithmic(values),
                series,
            )
        })
    }

    /// The energies before as hollow and those after as filled markers, unless none was measured.
    fn energies(&self) -> Option<Chart> {
        let mut series = Vec::new();
        let mut before = self.series(|layer| layer.energy_before);
        let mut after = self.series(|layer| layer.energy_after);
        for (number, (before, after)) in before.iter_mut().zip(&mut after).enumerate() {
            before.look = before.look.hollow();
            after.look = after.look.unconnected();
            after.is_listed = false;
            // Layers of equal size have similar energies, and would hide each other.
            for (x, _) in before.points.iter_mut().chain(&mut after.points) {
                *x += BETWEEN * ((number as f64 + 0.5) / self.kinds.len() as f64 - 0.5);
            }
            after.name = format!("{} after", after.name);
        }
        series.append(&mut before);
        series.append(&mut after);
        let values = values(&series);
        let about = "before training (outline) and after (dot)";
        let is_any = values.iter().any(|energy| *energy > 0.0);
        is_any.then(|| {
            let y = Axis::logarithmic(values);
            self.chart("Hyperspherical energy", about, y, series)
        })
    }

    /// One series per kind of layer.
    fn series(&self, value: fn(&LayerPoint) -> f64) -> Vec<Series> {
        let kinds = self.kinds.iter().enumerate();
        let series = kinds.map(|(number, kind)| {
            let of_kind = self.sorted.iter().filter(|(_, kind, _)| *kind == number);
            let points = of_kind.map(|(place, _, layer)| (*place as f64, value(layer)));
            Series {
                name: printable(kind),
                look: Look::numbered(number),
                points: points.collect(),
                is_listed: true,
            }
        });
        series.collect()
    }

    fn chart(
        &self,
        title: &'static str,
        about: &'static str,
        y: Axis,
        series: Vec<Series>,
    ) -> Chart {
        Chart {
            title,
            about,
            x: Axis::named("layer", &self.places),
            y,
            series,
            mark: None,
        }
    }

    /// A sentence about the energies.
    fn change(&self) -> String {
        let changes = self.sorted.iter().filter_map(|(.., layer)| {
            let change = (layer.energy_after - layer.energy_before) / layer.energy_before;
            change.is_finite().then_some((change, &layer.path))
        });
        let largest = changes.reduce(|a, b| if b.0.abs() > a.0.abs() { b } else { a });
        largest.map_or(String::new(), |(change, path)| {
            format!(
                "Here the largest relative change of an energy is {}, in {}.",
                short(change),
                printable(path)
            )
        })
    }

    fn table(&self) -> Markup {
        html! {
            details {
                summary { "All " (self.sorted.len()) " layers as a table" }
                div.scroll tabindex="0" role="region" aria-label="All layers" {
                    table {
                        thead {
                            tr {
                                th scope="col" { "layer" }
                                @for head in ["angle/rad", "defect", "energy before", "energy after", "change"] {
                                    th.number scope="col" { (head) }
                                }
                            }
                        }
                        tbody {
                            @for (.., layer) in &self.sorted {
                                tr {
                                    th.path scope="row" { (printable(&layer.path)) }
                                    @for value in row(layer) { td.number { (short(value)) } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn row(layer: &LayerPoint) -> [f64; 5] {
    let LayerPoint {
        angle,
        defect,
        energy_before,
        energy_after,
        ..
    } = *layer;
    let change = (energy_after - energy_before) / energy_before;
    [angle, defect, energy_before, energy_after, change]
}

fn values(series: &[Series]) -> Vec<f64> {
    let points = series.iter().flat_map(|series| &series.points);
    points.map(|point| point.1).collect()
}

/// The numbers in the path of a layer, which say where it is, and the rest, which says what it is. A layer without
/// numbers is at `–`.
fn parts(path: &str) -> (String, String) {
    let is_number =
        |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let (numbers, _): (Vec<_>, Vec<_>) = path.split('.').partition(is_number);
    let Some(last) = numbers.last() else {
        return ("–".into(), path.into());
    };
    // What comes before the last number is the same for all layers of a kind.
    let after = path
        .rsplit_once(&format!(".{last}."))
        .map(|(_, after)| after);
    let kind = after
        .or_else(|| path.strip_prefix(&format!("{last}.")))
        .unwrap_or(path);
    (numbers.join("."), kind.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_place_and_a_kind() {
        for (path, place, kind) in [
            (
                "dinov2.encoder.layer.10.attention.attention.query",
                "10",
                "attention.attention.query",
            ),
            ("stages.2.blocks.11.fc1", "2.11", "fc1"),
            ("classifier", "–", "classifier"),
            ("3.fc", "3", "fc"),
            ("head.0", "0", "head.0"),
            ("", "–", ""),
        ] {
            assert_eq!(parts(path), (place.into(), kind.into()), "{path}");
        }
    }

    #[test]
    fn layer_2_comes_before_layer_10_in_chart_and_table() {
        let layer = |path: &str, angle| LayerPoint {
            path: path.into(),
            angle,
            defect: 0.0,
            energy_before: 1.0,
            energy_after: 1.0,
        };
        let points = [
            layer("layer.10.fc1", 0.3),
            layer("layer.2.fc1", 0.2),
            layer("layer.2.fc2", 0.1),
        ];
        let layers = Layers::new(&points);
        assert_eq!(layers.places, ["2", "10"]);
        assert_eq!(layers.kinds, ["fc1", "fc2"]);
        assert_eq!(layers.angles().series[0].points, [(0.0, 0.2), (1.0, 0.3)]);
        let table = layers.table().into_string();
        assert!(table.find("layer.2.fc2").unwrap() < table.find("layer.10.fc1").unwrap());
        // A defect of zero has no place on a logarithmic axis.
        assert!(layers.defects().is_none());
    }
}
