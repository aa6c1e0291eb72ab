//! `merge`: an adapter folded into a model's weights.

use std::ops::Range;
use std::path::PathBuf;
use std::ptr;

use burn_boft::tensors::file_name;
use burn_boft::value::{AdapterLayer, SavedTensor};
use serde_json::{Value, json};

use crate::base::{Base, OtherFiles};
use crate::changes::{Added, Change, Changes, Step, steps};
use crate::cli::Merge;
use crate::copies;
use crate::error::Error;
use crate::header::Entry;
use crate::labels;
use crate::load::{Loaded, Share, Wanted, load_all};
use crate::quantize::Check;
use crate::rewrite::{check_output, rewrite};
use crate::terminal::{note, plural, report, rows_of, shown};
use crate::tie::{Head, Rotated};
use crate::turn::Forward;

pub fn run(options: &Merge, json: bool) -> Result<(), Error> {
    let wanted = Wanted::all(&options.adapters)?;
    let base = Base::open(&options.base)?;
    let head = Head::of(&base)?;
    let adapters = load_all(wanted, &base, &head)?;
    let mut changes = Changes::default();
    for of in &adapters {
        let next = Changes::find(of, &base, &head)?;
        copies::check(of, &base, &head, &changes)?;
        of.names.note().iter().for_each(|line| note(line));
        changes = changes.then(next, &base)?;
    }
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
        check_output(output, &base, &adapters)?;
    }
    // Looked for before the weights are written, since that takes long.
    let others = base.other_files()?;
    others.notes().iter().for_each(|line| note(line));
    let plan = Plan {
        base: &base,
        adapters: &adapters,
        changes: &changes,
        others: &others,
    };
    // Before the merge, which leaves no output if the check fails.
    let check = options.quantize_check.then(|| Check::new(&base, &changes));
    let check = check.transpose()?;
    let (mut text, mut value) = match &options.output {
        Some(output) if !options.dry_run => {
            rewrite(&base, &others.copied, &changes, output, &Forward::new())?;
            let counts = plan.counts(["rotated", "replaced", "added"]);
            let text = format!("{}: {counts}\n", output.display());
            (text, plan.to_json(Some(output)))
        }
        _ => (plan.table(), plan.to_json(None)),
    };
    if let Some(check) = check {
        text = format!("{text}\n{}", check.table());
        value["quantize_check"] = check.to_json();
    }
    report(json, &text, &value)
}

/// What a merge changes, to be reported.
struct Plan<'a> {
    base: &'a Base,
    adapters: &'a [Loaded],
    changes: &'a Changes<'a>,
    others: &'a OtherFiles,
}

impl Plan<'_> {
    /// What has changed, or would change where there is no output.
    fn to_json(&self, output: Option<&PathBuf>) -> Value {
        let changes = self.changes;
        let mut tensors = Vec::new();
        for (key, change) in &changes.of {
            let mut add = |change: &str, rows: Range<usize>, step: Option<&Step>| {
                let layer = step.map(|step| step.layer);
                let path = match step {
                    Some(step) => Some(step.path),
                    None => changes.by.get(key).copied(),
                };
                tensors.push(json!({
                    "tensor": key,
                    "change": change,
                    "adapter": path.map(|path| path.display().to_string()),
                    "rows": [rows.start, rows.end],
                    "block_size": layer.map(AdapterLayer::block_size),
                    "factors": layer.map(AdapterLayer::n_butterfly_factor),
                    "scale": layer.map(|layer| layer.scale().is_some()),
                }));
            };
            match change {
                Change::Rotate(parts) => {
                    steps(parts).for_each(|step| add("rotate", step.rows.clone(), Some(step)));
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
        let adapters = self.adapters.iter().map(|of| {
            json!({
                "path": of.path.display().to_string(),
                "strength": of.share.strength.unwrap_or(1.0),
                "factors": of.share.factors,
            })
        });
        json!({
            "base": self.base.path.display().to_string(),
            "adapters": adapters.collect::<Vec<_>>(),
            "output": output.map(|path| path.display().to_string()),
            "rotated": changes.rotations(),
            "replaced": changes.replacements(),
            "changes": tensors,
            "added": added,
            "idle": changes.idle,
            "config_changed": changes.config.is_some(),
            "left_behind": self.others.left_names(),
        })
    }

    /// How many layers and tensors change, in words.
    fn counts(&self, [rotated, replaced, added]: [&str; 3]) -> String {
        let changes = self.changes;
        let rotations = changes.rotations();
        let mut parts = vec![match self.adapters.len() {
            1 => format!("{} {rotated}", plural(rotations, "layer")),
            count => format!(
                "{} of {count} adapters {rotated}",
                plural(rotations, "layer")
            ),
        }];
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
    fn table(&self) -> String {
        let (base, changes) = (self.base, self.changes);
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
                    for step in steps(parts) {
                        row(format!(
                            "rotate {}{}",
                            rows_of(step.rows.len(), step.rows.start, entry.shape[0]),
                            self.settings(step)
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
        let total = self.counts(["to rotate", "to replace", "to add"]);
        format!("{lines}{total}\n")
    }

    /// The settings of a rotation, with as much of it as is taken, and of several adapters the one.
    fn settings(&self, step: &Step) -> String {
        let layer = step.layer;
        let of = self
            .adapters
            .iter()
            .find(|of| ptr::eq(&of.adapter, step.adapter));
        let share = of.map_or(Share::default(), |of| of.share);
        let factors = plural(layer.n_butterfly_factor(), "factor");
        let factors = match share.factors {
            Some(kept) => format!("{kept} of {factors}"),
            None => factors,
        };
        let scale = layer.scale().map_or("", |_| ", scale");
        let strength = share
            .strength
            .map_or(String::new(), |strength| format!(", strength {strength}"));
        let adapter = match self.adapters.len() {
            1 => String::new(),
            _ => format!(", from {}", shown(&step.path.display().to_string())),
        };
        format!(
            "block size {}, {factors}{scale}{strength}{adapter}",
            layer.block_size()
        )
    }
}

fn entry_shape(entry: &Entry) -> String {
    format!("{:?} {}", entry.shape, file_name(entry.dtype))
}

fn shape_of(tensor: &SavedTensor) -> String {
    let data = tensor.data();
    format!("{:?} {}", &**data.shape(), data.dtype().name())
}
