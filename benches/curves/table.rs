//! The mean over the seeds, at the rate that validation chooses, as curves and as a table.

use crate::Loss;
use crate::method::{Bits, Method};

/// The steps of the table, of which a run shows those that it reached, and its last.
const STEPS: [usize; 4] = [0, 50, 100, 200];

/// A method at its best rate, in the mean over the seeds.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    pub bits: Bits,
    pub method: Method,
    pub trained: usize,
    pub rate: f64,
    pub points: Vec<Point>,
}

/// Means over the seeds after some steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub step: usize,
    pub train: f64,
    pub valid: f64,
    pub test: f64,
    /// The standard deviation of the test loss over the seeds.
    pub spread: f64,
    pub accuracy: f64,
}

/// The curve of each method that was trained, in the order of [`Bits::ALL`] and [`Method::ALL`].
pub fn curves(losses: &[Loss]) -> Vec<Curve> {
    let cases = Bits::ALL
        .into_iter()
        .flat_map(|bits| Method::ALL.map(|method| (bits, method)));
    cases
        .filter_map(|(bits, method)| {
            let of_case = |loss: &&Loss| loss.bits == bits && loss.method == method;
            best(losses.iter().filter(of_case).collect())
        })
        .collect()
}

/// The curve of the rate with the lowest validation loss at the end.
fn best(losses: Vec<&Loss>) -> Option<Curve> {
    let mut rates: Vec<f64> = losses.iter().map(|loss| loss.rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let curves = rates.into_iter().map(|rate| {
        let of_rate: Vec<&Loss> = losses
            .iter()
            .copied()
            .filter(|loss| loss.rate == rate)
            .collect();
        Curve {
            bits: of_rate[0].bits,
            method: of_rate[0].method,
            trained: of_rate[0].trained,
            rate,
            points: points(&of_rate),
        }
    });
    // A loss that is no number comes last.
    curves.min_by(|a, b| a.end().valid.total_cmp(&b.end().valid))
}

fn points(losses: &[&Loss]) -> Vec<Point> {
    let mut steps: Vec<usize> = losses.iter().map(|loss| loss.step).collect();
    steps.sort();
    steps.dedup();
    let point = |step: usize| {
        let seeds: Vec<&&Loss> = losses.iter().filter(|loss| loss.step == step).collect();
        let count = seeds.len() as f64;
        let mean =
            |part: fn(&Loss) -> f64| seeds.iter().map(|loss| part(loss)).sum::<f64>() / count;
        let test = mean(|loss| loss.test);
        let squares = seeds
            .iter()
            .map(|loss| (loss.test - test).powi(2))
            .sum::<f64>();
        Point {
            step,
            train: mean(|loss| loss.train),
            valid: mean(|loss| loss.valid),
            test,
            spread: (squares / (count - 1.0).max(1.0)).sqrt(),
            accuracy: mean(|loss| loss.accuracy),
        }
    };
    steps.into_iter().map(point).collect()
}

impl Curve {
    /// What the last step reached.
    pub fn end(&self) -> &Point {
        self.points.last().expect("a curve has points")
    }

    fn at(&self, step: usize) -> Option<&Point> {
        self.points.iter().find(|point| point.step == step)
    }
}

/// A table in Markdown for each precision.
pub fn markdown(curves: &[Curve]) -> String {
    let last = curves
        .iter()
        .map(|curve| curve.end().step)
        .max()
        .unwrap_or(0);
    let steps: Vec<usize> = STEPS
        .into_iter()
        .filter(|&step| step < last)
        .chain([last])
        .collect();
    let heads = steps
        .iter()
        .map(|step| format!(" step {step} |"))
        .collect::<String>();
    let rule = "---:|".repeat(steps.len());
    let mut text = String::new();
    for bits in Bits::ALL {
        text += &format!(
            "\n| {bits} | trained | rate |{heads} test loss | test accuracy, % |\n\
             |---|---:|---:|{rule}---:|---:|\n"
        );
        for curve in curves.iter().filter(|curve| curve.bits == bits) {
            let rate = match curve.method {
                Method::Head => "–".to_string(),
                _ => format!("{:e}", curve.rate),
            };
            let losses = steps.iter().map(|&step| match curve.at(step) {
                Some(point) => format!(" {:.4} |", point.train),
                None => " – |".to_string(),
            });
            let (losses, end) = (losses.collect::<String>(), curve.end());
            text += &format!(
                "| {} | {} | {rate} |{losses} {:.4} ± {:.4} | {:.1} |\n",
                curve.method,
                curve.trained,
                end.test,
                end.spread,
                100.0 * end.accuracy
            );
        }
    }
    text
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Two rates and two seeds: the higher rate has the lower training loss, and the higher validation loss.
    pub fn losses() -> Vec<Loss> {
        let mut losses = Vec::new();
        for (rate, end) in [(1e-2, 0.5), (3e-2, 0.25)] {
            for seed in 0..2 {
                for (step, train) in [(0, 1.5), (50, end), (75, end / 2.0)] {
                    losses.push(Loss {
                        bits: Bits::Four,
                        method: Method::Oft,
                        trained: 8064,
                        rate,
                        seed,
                        step,
                        train,
                        valid: rate + seed as f64,
                        test: 0.75 + 0.5 * seed as f64,
                        accuracy: 0.9,
                    });
                }
            }
        }
        losses
    }

    #[test]
    fn validation_chooses_the_rate() {
        let curves = curves(&losses());
        assert_eq!(curves.len(), 1);
        assert_eq!((curves[0].rate, curves[0].points.len()), (1e-2, 3));
        let end = curves[0].end();
        assert_eq!((end.step, end.train, end.test), (75, 0.25, 1.0));
        assert!((end.spread - 0.125f64.sqrt()).abs() < 1e-12, "{end:?}");
        assert!((end.valid - 0.51).abs() < 1e-12, "{end:?}");
    }

    #[test]
    fn a_rate_at_which_training_fails_is_not_chosen() {
        let mut losses = losses();
        let low = losses.iter_mut().filter(|loss| loss.rate == 1e-2);
        low.for_each(|loss| loss.valid = f64::NAN);
        assert_eq!(curves(&losses)[0].rate, 3e-2);
    }

    #[test]
    fn the_table_has_the_losses_at_its_steps() {
        let table = markdown(&curves(&losses()));
        let rows: Vec<&str> = table.lines().collect();
        let head = "| 4 bits | trained | rate | step 0 | step 50 | step 75 | test loss | test accuracy, % |";
        let row = "| QOFT b=8 | 8064 | 1e-2 | 1.5000 | 0.5000 | 0.2500 | 1.0000 ± 0.3536 | 90.0 |";
        assert!(rows.contains(&head) && rows.contains(&row), "{table}");
    }
}
