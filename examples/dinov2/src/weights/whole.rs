//! Folders that appear whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::adapter::{CLASSES, HEAD_SETTINGS, HEAD_TENSORS, PREPROCESSOR};
use super::checkpoint::CONFIG;
use super::error::{WeightsError, unreadable, unwritable};
use super::files::SAFETENSORS;

/// Everything that this program writes into such a folder. Nothing else is ever deleted.
const OWN: [&str; 8] = [
    CONFIG,
    SAFETENSORS,
    PREPROCESSOR,
    CLASSES,
    HEAD_SETTINGS,
    HEAD_TENSORS,
    burn_boft::peft::CONFIG_FILE,
    burn_boft::peft::TENSORS_FILE,
];

/// Makes a folder of what `write` writes into an empty one. It appears complete, or not at all.
///
/// A folder that is there already is replaced, if it holds nothing but a model or an adapter. It is moved aside before
/// the new one takes its place, and deleted after: a process that is killed between these two steps leaves both, the old
/// one in a hidden folder beside.
///
/// # Errors
///
/// - [`WeightsError::Occupied`]: the folder holds other files.
/// - [`WeightsError::NoName`]: the path names no folder that can be replaced.
/// - [`WeightsError::Write`]: a folder cannot be created or moved.
/// - Those of `write`. Then the folder is as it was.
pub(super) fn write<T>(
    folder: &Path,
    write: impl FnOnce(&Path) -> Result<T, WeightsError>,
) -> Result<T, WeightsError> {
    let failed = |error| unwritable(folder)(error);
    let target = target(folder)?;
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(WeightsError::NoName {
            path: folder.to_path_buf(),
        });
    };
    let exists = target.exists();
    if exists {
        refuse_others(&target)?;
    }
    fs::create_dir_all(parent).map_err(failed)?;
    let staging = tempfile::Builder::new()
        .prefix(".dinov2-")
        .tempdir_in(parent)
        .map_err(failed)?;
    // One level down, because a temporary folder is readable by its owner alone.
    let new = staging.path().join(name);
    fs::create_dir(&new).map_err(failed)?;
    let result = write(&new)?;
    finish(&new, staging.path()).map_err(failed)?;
    let old = staging.path().join("replaced");
    if exists {
        fs::rename(&target, &old).map_err(failed)?;
    }
    if let Err(error) = fs::rename(&new, &target) {
        if exists {
            fs::rename(&old, &target).map_err(failed)?;
        }
        return Err(failed(error));
    }
    Ok(result)
}

/// The folder itself, also behind a link.
fn target(folder: &Path) -> Result<PathBuf, WeightsError> {
    let absolute = match folder.exists() {
        true => fs::canonicalize(folder),
        false => std::path::absolute(folder),
    };
    absolute.map_err(unwritable(folder))
}

fn refuse_others(folder: &Path) -> Result<(), WeightsError> {
    if !folder.is_dir() {
        return Err(WeightsError::IsFile {
            path: folder.to_path_buf(),
        });
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable(folder))? {
        let name = entry.map_err(unreadable(folder))?.file_name();
        if !OWN.iter().any(|own| name == *own) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    files.sort();
    match files.is_empty() {
        true => Ok(()),
        false => Err(WeightsError::Occupied {
            path: folder.to_path_buf(),
            files,
        }),
    }
}

/// Gives the files the permissions of any new file, as some are made from temporary ones that only their owner may read;
/// and waits until they are on the disk, so that a power failure cannot leave the new folder with empty files.
fn finish(folder: &Path, scratch: &Path) -> std::io::Result<()> {
    let usual = File::create(scratch.join("usual"))?
        .metadata()?
        .permissions();
    for entry in fs::read_dir(folder)? {
        let file = File::open(entry?.path())?;
        file.set_permissions(usual.clone())?;
        file.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn put(name: &'static str, text: &'static str) -> impl Fn(&Path) -> Result<(), WeightsError> {
        move |folder| fs::write(folder.join(name), text).map_err(unwritable(folder))
    }

    #[test]
    fn a_new_folder_replaces_the_files_of_the_old_one() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("a/b");
        write(&folder, put(CONFIG, "old")).unwrap();
        write(&folder, put(CLASSES, "new")).unwrap();

        assert_eq!(names(&folder), [CLASSES]);
        assert_eq!(names(&place.path().join("a")), ["b"]);
    }

    #[test]
    fn a_failure_leaves_the_old_folder_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("run");
        write(&folder, put(CONFIG, "old")).unwrap();
        let failed = write(&folder, |new| {
            put(CONFIG, "half")(new)?;
            Err::<(), _>(WeightsError::NotMerged)
        });

        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(folder.join(CONFIG)).unwrap(), "old");
        assert_eq!(names(place.path()), ["run"]);
    }

    #[test]
    fn files_of_somebody_else_are_never_deleted() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("thesis.tex"), "years").unwrap();
        let error = write(place.path(), put(CONFIG, "")).unwrap_err();

        assert!(error.to_string().contains("thesis.tex"), "{error}");
        assert_eq!(names(place.path()), ["thesis.tex"]);
        let file = place.path().join("thesis.tex");
        assert!(matches!(
            write(&file, put(CONFIG, "")),
            Err(WeightsError::IsFile { .. })
        ));
        let root = write(Path::new("/"), put(CONFIG, ""));
        assert!(matches!(root, Err(WeightsError::NoName { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_the_folder_as_they_may_read_any() {
        use std::os::unix::fs::PermissionsExt;

        let place = tempfile::tempdir().unwrap();
        let usual = place.path().join("usual");
        fs::create_dir(&usual).unwrap();
        put(CONFIG, "")(&usual).unwrap();
        let ours = place.path().join("ours");
        write(&ours, |new| {
            put(CONFIG, "")(new)?;
            let private = fs::Permissions::from_mode(0o600);
            fs::set_permissions(new.join(CONFIG), private).map_err(unwritable(new))
        })
        .unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&usual));
        assert_eq!(mode(&ours.join(CONFIG)), mode(&usual.join(CONFIG)));
    }
}
