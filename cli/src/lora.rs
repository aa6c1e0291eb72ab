//! The low-rank adapter that is nearest to an orthogonal one, in PEFT's LoRA layout.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::slice;

use burn::tensor::{DType, TensorData};
use burn_boft::peft::{Folder, key, saved_key};
use burn_boft::tensors::{from_values, values};
use burn_boft::{Adapter, Bias, LayerKind};
use faer::Mat;
use faer::linalg::solvers::SvdError;
use serde_json::{Map, Value, json};

use crate::base::Base;
use crate::changes::{Change, Changes, Step, steps};
use crate::copies;
use crate::error::Error;
use crate::load::Loaded;
use crate::output::OutputFolder;
use crate::pieces::{Turn, d_input, read_rows, row_bytes};
use crate::terminal::{note, plural, progress, report, shown};
use crate::tie::Head;
use crate::turn::Forward;

/// Writes `B·A ≈ W' − W` for every layer, from the largest singular values, and prints how much that leaves out.
pub fn write(
    of: &Loaded,
    base: &Base,
    head: &Head,
    rank: usize,
    output: &Path,
    json: bool,
) -> Result<(), Error> {
    let adapter = &of.adapter;
    let changes = Changes::find(of, base, head)?;
    copies::check(of, base, head, &Changes::default())?;
    of.names.note().iter().for_each(|line| note(line));
    let mut tensors = BTreeMap::new();
    let mut targets = Vec::new();
    let (mut text, mut lines) = (String::new(), Vec::new());
    let mut worst = 0.0f64;
    let entries = changes.of.keys().filter_map(|key| base.entry(key));
    let progress = progress(entries.map(|(_, entry)| entry.bytes).sum());
    for (name, change) in &changes.of {
        let Change::Rotate(parts) = change else {
            continue;
        };
        for step in steps(parts) {
            let layer = step.layer;
            if layer.kind() == Some(LayerKind::Embedding) {
                let path = layer.path();
                return Err(Error::Settings(format!(
                    "`{path}` is an embedding, whose LoRA PEFT stores and computes in another way; merge the adapter instead"
                )));
            }
            let weight = Weight::read(base, name, step)?;
            let low =
                LowRank::new(&weight, rank).map_err(|why| Error::tensor(&base.path, name, why))?;
            text.push_str(&format!(
                "{}: {:.2e} of the change is left out, {:.2e} of the weight\n",
                shown(layer.path()),
                low.of_change,
                low.of_weight
            ));
            lines.push(json!({
                "path": layer.path(),
                "left_out_of_change": low.of_change,
                "left_out_of_weight": low.of_weight,
            }));
            worst = worst.max(low.of_weight);
            progress.inc(weight.bytes);
            tensors.extend(low.into_tensors(layer.path(), &weight.shape));
            targets.push(layer.path().to_string());
        }
    }
    progress.finish_and_clear();
    // A layer that does not rotate gets no LoRA, and keeps its bias where it is.
    let adapted: HashSet<_> = targets.iter().map(String::as_str).collect();
    for tensor in adapter.tensors().iter().chain(adapter.base_copies()) {
        let is_adapted = adapted.contains(tensor.module());
        let key = saved_key(tensor.module(), tensor.name(), is_adapted);
        tensors.insert(key, tensor.data().clone());
    }
    let config = config(adapter, rank, &targets);
    let folder = OutputFolder::create(output)?;
    Folder::new(config, tensors)
        .write(folder.temporary())
        .map_err(|error| folder.named(error.into()))?;
    folder.finish()?;
    text.push_str(&format!(
        "{}: {} of rank {rank}, at most {worst:.2e} of a weight left out\n",
        output.display(),
        plural(targets.len(), "layer")
    ));
    let value = json!({
        "output": output.display().to_string(),
        "rank": rank,
        "layers": lines,
        "left_out_of_weight": worst,
    });
    report(json, &text, &value)
}

/// PEFT's settings of the LoRA; the scaling is one.
fn config(adapter: &Adapter, rank: usize, targets: &[String]) -> Map<String, Value> {
    let selection = adapter.config().selection();
    let mut config = adapter.about().clone();
    let bias = match selection.bias {
        Bias::None => "none",
        Bias::All => "all",
        Bias::AdapterOnly => "lora_only",
    };
    let saved = match selection.modules_to_save.is_empty() {
        true => Value::Null,
        false => json!(selection.modules_to_save),
    };
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("lora_alpha", json!(rank)),
        ("lora_dropout", json!(0.0)),
        ("bias", json!(bias)),
        ("target_modules", json!(targets)),
        ("modules_to_save", saved),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
    ] {
        config.insert(key.to_string(), value);
    }
    config
}

/// A weight and what the adapter makes of it.
struct Weight {
    /// The axes of the whole tensor, except that the first is the number of rows of this part.
    shape: Vec<usize>,
    change: Mat<f64>,
    merged_norm: f64,
    /// How many bytes it has in the file.
    bytes: u64,
}

impl Weight {
    fn read(base: &Base, key: &str, step: &Step) -> Result<Self, Error> {
        let rows = &step.rows;
        let refuse = |reason: String| Error::tensor(&base.path, key, reason);
        let (shard, entry) = base
            .entry(key)
            .ok_or_else(|| refuse("is not there".into()))?;
        shard.check_numbers(entry)?;
        let d_input = d_input(entry);
        // Widened first: the change is not rounded to the weight's precision.
        let before = read_rows(shard, entry, rows, &mut Vec::new())?;
        let before = before.convert_dtype(step.layer.skew().dtype());
        let turn = Forward::new();
        let rotations = turn
            .prepare(slice::from_ref(step), d_input)
            .map_err(refuse)?;
        let after = turn.turn(&rotations, before.clone(), rows.clone());
        let after = after.map_err(refuse)?;
        let (before, after) = (values(&before), values(&after));
        let at = |row: usize, column: usize| row * d_input + column;
        let change = Mat::from_fn(rows.len(), d_input, |i, j| {
            after[at(i, j)] - before[at(i, j)]
        });
        let merged_norm = after.iter().map(|x| x * x).sum::<f64>().sqrt();
        if !merged_norm.is_finite() {
            return Err(refuse(
                "would not be finite: it or the adapter holds NaN or infinity".into(),
            ));
        }
        let mut shape = entry.shape.clone();
        shape[0] = rows.len();
        Ok(Self {
            shape,
            change,
            merged_norm,
            bytes: rows.len() as u64 * row_bytes(entry),
        })
    }
}

/// The first singular values of a change, shared between the two factors.
struct LowRank {
    /// `A`, `[rank, d_input]` row by row.
    a: Vec<f64>,
    /// `B`, `[d_output, rank]` row by row.
    b: Vec<f64>,
    rank: usize,
    /// `‖ΔW − B·A‖ / ‖ΔW‖`.
    of_change: f64,
    /// `‖ΔW − B·A‖ / ‖W'‖`.
    of_weight: f64,
}

impl LowRank {
    fn new(weight: &Weight, rank: usize) -> Result<Self, String> {
        let svd = weight
            .change
            .thin_svd()
            .map_err(|SvdError::NoConvergence| {
                "has a change whose singular values cannot be computed: the iteration does not converge"
                    .to_string()
            })?;
        let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
        let values: Vec<f64> = (0..s.nrows()).map(|k| s[k]).collect();
        let kept = rank.min(values.len());
        // Where there are fewer values than the rank asks for, the rest is zero.
        let part = |k: usize, number: f64| {
            if k < kept {
                values[k].sqrt() * number
            } else {
                0.0
            }
        };
        let get = |matrix: faer::MatRef<f64>, row: usize, k: usize| {
            if k < kept { matrix[(row, k)] } else { 0.0 }
        };
        let a = (0..rank).flat_map(|k| (0..v.nrows()).map(move |j| (k, j)));
        let b = (0..u.nrows()).flat_map(|i| (0..rank).map(move |k| (i, k)));
        let norm = |values: &[f64]| values.iter().fold(0.0, |sum, x| sum + x * x).sqrt();
        let (left, whole) = (norm(&values[kept..]), norm(&values));
        let share = |whole: f64| if whole > 0.0 { left / whole } else { 0.0 };
        Ok(Self {
            a: a.map(|(k, j)| part(k, get(v, j, k))).collect(),
            b: b.map(|(i, k)| part(k, get(u, i, k))).collect(),
            rank,
            of_change: share(whole),
            of_weight: share(weight.merged_norm),
        })
    }

    /// The two factors, by their keys in PEFT's file.
    fn into_tensors(self, path: &str, shape: &[usize]) -> [(String, TensorData); 2] {
        let mut a = vec![self.rank];
        a.extend(&shape[1..]);
        let mut b = vec![shape[0], self.rank];
        // The second factor of a convolution only mixes channels.
        b.resize(shape.len(), 1);
        [("lora_A.weight", self.a, a), ("lora_B.weight", self.b, b)].map(
            |(name, numbers, shape)| (key(path, name), from_values(numbers, shape, DType::F32)),
        )
    }
}
