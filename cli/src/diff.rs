//! `diff`: two adapters or two models, layer by layer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::iter;
use std::path::{Path, PathBuf};

use burn_boft::dialects::{AdapterFile, has_rotation};
use burn_boft::peft::CONFIG_FILE;
use burn_boft::tensors::{file_name, from_file};
use burn_boft::value::{AdapterLayer, SavedTensor, join};
use burn_boft::{Adapter, KeyMap};
use serde_json::{Value, json};

use crate::base::{Base, is_same};
use crate::cli::Diff;
use crate::compare::Apart;
use crate::distance::{Difference, between};
use crate::error::Error;
use crate::layers::{self, short_list};
use crate::load::{Given, load, peft_folder, place};
use crate::names::Names;
use crate::record;
use crate::terminal::{note, plural, progress, report, shown};
use crate::tie::{FILE, Head};

/// How records of Burn end.
const RECORD: &str = "bpk";

pub fn run(options: &Diff, json: bool) -> Result<(), Error> {
    match (Side::open(&options.a)?, Side::open(&options.b)?) {
        (Side::Model(a), Side::Model(b)) => {
            refuse_options(options)?;
            models(&a, &b, json)
        }
        (Side::Adapter(a), Side::Adapter(b)) => adapters(options, a, b, json),
        (Side::Model(_), Side::Adapter(_)) => Err(unlike(&options.a, &options.b)),
        (Side::Adapter(_), Side::Model(_)) => Err(unlike(&options.b, &options.a)),
    }
}

fn unlike(model: &Path, adapter: &Path) -> Error {
    let (model, adapter) = (model.display(), adapter.display());
    Error::Settings(format!(
        "{model} is a model and {adapter} an adapter; name two adapters or two models"
    ))
}

/// Refuses options that are for adapters.
fn refuse_options(options: &Diff) -> Result<(), Error> {
    let given = [
        ("--base", options.base.is_some()),
        ("--map", !options.maps.is_empty()),
        ("--part", options.part.is_some()),
        ("--allow-unexpected", options.reading.allow_unexpected),
    ];
    match given.iter().find(|(_, is_given)| *is_given) {
        Some((option, _)) => Err(Error::Settings(format!(
            "{option} is for adapters; the tensors of two models are compared under their names"
        ))),
        None => Ok(()),
    }
}

/// One of the two that are compared.
enum Side {
    Model(Base),
    Adapter(Stored),
}

/// An adapter as it is stored.
enum Stored {
    Given(Given),
    Record(PathBuf),
}

impl Side {
    /// Looks at a path. The names of the tensors say whether a file is an adapter.
    fn open(path: &Path) -> Result<Self, Error> {
        let about = fs::metadata(path).map_err(Error::read(path))?;
        if about.is_dir() {
            if !path.join(CONFIG_FILE).is_file() {
                return Ok(Self::Model(Base::open(path)?));
            }
            if path.join(FILE).is_file() && Base::open(path).is_ok() {
                let why = "it holds a model and an adapter; name a file of the one that is meant";
                return Err(Error::malformed(path, why));
            }
            return Ok(Self::Adapter(Stored::Given(Given::Folder(
                path.to_path_buf(),
            ))));
        }
        if path
            .extension()
            .is_some_and(|extension| extension == RECORD)
        {
            return Ok(Self::Adapter(Stored::Record(path.to_path_buf())));
        }
        if peft_folder(path).is_none() {
            let base = Base::open(path)?;
            if !has_rotation(base.keys()) {
                return Ok(Self::Model(base));
            }
        }
        Ok(Self::Adapter(Stored::Given(Given::open(path)?)))
    }
}

/// An adapter whose layers have names that can be compared.
struct Named<'a> {
    path: &'a Path,
    adapter: Adapter,
    /// The rules from its names to those of the model that was given.
    places: Option<(&'a Base, Names)>,
}

impl<'a> Named<'a> {
    fn new(
        options: &'a Diff,
        path: &'a Path,
        stored: Stored,
        base: Option<&'a Base>,
    ) -> Result<Self, Error> {
        let names = Names::parse(&options.maps)?;
        let (adapter, base) = match (stored, base) {
            // A file of another program gets the model's names.
            (Stored::Given(Given::File(file)), Some(base)) => {
                (place(file, options.part.as_deref(), base, &names)?, None)
            }
            (Stored::Given(Given::File(file)), None) => (unplaced(options, file)?, None),
            (Stored::Record(record), base) => {
                refuse_maps(options, "a record")?;
                (record::read(&record, None, base)?, base)
            }
            (Stored::Given(Given::Folder(folder)), Some(base)) => {
                (load(&folder, KeyMap::new(), options.reading)?, Some(base))
            }
            (Stored::Given(Given::Folder(folder)), None) => {
                let names = Names::parse(&options.maps)?.into_key_map();
                (load(&folder, names, options.reading)?, None)
            }
        };
        let places = match base {
            Some(base) => Some((base, names.for_model(&Head::of(base)?))),
            None => None,
        };
        Ok(Self {
            path,
            adapter: adapter.in_f64(),
            places,
        })
    }

    /// The name of a module, in the model where there is one.
    fn name(&self, module: &str, tensor: &str) -> Result<String, Error> {
        let Some((base, names)) = &self.places else {
            return Ok(module.to_string());
        };
        let place = names.place(module, tensor, base)?;
        Ok(match place.part {
            (_, 1) => place.module,
            (index, parts) => format!("{} (part {} of {parts})", place.module, index + 1),
        })
    }

    fn layers(&self) -> Result<BTreeMap<String, &AdapterLayer>, Error> {
        let layers = self.adapter.layers().iter();
        self.unique(layers.map(|layer| Ok((self.name(layer.path(), "weight")?, layer))))
    }

    fn saved(&self) -> Result<BTreeMap<String, &SavedTensor>, Error> {
        let tensors = self.adapter.tensors().iter();
        self.unique(tensors.map(|tensor| {
            let module = self.name(tensor.module(), tensor.name())?;
            Ok((join(&module, tensor.name()), tensor))
        }))
    }

    /// Parts by their names, of which no two are the same.
    fn unique<T>(
        &self,
        parts: impl Iterator<Item = Result<(String, T), Error>>,
    ) -> Result<BTreeMap<String, T>, Error> {
        let mut unique = BTreeMap::new();
        for part in parts {
            let (name, part) = part?;
            if unique.contains_key(&name) {
                let why = format!("two parts of the adapter are for `{name}`");
                return Err(Error::malformed(self.path, why));
            }
            unique.insert(name, part);
        }
        Ok(unique)
    }
}

/// A file of another program with its own names.
fn unplaced(options: &Diff, mut file: AdapterFile) -> Result<Adapter, Error> {
    refuse_maps(options, "a file of another program")?;
    if let Some(start) = &options.part {
        file = file.with_only(start);
    }
    Ok(file.unplaced())
}

/// Refuses rules for names that nothing translates without a model.
fn refuse_maps(options: &Diff, what: &str) -> Result<(), Error> {
    match options.maps.is_empty() || options.base.is_some() {
        true => Ok(()),
        false => Err(Error::Settings(format!(
            "--map needs --base where {what} is compared"
        ))),
    }
}

/// Refuses two adapters whose modules have names and signs of different programs, unless there is a model to place them in.
fn check_comparable(options: &Diff, a: &Stored, b: &Stored) -> Result<(), Error> {
    let dialects = |stored: &Stored| match stored {
        Stored::Given(Given::File(file)) => Some(file.dialects()),
        _ => None,
    };
    let (one, other) = (dialects(a), dialects(b));
    if options.part.is_some() && one.is_none() && other.is_none() {
        return Err(Error::Settings(
            "--part is for files of other programs; an adapter of PEFT's is for one model".into(),
        ));
    }
    match options.base.is_some() || one == other {
        true => Ok(()),
        false => Err(Error::Settings(
            "the two adapters are of different programs, which name modules differently; pass --base, the model that both are \
             for"
                .into(),
        )),
    }
}

/// Two sets of names: those in both, and those in only one of them.
struct Overlap {
    both: Vec<String>,
    only: [Vec<String>; 2],
}

impl Overlap {
    fn new<'a>(a: impl Iterator<Item = &'a str>, b: impl Iterator<Item = &'a str>) -> Self {
        let (a, b): (BTreeSet<_>, BTreeSet<_>) = (a.collect(), b.collect());
        let sorted = |names: &mut dyn Iterator<Item = &&str>| {
            let mut names: Vec<_> = names.map(|name| name.to_string()).collect();
            names.sort_by(|a, b| layers::compare(a, b));
            names
        };
        Self {
            both: sorted(&mut a.intersection(&b)),
            only: [sorted(&mut a.difference(&b)), sorted(&mut b.difference(&a))],
        }
    }

    /// The lines that say what only one of the two has.
    fn lines(&self, what: &str, paths: [&Path; 2]) -> String {
        let lines = self
            .only
            .iter()
            .zip(paths)
            .filter(|(names, _)| !names.is_empty());
        let lines = lines.map(|(names, path)| {
            let (path, names) = (path.display().to_string(), short_list(names));
            format!("{what} only in {}: {}\n", shown(&path), shown(&names))
        });
        lines.collect()
    }
}

/// A layer of both adapters.
struct Row<'a> {
    name: &'a str,
    layers: [&'a AdapterLayer; 2],
    apart: Apart,
}

fn adapters(options: &Diff, a: Stored, b: Stored, json: bool) -> Result<(), Error> {
    check_comparable(options, &a, &b)?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    let a = Named::new(options, &options.a, a, base.as_ref())?;
    let b = Named::new(options, &options.b, b, base.as_ref())?;
    let (of_a, of_b) = (a.layers()?, b.layers()?);
    let names = Overlap::new(
        of_a.keys().map(String::as_str),
        of_b.keys().map(String::as_str),
    );
    if names.both.is_empty() {
        return Err(Error::Settings(format!(
            "no layer is in both {} and {}, of which the first has {} and the second {}; use --map or --base where they only \
             have different names",
            a.path.display(),
            b.path.display(),
            short_list(&names.only[0]),
            short_list(&names.only[1])
        )));
    }
    let (mut rows, mut refused) = (Vec::new(), Vec::new());
    for name in &names.both {
        let layers = [of_a[name], of_b[name]];
        match Apart::new((&a.adapter, layers[0]), (&b.adapter, layers[1])) {
            Ok(apart) => rows.push(Row {
                name,
                layers,
                apart,
            }),
            Err(why) => refused.push((name.clone(), why)),
        }
    }
    if rows.is_empty() {
        let lines = refused.iter().map(|(name, why)| format!("`{name}` {why}"));
        return Err(Error::Fit(lines.collect()));
    }
    let saved = Saved::new(&a, &b)?;
    for (_, names) in [&a.places, &b.places].into_iter().flatten() {
        names.note().iter().for_each(|line| note(line));
    }
    let mut text = table(&rows);
    text.push_str(&format!(
        "{} compared, turned by at most {:.4} rad and {:.4} rad in the mean\n",
        plural(rows.len(), "layer"),
        rows.iter()
            .map(|row| row.apart.largest_angle)
            .fold(0.0, f64::max),
        rows.iter().map(|row| row.apart.mean_angle).sum::<f64>() / rows.len() as f64
    ));
    let paths = [a.path, b.path];
    text.push_str(&names.lines("layers", paths));
    text.push_str(&not_compared(&refused));
    text.push_str(&saved.lines(paths));
    let layers = rows.iter().map(|row| {
        let [one, other] = row.layers;
        json!({
            "path": row.name,
            "block_size": [one.block_size(), other.block_size()],
            "factors": [one.n_butterfly_factor(), other.n_butterfly_factor()],
            "largest_angle": row.apart.largest_angle,
            "mean_angle": row.apart.mean_angle,
            "scale": row.apart.scale,
        })
    });
    let mut value = about("adapters", paths, &names, &refused);
    value["layers"] = layers.collect();
    value["saved"] = saved.to_json();
    report(json, &text, &value)
}

/// What the reports of adapters and models have in common.
fn about(kind: &str, paths: [&Path; 2], names: &Overlap, refused: &[(String, String)]) -> Value {
    let [a, b] = paths.map(|path| path.display().to_string());
    let refused: Vec<_> = refused
        .iter()
        .map(|(name, reason)| json!({"name": name, "reason": reason}))
        .collect();
    json!({
        "kind": kind,
        "a": a,
        "b": b,
        "only_in_a": names.only[0],
        "only_in_b": names.only[1],
        "not_compared": refused,
    })
}

/// A line for each layer or tensor that could not be compared.
fn not_compared(refused: &[(String, String)]) -> String {
    let lines = refused.iter();
    lines
        .map(|(name, why)| format!("not compared: `{}` {}\n", shown(name), shown(why)))
        .collect()
}

/// A line for each layer.
fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.chars().count()).max();
    let width = width.unwrap_or(0).max(5);
    let mut text = format!(
        "{:width$}  {:>9}  {:>7}  {:>11}  {:>9}  {:>9}\n",
        "layer", "block", "factors", "largest/rad", "mean/rad", "scale"
    );
    // One number where both have the same.
    let both = |[one, other]: [usize; 2]| match one == other {
        true => one.to_string(),
        false => format!("{one}, {other}"),
    };
    for row in rows {
        let apart = &row.apart;
        let scale = apart
            .scale
            .map_or("-".to_string(), |scale| format!("{scale:.2e}"));
        text.push_str(&format!(
            "{:width$}  {:>9}  {:>7}  {:>11.4}  {:>9.4}  {scale:>9}\n",
            shown(row.name),
            both(row.layers.map(AdapterLayer::block_size)),
            both(row.layers.map(AdapterLayer::n_butterfly_factor)),
            apart.largest_angle,
            apart.mean_angle
        ));
    }
    text
}

/// The biases and saved modules of two adapters.
struct Saved {
    names: Overlap,
    /// How far those are apart that both have; none where they have different shapes.
    apart: Vec<(String, Option<Difference>)>,
}

impl Saved {
    fn new(a: &Named, b: &Named) -> Result<Self, Error> {
        let (of_a, of_b) = (a.saved()?, b.saved()?);
        let names = Overlap::new(
            of_a.keys().map(String::as_str),
            of_b.keys().map(String::as_str),
        );
        let apart = names.both.iter().map(|name| {
            let [one, other] = [of_a[name], of_b[name]].map(SavedTensor::data);
            let mut difference = Difference::default();
            difference.widen(other, one);
            (
                name.clone(),
                (one.shape() == other.shape()).then_some(difference),
            )
        });
        let apart = apart.collect();
        Ok(Self { names, apart })
    }

    fn lines(&self, paths: [&Path; 2]) -> String {
        let mut text = String::new();
        for (name, difference) in &self.apart {
            let apart = match difference {
                None => "has another shape".to_string(),
                Some(difference) if difference.absolute() == 0.0 => continue,
                Some(difference) => format!(
                    "differs by {} of its norm, at most {:.1e}",
                    relative(difference),
                    difference.absolute()
                ),
            };
            text.push_str(&format!("saved `{}` {apart}\n", shown(name)));
        }
        text + &self.names.lines("saved", paths)
    }

    fn to_json(&self) -> Value {
        let both: Vec<_> = self
            .apart
            .iter()
            .map(|(name, difference)| {
                json!({
                    "tensor": name,
                    "relative": difference.and_then(|difference| difference.of_weight()),
                    "absolute": difference.map(|difference| difference.absolute()),
                })
            })
            .collect();
        let [a, b] = &self.names.only;
        json!({"both": both, "only_in_a": a, "only_in_b": b})
    }
}

/// How far a weight is from another, relative to the norm of that.
fn relative(difference: &Difference) -> String {
    let relative = difference.of_weight();
    relative.map_or("-".to_string(), |relative| format!("{relative:.2e}"))
}

fn models(a: &Base, b: &Base, json: bool) -> Result<(), Error> {
    let names = Overlap::new(a.keys(), b.keys());
    if names.both.is_empty() {
        return Err(Error::Settings(format!(
            "no tensor is in both {} and {}, of which the first has {} and the second {}",
            a.path.display(),
            b.path.display(),
            short_list(&names.only[0]),
            short_list(&names.only[1])
        )));
    }
    let (mut rows, mut refused) = (Vec::new(), Vec::new());
    let entries = || {
        names
            .both
            .iter()
            .filter_map(|key| Some((key, a.entry(key)?, b.entry(key)?)))
    };
    let progress = progress(entries().map(|(_, (_, entry), _)| entry.bytes).sum());
    for (key, one, other) in entries() {
        let [first, second] = [one.1, other.1];
        if first.shape != second.shape {
            let why = format!(
                "is {:?} in the first and {:?} in the second",
                first.shape, second.shape
            );
            refused.push((key.clone(), why));
        } else if from_file(first.dtype).is_some() && from_file(second.dtype).is_some() {
            let difference = between(b, a, iter::once(key))?;
            // NaN differs from itself, and the same bytes do not.
            let is_same = difference.absolute().is_nan() && is_same(one, other)?;
            let difference = if is_same {
                Difference::default()
            } else {
                difference
            };
            rows.push((key, &first.shape, difference));
        } else if is_same(one, other)? {
            rows.push((key, &first.shape, Difference::default()));
        } else {
            let [first, second] = [first, second].map(|entry| file_name(entry.dtype));
            let why = format!(
                "is {first} in the first and {second} in the second, and holds other bytes"
            );
            refused.push((key.clone(), why));
        }
        progress.inc(first.bytes);
    }
    progress.finish_and_clear();
    if rows.is_empty() {
        let lines = refused.iter().map(|(name, why)| format!("`{name}` {why}"));
        return Err(Error::Fit(lines.collect()));
    }
    let is_changed = |difference: &Difference| difference.absolute() != 0.0;
    let changed: Vec<_> = rows
        .iter()
        .filter(|(.., difference)| is_changed(difference))
        .collect();
    let width = changed.iter().map(|(key, ..)| key.chars().count()).max();
    let width = width.unwrap_or(0).max(6);
    let mut text = String::new();
    if !changed.is_empty() {
        text.push_str(&format!(
            "{:width$}  {:>8}  {:>8}  shape\n",
            "tensor", "relative", "largest"
        ));
    }
    for (key, shape, difference) in &changed {
        text.push_str(&format!(
            "{:width$}  {:>8}  {:>8.2e}  {shape:?}\n",
            shown(key),
            relative(difference),
            difference.absolute()
        ));
    }
    text.push_str(&format!(
        "differ: {} of {}\n",
        changed.len(),
        plural(rows.len(), "tensor")
    ));
    let paths = [a.path.as_path(), b.path.as_path()];
    text.push_str(&names.lines("tensors", paths));
    text.push_str(&not_compared(&refused));
    let mut value = about("models", paths, &names, &refused);
    value["differ"] = changed.len().into();
    value["tensors"] = rows
        .iter()
        .map(|(key, shape, difference)| {
            json!({
                "tensor": key,
                "shape": shape,
                "relative": difference.of_weight(),
                "absolute": difference.absolute(),
            })
        })
        .collect();
    report(json, &text, &value)
}
