//! The loader.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::data::dataloader::{DataLoader, DataLoaderIterator};
use burn::tensor::{Device, TensorData};
use dinov2::images::{
    ImageBatch, Loader, LoaderError, LoaderSettings, Processor, Sample, ScanOptions, scan,
};

use crate::common::*;

/// Two classes of pictures; the grey level is the index of the sample.
fn samples(root: &Path, count: usize) -> Arc<[Sample]> {
    let samples = (0..count).map(|index| {
        let path = root.join(format!("{index:03}.png"));
        write_picture(&path, index as u8);
        Sample {
            source: source(&path),
            label: index % 2,
        }
    });
    samples.collect()
}

fn settings() -> LoaderSettings {
    LoaderSettings {
        batch_size: 4,
        shuffle_seed: Some(5),
        augment: true,
        label_smoothing: 0.1,
        workers: 3,
        skip_corrupt: false,
    }
}

fn small() -> Processor {
    Processor::dinov2().with_image_size(14)
}

fn loader(samples: &Arc<[Sample]>, settings: LoaderSettings) -> Loader {
    Loader::new(Arc::clone(samples), small(), settings).unwrap()
}

/// Everything a batch holds, so that batches can be compared.
type Content = (TensorData, TensorData, Vec<usize>);

fn content(batch: ImageBatch) -> Content {
    (
        batch.pixels.into_data(),
        batch.labels.into_data(),
        batch.samples,
    )
}

fn contents(loader: &Loader, epoch: usize, first: usize) -> Vec<Content> {
    let batches = loader.epoch(epoch, first, &Device::flex());
    batches.map(|batch| content(batch.unwrap())).collect()
}

#[test]
fn a_batch_holds_the_pixels_and_the_labels_of_its_samples() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 10);
    let loader = loader(&samples, settings());
    let mut seen = BTreeSet::new();
    for batch in loader.epoch(2, 0, &Device::flex()) {
        let batch = batch.unwrap();
        assert_eq!(batch.label_smoothing, 0.1);
        let labels: Vec<i64> = batch.labels.into_data().iter().collect();
        let pixels: Vec<f32> = batch.pixels.into_data().iter().collect();
        for (place, &sample) in batch.samples.iter().enumerate() {
            seen.insert(sample);
            assert_eq!(labels[place] as usize, samples[sample].label);
            let expected = (sample as f32 / 255.0 - 0.485) / 0.229;
            let red = &pixels[place * 588..][..196];
            assert!(red.iter().all(|value| (value - expected).abs() < 1e-5));
        }
    }
    assert_eq!(seen, (0..10).collect());
}

#[test]
fn an_epoch_can_be_entered_in_the_middle_with_any_number_of_workers() {
    let root = tempfile::tempdir().unwrap();
    let mut pictures = samples(root.path(), 9).to_vec();
    // Pictures on which the crop and the flip show.
    for (index, name) in ["large.jpg", "wide.png", "tall.png"].iter().enumerate() {
        pictures[index * 2].source = source(&picture(name));
    }
    let samples: Arc<[Sample]> = pictures.into();
    let all = contents(&loader(&samples, settings()), 1, 0);
    assert_eq!(all.len(), 3);
    for workers in [1, 2, 5] {
        let loader = loader(
            &samples,
            LoaderSettings {
                workers,
                ..settings()
            },
        );
        for first in 0..=3 {
            assert_eq!(
                contents(&loader, 1, first),
                all[first..],
                "{workers} {first}"
            );
        }
    }
    assert!(contents(&loader(&samples, settings()), 1, 7).is_empty());
}

#[test]
fn another_epoch_or_seed_has_another_order_and_other_crops() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 12);
    let orders = |seed, epoch| -> Vec<usize> {
        let settings = LoaderSettings {
            shuffle_seed: Some(seed),
            ..settings()
        };
        let batches = contents(&loader(&samples, settings), epoch, 0);
        batches.into_iter().flat_map(|batch| batch.2).collect()
    };
    assert_ne!(orders(1, 0), orders(1, 1));
    assert_ne!(orders(1, 0), orders(2, 0));

    let one: Arc<[Sample]> = [Sample {
        source: source(&picture("large.jpg")),
        label: 0,
    }]
    .into();
    let crops = loader(&one, settings());
    assert_ne!(contents(&crops, 0, 0), contents(&crops, 1, 0));
}

#[test]
fn without_shuffling_images_come_in_order_and_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 6);
    let loader = loader(&samples, LoaderSettings::evaluation(4));
    let batches = contents(&loader, 3, 0);
    assert_eq!(batches, contents(&loader, 0, 0));
    assert_eq!(batches[0].2, [0, 1, 2, 3]);
    assert_eq!(batches[1].2, [4, 5]);
    let pixels: Vec<f32> = batches[1].0.iter().collect();
    assert_eq!(pixels[..588], small().prepare(&samples[4].source).unwrap());
}

/// A file with a good header and half of its body.
fn cut_off(path: &Path) {
    let bytes = fs::read(picture("wide.png")).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

#[test]
fn an_image_that_cannot_be_decoded_ends_the_epoch_by_name() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 40);
    cut_off(&root.path().join("005.png"));
    assert!(scan(root.path(), &ScanOptions::default()).is_err());
    let loader = loader(&samples, LoaderSettings::evaluation(4));
    let mut batches = loader.epoch(0, 0, &Device::flex());
    assert!(batches.next().unwrap().is_ok());
    let error = batches.next().unwrap().unwrap_err();
    assert!(matches!(error, LoaderError::Decode(_)));
    assert!(error.to_string().contains("005.png"), "{error}");
    assert!(error.to_string().contains("--skip-corrupt"), "{error}");
    assert!(batches.next().is_none());
}

#[test]
fn a_training_image_that_cannot_be_decoded_is_replaced_by_the_next_of_its_class() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 10);
    for broken in ["003.png", "005.png", "008.png"] {
        cut_off(&root.path().join(broken));
    }
    let settings = LoaderSettings {
        skip_corrupt: true,
        ..settings()
    };
    let first = loader(&samples, settings);
    let found = contents(&first, 0, 0);
    let mut used: Vec<usize> = found.iter().flat_map(|batch| batch.2.clone()).collect();
    used.sort_unstable();
    assert_eq!(used, [0, 0, 1, 2, 4, 6, 7, 7, 7, 9]);

    let mut reported = first.newly_skipped();
    reported.sort();
    let reported: Vec<PathBuf> = reported.into_iter().map(|skipped| skipped.path).collect();
    let broken = ["003.png", "005.png", "008.png"];
    assert_eq!(reported, broken.map(|name| root.path().join(name)));
    assert_eq!(contents(&first, 0, 0), found);
    assert!(first.newly_skipped().is_empty());

    let one = LoaderSettings {
        workers: 1,
        ..settings
    };
    assert_eq!(contents(&loader(&samples, one), 0, 2), found[2..]);
}

#[test]
fn an_image_for_evaluation_that_cannot_be_decoded_is_left_out() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 9);
    for broken in ["001.png", "008.png"] {
        cut_off(&root.path().join(broken));
    }
    let settings = LoaderSettings {
        skip_corrupt: true,
        ..LoaderSettings::evaluation(4)
    };
    let batches = contents(&loader(&samples, settings), 0, 0);
    let used: Vec<Vec<usize>> = batches.iter().map(|batch| batch.2.clone()).collect();
    assert_eq!(used, [vec![0, 2, 3], vec![4, 5, 6, 7]]);
    let pixels: Vec<f32> = batches[0].0.iter().collect();
    assert_eq!(pixels.len(), 3 * 588);
    assert_eq!(
        pixels[588..1176],
        small().prepare(&samples[2].source).unwrap()
    );
}

#[test]
fn a_class_without_a_whole_image_stops_training() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 6);
    for broken in ["001.png", "003.png", "005.png"] {
        cut_off(&root.path().join(broken));
    }
    let settings = LoaderSettings {
        skip_corrupt: true,
        ..settings()
    };
    let result: Result<Vec<ImageBatch>, LoaderError> = loader(&samples, settings)
        .epoch(0, 0, &Device::flex())
        .collect();
    assert!(matches!(result, Err(LoaderError::Class { .. })));
}

#[test]
fn only_a_few_batches_are_decoded_ahead_and_none_after_the_iterator_is_dropped() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 80);
    // The fourth batch after the one that is taken, and those behind it.
    for index in 16..80 {
        cut_off(&root.path().join(format!("{index:03}.png")));
    }
    let settings = LoaderSettings {
        skip_corrupt: true,
        ..LoaderSettings::evaluation(4)
    };
    let loader = loader(&samples, settings);
    let mut batches = loader.epoch(0, 0, &Device::flex());
    batches.next().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(loader.newly_skipped().is_empty());

    batches.next().unwrap().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut skipped = 0;
    while skipped < 4 && Instant::now() < deadline {
        skipped += loader.newly_skipped().len();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(skipped, 4);
    drop(batches);
    std::thread::sleep(Duration::from_millis(300));
    assert!(loader.newly_skipped().is_empty());
}

#[test]
fn settings_that_make_no_batches_are_refused() {
    let zero = LoaderSettings::evaluation(0);
    let error = Loader::new([].into(), small(), zero).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the batch size is 0, but must be at least 1"
    );
    let none = loader(&[].into(), settings());
    assert_eq!(contents(&none, 0, 0).len(), 0);
}

#[test]
fn a_loader_serves_burns_trait() {
    let root = tempfile::tempdir().unwrap();
    let samples = samples(root.path(), 10);
    let device = Device::flex();
    let loader = loader(&samples, settings());
    let burn = loader.on_from(&device, 1, 2);
    let read = |loader: &dyn DataLoader<ImageBatch>| -> Vec<Content> {
        loader.iter().map(|batch| content(batch.unwrap())).collect()
    };
    assert_eq!(burn.num_items(), 10);
    assert_eq!(read(&*burn.to_device(&device)), contents(&loader, 1, 2));
    assert_eq!(read(&burn), contents(&loader, 1, 2));
    assert_eq!(read(&burn), contents(&loader, 2, 0));

    let part = loader.on(&device).slice(3, 8);
    assert_eq!(part.num_items(), 5);
    let used: BTreeSet<usize> = read(&*part).into_iter().flat_map(|batch| batch.2).collect();
    assert_eq!(used, (3..8).collect());

    let whole = loader.on(&device);
    let mut batches = whole.iter();
    let progress =
        |batches: &dyn DataLoaderIterator<ImageBatch>| batches.progress().items_processed;
    assert_eq!(progress(&*batches), 0);
    batches.next();
    batches.next();
    assert_eq!(progress(&*batches), 8);
    batches.next();
    assert_eq!(progress(&*batches), 10);
}
