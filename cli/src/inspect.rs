//! `inspect`: shows what an adapter is, and how far it rotates each layer.

use std::collections::BTreeMap;

use burn::tensor::Device;
use burn_boft::peft::{LoadOptions, read_settings};
use burn_boft::value::{AdapterLayer, LayerMeasure};
use burn_boft::{Adapter, LayerKind, TargetModules};
use serde_json::{Value, json};

use crate::cli::Inspect;
use crate::error::Error;
use crate::layers;
use crate::load::load;
use crate::output::{Form, check_free};
use crate::plot;
use crate::terminal::{plural, report, shown};

pub fn run(options: &Inspect, json: bool) -> Result<(), Error> {
    if let Some(path) = &options.plot {
        check_free(path, Form::File)?;
    }
    let adapter = load(&options.adapter, &LoadOptions::new())?;
    let settings = read_settings(&options.adapter)?;
    let about = About::new(&adapter, &settings);
    let measures = adapter.measure(&Device::flex());
    let mut rows: Vec<_> = adapter
        .layers()
        .iter()
        .zip(measures)
        .map(|(layer, measure)| Row::new(layer, measure))
        .collect();
    rows.sort_by(|a, b| layers::compare(&a.measure.path, &b.measure.path));
    if let Some(path) = &options.plot {
        let angles: Vec<_> = rows
            .iter()
            .map(|row| (shown(&row.measure.path), row.measure.largest_angle))
            .collect();
        plot::angles(path, &angles)?;
    }
    report(json, &to_text(&about, &rows), &to_json(&about, &rows))
}

/// What holds for the whole adapter.
struct About {
    method: String,
    targets: Vec<String>,
    base_model: Option<String>,
    peft_version: Option<String>,
    tensors: usize,
}

impl About {
    fn new(adapter: &Adapter, json: &serde_json::Map<String, Value>) -> Self {
        let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_string);
        Self {
            method: adapter.config().to_string(),
            targets: match &adapter.config().selection().target_modules {
                None => vec!["none".into()],
                Some(TargetModules::AllLinear) => vec!["all-linear".into()],
                Some(TargetModules::Regex(regex)) => vec![format!("regex {regex}")],
                Some(TargetModules::Names(names)) => names.clone(),
            },
            base_model: adapter.base_model().map(str::to_string),
            peft_version: text("peft_version"),
            tensors: adapter.tensors().len(),
        }
    }
}

/// One layer.
struct Row {
    kind: &'static str,
    block_size: usize,
    blocks: usize,
    factors: usize,
    measure: LayerMeasure,
}

impl Row {
    fn new(layer: &AdapterLayer, measure: LayerMeasure) -> Self {
        let [factors, blocks, _] = layer.skew().shape().dims::<3>();
        Self {
            kind: layer.kind().map_or("-", LayerKind::name),
            block_size: layer.block_size(),
            blocks,
            factors,
            measure,
        }
    }
}

fn to_text(about: &About, rows: &[Row]) -> String {
    let sum = |count: fn(&Row) -> usize| rows.iter().map(count).sum::<usize>();
    let unknown = || "-".to_string();
    let width = rows
        .iter()
        .map(|row| row.measure.path.chars().count())
        .max()
        .unwrap_or(0)
        .max(5);
    let head = [
        ("method", about.method.clone()),
        ("targets", short_list(&about.targets)),
        (
            "base model",
            about.base_model.clone().unwrap_or_else(unknown),
        ),
        ("PEFT", about.peft_version.clone().unwrap_or_else(unknown)),
        ("layers", rows.len().to_string()),
        (
            "parameters",
            format!(
                "{} stored, {} effective",
                sum(|row| row.measure.stored_by_peft),
                sum(|row| row.measure.effective)
            ),
        ),
        ("saved beside", plural(about.tensors, "tensor")),
    ];
    let mut text: String = head
        .iter()
        .map(|(what, value)| format!("{what:12}  {}\n", shown(value)))
        .collect();
    text.push_str(&format!(
        "\n{:width$}  {:6}  {:>5}  {:>6}  {:>7}  {:>9}  {:>9}  {:>8}  {:>9}  {:>9}  {}\n",
        "layer",
        "kind",
        "block",
        "blocks",
        "factors",
        "stored",
        "effective",
        "‖Q‖₂",
        "defect",
        "angle/rad",
        "scale"
    ));
    for row in rows {
        let LayerMeasure {
            path,
            orthogonality_defect,
            skew_norm,
            largest_angle,
            scale_range,
            ..
        } = &row.measure;
        let scale =
            scale_range.map_or_else(unknown, |(low, high)| format!("{low:.4} to {high:.4}"));
        text.push_str(&format!(
            "{:width$}  {:6}  {:>5}  {:>6}  {:>7}  {:>9}  {:>9}  {skew_norm:>8.4}  {orthogonality_defect:>9.2e}  {largest_angle:>9.4}  {scale}\n",
            shown(path), row.kind, row.block_size, row.blocks, row.factors, row.measure.stored_by_peft, row.measure.effective
        ));
    }
    text
}

/// Names in one line. Many of them are shortened to patterns with `*` for numbers, each with how many it stands for.
fn short_list(names: &[String]) -> String {
    const NAMES: usize = 8;
    if names.len() <= NAMES {
        return names.join(", ");
    }
    let mut patterns = BTreeMap::new();
    for name in names {
        *patterns.entry(layers::pattern(name)).or_insert(0) += 1;
    }
    let shown = patterns.iter().take(NAMES);
    let shown: Vec<_> = shown
        .map(|(pattern, count)| format!("{pattern} ({count})"))
        .collect();
    let more = patterns.len() - shown.len();
    let rest = match more {
        0 => String::new(),
        more => format!(" and {more} more, which --json lists"),
    };
    format!("{} names: {}{rest}", names.len(), shown.join(", "))
}

fn to_json(about: &About, rows: &[Row]) -> Value {
    let layers: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "path": row.measure.path,
                "kind": Some(row.kind).filter(|kind| *kind != "-"),
                "block_size": row.block_size,
                "blocks": row.blocks,
                "factors": row.factors,
                "stored": row.measure.stored_by_peft,
                "effective": row.measure.effective,
                "skew_norm": row.measure.skew_norm,
                "orthogonality_defect": row.measure.orthogonality_defect,
                "largest_angle": row.measure.largest_angle,
                "scale_range": row.measure.scale_range.map(|(low, high)| [low, high]),
            })
        })
        .collect();
    json!({
        "method": about.method,
        "targets": about.targets.join(", "),
        "base_model": about.base_model,
        "peft_version": about.peft_version,
        "stored": rows.iter().map(|row| row.measure.stored_by_peft).sum::<usize>(),
        "effective": rows.iter().map(|row| row.measure.effective).sum::<usize>(),
        "saved_tensors": about.tensors,
        "layers": layers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_targets_are_shortened_to_patterns() {
        let names = |count: usize, of: fn(usize) -> String| (0..count).map(of).collect::<Vec<_>>();
        assert_eq!(
            short_list(&names(2, |i| format!("layer.{i}.fc"))),
            "layer.0.fc, layer.1.fc"
        );
        assert_eq!(
            short_list(&names(72, |i| format!("layer.{}.fc{}", i / 2, 1 + i % 2))),
            "72 names: layer.*.fc1 (36), layer.*.fc2 (36)"
        );
        let all = short_list(&names(20, |i| format!("module{i:02}")));
        assert!(
            all.ends_with("module07 (1) and 12 more, which --json lists"),
            "{all}"
        );
    }
}
