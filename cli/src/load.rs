//! Loading the adapter that a command is about: PEFT's folder, or a file of another program.

use std::fs;
use std::path::{Path, PathBuf};

use burn_boft::Adapter;
use burn_boft::dialects::{AdapterFile, DialectError, Misplaced};
use burn_boft::peft::{CONFIG_FILE, LoadOptions, TENSORS_FILE};

use crate::base::Base;
use crate::cli::AdapterArgs;
use crate::error::Error;
use crate::names::Names;
use crate::terminal::note;

/// What a path leads to.
pub enum Given {
    /// The folder of an adapter that PEFT wrote.
    Folder(PathBuf),
    /// A file of another program.
    File(AdapterFile),
}

impl Given {
    /// Looks at a path. One of PEFT's two files stands for its folder where both are there.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let is_peft = path
            .file_name()
            .is_some_and(|name| name == TENSORS_FILE || name == CONFIG_FILE);
        let folder = path.parent().unwrap_or(Path::new(""));
        let both = [TENSORS_FILE, CONFIG_FILE].map(|name| folder.join(name).is_file());
        match path.is_file() {
            false => Ok(Self::Folder(path.to_path_buf())),
            true if is_peft && both == [true; 2] => Ok(Self::Folder(folder.to_path_buf())),
            true => Ok(Self::File(AdapterFile::read(path)?)),
        }
    }
}

/// Loads an adapter for a model, and prints the notes and warnings of the load. The names are those that are still to be
/// translated: a file of another program gets the model's.
pub fn load_for(
    options: &AdapterArgs,
    base: &Base,
    names: Names,
) -> Result<(Adapter, Names), Error> {
    let part = options.part.as_deref();
    match (Given::open(&options.adapter)?, part) {
        (Given::Folder(folder), None) => Ok((load(&folder, &LoadOptions::new())?, names)),
        (Given::Folder(_), Some(_)) => Err(Error::Settings(
            "--part is for files of other programs; an adapter of PEFT's is for one model".into(),
        )),
        (Given::File(file), part) => Ok((place(file, part, base, &names)?, Names::default())),
    }
}

/// The adapter of a file of another program, or of a part of it, with the names of a model.
pub fn place(
    mut file: AdapterFile,
    part: Option<&str>,
    base: &Base,
    names: &Names,
) -> Result<Adapter, Error> {
    let dialects: Vec<_> = file
        .dialects()
        .iter()
        .map(|dialect| dialect.name())
        .collect();
    note(&format!(
        "note: read as {}: {}",
        dialects.join(" and "),
        file.program()
    ));
    for line in file.notes() {
        note(&format!("note: {line}"));
    }
    if let Some(start) = part {
        let all = file.layers().len();
        file = file.with_only(start);
        match file.layers().len() {
            0 => {
                let refused =
                    format!("--part {start}: no module of the file has a name that starts so");
                return Err(Error::Settings(refused));
            }
            kept => note(&format!(
                "note: {} of {all} layers are left out",
                all - kept
            )),
        }
    }
    file.adapter(&base.weighted_modules(), names.key_map())
        .map_err(with_remedies)
}

/// The error with what the tool's options can do about it.
fn with_remedies(error: DialectError) -> Error {
    let DialectError::Misplaced { path, misplaced } = &error else {
        return error.into();
    };
    let line = |misplaced: &Misplaced| {
        let remedy = match misplaced {
            Misplaced::Nowhere { .. } => {
                "; use --map to rename modules, or --part where the file is for several models"
            }
            Misplaced::Several { .. } => " with --map",
            _ => "",
        };
        format!("{}: {misplaced}{remedy}", path.display())
    };
    Error::Fit(misplaced.iter().map(line).collect())
}

/// Loads an adapter from PEFT's folder, and prints the notes and warnings of the load.
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Adapter, Error> {
    check_folder(folder)?;
    let (adapter, report) = Adapter::load_with(folder, options)?;
    say("note", &report.converted);
    say("warning", &report.warnings);
    Ok(adapter)
}

/// Prints lines of a report, and of very many only the first.
fn say(what: &str, lines: &[String]) {
    const SHOWN: usize = 100;
    for line in lines.iter().take(SHOWN) {
        note(&format!("{what}: {line}"));
    }
    if lines.len() > SHOWN {
        note(&format!("{what}: and {} more", lines.len() - SHOWN));
    }
}

/// Refuses a path that is not a folder. That there is nothing at it is said of the file in it.
fn check_folder(path: &Path) -> Result<(), Error> {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Err(Error::malformed(
            path,
            format!(
                "not a folder; PEFT keeps an adapter in a folder with {CONFIG_FILE} and {TENSORS_FILE}, so name that"
            ),
        )),
        _ => Ok(()),
    }
}
