//! What is wrong with an image folder, all at once.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::folder::Skipped;
use crate::files::in_words;

/// How many entries of each kind a message lists.
const LISTED: usize = 10;

/// An image folder that is not used.
#[derive(Debug, Error)]
pub enum FolderError {
    /// A folder or a file that does not exist or may not be read.
    #[error("{path}: {}", in_words(source), path = path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },

    /// Two folders for the same part.
    #[error("{} and {} are both for the same part of the data; keep one", first.display(), second.display())]
    TwoParts { first: PathBuf, second: PathBuf },

    /// Everything else that was found, each with its reason.
    #[error("{root} cannot be used as it is:{problems}", root = root.display())]
    Problems {
        root: PathBuf,
        problems: Box<Problems>,
    },
}

impl FolderError {
    pub(super) fn walk(error: walkdir::Error) -> Self {
        Self::Read {
            path: error.path().map(Path::to_path_buf).unwrap_or_default(),
            source: error.into(),
        }
    }
}

/// What is wrong with an image folder. Paths are relative to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// Files that are meant as images but cannot be read.
    pub unreadable: Vec<Skipped>,
    /// Class folders without a readable image.
    pub empty: Vec<PathBuf>,
    /// The classes, where there are fewer than two.
    pub lonely: Option<Vec<String>>,
    /// Classes with too few images, how many they have and how many are needed.
    pub few: Vec<(String, usize, usize)>,
    /// Folders of classes for validation or testing that training has no folder for.
    pub unknown: Vec<PathBuf>,
    /// There is `val` or `test`, but no `train`.
    pub no_train: bool,
}

impl Problems {
    /// Whether the folder can be used.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.no_train {
            f.write_str("\n  there is no folder train beside val or test")?;
        }
        if let Some(classes) = &self.lonely {
            f.write_str("\n  two or more class folders with images are needed, found ")?;
            match classes.first() {
                Some(only) => write!(f, "only {only}")?,
                None => f.write_str("none")?,
            }
        }
        list(
            f,
            "class folders without a readable image",
            &self.empty,
            |path| path.display().to_string(),
        )?;
        list(
            f,
            "classes with too few images",
            &self.few,
            |(class, found, needed)| format!("{class} has {found}, needs {needed}"),
        )?;
        list(
            f,
            "classes that train has no folder for",
            &self.unknown,
            |path| path.display().to_string(),
        )?;
        list(
            f,
            "files that cannot be read as images (--skip-corrupt goes on without them)",
            &self.unreadable,
            |file| format!("{}: {}", file.path.display(), file.reason),
        )
    }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    entries: &[T],
    line: impl Fn(&T) -> String,
) -> fmt::Result {
    if entries.is_empty() {
        return Ok(());
    }
    write!(f, "\n  {what}: {}", entries.len())?;
    for entry in entries.iter().take(LISTED) {
        write!(f, "\n    {}", line(entry))?;
    }
    match entries.len().saturating_sub(LISTED) {
        0 => Ok(()),
        more => write!(f, "\n    and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut() {
        let problems = Problems {
            empty: (0..13).map(|index| format!("c{index}").into()).collect(),
            few: vec![("dog".into(), 2, 3)],
            ..Problems::default()
        };
        let text = problems.to_string();
        assert!(text.starts_with("\n  class folders without a readable image: 13\n    c0\n"));
        assert!(text.contains("\n    c9\n    and 3 more\n"), "{text}");
        assert!(text.ends_with("\n  classes with too few images: 1\n    dog has 2, needs 3"));
    }
}
