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
use crate::training::Recipe;

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

    /// The problem with its classes in another order; nothing if the classes are not the same.
    pub fn in_order(&self, labels: &[String]) -> Option<Self> {
        if labels.len() != self.classes.len() {
            return None;
        }
        let part = |samples: &Arc<[Sample]>| renumbered(samples, &self.classes, labels).ok();
        Some(Self {
            classes: labels.to_vec(),
            train: part(&self.train)?,
            valid: part(&self.valid)?,
            test: part(&self.test)?,
            ..self.clone()
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

    /// A loader of the training images in a new order for each epoch.
    ///
    /// # Errors
    ///
    /// No threads start.
    pub fn shuffled(
        &self,
        recipe: &Recipe,
        augment: bool,
        workers: usize,
    ) -> Result<Loader, LoaderError> {
        let settings = LoaderSettings {
            batch_size: recipe.batch_size,
            shuffle_seed: Some(recipe.seed),
            augment,
            label_smoothing: recipe.label_smoothing,
            workers,
            skip_corrupt: self.skip_corrupt,
        };
        Loader::new(self.train.clone(), self.processor.clone(), settings)
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

/// The same samples with the numbers that their classes have in another list of names.
///
/// # Errors
///
/// The classes that are not in that list.
pub fn renumbered<'a>(
    samples: &[Sample],
    classes: &'a [String],
    labels: &[String],
) -> Result<Arc<[Sample]>, Vec<&'a str>> {
    let number = |class: &String| labels.iter().position(|label| label == class);
    let unknown = classes.iter().filter(|class| number(class).is_none());
    let unknown: Vec<&str> = unknown.map(String::as_str).collect();
    if !unknown.is_empty() {
        return Err(unknown);
    }
    let numbers: Vec<usize> = classes.iter().filter_map(number).collect();
    let renumbered = samples.iter().map(|sample| Sample {
        source: sample.source.clone(),
        label: numbers[sample.label],
    });
    Ok(renumbered.collect())
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
    fn classes_in_another_order_keep_their_images() {
        let task = Task::digits(digits::NEW, 0);
        let labels = ["9", "5", "7", "6", "8"].map(str::to_string);
        let other = task.in_order(&labels).unwrap();
        for (before, after) in task.train.iter().zip(other.train.iter()) {
            assert_eq!(before.source, after.source);
            assert_eq!(task.classes[before.label], other.classes[after.label]);
        }
        assert!(task.in_order(&labels[..4]).is_none());
        let labels = ["9", "5", "7", "6", "0"].map(str::to_string);
        assert!(task.in_order(&labels).is_none());
        let unknown = renumbered(&task.test, &task.classes, &labels).unwrap_err();
        assert_eq!(unknown, ["8"]);
    }

    #[test]
    fn a_task_is_known_by_its_images_and_their_split() {
        let print = |seed| Task::digits(digits::NEW, seed).record().fingerprint;
        assert_eq!(print(0), print(0));
        assert_ne!(print(0), print(1));
    }
}
