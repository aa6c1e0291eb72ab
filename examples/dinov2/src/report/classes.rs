//! Which classes are recognised, and which are confused.

use maud::{Markup, html};

use super::{Report, ReportError};
use crate::scores::{ClassScore, Pair, Scores, percent, printable};

/// Up to this many classes, the whole confusion matrix is shown. Beyond it, only the most confused pairs are.
const WHOLE_MATRIX: usize = 30;
/// How many confused pairs are shown then.
const PAIRS: usize = 30;
/// Up to this many classes, the heads of the columns are written horizontally.
const HORIZONTAL: usize = 5;
/// How many classes are listed before the rest is folded away.
const LISTED: usize = 20;

/// The scores of the predictions for the test images, if there are any.
///
/// # Errors
///
/// The confusion matrix does not fit the classes.
pub fn scores(report: &Report) -> Result<Option<Scores>, ReportError> {
    if report.confusion.is_empty() {
        return Ok(None);
    }
    let scores = Scores::new(&report.classes, report.confusion.clone())?;
    Ok(Some(scores).filter(|scores| scores.images > 0))
}

/// The confusion matrix, or the most confused pairs if it would be too large.
pub fn confusion(scores: &Scores) -> Option<Markup> {
    let is_whole = scores.classes.len() <= WHOLE_MATRIX;
    let pairs = scores.most_confused();
    if !is_whole && pairs.is_empty() {
        return None;
    }
    Some(html! {
        section id="confusion" {
            h2 { "Confusion" }
            @if is_whole {
                p {
                    "Each row has the test images of one class, each column those that were taken for it. The stronger its \
                     colour, the larger is the share of a cell in its row."
                }
                ul.legend {
                    li { span.swatch.right.h8 {} "right" }
                    li { span.swatch.wrong.h8 {} "wrong" }
                }
                (matrix(scores))
            } @else {
                p {
                    "With " (scores.classes.len()) " classes, these are the "
                    (pairs.len().min(PAIRS)) " of " (pairs.len())
                    " confused pairs that take the largest share of their class."
                }
                (pair_table(scores, &pairs[..pairs.len().min(PAIRS)]))
            }
        }
    })
}

fn matrix(scores: &Scores) -> Markup {
    let upright = (scores.classes.len() > HORIZONTAL).then_some("upright");
    html! {
        div.scroll tabindex="0" role="region" aria-label="Confusion matrix" {
            table.matrix {
                caption { span { "test images by true class (rows) and predicted class (columns)" } }
                thead {
                    tr {
                        td.corner { span { "truth ↓" } span { "prediction →" } }
                        @for class in &scores.classes {
                            th class=[upright] scope="col" title=(printable(&class.name)) {
                                span { bdi { (printable(&class.name)) } }
                            }
                        }
                    }
                }
                tbody {
                    @for (truth, class) in scores.classes.iter().enumerate() {
                        tr {
                            th scope="row" title=(printable(&class.name)) {
                                span { bdi { (printable(&class.name)) } }
                            }
                            @for (prediction, images) in scores.confusion[truth].iter().enumerate() {
                                td class=(heat(*images, class.images, truth == prediction)) { (images) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The class of a cell: its kind, and its share of the row in tenths, rounded up.
fn heat(images: usize, of: usize, is_right: bool) -> String {
    let tenths = (10 * images).div_ceil(of.max(1));
    match (images, is_right) {
        (0, _) => "none".into(),
        (_, true) => format!("right h{tenths}"),
        (_, false) => format!("wrong h{tenths}"),
    }
}

fn pair_table(scores: &Scores, pairs: &[Pair]) -> Markup {
    html! {
        table.pairs {
            thead {
                tr {
                    th scope="col" { "truth" }
                    th scope="col" { "taken for" }
                    th.number scope="col" { "images" }
                    th.number scope="col" { "share" }
                }
            }
            tbody {
                @for pair in pairs {
                    tr {
                        td.name { bdi { (printable(&scores.classes[pair.truth].name)) } }
                        td.name { bdi { (printable(&scores.classes[pair.prediction].name)) } }
                        td.number { (pair.images) }
                        td.number { (percent(Some(pair.share))) }
                    }
                }
            }
        }
    }
}

/// The scores of each class, the worst first.
pub fn per_class(scores: &Scores) -> Markup {
    let mut classes: Vec<_> = scores.classes.iter().collect();
    // Classes without test images come last.
    let order = |class: &ClassScore| class.recall.unwrap_or(f64::INFINITY);
    classes.sort_by(|a, b| order(a).total_cmp(&order(b)));
    let (listed, folded) = classes.split_at(classes.len().min(LISTED));
    html! {
        section id="classes" {
            h2 { "Accuracy per class" }
            p {
                "The share of the test images of each class that were recognised, the worst class first. Precision is the \
                 share of the images taken for a class that belong to it."
            }
            (class_table(listed))
            @if !folded.is_empty() {
                details {
                    summary { "The other " (folded.len()) " classes" }
                    (class_table(folded))
                }
            }
        }
    }
}

fn class_table(classes: &[&ClassScore]) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Accuracy per class" {
        table.classes {
            thead {
                tr {
                    th scope="col" { "class" }
                    th.bars scope="col" { "accuracy" }
                    th.number scope="col" { "precision" }
                    th.number scope="col" { "F1" }
                    th.number scope="col" { "images" }
                }
            }
            tbody {
                @for class in classes {
                    tr {
                        th.name scope="row" { bdi { (printable(&class.name)) } }
                        td.bars { (bar(class.recall)) }
                        td.number { (percent(class.precision)) }
                        td.number { (percent(class.f1)) }
                        td.number { (class.images) }
                    }
                }
            }
        }
        }
    }
}

/// A share as a bar with its number.
pub fn bar(share: Option<f64>) -> Markup {
    let width = share
        .filter(|share| share.is_finite())
        .unwrap_or(0.0)
        .clamp(0.0, 1.0);
    html! {
        div.bar {
            span.track aria-hidden="true" { span.fill style=(format!("width: {:.1}%", 100.0 * width)) {} }
            span.value { (percent(share)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_coloured_by_their_share_of_the_row() {
        assert_eq!(heat(0, 10, true), "none");
        assert_eq!(heat(1, 1000, false), "wrong h1");
        assert_eq!(heat(5, 10, true), "right h5");
        assert_eq!(heat(10, 10, true), "right h10");
    }

    #[test]
    fn the_worst_class_comes_first_and_one_without_images_last() {
        let classes = ["none", "good", "bad"].map(str::to_string);
        let scores = Scores::of(&classes, &[1, 1, 2, 2], &[1, 1, 2, 1]).unwrap();
        let page = per_class(&scores).into_string();
        let place = |name: &str| page.find(&format!("<bdi>{name}</bdi>")).unwrap();
        assert!(place("bad") < place("good") && place("good") < place("none"));
        assert!(page.contains("width: 50.0%"), "{page}");
    }
}
