//! Image folders: one folder per class, or `train`, `val` and `test` of such.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::files::{Entry, walk};
use super::header::{self, Header};
use super::layout::{self, Class, Layout, Part};
use super::problems::{FolderError, Problems};
use super::split::{Wanted, split_off};
use super::{Sample, Source};

/// The samples of an image folder, split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFolder {
    /// The names of the classes, sorted; a label is an index into them.
    pub classes: Vec<String>,
    pub train: Vec<Sample>,
    pub valid: Vec<Sample>,
    pub test: Vec<Sample>,
    /// Images that cannot be read and are left out.
    pub skipped: Vec<Skipped>,
    /// What else was found and is left out.
    pub notes: Vec<Note>,
}

/// The samples of a folder with one folder per class, together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// The names of the classes, sorted; a label is an index into them.
    pub classes: Vec<String>,
    pub samples: Vec<Sample>,
    /// Images that cannot be read and are left out.
    pub skipped: Vec<Skipped>,
    /// What else was found and is left out.
    pub notes: Vec<Note>,
}

/// An image that is left out because it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped {
    pub path: PathBuf,
    pub reason: String,
}

/// A file or a folder that is no image and no class.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    pub path: PathBuf,
    pub reason: String,
}

/// How a folder is scanned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanOptions {
    /// The seed of the split.
    pub seed: u64,
    /// Leave unreadable images out instead of refusing the folder.
    pub skip_corrupt: bool,
}

/// Finds the images of a folder and looks at every header; nothing is decoded.
///
/// The folder holds one folder per class, or `train`, `val` (also `valid`, `validation`) and `test` of such. Images in
/// subfolders of a class count as that class's. What is missing is split off the training images, seeded and per class:
///
/// | folders | training : validation : test |
/// |---|---|
/// | classes, or only `train` | 60 : 15 : 25 of all images |
/// | `train`, `val` | 75 : 25 of `train` for training and testing |
/// | `train`, `test` | 80 : 20 of `train` for training and validation |
/// | `train`, `val`, `test` | as they are |
///
/// # Errors
///
/// - The folder cannot be read, or has two folders for one part, such as `val` and `valid`.
/// - All at once: unreadable images (unless they are skipped), empty classes, fewer than two classes, classes with too
///   few images to split, and classes that validation or testing has and training has not.
pub fn scan(root: &Path, options: &ScanOptions) -> Result<ImageFolder, FolderError> {
    let layout = layout::find(root)?;
    let has = |part| layout.parts.contains(&part);
    let wanted = Wanted {
        valid: !has(Part::Valid),
        test: !has(Part::Test),
    };
    let parted = !layout.parts.is_empty();
    let no_train = parted && !has(Part::Train);
    let mut found = Found::new(layout);

    let mut problems = Problems {
        no_train,
        ..Problems::default()
    };
    let classes = found.classes(Part::Train);
    if !no_train {
        found.check_train(&classes, wanted.least(), &mut problems);
        found.check_others(&classes, &mut problems);
    }
    let skipped = found.finish(root, options, problems)?;

    let parts = split_off(&found.samples(Part::Train, &classes), wanted, options.seed);
    let given = |part, split: Vec<Sample>| match split.is_empty() {
        true => found.samples(part, &classes),
        false => split,
    };
    Ok(ImageFolder {
        valid: given(Part::Valid, parts.valid),
        test: given(Part::Test, parts.test),
        train: parts.train,
        classes,
        skipped,
        notes: found.notes,
    })
}

/// Finds the images of a folder with one folder per class, without splitting it: for evaluating a model on data of its
/// own, such as the `test` folder of a data set.
///
/// # Errors
///
/// - The folder cannot be read.
/// - All at once: unreadable images (unless they are skipped), empty classes, no class at all.
pub fn labelled(root: &Path, options: &ScanOptions) -> Result<Labelled, FolderError> {
    let mut found = Found::new(layout::classes(root)?);
    let classes = found.classes(Part::Train);
    let mut problems = Problems::default();
    for (class, files) in &found.classes {
        if files.is_empty() {
            problems.empty.push(class.folder.clone());
        }
    }
    if classes.is_empty() {
        problems.lonely = Some(Vec::new());
    }
    let skipped = found.finish(root, options, problems)?;
    Ok(Labelled {
        samples: found.samples(Part::Train, &classes),
        classes,
        skipped,
        notes: found.notes,
    })
}

/// The files of every class folder, sorted into readable, unreadable and other ones.
struct Found {
    classes: Vec<(Class, Vec<PathBuf>)>,
    unreadable: Vec<Skipped>,
    notes: Vec<Note>,
}

impl Found {
    fn new(layout: Layout) -> Self {
        let mut found = Self {
            classes: Vec::new(),
            unreadable: Vec::new(),
            notes: layout.notes,
        };
        for class in layout.classes {
            let files = found.list(&class.folder);
            let headers: Vec<Header> = files.par_iter().map(|path| header::read(path)).collect();
            let mut readable = Vec::new();
            for (path, header) in files.into_iter().zip(headers) {
                match header {
                    Header::Image => readable.push(path),
                    Header::Unreadable(reason) => found.unreadable.push(Skipped { path, reason }),
                    Header::Other => found.notes.push(Note {
                        path,
                        reason: "not an image".into(),
                    }),
                }
            }
            found.classes.push((class, readable));
        }
        found
    }

    /// The files of a class folder and its subfolders.
    fn list(&mut self, folder: &Path) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for entry in walk(folder) {
            let (path, reason) = match entry {
                Entry::File(path) => {
                    files.push(path);
                    continue;
                }
                Entry::Loop(path) => (path, "a link to a folder that it lies in"),
                Entry::Special(path) => (path, "not a file"),
                Entry::Unreadable(error) => {
                    self.unreadable.push(Skipped {
                        path: error.path().map(Path::to_path_buf).unwrap_or_default(),
                        reason: std::io::Error::from(error).to_string(),
                    });
                    continue;
                }
            };
            self.notes.push(Note {
                path,
                reason: reason.into(),
            });
        }
        files
    }

    fn classes(&self, part: Part) -> Vec<String> {
        self.of(part).map(|(class, _)| class.name.clone()).collect()
    }

    fn of(&self, part: Part) -> impl Iterator<Item = &(Class, Vec<PathBuf>)> {
        self.classes
            .iter()
            .filter(move |(class, _)| class.part == part)
    }

    fn check_train(&self, classes: &[String], least: usize, problems: &mut Problems) {
        for (class, files) in self.of(Part::Train) {
            match files.len() {
                0 => problems.empty.push(class.folder.clone()),
                count if count < least => problems.few.push((class.name.clone(), count, least)),
                _ => {}
            }
        }
        if classes.len() < 2 {
            problems.lonely = Some(classes.to_vec());
        }
    }

    /// Validation and testing may lack classes that training has, but not the other way round.
    fn check_others(&mut self, classes: &[String], problems: &mut Problems) {
        for part in [Part::Valid, Part::Test] {
            let mut missing: BTreeMap<&String, bool> = BTreeMap::new();
            for name in classes {
                missing.insert(name, true);
            }
            let mut parent = None;
            for (class, files) in self.classes.iter().filter(|(class, _)| class.part == part) {
                parent = class.folder.parent().map(Path::to_path_buf);
                match missing.get_mut(&class.name) {
                    Some(missing) => *missing = files.is_empty(),
                    None if files.is_empty() => {}
                    None => problems.unknown.push(class.folder.clone()),
                }
            }
            let Some(parent) = parent else { continue };
            for (name, _) in missing.into_iter().filter(|(_, missing)| *missing) {
                self.notes.push(Note {
                    path: parent.join(name),
                    reason: "no images, although train has this class".into(),
                });
            }
        }
    }

    /// The images that are left out, or everything that is wrong with the folder, by paths relative to it.
    fn finish(
        &mut self,
        root: &Path,
        options: &ScanOptions,
        mut problems: Problems,
    ) -> Result<Vec<Skipped>, FolderError> {
        let skipped = std::mem::take(&mut self.unreadable);
        if !options.skip_corrupt {
            problems.unreadable.clone_from(&skipped);
        }
        if problems.is_empty() {
            return Ok(skipped);
        }
        let relative = |path: &mut PathBuf| {
            if let Ok(rest) = path.strip_prefix(root) {
                *path = rest.to_path_buf();
            }
        };
        problems
            .unreadable
            .iter_mut()
            .for_each(|file| relative(&mut file.path));
        problems.empty.iter_mut().for_each(relative);
        problems.unknown.iter_mut().for_each(relative);
        Err(FolderError::Problems {
            root: root.to_path_buf(),
            problems: Box::new(problems),
        })
    }

    fn samples(&self, part: Part, classes: &[String]) -> Vec<Sample> {
        self.of(part)
            .filter_map(|(class, files)| {
                let label = classes.iter().position(|name| *name == class.name)?;
                Some((label, files))
            })
            .flat_map(|(label, files)| {
                files.iter().map(move |path| Sample {
                    source: Source::File(Arc::from(path.as_path())),
                    label,
                })
            })
            .collect()
    }
}
