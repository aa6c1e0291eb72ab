//! What a training run shows while it runs.

use std::collections::HashMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining,
};
use burn::train::{Interrupter, LearnerSummary};
use indicatif::HumanDuration;

/// Time between two lines within an epoch.
const PAUSE: Duration = Duration::from_secs(15);

/// How much a training run shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Burn's dashboard if the output is a terminal, and in any case a line per epoch.
    Shown,
    /// Lines, also on a terminal.
    Lines,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// The renderer for one run.
    pub fn renderer(self, interrupter: Interrupter) -> Box<dyn MetricsRenderer> {
        let terminal = std::io::stdout().is_terminal();
        let dashboard = (self == Self::Shown && terminal)
            .then(|| TuiMetricsRendererWrapper::new(interrupter, None));
        let output = match (self, &dashboard) {
            (Self::Quiet, _) => Output::None,
            // The dashboard covers the screen, so the lines wait until it has closed.
            (_, Some(_)) => Output::Later(String::new()),
            (_, None) => Output::Now,
        };
        Box::new(Screen {
            dashboard,
            lines: Lines::new(output),
        })
    }
}

/// A dashboard, or none, and the lines that stay.
struct Screen {
    dashboard: Option<TuiMetricsRendererWrapper>,
    lines: Lines,
}

/// Where lines go.
enum Output {
    Now,
    Later(String),
    None,
}

/// A line for each epoch, and one for a part of it now and then. Burn's `CliMetricsRenderer` prints a line per batch and no
/// metric.
struct Lines {
    output: Output,
    label: String,
    epochs: usize,
    epoch: usize,
    split: Split,
    items: usize,
    names: HashMap<MetricId, String>,
    train: Vec<(String, f64)>,
    valid: Vec<(String, f64)>,
    /// The latest values within the epoch.
    latest: HashMap<String, f64>,
    last_line: Instant,
    clock: Clock,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    Valid,
}

/// Estimates the time that is left from the time that has passed.
struct Clock {
    start: Instant,
    /// The share of the run that was done at the start.
    first: Option<f64>,
}

impl Clock {
    fn left(&mut self, share: f64) -> Option<Duration> {
        let first = *self.first.get_or_insert(share);
        let done = share - first;
        (done > 0.0).then(|| {
            self.start
                .elapsed()
                .mul_f64(((1.0 - share) / done).clamp(0.0, 1e6))
        })
    }
}

impl Lines {
    fn new(output: Output) -> Self {
        Self {
            output,
            label: String::new(),
            epochs: 0,
            epoch: 1,
            split: Split::Train,
            items: 0,
            names: HashMap::new(),
            train: Vec::new(),
            valid: Vec::new(),
            latest: HashMap::new(),
            last_line: Instant::now(),
            clock: Clock {
                start: Instant::now(),
                first: None,
            },
        }
    }

    fn write(&mut self, line: &str) {
        match &mut self.output {
            Output::Now => println!("{line}"),
            Output::Later(lines) => {
                let _ = writeln!(lines, "{line}");
            }
            Output::None => {}
        }
    }

    /// Keeps a value that a metric reports.
    fn read(&mut self, state: MetricState, split: Split) {
        let MetricState::Numeric(entry, Some(value)) = state else {
            return;
        };
        let Some(name) = self.names.get(&entry.metric_id) else {
            return;
        };
        match value {
            NumericEntry::Final(value) if !value.is_nan() => match split {
                Split::Train => self.train.push((name.clone(), value)),
                Split::Valid => self.valid.push((name.clone(), value)),
            },
            NumericEntry::Final(_) => {}
            NumericEntry::Value(value) => {
                self.latest.insert(name.clone(), value);
            }
            NumericEntry::Aggregated {
                aggregated_value, ..
            } => {
                self.latest.insert(name.clone(), aggregated_value);
            }
        }
    }

    fn left(&mut self, share: f64) -> String {
        match self.clock.left(share) {
            Some(left) => format!(", {} left", HumanDuration(left)),
            None => String::new(),
        }
    }
}

/// `loss 0.123, accuracy 98.7 %`, in the order that one reads them.
fn listed(values: &[(String, f64)]) -> String {
    const ORDER: [&str; 7] = [
        "loss",
        "accuracy",
        "learning rate",
        "images per second",
        "peak memory",
        "orthogonality defect",
        "largest angle",
    ];
    let parts: Vec<String> = ORDER
        .iter()
        .filter_map(|name| values.iter().find(|(found, _)| found == name))
        .map(|(name, value)| match name.as_str() {
            "accuracy" => format!("{name} {value:.1} %"),
            "learning rate" => format!("rate {value:.2e}"),
            "images per second" => format!("{value:.0} images/s"),
            "peak memory" => format!("peak {value:.0} MiB"),
            "orthogonality defect" => format!("defect {value:.1e}"),
            "largest angle" => format!("largest angle {value:.2}°"),
            _ => format!("{name} {value:.3}"),
        })
        .collect();
    parts.join(", ")
}

impl MetricsRendererTraining for Screen {
    fn update_train(&mut self, state: MetricState) {
        if let (Some(dashboard), Some(state)) = (&mut self.dashboard, copied(&state)) {
            dashboard.update_train(state);
        }
        self.lines.read(state, Split::Train);
    }

    fn update_valid(&mut self, state: MetricState) {
        if let (Some(dashboard), Some(state)) = (&mut self.dashboard, copied(&state)) {
            dashboard.update_valid(state);
        }
        self.lines.read(state, Split::Valid);
    }

    fn on_train_end(
        &mut self,
        summary: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let ended = match self.dashboard.take() {
            Some(mut dashboard) => {
                let ended = dashboard.on_train_end(summary);
                // Leaves the screen of the dashboard, so that what is printed from here on stays.
                drop(dashboard);
                ended
            }
            None => Ok(()),
        };
        if let Output::Later(lines) = &mut self.lines.output {
            print!("{}", std::mem::take(lines));
            self.lines.output = Output::Now;
        }
        ended
    }
}

/// A copy of a state, which Burn does not offer.
fn copied(state: &MetricState) -> Option<MetricState> {
    Some(match state {
        MetricState::Generic(entry) => MetricState::Generic(entry.clone()),
        MetricState::Numeric(entry, value) => MetricState::Numeric(entry.clone(), value.clone()),
    })
}

impl TrainingProgressLogger for Screen {
    fn start(&mut self, epochs: usize, first: usize, items: Option<usize>, label: Option<&str>) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.start(epochs, first, items, label);
        }
        self.lines.epochs = epochs;
        self.lines.label = label.unwrap_or("model").to_string();
        let line = format!("training: {}", self.lines.label);
        self.lines.write(&line);
    }

    fn update_epoch(&mut self, epoch: usize) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.update_epoch(epoch);
        }
        let lines = &mut self.lines;
        let share = epoch as f64 / lines.epochs.max(1) as f64;
        let left = match epoch < lines.epochs {
            true => lines.left(share),
            false => String::new(),
        };
        let (train, valid) = (listed(&lines.train), listed(&lines.valid));
        let line = format!(
            "  epoch {epoch:>3}/{}   train: {train}   valid: {valid}{left}",
            lines.epochs
        );
        lines.write(&line);
        lines.last_line = Instant::now();
        lines.epoch = epoch + 1;
        lines.train.clear();
        lines.valid.clear();
    }

    fn start_split(&mut self, split: &str, items: usize) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.start_split(split, items);
        }
        self.lines.items = items;
        self.lines.split = match split {
            "train" => Split::Train,
            _ => Split::Valid,
        };
        self.lines.latest.clear();
    }

    fn update_split(&mut self, done: usize) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.update_split(done);
        }
        let lines = &mut self.lines;
        if lines.split == Split::Valid {
            return;
        }
        let of_epoch = done as f64 / lines.items.max(1) as f64;
        let share = (lines.epoch as f64 - 1.0 + of_epoch) / lines.epochs.max(1) as f64;
        let left = lines.left(share);
        if lines.last_line.elapsed() < PAUSE {
            return;
        }
        lines.last_line = Instant::now();
        let mut latest: Vec<(String, f64)> = lines.latest.clone().into_iter().collect();
        latest.sort_by(|a, b| a.0.cmp(&b.0));
        let line = format!(
            "  epoch {:>3}/{}   {done} of {} images: {}{left}",
            lines.epoch,
            lines.epochs,
            lines.items,
            listed(&latest),
        );
        lines.write(&line);
    }

    fn end_split(&mut self) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.end_split();
        }
    }

    fn end(&mut self) {
        if let Some(dashboard) = &mut self.dashboard {
            TrainingProgressLogger::end(dashboard);
        }
    }

    fn log_event_training(&mut self, event: String) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.log_event_training(event);
        }
    }
}

impl EvaluationProgressLogger for Screen {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRendererEvaluation for Screen {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl MetricsRenderer for Screen {
    fn manual_close(&mut self) {
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.manual_close();
        }
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.lines
            .names
            .insert(definition.metric_id.clone(), definition.name.to_lowercase());
        if let Some(dashboard) = &mut self.dashboard {
            dashboard.register_metric(definition);
        }
    }
}
