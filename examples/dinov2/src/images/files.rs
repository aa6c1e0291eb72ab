//! Walking through folders.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use super::header;
use super::problems::FolderError;

/// What file managers, archivers and storage devices leave in folders.
const JUNK: [&str; 5] = [
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
];

/// Whether an entry is never looked at: hidden, or left behind by a file manager.
pub(super) fn ignored(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".") || JUNK.iter().any(|junk| name == *junk)
}

/// What lies in a folder or its subfolders.
pub(super) enum Entry {
    File(PathBuf),
    /// A link to a folder that it lies in, which is not followed.
    Loop(PathBuf),
    /// A pipe, a socket or a device.
    Special(PathBuf),
    Unreadable(walkdir::Error),
}

/// Everything below a folder, sorted by name, without what is ignored. Links are followed.
pub(super) fn walk(folder: &Path) -> impl Iterator<Item = Entry> + use<> {
    let home = folder.canonicalize().unwrap_or_else(|_| folder.into());
    let mut walker = WalkDir::new(folder)
        .follow_links(true)
        .min_depth(1)
        .sort_by_file_name()
        .into_iter();
    std::iter::from_fn(move || {
        loop {
            let entry = match walker.next()? {
                Ok(entry) => entry,
                Err(error) => return Some(failed(error)),
            };
            let folder = entry.file_type().is_dir();
            // The walker knows the folders that it passed through, but not those above where it began.
            let upwards = folder && entry.path_is_symlink() && leads_above(&entry, &home);
            let ignored = ignored(entry.file_name());
            if folder && (upwards || ignored) {
                walker.skip_current_dir();
            }
            match entry.file_type() {
                _ if ignored => {}
                _ if upwards => return Some(Entry::Loop(entry.into_path())),
                kind if kind.is_dir() => {}
                kind if kind.is_file() => return Some(Entry::File(entry.into_path())),
                _ => return Some(Entry::Special(entry.into_path())),
            }
        }
    })
}

fn failed(error: walkdir::Error) -> Entry {
    match (error.loop_ancestor(), error.path()) {
        (Some(_), Some(path)) => Entry::Loop(path.to_path_buf()),
        _ => Entry::Unreadable(error),
    }
}

fn leads_above(entry: &DirEntry, home: &Path) -> bool {
    let target = entry.path().canonicalize();
    target.is_ok_and(|target| home.starts_with(target))
}

/// The images that the user names, one by one: files as given, whatever they are, and all image files of folders and
/// their subfolders in sorted order. A folder is read while its images are asked for.
///
/// # Errors
///
/// A folder or a link that cannot be read; the iterator goes on with what comes after it.
pub fn files(paths: &[PathBuf]) -> impl Iterator<Item = Result<PathBuf, FolderError>> + use<> {
    let paths = paths.to_vec();
    paths.into_iter().flat_map(|path| {
        let given = (!path.is_dir()).then(|| Ok(path.clone()));
        let found = given.is_none().then(|| walk(&path)).into_iter().flatten();
        let found = found.filter_map(|entry| match entry {
            Entry::File(path) => header::is_meant_as_image(&path).then_some(Ok(path)),
            // The images of a loop are all found without following it.
            Entry::Loop(_) | Entry::Special(_) => None,
            Entry::Unreadable(error) => Some(Err(FolderError::walk(error))),
        });
        given.into_iter().chain(found)
    })
}
