//! `merge --quantize-check`: what rounding the merged weights to eight and to four bits would lose.
//!
//! One weight is in memory at a time, as the change that the merge makes. Everything else is computed in pieces of rows, which
//! are read twice: for the base and the merged weight, and for the LoRA once the change is known.

use std::array;
use std::iter;
use std::ops::{AddAssign, Range};

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_boft::ops::{largest_rank, low_rank};
use burn_boft::tensors::{from_file, from_values, values};
use burn_boft::value::AdapterLayer;
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::base::{Base, Shard};
use crate::changes::{Change, Changes, RotatedRows, Step};
use crate::error::Error;
use crate::header::Entry;
use crate::pieces::{Turn, at_once, check_finite, d_input, read_rows, row_bytes};
use crate::terminal::{plural, progress, rows_of, shown};
use crate::turn::Forward;

/// How many sums are kept side by side, so that they do not wait for each other.
const LANES: usize = 8;
/// Adding this number and taking it away again rounds a number below 2⁵¹ to the nearest whole one, and of two to the even one.
/// `f64::round_ties_even` does the same, but calls a function on processors without an instruction for it.
const WHOLE: f64 = 1.5 * (1u64 << 52) as f64;

/// How numbers are rounded: to the nearest of `2·levels + 1` evenly spaced ones around zero, of which the outer two are as far
/// from zero as the largest number that shares their scale.
struct Scheme {
    name: &'static str,
    /// What the table says.
    title: &'static str,
    bits: u32,
    /// How many neighbouring inputs share a scale; none for all inputs of an output.
    group: Option<usize>,
}

const SCHEMES: [Scheme; 3] = [
    Scheme {
        name: "int8",
        title: "8 bits",
        bits: 8,
        group: None,
    },
    Scheme {
        name: "int4",
        title: "4 bits",
        bits: 4,
        group: None,
    },
    Scheme {
        name: "int4_group_128",
        title: "4 bits, groups of 128",
        bits: 4,
        group: Some(128),
    },
];

/// The weights that are rounded: before the merge, after it, and with the LoRA in place of the adapter.
const WEIGHTS: [&str; 3] = ["base", "merged", "lora"];
const TITLES: [&str; 3] = ["base", "merged", "LoRA"];

impl Scheme {
    /// The sum of the squares that rounding these rows of a weight leaves.
    fn rounding(&self, rows: &[f64], d_input: usize) -> f64 {
        let levels = f64::from((1 << (self.bits - 1)) - 1);
        let rows = rows.chunks(d_input);
        let groups = rows.flat_map(|row| row.chunks(self.group.unwrap_or(d_input)));
        groups.map(|group| rounding(group, levels)).sum()
    }
}

/// The sum of the squares that rounding these numbers with one scale leaves.
fn rounding(numbers: &[f64], levels: f64) -> f64 {
    let larger = |a: f64, b: f64| if a < b { b } else { a };
    let scale = in_lanes(numbers, |lane, x| larger(lane, x.abs()))
        .into_iter()
        .fold(0.0, larger)
        / levels;
    if scale == 0.0 {
        return 0.0;
    }
    let lanes = in_lanes(numbers, |lane, x| {
        let lost = (x / scale + WHOLE - WHOLE) * scale - x;
        lane + lost * lost
    });
    lanes.iter().sum()
}

/// The sum of the squares of these numbers.
fn squares(numbers: &[f64]) -> f64 {
    in_lanes(numbers, |lane, x| lane + x * x).iter().sum()
}

/// What a fold over every eighth number comes to, from zero.
fn in_lanes(numbers: &[f64], fold: impl Fn(f64, f64) -> f64) -> [f64; LANES] {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = numbers.as_chunks::<LANES>();
    for numbers in whole.iter().map(<[f64; LANES]>::as_slice).chain([rest]) {
        let pairs = lanes.iter_mut().zip(numbers);
        pairs.for_each(|(lane, x)| *lane = fold(*lane, *x));
    }
    lanes
}

/// Sums of squares over rows of a weight.
#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    weight: f64,
    /// What each of the schemes loses.
    lost: [f64; SCHEMES.len()],
}

impl Squares {
    fn new(rows: &[f64], d_input: usize) -> Self {
        Self {
            weight: squares(rows),
            lost: SCHEMES
                .each_ref()
                .map(|scheme| scheme.rounding(rows, d_input)),
        }
    }

    /// `‖rounded − exact‖ / ‖exact‖` by this scheme; zero where nothing is there to be lost.
    fn loss(&self, scheme: usize) -> f64 {
        relative(self.lost[scheme], self.weight)
    }
}

impl AddAssign for Squares {
    fn add_assign(&mut self, other: Self) {
        self.weight += other.weight;
        let pairs = self.lost.iter_mut().zip(other.lost);
        pairs.for_each(|(sum, lost)| *sum += lost);
    }
}

/// The quotient of two norms, from their squares.
fn relative(part: f64, whole: f64) -> f64 {
    match whole > 0.0 {
        true => (part / whole).sqrt(),
        false => 0.0,
    }
}

/// Sums over rows of one weight, or over all weights.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    /// The square of the change that the merge makes.
    change: f64,
    weights: [Squares; WEIGHTS.len()],
}

impl Sums {
    /// `‖W' − W‖ / ‖W‖`.
    fn change(&self) -> f64 {
        relative(self.change, self.weights[0].weight)
    }

    /// The losses, for every scheme those of every weight.
    fn losses(&self) -> [[f64; WEIGHTS.len()]; SCHEMES.len()] {
        array::from_fn(|scheme| self.weights.map(|weight| weight.loss(scheme)))
    }

    fn to_json(self) -> Map<String, Value> {
        let losses = SCHEMES.iter().zip(self.losses()).map(|(scheme, losses)| {
            let losses = WEIGHTS.iter().zip(losses);
            let losses: Map<_, _> = losses
                .map(|(of, loss)| (of.to_string(), loss.into()))
                .collect();
            (scheme.name.to_string(), losses.into())
        });
        iter::once(("change".to_string(), self.change().into()))
            .chain(losses)
            .collect()
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.change += other.change;
        let pairs = self.weights.iter_mut().zip(other.weights);
        pairs.for_each(|(sum, weight)| *sum += weight);
    }
}

/// What rounding costs in every weight that a merge rotates.
pub struct Check {
    layers: Vec<Layer>,
}

/// Rows of a weight that the same rotations turn.
struct Layer {
    key: String,
    rows: Range<usize>,
    /// How many rows the whole tensor has.
    of_rows: usize,
    /// The rank of the LoRA.
    rank: usize,
    sums: Sums,
}

impl Check {
    /// Rounds every weight that these changes rotate.
    ///
    /// # Errors
    ///
    /// The model cannot be read, an adapter does not fit it, or merged numbers would not be finite.
    pub fn new(base: &Base, changes: &Changes) -> Result<Self, Error> {
        let turn = Forward::new();
        let weights: Vec<_> = changes
            .of
            .iter()
            .filter_map(|(key, change)| match change {
                Change::Rotate(parts) => base.entry(key).map(|place| (place, parts)),
                _ => None,
            })
            .flat_map(|((shard, entry), parts)| {
                parts.iter().map(|part| Weight::new(shard, entry, part))
            })
            .collect();
        let progress = progress(weights.iter().map(Weight::bytes).sum());
        let layers = weights.iter().map(|weight| weight.check(&turn, &progress));
        let layers = layers.collect::<Result<_, _>>()?;
        progress.finish_and_clear();
        Ok(Self { layers })
    }

    fn total(&self) -> Sums {
        let mut total = Sums::default();
        self.layers.iter().for_each(|layer| total += layer.sums);
        total
    }

    /// A line for each weight, and one for all of them.
    pub fn table(&self) -> String {
        if self.layers.is_empty() {
            return "no weight is rotated, so none is rounded\n".to_string();
        }
        let names: Vec<_> = self.layers.iter().map(Layer::name).collect();
        let total = format!("all {}", plural(names.len(), "weight"));
        let width = names
            .iter()
            .chain([&total])
            .map(|name| name.chars().count());
        let width = width.max().unwrap_or(0);
        let line = |name: &str, change: &str, rank: &str, cells: [String; SCHEMES.len()]| {
            let [first, second, third] = cells;
            let line =
                format!("{name:width$}  {change:>7}  {rank:>4}   {first}   {second}   {third}");
            format!("{}\n", line.trim_end())
        };
        let cells = |cells: [String; WEIGHTS.len()]| {
            let [base, merged, lora] = cells;
            format!("{base:>7} {merged:>7} {lora:>7}")
        };
        let percent = |part: f64| format!("{:.3}", 100.0 * part);
        let numbers = |sums: &Sums| sums.losses().map(|losses| cells(losses.map(percent)));
        let mut text = "what rounding to the nearest would lose, in % of each weight\n".to_string();
        let titles = SCHEMES
            .each_ref()
            .map(|scheme| format!("{:23}", scheme.title));
        text.push_str(&line("", "", "", titles));
        let titles = array::from_fn(|_| cells(TITLES.map(str::to_string)));
        text.push_str(&line("weight", "change", "rank", titles));
        for (layer, name) in self.layers.iter().zip(&names) {
            let sums = &layer.sums;
            let change = percent(sums.change());
            text.push_str(&line(name, &change, &layer.rank.to_string(), numbers(sums)));
        }
        let sums = self.total();
        text.push_str(&line(&total, &percent(sums.change()), "", numbers(&sums)));
        text
    }

    pub fn to_json(&self) -> Value {
        let schemes = SCHEMES
            .each_ref()
            .map(|scheme| json!({"name": scheme.name, "bits": scheme.bits, "group": scheme.group}));
        let layers = self.layers.iter().map(|layer| {
            let mut value = layer.sums.to_json();
            value.insert("tensor".into(), layer.key.as_str().into());
            value.insert("rows".into(), json!([layer.rows.start, layer.rows.end]));
            value.insert("lora_rank".into(), layer.rank.into());
            Value::from(value)
        });
        json!({
            "schemes": schemes,
            "layers": layers.collect::<Vec<_>>(),
            "total": self.total().to_json(),
        })
    }
}

impl Layer {
    /// The name of the tensor, with the rows where they are not all.
    fn name(&self) -> String {
        let rows = rows_of(self.rows.len(), self.rows.start, self.of_rows);
        format!("{} {rows}", shown(&self.key))
            .trim_end()
            .to_string()
    }
}

/// Rows of a weight, to be read and rounded.
struct Weight<'a> {
    shard: &'a Shard,
    entry: &'a Entry,
    rows: &'a Range<usize>,
    steps: &'a [Step<'a>],
    d_input: usize,
    /// What is computed in before rounding to the precision of the file.
    wide: DType,
}

impl<'a> Weight<'a> {
    fn new(shard: &'a Shard, entry: &'a Entry, (rows, steps): &'a RotatedRows<'a>) -> Self {
        let is_double = |step: &Step| step.layer.skew().dtype() == DType::F64;
        Self {
            shard,
            entry,
            rows,
            steps,
            d_input: d_input(entry),
            wide: match steps.iter().any(is_double) {
                true => DType::F64,
                false => DType::F32,
            },
        }
    }

    fn bytes(&self) -> u64 {
        self.rows.len() as u64 * row_bytes(self.entry)
    }

    /// The rows in pieces, and how many numbers each has but for the last.
    fn pieces(&self) -> (Vec<Range<usize>>, usize) {
        let (at_once, end) = (at_once(self.steps, self.d_input), self.rows.end);
        let starts = self.rows.clone().step_by(at_once);
        let pieces = starts.map(|start| start..end.min(start + at_once));
        (pieces.collect(), at_once * self.d_input)
    }

    /// Some of the rows as the file has them, widened.
    fn read(&self, rows: &Range<usize>) -> Result<TensorData, Error> {
        let numbers = read_rows(self.shard, self.entry, rows, &mut Vec::new())?;
        Ok(numbers.convert_dtype(self.wide))
    }

    /// Rows as the merged file would have them.
    fn rounded(&self, rows: TensorData) -> TensorData {
        match from_file(self.entry.dtype) {
            Some(dtype) => rows.convert_dtype(dtype),
            None => rows,
        }
    }

    fn check(&self, turn: &Forward, progress: &ProgressBar) -> Result<Layer, Error> {
        self.shard.check_numbers(self.entry)?;
        let (pieces, size) = self.pieces();
        let mut change = vec![0.0f32; self.rows.len() * self.d_input];
        let rotations = turn
            .prepare(self.steps, self.d_input)
            .map_err(|why| Error::tensor(&self.shard.path, &self.entry.key, why))?;
        let parts = change.par_chunks_mut(size).zip(&pieces);
        let parts = parts.map(|(change, rows)| self.merge(turn, &rotations, rows, change));
        let mut sums = Sums::default();
        // Added in their order, so that the last digit is always the same.
        let parts: Vec<_> = parts.collect::<Result<_, _>>()?;
        parts.into_iter().for_each(|part| sums += part);
        progress.inc(self.bytes() / 2);

        let layers = self.steps.iter().map(|step| step.layer);
        let numbers = layers.map(AdapterLayer::effective).sum();
        let shape = [self.rows.len(), self.d_input];
        let rank = largest_rank(numbers, shape);
        let device = Device::flex();
        let change = TensorData::new(change, shape);
        let [left, right] = low_rank(Tensor::from_data(change, (&device, DType::F32)), rank);
        let parts = pieces.par_iter().map(|rows| {
            let first = rows.start - self.rows.start;
            let left = left.clone().narrow(0, first, rows.len());
            self.with_lora(rows, left.matmul(right.clone()))
        });
        let parts: Vec<_> = parts.collect::<Result<_, _>>()?;
        let [.., lora] = &mut sums.weights;
        parts.into_iter().for_each(|part| *lora += part);
        progress.inc(self.bytes() - self.bytes() / 2);
        Ok(Layer {
            key: self.entry.key.clone(),
            rows: self.rows.clone(),
            of_rows: self.entry.shape[0],
            rank,
            sums,
        })
    }

    /// Rounds some rows of the base and of the merged weight, and keeps what the merge changes.
    fn merge(
        &self,
        turn: &Forward,
        rotations: &<Forward as Turn>::Rotations,
        rows: &Range<usize>,
        change: &mut [f32],
    ) -> Result<Sums, Error> {
        let before = self.read(rows)?;
        let after = turn
            .turn(rotations, before.clone(), rows.clone())
            .map_err(|why| Error::tensor(&self.shard.path, &self.entry.key, why))?;
        let (base, exact) = (numbers(&before), numbers(&after));
        let merged = self.rounded(after);
        check_finite(&merged, self.shard, &self.entry.key)?;
        let mut sum = 0.0;
        for (change, (after, before)) in change.iter_mut().zip(exact.iter().zip(&base)) {
            let apart = after - before;
            *change = apart as f32;
            sum += apart * apart;
        }
        let merged = numbers(&merged);
        let [base, merged] = [base, merged].map(|rows| Squares::new(&rows, self.d_input));
        Ok(Sums {
            change: sum,
            weights: [base, merged, Squares::default()],
        })
    }

    /// Rounds some rows of the base with this change.
    fn with_lora(&self, rows: &Range<usize>, change: Tensor<2>) -> Result<Squares, Error> {
        let base = numbers(&self.read(rows)?);
        let change = numbers(&change.into_data());
        let sum = base.iter().zip(change).map(|(base, change)| base + change);
        let merged = from_values(sum.collect(), [rows.len(), self.d_input], self.wide);
        Ok(Squares::new(&numbers(&self.rounded(merged)), self.d_input))
    }
}

/// Numbers of any precision, by the quicker way where it is open.
fn numbers(data: &TensorData) -> Vec<f64> {
    match data.as_slice::<f32>() {
        Ok(numbers) => numbers.iter().copied().map(f64::from).collect(),
        Err(_) => values(data),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of four inputs, whose scales are 1 and 0.25 in four bits.
    #[test]
    fn rounding_loses_what_is_computed_by_hand() {
        let rows = [7.0, -2.25, 0.5, 1.5, 1.0, -1.75, 0.375, 0.3];
        // 0.5, 1.5 and 0.375 lie between two levels, and go to the even ones: 0, 2 and 2·0.25.
        let lost: f64 = [0.25, 0.5, 0.5, 0.0, 0.0, 0.125, 0.05]
            .iter()
            .map(|x| x * x)
            .sum();
        assert!((SCHEMES[1].rounding(&rows, 4) - lost).abs() < 1e-15);
        // In groups of two, the second of each row have the scales 1.5/7 and 0.375/7.
        let pairs = Scheme {
            group: Some(2),
            ..SCHEMES[1]
        };
        let lost = [0.25, 0.5 - 2.0 * 1.5 / 7.0, 0.0, 0.3 - 6.0 * 0.375 / 7.0];
        let lost: f64 = lost.iter().map(|x| x * x).sum();
        assert!((pairs.rounding(&rows, 4) - lost).abs() < 1e-15);
        assert_eq!(SCHEMES[0].rounding(&[0.0; 6], 3), 0.0);
    }

    #[test]
    fn numbers_that_hold_a_level_lose_nothing() {
        for scheme in &SCHEMES {
            let levels = (1 << (scheme.bits - 1)) - 1;
            let row: Vec<_> = (-levels..=levels)
                .map(|level| f64::from(level) * 0.375)
                .collect();
            assert_eq!(scheme.rounding(&row, row.len()), 0.0);
        }
    }
}
