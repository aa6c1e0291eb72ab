//! What the documentation names exists: the tests in its pages, and the programs in its commands.

use std::fs;
use std::path::{Path, PathBuf};

/// Something that a page names, with the line it stands in.
#[derive(Debug, PartialEq)]
enum Named<'a> {
    /// `binary::module::test`, or a part of it from the left.
    Test(usize, &'a str),
    /// The argument of `--test`.
    Binary(usize, &'a str),
    /// The argument of `--example`.
    Example(usize, &'a str),
}

/// The texts between single backticks.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a code span outside of a table is a test: a path that ends in a sentence of four words or more.
fn is_sentence(span: &str) -> bool {
    let last = span.rsplit("::").next().unwrap();
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':';
    span.contains("::") && span.chars().all(is_word) && last.matches('_').count() >= 3
}

/// All that a page of Markdown names: whatever stands in a table's column `test`, and sentences elsewhere.
fn named(page: &str) -> Vec<Named<'_>> {
    let (mut found, mut column, mut is_code) = (Vec::new(), None, false);
    for (number, line) in (1..).zip(page.lines()) {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let words: Vec<_> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let value = pair[1].trim_matches(|c: char| !c.is_alphanumeric());
            match pair[0].trim_start_matches('`') {
                "--test" => found.push(Named::Binary(number, value)),
                "--example" => found.push(Named::Example(number, value)),
                _ => {}
            }
        }
        if is_code {
            continue;
        }
        let cells: Vec<_> = line.trim().split('|').map(str::trim).collect();
        if cells.len() < 3 {
            column = None;
            let sentences = code_spans(line).filter(|span| is_sentence(span));
            found.extend(sentences.map(|span| Named::Test(number, span)));
        } else if let Some(index) = cells.iter().position(|cell| *cell == "test") {
            column = Some(index);
        } else if let Some(cell) = column.and_then(|index| cells.get(index))
            && !cell.starts_with("---")
        {
            // What stands in parentheses says more about a test.
            let parts = cell.split(['(', ')']).step_by(2);
            let mut spans = parts.flat_map(code_spans).peekable();
            if spans.peek().is_none() {
                found.push(Named::Test(number, ""));
            }
            found.extend(spans.map(|span| Named::Test(number, span)));
        }
    }
    found
}

/// The folders that may hold `tests/` and `examples/`: the root, and the packages beside it.
fn packages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    ["", "cli", "benches", "examples/dinov2", "examples/onnx"]
        .map(|folder| root.join(folder))
        .into_iter()
        .filter(|folder| folder.is_dir())
        .collect()
}

/// The file of a module, or of the root of a test binary.
fn file_of(modules: &[&str]) -> Option<PathBuf> {
    let (binary, inner) = modules.split_first()?;
    packages().into_iter().find_map(|package| {
        let tests = package.join("tests");
        let candidates = match inner {
            [] => vec![format!("{binary}.rs"), format!("{binary}/main.rs")],
            [module] => vec![format!("{binary}/{module}.rs")],
            _ => Vec::new(),
        };
        let mut files = candidates.iter().map(|file| tests.join(file));
        files.find(|file| file.is_file())
    })
}

/// Whether a source has a test of this name.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<_> = source.lines().map(str::trim).collect();
    let function = format!("fn {name}()");
    let Some(position) = lines.iter().position(|line| line.starts_with(&function)) else {
        return false;
    };
    let attributes = lines[..position].iter().rev();
    attributes
        .take_while(|line| line.starts_with("#["))
        .any(|line| *line == "#[test]")
}

/// Why something that a page names is not there.
fn missing(named: &Named) -> Option<String> {
    match *named {
        Named::Test(line, "") => Some(format!("line {line}: the row names no test")),
        Named::Test(line, path) => {
            let parts: Vec<_> = path.split("::").collect();
            let (name, modules) = parts.split_last().unwrap();
            let is_test = file_of(modules)
                .is_some_and(|file| has_test(&fs::read_to_string(file).unwrap(), name));
            let is_module = file_of(&parts).is_some();
            (!is_test && !is_module).then(|| format!("line {line}: there is no test `{path}`"))
        }
        Named::Binary(line, name) => file_of(&[name])
            .is_none()
            .then(|| format!("line {line}: there is no test binary `{name}`")),
        Named::Example(line, name) => (!packages()
            .iter()
            .any(|package| package.join(format!("examples/{name}.rs")).is_file()))
        .then(|| format!("line {line}: there is no example `{name}`")),
    }
}

/// The pages of Markdown below a folder. What CHANGELOG.md names may be gone since.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && name != "shared" && !name.starts_with('.') {
                pages(&path, found);
            }
        } else if name.ends_with(".md") && name != "CHANGELOG.md" {
            found.push(path);
        }
    }
}

#[test]
fn every_test_and_example_that_the_documentation_names_exists() {
    let mut paths = Vec::new();
    pages(Path::new(env!("CARGO_MANIFEST_DIR")), &mut paths);
    let (mut failures, mut tests) = (Vec::new(), 0);
    for path in &paths {
        let page = fs::read_to_string(path).unwrap();
        for named in named(&page) {
            tests += usize::from(matches!(named, Named::Test(..)));
            failures.extend(missing(&named).map(|why| format!("{}, {why}", path.display())));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // The table of differences alone has more rows.
    assert!(tests >= 25, "only {tests} tests were found in {paths:?}");
}

#[test]
fn names_that_do_not_exist_are_found_in_a_page() {
    let page = "\
See `documentation::no_test_has_such_a_name` and `burn::nn::Linear`.

| PEFT | here | test |
|---|---|---|
| one | `inject` | `documentation::names_that_do_not_exist_are_found_in_a_page` |
| two | other | `documentation::nothing`, `elsewhere::names` (the `a-b` folders) |
| three | none | |

```sh
cargo test --release --test documentation -- --nocapture
cargo test --test documentations
cargo run --example quickstarts
```
";
    let found = named(page);
    assert_eq!(
        found,
        [
            Named::Test(1, "documentation::no_test_has_such_a_name"),
            Named::Test(
                5,
                "documentation::names_that_do_not_exist_are_found_in_a_page"
            ),
            Named::Test(6, "documentation::nothing"),
            Named::Test(6, "elsewhere::names"),
            Named::Test(7, ""),
            Named::Binary(10, "documentation"),
            Named::Binary(11, "documentations"),
            Named::Example(12, "quickstarts"),
        ]
    );
    let missing: Vec<_> = found.iter().filter_map(missing).collect();
    assert_eq!(
        missing,
        [
            "line 1: there is no test `documentation::no_test_has_such_a_name`",
            "line 6: there is no test `documentation::nothing`",
            "line 6: there is no test `elsewhere::names`",
            "line 7: the row names no test",
            "line 11: there is no test binary `documentations`",
            "line 12: there is no example `quickstarts`",
        ]
    );
    // A function that is no test is not one.
    assert!(!has_test(
        "fn helper() {}\n#[test]\nfn other() {}",
        "helper"
    ));
}
