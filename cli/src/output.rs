//! Results appear when they are complete: they are written under a temporary name and then renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf, is_separator};
use std::sync::atomic::{AtomicBool, Ordering};

use burn_boft::input;
use tempfile::{Builder, TempDir, TempPath};

use crate::error::Error;
use crate::interrupt;
use crate::terminal::note;

/// How the temporary names start. What has such a name is locked for as long as a run works on it, so that what a killed run
/// left can be told from it.
const PREFIX: &str = ".burn-boft-";
/// How many bytes of another file are copied between two checks for an interrupt.
const COPIED: u64 = 64 << 20;

/// Whether [`tidy`] removes what it finds.
static CLEAN: AtomicBool = AtomicBool::new(false);

/// Sets whether what killed runs left is removed.
pub fn clean(on: bool) {
    CLEAN.store(on, Ordering::Relaxed);
}

/// Says what killed runs left in a folder, and removes it if somebody asked for that.
fn tidy(folder: &Path) {
    // Where it cannot be read, writing into it says so.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let is_temporary = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(PREFIX)
    };
    let mut left: Vec<_> = paths.filter(is_temporary).collect();
    left.sort();
    for path in left {
        // Nobody else takes it while it is removed.
        let Some(_lock) = lock(&path) else { continue };
        let shown = path.display();
        if !CLEAN.load(Ordering::Relaxed) {
            note(&format!(
                "note: {shown} was left by a run that was killed; --clean removes it"
            ));
            continue;
        }
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        match removed {
            Ok(()) => note(&format!(
                "note: removed {shown}, which a run that was killed had left"
            )),
            Err(error) => note(&format!("warning: {shown} cannot be removed: {error}")),
        }
    }
}

/// Locks a file or a folder for as long as the result lives. None where another run has it, or where the system locks none.
fn lock(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    file.try_lock().ok()?;
    Some(file)
}

/// What a result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    File,
    Folder,
}

/// Refuses a result that would take the place of something, or that cannot have this name.
pub fn check_free(path: &Path, form: Form) -> Result<(), Error> {
    let refuse = |reason: &str| {
        let (path, reason) = (path.to_path_buf(), reason.to_string());
        Err(Error::Output { path, reason })
    };
    if form == Form::File && path.to_string_lossy().ends_with(is_separator) {
        return refuse("is the name of a folder; name a file");
    }
    match fs::symlink_metadata(path) {
        Ok(_) if form == Form::Folder => {
            refuse("exists already; name a folder that does not exist yet")
        }
        Ok(kind) if kind.is_dir() || kind.is_file() || kind.is_symlink() => {
            refuse("exists already; name a file that does not exist yet")
        }
        // A device or a pipe.
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            let parent = parent(path);
            match parent.is_dir() {
                true => Ok(()),
                false => refuse(&format!(
                    "cannot be written into {}, which is not a folder",
                    parent.display()
                )),
            }
        }
        Err(source) => Err(Error::write(path)(source)),
    }
}

/// Refuses a result inside one of the inputs.
pub fn check_outside(path: &Path, input: &Path) -> Result<(), Error> {
    let (Ok(folder), Ok(input)) = (fs::canonicalize(parent(path)), fs::canonicalize(input)) else {
        return Ok(());
    };
    match folder.starts_with(&input) {
        true => Err(Error::Output {
            path: path.to_path_buf(),
            reason: format!("is inside {}, which is one of the inputs", input.display()),
        }),
        false => Ok(()),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// One file that appears with [`OutputFile::finish`].
pub struct OutputFile {
    /// The name that messages show.
    path: PathBuf,
    file: Kind,
}

enum Kind {
    Temporary(BufWriter<File>, TempPath),
    /// A file in an [`OutputFolder`], which appears with the folder.
    Inside(BufWriter<File>),
    /// A device or a pipe, which cannot be renamed to.
    Device(BufWriter<File>),
}

impl OutputFile {
    pub fn create(path: &Path) -> Result<Self, Error> {
        check_free(path, Form::File)?;
        let file = match path.exists() {
            true => {
                let file = File::options().write(true).open(path);
                Kind::Device(BufWriter::new(file.map_err(Error::write(path))?))
            }
            false => {
                tidy(parent(path));
                let create = || temporary(0o666).tempfile_in(parent(path));
                let file = interrupt::begin(create).map_err(Error::write(path))?;
                let (file, temporary) = file.into_parts();
                // Without a lock, which some file systems do not have, the file is only not found when it is left.
                _ = file.try_lock();
                Kind::Temporary(BufWriter::new(file), temporary)
            }
        };
        let path = path.to_path_buf();
        Ok(Self { path, file })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        interrupt::check()?;
        match &mut self.file {
            Kind::Temporary(file, _) | Kind::Inside(file) | Kind::Device(file) => {
                file.write_all(bytes)
            }
        }
        .map_err(Error::write(&self.path))
    }

    /// Gives the file its name, once all of it is on the disk.
    pub fn finish(self) -> Result<(), Error> {
        let path = &self.path;
        let flush = |file: BufWriter<File>| {
            let file = file.into_inner().map_err(|error| error.into_error())?;
            file.sync_all()
        };
        match self.file {
            Kind::Temporary(file, temporary) => {
                flush(file).map_err(Error::write(path))?;
                interrupt::complete(|| {
                    let placed = temporary.persist_noclobber(path);
                    placed.map_err(|error| Error::write(path)(error.error))
                })?;
                sync(parent(path)).map_err(Error::write(path))
            }
            Kind::Inside(file) => flush(file).map_err(Error::write(path)),
            Kind::Device(mut file) => {
                // Not under the lock of `complete`: nobody may be reading a pipe.
                file.flush().map_err(Error::write(path))?;
                interrupt::complete(|| Ok(()))
            }
        }
    }
}

/// A folder that appears with [`OutputFolder::finish`].
pub struct OutputFolder {
    path: PathBuf,
    folder: TempDir,
    /// Shows other runs that the folder is at work.
    _lock: Option<File>,
}

impl OutputFolder {
    pub fn create(path: &Path) -> Result<Self, Error> {
        check_free(path, Form::Folder)?;
        tidy(parent(path));
        let create = || temporary(0o777).tempdir_in(parent(path));
        let folder = interrupt::begin(create).map_err(Error::write(path))?;
        let _lock = lock(folder.path());
        let path = path.to_path_buf();
        Ok(Self {
            path,
            folder,
            _lock,
        })
    }

    /// The temporary folder, for files to be written into.
    pub fn temporary(&self) -> &Path {
        self.folder.path()
    }

    /// The error with the path that the folder will have, in place of its temporary one.
    pub fn named(&self, error: Error) -> Error {
        let rename = |path: PathBuf| match path.strip_prefix(self.folder.path()) {
            Ok(rest) => self.path.join(rest),
            Err(_) => path,
        };
        match error {
            Error::Write { path, source } => Error::Write {
                path: rename(path),
                source,
            },
            error => error,
        }
    }

    /// A new file in it.
    pub fn file(&self, name: &Path) -> Result<OutputFile, Error> {
        let file = Kind::Inside(BufWriter::new(self.create_file(name)?));
        let path = self.path.join(name);
        Ok(OutputFile { path, file })
    }

    /// Copies a file into it.
    pub fn copy(&self, from: &Path, name: &Path) -> Result<(), Error> {
        let mut source = input::open(from).map_err(Error::read(from))?;
        let mut file = self.create_file(name)?;
        let shown = self.path.join(name);
        loop {
            let copied = io::copy(&mut (&mut source).take(COPIED), &mut file);
            if copied.map_err(Error::write(&shown))? == 0 {
                return file.sync_all().map_err(Error::write(&shown));
            }
            interrupt::check()?;
        }
    }

    fn create_file(&self, name: &Path) -> Result<File, Error> {
        interrupt::check()?;
        let path = self.folder.path().join(name);
        fs::create_dir_all(parent(&path))
            .and_then(|()| File::create_new(&path))
            .map_err(Error::write(&self.path.join(name)))
    }

    /// Gives the folder its name.
    pub fn finish(self) -> Result<(), Error> {
        let Self {
            path,
            folder,
            _lock,
        } = self;
        sync(folder.path()).map_err(Error::write(&path))?;
        interrupt::complete(|| {
            // The system replaces an empty folder that appeared meanwhile, but not one with files.
            fs::rename(folder.path(), &path).map_err(Error::write(&path))?;
            // The folder is not temporary any more.
            _ = folder.keep();
            Ok(())
        })?;
        sync(parent(&path)).map_err(Error::write(&path))
    }
}

/// A temporary file or folder with the permissions of ordinary files: those of `tempfile` are for the owner alone.
fn temporary(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(PREFIX);
    #[cfg(not(unix))]
    let _ = mode;
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    builder
}

/// Makes sure that a rename survives a crash, on systems that can promise it.
fn sync(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
