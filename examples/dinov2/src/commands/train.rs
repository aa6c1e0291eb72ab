//! `train`: adapts a model to images, compares it with a linear probe, and saves what was trained.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use burn::module::Module;
use burn::train::Interrupter;
use burn_boft::{Transformers, summary};

use super::INTERRUPTED;
use super::opened::{
    open_adapter, open_checkpoint, processor, sized, stop_on_interrupt, with_head, with_method,
};
use crate::cli::Train;
use crate::digits;
use crate::error::Error;
use crate::images::{Loader, Processor, Sample, Source};
use crate::inference::{INFERENCE_BATCH, Predictions, features, predict};
use crate::memory;
use crate::method::Method;
use crate::model::Dinov2ForImageClassification;
use crate::precision;
use crate::run::{ProbeScores, Results, RunFolder, write_whole};
use crate::settings::{Augment, Options, Settings, Subject};
use crate::task::{Task, limited, remark};
use crate::training::head::Probe;
use crate::training::progress::Progress;
use crate::training::{Loaders, Recipe, Trained, train};
use crate::weights::{self, AdapterFolder, Checkpoint, HeadOrigin, LabelOrigin, Saved};

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
            let checkpoint = open_checkpoint(run.settings().model.as_deref())?;
            let adapter = run.settings().adapter.as_deref();
            let adapter = adapter.map(open_adapter).transpose()?;
            let job = Job::new(run.settings().clone(), checkpoint, adapter)?;
            (run, job)
        }
        None => {
            let options = match &request.settings {
                Some(path) => request.options.over(&Options::read(path)?)?,
                None => request.options.clone(),
            };
            let options = options.located()?;
            let output = request.output.clone();
            let output = output.unwrap_or_else(|| RunFolder::free("dinov2-output"));
            RunFolder::check_free(&output, request.overwrite)?;
            let mut job = begin(&options)?;
            if options.find_rate == Some(true) && !job.find_rate(progress, &interrupter)? {
                println!("stopped while looking for a learning rate; nothing was saved");
                return Ok(ExitCode::from(INTERRUPTED));
            }
            let run = RunFolder::create(&output, job.settings.clone(), request.overwrite)?;
            (run, job)
        }
    };
    run.check_task(&job.task.record())?;
    job.run(&run, progress, &interrupter)
}

/// Chooses the settings of a new run, and opens what it needs. Nothing is written.
fn begin(options: &Options) -> Result<Job, Error> {
    options.check()?;
    let checkpoint = open_checkpoint(options.model.as_deref())?;
    let adapter = options.adapter.as_deref().map(open_adapter).transpose()?;
    let settings = options.resolve(&Subject {
        width: checkpoint.config().hidden_size,
        photographs: !checkpoint.is_embedded(),
        adapter: adapter.as_ref().map(AdapterFolder::method),
    })?;
    let mut job = Job::new(settings, checkpoint, adapter)?;
    job.describe();
    if options.accumulate.is_none() {
        job.fit_memory();
    }
    Ok(job)
}

/// Everything that a training needs.
struct Job {
    settings: Settings,
    checkpoint: Checkpoint,
    task: Task,
    /// The pretrained model, in the precision that was chosen.
    pretrained: Dinov2ForImageClassification,
    /// The model ready to train.
    prepared: Dinov2ForImageClassification,
    /// Where the head comes from, in a sentence.
    head: String,
}

impl Job {
    fn new(
        settings: Settings,
        checkpoint: Checkpoint,
        adapter: Option<AdapterFolder>,
    ) -> Result<Self, Error> {
        let mut device = settings.device.device()?.autodiff();
        if settings.gradient_checkpointing {
            device = device.gradient_checkpointing();
        }
        settings.dtype.check(&device)?;
        let task = task(&settings, &checkpoint, adapter.as_ref())?;
        let seed = settings.recipe.seed;
        let cast = |model| precision::cast(model, settings.dtype);
        if let Some(adapter) = adapter {
            let named = Named::of(&adapter, &checkpoint, task)?;
            let (pretrained, _) = with_head(&checkpoint, &named.task.classes, seed, &device)?;
            let (base, _) = with_head(&checkpoint, &named.labels, seed, &device)?;
            let mut prepared = adapter.attach(cast(base))?;
            if named.is_other {
                prepared.classifier = pretrained.classifier.clone();
            }
            return Ok(Self {
                settings: settings.clone(),
                checkpoint,
                task: named.task,
                pretrained: cast(pretrained),
                prepared,
                head: named.head,
            });
        }
        let (model, origin) = with_head(&checkpoint, &task.classes, seed, &device)?;
        let pretrained = cast(model);
        let prepared = with_method(pretrained.clone(), &settings.method, seed)?;
        let head = match origin {
            HeadOrigin::Checkpoint => {
                "the head is that of the model: the classes are the same".to_string()
            }
            HeadOrigin::Fresh { reason } => format!("the head starts afresh: {reason}"),
        };
        Ok(Self {
            settings: settings.clone(),
            checkpoint,
            task,
            pretrained,
            prepared,
            head,
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

    fn loaders(&self) -> Result<Loaders, Error> {
        let Settings {
            recipe,
            augment,
            workers,
            ..
        } = &self.settings;
        let augment = *augment == Augment::Standard;
        Ok(Loaders {
            train: self.task.shuffled(recipe, augment, *workers)?,
            valid: self.plain(&self.task.valid)?,
        })
    }

    fn plain(&self, samples: &Arc<[Sample]>) -> Result<Loader, Error> {
        let batch = INFERENCE_BATCH.min(self.settings.recipe.part_size().max(8));
        Ok(self.task.plain(samples, batch, self.settings.workers)?)
    }

    /// The logits of a model in inference mode.
    fn predict(
        &self,
        model: &Dinov2ForImageClassification,
        samples: &Arc<[Sample]>,
    ) -> Result<Predictions, Error> {
        let images = self.plain(samples)?;
        let predictions = predict(model, &images)?;
        remark(&[], &images.newly_skipped());
        Ok(predictions)
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

    /// Tries several learning rates in short runs, and takes the one with the lowest validation loss. Returns whether it
    /// was not interrupted.
    fn find_rate(&mut self, progress: Progress, interrupter: &Interrupter) -> Result<bool, Error> {
        let default = self.settings.recipe.learning_rate;
        let progress = match progress {
            Progress::Shown => Progress::Lines,
            other => other,
        };
        println!("looking for a learning rate: {TRIAL_EPOCHS} epochs each");
        let rates = TRIED.map(|factor| factor * default);
        let mut best: Option<(f64, f64)> = None;
        for rate in rates.into_iter().filter(|rate| *rate <= 1.0) {
            let recipe = Recipe {
                epochs: TRIAL_EPOCHS.min(self.settings.recipe.epochs),
                learning_rate: rate,
                head_learning_rate: self.rate_of_head(rate),
                ..self.settings.recipe.clone()
            };
            let trained = train(
                self.prepared.clone(),
                &self.loaders()?,
                &recipe,
                None,
                &format!("learning rate {rate:.1e}"),
                progress,
                interrupter,
            )?;
            if trained.stopped {
                return Ok(false);
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
        Ok(true)
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
        let mut model = self.prepared.clone();
        println!("{}", self.head);
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
        let loaders = self.loaders()?;
        let trained = train(
            model,
            &loaders,
            recipe,
            Some(&run.training()),
            &method.to_string(),
            progress,
            interrupter,
        )?;
        remark(&[], &loaders.train.newly_skipped());
        remark(&[], &loaders.valid.newly_skipped());
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
        let Settings {
            method,
            probe,
            warm_start,
            recipe,
            ..
        } = &self.settings;
        // A run that trains the head alone is a probe itself.
        let compared = *probe && *method != Method::Linear;
        if !compared && !warm_start {
            return Ok(None);
        }
        let begun = run.training().checkpoints.newest()?.is_some();
        if let Some(scores) = run.probe_scores()?.filter(|_| begun || !warm_start) {
            return Ok(Some((None, scores)));
        }
        let model = self.pretrained.valid();
        let known = limited(&self.task.train, recipe.images_at_most());
        let rows = |samples| {
            let images = self.plain(samples)?;
            let rows = features(&model, &images)?;
            remark(&[], &images.newly_skipped());
            Ok::<_, Error>(rows)
        };
        let (train, valid) = (rows(&known)?, rows(&self.task.valid)?);
        let test = rows(&self.task.test)?;
        let classes = self.task.classes.len();
        let probe = Probe::train(&train, &valid, classes, recipe.seed);
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
        let predictions = self.predict(&trained.model.clone().materialize(), &self.task.test)?;
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
            let more = match self.settings.warm_start {
                true => "or more --epochs",
                false => "or --warm-start",
            };
            eprintln!(
                "warning: the linear probe does better on the validation images, {:.1} % against {:.1} %; \
                 try --find-rate, a lower --learning-rate than {:.1e}, {more}",
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
        let merged = self.predict(&merged, &self.task.test)?;
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

/// The images of a run, prepared as the adapter that it starts from or else the model wants them.
fn task(
    settings: &Settings,
    checkpoint: &Checkpoint,
    adapter: Option<&AdapterFolder>,
) -> Result<Task, Error> {
    let Settings {
        recipe,
        data,
        image_size,
        skip_corrupt,
        ..
    } = settings;
    let task = match data {
        Some(path) => {
            let mut processor =
                processor(checkpoint, adapter.and_then(AdapterFolder::preprocessor))?;
            if let Some(size) = image_size {
                processor = sized(processor, *size, checkpoint)?;
            }
            check_channels(&processor, checkpoint)?;
            Task::folder(path, processor, recipe.seed, *skip_corrupt)?
        }
        None => Task::digits(digits::NEW, recipe.seed),
    };
    // A run that ends after a few steps does not evaluate longer than it trains.
    Ok(Task {
        valid: limited(&task.valid, recipe.images_at_most()),
        test: limited(&task.test, recipe.images_at_most()),
        ..task
    })
}

/// How the classes of an adapter and those of the images go together.
struct Named {
    /// The images, with their classes in the order of the adapter's head if it is used.
    task: Task,
    /// The classes of the adapter's head.
    labels: Vec<String>,
    /// Whether the adapter's head tells other classes apart, so that a new one is needed.
    is_other: bool,
    /// Where the head comes from, in a sentence.
    head: String,
}

impl Named {
    fn of(adapter: &AdapterFolder, checkpoint: &Checkpoint, task: Task) -> Result<Self, Error> {
        if adapter.num_labels().is_none() {
            return Ok(Self {
                labels: task.classes.clone(),
                task,
                is_other: false,
                head: "the adapter brings no head".to_string(),
            });
        }
        let (labels, origin) = adapter.labels_for(checkpoint)?;
        let nameless = origin == LabelOrigin::Numbered;
        if nameless && labels.len() == task.classes.len() {
            return Ok(Self {
                labels,
                task,
                is_other: false,
                head: "the head is that of the adapter, which names no classes; they are taken in the order of the folder"
                    .to_string(),
            });
        }
        Ok(match task.in_order(&labels) {
            Some(task) => Self {
                task,
                labels,
                is_other: false,
                head: "the head is that of the adapter".to_string(),
            },
            None => Self {
                head: format!(
                    "the head starts afresh: that of the adapter tells apart {}",
                    shortened(&labels)
                ),
                task,
                labels,
                is_other: true,
            },
        })
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
