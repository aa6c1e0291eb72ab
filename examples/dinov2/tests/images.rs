//! Reading pictures beside Pillow and `transformers`, on what `fixtures/images/make.py` wrote; scanning folders; loading.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::data::dataloader::{DataLoader, DataLoaderIterator};
use burn::tensor::{Device, TensorData};
use dinov2::images::{
    DecodeError, FolderError, ImageBatch, ImageFolder, Loader, LoaderError, LoaderSettings,
    Problems, Processor, Sample, ScanOptions, Source, decode, files, labelled, scan,
};
use image::{Rgb, RgbImage};
use safetensors::SafeTensors;
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
    folder.join(name)
}

fn picture(name: &str) -> PathBuf {
    fixture("pictures").join(name)
}

fn source(path: &Path) -> Source {
    Source::File(path.into())
}

// Decoding and preparing

#[test]
fn every_format_is_decoded_to_the_bytes_of_pillow() {
    let file = fs::read(fixture("decoded.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut failures = Vec::new();
    for (name, tensor) in expected.tensors() {
        match decode(&picture(&name)) {
            Err(error) => failures.push(error.to_string()),
            Ok(found) => {
                if [found.height, found.width, found.channels] != *tensor.shape() {
                    failures.push(format!("{name} has {} columns", found.width));
                }
                let pairs = found.data.iter().zip(tensor.data());
                let difference = pairs.map(|(a, b)| a.abs_diff(*b)).max();
                if difference != Some(0) {
                    failures.push(format!("{name} differs by {difference:?}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(expected.len(), 36);
}

/// Resizing to the bit leaves the rounding of single precision in the normalisation.
#[test]
fn pictures_are_prepared_as_the_processor_of_transformers_does() {
    let file = fs::read(fixture("prepared.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    let configs = metadata.metadata().clone().unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut failures = Vec::new();
    for (case, tensor) in expected.tensors() {
        let (name, config) = case.split_once('@').unwrap();
        let json = serde_json::from_str(&configs[&format!("config.{config}")]).unwrap();
        let processor = Processor::from_json(&json).unwrap();
        let stride = if config == "published" { 7 } else { 1 };

        let values = processor.prepare(&source(&picture(name))).unwrap();
        let found = every(&values, &processor, stride);
        let expected = normalised(tensor.data());
        assert_eq!(found.len(), expected.len(), "{case}");
        let pairs = found.iter().zip(&expected);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if difference > 1e-5 {
            failures.push(format!("{case} differs by {difference}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(expected.len(), 34);
}

/// The values of every `stride`-th row and column.
fn every(values: &[f32], processor: &Processor, stride: usize) -> Vec<f32> {
    let (height, width) = (processor.height(), processor.width());
    let planes = values.chunks_exact(height * width);
    planes
        .flat_map(|plane| plane.chunks_exact(width).step_by(stride))
        .flat_map(|row| row.iter().step_by(stride).copied())
        .collect()
}

fn normalised(levels: &[u8]) -> Vec<f32> {
    const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
    const STD: [f32; 3] = [0.229, 0.224, 0.225];
    let plane = levels.len() / 3;
    let levels = levels.iter().enumerate();
    levels
        .map(|(index, &level)| {
            (f32::from(level) / 255.0 - MEAN[index / plane]) / STD[index / plane]
        })
        .collect()
}

#[test]
fn a_model_of_grey_images_reads_colour_as_luma() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("red.png");
    RgbImage::from_pixel(8, 8, Rgb([255, 0, 0]))
        .save(&path)
        .unwrap();
    let values = Processor::digits().prepare(&source(&path)).unwrap();
    assert_eq!(values.len(), 64);
    let expected = (76.0 / 255.0 - 0.305) / 0.376;
    assert!(
        values
            .iter()
            .all(|value: &f32| (value - expected).abs() < 1e-6)
    );
}

#[test]
fn the_same_seed_augments_in_the_same_way_and_another_in_another() {
    let processor = Processor::dinov2().with_image_size(28);
    let picture = source(&picture("large.jpg"));
    let once = processor.augment(&picture, 3).unwrap();
    assert_eq!(once.len(), 3 * 28 * 28);
    assert_eq!(once, processor.augment(&picture, 3).unwrap());
    assert_ne!(once, processor.augment(&picture, 4).unwrap());
    assert_ne!(once, processor.prepare(&picture).unwrap());
}

#[test]
fn an_even_picture_stays_even_when_it_is_augmented() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("even.png");
    RgbImage::from_pixel(40, 30, Rgb([10, 128, 250]))
        .save(&path)
        .unwrap();
    let processor = Processor::dinov2().with_image_size(14);
    let plain = processor.prepare(&source(&path)).unwrap();
    for seed in 0..20 {
        assert_eq!(processor.augment(&source(&path), seed).unwrap(), plain);
    }
}

#[test]
fn a_picture_that_is_cut_off_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "wide.png",
        "large.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "lossy.webp",
        "alpha.webp",
        "animated.gif",
        "plain.bmp",
        "lzw.tiff",
    ] {
        let bytes = fs::read(picture(name)).unwrap();
        for length in [bytes.len() / 3, bytes.len() * 2 / 3] {
            let path = folder.path().join(name);
            // An animation that is cut off may still have its first frame.
            let length = if name.ends_with("gif") {
                length / 2
            } else {
                length
            };
            fs::write(&path, &bytes[..length]).unwrap();
            let error = decode(&path).expect_err(name);
            assert!(matches!(error, DecodeError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}

#[test]
fn what_is_no_picture_is_refused_with_the_formats_that_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jpg");
    fs::write(&path, "text").unwrap();
    let error = decode(&path).unwrap_err();
    assert!(matches!(error, DecodeError::Format { .. }));
    assert!(
        error.to_string().contains("convert it to PNG, JPEG"),
        "{error}"
    );

    let error = decode(&folder.path().join("none.png")).unwrap_err();
    assert!(matches!(error, DecodeError::Read { .. }));
}

// Folders

/// A picture whose grey level tells it apart.
fn write_picture(path: &Path, level: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(9, 7, Rgb([level; 3]))
        .save(path)
        .unwrap();
}

/// A folder with this many pictures in each of its subfolders.
fn tree(folders: &[(&str, usize)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (folder, count) in folders {
        fs::create_dir_all(root.path().join(folder)).unwrap();
        for index in 0..*count {
            let name = format!("{folder}/{index:03}.png");
            write_picture(&root.path().join(name), index as u8);
        }
    }
    root
}

fn scanned(root: &TempDir) -> ImageFolder {
    scan(root.path(), &ScanOptions::default()).unwrap()
}

fn problems(root: &TempDir) -> Problems {
    match scan(root.path(), &ScanOptions::default()) {
        Err(FolderError::Problems { problems, .. }) => *problems,
        other => panic!("no problems: {other:?}"),
    }
}

fn skipping() -> ScanOptions {
    ScanOptions {
        skip_corrupt: true,
        ..ScanOptions::default()
    }
}

/// The paths of samples, relative to the root.
fn paths(root: &TempDir, samples: &[Sample]) -> BTreeSet<String> {
    let paths = samples.iter().map(|sample| match &sample.source {
        Source::File(path) => path.strip_prefix(root.path()).unwrap(),
        Source::Grey(_) => unreachable!(),
    });
    paths
        .map(|path| path.to_str().unwrap().to_string())
        .collect()
}

fn counts(folder: &ImageFolder) -> [usize; 3] {
    [folder.train.len(), folder.valid.len(), folder.test.len()]
}

#[test]
fn a_folder_of_classes_is_split_and_nothing_is_lost() {
    let root = tree(&[("cat", 20), ("dog", 12), ("dog/puppies/black", 8)]);
    let folder = scanned(&root);
    assert_eq!(folder.classes, ["cat", "dog"]);
    assert_eq!(counts(&folder), [24, 6, 10]);
    let all = [
        folder.train.clone(),
        folder.valid.clone(),
        folder.test.clone(),
    ]
    .concat();
    assert_eq!(paths(&root, &all).len(), 40);
    for sample in &all {
        let path = paths(&root, std::slice::from_ref(sample))
            .pop_first()
            .unwrap();
        assert!(path.starts_with(folder.classes[sample.label].as_str()));
    }

    let other = ScanOptions {
        seed: 1,
        ..ScanOptions::default()
    };
    assert_eq!(folder, scanned(&root));
    assert_ne!(folder.test, scan(root.path(), &other).unwrap().test);
}

#[test]
fn parts_that_are_given_are_kept_and_missing_ones_come_from_train() {
    let train = [("train/cat", 20), ("train/dog", 20)];
    for (others, expected) in [
        (&[][..], [24, 6, 10]),
        (&[("val/cat", 3), ("val/dog", 2)], [30, 5, 10]),
        (&[("test/cat", 3), ("test/dog", 2)], [32, 8, 5]),
        (
            &[("validation/cat", 1), ("test/cat", 3), ("test/dog", 1)],
            [40, 1, 4],
        ),
    ] {
        let root = tree(&[&train[..], others].concat());
        let folder = scanned(&root);
        assert_eq!(folder.classes, ["cat", "dog"]);
        assert_eq!(counts(&folder), expected, "{others:?}");
        for (part, samples) in [("val", &folder.valid), ("test", &folder.test)] {
            if others.iter().any(|(folder, _)| folder.starts_with(part)) {
                assert!(
                    paths(&root, samples)
                        .iter()
                        .all(|path| path.starts_with(part))
                );
            }
        }
    }
}

#[test]
fn a_class_that_a_given_part_lacks_is_noted() {
    let root = tree(&[("train/cat", 4), ("train/dog", 4), ("val/cat", 1)]);
    let folder = scanned(&root);
    assert_eq!(folder.notes.len(), 1);
    assert_eq!(folder.notes[0].path, root.path().join("val/dog"));
}

#[test]
fn stray_files_are_no_classes_and_no_images() {
    let root = tree(&[("cat", 3), ("dog", 3)]);
    fs::write(root.path().join("Thumbs.db"), "x").unwrap();
    fs::write(root.path().join("cat/Thumbs.db"), "x").unwrap();
    fs::write(root.path().join("dog/labels.txt"), "x").unwrap();
    fs::write(root.path().join("dog/.DS_Store"), "x").unwrap();
    write_picture(&root.path().join("dog/.hidden.png"), 1);
    write_picture(&root.path().join(".cache/a.png"), 1);
    let folder = scanned(&root);
    assert_eq!(folder.classes, ["cat", "dog"]);
    assert_eq!(counts(&folder), [2, 2, 2]);
    let notes: Vec<&Path> = folder
        .notes
        .iter()
        .map(|note| note.path.as_path())
        .collect();
    let expected = ["Thumbs.db", "cat/Thumbs.db", "dog/labels.txt"];
    assert_eq!(notes, expected.map(|path| root.path().join(path)));
}

#[test]
fn an_image_under_a_strange_name_is_found() {
    let root = tree(&[("cat", 2), ("dog", 3)]);
    fs::copy(
        root.path().join("dog/000.png"),
        root.path().join("cat/scan.0001"),
    )
    .unwrap();
    fs::copy(picture("420.jpg"), root.path().join("cat/wrong.png")).unwrap();
    let folder = scanned(&root);
    let cats = |samples: &[Sample]| samples.iter().filter(|sample| sample.label == 0).count();
    assert_eq!(
        cats(&folder.train) + cats(&folder.valid) + cats(&folder.test),
        4
    );
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let root = tree(&[
        ("train/cat", 4),
        ("train/dog", 1),
        ("train/fox", 0),
        ("val/cat", 1),
        ("val/cow", 1),
    ]);
    let broken = root.path().join("train/cat/broken.jpg");
    fs::write(&broken, "text").unwrap();
    fs::write(root.path().join("train/cat/photo.heic"), "text").unwrap();

    let found = problems(&root);
    let unreadable: Vec<&Path> = found
        .unreadable
        .iter()
        .map(|file| file.path.as_path())
        .collect();
    let names = ["train/cat/broken.jpg", "train/cat/photo.heic"];
    assert_eq!(unreadable, names.map(Path::new));
    assert_eq!(found.empty, [Path::new("train/fox")]);
    assert_eq!(found.few, [("dog".to_string(), 1, 2)]);
    assert_eq!(found.unknown, [Path::new("val/cow")]);
    assert_eq!(found.lonely, None);

    let error = scan(root.path(), &ScanOptions::default())
        .unwrap_err()
        .to_string();
    for line in [
        "    train/cat/broken.jpg: not an image of a format that is read here",
        "  class folders without a readable image: 1",
        "    dog has 1, needs 2",
        "    val/cow",
        "--skip-corrupt",
    ] {
        assert!(error.contains(line), "{error}");
    }
}

#[test]
fn a_single_class_and_no_class_are_refused() {
    assert_eq!(
        problems(&tree(&[("cat", 5)])).lonely,
        Some(vec!["cat".to_string()])
    );
    assert_eq!(problems(&tree(&[])).lonely, Some(vec![]));
    assert!(problems(&tree(&[("val/cat", 5), ("test/cat", 2)])).no_train);
    let missing = scan(Path::new("/no/such/folder"), &ScanOptions::default());
    assert!(matches!(missing, Err(FolderError::Read { .. })));
}

#[test]
fn skipping_goes_on_without_unreadable_images_but_not_without_a_class() {
    let root = tree(&[("cat", 3), ("dog", 3)]);
    fs::write(root.path().join("cat/broken.png"), "text").unwrap();
    let folder = scan(root.path(), &skipping()).unwrap();
    assert_eq!(counts(&folder), [2, 2, 2]);
    assert_eq!(folder.skipped.len(), 1);
    assert_eq!(folder.skipped[0].path, root.path().join("cat/broken.png"));

    fs::create_dir(root.path().join("fox")).unwrap();
    fs::write(root.path().join("fox/broken.png"), "text").unwrap();
    let Err(FolderError::Problems { problems, .. }) = scan(root.path(), &skipping()) else {
        panic!("a class without images is accepted");
    };
    assert_eq!(problems.empty, [Path::new("fox")]);
    assert!(problems.unreadable.is_empty());
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_in_circles() {
    use std::os::unix::fs::symlink;
    let elsewhere = tree(&[("lynx", 4)]);
    let root = tree(&[("cat", 3), ("dog", 3)]);
    symlink(elsewhere.path().join("lynx"), root.path().join("lynx")).unwrap();
    symlink(root.path(), root.path().join("dog/again")).unwrap();
    symlink("/no/such/file", root.path().join("cat/gone.png")).unwrap();

    let folder = scan(root.path(), &skipping()).unwrap();
    assert_eq!(folder.classes, ["cat", "dog", "lynx"]);
    assert_eq!(counts(&folder), [4, 3, 3]);
    assert_eq!(folder.notes[0].path, root.path().join("dog/again"));
    assert_eq!(folder.skipped[0].path, root.path().join("cat/gone.png"));
}

#[test]
fn a_test_folder_is_read_whole() {
    let root = tree(&[("cat", 1), ("dog", 2)]);
    let folder = labelled(root.path(), &ScanOptions::default()).unwrap();
    assert_eq!(folder.classes, ["cat", "dog"]);
    let labels: Vec<usize> = folder.samples.iter().map(|sample| sample.label).collect();
    assert_eq!(labels, [0, 1, 1]);

    fs::create_dir(root.path().join("fox")).unwrap();
    assert!(labelled(root.path(), &ScanOptions::default()).is_err());
}

#[test]
fn files_come_as_given_and_folders_in_sorted_order() {
    let root = tree(&[("b", 2), ("a/deep", 1), ("c", 0)]);
    fs::write(root.path().join("b/notes.txt"), "text").unwrap();
    fs::write(root.path().join("b/001.jpg"), "broken").unwrap();
    write_picture(&root.path().join(".hidden/a.png"), 1);
    let given = root.path().join("b/notes.txt");
    let missing = root.path().join("missing.png");

    let found: Vec<PathBuf> = files(&[missing.clone(), root.path().into(), given.clone()])
        .collect::<Result<_, _>>()
        .unwrap();
    let inside = ["a/deep/000.png", "b/000.png", "b/001.jpg", "b/001.png"];
    let inside = inside.map(|path| root.path().join(path));
    assert_eq!(found, [&[missing][..], &inside, &[given]].concat());
}

// Loading

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
