//! The rules of direction that ARCHITECTURE.md explains: which room of the library may import which, that no files
//! import each other in a circle, and which files are the home of a fact. The sources are read as text.

mod sources;

use std::collections::{BTreeMap, VecDeque};

use sources::{Arrow, File, Sources};

/// The rooms of the library from the ground up, each with the rooms that it may import. A room is a file or a folder
/// of `src/`. `lib.rs` stands above them all: it only lists what is public, and no room imports it.
#[rustfmt::skip]
const ROOMS: &[(&str, &[&str])] = &[
    ("ops", &[]),
    ("tensors", &["ops"]),
    ("input", &[]),
    ("config", &[]),
    ("select", &["config"]),
    ("rotation", &["ops", "config"]),
    ("cached", &["ops"]),
    ("adapter", &["ops", "config", "rotation", "cached"]),
    ("batch", &["ops"]),
    ("linear", &["ops", "adapter", "batch"]),
    ("conv", &["adapter"]),
    ("model", &["ops", "config", "select", "rotation", "adapter", "batch"]),
    ("value", &["ops", "tensors", "config", "select", "rotation", "adapter", "batch", "model"]),
    ("peft", &["tensors", "input", "config", "select", "rotation", "value"]),
    ("dialects", &["tensors", "input", "config", "rotation", "value"]),
];

/// The facts that have one home, in the library and in the tool.
#[rustfmt::skip]
const FACTS: &[Fact] = &[
    Fact {
        what: "which method a configuration is",
        marks: &["AdapterConfig::Boft", "AdapterConfig::Oft"],
        // The tool's `convert` makes the settings of one method out of those of the other.
        homes: &["src/config.rs", "src/rotation.rs", "src/peft/config_json.rs", "cli/src/convert.rs"],
    },
    Fact {
        what: "how a module is traversed",
        marks: &["ModuleVisitor for", "ModuleMapper for"],
        homes: &["src/model/walk.rs"],
    },
    Fact {
        what: "how files name tensors",
        marks: &["\"boft_R", "\"oft_R", "\"base_model.model.", "\"base_layer"],
        homes: &["src/peft/keys.rs", "src/dialects/"],
    },
    Fact {
        what: "that kernels exist",
        marks: &["burn_cubecl", "cubecl", "gemm", "pulp"],
        homes: &["src/ops/"],
    },
    Fact {
        what: "a value whose type is found out at run time",
        marks: &["dyn Any"],
        homes: &[],
    },
];

/// A fact, the marks by which code that decides it is known, and the files or folders that may hold them.
struct Fact {
    what: &'static str,
    /// Code, or after a quotation mark a part of a string.
    marks: &'static [&'static str],
    homes: &'static [&'static str],
}

impl Sources {
    /// The imports that the table of rooms does not allow.
    fn wrong_directions(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for Arrow {
            from,
            to,
            line,
            path,
        } in self.arrows()
        {
            let (room, other) = (from.room(), to.room());
            let allowed = ROOMS
                .iter()
                .find(|(name, _)| *name == room)
                .map(|(_, allowed)| *allowed);
            if room != "lib" && room != other && !allowed.is_some_and(|all| all.contains(&other)) {
                let file = &from.path;
                wrong.push(format!(
                    "{file}:{line}: `{room}` may not import `{other}` (`{path}`)"
                ));
            }
        }
        for file in self.files.values() {
            let room = file.room();
            if room != "lib" && !ROOMS.iter().any(|(name, _)| *name == room) {
                wrong.push(format!(
                    "{}: the room `{room}` is not in the table",
                    file.path
                ));
            }
        }
        wrong
    }

    /// The circles of files, a shortest one for each import of the file that comes first in it.
    fn circles(&self) -> Vec<String> {
        let arrows = self.arrows();
        let mut circles = Vec::new();
        for first in &arrows {
            let (mut steps, mut queue) = (BTreeMap::new(), VecDeque::from([first]));
            while let Some(arrow) = queue.pop_front() {
                for next in arrows.iter().filter(|next| next.from.path == arrow.to.path) {
                    if next.from.path != first.from.path && !steps.contains_key(&next.to.path) {
                        steps.insert(&next.to.path, next);
                        queue.push_back(next);
                    }
                }
            }
            let mut circle = Vec::new();
            let mut step = steps.get(&first.from.path).copied();
            while let Some(arrow) = step {
                circle.insert(0, arrow);
                step = steps
                    .get(&arrow.from.path)
                    .copied()
                    .filter(|_| arrow.from.path != first.to.path);
            }
            let comes_first = |arrow: &&Arrow| arrow.from.path > first.from.path;
            if !circle.is_empty() && circle.iter().all(comes_first) {
                circle.insert(0, first);
                let steps = circle.iter().map(|Arrow { from, to, line, .. }| {
                    format!("{}:{line} imports {}", from.path, to.path)
                });
                circles.push(steps.collect::<Vec<_>>().join(", "));
            }
        }
        circles
    }

    /// Marks of facts in files that are not their home.
    fn second_homes(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for Fact { what, marks, homes } in FACTS {
            for file in self.files.values().filter(|file| !is_home(file, homes)) {
                for mark in *marks {
                    let lines = file.lines_with(mark).into_iter();
                    let mark = mark.trim_start_matches('"');
                    wrong.extend(lines.map(|line| match homes {
                        [] => format!("{}:{line}: `{mark}` has no place: {what}", file.path),
                        _ => format!(
                            "{}:{line}: `{mark}` belongs to {}: {what}",
                            file.path,
                            homes.join(", ")
                        ),
                    }));
                }
            }
        }
        wrong
    }
}

fn is_home(file: &File, homes: &[&str]) -> bool {
    let mut homes = homes.iter();
    homes.any(|home| file.path == *home || home.ends_with('/') && file.path.starts_with(home))
}

fn assert_none(violations: Vec<String>) {
    let violations = violations.join("\n");
    assert!(
        violations.is_empty(),
        "“The rules of direction” in ARCHITECTURE.md do not allow this:\n{violations}\n"
    );
}

#[test]
fn a_room_imports_only_the_rooms_that_the_table_allows() {
    let library = Sources::read("src");
    assert_none(library.wrong_directions());

    // The table has the rooms that exist, from the ground up, and the imports were found.
    for (index, (room, allowed)) in ROOMS.iter().enumerate() {
        assert!(
            library.files.values().any(|file| file.room() == *room),
            "`{room}` is gone"
        );
        let below: Vec<_> = ROOMS[..index].iter().map(|(room, _)| room).collect();
        assert!(
            allowed.iter().all(|other| below.contains(&other)),
            "`{room}` stands too low"
        );
    }
    let arrows = library.arrows();
    let has = |from, to| {
        arrows
            .iter()
            .any(|arrow| (arrow.from.room(), arrow.to.room()) == (from, to))
    };
    for (from, to) in [
        ("adapter", "ops"),
        ("model", "adapter"),
        ("value", "model"),
        ("peft", "value"),
    ] {
        assert!(has(from, to), "`{from}` was not seen to import `{to}`");
    }
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    for folder in ["src", "cli/src"] {
        assert_none(Sources::read(folder).circles());
    }
}

#[test]
fn a_fact_with_one_home_is_decided_nowhere_else() {
    let library = Sources::read("src");
    assert_none(library.second_homes());
    assert_none(Sources::read("cli/src").second_homes());

    for Fact { what, marks, homes } in FACTS.iter().filter(|fact| !fact.homes.is_empty()) {
        for mark in *marks {
            let mut homes = library.files.values().filter(|file| is_home(file, homes));
            let is_found = homes.any(|file| !file.lines_with(mark).is_empty());
            assert!(
                is_found,
                "`{mark}` is in no home of the fact {what:?}: the rule is out of date"
            );
        }
    }
}

#[test]
fn a_made_up_source_that_breaks_every_rule_is_caught() {
    let sources = Sources::new([
        (
            "src/lib.rs",
            "mod ops; mod config; mod value; mod peft; pub use value::Adapter;",
        ),
        (
            "src/ops/mod.rs",
            "mod route; pub(crate) use route::{Route, route as choose};",
        ),
        (
            "src/ops/route.rs",
            "/// Of [`crate::peft::save`].\nuse crate::{\n    config::Bias as B,\n};",
        ),
        (
            "src/config.rs",
            "#[cfg(test)]\nmod tests { use crate::peft::save; }\nfn f() { crate::Adapter::new() }",
        ),
        (
            "src/value/mod.rs",
            "mod layer;\nuse crate::ops;\npub use layer::Layer;\npub struct Adapter(Layer);\nfn f() { ops::choose() }",
        ),
        (
            "src/value/layer.rs",
            "use super::Adapter;\nstruct S(Box<dyn Any>, super::super::peft::P);",
        ),
        (
            "src/peft/mod.rs",
            "use crate::ops::Route;\nfn f() {\n    matches!(c, AdapterConfig::Oft(_));\n    format!(\"{p}.oft_R.weight\");\n}\nimpl<F> ModuleMapper for X<F> {}",
        ),
        ("src/shed.rs", ""),
    ]);
    assert_eq!(
        sources.wrong_directions(),
        [
            "src/config.rs:3: `config` may not import `value` (`crate::Adapter::new`)",
            "src/ops/route.rs:3: `ops` may not import `config` (`crate::config::Bias`)",
            "src/peft/mod.rs:1: `peft` may not import `ops` (`crate::ops::Route`)",
            "src/value/layer.rs:2: `value` may not import `peft` (`super::super::peft::P`)",
            "src/shed.rs: the room `shed` is not in the table",
        ]
    );
    assert_eq!(
        sources.circles(),
        [
            "src/config.rs:3 imports src/value/mod.rs, src/value/mod.rs:5 imports src/ops/route.rs, \
             src/ops/route.rs:3 imports src/config.rs",
            "src/value/layer.rs:1 imports src/value/mod.rs, src/value/mod.rs:3 imports src/value/layer.rs",
        ]
    );
    assert_eq!(
        sources.second_homes(),
        [
            "src/peft/mod.rs:3: `AdapterConfig::Oft` belongs to src/config.rs, src/rotation.rs, \
             src/peft/config_json.rs, cli/src/convert.rs: which method a configuration is",
            "src/peft/mod.rs:6: `ModuleMapper for` belongs to src/model/walk.rs: how a module is traversed",
            "src/peft/mod.rs:4: `oft_R` belongs to src/peft/keys.rs, src/dialects/: how files name tensors",
            "src/value/layer.rs:2: `dyn Any` has no place: a value whose type is found out at run time",
        ]
    );
}
