//! The tables of README.md and `docs/backends.md`, read back and compared with what the suite finds.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::adapter;
use crate::cell::Outcome;
use crate::common::kernel_devices;
use crate::layers::ROWS;
use crate::precision::{Drift, Precision};

/// A table of a page, between two comments with its name.
struct Table {
    page: PathBuf,
    name: &'static str,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn read(page: &str, name: &'static str) -> Self {
        // The program may run in another place than where it was built.
        let root = env::var("CARGO_MANIFEST_DIR");
        let root = root.unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_string());
        let page = Path::new(&root).join(page);
        let text = fs::read_to_string(&page).unwrap();
        let [_, lines, _] = parts(&text, name);
        let cells = |line: &str| {
            let cells = line.trim_matches('|').split('|');
            cells
                .map(|cell| cell.trim().to_string())
                .collect::<Vec<_>>()
        };
        let mut lines = lines.lines().filter(|line| line.starts_with('|'));
        let header = cells(lines.next().unwrap());
        let rows: Vec<_> = lines.skip(1).map(cells).collect();
        assert!(rows.iter().all(|row| row.len() == header.len()), "{name}");
        Self {
            page,
            name,
            header,
            rows,
        }
    }

    fn write(&self) {
        let text = fs::read_to_string(&self.page).unwrap();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        let rule = "|---".repeat(self.header.len());
        let [before, _, after] = parts(&text, self.name);
        let table = format!("{before}\n{}{rule}|\n{rows}{after}", line(&self.header));
        fs::write(&self.page, table).unwrap();
    }

    /// Replaces the rows of a backend, whose name is in the first column.
    fn replace(&mut self, backend: &str, rows: Vec<Vec<String>>) {
        self.rows.retain(|row| row[0] != backend);
        self.rows.extend(rows);
    }

    /// The rows of a backend.
    fn of(&self, backend: &str) -> Vec<Vec<String>> {
        let rows = self.rows.iter();
        rows.filter(|row| row[0] == backend).cloned().collect()
    }
}

/// What stands before, between and after the two comments of a table; the comments belong to the outer parts.
fn parts<'a>(text: &'a str, name: &str) -> [&'a str; 3] {
    let (begin, end) = (
        format!("<!-- {name} -->"),
        format!("<!-- end of {name} -->"),
    );
    let begin = text.find(&begin).expect(name) + begin.len();
    let end = text.find(&end).expect(name);
    [&text[..begin], &text[begin..end], &text[end..]]
}

/// What the suite found on one device.
struct Found {
    backend: String,
    adapter: String,
    /// By layer, in the order of the rows.
    layers: Vec<Vec<(Precision, Outcome)>>,
}

impl Found {
    /// The precisions in which a layer works.
    fn works(&self, layer: usize) -> String {
        let names = self.layers[layer]
            .iter()
            .filter_map(|(precision, outcome)| {
                matches!(outcome, Outcome::Works(_)).then_some(precision.name())
            });
        names.collect::<Vec<_>>().join(" ")
    }

    /// The largest differences of all layers, by precision.
    fn drifts(&self) -> Vec<(Precision, Drift)> {
        let largest = |precision| {
            let cells = self.layers.iter().flatten();
            let drifts = cells.filter_map(|(of, outcome)| match outcome {
                Outcome::Works(drift) if *of == precision => Some(*drift),
                _ => None,
            });
            Some((precision, drifts.reduce(Drift::max)?))
        };
        Precision::ALL.into_iter().filter_map(largest).collect()
    }

    /// What does not work, with the reason, and the layers that it concerns.
    fn missing(&self) -> Vec<Vec<String>> {
        let mut reasons: BTreeMap<(&str, String), Vec<&str>> = BTreeMap::new();
        for (row, cells) in ROWS.iter().zip(&self.layers) {
            for (precision, outcome) in cells {
                let reason = match outcome {
                    Outcome::Works(_) => continue,
                    Outcome::Absent(reason) => format!("the backend has {reason}"),
                    Outcome::Refused(message) => message.replace('`', ""),
                };
                let layers = reasons.entry((precision.name(), reason)).or_default();
                layers.push(row.layer);
            }
        }
        let rows = reasons.into_iter().map(|((precision, reason), layers)| {
            let layers = match layers.len() == ROWS.len() {
                true => "all".to_string(),
                false => layers.join("; "),
            };
            vec![self.backend.clone(), precision.to_string(), layers, reason]
        });
        rows.collect()
    }
}

/// Runs the suite on every device. A cell that fails does not keep the others from running.
fn run() -> Vec<Found> {
    let mut failures = Vec::new();
    let mut found = Vec::new();
    for (backend, device) in kernel_devices() {
        let adapter = adapter(&device);
        println!("{backend}: {adapter}");
        let mut layers = Vec::new();
        for row in ROWS {
            let mut cells = Vec::new();
            for precision in Precision::ALL {
                let check = || (row.check)(precision, &device);
                match catch_unwind(AssertUnwindSafe(check)) {
                    Ok(outcome) => {
                        println!("  {}, {}: {outcome:?}", row.layer, precision.name());
                        cells.push((precision, outcome));
                    }
                    Err(_) => {
                        failures.push(format!("{backend}, {}, {}", row.layer, precision.name()))
                    }
                }
            }
            layers.push(cells);
        }
        found.push(Found {
            backend: format!("`{backend}`"),
            adapter,
            layers,
        });
    }
    assert!(
        failures.is_empty(),
        "the panics above are of:\n{}",
        failures.join("\n")
    );
    found
}

#[test]
fn every_layer_works_where_the_tables_say_so() {
    let found = run();
    for found in &found {
        for (precision, drift) in found.drifts() {
            let allowed = precision.tolerance().numbers();
            for (found_drift, allowed) in drift.numbers().into_iter().zip(allowed) {
                let name = precision.name();
                assert!(
                    found_drift <= allowed,
                    "{}, {name}: {drift:?}",
                    found.backend
                );
            }
        }
    }
    if env::var("BURN_BOFT_TABLES").as_deref() == Ok("write") {
        write(&found);
    }
    compare(&found);
}

fn compare(found: &[Found]) {
    let (works, missing) = (
        Table::read("README.md", "layers by backend"),
        Table::read("docs/backends.md", "what is missing"),
    );
    for found in found {
        let column = works.header.iter().position(|name| *name == found.backend);
        let Some(column) = column else {
            println!(
                "README.md has no column for {} yet; BURN_BOFT_TABLES=write adds it",
                found.backend
            );
            continue;
        };
        assert_eq!(works.rows.len(), ROWS.len());
        for (index, row) in ROWS.iter().enumerate() {
            let [layer, rotated] = [&works.rows[index][0], &works.rows[index][1]];
            assert_eq!((layer.as_str(), rotated.as_str()), (row.layer, row.rotated));
            assert_eq!(
                works.rows[index][column],
                found.works(index),
                "{}, {layer}",
                found.backend
            );
        }
        assert_eq!(missing.of(&found.backend), found.missing());
    }
}

fn write(found: &[Found]) {
    let mut works = Table::read("README.md", "layers by backend");
    let mut missing = Table::read("docs/backends.md", "what is missing");
    let mut drifts = Table::read("docs/backends.md", "measured differences");
    works.rows.resize(ROWS.len(), Vec::new());
    for found in found {
        let position = works.header.iter().position(|name| *name == found.backend);
        let column = position.unwrap_or_else(|| {
            works.header.push(found.backend.clone());
            works.header.len() - 1
        });
        for (index, row) in ROWS.iter().enumerate() {
            let cells = &mut works.rows[index];
            cells.resize(works.header.len(), String::new());
            cells[0] = row.layer.to_string();
            cells[1] = row.rotated.to_string();
            cells[column] = found.works(index);
        }
        missing.replace(&found.backend, found.missing());
        let rows = found.drifts().into_iter().map(|(precision, drift)| {
            let start = [
                found.backend.clone(),
                found.adapter.clone(),
                precision.name().to_string(),
            ];
            let numbers = drift.numbers().map(|number| format!("{number:.1e}"));
            start.into_iter().chain(numbers).collect()
        });
        drifts.replace(&found.backend, rows.collect());
    }
    for table in [works, missing, drifts] {
        table.write();
    }
}

#[test]
fn the_page_states_the_tolerances_of_this_suite() {
    let table = Table::read("docs/backends.md", "tolerances");
    let expected = Precision::ALL.map(|precision| {
        let numbers = precision.tolerance().numbers();
        let numbers = numbers.map(|number| format!("{number:.0e}"));
        let mut row = vec![precision.name().to_string()];
        row.extend(numbers);
        row
    });
    assert_eq!(table.rows, expected);
}
