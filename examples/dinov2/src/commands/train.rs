//! `train`: adapts a model to images, compares it with a linear probe, and saves what was trained.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::prelude::*;
use burn::train::Interrupter;
use burn_boft::{Transformers, summary};

use super::INTERRUPTED;
use super::opened::{open_adapter, open_checkpoint, processor, sized, stop_on_interrupt};
use crate::cli::Train;
use crate::digits;
use crate::error::Error;
use crate::images::{Loader, LoaderSettings, Processor, Sample, Source};
use crate::inference::{Predictions, features, predict};
use crate::memory;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;
use crate::precision;
use crate::run::{ProbeScores, Results, RunFolder, write_whole};
use crate::settings::{Augment, Options, Settings, Subject};
use crate::task::{Task, limited};
use crate::training::head::Probe;
use crate::training::progress::Progress;
use crate::training::{Loaders, Recipe, Trained, train};
use crate::weights::{self, AdapterFolder, Checkpoint, HeadOrigin, Saved};

/// Images that pass through a model at a time when it is not trained.
const INFERENCE_BATCH: usize = 64;
/// The learning rates that `--find-rate` tries, as multiples of the default, and how far each run goes.
const TRIED: [f64; 5] = [0.1, 0.3, 1.0, 3.0, 10.0];
const TRIAL_EPOCHS: usize = 3;

/// Trains, and saves what was trained.
///
/// # Errors
///
/// Everything that is wrong with settings, images or files is found before the training, as far as it can be.
pub fn run(request: Train) -> Result<ExitCode, Error> {
    let interrupter = Interrupter::new();
    stop_on_interrupt(&interrupter)?;
    let progress = match request.plain {
        true => Progress::Lines,
        false => Progress::Shown,
    };
    let (run, job) = match &request.resume {
        Some(path) => {
            if request.options != Options::default() {
                let text = "--resume goes on with the settings of the run and takes no others";
                return Err(Error::Settings(text.to_string()));
            }
            let run = RunFolder::resume(path)?;
            if run.results()?.is_some() {
                println!("{} is done already", path.display());
                return Ok(ExitCode::SUCCESS);
            }
            let job = Job::open(run.settings())?;
            (run, job)
        }
        None => begin(&request, progress, &interrupter)?,
    };
    run.check_task(&job.task.record())?;
    job.describe();
    job.run(&run, progress, &interrupter)
}

/// Chooses the settings of a new run, and makes its folder.
fn begin(
    request: &Train,
    progress: Progress,
    interrupter: &Interrupter,
) -> Result<(RunFolder, Job), Error> {
    let options = match &request.settings {
        Some(path) => request.options.over_file(path)?,
        None => request.options.clone(),
    };
    options.check()?;
    let checkpoint = open_checkpoint(options.model.as_deref())?;
    let adapter = options.adapter.as_deref().map(open_adapter).transpose()?;
    let settings = options.resolve(&Subject {
        width: checkpoint.config().hidden_size,
        photographs: !checkpoint.is_embedded(),
        adapter: adapter.map(|adapter| adapter.method()),
    })?;
    let mut job = Job::with(checkpoint, &settings)?;
    // Sizes that do not fit are found before anything is written or trained.
    drop(job.prepared()?);
    let output = request.output.clone();
    let output = output.unwrap_or_else(|| RunFolder::free("dinov2-output"));
    if options.accumulate.is_none() {
        job.fit_memory();
    }
    if options.find_rate == Some(true) {
        job.find_rate(progress, interrupter)?;
    }
    let run = RunFolder::create(&output, job.settings.clone(), request.overwrite)?;
    Ok((run, job))
}

/// Everything that a training needs.
struct Job {
    settings: Settings,
    checkpoint: Checkpoint,
    task: Task,
    device: Device,
}

impl Job {
    fn open(settings: &Settings) -> Result<Self, Error> {
        Self::with(open_checkpoint(settings.model.as_deref())?, settings)
    }

    fn with(checkpoint: Checkpoint, settings: &Settings) -> Result<Self, Error> {
        let mut device = settings.device.device()?.autodiff();
        if settings.gradient_checkpointing {
            device = device.gradient_checkpointing();
        }
        settings.dtype.check(&device)?;
        let seed = settings.recipe.seed;
        let task = match &settings.data {
            Some(path) => {
                let mut processor = processor(&checkpoint, None)?;
                if let Some(size) = settings.image_size {
                    processor = sized(processor, size, &checkpoint)?;
                }
                check_channels(&processor, &checkpoint)?;
                Task::folder(path, processor, seed, settings.skip_corrupt)?
            }
            None => Task::digits(digits::NEW, seed),
        };
        // A run that ends after a few steps does not evaluate longer than it trains.
        let recipe = &settings.recipe;
        let evaluated = recipe.max_steps.map(|steps| steps * recipe.batch_size);
        let task = Task {
            valid: limited(&task.valid, evaluated),
            test: limited(&task.test, evaluated),
            ..task
        };
        Ok(Self {
            settings: settings.clone(),
            checkpoint,
            task,
            device,
        })
    }

    fn describe(&self) {
        let Task {
            classes,
            train,
            valid,
            test,
            ..
        } = &self.task;
        println!(
            "{} classes: {}; {} images to train on, {} to validate, {} to test",
            classes.len(),
            shortened(classes),
            train.len(),
            valid.len(),
            test.len(),
        );
    }

    /// The pretrained model with its head, in the precision that was chosen. The same seed gives every method the same
    /// head.
    fn pretrained(&self) -> Result<(Dinov2ForImageClassification, HeadOrigin), Error> {
        self.device.seed(self.settings.recipe.seed);
        let (model, origin) = self.checkpoint.load(&self.task.classes, &self.device)?;
        // Burn draws the random numbers of a parameter when it is first read, so the head is read here, before a method
        // draws numbers of its own.
        model.classifier.weight.val();
        model.classifier.bias.as_ref().map(Param::val);
        Ok((precision::cast(model, self.settings.dtype), origin))
    }

    /// The model ready to train: with a new adapter, or with the one that it starts from.
    fn prepared(&self) -> Result<(Dinov2ForImageClassification, HeadOrigin), Error> {
        let (model, origin) = self.pretrained()?;
        let model = match &self.settings.adapter {
            Some(folder) => AdapterFolder::open(folder)?.attach(model)?,
            None => self.settings.method.prepare(model)?,
        };
        Ok((model, origin))
    }

    fn loaders(&self) -> Result<Loaders, Error> {
        let Settings {
            recipe,
            augment,
            workers,
            skip_corrupt,
            ..
        } = &self.settings;
        let train = Loader::new(
            self.task.train.clone(),
            self.task.processor.clone(),
            LoaderSettings {
                batch_size: recipe.batch_size,
                shuffle_seed: Some(recipe.seed),
                augment: *augment == Augment::Standard,
                label_smoothing: recipe.label_smoothing,
                workers: *workers,
                skip_corrupt: *skip_corrupt,
            },
        )?;
        Ok(Loaders {
            train,
            valid: self.plain(&self.task.valid)?,
        })
    }

    fn plain(&self, samples: &Arc<[Sample]>) -> Result<Loader, Error> {
        let batch = INFERENCE_BATCH.min(self.settings.recipe.part_size().max(8));
        Ok(self.task.plain(samples, batch, self.settings.workers)?)
    }

    /// Computes a batch in as many parts as it needs to fit the memory, and says so.
    fn fit_memory(&mut self) {
        let config = self.checkpoint.config();
        let size = [self.task.processor.height(), self.task.processor.width()];
        let recipe = &mut self.settings.recipe;
        let image = memory::per_image(config, size);
        let Some(free) = memory::available(self.settings.device) else {
            return;
        };
        let fitting = (free / image).max(1) as usize;
        if fitting < recipe.batch_size {
            recipe.accumulate = recipe.batch_size.div_ceil(fitting);
            println!(
                "a batch of {} images takes about {} MiB and {} MiB are free, so it is computed in {} parts of at most {} images",
                recipe.batch_size,
                (image * recipe.batch_size as u64) >> 20,
                free >> 20,
                recipe.accumulate,
                recipe.part_size(),
            );
        }
    }

    /// Tries several learning rates in short runs, and takes the one with the lowest validation loss.
    fn find_rate(&mut self, progress: Progress, interrupter: &Interrupter) -> Result<(), Error> {
        let default = self.settings.recipe.learning_rate;
        println!("looking for a learning rate: {TRIAL_EPOCHS} epochs each");
        let mut best: Option<(f64, f64)> = None;
        for rate in TRIED
            .map(|factor| factor * default)
            .into_iter()
            .filter(|rate| *rate <= 1.0)
        {
            let recipe = Recipe {
                epochs: TRIAL_EPOCHS.min(self.settings.recipe.epochs),
                learning_rate: rate,
                head_learning_rate: self.rate_of_head(rate),
                ..self.settings.recipe.clone()
            };
            let (model, _) = self.prepared()?;
            let trained = train(
                model,
                &self.loaders()?,
                &recipe,
                None,
                &format!("learning rate {rate:.1e}"),
                match progress {
                    Progress::Shown => Progress::Lines,
                    other => other,
                },
                interrupter,
            )?;
            if trained.stopped {
                return Err(Error::Settings(
                    "stopped while looking for a learning rate".to_string(),
                ));
            }
            let loss = trained.best.map_or(f64::INFINITY, |best| best.loss);
            println!("learning rate {rate:.1e}: validation loss {loss:.3}");
            if best.is_none_or(|(_, lowest)| loss < lowest) {
                best = Some((rate, loss));
            }
        }
        if let Some((rate, _)) = best {
            println!("learning rate {rate:.1e} is taken");
            self.settings.recipe.learning_rate = rate;
            self.settings.recipe.head_learning_rate = self.rate_of_head(rate);
        }
        Ok(())
    }

    /// The learning rate of the head beside one that is tried: its own, unless nothing else is trained.
    fn rate_of_head(&self, rate: f64) -> f64 {
        match self.settings.method {
            Method::Linear => rate,
            _ => self.settings.recipe.head_learning_rate,
        }
    }

    fn run(
        &self,
        run: &RunFolder,
        progress: Progress,
        interrupter: &Interrupter,
    ) -> Result<ExitCode, Error> {
        let Settings { method, recipe, .. } = &self.settings;
        let (mut model, origin) = self.prepared()?;
        match &origin {
            _ if self.settings.adapter.is_some() => println!("the head is that of the adapter"),
            HeadOrigin::Checkpoint => {
                println!("the head is that of the model: the classes are the same")
            }
            HeadOrigin::Fresh { reason } => println!("the head starts afresh: {reason}"),
        }
        let sizes = summary(&model);
        println!("{method}: {sizes}");
        if let Some(note) = method.adjusted(&sizes) {
            println!("{note}");
        }
        println!(
            "learning rate {:.1e}, {} epochs of {} images in batches of {}",
            recipe.learning_rate,
            recipe.epochs,
            self.task.train.len(),
            recipe.batch_size,
        );

        let probe = self.probe(run)?;
        if interrupter.should_stop() {
            return Ok(interrupted(run, 0));
        }
        if let Some((Some(probe), _)) = &probe
            && self.settings.warm_start
        {
            model = probe.put_into(model);
        }
        let trained = train(
            model,
            &self.loaders()?,
            recipe,
            Some(&run.training()),
            &method.to_string(),
            progress,
            interrupter,
        )?;
        if trained.stopped {
            return Ok(interrupted(run, trained.position.step));
        }
        self.finish(
            run,
            trained,
            sizes.trainable,
            probe.map(|(_, scores)| scores),
        )?;
        Ok(ExitCode::SUCCESS)
    }

    /// Trains the linear probe on the features of the frozen backbone, which are computed once, and saves it. A run that
    /// goes on does not need it again, unless its head starts from there.
    fn probe(&self, run: &RunFolder) -> Result<Option<(Option<Probe>, ProbeScores)>, Error> {
        if !self.settings.probe && !self.settings.warm_start {
            return Ok(None);
        }
        let begun = run.training().checkpoints.newest()?.is_some();
        if let Some(scores) = run
            .probe_scores()?
            .filter(|_| begun || !self.settings.warm_start)
        {
            return Ok(Some((None, scores)));
        }
        let (model, _) = self.pretrained()?;
        let model = model.valid();
        let limit = self.settings.recipe.max_steps;
        let limit = limit.map(|steps| steps * self.settings.recipe.batch_size);
        let known = limited(&self.task.train, limit);
        let rows = |samples| features(&model, &self.plain(samples)?);
        let (train, valid) = (rows(&known)?, rows(&self.task.valid)?);
        let test = rows(&self.task.test)?;
        let classes = self.task.classes.len();
        let probe = Probe::train(&train, &valid, classes, self.settings.recipe.seed);
        let scores = ProbeScores {
            valid_loss: probe.valid.loss,
            valid_accuracy: probe.valid.accuracy,
            test_accuracy: probe.score(&test).accuracy,
        };
        println!(
            "linear probe on the frozen backbone: learning rate {:.0e}, epoch {}, validation loss {:.3}, validation accuracy {:.1} %",
            probe.learning_rate,
            probe.epoch,
            scores.valid_loss,
            100.0 * scores.valid_accuracy,
        );
        let model = Method::Linear.prepare(probe.put_into(model))?;
        self.save(&model, &Method::Linear, &run.probe())?;
        run.save_probe_scores(&scores)?;
        Ok(Some((Some(probe), scores)))
    }

    /// Saves the trained model, and says how it does on the test images.
    fn finish(
        &self,
        run: &RunFolder,
        trained: Trained,
        trainable: usize,
        probe: Option<ProbeScores>,
    ) -> Result<(), Error> {
        let method = &self.settings.method;
        let Some(best) = trained.best else {
            return Err(Error::Training(
                "no epoch had a validation loss that is a number; a lower --learning-rate may help"
                    .to_string(),
            ));
        };
        println!(
            "{method}: best epoch {}, validation loss {:.3}, validation accuracy {:.1} %",
            best.epoch,
            best.loss,
            100.0 * best.accuracy,
        );
        let bytes = self.save(&trained.model, method, &run.adapter())?;
        let test = self.plain(&self.task.test)?;
        let predictions = predict(&trained.model.clone().materialize(), &test)?;
        self.write_predictions(&predictions, &run.predictions())?;
        if let Some(probe) = probe {
            println!(
                "accuracy before: {:.1} % (linear probe on the frozen backbone)",
                100.0 * probe.test_accuracy,
            );
        }
        println!(
            "accuracy after:  {:.1} % ({method})",
            100.0 * predictions.accuracy(),
        );
        println!(
            "saved {} ({:.1} kB): what was trained, nothing else",
            run.adapter().display(),
            bytes as f64 / 1e3,
        );
        self.check_merged(&trained.model, &predictions)?;
        if let Some(probe) = probe.filter(|probe| probe.valid_accuracy > best.accuracy) {
            eprintln!(
                "warning: the linear probe does better on the validation images, {:.1} % against {:.1} %; \
                 try --find-rate, a lower --learning-rate than {:.1e}, or --warm-start",
                100.0 * probe.valid_accuracy,
                100.0 * best.accuracy,
                self.settings.recipe.learning_rate,
            );
        }
        run.save_results(&Results {
            method: method.to_string(),
            trainable_parameters: trainable,
            best_epoch: best.epoch,
            valid_loss: best.loss,
            valid_accuracy: best.accuracy,
            test_accuracy: predictions.accuracy(),
            seconds: trained.position.seconds,
        })
    }

    fn save(
        &self,
        model: &Dinov2ForImageClassification,
        method: &Method,
        folder: &Path,
    ) -> Result<u64, Error> {
        let saved = Saved {
            model,
            method,
            checkpoint: &self.checkpoint,
            labels: &self.task.classes,
            preprocessor: &self.task.processor.to_json(),
            names: Transformers::V5,
        };
        Ok(weights::save(&saved, folder)?)
    }

    /// Writes a line of JSON for each test image, which the report reads.
    fn write_predictions(&self, predictions: &Predictions, path: &Path) -> Result<(), Error> {
        let mut text = String::new();
        let rows = predictions.logits.iter().zip(&predictions.labels);
        for (index, (logits, label)) in predictions.samples.iter().zip(rows) {
            let image = match &self.task.test[*index].source {
                Source::File(path) => Some(path.display().to_string()),
                Source::Grey(_) => None,
            };
            let line = serde_json::json!({ "image": image, "label": label, "logits": logits });
            writeln!(text, "{line}").map_err(|error| Error::Training(error.to_string()))?;
        }
        write_whole(path, text.as_bytes())
    }

    /// Compares the predictions of the merged model with those of the adapted one.
    fn check_merged(
        &self,
        model: &Dinov2ForImageClassification,
        adapted: &Predictions,
    ) -> Result<(), Error> {
        let Some(merged) = self.settings.method.merged(model.clone())? else {
            return Ok(());
        };
        let merged = predict(&merged, &self.plain(&self.task.test)?)?;
        let (ours, theirs) = (adapted.answers(), merged.answers());
        let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        let numbers = adapted
            .logits
            .iter()
            .flatten()
            .zip(merged.logits.iter().flatten());
        let difference = numbers
            .map(|(a, b)| f64::from((a - b).abs()))
            .fold(0.0, f64::max);
        if differing > 0 {
            return Err(Error::Merged {
                differing,
                difference,
            });
        }
        println!(
            "merged model: all {} test predictions equal, largest logit difference {difference:.1e}",
            ours.len(),
        );
        Ok(())
    }
}

/// Says how to go on after a run was interrupted.
fn interrupted(run: &RunFolder, step: usize) -> ExitCode {
    println!(
        "stopped after step {step}; go on with: dinov2 train --resume {}",
        run.path().display()
    );
    ExitCode::from(INTERRUPTED)
}

fn check_channels(processor: &Processor, checkpoint: &Checkpoint) -> Result<(), Error> {
    let (images, model) = (processor.channels(), checkpoint.config().num_channels);
    if images == model {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "{} reads images with {model} channels, and photographs have {images}",
        checkpoint.name()
    )))
}

/// The first names of a list.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        let _ = write!(text, " and {} more", names.len() - SHOWN);
    }
    text
}
