//! Files as inputs: what is opened, and how much of it is read into memory.
//!
//! A pipe, a device or a socket has no end, or blocks until somebody else acts, so only files are opened. What is parsed as a
//! whole needs many times its size in memory, so it has a limit, far above that of every file that is known:
//!
//! | what | limit | largest known |
//! |---|---|---|
//! | [`LONGEST_SETTINGS`]: `adapter_config.json`, and the `config.json` of a model | 8 MiB | 1 MiB, with the names of 21,000 classes |
//! | [`LONGEST_HEADER`]: the header of a safetensors file, and the index of a model's shards | 32 MiB | 9 MiB, for 91,000 tensors |
//!
//! The tool `burn-boft` has the same limits.

use std::fs::{self, File, FileType};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// The most bytes that a file of settings may have.
pub const LONGEST_SETTINGS: u64 = 8 << 20;
/// The most bytes that the header of a safetensors file may have.
pub const LONGEST_HEADER: u64 = 32 << 20;

/// Opens a file.
///
/// # Errors
///
/// Those of the system, and [`ErrorKind::InvalidInput`] for a pipe, a device or a socket, which is not opened.
///
/// # Examples
///
/// ```
/// use burn_boft::input;
///
/// # #[cfg(unix)]
/// let error = input::open("/dev/zero").unwrap_err();
/// # #[cfg(unix)]
/// assert_eq!(error.to_string(), "it is a device, and only files are read");
/// ```
pub fn open(path: impl AsRef<Path>) -> io::Result<File> {
    let path = path.as_ref();
    match special(fs::metadata(path)?.file_type()) {
        None => File::open(path),
        Some(kind) => {
            let reason = format!("it is a {kind}, and only files are read");
            Err(io::Error::new(ErrorKind::InvalidInput, reason))
        }
    }
}

/// Reads a file of at most so many bytes.
///
/// # Errors
///
/// Those of [`open`], and [`ErrorKind::FileTooLarge`] for a longer file, of which nothing is read.
pub fn read(path: impl AsRef<Path>, most: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    check_length("it", file.metadata()?.len(), most)?;
    let mut bytes = Vec::new();
    // A file may grow while it is read.
    let read = file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    check_length("it", read as u64, most)?;
    Ok(bytes)
}

/// Refuses something longer than it may be. `what` begins the message.
///
/// # Errors
///
/// [`ErrorKind::FileTooLarge`].
pub fn check_length(what: &str, length: u64, most: u64) -> io::Result<()> {
    match length <= most {
        true => Ok(()),
        false => {
            let reason = format!(
                "{what} has {length} bytes, and at most {} MiB of it are read",
                most >> 20
            );
            Err(io::Error::new(ErrorKind::FileTooLarge, reason))
        }
    }
}

/// What a path leads to that is neither a file nor a folder.
#[cfg(unix)]
fn special(kind: FileType) -> Option<&'static str> {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        kind if kind.is_fifo() => Some("pipe"),
        kind if kind.is_socket() => Some("socket"),
        kind if kind.is_char_device() || kind.is_block_device() => Some("device"),
        _ => None,
    }
}

#[cfg(not(unix))]
fn special(_: FileType) -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, vec![b'x'; (1 << 20) + 1]).unwrap();
        assert_eq!(read(&path, (1 << 20) + 1).unwrap().len(), (1 << 20) + 1);
        let error = read(&path, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        assert_eq!(
            error.to_string(),
            "it has 1048577 bytes, and at most 1 MiB of it are read"
        );
        let missing = open(folder.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
