//! Batches of images that worker threads decode while the model computes.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::DatasetError;
use burn::prelude::*;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use thiserror::Error;

use super::decode::DecodeError;
use super::folder::Skipped;
use super::processor::Processor;
use super::{Sample, Source};
use crate::seeds::mix;

/// How many batches are being decoded or wait beside the one that is taken: all that a loader holds in memory, whatever
/// the size of the data set.
const AHEAD: usize = 3;

/// A batch of images on a device.
#[derive(Clone, Debug)]
pub struct ImageBatch {
    /// `[batch, channels, height, width]` normalised pixels.
    pub pixels: Tensor<4>,
    /// `[batch]` classes.
    pub labels: Tensor<1, Int>,
    /// The weight of the uniform distribution in the targets of the loss, from 0 to 1.
    pub label_smoothing: f32,
    /// The index of each image in the loader's samples.
    pub samples: Vec<usize>,
}

/// How a loader makes batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoaderSettings {
    /// Images per batch; the last one of an epoch may have fewer.
    pub batch_size: usize,
    /// The seed of the order and of the augmentation; without one, images come in the order of the samples.
    pub shuffle_seed: Option<u64>,
    /// Crop and flip at random (see [`Processor::augment`]).
    pub augment: bool,
    /// Passed on in every batch.
    pub label_smoothing: f32,
    /// Decoding threads.
    pub workers: usize,
    /// Go on where an image cannot be decoded. A shuffled loader takes the next readable image of the same class
    /// instead, so that the number of steps stays the same; without shuffling, the image is left out.
    pub skip_corrupt: bool,
}

impl LoaderSettings {
    /// The settings for evaluation: every image once, in order, as it is, decoded on all cores.
    pub fn evaluation(batch_size: usize) -> Self {
        Self {
            batch_size,
            shuffle_seed: None,
            augment: false,
            label_smoothing: 0.0,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            skip_corrupt: false,
        }
    }
}

/// Batches that cannot be made.
#[derive(Debug, Error)]
pub enum LoaderError {
    /// A setting that makes no batches.
    #[error("{setting} is 0, but must be at least 1")]
    Zero { setting: &'static str },

    /// The operating system starts no more threads.
    #[error("the {workers} decoding threads do not start: {source}")]
    Threads {
        workers: usize,
        source: ThreadPoolBuildError,
    },

    /// An image that has a good header but cannot be decoded.
    #[error("{0}; --skip-corrupt goes on without it")]
    Decode(#[from] DecodeError),

    /// A class of which no image can be decoded.
    #[error("no image of the class of {path} can be decoded", path = path.display())]
    Class { path: std::path::PathBuf },

    /// A decoding thread that failed; its message is on the standard error.
    #[error("a decoding thread stopped")]
    Worker,
}

/// Makes batches of samples. Cloning is cheap; clones share the threads.
#[derive(Clone)]
pub struct Loader {
    inner: Arc<Inner>,
    range: Range<usize>,
}

struct Inner {
    samples: Arc<[Sample]>,
    processor: Processor,
    settings: LoaderSettings,
    pool: ThreadPool,
    failures: Mutex<Failures>,
}

/// The samples that cannot be decoded, and those of them that were not reported yet.
#[derive(Default)]
struct Failures {
    known: BTreeMap<usize, Skipped>,
    reported: usize,
    order: Vec<usize>,
}

impl Loader {
    /// A loader with its own threads.
    ///
    /// # Errors
    ///
    /// The batch size or the number of workers is 0, or threads do not start.
    pub fn new(
        samples: Arc<[Sample]>,
        processor: Processor,
        settings: LoaderSettings,
    ) -> Result<Self, LoaderError> {
        let LoaderSettings {
            batch_size,
            workers,
            ..
        } = settings;
        for (setting, value) in [
            ("the batch size", batch_size),
            ("the number of workers", workers),
        ] {
            if value == 0 {
                return Err(LoaderError::Zero { setting });
            }
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|index| format!("decode {index}"))
            // The batch of a failed thread never comes, which the iterator reports.
            .panic_handler(|_| {})
            .build()
            .map_err(|source| LoaderError::Threads { workers, source })?;
        Ok(Self {
            range: 0..samples.len(),
            inner: Arc::new(Inner {
                samples,
                processor,
                settings,
                pool,
                failures: Mutex::default(),
            }),
        })
    }

    /// The number of images of an epoch.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The number of batches of an epoch.
    pub fn batches(&self) -> usize {
        self.len().div_ceil(self.inner.settings.batch_size)
    }

    /// The batches of an epoch from `first_batch` on. They depend on the seed, the epoch and their number only, so that
    /// a run which stopped in the middle of an epoch goes on with the same batches, with any number of workers.
    ///
    /// Dropping the iterator ends the decoding.
    pub fn epoch(&self, epoch: usize, first_batch: usize, device: &Device) -> Epoch {
        Epoch {
            order: self.order(epoch),
            loader: self.clone(),
            epoch,
            device: device.clone(),
            started: first_batch,
            taken: first_batch,
            waiting: VecDeque::new(),
            cancelled: Arc::default(),
        }
    }

    /// This loader for [`burn::data::dataloader`], which hands out one epoch after the other, from the first batch of
    /// epoch 0 on.
    pub fn on(&self, device: &Device) -> DeviceLoader {
        self.on_from(device, 0, 0)
    }

    /// As [`Self::on`], but beginning with a batch in the middle of a run.
    pub fn on_from(&self, device: &Device, epoch: usize, first_batch: usize) -> DeviceLoader {
        DeviceLoader {
            loader: self.clone(),
            device: device.clone(),
            next: Mutex::new((epoch, first_batch)),
        }
    }

    /// The images that could not be decoded and were skipped since the last call. Each is reported once.
    pub fn newly_skipped(&self) -> Vec<Skipped> {
        let mut failures = lock(&self.inner.failures);
        let all = failures.order.len();
        let from = std::mem::replace(&mut failures.reported, all);
        let new = failures.order[from..].iter();
        new.map(|index| failures.known[index].clone()).collect()
    }

    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = self.range.clone().collect();
        if let Some(seed) = self.inner.settings.shuffle_seed {
            order.shuffle(&mut StdRng::seed_from_u64(mix(
                seed,
                &[epoch as u64, u64::MAX],
            )));
        }
        order
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A prepared image: the index of the sample that it was made of, and its values.
type Prepared = (usize, Vec<f32>);

impl Inner {
    /// Prepares a sample, or what replaces it; nothing where it is left out.
    fn prepare(
        &self,
        index: usize,
        epoch: usize,
        range: &Range<usize>,
    ) -> Result<Option<Prepared>, LoaderError> {
        let seed = self.settings.shuffle_seed.unwrap_or(0);
        let seed = mix(seed, &[epoch as u64, index as u64]);
        let error = match self.try_one(index, seed) {
            Ok(values) => return Ok(Some((index, values))),
            Err(error) if !self.settings.skip_corrupt => return Err(error.into()),
            Err(error) => error,
        };
        self.record(index, &error);
        if self.settings.shuffle_seed.is_none() {
            return Ok(None);
        }
        let label = self.samples[index].label;
        let others = (index + 1..range.end).chain(range.start..index);
        for other in others.filter(|&other| self.samples[other].label == label) {
            if lock(&self.failures).known.contains_key(&other) {
                continue;
            }
            match self.try_one(other, seed) {
                Ok(values) => return Ok(Some((other, values))),
                Err(error) => self.record(other, &error),
            }
        }
        Err(LoaderError::Class {
            path: self.path(index),
        })
    }

    fn try_one(&self, index: usize, seed: u64) -> Result<Vec<f32>, DecodeError> {
        let source = &self.samples[index].source;
        match self.settings.augment {
            true => self.processor.augment(source, seed),
            false => self.processor.prepare(source),
        }
    }

    fn record(&self, index: usize, error: &DecodeError) {
        let skipped = Skipped {
            path: self.path(index),
            reason: error.reason(),
        };
        let mut failures = lock(&self.failures);
        if failures.known.insert(index, skipped).is_none() {
            failures.order.push(index);
        }
    }

    fn path(&self, index: usize) -> std::path::PathBuf {
        match &self.samples[index].source {
            Source::File(path) => path.to_path_buf(),
            Source::Grey(_) => std::path::PathBuf::new(),
        }
    }
}

/// A batch that is being decoded. The thread that adds the last image sends it.
struct Assembly {
    state: Mutex<Assembling>,
    sender: SyncSender<Result<Assembled, LoaderError>>,
}

struct Assembling {
    pixels: Vec<f32>,
    samples: Vec<Option<usize>>,
    missing: usize,
    /// The first failure in the order of the batch, so that a failing run fails in the same way again.
    failure: Option<(usize, LoaderError)>,
}

struct Assembled {
    pixels: Vec<f32>,
    samples: Vec<usize>,
}

impl Assembly {
    fn put(&self, place: usize, result: Result<Option<Prepared>, LoaderError>) {
        let mut state = lock(&self.state);
        match result {
            Ok(Some((sample, values))) => {
                state.pixels[place * values.len()..][..values.len()].copy_from_slice(&values);
                state.samples[place] = Some(sample);
            }
            Ok(None) => {}
            Err(error) => {
                if state
                    .failure
                    .as_ref()
                    .is_none_or(|(first, _)| place < *first)
                {
                    state.failure = Some((place, error));
                }
            }
        }
        state.missing -= 1;
        if state.missing == 0 {
            // Nobody receives it after the iterator was dropped.
            let _ = self.sender.send(state.finish());
        }
    }
}

impl Assembling {
    fn finish(&mut self) -> Result<Assembled, LoaderError> {
        if let Some((_, error)) = self.failure.take() {
            return Err(error);
        }
        let mut pixels = std::mem::take(&mut self.pixels);
        let length = pixels.len() / self.samples.len();
        let mut kept = 0;
        for (place, sample) in self.samples.iter().enumerate() {
            if sample.is_some() {
                if kept < place {
                    pixels.copy_within(place * length..(place + 1) * length, kept * length);
                }
                kept += 1;
            }
        }
        pixels.truncate(kept * length);
        Ok(Assembled {
            pixels,
            samples: self.samples.iter().flatten().copied().collect(),
        })
    }
}

/// The batches of one epoch.
pub struct Epoch {
    loader: Loader,
    order: Vec<usize>,
    epoch: usize,
    device: Device,
    /// The batches that were handed to the threads, and those that were taken from them.
    started: usize,
    taken: usize,
    waiting: VecDeque<Receiver<Result<Assembled, LoaderError>>>,
    cancelled: Arc<AtomicBool>,
}

impl Epoch {
    /// The number of images of the batches that were taken, including those before the first one.
    fn items(&self) -> usize {
        (self.taken * self.loader.inner.settings.batch_size).min(self.order.len())
    }

    /// Hands batches to the threads until as many as are allowed are on the way.
    fn fill(&mut self) {
        while self.started < self.loader.batches() && self.waiting.len() < AHEAD {
            self.start();
        }
    }

    /// Hands the images of the next batch to the threads.
    fn start(&mut self) {
        let inner = &self.loader.inner;
        let size = inner.settings.batch_size;
        let start = (self.started * size).min(self.order.len());
        let members = &self.order[start..(start + size).min(self.order.len())];
        let (sender, receiver) = sync_channel(1);
        let assembly = Arc::new(Assembly {
            state: Mutex::new(Assembling {
                pixels: vec![0.0; members.len() * inner.processor.len()],
                samples: vec![None; members.len()],
                missing: members.len(),
                failure: None,
            }),
            sender,
        });
        for (place, &index) in members.iter().enumerate() {
            let assembly = Arc::clone(&assembly);
            let cancelled = Arc::clone(&self.cancelled);
            let Loader { inner, range } = self.loader.clone();
            let epoch = self.epoch;
            self.loader.inner.pool.spawn_fifo(move || {
                if !cancelled.load(Ordering::Relaxed) {
                    assembly.put(place, inner.prepare(index, epoch, &range));
                }
            });
        }
        self.waiting.push_back(receiver);
        self.started += 1;
    }

    fn batch(&self, Assembled { pixels, samples }: Assembled) -> ImageBatch {
        let Inner {
            processor,
            settings,
            samples: all,
            ..
        } = &*self.loader.inner;
        let shape = [
            samples.len(),
            processor.channels(),
            processor.height(),
            processor.width(),
        ];
        let labels: Vec<i64> = samples
            .iter()
            .map(|&index| all[index].label as i64)
            .collect();
        let labels = TensorData::new(labels, [samples.len()]);
        ImageBatch {
            pixels: Tensor::from_data(TensorData::new(pixels, shape), &self.device),
            labels: Tensor::from_data(labels, &self.device),
            label_smoothing: settings.label_smoothing,
            samples,
        }
    }
}

impl Iterator for Epoch {
    type Item = Result<ImageBatch, LoaderError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.fill();
            let next = self.waiting.pop_front()?;
            self.fill();
            let assembled = next.recv();
            self.taken += 1;
            match assembled.unwrap_or(Err(LoaderError::Worker)) {
                // Every image of the batch is left out.
                Ok(batch) if batch.samples.is_empty() => {}
                Ok(batch) => return Some(Ok(self.batch(batch))),
                Err(error) => {
                    self.stop();
                    return Some(Err(error));
                }
            }
        }
    }
}

impl Epoch {
    /// Ends the epoch and the work on it.
    fn stop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.waiting.clear();
        self.started = self.loader.batches();
    }
}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A loader with a device, for Burn's `Learner` and `Evaluator`. Every call of `iter` gives the next epoch.
pub struct DeviceLoader {
    loader: Loader,
    device: Device,
    /// The epoch and the batch with which the next iterator begins.
    next: Mutex<(usize, usize)>,
}

impl DataLoader<ImageBatch> for DeviceLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<ImageBatch> + 'a> {
        let mut next = lock(&self.next);
        let (epoch, first_batch) = *next;
        *next = (epoch + 1, 0);
        Box::new(Batches(self.loader.epoch(epoch, first_batch, &self.device)))
    }

    fn num_items(&self) -> usize {
        self.loader.len()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<ImageBatch>> {
        let (epoch, first_batch) = *lock(&self.next);
        Arc::new(self.loader.on_from(device, epoch, first_batch))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<ImageBatch>> {
        let Range {
            start: from,
            end: to,
        } = self.loader.range;
        let loader = Loader {
            inner: Arc::clone(&self.loader.inner),
            range: (from + start).min(to)..(from + end).min(to),
        };
        let (epoch, first_batch) = *lock(&self.next);
        Arc::new(loader.on_from(&self.device, epoch, first_batch))
    }
}

struct Batches(Epoch);

impl Iterator for Batches {
    type Item = Result<ImageBatch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.0.next()?;
        Some(batch.map_err(DatasetError::new))
    }
}

impl DataLoaderIterator<ImageBatch> for Batches {
    fn progress(&self) -> Progress {
        let items = Some("items".to_string());
        Progress::new(self.0.items(), self.0.order.len(), items)
    }
}
