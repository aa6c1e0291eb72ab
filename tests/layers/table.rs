//! `docs/layers.md`, read back: every row has a check and every check a row, and the two agree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;

use crate::check::Verdict;
use crate::{convolutions, embeddings, others, own, sequences, structures, tied};

/// A check, under the name of its row.
pub type Check = (&'static str, fn() -> Verdict);

fn checks() -> impl Iterator<Item = Check> {
    [
        convolutions::CHECKS,
        embeddings::CHECKS,
        others::CHECKS,
        own::CHECKS,
        sequences::CHECKS,
        structures::CHECKS,
        tied::CHECKS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

/// A row of the table.
#[derive(Debug, PartialEq)]
struct Row {
    name: String,
    verdict: String,
    /// The code spans of the column of weights.
    weights: Vec<String>,
    /// The code spans of the column of reasons.
    reasons: Vec<String>,
}

fn code_spans(text: &str) -> Vec<String> {
    let spans = text.split('`').skip(1).step_by(2);
    spans.map(str::to_string).collect()
}

/// The rows of the one table of a page.
fn rows(page: &str) -> Vec<Row> {
    let lines = page.lines().filter(|line| line.starts_with('|'));
    let rows = lines.skip(2).map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, verdict, weights, reason] = cells[..] else {
            panic!("four columns expected: {line}");
        };
        Row {
            name: name.replace('`', ""),
            verdict: verdict.to_string(),
            weights: code_spans(weights),
            reasons: code_spans(reason),
        }
    });
    rows.collect()
}

/// Whether a path has the form of a pattern, where `*` stands for any letters but dots.
fn is_like(path: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => path == pattern,
        Some((start, rest)) => path.strip_prefix(start).is_some_and(|tail| {
            let end = tail.find('.').unwrap_or(tail.len());
            (0..=end).any(|skipped| is_like(&tail[skipped..], rest))
        }),
    }
}

/// Why a row does not say what its check found; none if it does.
fn contradiction(row: &Row, found: &Verdict) -> Option<String> {
    match (row.verdict.as_str(), found) {
        ("adapted", Verdict::Adapted(weights)) => {
            let extra = weights
                .iter()
                .find(|path| !row.weights.iter().any(|pattern| is_like(path, pattern)));
            let absent = row
                .weights
                .iter()
                .find(|pattern| !weights.iter().any(|path| is_like(path, pattern)));
            let extra = extra.map(|path| format!("`{path}` is adapted and not in the table"));
            extra.or(absent.map(|pattern| format!("no adapted weight is like `{pattern}`")))
        }
        ("refused", Verdict::Refused(text)) => {
            // A code span of Markdown cannot hold the backticks of a message.
            let text = text.replace('`', "\"");
            match row.reasons.first() {
                Some(reason) if text.contains(reason.as_str()) => None,
                Some(reason) => Some(format!("the message is not `{reason}` but: {text}")),
                None => Some(format!("the row does not quote the message: {text}")),
            }
        }
        (verdict, found) => Some(format!("the table says {verdict}, and it is {found:?}")),
    }
}

#[test]
fn every_row_of_the_table_is_what_its_check_finds() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/layers.md");
    let rows = rows(&fs::read_to_string(page).unwrap());
    let names: BTreeSet<_> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names.len(), rows.len(), "two rows have the same name");
    let checks: BTreeMap<_, _> = checks().collect();
    let (mut failures, mut running) = (Vec::new(), Vec::new());
    for row in &rows {
        match checks.get(row.name.as_str()) {
            None => failures.push(format!("no check has the name of the row `{}`", row.name)),
            Some(check) => running.push((row, thread::spawn(*check))),
        }
    }
    let without = checks.keys().filter(|name| !names.contains(*name));
    failures.extend(without.map(|name| format!("no row has the name of the check `{name}`")));
    for (row, check) in running {
        let why = match check.join() {
            Ok(found) => contradiction(row, &found),
            Err(panic) => Some(match panic.downcast_ref::<String>() {
                Some(text) => text.clone(),
                None => format!("{:?}", panic.downcast_ref::<&str>()),
            }),
        };
        failures.extend(why.map(|why| format!("{}: {why}", row.name)));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(rows.len() >= 50, "only {} rows were read", rows.len());
}

#[test]
fn a_row_that_says_something_else_is_found() {
    let page = "\
| layer | verdict | weights | reason |
|---|---|---|---|
| `One` of two | adapted | `layers.*.*_gate.weight`, `weight` | with `code` |
| other | refused | none | `no adapter`: because |
";
    let rows = rows(page);
    assert_eq!(rows[0].name, "One of two");
    assert_eq!(rows[0].weights, ["layers.*.*_gate.weight", "weight"]);
    let adapted = |paths: &[&str]| Verdict::Adapted(paths.iter().map(|p| p.to_string()).collect());
    let refused = |text: &str| Verdict::Refused(text.to_string());
    let all = [
        "layers.0.in_gate.weight",
        "layers.12.out_gate.weight",
        "weight",
    ];
    assert_eq!(contradiction(&rows[0], &adapted(&all)), None);
    assert_eq!(
        contradiction(&rows[0], &adapted(&all[..2])).unwrap(),
        "no adapted weight is like `weight`"
    );
    assert_eq!(
        contradiction(
            &rows[0],
            &adapted(&["weight", "layers.0.inner.in_gate.weight"])
        )
        .unwrap(),
        "`layers.0.inner.in_gate.weight` is adapted and not in the table"
    );
    assert!(contradiction(&rows[0], &refused("no adapter")).is_some());
    assert_eq!(contradiction(&rows[1], &refused("it has no adapter")), None);
    assert!(contradiction(&rows[1], &refused("it has none")).is_some());
    assert!(contradiction(&rows[1], &adapted(&all)).is_some());
}
