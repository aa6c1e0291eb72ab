//! The table of `docs/upstream.md`, from which the pins take what they say, and its agreement with them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A row: what Burn does, where, what works around it, and the test that pins it.
struct Row {
    workarounds: Vec<String>,
    test: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The texts between backticks.
fn code_spans(cell: &str) -> Vec<String> {
    let spans = cell.split('`').skip(1).step_by(2);
    spans.map(str::to_string).collect()
}

/// The rows of the tables whose last column is `test`.
fn rows() -> Vec<Row> {
    let page = fs::read_to_string(root().join("docs/upstream.md")).unwrap();
    let mut rows = Vec::new();
    let mut is_table = false;
    for line in page.lines() {
        let cells: Vec<_> = line.trim().split('|').map(str::trim).collect();
        let [_, behaviour, burn, workaround, test, _] = cells[..] else {
            is_table = false;
            continue;
        };
        if test == "test" {
            is_table = true;
        } else if is_table && !test.starts_with("---") {
            assert!(
                !behaviour.is_empty() && !code_spans(burn).is_empty(),
                "{line}"
            );
            let [test] = &code_spans(test)[..] else {
                panic!("one test is expected in {line}");
            };
            rows.push(Row {
                workarounds: code_spans(workaround),
                test: test.clone(),
            });
        }
    }
    rows
}

/// The code that works around what a test pins, as `file::item`.
pub fn workarounds(name: &str) -> Vec<String> {
    let end = format!("::{name}");
    let row = rows().into_iter().find(|row| row.test.ends_with(&end));
    let row = row.unwrap_or_else(|| panic!("docs/upstream.md has no row for the test `{name}`"));
    row.workarounds
}

/// `module::test` for every pin.
fn pins() -> Vec<String> {
    let mut pins = Vec::new();
    for entry in fs::read_dir(root().join("tests/upstream")).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_string();
        if matches!(module.as_str(), "main" | "table") {
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        let mut lines = source.lines().map(str::trim);
        while lines.any(|line| line == "#[test]") {
            let function = lines.find_map(|line| line.strip_prefix("fn "));
            let name = function.unwrap().split('(').next().unwrap();
            assert!(
                source.contains(&format!("\"{name}\"")),
                "{module}: the test `{name}` does not pass its name to `pin`"
            );
            pins.push(format!("upstream::{module}::{name}"));
        }
    }
    pins
}

/// Whether a source declares this item.
fn declares(source: &str, item: &str) -> bool {
    let kinds = ["fn ", "struct ", "const ", "enum ", "static "];
    kinds.iter().any(|kind| {
        let declaration = format!("{kind}{item}");
        source.match_indices(&declaration).any(|(start, _)| {
            let rest = &source[start + declaration.len()..];
            !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
        })
    })
}

#[test]
fn every_pin_has_a_row_and_every_row_a_pin() {
    let rows = rows();
    let named: BTreeSet<_> = rows.iter().map(|row| row.test.clone()).collect();
    assert_eq!(named.len(), rows.len(), "a test has two rows");
    assert_eq!(named, pins().into_iter().collect());
    assert!(rows.len() >= 20, "only {} rows were read", rows.len());
}

#[test]
fn every_workaround_of_the_table_exists() {
    for row in rows() {
        assert!(!row.workarounds.is_empty(), "{}", row.test);
        for place in &row.workarounds {
            let (file, item) = place
                .split_once("::")
                .unwrap_or_else(|| panic!("`{place}` is no file::item"));
            let source = fs::read_to_string(root().join(Path::new(file)))
                .unwrap_or_else(|error| panic!("{}: `{file}`: {error}", row.test));
            assert!(
                declares(&source, item),
                "{}: `{file}` declares no `{item}`",
                row.test
            );
        }
    }
}

#[test]
#[should_panic(expected = "Remove the workaround, src/model/merge.rs::unload, then the row")]
fn a_pin_that_breaks_names_the_workaround() {
    super::pin(
        "only_materializing_removes_an_adapter_and_folds_it_in",
        (1, 2),
        (1, 3),
    );
}
