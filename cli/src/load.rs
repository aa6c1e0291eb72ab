//! Loading the adapter that a command is about: PEFT's folder, or a file of another program.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_boft::dialects::{AdapterFile, DialectError, Misplaced};
use burn_boft::peft::{CONFIG_FILE, LoadError, LoadOptions, TENSORS_FILE};
use burn_boft::value::{Mismatch, StrengthError};
use burn_boft::{Adapter, KeyMap};

use crate::base::Base;
use crate::cli::{AdapterArgs, ReadArgs};
use crate::error::Error;
use crate::names::Names;
use crate::terminal::{note, plural};
use crate::tie::Head;

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
        match peft_folder(path) {
            Some(folder) => Ok(Self::Folder(folder.to_path_buf())),
            None if path.exists() && !path.is_dir() => Ok(Self::File(AdapterFile::read(path)?)),
            None => Ok(Self::Folder(path.to_path_buf())),
        }
    }
}

/// The folder of PEFT's two files, if this is one of them and the other is there too.
pub fn peft_folder(path: &Path) -> Option<&Path> {
    let name = path.file_name()?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut both = [TENSORS_FILE, CONFIG_FILE].into_iter();
    let is_peft = both.clone().any(|file| name == file);
    (is_peft && both.all(|file| folder.join(file).is_file())).then_some(folder)
}

/// How much of an adapter is taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Share {
    /// None for the adapter as it is.
    pub strength: Option<f64>,
    /// How many butterfly factors are kept; none for all of them.
    pub factors: Option<usize>,
}

impl Share {
    /// This share of an adapter from this path, and a note of what is taken whole all the same.
    pub fn of(self, adapter: Adapter, path: &Path) -> Result<Adapter, Error> {
        let device = Device::flex();
        let refuse = |error: StrengthError| Error::malformed(path, error.to_string());
        let adapter = match self.factors {
            Some(kept) => adapter.with_factors(kept).map_err(refuse)?,
            None => adapter,
        };
        let adapter = match self.strength {
            Some(strength) => adapter.with_strength(strength, &device).map_err(refuse)?,
            None => adapter,
        };
        let strength = self.strength.filter(|strength| *strength != 1.0);
        let is_part = self.factors.is_some() || strength.is_some();
        let shown = path.display();
        if is_part && !adapter.tensors().is_empty() {
            let tensors = plural(adapter.tensors().len(), "tensor");
            note(&format!(
                "note: {tensors} of biases and saved modules in {shown} are taken whole: --strength and --factors are for \
                 rotations and scales"
            ));
        }
        if let Some(strength) = strength.filter(|_| !adapter.is_orthogonal()) {
            let measures = adapter.measure(&device);
            let defects = measures.iter().map(|measure| measure.orthogonality_defect);
            // NaN is refused where numbers are written.
            let defect = defects.fold(0.0, f64::max);
            note(&format!(
                "note: {shown} has polynomials for rotations, which at a strength of {strength} are off from orthogonal by \
                 {defect:.1e}"
            ));
        }
        Ok(adapter)
    }
}

/// One adapter that the options ask for.
pub struct Wanted<'a> {
    path: &'a Path,
    share: Share,
    part: Option<&'a str>,
    reading: ReadArgs,
    names: Names,
}

impl<'a> Wanted<'a> {
    /// The adapters of the options, each with its settings.
    pub fn all(options: &'a AdapterArgs) -> Result<Vec<Self>, Error> {
        let paths = &options.adapters;
        let strengths = each("strength", &options.strengths, paths.len())?;
        let factors = each("factors", &options.factors, paths.len())?;
        let parts = each("part", &options.parts, paths.len())?;
        let wanted = paths.iter().enumerate().map(|(index, path)| {
            Ok(Self {
                path,
                share: Share {
                    strength: strengths[index].copied(),
                    factors: factors[index].copied(),
                },
                // Every name starts with nothing.
                part: parts[index]
                    .map(String::as_str)
                    .filter(|start| !start.is_empty()),
                reading: options.reading,
                names: Names::parse(&options.maps)?,
            })
        });
        wanted.collect()
    }

    /// Loads the adapter for a model, and prints the notes and warnings of the load.
    pub fn load(self, base: &Base, head: &Head) -> Result<Loaded, Error> {
        let Self {
            path,
            share,
            part,
            reading,
            names,
        } = self;
        // A file of another program gets the model's names.
        let (adapter, names) = match (Given::open(path)?, part) {
            (Given::Folder(folder), None) => (load(&folder, KeyMap::new(), reading)?, names),
            (Given::Folder(_), Some(_)) => {
                return Err(Error::Settings(
                    "--part is for files of other programs; an adapter of PEFT's is for one model"
                        .into(),
                ));
            }
            (Given::File(file), part) => (place(file, part, base, &names)?, Names::default()),
        };
        Ok(Loaded {
            path: path.to_path_buf(),
            share,
            adapter: share.of(adapter, path)?,
            names: names.for_model(head),
        })
    }
}

/// Loads several adapters for one model.
pub fn load_all(wanted: Vec<Wanted>, base: &Base, head: &Head) -> Result<Vec<Loaded>, Error> {
    let loaded = wanted.into_iter().map(|wanted| wanted.load(base, head));
    loaded.collect()
}

/// The value of an option for each adapter: one for all of them, or one for each in their order.
fn each<'a, T>(
    option: &str,
    values: &'a [T],
    adapters: usize,
) -> Result<Vec<Option<&'a T>>, Error> {
    match values {
        [] => Ok(vec![None; adapters]),
        [value] => Ok(vec![Some(value); adapters]),
        values if values.len() == adapters => Ok(values.iter().map(Some).collect()),
        values => Err(Error::Settings(format!(
            "--{option} is given {} times and --adapter {}; give it once for all adapters, or once for each in their order",
            values.len(),
            match adapters {
                1 => "once".to_string(),
                adapters => format!("{adapters} times"),
            }
        ))),
    }
}

/// An adapter that was loaded for a model.
pub struct Loaded {
    /// The path as it was given.
    pub path: PathBuf,
    /// How much of it was taken.
    pub share: Share,
    pub adapter: Adapter,
    /// The rules from its names to the model's.
    pub names: Names,
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
    let placed = file.place(&base.weighted_modules(), names.key_map());
    let placed = placed.map_err(with_remedies)?;
    for line in &placed.notes {
        note(&format!("note: {line}"));
    }
    Ok(placed.adapter)
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

/// Loads an adapter from PEFT's folder with these rules for its names, and prints the notes and warnings of the load.
pub fn load(folder: &Path, names: KeyMap, reading: ReadArgs) -> Result<Adapter, Error> {
    check_folder(folder)?;
    let options = LoadOptions::new()
        .with_key_map(names)
        .allow_partial(reading.allow_unexpected);
    let (adapter, report) = Adapter::load_with(folder, &options).map_err(with_option)?;
    if !report.missing.is_empty() {
        let mut mismatch = Mismatch::default();
        mismatch.missing = report.missing;
        let path = folder.join(TENSORS_FILE);
        return Err(LoadError::Mismatch { path, mismatch }.into());
    }
    say("note", &report.converted);
    say("warning", &report.warnings);
    let left_out = report.unexpected.iter();
    let left_out: Vec<_> = left_out.map(|entry| format!("left out: {entry}")).collect();
    say("warning", &left_out);
    if !left_out.is_empty() {
        note(&format!(
            "warning: PEFT 0.20 and older may have trained what is left out; to keep the weights of a module, name it in \
             modules_to_save of {CONFIG_FILE}"
        ));
    }
    Ok(adapter)
}

/// The error with the option that takes the file all the same, if all that is amiss are tensors that belong nowhere.
fn with_option(error: LoadError) -> Error {
    match error {
        LoadError::Mismatch { path, mismatch }
            if mismatch.missing.is_empty() && mismatch.wrong.is_empty() =>
        {
            let reason = format!(
                "tensors that belong nowhere, which --allow-unexpected leaves out: {mismatch}"
            );
            Error::malformed(&path, reason)
        }
        error => error.into(),
    }
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
