//! Writing files.

#[cfg(unix)]
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

/// Writes a file that appears whole or not at all.
///
/// # Errors
///
/// The file cannot be written. One that was there before stays.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = beside(path)?;
    file.write_all(bytes)?;
    put(file, path)?;
    Ok(())
}

/// A new file in the folder of another, to be put in its place.
///
/// # Errors
///
/// The folder cannot be written.
pub fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    // Those of `tempfile` are for the owner alone, and the files of a run are ordinary ones.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path))
}

/// Puts a new file in its place, and returns it open.
///
/// # Errors
///
/// The file cannot be written to the disk or moved.
pub fn put(file: NamedTempFile, path: &Path) -> io::Result<std::fs::File> {
    file.as_file().sync_all()?;
    let file = file.persist(path).map_err(|error| error.error)?;
    // A name survives a crash once its folder is on the disk, which only these systems can promise.
    #[cfg(unix)]
    File::open(folder_of(path))?.sync_all()?;
    Ok(file)
}

/// What the system says, in lower case and without its number.
pub fn in_words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = match text.rfind(" (os error") {
        Some(end) => &text[..end],
        None => &text,
    };
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => String::new(),
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_replaced_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers");
        write_whole(&path, b"1").unwrap();
        write_whole(&path, b"2").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert!(write_whole(&folder.path().join("none/numbers"), b"3").is_err());
        std::fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(write_whole(&folder.path().join("taken"), b"4").is_err());
        // Nothing is left behind.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_it() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let (ours, usual) = (folder.path().join("ours"), folder.path().join("usual"));
        write_whole(&ours, b"").unwrap();
        std::fs::write(&usual, b"").unwrap();
        let mode = |path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&usual));
    }
}
