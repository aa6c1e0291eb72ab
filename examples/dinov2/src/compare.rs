//! `--compare`: every method under one protocol, in one table.

use std::fmt;
use std::time::Duration;

use burn::prelude::*;
use burn_boft::{diagnose, summary};

use crate::adapt::prepare;
use crate::backbone::Backbone;
use crate::digits;
use crate::error::Error;
use crate::images::Task;
use crate::knn;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;
use crate::progress::Progress;
use crate::train::{Recipe, Trained, features, step_time, test, train};

/// The learning rates that every method may choose from, by validation loss.
const RATES: [f64; 5] = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1];
/// Neighbours that vote on an old digit.
const NEIGHBOURS: usize = 5;

/// What a method costs and what it achieves. The lists have one entry per seed.
struct Row {
    method: Method,
    trainable: usize,
    step: Duration,
    new: Vec<f64>,
    old: Vec<f64>,
    defects: Vec<f64>,
}

/// Trains every method with every seed and prints the table.
///
/// # Errors
///
/// The sizes do not fit, or a training failed.
pub fn compare(
    methods: &[Method],
    seeds: u64,
    recipe: &Recipe,
    device: &Device,
) -> Result<(), Error> {
    let old = digits::old_task();
    let first = recipe.seed;
    let task = |seed| digits::digits(digits::NEW).split(seed);

    // Every method is set up once before the first training, so that wrong sizes are found at once.
    let mut rows = Vec::new();
    for method in methods {
        let model = prepare(method, &Backbone::Embedded, &task(first), recipe, device)?;
        rows.push(Row {
            method: method.clone(),
            trainable: summary(&model).trainable,
            step: Duration::ZERO,
            new: Vec::new(),
            old: Vec::new(),
            defects: Vec::new(),
        });
    }

    for row in &mut rows {
        let model = prepare(
            &row.method,
            &Backbone::Embedded,
            &task(first),
            recipe,
            device,
        )?;
        row.step = step_time(model, &task(first), recipe);
        for seed in first..first + seeds {
            let recipe = Recipe {
                seed,
                ..recipe.clone()
            };
            let task = task(seed);
            let (rate, best) = best_rate(&row.method, &task, &recipe, device)?;
            let new = test(&best.model, &task);
            let old = kept(&best.model, &old);
            println!(
                "seed {seed}: {}, learning rate {rate:.0e}: new digits {:.1} %, old digits {:.1} %",
                row.method,
                100.0 * new.accuracy,
                100.0 * old,
            );
            row.new.push(100.0 * new.accuracy);
            row.old.push(100.0 * old);
            row.defects.extend(defect(&best.model));
        }
    }

    println!();
    println!(
        "| method | trainable parameters | ms per step | new digits, % | old digits kept, % | orthogonality defect |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

/// The model of the rate with the lowest validation loss.
fn best_rate(
    method: &Method,
    task: &Task,
    recipe: &Recipe,
    device: &Device,
) -> Result<(f64, Trained), Error> {
    let run = |rate| {
        let model = prepare(method, &Backbone::Embedded, task, recipe, device)?;
        let trained = train(
            model,
            task,
            recipe,
            rate,
            &method.to_string(),
            Progress::Quiet,
        )?;
        Ok::<_, Error>((rate, trained))
    };
    let mut best = run(RATES[0])?;
    for rate in &RATES[1..] {
        let next = run(*rate)?;
        if next.1.valid.loss < best.1.valid.loss {
            best = next;
        }
    }
    Ok(best)
}

/// How well the old digits can still be told apart by their features.
fn kept(model: &Dinov2ForImageClassification, Task { split, format, .. }: &Task) -> f64 {
    let known = features(model, &split.train, format);
    knn::accuracy(&known, &features(model, &split.test, format), NEIGHBOURS)
}

/// The largest `max|RᵀR − I|` of the model's rotations, if it has any.
fn defect(model: &Dinov2ForImageClassification) -> Option<f64> {
    let layers = diagnose(model).layers;
    layers
        .iter()
        .map(|layer| layer.orthogonality_defect)
        .reduce(f64::max)
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "| {} | {} | {:.1} | {} | {} | ",
            self.method,
            self.trainable,
            1e3 * self.step.as_secs_f64(),
            spread(&self.new),
            spread(&self.old),
        )?;
        match self.defects.iter().copied().reduce(f64::max) {
            Some(defect) => write!(f, "{defect:.1e} |"),
            None => write!(f, "– |"),
        }
    }
}

/// Mean and, of two values or more, standard deviation.
fn spread(values: &[f64]) -> String {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return format!("{mean:.1}");
    }
    let squares = values
        .iter()
        .map(|value| (value - mean).powi(2))
        .sum::<f64>();
    format!("{mean:.1} ± {:.1}", (squares / (count - 1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_that_of_a_sample() {
        assert_eq!(spread(&[97.0]), "97.0");
        assert_eq!(spread(&[96.0, 97.0, 98.0]), "97.0 ± 1.0");
    }
}
