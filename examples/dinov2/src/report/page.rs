//! The page around the sections.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{Report, ReportError, classes, palette, pictures, rotations, short, training};
use crate::scores::{Scores, percent, printable};

const STYLE: &str = include_str!("style.css");
/// Nothing is fetched and nothing runs, whatever names and pictures hold.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

/// The whole page.
pub fn page(report: &Report) -> Result<Markup, ReportError> {
    let scores = classes::scores(report)?;
    let sections = [
        training::section(report)?,
        scores.as_ref().map(classes::per_class),
        scores.as_ref().and_then(classes::confusion),
        pictures::mistakes(report)?,
        rotations::section(report)?,
        pictures::patches(report)?,
        settings(report),
    ];
    let title = match printable(&report.title) {
        title if title.trim().is_empty() => "Report".to_string(),
        title => title,
    };
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                style { (PreEscaped(STYLE)) (PreEscaped(palette::dark_rules())) }
            }
            body {
                header {
                    h1 { bdi { (title) } }
                    @for note in &report.notes { p.note { (printable(note)) } }
                    (figures(report, scores.as_ref()))
                }
                main { @for section in sections.iter().flatten() { (section) } }
            }
        }
    })
}

/// The numbers that matter most.
fn figures(report: &Report, scores: Option<&Scores>) -> Markup {
    let mut figures = Vec::new();
    if let Some(scores) = scores {
        figures.push(("accuracy on the test images", percent(scores.accuracy)));
        figures.push(("macro F1", percent(scores.macro_f1)));
        figures.push(("test images", scores.images.to_string()));
    }
    let best = report
        .epochs
        .iter()
        .find(|epoch| Some(epoch.epoch) == report.best_epoch);
    if let Some(best) = best {
        figures.push((
            "validation accuracy, best epoch",
            percent(Some(best.valid_accuracy)),
        ));
    }
    match (report.epochs.last(), report.best_epoch, report.steps.last()) {
        (Some(last), Some(best), _) => {
            figures.push(("best epoch", format!("{best} of {}", last.epoch)));
        }
        (Some(last), None, _) => figures.push(("epochs", last.epoch.to_string())),
        (None, _, Some(last)) => figures.push(("steps", last.step.to_string())),
        (None, _, None) => {}
    }
    let largest = |of: fn(&super::LayerPoint) -> f64| report.layers.iter().map(of).reduce(f64::max);
    if let Some(angle) = largest(|layer| layer.angle) {
        figures.push(("largest angle", format!("{} rad", short(angle))));
    }
    if let Some(defect) = largest(|layer| layer.defect) {
        figures.push(("largest defect", short(defect)));
    }
    html! {
        @if !figures.is_empty() {
            dl.figures {
                @for (name, value) in figures { div { dt { (name) } dd { (value) } } }
            }
        }
    }
}

fn settings(report: &Report) -> Option<Markup> {
    if report.settings.is_empty() {
        return None;
    }
    Some(html! {
        section id="settings" {
            h2 { "Settings" }
            table.settings {
                thead { tr { th scope="col" { "setting" } th scope="col" { "value" } } }
                tbody {
                    @for (name, value) in &report.settings {
                        tr {
                            th scope="row" { (printable(name)) }
                            td { (printable(value)) }
                        }
                    }
                }
            }
        }
    })
}
