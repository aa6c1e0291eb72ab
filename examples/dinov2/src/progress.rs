//! What a training run shows while it runs.

use std::collections::HashMap;
use std::io::IsTerminal;

use burn::train::Interrupter;
use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining,
};

/// How much a training run shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Burn's dashboard if the output is a terminal, otherwise a line per epoch.
    Shown,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// The renderer for one run.
    pub fn renderer(self, interrupter: Interrupter) -> Box<dyn MetricsRenderer> {
        match self {
            Self::Shown if std::io::stdout().is_terminal() => {
                Box::new(TuiMetricsRendererWrapper::new(interrupter, None))
            }
            Self::Shown => Box::new(EpochLines::new(true)),
            Self::Quiet => Box::new(EpochLines::new(false)),
        }
    }
}

/// One line per epoch. Burn's `CliMetricsRenderer` prints a line per batch and no metric.
struct EpochLines {
    shown: bool,
    epochs: usize,
    names: HashMap<MetricId, String>,
    train: Vec<String>,
    valid: Vec<String>,
}

impl EpochLines {
    fn new(shown: bool) -> Self {
        Self {
            shown,
            epochs: 0,
            names: HashMap::new(),
            train: Vec::new(),
            valid: Vec::new(),
        }
    }

    /// `loss 0.123`, once an epoch is complete.
    fn part(&self, state: MetricState) -> Option<String> {
        let MetricState::Numeric(entry, Some(NumericEntry::Final(value))) = state else {
            return None;
        };
        let name = self.names.get(&entry.metric_id)?;
        Some(match name.as_str() {
            "accuracy" => format!("{name} {value:5.1} %"),
            _ => format!("{name} {value:.3}"),
        })
    }
}

impl MetricsRendererTraining for EpochLines {
    fn update_train(&mut self, state: MetricState) {
        self.train.extend(self.part(state));
    }

    fn update_valid(&mut self, state: MetricState) {
        self.valid.extend(self.part(state));
    }
}

impl TrainingProgressLogger for EpochLines {
    fn start(&mut self, epochs: usize, _first: usize, _items: Option<usize>, label: Option<&str>) {
        self.epochs = epochs;
        if self.shown {
            println!("training: {}", label.unwrap_or("model"));
        }
    }

    fn update_epoch(&mut self, epoch: usize) {
        let (train, valid) = (self.train.join(", "), self.valid.join(", "));
        if self.shown {
            println!(
                "  epoch {epoch:>3}/{}   train {train}   valid {valid}",
                self.epochs
            );
        }
        self.train.clear();
        self.valid.clear();
    }

    fn start_split(&mut self, _split: &str, _items: usize) {}
    fn update_split(&mut self, _items: usize) {}
    fn end_split(&mut self) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _event: String) {}
}

impl EvaluationProgressLogger for EpochLines {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRendererEvaluation for EpochLines {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl MetricsRenderer for EpochLines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names
            .insert(definition.metric_id, definition.name.to_lowercase());
    }
}
