//! `compare`: methods under one protocol.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Device;
use burn::train::Interrupter;
use burn_boft::{Transformers, summary};
use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAllocTrait};
use xxhash_rust::xxh3::xxh3_64;

use super::INTERRUPTED;
use super::opened::{open_checkpoint, processor, sized, stop_on_interrupt, with_head, with_method};
use crate::cli::Compare;
use crate::digits;
use crate::error::Error;
use crate::evidence::plot::figures;
use crate::evidence::statistics::Bootstrap;
use crate::evidence::table::markdown;
use crate::evidence::{
    Cost, Entry, Forgetting, Ledger, Measured, Outcome, Protocol, Rotation, Run, Setting, Stage,
    Summary, Test, Validation,
};
use crate::images::{Loader, Processor, Sample};
use crate::inference::{INFERENCE_BATCH, features, predict};
use crate::knn;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;
use crate::run::write_whole;
use crate::settings::processors;
use crate::task::{Task, limited};
use crate::training::progress::Progress;
use crate::training::{Loaders, Recipe, Rotations, Trained, train};
use crate::weights::{self, Checkpoint, Saved};

/// The file of all results, and the table made of them.
const LEDGER: &str = "results.jsonl";
const TABLE: &str = "RESULTS.md";
/// Neighbours that vote on an image of the second data set.
const NEIGHBOURS: usize = 5;

/// Runs what is left of a comparison, and writes its tables and figures.
///
/// # Errors
///
/// The model, the images or the results of an earlier part cannot be used, or a training failed.
pub fn run(request: &Compare) -> Result<ExitCode, Error> {
    let interrupter = Interrupter::new();
    stop_on_interrupt(&interrupter)?;
    let mut comparison = Comparison::open(request)?;
    let protocol = comparison.protocol(request)?;
    comparison.reduce(&protocol);
    fs::create_dir_all(&request.output).map_err(|source| Error::Path {
        path: request.output.clone(),
        source,
    })?;
    let mut ledger = Ledger::open(&request.output.join(LEDGER), &protocol)?;
    while let Some(run) = protocol.next(ledger.outcomes()) {
        let (done, total) = protocol.progress(ledger.outcomes());
        println!("{} of {total}: {run}", done + 1);
        let Some(outcome) = comparison.carry_out(&protocol, run, &interrupter)? else {
            println!("stopped; the same command goes on with the rest");
            return Ok(ExitCode::from(INTERRUPTED));
        };
        println!("  {}", described(&outcome));
        ledger.append(outcome)?;
        write_tables(&protocol, ledger.outcomes(), &request.output)?;
    }
    let table = write_tables(&protocol, ledger.outcomes(), &request.output)?;
    println!("\n{table}");
    println!("wrote {}", request.output.join(TABLE).display());
    Ok(ExitCode::SUCCESS)
}

/// What all runs of a comparison share.
struct Comparison {
    checkpoint: Checkpoint,
    device: Device,
    tasks: BTreeMap<String, Task>,
    /// The second data set, with its name.
    remembered: Option<(String, Task)>,
    /// The accuracy of neighbours by the features of the pretrained model; computed once.
    before: Option<f64>,
    workers: usize,
}

impl Comparison {
    fn open(request: &Compare) -> Result<Self, Error> {
        if request.model.is_some() == request.data.is_empty() {
            let text =
                "--model and --data belong together: a pretrained model, and images to learn";
            return Err(Error::Settings(text.to_string()));
        }
        let checkpoint = open_checkpoint(request.model.as_deref())?;
        let mut preparation = processor(&checkpoint, None)?;
        if let Some(size) = request.image_size {
            preparation = sized(preparation, size, &checkpoint)?;
        }
        let mut tasks = BTreeMap::new();
        for path in &request.data {
            let name = path.file_name().unwrap_or(path.as_os_str());
            let name = name.to_string_lossy().into_owned();
            let task = Task::folder(path, preparation.clone(), 0, false)?;
            if tasks.insert(name.clone(), task).is_some() {
                return Err(Error::Settings(format!(
                    "two folders of --data are called {name}"
                )));
            }
        }
        if tasks.is_empty() {
            tasks.insert("new digits".to_string(), Task::digits(digits::NEW, 0));
        }
        let remembered = match &request.remember {
            Some(path) => {
                let task = Task::folder(path, preparation, 0, false)?;
                let name = path.file_name().unwrap_or(path.as_os_str());
                Some((name.to_string_lossy().into_owned(), task))
            }
            None => Some(remembered_digits(&checkpoint, preparation)),
        };
        Ok(Self {
            checkpoint,
            device: request.device.device()?.autodiff(),
            tasks,
            remembered,
            before: None,
            workers: request.workers.unwrap_or_else(processors),
        })
    }

    /// The protocol of the preset, with what the flags change.
    fn protocol(&self, request: &Compare) -> Result<Protocol, Error> {
        let first = self.tasks.values().next();
        let image_size = first.map_or(0, |task| task.processor.width());
        let fingerprints = self.tasks.iter().map(|(name, task)| {
            let record = task.record();
            (name.clone(), record.fingerprint)
        });
        let mut protocol = request.preset.protocol(Setting {
            model: self.model()?,
            device: request.device.name(),
            dtype: "f32".to_string(),
            image_size,
            tasks: fingerprints.collect(),
            forgetting: self.remembered.as_ref().map(|(name, _)| name.clone()),
        });
        if !request.methods.is_empty() {
            let kept = |entry: &Entry| request.methods.iter().any(|name| name.is(&entry.method));
            protocol.entries.retain(kept);
        }
        if !request.rates.is_empty() {
            let mut rates = request.rates.clone();
            rates.sort_by(f64::total_cmp);
            for entry in &mut protocol.entries {
                entry.rates.clone_from(&rates);
            }
        }
        if let Some(seeds) = request.seeds {
            protocol.seeds = (0..seeds).collect();
        }
        let conditions = &mut protocol.conditions;
        // The head starts afresh with all methods, so it learns at the same rate with all of them.
        let width = self.checkpoint.config().hidden_size;
        conditions.head_rate = Some(Method::Linear.learning_rate(width));
        conditions.epochs = request.epochs.unwrap_or(conditions.epochs);
        conditions.max_steps = request.max_steps.or(conditions.max_steps);
        protocol.check()?;
        Ok(protocol)
    }

    /// The name of the model without its folder, and a fingerprint of some of its weights.
    fn model(&self) -> Result<String, Error> {
        let (model, _) = self.checkpoint.load(&["any".to_string()], &self.device)?;
        let norm = model.dinov2.layernorm.gamma.val().into_data();
        let token = model.dinov2.embeddings.cls_token.val().into_data();
        let bytes = [norm.as_bytes(), token.as_bytes()].concat();
        let name = Path::new(self.checkpoint.name());
        let name = name.file_name().unwrap_or(name.as_os_str());
        let fingerprint = xxh3_64(&bytes) >> 32;
        Ok(format!("{} {fingerprint:08x}", name.to_string_lossy()))
    }

    /// Leaves as many images as the protocol allows.
    fn reduce(&mut self, protocol: &Protocol) {
        let conditions = &protocol.conditions;
        for task in self.tasks.values_mut() {
            task.train = limited(&task.train, conditions.train_images);
            task.valid = limited(&task.valid, conditions.validation_images);
        }
    }

    /// Trains once, and measures; nothing if it was stopped.
    fn carry_out(
        &mut self,
        protocol: &Protocol,
        run: Run,
        interrupter: &Interrupter,
    ) -> Result<Option<Outcome>, Error> {
        let task = self.tasks[&run.task].clone();
        // Before the model is loaded, since what is held already does not count.
        INSTRUMENTED_SYSTEM.reset_peak_memory();
        let model = self.prepared(&run, &task)?;
        let trainable = summary(&model).trainable;
        let recipe = recipe(protocol, &run);
        let loaders = self.loaders(protocol, &task, &recipe)?;

        let label = run.to_string();
        let trained = train(
            model,
            &loaders,
            &recipe,
            None,
            &label,
            Progress::Quiet,
            interrupter,
        )?;
        if trained.stopped {
            return Ok(None);
        }
        let peak = Some(INSTRUMENTED_SYSTEM.get_peak_memory() as u64).filter(|peak| *peak > 0);
        let measured = match run.stage {
            Stage::Search => None,
            Stage::Final => Some(Measured {
                test: self.test(&trained.model, &task)?,
                forgetting: self.forgetting(&trained.model)?,
                cost: Cost {
                    trainable,
                    adapter_bytes: self.bytes(&run, &trained.model, &task)?,
                    step_ms: 1e3 * trained.step_seconds,
                    peak_bytes: peak,
                },
            }),
        };
        Ok(Some(outcome(protocol, run, &trained, measured)))
    }

    /// The model that a run starts from.
    fn prepared(&self, run: &Run, task: &Task) -> Result<Dinov2ForImageClassification, Error> {
        let (model, _) = with_head(&self.checkpoint, &task.classes, run.seed, &self.device)?;
        with_method(model, &run.method, run.seed)
    }

    fn loaders(&self, protocol: &Protocol, task: &Task, recipe: &Recipe) -> Result<Loaders, Error> {
        let augment = protocol.conditions.augment;
        Ok(Loaders {
            train: task.shuffled(recipe, augment, self.workers)?,
            valid: self.plain(task, &task.valid)?,
        })
    }

    fn plain(&self, task: &Task, samples: &Arc<[Sample]>) -> Result<Loader, Error> {
        Ok(task.plain(samples, INFERENCE_BATCH, self.workers)?)
    }

    fn test(&self, model: &Dinov2ForImageClassification, task: &Task) -> Result<Test, Error> {
        let model = model.clone().materialize();
        let predictions = predict(&model, &self.plain(task, &task.test)?)?;
        let answers = predictions.answers();
        let correct = answers.iter().zip(&predictions.labels).map(|(a, b)| a == b);
        Ok(Test {
            correct: correct.collect(),
        })
    }

    /// How well the classes of the second data set can still be told apart by the features.
    fn forgetting(
        &mut self,
        model: &Dinov2ForImageClassification,
    ) -> Result<Option<Forgetting>, Error> {
        let Some((_, task)) = &self.remembered else {
            return Ok(None);
        };
        let before = match self.before {
            Some(before) => before,
            None => {
                let (pretrained, _) = self.checkpoint.load(&task.classes, &self.device)?;
                self.neighbours(&pretrained.valid(), task)?
            }
        };
        let after = self.neighbours(&model.clone().materialize(), task)?;
        self.before = Some(before);
        Ok(Some(Forgetting { before, after }))
    }

    fn neighbours(&self, model: &Dinov2ForImageClassification, task: &Task) -> Result<f64, Error> {
        let known = features(model, &self.plain(task, &task.train)?)?;
        let asked = features(model, &self.plain(task, &task.test)?)?;
        Ok(knn::accuracy(&known.into(), &asked.into(), NEIGHBOURS))
    }

    /// The size of the file that holds what was trained.
    fn bytes(
        &self,
        run: &Run,
        model: &Dinov2ForImageClassification,
        task: &Task,
    ) -> Result<u64, Error> {
        let scratch = tempfile::tempdir().map_err(|source| Error::Path {
            path: std::env::temp_dir(),
            source,
        })?;
        let saved = Saved {
            model,
            method: &run.method,
            checkpoint: &self.checkpoint,
            labels: &task.classes,
            preprocessor: &task.processor.to_json(),
            names: Transformers::V5,
        };
        Ok(weights::save(&saved, &scratch.path().join("adapter"))?)
    }
}

/// The digits as the second data set: those that the embedded model has seen, or all of them as photographs.
fn remembered_digits(checkpoint: &Checkpoint, processor: Processor) -> (String, Task) {
    match checkpoint.is_embedded() {
        true => ("old digits".to_string(), Task::digits(digits::OLD, 0)),
        false => {
            let digits = Task::digits(0..=9, 0);
            (
                "digits".to_string(),
                Task {
                    processor,
                    ..digits
                },
            )
        }
    }
}

fn recipe(protocol: &Protocol, run: &Run) -> Recipe {
    let conditions = &protocol.conditions;
    Recipe {
        epochs: conditions.epochs,
        batch_size: conditions.batch_size,
        accumulate: 1,
        max_steps: conditions.max_steps,
        learning_rate: run.learning_rate,
        head_learning_rate: match run.method {
            // It trains nothing but the head.
            Method::Linear => run.learning_rate,
            _ => conditions.head_rate.unwrap_or(run.learning_rate),
        },
        warm_up: conditions.warm_up,
        weight_decay: conditions.weight_decay,
        clip_norm: conditions.clip_norm.unwrap_or(0.0),
        label_smoothing: conditions.label_smoothing as f32,
        patience: None,
        seed: run.seed,
    }
}

fn outcome(
    protocol: &Protocol,
    run: Run,
    trained: &Trained,
    measured: Option<Measured>,
) -> Outcome {
    let best = trained.best;
    Outcome {
        protocol: protocol.identity(),
        run,
        epoch: best.map(|best| best.epoch),
        validation: Validation {
            loss: best.map_or(f64::NAN, |best| best.loss),
            accuracy: best.map_or(0.0, |best| best.accuracy),
        },
        rotation: Rotations::of(&trained.model).map(|rotations| Rotation {
            defect: rotations.defect,
            angle: rotations.angle,
        }),
        seconds: trained.position.seconds,
        measured,
    }
}

fn described(outcome: &Outcome) -> String {
    let mut text = format!(
        "validation loss {:.3}, accuracy {:.1} %",
        outcome.validation.loss,
        100.0 * outcome.validation.accuracy
    );
    if let Some(measured) = &outcome.measured {
        text.push_str(&format!("; test {:.1} %", 100.0 * measured.test.accuracy()));
        if let Some(forgetting) = &measured.forgetting {
            text.push_str(&format!(
                ", neighbours {:.1} % before and {:.1} % after",
                100.0 * forgetting.before,
                100.0 * forgetting.after
            ));
        }
    }
    text.push_str(&format!("; {:.0} s", outcome.seconds));
    text
}

/// Writes tables and figures of what there is so far, and returns the tables.
fn write_tables(protocol: &Protocol, outcomes: &[Outcome], folder: &Path) -> Result<String, Error> {
    let bootstrap = Bootstrap::default();
    let summaries = Summary::of(protocol, outcomes, &bootstrap)?;
    let table = markdown(protocol, outcomes, &summaries, &bootstrap);
    write_whole(&folder.join(TABLE), table.as_bytes())?;
    for figure in figures(protocol, &summaries)? {
        write_whole(&folder.join(&figure.name), figure.svg.as_bytes())?;
    }
    Ok(table)
}
