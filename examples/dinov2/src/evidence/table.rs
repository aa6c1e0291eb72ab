//! The results as Markdown.

use super::outcome::Outcome;
use super::plan::{Choice, Edge};
use super::protocol::{Conditions, Design, Protocol};
use super::statistics::{Bootstrap, deviation};
use super::summary::{Pair, Row, Summary, Verdict};

/// What stands in a cell that has no value.
const NOTHING: &str = "–";
/// Up to how many rows a sentence names those that are not distinguishable. Every group of them is looked at.
const LISTED: usize = 10;

/// One chapter for each task: which methods are and are not distinguishable in a sentence, the results, the paired
/// differences, and the learning rates that were searched. The conditions that all runs shared follow at the end, and a
/// comparison that is not finished says so at the beginning.
pub fn markdown(
    protocol: &Protocol,
    outcomes: &[Outcome],
    summaries: &[Summary],
    bootstrap: &Bootstrap,
) -> String {
    let mut parts = Vec::new();
    let (done, total) = protocol.progress(outcomes);
    if done < total {
        parts.push(format!("*Unfinished: {done} of {total} runs are done.*\n"));
    }
    for task in protocol.tasks() {
        parts.push(format!("## {task}\n"));
        if let Some(summary) = summaries.iter().find(|summary| summary.task == task) {
            parts.push(sentence(summary) + "\n");
            parts.push(match protocol.design {
                Design::Choose => results(protocol, summary),
                Design::Sweep => sweep(protocol, summary),
            });
            if !summary.pairs.is_empty() {
                parts.push(differences(protocol.design, summary, bootstrap));
            }
        }
        if protocol.design == Design::Choose {
            parts.push(searched(protocol, task, outcomes));
        }
    }
    parts.push(conditions(protocol));
    parts.join("\n")
}

/// Says which methods are distinguishable, such as `On textiles (5 seeds, 1000 test images), BOFT b=8 m=2 and LoRA r=4 are
/// ahead of linear probe. Not distinguishable: BOFT b=8 m=2 and LoRA r=4.`
pub fn sentence(summary: &Summary) -> String {
    let seeds = summary.rows.iter().map(|row| row.seeds.len());
    let seeds = match (seeds.clone().min(), seeds.max()) {
        (Some(1), Some(1)) => "1 seed".to_string(),
        (Some(least), Some(most)) if least < most => format!("{least} to {most} seeds"),
        (_, most) => format!("{} seeds", most.unwrap_or(0)),
    };
    let mut text = format!(
        "On {} ({seeds}, {} test images), ",
        summary.task, summary.images
    );
    let label = |row: usize| summary.rows[row].label(summary);
    let labels = |rows: &[usize]| list(&rows.iter().map(|&row| label(row)).collect::<Vec<_>>());

    let claims: Vec<String> = claims(summary)
        .iter()
        .map(|(better, worse)| match better.len() {
            1 => format!("{} is ahead of {}", labels(better), labels(worse)),
            _ => format!("{} are ahead of {}", labels(better), labels(worse)),
        })
        .collect();
    if claims.is_empty() {
        return text + "no two methods are distinguishable.";
    }
    text += &format!("{}.", claims.join("; "));
    let open = summary.pairs.iter().filter(|pair| !pair.is_decided());
    match (open.count(), summary.rows.len()) {
        (0, _) => {}
        (_, ..=LISTED) => {
            let groups = alike(summary);
            let groups: Vec<String> = groups.iter().map(|rows| labels(rows)).collect();
            text += &format!(" Not distinguishable: {}.", groups.join("; "));
        }
        (count, _) => text += &format!(" The other {count} pairs are not distinguishable."),
    }
    text
}

/// Which rows are ahead of which, the best first. Rows that are ahead of the same ones share a claim.
fn claims(summary: &Summary) -> Vec<(Vec<usize>, Vec<usize>)> {
    let mean = |row: &usize| summary.rows[*row].accuracy.mean;
    let mut order: Vec<usize> = (0..summary.rows.len()).collect();
    order.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let mut claims: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
    for &better in &order {
        let decided = summary.pairs.iter().filter(|pair| pair.is_decided());
        let decided: Vec<[usize; 2]> = decided.map(Pair::better_first).collect();
        let worse = order
            .iter()
            .filter(|&&worse| decided.contains(&[better, worse]));
        let worse: Vec<usize> = worse.copied().collect();
        match claims.iter_mut().find(|claim| claim.1 == worse) {
            Some((group, _)) => group.push(better),
            None if worse.is_empty() => {}
            None => claims.push((vec![better], worse)),
        }
    }
    claims
}

/// The largest groups of rows of which no two are distinguishable. A row may be in several of them.
fn alike(summary: &Summary) -> Vec<Vec<usize>> {
    let rows = summary.rows.len();
    let open: Vec<[usize; 2]> = summary
        .pairs
        .iter()
        .filter(|pair| !pair.is_decided())
        .map(Pair::better_first)
        .collect();
    let together = |a: usize, b: usize| open.contains(&[a, b]) || open.contains(&[b, a]);
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut subsets: Vec<Vec<usize>> = (0..1_usize << rows)
        .map(|bits| (0..rows).filter(|row| bits >> row & 1 == 1).collect())
        .filter(|subset: &Vec<usize>| subset.len() > 1)
        .collect();
    subsets.sort_by_key(|subset| std::cmp::Reverse(subset.len()));
    for subset in subsets {
        let mut pairs = (0..subset.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
        let within = |group: &Vec<usize>| subset.iter().all(|row| group.contains(row));
        if pairs.all(|(a, b)| together(subset[a], subset[b])) && !groups.iter().any(within) {
            groups.push(subset);
        }
    }
    groups
}

impl Pair {
    fn is_decided(&self) -> bool {
        self.verdict == Verdict::Distinguishable
    }

    /// The places of the rows. In a sweep, the first row of a pair may be the worse one.
    fn better_first(&self) -> [usize; 2] {
        let [first, second] = self.rows;
        match self.difference.mean < 0.0 {
            true => [second, first],
            false => [first, second],
        }
    }
}

impl Row {
    /// The method, and its learning rate where the method has several rows.
    fn label(&self, summary: &Summary) -> String {
        let rows = summary.rows.iter();
        match rows.filter(|row| row.method == self.method).count() {
            1 => self.method.to_string(),
            _ => format!("{} at {:e}", self.method, self.learning_rate),
        }
    }
}

fn results(protocol: &Protocol, summary: &Summary) -> String {
    let second = protocol.conditions.forgetting.as_deref();
    let neighbours = format!(
        "nearest neighbours on {}, %, before → after",
        second.unwrap_or("a second data set")
    );
    let titles = [
        "method",
        "learning rate",
        "test accuracy, %",
        "95 % interval",
        &neighbours,
        "trainable parameters",
        "file",
        "ms per step",
        "peak memory",
        "orthogonality defect",
        "largest angle",
        "minutes per run",
    ];
    let rows = summary.rows.iter().map(|row| {
        let interval = row.accuracy.interval;
        let (low, high) = (percent(interval.low), percent(interval.high));
        vec![
            row.method.to_string(),
            rate(row.learning_rate, row.choice),
            spread(&row.accuracies),
            format!("{low} to {high}"),
            forgotten(row),
            row.trainable.to_string(),
            bytes(row.adapter_bytes),
            format!("{:.1}", row.step_ms),
            row.peak_bytes.map_or(NOTHING.to_string(), bytes),
            defect(row),
            angle(row),
            format!("{:.1}", row.seconds / 60.0),
        ]
    });
    table(&titles, rows) + &notes(summary)
}

/// What the reader of the results must know about them.
fn notes(summary: &Summary) -> String {
    let edges: Vec<String> = summary
        .rows
        .iter()
        .filter_map(|row| {
            let side = match row.choice?.edge? {
                Edge::Lowest => "lowest",
                Edge::Highest => "highest",
            };
            Some(format!("{} ({side})", row.method))
        })
        .collect();
    let mut notes = String::new();
    if !edges.is_empty() {
        notes += &format!(
            "\n\\* The rate is at the edge of the grid, so that a better one may lie outside: {}.\n",
            list(&edges)
        );
    }
    if summary.rows.iter().any(|row| row.seeds.len() == 1) {
        notes += "\nThe interval of a method with one seed covers the choice of the test images, but not that of the seed.\n";
    }
    notes
}

/// The accuracy and then the defect, with one row for each learning rate and one column for each method.
fn sweep(protocol: &Protocol, summary: &Summary) -> String {
    let methods: Vec<_> = protocol.entries.iter().map(|entry| &entry.method).collect();
    let mut rates: Vec<f64> = summary.rows.iter().map(|row| row.learning_rate).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let labels: Vec<String> = methods.iter().map(|method| method.to_string()).collect();
    let mut titles = vec!["learning rate"];
    titles.extend(labels.iter().map(String::as_str));

    let by_rate = |value: fn(&Row) -> String| {
        let rows = rates.iter().map(|rate| {
            let values = methods.iter().map(|method| {
                let mut rows = summary.rows.iter();
                let row = rows.find(|row| row.method == **method && row.learning_rate == *rate);
                row.map_or(NOTHING.to_string(), value)
            });
            [format!("{rate:e}")].into_iter().chain(values).collect()
        });
        table(&titles, rows)
    };
    format!(
        "OFT without the name of a polynomial goes through the exact Cayley map. \
         Test accuracy, %, mean and standard deviation over the seeds:\n\n{}\n\
         Orthogonality defect, the largest of all layers and seeds:\n\n{}",
        by_rate(|row| spread(&row.accuracies)),
        by_rate(defect),
    )
}

fn differences(design: Design, summary: &Summary, bootstrap: &Bootstrap) -> String {
    let titles = [
        "difference in test accuracy",
        "points",
        "95 % interval",
        "p (Holm)",
        "verdict",
    ];
    let rows = summary.pairs.iter().map(|pair| {
        let [left, right] = pair.rows.map(|row| &summary.rows[row]);
        let place = match design {
            Design::Choose => String::new(),
            Design::Sweep => format!(" at {:e}", left.learning_rate),
        };
        let interval = pair.difference.interval;
        vec![
            format!("{} minus {}{place}", left.method, right.method),
            points(pair.difference.mean),
            format!("{} to {}", points(interval.low), points(interval.high)),
            p_value(pair.adjusted),
            verdict(pair.verdict).to_string(),
        ]
    });
    format!(
        "{}\nThe differences are between runs with the same seed on the same test image. Intervals and p-values come from {} \
         resamples of the seeds and, independently, of the test images. Each interval is for its own pair; the p-values \
         are corrected for all {} pairs by Holm's method, and a pair is called distinguishable below 0.05.\n",
        table(&titles, rows),
        bootstrap.resamples,
        summary.pairs.len(),
    )
}

/// The validation loss at every learning rate of the grid, the chosen one in bold.
fn searched(protocol: &Protocol, task: &str, outcomes: &[Outcome]) -> String {
    let most = protocol.entries.iter().map(|entry| entry.rates.len()).max();
    let grid = format!(
        "learning rate: validation loss (mean of {} seeds)",
        protocol.search_seeds.len()
    );
    let mut titles = vec!["method", grid.as_str()];
    titles.resize(most.unwrap_or(1) + 1, "");
    let rows = protocol.entries.iter().map(|entry| {
        let choice = protocol.choice(task, entry, outcomes);
        let mut cells = vec![entry.method.to_string()];
        cells.extend(entry.rates.iter().map(|&rate| {
            let loss = match protocol.search_loss(task, entry, rate, outcomes) {
                Some(loss) if loss.is_finite() => format!("{loss:.4}"),
                Some(_) => "diverged".to_string(),
                None => NOTHING.to_string(),
            };
            match choice.is_some_and(|choice| choice.learning_rate == rate) {
                true => format!("**{rate:e}: {loss}**"),
                false => format!("{rate:e}: {loss}"),
            }
        }));
        cells.resize(titles.len(), String::new());
        cells
    });
    let rows: Vec<_> = rows.collect();
    format!(
        "The learning rates that were searched. The lowest validation loss chooses, and test images have no part in it:\n\n{}",
        table(&titles, rows)
    )
}

fn conditions(protocol: &Protocol) -> String {
    let Conditions {
        model,
        device,
        dtype,
        image_size,
        tasks: _,
        forgetting: _,
        train_images,
        validation_images,
        epochs,
        batch_size,
        max_steps,
        weight_decay,
        warm_up,
        head_rate,
        label_smoothing,
        augment,
        clip_norm,
    } = &protocol.conditions;
    let mut parts = vec![
        format!("model {model}"),
        format!("{image_size}×{image_size} pixels"),
        format!("{dtype} on {device}"),
        format!("{epochs} epochs of batches of {batch_size}"),
        format!("AdamW with weight decay {weight_decay}"),
        format!("cosine schedule with {} % warm-up", 100.0 * warm_up),
        match augment {
            true => "random crops and flips".to_string(),
            false => "no augmentation".to_string(),
        },
    ];
    let optional = [
        train_images.map(|count| format!("at most {count} training images")),
        validation_images.map(|count| format!("at most {count} validation images")),
        max_steps.map(|steps| format!("at most {steps} steps")),
        head_rate.map(|rate| format!("learning rate of the head {rate:e}")),
        (*label_smoothing > 0.0).then(|| format!("label smoothing {label_smoothing}")),
        clip_norm.map(|norm| format!("gradient clipped to norm {norm}")),
    ];
    parts.extend(optional.into_iter().flatten());
    format!(
        "Protocol {}: {}. The epoch with the lowest validation loss is kept. Accuracies are means and standard deviations \
         over seeds; their intervals cover the choice of seeds and test images.\n",
        protocol.identity(),
        parts.join(", ")
    )
}

fn table(titles: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let titles: Vec<String> = titles.iter().map(|title| escaped(title)).collect();
    // Names to the left, numbers to the right.
    let rule = format!("|---{}|\n", "|---:".repeat(titles.len() - 1));
    let rows = rows.into_iter().map(|cells| line(&cells));
    line(&titles) + &rule + &rows.collect::<String>()
}

/// A user's name of a data set may hold what Markdown takes for the end of a cell.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

fn rate(rate: f64, choice: Option<Choice>) -> String {
    match choice.and_then(|choice| choice.edge) {
        Some(_) => format!("{rate:e}\\*"),
        None => format!("{rate:e}"),
    }
}

/// Mean and, of two values or more, standard deviation, in percent.
fn spread(shares: &[f64]) -> String {
    let mean = percent(super::statistics::mean(shares));
    match deviation(shares) {
        Some(deviation) => format!("{mean} ± {}", percent(deviation)),
        None => mean,
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

/// A difference of shares in percentage points, with its sign.
fn points(share: f64) -> String {
    let text = format!("{:+.1}", 100.0 * share);
    match text.as_str() {
        "-0.0" | "+0.0" => "0.0".to_string(),
        _ => text.replace('-', "−"),
    }
}

fn p_value(p: f64) -> String {
    match p {
        p if p < 0.001 => "< 0.001".to_string(),
        p if p >= 0.995 => "1".to_string(),
        p => format!("{p:.3}"),
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Distinguishable => "distinguishable",
        Verdict::OnlyAlone => "not distinguishable among so many pairs",
        Verdict::Not => "not distinguishable",
    }
}

fn forgotten(row: &Row) -> String {
    let Some(change) = row.forgetting else {
        return NOTHING.to_string();
    };
    let (before, after) = (percent(change.before), percent(change.after));
    match change.deviation {
        Some(deviation) => format!("{before} → {after} ± {}", percent(deviation)),
        None => format!("{before} → {after}"),
    }
}

fn defect(row: &Row) -> String {
    match row.rotation {
        Some(rotation) if rotation.defect.is_finite() => format!("{:.1e}", rotation.defect),
        Some(_) => "diverged".to_string(),
        None => NOTHING.to_string(),
    }
}

fn angle(row: &Row) -> String {
    match row.rotation {
        Some(rotation) if rotation.angle.is_finite() => {
            format!("{:.1}°", rotation.angle.to_degrees())
        }
        Some(_) => "diverged".to_string(),
        None => NOTHING.to_string(),
    }
}

/// As file managers and PEFT count them, with powers of 1000.
fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        bytes if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        bytes => format!("{:.1} kB", bytes / 1e3),
    }
}

/// `a, b and c`
fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Preset, Setting, examples};

    fn rendered(protocol: &Protocol, outcomes: &[Outcome]) -> String {
        let bootstrap = Bootstrap {
            resamples: 2_000,
            ..Bootstrap::default()
        };
        let summaries = Summary::of(protocol, outcomes, &bootstrap).unwrap();
        markdown(protocol, outcomes, &summaries, &bootstrap)
    }

    fn assert_contains(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_finished_comparison_says_what_is_distinguishable_and_shows_the_numbers() {
        let protocol = examples::quick();
        let outcomes = examples::finished(&protocol, 400, examples::right);
        let text = rendered(&protocol, &outcomes);
        assert_contains(
            &text,
            &[
                "## textiles",
                "On textiles (5 seeds, 400 test images), ",
                "), LoRA r=4, OFT b=16, BOFT b=8 m=2 and full are ahead of linear probe. \
                 Not distinguishable: LoRA r=4, OFT b=16, BOFT b=8 m=2 and full.",
                "| BOFT b=8 m=2 | 3e-3\\* | 90.0 ± 0.0 | ",
                "| 90.0 → 80.0 ± 0.0 | 12165 | 104.1 kB | 33.9 | 314.6 MB | 9.6e-7 | 20.1° | 0.2 |",
                "minus linear probe | +40.0 | +",
                "| 0.010 | distinguishable |",
                "**3e-3: 0.0229**",
                &protocol.identity(),
            ],
        );
        assert!(!text.contains("Unfinished"), "{text}");
    }

    #[test]
    fn every_row_of_a_table_has_as_many_cells_as_its_head() {
        let sweep = Preset::Cayley.protocol(Setting::example(&["textiles"]));
        for protocol in [examples::quick(), sweep] {
            let text = rendered(
                &protocol,
                &examples::finished(&protocol, 40, examples::right),
            );
            let mut cells = None;
            for line in text.lines() {
                let count = line.starts_with('|').then(|| line.matches('|').count());
                assert!(
                    cells.is_none() || count.is_none() || cells == count,
                    "{line}"
                );
                cells = count;
            }
        }
    }

    #[test]
    fn an_unfinished_comparison_shows_what_there_is() {
        let protocol = examples::quick();
        let outcomes = examples::finished(&protocol, 40, examples::right);
        assert_contains(
            &rendered(&protocol, &outcomes[..2]),
            &[
                "*Unfinished: 2 of 40 runs are done.*",
                "| linear probe | 3e-3: 0.0229 | 1e-2: 0.5000 | 3e-2: – |",
            ],
        );
        assert_contains(&rendered(&protocol, &[]), &["0 of 40", "## textiles"]);
    }

    #[test]
    fn a_sweep_has_a_column_for_each_map_and_a_row_for_each_rate() {
        let protocol = Preset::Cayley.protocol(Setting::example(&["textiles"]));
        let text = rendered(
            &protocol,
            &examples::finished(&protocol, 40, examples::right),
        );
        assert_contains(
            &text,
            &[
                "| learning rate | OFT b=32 | OFT b=32 Neumann 3 | OFT b=32 Neumann 5 | OFT b=32 Neumann 6 |",
                "| 3e-2 | 50.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 ± 0.0 |",
                "| 3e-2 | 2.4e-7 | 4.8e-7 | 7.2e-7 | 9.6e-7 |",
                "| OFT b=32 Neumann 3 minus OFT b=32 at 3e-4 | +40.0 |",
                "OFT b=32 Neumann 6 at 3e-4 are ahead of OFT b=32 at 3e-4",
            ],
        );
        assert!(!text.contains("searched"), "{text}");
    }

    #[test]
    fn a_method_between_two_others_is_in_both_groups() {
        // A is ahead of C, but B can be told from neither.
        let protocol = examples::quick();
        let outcomes = examples::finished(&protocol, 400, examples::right);
        let mut summary = Summary::of(&protocol, &outcomes, &Bootstrap::default())
            .unwrap()
            .remove(0);
        summary.rows.truncate(3);
        summary
            .pairs
            .retain(|pair| pair.rows.iter().all(|&row| row < 3));
        for pair in &mut summary.pairs {
            pair.verdict = match pair.rows.contains(&0) && pair.rows.contains(&2) {
                true => Verdict::Distinguishable,
                false => Verdict::OnlyAlone,
            };
        }
        assert_eq!(
            sentence(&summary),
            "On textiles (5 seeds, 400 test images), OFT b=16 is ahead of linear probe. Not distinguishable: linear probe and \
             LoRA r=4; LoRA r=4 and OFT b=16."
        );
    }

    #[test]
    fn nothing_is_ahead_where_all_methods_are_alike() {
        let protocol = examples::quick();
        let outcomes = examples::finished(&protocol, 40, |_, _, image| image % 4 != 0);
        let text = rendered(&protocol, &outcomes);
        assert_contains(
            &text,
            &[
                "no two methods are distinguishable.",
                "| 0.0 | 0.0 to 0.0 | 1 |",
            ],
        );
        assert!(!text.contains("ahead"), "{text}");
    }

    #[test]
    fn numbers_are_rounded_for_readers() {
        assert_eq!(
            [-0.0004, 0.0, 0.0126, -0.02].map(points),
            ["0.0", "0.0", "+1.3", "−2.0"]
        );
        assert_eq!(
            [0.0002, 0.0123, 1.0].map(p_value),
            ["< 0.001", "0.012", "1"]
        );
        assert_eq!(
            [900, 2_500_000, 3_210_000_000].map(bytes),
            ["0.9 kB", "2.5 MB", "3.21 GB"]
        );
        assert_eq!(list(&["a".into(), "b".into(), "c".into()]), "a, b and c");
        assert_eq!(
            table(&["a|b", "c"], [vec!["1".into(), "2".into()]])
                .lines()
                .next(),
            Some("| a\\|b | c |")
        );
    }
}
