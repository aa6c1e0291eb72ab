//! `merge`: an adapter folded into a model's weights.

use std::ops::Range;
use std::path::PathBuf;

use burn_boft::tensors::file_name;
use burn_boft::value::{AdapterLayer, SavedTensor};
use serde_json::{Value, json};

use crate::base::{Base, OtherFiles};
use crate::changes::{Added, Change, Changes};
use crate::cli::Merge;
use crate::copies;
use crate::error::Error;
use crate::header::Entry;
use crate::labels;
use crate::load::load_for;
use crate::names::Names;
use crate::rewrite::{check_output, rewrite};
use crate::terminal::{note, plural, report, shown};
use crate::tie::{Head, Rotated};
use crate::turn::Forward;

pub fn run(options: &Merge, json: bool) -> Result<(), Error> {
    let names = Names::parse(&options.adapter.maps)?;
    let base = Base::open(&options.base)?;
    let (adapter, names) = load_for(&options.adapter, &base, names)?;
    let head = Head::of(&base)?;
    let names = names.for_model(&head);
    let mut changes = Changes::find(&adapter, &base, &names, &head)?;
    copies::check(&adapter, &base, &names, &head)?;
    names.note().iter().for_each(|line| note(line));
    head.untie(&base, &mut changes, Rotated::Alone)?;
    if changes.config.is_some() {
        note(
            "note: the model's head shares the tensor of its embedding, and the adapter changes one of the two; the \
             merged model has a tensor for each, and its config.json says \"tie_word_embeddings\": false",
        );
    }
    if let Some(line) = labels::correct(&base, head.text(), &mut changes) {
        note(&line);
    }
    if let Some(output) = options.output.as_ref().filter(|_| !options.dry_run) {
        check_output(output, &base, &options.adapter.adapter)?;
    }
    // Looked for before the weights are written, since that takes long.
    let others = base.other_files()?;
    others.note().iter().for_each(|line| note(line));
    match &options.output {
        Some(output) if !options.dry_run => {
            let mut turn = Forward::new(&adapter);
            rewrite(&base, &others.copied, &changes, output, &mut turn)?;
            let counts = counts(&changes, ["rotated", "replaced", "added"]);
            let text = format!("{}: {counts}\n", output.display());
            report(
                json,
                &text,
                &to_json(&base, &changes, Some(output), &others),
            )
        }
        _ => {
            let value = to_json(&base, &changes, None, &others);
            report(json, &table(&base, &changes), &value)
        }
    }
}

/// What has changed, or would change where there is no output.
fn to_json(base: &Base, changes: &Changes, output: Option<&PathBuf>, others: &OtherFiles) -> Value {
    let mut tensors = Vec::new();
    for (key, change) in &changes.of {
        let mut add = |change: &str, rows: Range<usize>, layer: Option<&AdapterLayer>| {
            tensors.push(json!({
                "tensor": key,
                "change": change,
                "rows": [rows.start, rows.end],
                "block_size": layer.map(AdapterLayer::block_size),
                "factors": layer.map(AdapterLayer::n_butterfly_factor),
                "scale": layer.map(|layer| layer.scale().is_some()),
            }));
        };
        match change {
            Change::Rotate(parts) => {
                let parts = parts.iter();
                parts.for_each(|(rows, layer)| add("rotate", rows.clone(), Some(*layer)));
            }
            Change::Replace(parts) => {
                let parts = parts.iter();
                parts.for_each(|(rows, _)| add("replace", rows.clone(), None));
            }
            Change::New(tensor) => {
                let rows = tensor.data().shape().first().copied().unwrap_or(1);
                add("replace", 0..rows, None);
            }
        }
    }
    let added: Vec<_> = changes.added.keys().collect();
    json!({
        "base": base.path.display().to_string(),
        "output": output.map(|path| path.display().to_string()),
        "rotated": changes.rotations(),
        "replaced": changes.replacements(),
        "changes": tensors,
        "added": added,
        "idle": changes.idle,
        "config_changed": changes.config.is_some(),
        "left_behind": others.left_names(),
    })
}

/// How many layers and tensors change, in words.
fn counts(changes: &Changes, [rotated, replaced, added]: [&str; 3]) -> String {
    let mut parts = vec![format!(
        "{} {rotated}",
        plural(changes.rotations(), "layer")
    )];
    let others = [
        (changes.replacements(), replaced),
        (changes.added.len(), added),
    ];
    for (count, verb) in others.into_iter().filter(|(count, _)| *count > 0) {
        parts.push(format!("{} {verb}", plural(count, "tensor")));
    }
    if !changes.idle.is_empty() {
        let idle = plural(changes.idle.len(), "layer");
        parts.push(format!("{idle} with blocks of one channel left as is"));
    }
    parts.join(", ")
}

/// What would change, with a line for each tensor.
fn table(base: &Base, changes: &Changes) -> String {
    let mut rows = Vec::new();
    for (key, change) in &changes.of {
        let Some((shard, entry)) = base.entry(key) else {
            continue;
        };
        let shape = entry_shape(entry);
        let mut row =
            |what: String| rows.push([shown(key), shape.clone(), shown(&shard.name), what]);
        match change {
            Change::Rotate(parts) => {
                for (range, layer) in parts {
                    row(format!(
                        "rotate {}{}",
                        rows_of(range.len(), range.start, entry.shape[0]),
                        settings(layer)
                    ));
                }
            }
            Change::Replace(parts) => {
                for (range, _) in parts {
                    let all = entry.shape.first().copied().unwrap_or(1);
                    row(
                        format!("replace {}", rows_of(range.len(), range.start, all))
                            .trim_end()
                            .to_string(),
                    );
                }
            }
            Change::New(tensor) => row(format!("replace by {}", shape_of(tensor))),
        }
    }
    let last = base
        .shards
        .last()
        .map_or(String::new(), |shard| shown(&shard.name));
    for (key, added) in &changes.added {
        let (shape, what) = match added {
            Added::Saved(tensor) => (shape_of(tensor), "add".to_string()),
            Added::Copy(of) => {
                let shape = base.entry(of).map(|(_, entry)| entry_shape(entry));
                (shape.unwrap_or_default(), format!("add as a copy of {of}"))
            }
        };
        rows.push([shown(key), shape, last.clone(), what]);
    }
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let [key, shape, file] = [width(0), width(1), width(2)];
    let lines = rows
        .iter()
        .map(|[a, b, c, what]| format!("{a:key$}  {b:shape$}  {c:file$}  {what}\n"));
    let lines: String = lines.collect();
    let total = counts(changes, ["to rotate", "to replace", "to add"]);
    format!("{lines}{total}\n")
}

fn entry_shape(entry: &Entry) -> String {
    format!("{:?} {}", entry.shape, file_name(entry.dtype))
}

fn shape_of(tensor: &SavedTensor) -> String {
    let data = tensor.data();
    format!("{:?} {}", &**data.shape(), data.dtype().name())
}

/// Which rows are meant, unless all of them are.
fn rows_of(count: usize, start: usize, all: usize) -> String {
    match count == all {
        true => String::new(),
        false => format!("rows {start} to {} ", start + count - 1),
    }
}

fn settings(layer: &AdapterLayer) -> String {
    let factors = plural(layer.n_butterfly_factor(), "factor");
    let scale = layer.scale().map_or("", |_| ", scale");
    format!("block size {}, {factors}{scale}", layer.block_size())
}
