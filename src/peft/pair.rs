//! The two files of an adapter, read and replaced as one.
//!
//! PEFT keeps settings and tensors in two files, and no file system replaces two files at once. A save therefore does it in
//! steps, each of which leaves a pair that belongs together:
//!
//! 1. It waits for its turn, a lock on `.adapter.lock` that works across processes and ends with the process.
//! 2. It writes the new settings to a file whose name is made of the new tensors: they wait there.
//! 3. It renames the new tensors into place. From now on they lead a reader to the settings that wait for them.
//! 4. It renames the new settings into place, and removes the lock.
//!
//! A reader takes no lock, so it also reads folders that it must not write to. It keeps the tensors' file open until it has
//! the settings, and starts again if the file at that path is another one by then.
//!
//! What a reader finds, depending on where a save stopped:
//!
//! | the save stopped | tensors in place | settings that wait for them | a reader finds |
//! |---|---|---|---|
//! | before step 3 | old | none, or those of tensors that are not there | the old pair |
//! | between steps 3 and 4 | new | the new ones | the new pair |
//! | after step 4 | new | none | the new pair |
//!
//! PEFT's own `save_pretrained` writes the two files one after the other and in place, so it gives no such promise.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use same_file::Handle;
use xxhash_rust::xxh3::xxh3_128;

use super::error::{LoadError, SaveError};
use super::keys::{CONFIG_FILE, PICKLE_FILE, TENSORS_FILE};
use crate::input::{self, LONGEST_SETTINGS};

/// How often a folder is read that somebody else is writing, and how long to wait in between: 0.4 s in all, beside the
/// time that reading takes.
const ATTEMPTS: usize = 200;
const PAUSE: Duration = Duration::from_millis(2);

/// The file that writers lock. It is empty, and exists only while somebody writes.
const LOCK: &str = ".adapter.lock";
/// Settings that wait for their tensors to be in place.
const WAITING: (&str, &str) = (".adapter_config.", ".json");
/// Files that are being written.
const STAGED: (&str, &str) = (".adapter_model.", ".tmp");

/// Settings and tensors, as bytes.
type Pair = (Vec<u8>, Vec<u8>);

/// The settings and the tensors that one save wrote.
///
/// # Errors
///
/// - [`LoadError::Io`]: a file is not there or cannot be read.
/// - [`LoadError::Pickle`]: the only tensors are in `adapter_model.bin`.
/// - [`LoadError::Busy`]: the files were replaced during every attempt.
pub(super) fn read(folder: &Path) -> Result<Pair, LoadError> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        if let Some(pair) = try_read(folder)? {
            return Ok(pair);
        }
    }
    let folder = folder.to_path_buf();
    Err(LoadError::Busy { folder })
}

/// The pair, unless somebody replaced the adapter meanwhile.
///
/// A save replaces the tensors before the settings, and the settings wait under the tensors' name in between. So the
/// settings of these tensors are those that wait, or, where none do, the ones in place for as long as the tensors are
/// not replaced.
///
/// The tensors are read before the settings for this reason. The file of the tensors stays open until the end, so that
/// the system cannot give its identity to another file.
fn try_read(folder: &Path) -> Result<Option<Pair>, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| LoadError::Io { path, source }
    };
    let (config_path, tensors_path) = (folder.join(CONFIG_FILE), folder.join(TENSORS_FILE));
    let config = || input::read(&config_path, LONGEST_SETTINGS).map_err(failed(&config_path));
    let mut file = match input::open(&tensors_path) {
        Ok(file) => file,
        Err(error) => {
            // A folder that is no adapter at all lacks its settings first.
            config()?;
            let folder = folder.to_path_buf();
            let is_absent = error.kind() == io::ErrorKind::NotFound;
            return Err(match is_absent && folder.join(PICKLE_FILE).exists() {
                true => LoadError::Pickle { folder },
                false => failed(&tensors_path)(error),
            });
        }
    };
    let mut tensors = Vec::new();
    file.read_to_end(&mut tensors)
        .map_err(failed(&tensors_path))?;
    let waiting = waiting_for(folder, &tensors);
    match input::read(&waiting, LONGEST_SETTINGS) {
        Ok(config) => return Ok(Some((config, tensors))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&waiting)(error)),
    }
    let found = config()?;
    // PEFT rewrites its files where they are, so they are also compared. An open file shares its identity with no
    // other, even if the path comes to hold the same bytes again.
    let is_same = Handle::from_file(file)
        .and_then(|file| Ok(file == Handle::from_path(&tensors_path)?))
        .map_err(failed(&tensors_path))?;
    Ok((is_same && config()? == found).then_some((found, tensors)))
}

/// Replaces the pair in a folder. Wherever this stops, a reader finds the old pair or the new one.
///
/// The folder is created where it does not exist. A save that another process left halfway is finished first.
///
/// # Errors
///
/// [`SaveError::Io`], which names the file that could not be written. Up to the rename of the tensors, the old pair
/// stays; after it, readers find the new pair and the next save finishes this one.
pub(super) fn write(folder: &Path, config: &[u8], tensors: &[u8]) -> Result<(), SaveError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SaveError::Io { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let lock = Lock::take(folder).map_err(failed(folder))?;
    finish(folder, &lock).map_err(failed(folder))?;
    let waiting = waiting_for(folder, tensors);
    let (config_path, tensors_path) = (folder.join(CONFIG_FILE), folder.join(TENSORS_FILE));
    let tensors = staged(&tensors_path, tensors).map_err(failed(&tensors_path))?;
    staged(&config_path, config)
        .and_then(|file| file.persist(&waiting).map_err(|error| error.error))
        .and_then(|_| sync(folder))
        .map_err(failed(&config_path))?;
    if let Err(error) = tensors.persist(&tensors_path) {
        // Nothing leads to them.
        _ = fs::remove_file(&waiting);
        return Err(failed(&tensors_path)(error.error));
    }
    // The tensors must last before the settings move: where this fails, the settings go on waiting for them.
    sync(folder).map_err(failed(&tensors_path))?;
    fs::rename(&waiting, &config_path)
        .and_then(|()| sync(folder))
        .map_err(failed(&config_path))
}

/// Finishes a save that stopped halfway, and removes what one left behind.
///
/// Settings that wait for the tensors in place are moved into place: nothing else leads to them once these tensors are
/// replaced. Other files of a save belong to nobody, since their writer would hold the lock. Where the file system has
/// no locks they may be those of a writer at work, and stay.
fn finish(folder: &Path, lock: &Lock) -> io::Result<()> {
    let current = match input::read(folder.join(TENSORS_FILE), u64::MAX) {
        Ok(tensors) => Some(waiting_for(folder, &tensors)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is = |(start, end)| name.starts_with(start) && name.ends_with(end);
        if current.as_ref() == Some(&path) {
            fs::rename(&path, folder.join(CONFIG_FILE))?;
        } else if lock.is_held && (is(WAITING) || is(STAGED)) {
            fs::remove_file(&path)?;
        }
    }
    sync(folder)
}

/// The turn of one writer, which ends when this is dropped or its process ends.
///
/// The system releases the lock of a process that dies, so a file `.adapter.lock` that stays does not keep anybody out.
struct Lock {
    path: PathBuf,
    /// The file that is locked, which unlocks when it is closed.
    _file: Handle,
    /// Whether the file system has locks. Without them, two writers at once may mix their files.
    is_held: bool,
}

impl Lock {
    /// Waits for the turn, for as long as it takes.
    ///
    /// The file is removed at the end of each turn, so a writer may get the lock of a file that is no longer in the
    /// folder, while another one locks its successor. Therefore the locked file must still be the one at the path.
    fn take(folder: &Path) -> io::Result<Self> {
        let path = folder.join(LOCK);
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)?;
            let is_held = match file.lock() {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => false,
                Err(error) => return Err(error),
            };
            // The writer before removed the file that this one waited for, and a third may have made another.
            let file = Handle::from_file(file)?;
            match Handle::from_path(&path) {
                Ok(current) if current == file => {
                    return Ok(Self {
                        path,
                        _file: file,
                        is_held,
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that stays is no harm: the next writer locks it.
        _ = fs::remove_file(&self.path);
    }
}

/// Where the settings of these tensors wait.
///
/// The name is a hash of 128 bits of the whole file, so a reader finds the settings from the tensors alone, and tensors
/// of another save do not lead to them.
fn waiting_for(folder: &Path, tensors: &[u8]) -> PathBuf {
    let hash = xxh3_128(tensors);
    let (start, end) = WAITING;
    folder.join(format!("{start}{hash:032x}{end}"))
}

/// What a file is going to be, on the disk under another name.
///
/// It is in the same folder, since a rename replaces a file at once only within a file system, and its content is on
/// the disk before it gets its name. Dropped before that, it is deleted.
fn staged(path: &Path, content: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(STAGED.0).suffix(STAGED.1);
    // As open as any other file, not for the owner alone as temporary files are.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(path.parent().unwrap_or(Path::new(".")))?;
    // Through the file itself: an error of the temporary one names its path.
    file.as_file_mut().write_all(content)?;
    // A file that somebody closed stays closed.
    if let Ok(metadata) = fs::metadata(path) {
        file.as_file().set_permissions(metadata.permissions())?;
    }
    file.as_file().sync_all()?;
    Ok(file)
}

/// Makes renames in a folder last, where the system can say so: on Unix. Elsewhere a crash of the system, not of the
/// process, may undo the last renames.
fn sync(folder: &Path) -> io::Result<()> {
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(folder: &Path) -> (String, String) {
        let (config, tensors) = read(folder).unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(config), text(tensors))
    }

    fn pair(config: &str, tensors: &str) -> (String, String) {
        (config.to_string(), tensors.to_string())
    }

    fn save(folder: &Path, config: &str, tensors: &str) {
        write(folder, config.as_bytes(), tensors.as_bytes()).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn wherever_a_save_stops_a_reader_finds_one_pair() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        save(folder, "old settings", "old tensors");

        // Before the first rename: files under other names.
        fs::write(folder.join(".adapter_model.x7Yz.tmp"), "new ten").unwrap();
        assert_eq!(state(folder), pair("old settings", "old tensors"));

        // The new settings wait for tensors that are not there yet.
        let waiting = waiting_for(folder, b"new tensors");
        fs::write(&waiting, "new settings").unwrap();
        assert_eq!(state(folder), pair("old settings", "old tensors"));

        // The tensors are in place, the settings are not.
        fs::write(folder.join(TENSORS_FILE), "new tensors").unwrap();
        assert_eq!(state(folder), pair("new settings", "new tensors"));

        // The next save finishes that one first, and leaves nothing else.
        fs::write(waiting_for(folder, b"lost tensors"), "lost settings").unwrap();
        fs::write(folder.join(LOCK), "").unwrap();
        finish(folder, &Lock::take(folder).unwrap()).unwrap();
        assert_eq!(state(folder), pair("new settings", "new tensors"));
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
        save(folder, "third settings", "third tensors");
        assert_eq!(state(folder), pair("third settings", "third tensors"));
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
    }

    #[test]
    fn new_settings_for_the_same_tensors_are_the_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), "old", "tensors");
        save(folder.path(), "new", "tensors");
        assert_eq!(state(folder.path()), pair("new", "tensors"));
    }

    #[test]
    fn a_save_that_cannot_place_its_tensors_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // A folder of that name cannot be replaced.
        fs::create_dir_all(folder.join(TENSORS_FILE).join("full")).unwrap();
        fs::write(folder.join(CONFIG_FILE), "old").unwrap();
        assert!(write(folder, b"new", b"tensors").is_err());
        assert_eq!(fs::read(folder.join(CONFIG_FILE)).unwrap(), b"old");
        assert_eq!(names(folder), [CONFIG_FILE, TENSORS_FILE]);
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_as_open_as_others_and_a_closed_one_stays_closed() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TENSORS_FILE);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(folder.path().join("other"), "").unwrap();
        save(folder.path(), "settings", "tensors");
        assert_eq!(mode(&path), mode(&folder.path().join("other")));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        save(folder.path(), "settings", "more tensors");
        assert_eq!(mode(&path), 0o600);
    }
}
