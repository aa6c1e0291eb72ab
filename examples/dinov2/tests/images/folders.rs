//! Scanning folders.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dinov2::images::{
    FolderError, ImageFolder, Problems, Sample, ScanOptions, Source, files, labelled, scan,
};
use tempfile::TempDir;

use crate::common::*;

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
