//! Finds where each part of an adapter belongs in a model. Everything is checked before anything is written.

use std::cell::OnceCell;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use burn::tensor::DType;
use burn_boft::Adapter;
use burn_boft::tensors::{file_name, from_file, is_float};
use burn_boft::value::{AdapterLayer, Place, SavedTensor, join};
use safetensors::Dtype;

use crate::attention::key;
use crate::base::Base;
use crate::changes::{Added, Change, Changes, Step};
use crate::conv1d::Orientation;
use crate::error::{Error, LINE_PARTS};
use crate::header::Entry;
use crate::load::Loaded;
use crate::names::{Names, nearest};
use crate::tie::{Head, is_head};

impl<'a> Changes<'a> {
    /// Finds the place of every layer and every saved tensor of an adapter.
    pub fn find(of: &'a Loaded, base: &Base, head: &Head) -> Result<Self, Error> {
        let Loaded { adapter, names, .. } = of;
        let mut finder = Finder {
            of,
            base,
            names,
            head,
            orientation: Orientation::of(base, head),
            keys: OnceCell::new(),
            adapted: adapter
                .layers()
                .iter()
                .map(|layer| first(layer.path()))
                .collect(),
            owners: Owners::of(adapter),
            changes: Self::default(),
            problems: Vec::new(),
        };
        for layer in adapter.layers() {
            finder.layer(layer)?;
        }
        for tensor in adapter.tensors() {
            finder.tensor(tensor)?;
        }
        if !finder.problems.is_empty() {
            return Err(Error::Fit(finder.problems));
        }
        let mut changes = finder.changes;
        let keys = changes.of.keys().chain(changes.added.keys());
        changes.by = keys.map(|key| (key.clone(), of.path.as_path())).collect();
        Ok(changes)
    }
}

struct Finder<'a, 'b> {
    of: &'a Loaded,
    base: &'b Base,
    names: &'b Names,
    head: &'b Head,
    orientation: Orientation<'b>,
    /// The keys of the model, once somebody asked for them.
    keys: OnceCell<Keys<'b>>,
    /// The top-level modules that have adapted layers, with the adapter's names.
    adapted: BTreeSet<&'a str>,
    owners: Owners<'a>,
    changes: Changes<'a>,
    problems: Vec<String>,
}

impl<'a> Finder<'a, '_> {
    /// The nearest keys for a message that is shown. The search looks at all keys, so the others go without.
    fn nearest(&self, key: &str) -> String {
        match self.problems.len() < LINE_PARTS {
            true => nearest(key, self.base),
            false => String::new(),
        }
    }

    fn layer(&mut self, layer: &'a AdapterLayer) -> Result<(), Error> {
        if layer.is_identity() {
            self.changes.idle.push(layer.path().to_string());
            return Ok(());
        }
        let place = self.names.place(layer.path(), "weight", self.base)?;
        let key = key(&place, "weight");
        let Some((shard, entry)) = self.base.entry(&key) else {
            let (path, module) = (self.base.path.display(), layer.path());
            self.problems.push(match self.head.is_tied(&key) {
                true => format!(
                    "{path}: `{key}` is the embedding, and a rotation of the head would rotate both; save the model \
                     with a head of its own first"
                ),
                false => format!(
                    "{path} has no `{key}` for the adapter of `{module}`{}; use --map to rename modules",
                    self.nearest(&key)
                ),
            });
            return Ok(());
        };
        if let Some(why) = self.orientation.refusal(&place.module) {
            self.problems.push(format!(
                "{}: `{key}`, which the adapter rotates, {why}",
                shard.path.display()
            ));
            return Ok(());
        }
        match rows(layer, entry, &place) {
            Ok(rows) => self.insert(key, Part::Layer(rows, layer)),
            Err(why) => self.problems.push(format!(
                "{}: the adapter of `{}`{why}; `{key}` is {:?} {}",
                shard.path.display(),
                layer.path(),
                entry.shape,
                file_name(entry.dtype)
            )),
        }
        Ok(())
    }

    fn tensor(&mut self, tensor: &'a SavedTensor) -> Result<(), Error> {
        let is_saved_module = self.owners.is_saved_module(tensor.module());
        let place = self
            .names
            .place(tensor.module(), tensor.name(), self.base)?;
        let key = key(&place, tensor.name());
        let Some((shard, entry)) = self.base.entry(&key) else {
            let is_new = is_saved_module && self.is_new_head(tensor.module(), &key);
            match is_new || self.head.is_shared(&key) {
                true => {
                    let added = Added::Saved(tensor);
                    if self.changes.added.insert(key.clone(), added).is_some() {
                        self.clash(&key);
                    }
                }
                false => self.problems.push(format!(
                    "{} has no `{key}` for the adapter's `{}`{}; use --map to rename modules",
                    self.base.path.display(),
                    join(tensor.module(), tensor.name()),
                    self.nearest(&key)
                )),
            }
            return Ok(());
        };
        let shape = tensor.data().shape().to_vec();
        let rows = place.rows(d_output(entry)).filter(|rows| {
            let mut expected = entry.shape.clone();
            if let Some(first) = expected.first_mut() {
                *first = rows.len();
            }
            expected == shape
        });
        // Counts stay i64, and floats are rounded to the precision of the model.
        let same_kind = match tensor.data().dtype() {
            DType::I64 => entry.dtype == Dtype::I64,
            _ => from_file(entry.dtype).is_some_and(is_float),
        };
        match rows {
            Some(rows) if same_kind => self.insert(key, Part::Rows(rows, tensor)),
            // A new head for other classes.
            None if same_kind
                && is_saved_module
                && place.part.1 == 1
                && entry.shape.len() == shape.len()
                && entry.shape.get(1..) == shape.get(1..) =>
            {
                self.insert(key, Part::Whole(tensor));
            }
            _ => self.problems.push(format!(
                "{}: `{key}` is {:?} {}, and the adapter's `{}` is {shape:?} {}",
                shard.path.display(),
                entry.shape,
                file_name(entry.dtype),
                join(tensor.module(), tensor.name()),
                tensor.data().dtype().name()
            )),
        }
        Ok(())
    }

    /// Whether a saved module that the model's file lacks is a head that the model does not have yet: a module of its
    /// own at the top. Anything else is in the file under another name.
    fn is_new_head(&self, module: &str, key: &str) -> bool {
        let keys = self.keys.get_or_init(|| Keys::of(self.base));
        let is_in_file = keys.tops.contains(first(key)) || keys.end_with(key);
        let is_head_of_file = is_head(key) && keys.has_head;
        !(self.adapted.contains(first(module)) || is_in_file || is_head_of_file)
    }

    /// Notes a change of a tensor. It is a problem if the tensor has one already and this is not for other rows of it.
    fn insert(&mut self, key: String, part: Part<'a>) {
        let changes = &mut self.changes.of;
        let taken = match (changes.get_mut(&key), part) {
            (None, part) => {
                let change = match part {
                    Part::Layer(rows, layer) => {
                        Change::Rotate(vec![(rows.clone(), step(self.of, rows, layer))])
                    }
                    Part::Rows(rows, tensor) => Change::Replace(vec![(rows, tensor)]),
                    Part::Whole(tensor) => Change::New(tensor),
                };
                changes.insert(key, change);
                return;
            }
            (Some(Change::Rotate(parts)), Part::Layer(rows, layer)) => {
                add(parts, rows.clone(), step(self.of, rows, layer))
            }
            (Some(Change::Replace(parts)), Part::Rows(rows, tensor)) => add(parts, rows, tensor),
            _ => true,
        };
        if taken {
            self.clash(&key);
        }
    }

    fn clash(&mut self, key: &str) {
        self.problems.push(format!(
            "{}: two parts of the adapter change `{key}`",
            self.base.path.display()
        ));
    }
}

/// The keys of a model, indexed for many lookups.
struct Keys<'b> {
    /// Their first components.
    tops: HashSet<&'b str>,
    /// The keys read backwards: what ends a key starts it then.
    backwards: BTreeSet<String>,
    has_head: bool,
}

impl<'b> Keys<'b> {
    fn of(base: &'b Base) -> Self {
        Self {
            tops: base.keys().map(first).collect(),
            backwards: base.keys().map(backwards).collect(),
            has_head: base.keys().any(is_head),
        }
    }

    /// Whether a key of the model ends with this one, at a dot.
    fn end_with(&self, key: &str) -> bool {
        let end = format!("{}.", backwards(key));
        let next = self.backwards.range(end.clone()..).next();
        next.is_some_and(|other| other.starts_with(&end))
    }
}

fn backwards(key: &str) -> String {
    key.chars().rev().collect()
}

/// One part of an adapter at its place.
enum Part<'a> {
    Layer(Range<usize>, &'a AdapterLayer),
    Rows(Range<usize>, &'a SavedTensor),
    Whole(&'a SavedTensor),
}

/// The first component of a path.
fn first(path: &str) -> &str {
    path.split('.').next().unwrap_or(path)
}

/// What the saved tensors of an adapter belong to.
struct Owners<'a> {
    /// The adapted layers.
    layers: HashSet<&'a str>,
    /// The modules of which more than the bias was saved.
    whole: HashSet<&'a str>,
}

impl<'a> Owners<'a> {
    fn of(adapter: &'a Adapter) -> Self {
        let tensors = adapter.tensors().iter();
        let weights = tensors.filter(|tensor| tensor.name() != "bias");
        Self {
            layers: adapter.layers().iter().map(AdapterLayer::path).collect(),
            whole: weights.map(SavedTensor::module).collect(),
        }
    }

    /// Whether a module is saved as a whole. Of an adapted layer, and of other layers, it may be only the bias.
    fn is_saved_module(&self, module: &str) -> bool {
        self.whole.contains(module) && !self.layers.contains(module)
    }
}

/// Adds rows in order, unless they overlap with other rows. Returns whether they do.
fn add<T>(parts: &mut Vec<(Range<usize>, T)>, rows: Range<usize>, part: T) -> bool {
    let at = parts.partition_point(|(other, _)| other.start < rows.start);
    let free = parts
        .iter()
        .all(|(other, _)| other.end <= rows.start || rows.end <= other.start);
    if free {
        parts.insert(at, (rows, part));
    }
    !free
}

/// The only rotation of these rows.
fn step<'a>(of: &'a Loaded, rows: Range<usize>, layer: &'a AdapterLayer) -> Vec<Step<'a>> {
    let (path, adapter) = (of.path.as_path(), &of.adapter);
    vec![Step {
        path,
        adapter,
        layer,
        rows,
    }]
}

/// The rows of a tensor that a layer of the adapter rotates, or why it does not fit them: the words after "the adapter
/// of …".
fn rows(layer: &AdapterLayer, entry: &Entry, place: &Place) -> Result<Range<usize>, String> {
    let rows = d_output(entry);
    let rows = place.rows(rows).ok_or_else(|| {
        let parts = place.part.1;
        format!(
            " is for one of {parts} equal parts of its rows, and {rows} rows have no such parts"
        )
    })?;
    let mut shape = entry.shape.clone();
    if let Some(first) = shape.first_mut() {
        *first = rows.len();
    }
    layer.check_fit(&shape).map_err(|why| why.to_string())?;
    match from_file(entry.dtype).filter(|dtype| is_float(*dtype)) {
        None => Err(
            " rotates weights in f64, f32, f16 and bf16 only; merge it into the model before the model is quantized"
                .into(),
        ),
        Some(DType::F64) if layer.skew().dtype() != DType::F64 => {
            Err(" is less precise than the weight; save both in the same precision".into())
        }
        Some(_) => Ok(rows),
    }
}

/// The length of the first axis.
fn d_output(entry: &Entry) -> usize {
    entry.shape.first().copied().unwrap_or(1)
}
