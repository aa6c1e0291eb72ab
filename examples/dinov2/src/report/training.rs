//! The curves of training.

use maud::{Markup, html};

use super::axis::Axis;
use super::chart::{Chart, Look, Series};
use crate::scores;

use super::{EpochEntry, Report, ReportError, StepEntry, short};

/// The curves, if anything was trained.
pub fn section(report: &Report) -> Result<Option<Markup>, ReportError> {
    let mut charts = Vec::new();
    if !report.epochs.is_empty() {
        charts.push(losses(report));
        charts.push(accuracies(report));
        charts.extend(rotations(report));
    }
    if !report.steps.is_empty() {
        charts.extend(steps(&report.steps));
    }
    if charts.is_empty() {
        return Ok(None);
    }
    let figures = charts
        .iter()
        .map(Chart::figure)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(html! {
        section id="training" {
            h2 { "Training" }
            div.charts { @for figure in figures { (figure) } }
            @if !report.epochs.is_empty() { (table(&report.epochs)) }
        }
    }))
}

fn losses(report: &Report) -> Chart {
    let values = |of: fn(&EpochEntry) -> f64| move |epoch: &EpochEntry| Some(of(epoch));
    let series = vec![
        line(report, 0, "training", values(|epoch| epoch.train_loss)),
        line(report, 1, "validation", values(|epoch| epoch.valid_loss)),
    ];
    chart(
        report,
        "Loss",
        "at the end of each epoch",
        series,
        Axis::linear,
    )
}

fn accuracies(report: &Report) -> Chart {
    let training = line(report, 0, "training", |epoch| {
        Some(percent(epoch.train_accuracy))
    });
    let validation = line(report, 1, "validation", |epoch| {
        Some(percent(epoch.valid_accuracy))
    });
    let mut series = vec![training, validation];
    series.retain(|series| !series.points.is_empty());
    chart(
        report,
        "Accuracy",
        "in percent of the images",
        series,
        Axis::linear,
    )
}

/// What training did to the rotations, where there are any.
fn rotations(report: &Report) -> Vec<Chart> {
    let angle = line(report, 2, "angle", |epoch| epoch.angle);
    let defect = line(report, 3, "defect", |epoch| epoch.defect);
    let mut charts = Vec::new();
    if !angle.points.is_empty() {
        let about = "of all layers, in radians";
        charts.push(chart(
            report,
            "Largest angle",
            about,
            vec![angle],
            Axis::linear,
        ));
    }
    if defect.points.iter().any(|(_, defect)| *defect > 0.0) {
        let about = "of all layers: the largest entry of RᵀR − I, 0 for a rotation";
        let title = "Orthogonality defect";
        charts.push(chart(report, title, about, vec![defect], Axis::logarithmic));
    }
    charts
}

fn steps(steps: &[StepEntry]) -> [Chart; 3] {
    let chart = |title: &'static str, about, of: fn(&StepEntry) -> f64| {
        let points: Vec<_> = steps
            .iter()
            .map(|step| (step.step as f64, of(step)))
            .collect();
        // Rates and speeds are shares of something, and start at zero.
        let zero = (title != "Loss of each step").then_some(0.0);
        Chart {
            title,
            about,
            x: Axis::whole("step", points.iter().map(|point| point.0)),
            y: Axis::linear(points.iter().map(|point| point.1).chain(zero)),
            series: vec![Series {
                name: title.to_lowercase(),
                look: Look::line(),
                points,
                is_listed: true,
            }],
            mark: None,
        }
    };
    [
        chart("Loss of each step", "on its training batch", |step| {
            step.loss
        }),
        chart("Learning rate", "of the adapter", |step| step.learning_rate),
        chart("Speed", "in images per second", |step| {
            step.images_per_second
        }),
    ]
}

/// A value of every epoch that has it.
fn line(
    report: &Report,
    look: usize,
    name: &str,
    value: impl Fn(&EpochEntry) -> Option<f64>,
) -> Series {
    let epochs = report.epochs.iter();
    let points = epochs.filter_map(|epoch| Some((epoch.epoch as f64, value(epoch)?)));
    Series {
        name: name.into(),
        look: Look::numbered(look),
        points: points.collect(),
        is_listed: true,
    }
}

/// A chart over the epochs, with the best marked.
fn chart(
    report: &Report,
    title: &'static str,
    about: &'static str,
    series: Vec<Series>,
    y: fn(Vec<f64>) -> Axis,
) -> Chart {
    let points = series.iter().flat_map(|series| &series.points);
    let y = y(points.map(|point| point.1).collect());
    let epochs = report.epochs.iter().map(|epoch| epoch.epoch);
    let best = report
        .best_epoch
        .filter(|best| epochs.clone().any(|epoch| epoch == *best));
    Chart {
        title,
        about,
        x: Axis::whole("epoch", epochs.map(|epoch| epoch as f64)),
        y,
        series,
        mark: best.map(|best| (best as f64, format!("best epoch: {best}"))),
    }
}

fn percent(share: f64) -> f64 {
    100.0 * share
}

fn table(epochs: &[EpochEntry]) -> Markup {
    let heads = [
        "training loss",
        "training accuracy",
        "validation loss",
        "validation accuracy",
        "largest angle/rad",
        "defect",
    ];
    let row = |epoch: &EpochEntry| {
        let optional = |value: Option<f64>| value.map_or("–".to_string(), short);
        [
            short(epoch.train_loss),
            scores::percent(Some(epoch.train_accuracy)),
            short(epoch.valid_loss),
            scores::percent(Some(epoch.valid_accuracy)),
            optional(epoch.angle),
            optional(epoch.defect),
        ]
    };
    html! {
        details {
            summary { "All epochs as a table" }
            div.scroll tabindex="0" role="region" aria-label="All epochs" {
                table {
                    thead {
                        tr {
                            th.number scope="col" { "epoch" }
                            @for head in heads { th.number scope="col" { (head) } }
                        }
                    }
                    tbody {
                        @for epoch in epochs {
                            tr {
                                th.number scope="row" { (epoch.epoch) }
                                @for value in row(epoch) { td.number { (value) } }
                            }
                        }
                    }
                }
            }
        }
    }
}
