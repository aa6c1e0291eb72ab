//! Whether a folder holds classes, or `train`, `val` and `test`, and the class folders of each.

use std::fs;
use std::path::{Path, PathBuf};

use super::files::ignored;
use super::folder::Note;
use super::problems::FolderError;

/// A part of the data, by the name that its folder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Train,
    Valid,
    Test,
}

impl Part {
    fn of(folder: &Path) -> Option<Self> {
        let name = name(folder).to_ascii_lowercase();
        match name.as_str() {
            "train" => Some(Self::Train),
            "val" | "valid" | "validation" => Some(Self::Valid),
            "test" => Some(Self::Test),
            _ => None,
        }
    }
}

/// The folder of a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Class {
    pub part: Part,
    pub name: String,
    pub folder: PathBuf,
}

/// The class folders below a root, and whether they are already parted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// The parts that have a folder; none where the root holds the classes.
    pub parts: Vec<Part>,
    pub classes: Vec<Class>,
    pub notes: Vec<Note>,
}

/// Finds the class folders.
///
/// The root is parted where it has a `train` with subfolders, beside `val` or `test` or alone. A folder `train` beside
/// classes, or with images in it, is a class of that name: there are trains to be told from cars.
pub(super) fn find(root: &Path) -> Result<Layout, FolderError> {
    let (folders, files) = entries(root)?;
    let parts: Vec<(Part, PathBuf)> = folders
        .iter()
        .filter_map(|folder| Some((Part::of(folder)?, folder.clone())))
        .filter(|(_, folder)| entries(folder).is_ok_and(|(folders, _)| !folders.is_empty()))
        .collect();
    let trained = parts.iter().any(|(part, _)| *part == Part::Train);
    let parted =
        !parts.is_empty() && (parts.len() == folders.len() || (trained && parts.len() > 1));
    if !parted {
        return Ok(flat(folders, files));
    }

    let mut layout = Layout::default();
    for (part, folder) in &parts {
        if let Some((_, first)) = parts
            .iter()
            .find(|(other, path)| other == part && path != folder)
        {
            return Err(FolderError::TwoParts {
                first: first.clone().min(folder.clone()),
                second: first.clone().max(folder.clone()),
            });
        }
        let (folders, files) = entries(folder)?;
        layout.parts.push(*part);
        layout.add(*part, folders, files);
    }
    let beside = folders.into_iter().filter(|folder| {
        let part = parts.iter().any(|(_, part)| part == folder);
        !part
    });
    layout
        .notes
        .extend(files.into_iter().chain(beside).map(|path| Note {
            path,
            reason: "beside train, val and test".into(),
        }));
    layout.parts.sort_unstable();
    Ok(layout)
}

/// Takes the folders of a root for classes, whatever their names are.
pub(super) fn classes(root: &Path) -> Result<Layout, FolderError> {
    let (folders, files) = entries(root)?;
    Ok(flat(folders, files))
}

fn flat(folders: Vec<PathBuf>, files: Vec<PathBuf>) -> Layout {
    let mut layout = Layout::default();
    layout.add(Part::Train, folders, files);
    layout
}

impl Layout {
    fn add(&mut self, part: Part, folders: Vec<PathBuf>, files: Vec<PathBuf>) {
        self.classes.extend(folders.into_iter().map(|folder| Class {
            part,
            name: name(&folder),
            folder,
        }));
        self.notes.extend(files.into_iter().map(|path| Note {
            path,
            reason: "in no class folder".into(),
        }));
    }
}

fn name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The folders and the other entries of a folder, by name, without what is ignored. Links are followed.
fn entries(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), FolderError> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if !ignored(&entry.file_name()) {
                paths.push(entry.path());
            }
        }
        Ok(paths)
    };
    let mut paths = read().map_err(|source| FolderError::Read {
        path: folder.to_path_buf(),
        source,
    })?;
    paths.sort();
    Ok(paths.into_iter().partition(|path| path.is_dir()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these subfolders.
    fn tree(folders: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for folder in folders {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        root
    }

    fn names(layout: &Layout) -> Vec<(Part, &str)> {
        let names = layout.classes.iter();
        names
            .map(|class| (class.part, class.name.as_str()))
            .collect()
    }

    #[test]
    fn parts_are_known_by_all_their_names() {
        for valid in ["val", "valid", "validation", "Val"] {
            let root = tree(&["train/cat", "train/dog", &format!("{valid}/cat"), "docs"]);
            let layout = find(root.path()).unwrap();
            assert_eq!(layout.parts, [Part::Train, Part::Valid]);
            let mut found = names(&layout);
            found.sort();
            assert_eq!(
                found,
                [
                    (Part::Train, "cat"),
                    (Part::Train, "dog"),
                    (Part::Valid, "cat")
                ]
            );
            assert_eq!(layout.notes[0].path, root.path().join("docs"));
        }
    }

    #[test]
    fn a_train_beside_cars_is_a_class() {
        for folders in [&["train", "car"][..], &["train/steam", "car/old"]] {
            let root = tree(folders);
            let layout = find(root.path()).unwrap();
            assert_eq!(
                names(&layout),
                [(Part::Train, "car"), (Part::Train, "train")]
            );
            assert!(layout.parts.is_empty());
        }
    }

    #[test]
    fn hidden_folders_and_those_of_file_managers_are_no_classes() {
        let root = tree(&["cat", "dog", ".git", "__MACOSX", "@eaDir"]);
        let layout = find(root.path()).unwrap();
        assert_eq!(names(&layout), [(Part::Train, "cat"), (Part::Train, "dog")]);
        assert!(layout.notes.is_empty());
    }

    #[test]
    fn two_folders_for_one_part_are_refused() {
        let root = tree(&["train/cat", "val/cat", "valid/cat"]);
        let error = find(root.path()).unwrap_err();
        assert!(matches!(error, FolderError::TwoParts { .. }), "{error}");
    }
}
