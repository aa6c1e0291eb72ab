//! `inspect`: shows what an adapter is, and how far it rotates each layer.

use std::path::Path;

use burn::tensor::Device;
use burn_boft::dialects::{AdapterFile, FileLayer};
use burn_boft::peft::read_settings;
use burn_boft::value::{AdapterLayer, LayerMeasure};
use burn_boft::{Adapter, KeyMap, LayerKind, TargetModules};
use serde_json::{Value, json};

use crate::cli::{Inspect, ReadArgs};
use crate::error::Error;
use crate::layers;
use crate::load::{Given, load};
use crate::output::{Form, check_free};
use crate::plot;
use crate::terminal::{plural, report, shown};

pub fn run(options: &Inspect, json: bool) -> Result<(), Error> {
    if let Some(path) = &options.plot {
        check_free(path, Form::File)?;
    }
    let (about, mut rows) = match Given::open(&options.adapter)? {
        Given::Folder(folder) => of_folder(&folder, options.reading)?,
        Given::File(file) => of_file(&file),
    };
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

/// What an adapter in PEFT's folder is.
fn of_folder(folder: &Path, reading: ReadArgs) -> Result<(About, Vec<Row>), Error> {
    let adapter = load(folder, KeyMap::new(), reading)?;
    let about = Folder::new(&adapter, &read_settings(folder)?);
    let measures = adapter.measure(&Device::flex());
    let layers = adapter.layers().iter().zip(measures);
    let rows = layers
        .map(|(layer, measure)| Row::new(layer, layer.kind(), measure.stored_by_peft, measure));
    Ok((About::Folder(about), rows.collect()))
}

/// What an adapter in a file of another program is.
fn of_file(file: &AdapterFile) -> (About, Vec<Row>) {
    let measures = file.measure(&Device::flex());
    let layers = file.layers().iter().zip(measures);
    let rows =
        layers.map(|(layer, measure)| Row::new(layer.layer(), None, layer.stored(), measure));
    (About::File(Dialects::new(file)), rows.collect())
}

/// A line above the table of layers: what, and which.
type Line = (&'static str, String);

/// What holds for the whole adapter.
enum About {
    Folder(Folder),
    File(Dialects),
}

impl About {
    /// The lines above the table of layers, in pairs of what and which, those of these counts among them.
    fn lines(&self, counts: [Line; 2]) -> Vec<Line> {
        match self {
            Self::Folder(folder) => folder.lines(counts),
            Self::File(file) => file.lines(counts),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Folder(folder) => folder.to_json(),
            Self::File(file) => file.to_json(),
        }
    }
}

/// What holds for a file of another program.
struct Dialects {
    names: Vec<&'static str>,
    program: String,
    axis: &'static str,
    key_styles: Vec<String>,
    /// The bounds of the layers, from the smallest to the largest.
    alphas: Vec<f64>,
    notes: Vec<String>,
}

impl Dialects {
    fn new(file: &AdapterFile) -> Self {
        let mut alphas: Vec<_> = file.layers().iter().filter_map(FileLayer::alpha).collect();
        alphas.sort_by(f64::total_cmp);
        alphas.dedup();
        let dialects = file.dialects();
        Self {
            // A file has dialects of one program, which rotate one axis.
            axis: dialects
                .first()
                .map_or("-", |dialect| dialect.axis().name()),
            names: dialects.iter().map(|dialect| dialect.name()).collect(),
            program: file.program(),
            key_styles: file.key_styles(),
            alphas,
            notes: file.notes().to_vec(),
        }
    }

    fn lines(&self, counts: [Line; 2]) -> Vec<Line> {
        // Files hold f32 at most.
        let rounded = |alpha: &f64| *alpha as f32;
        let alpha = match &self.alphas[..] {
            [] => "none".to_string(),
            [alpha] => rounded(alpha).to_string(),
            [low, .., high] => format!("{} to {}", rounded(low), rounded(high)),
        };
        let mut lines = vec![
            ("dialect", self.names.join(", ")),
            ("program", self.program.clone()),
            ("rotates", format!("{}s", self.axis)),
            ("names", self.key_styles.join(", ")),
            ("alpha", alpha),
        ];
        lines.extend(counts);
        lines.extend(self.notes.iter().map(|line| ("unusual", line.clone())));
        lines
    }

    fn to_json(&self) -> Value {
        json!({
            "dialects": self.names,
            "program": self.program,
            "rotates": self.axis,
            "key_styles": self.key_styles,
            "alpha": self.alphas,
            "unusual": self.notes,
        })
    }
}

/// What holds for an adapter in PEFT's folder.
struct Folder {
    method: String,
    targets: Vec<String>,
    base_model: Option<String>,
    peft_version: Option<String>,
    tensors: usize,
}

impl Folder {
    fn lines(&self, counts: [Line; 2]) -> Vec<Line> {
        let unknown = || "-".to_string();
        let mut lines = vec![
            ("method", self.method.clone()),
            ("targets", layers::short_list(&self.targets)),
            (
                "base model",
                self.base_model.clone().unwrap_or_else(unknown),
            ),
            ("PEFT", self.peft_version.clone().unwrap_or_else(unknown)),
        ];
        lines.extend(counts);
        lines.push(("saved beside", plural(self.tensors, "tensor")));
        lines
    }

    fn to_json(&self) -> Value {
        json!({
            "method": self.method,
            "targets": self.targets.join(", "),
            "base_model": self.base_model,
            "peft_version": self.peft_version,
            "saved_tensors": self.tensors,
        })
    }

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
    /// How many numbers the file has for it.
    stored: usize,
    measure: LayerMeasure,
}

impl Row {
    fn new(
        layer: &AdapterLayer,
        kind: Option<LayerKind>,
        stored: usize,
        measure: LayerMeasure,
    ) -> Self {
        let [factors, blocks, _] = layer.skew().shape().dims::<3>();
        Self {
            kind: kind.map_or("-", LayerKind::name),
            stored,
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
    let head = about.lines([
        ("layers", rows.len().to_string()),
        (
            "parameters",
            format!(
                "{} stored, {} effective",
                sum(|row| row.stored),
                sum(|row| row.measure.effective)
            ),
        ),
    ]);
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
            shown(path), row.kind, row.block_size, row.blocks, row.factors, row.stored, row.measure.effective
        ));
    }
    text
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
                "stored": row.stored,
                "effective": row.measure.effective,
                "skew_norm": row.measure.skew_norm,
                "orthogonality_defect": row.measure.orthogonality_defect,
                "largest_angle": row.measure.largest_angle,
                "scale_range": row.measure.scale_range.map(|(low, high)| [low, high]),
            })
        })
        .collect();
    let mut json = about.to_json();
    json["stored"] = rows.iter().map(|row| row.stored).sum::<usize>().into();
    json["effective"] = rows
        .iter()
        .map(|row| row.measure.effective)
        .sum::<usize>()
        .into();
    json["layers"] = layers.into();
    json
}
