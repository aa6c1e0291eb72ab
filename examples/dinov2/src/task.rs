//! A classification problem: classes, labelled images in three parts, and how to prepare them.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use crate::digits;
use crate::error::Error;
use crate::images::{
    Loader, LoaderError, LoaderSettings, Note, Processor, Sample, ScanOptions, Skipped, Source,
    scan, split,
};
use crate::run::TaskRecord;

/// A classification problem.
#[derive(Clone, Debug)]
pub struct Task {
    pub classes: Vec<String>,
    pub train: Arc<[Sample]>,
    pub valid: Arc<[Sample]>,
    pub test: Arc<[Sample]>,
    pub processor: Processor,
    pub skip_corrupt: bool,
}

impl Task {
    /// A range of the handwritten digits that come with this program, split by a seed.
    pub fn digits(range: RangeInclusive<u8>, seed: u64) -> Self {
        let parts = split(&digits::samples(range.clone()), seed);
        Self {
            classes: range.map(|digit| digit.to_string()).collect(),
            train: parts.train.into(),
            valid: parts.valid.into(),
            test: parts.test.into(),
            processor: Processor::digits(),
            skip_corrupt: false,
        }
    }

    /// A folder of images.
    ///
    /// # Errors
    ///
    /// Everything about the folder that keeps it from being learned.
    pub fn folder(
        path: &Path,
        processor: Processor,
        seed: u64,
        skip_corrupt: bool,
    ) -> Result<Self, Error> {
        let folder = scan(path, &ScanOptions { seed, skip_corrupt })?;
        remark(&folder.notes, &folder.skipped);
        Ok(Self {
            classes: folder.classes,
            train: folder.train.into(),
            valid: folder.valid.into(),
            test: folder.test.into(),
            processor,
            skip_corrupt,
        })
    }

    /// What identifies the problem in the folder of a run.
    pub fn record(&self) -> TaskRecord {
        let parts = [&self.train, &self.valid, &self.test];
        let mut hash = Xxh3Default::new();
        for sample in parts.iter().flat_map(|part| part.iter()) {
            match &sample.source {
                // The folder of the class and the file: a data set may move.
                Source::File(path) => {
                    let names = path.components().rev().take(2);
                    names.for_each(|name| hash.update(name.as_os_str().as_encoded_bytes()));
                }
                Source::Grey(pixels) => hash.update(pixels),
            }
            hash.update(&sample.label.to_le_bytes());
        }
        TaskRecord {
            classes: self.classes.clone(),
            images: parts.map(|part| part.len()),
            fingerprint: format!("{:016x}", hash.digest()),
        }
    }

    /// A loader of images as they are, in their order.
    ///
    /// # Errors
    ///
    /// No threads start.
    pub fn plain(
        &self,
        samples: &Arc<[Sample]>,
        batch_size: usize,
        workers: usize,
    ) -> Result<Loader, LoaderError> {
        // Batches of equal size, since Burn's metric of the loss gives every batch the same weight.
        let batches = samples.len().div_ceil(batch_size.max(1)).max(1);
        let batch_size = samples.len().div_ceil(batches).max(1);
        Loader::new(
            samples.clone(),
            self.processor.clone(),
            LoaderSettings {
                batch_size,
                shuffle_seed: None,
                augment: false,
                label_smoothing: 0.0,
                workers,
                skip_corrupt: self.skip_corrupt,
            },
        )
    }
}

/// At most so many samples, with as many of every class as its share.
pub fn limited(samples: &Arc<[Sample]>, count: Option<usize>) -> Arc<[Sample]> {
    match count {
        Some(count) if count < samples.len() => {
            // The samples of a class follow each other, so evenly spaced ones keep the shares.
            let spaced = (0..count).map(|index| samples[index * samples.len() / count].clone());
            spaced.collect()
        }
        _ => samples.clone(),
    }
}

/// Says what was found in a folder and left out.
pub fn remark(notes: &[Note], skipped: &[Skipped]) {
    for note in notes {
        eprintln!("note: {} is left out: {}", note.path.display(), note.reason);
    }
    for image in skipped {
        eprintln!("skipped: {}: {}", image.path.display(), image.reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_samples_keep_the_shares_of_the_classes() {
        let task = Task::digits(digits::NEW, 0);
        let classes = |samples: &[Sample]| {
            let mut counts = [0; 5];
            samples.iter().for_each(|sample| counts[sample.label] += 1);
            counts
        };
        let all = classes(&task.train);
        let few = classes(&limited(&task.train, Some(54)));
        for (few, all) in few.iter().zip(all) {
            assert!((9..13).contains(few), "{few} of {all}");
        }
        assert_eq!(limited(&task.train, Some(9999)).len(), task.train.len());
    }

    #[test]
    fn a_task_is_known_by_its_images_and_their_split() {
        let print = |seed| Task::digits(digits::NEW, seed).record().fingerprint;
        assert_eq!(print(0), print(0));
        assert_ne!(print(0), print(1));
    }
}
