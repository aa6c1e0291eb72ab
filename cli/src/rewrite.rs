//! A model written anew with some of its tensors changed, a few rows in memory at a time.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use burn_boft::tensors::{
    decode, encode, file_name, from_file, is_finite, is_float, part, to_file,
};
use burn_boft::value::SavedTensor;
use indicatif::ProgressBar;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::base::{Base, Shard};
use crate::changes::{Added, Change, Changes, Step, together};
use crate::error::Error;
use crate::header::{self, Entry};
use crate::load::Loaded;
use crate::output::{Form, OutputFile, OutputFolder, check_free, check_outside};
use crate::{terminal, tie};

/// How many bytes are copied at a time.
const COPIED: usize = 8 << 20;
/// How many numbers are computed with at a time, unless a single row has more.
pub const COMPUTED: usize = 2 << 20;

/// Rotates rows of weights, or undoes that.
pub trait Turn {
    /// Prepares for rows that these rotations turn one after the other, of a weight of so many inputs.
    fn start(&mut self, steps: &[Step], d_input: usize) -> Result<(), String>;

    /// The rotated rows, in the precision that they came in. `rows` counts from the first row of the weight, and where
    /// outputs are rotated, they are whole spans.
    fn turn(&mut self, numbers: TensorData, rows: Range<usize>) -> Result<TensorData, String>;
}

/// Refuses an output that is there, is of another form than the model, or inside one of the inputs.
pub fn check_output(output: &Path, base: &Base, adapters: &[Loaded]) -> Result<(), Error> {
    let form = match base.is_folder() {
        true => Form::Folder,
        false => Form::File,
    };
    check_free(output, form)?;
    let extension = output
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    if base.is_folder() && extension {
        return Err(Error::Output {
            path: output.to_path_buf(),
            reason: format!(
                "is the name of a file, and {} is a folder; name a folder",
                base.path.display()
            ),
        });
    }
    if base.is_folder() {
        check_outside(output, &base.path)?;
    }
    adapters
        .iter()
        .try_for_each(|adapter| check_outside(output, &adapter.path))
}

/// Writes the model with its changes, and these other files of its folder.
pub fn rewrite(
    base: &Base,
    others: &[PathBuf],
    changes: &Changes,
    output: &Path,
    turn: &mut dyn Turn,
) -> Result<(), Error> {
    let bytes = base
        .shards
        .iter()
        .flat_map(|shard| &shard.header.entries)
        .map(|entry| entry.bytes)
        .sum();
    let progress = terminal::progress(bytes);
    let mut writer = Writer {
        changes,
        turn,
        progress,
    };
    let result = match base.is_folder() {
        true => writer.folder(base, others, output),
        false => OutputFile::create(output)
            .and_then(|file| writer.shard(base, &base.shards[0], true, file)),
    };
    writer.progress.finish_and_clear();
    result
}

struct Writer<'a> {
    changes: &'a Changes<'a>,
    turn: &'a mut dyn Turn,
    progress: ProgressBar,
}

impl Writer<'_> {
    fn folder(&mut self, base: &Base, others: &[PathBuf], output: &Path) -> Result<(), Error> {
        let folder = OutputFolder::create(output)?;
        self.fill(base, others, &folder)?;
        folder.finish()
    }

    fn fill(
        &mut self,
        base: &Base,
        others: &[PathBuf],
        folder: &OutputFolder,
    ) -> Result<(), Error> {
        for (index, shard) in base.shards.iter().enumerate() {
            let file = folder.file(Path::new(&shard.name))?;
            self.shard(base, shard, index + 1 == base.shards.len(), file)?;
        }
        if let Some((name, index)) = &base.index {
            let index = self.index(base, index.clone());
            let mut file = folder.file(Path::new(name))?;
            file.write(format!("{:#}\n", Value::Object(index)).as_bytes())?;
            file.finish()?;
        }
        for file in others {
            match &self.changes.config {
                Some(config) if file == Path::new(tie::FILE) => {
                    let mut file = folder.file(file)?;
                    file.write(config.as_bytes())?;
                    file.finish()?;
                }
                _ => folder.copy(&base.path.join(file), file)?,
            }
        }
        Ok(())
    }

    /// The index of the output. New tensors are in the last shard.
    fn index(&self, base: &Base, mut index: Map<String, Value>) -> Map<String, Value> {
        let last = base.shards.last().map_or("", |shard| shard.name.as_str());
        if let Some(Value::Object(map)) = index.get_mut("weight_map") {
            let added = self.changes.added.keys();
            map.extend(added.map(|key| (key.clone(), Value::from(last))));
        }
        // Totals are only corrected by what changes: tied weights count once in them, and buffers only in the size.
        let bytes = |dtype, shape: &[usize]| header::byte_count(dtype, shape).unwrap_or_default();
        let numbers = |dtype, shape: &[usize]| match from_file(dtype).is_some_and(is_float) {
            true => shape.iter().product::<usize>() as u64,
            false => 0,
        };
        if let Some(Value::Object(metadata)) = index.get_mut("metadata") {
            self.grow(base, metadata, "total_size", bytes);
            self.grow(base, metadata, "total_parameters", numbers);
        }
        index
    }

    /// Adds to a total of the index, if it has this one, by how much the output is larger. A total that is no count of
    /// bytes, or would not be one afterwards, stays as it is.
    fn grow(
        &self,
        base: &Base,
        metadata: &mut Map<String, Value>,
        total: &str,
        measure: fn(Dtype, &[usize]) -> u64,
    ) {
        let Some((total, before)) = metadata
            .get_mut(total)
            .and_then(|total| count(total).map(|before| (total, before)))
        else {
            return;
        };
        let (mut more, mut less) = (0, 0);
        for entry in base.shards.iter().flat_map(|shard| &shard.header.entries) {
            let (dtype, shape) = self.layout(entry);
            more += measure(dtype, &shape);
            less += measure(entry.dtype, &entry.shape);
        }
        for added in self.changes.added.values() {
            let layout = added_layout(base, added);
            more += layout.map_or(0, |(dtype, shape)| measure(dtype, &shape));
        }
        let after = before
            .checked_add(more)
            .and_then(|sum| sum.checked_sub(less));
        if let Some(after) = after.filter(|_| more != less) {
            *total = Value::from(after);
        }
    }

    /// The precision and shape of a tensor in the output.
    fn layout(&self, entry: &Entry) -> (Dtype, Vec<usize>) {
        let shape = match self.changes.of.get(&entry.key) {
            Some(Change::New(tensor)) => tensor.data().shape().to_vec(),
            _ => entry.shape.clone(),
        };
        (entry.dtype, shape)
    }

    fn shard(
        &mut self,
        base: &Base,
        shard: &Shard,
        is_last: bool,
        mut file: OutputFile,
    ) -> Result<(), Error> {
        let entries = &shard.header.entries;
        let mut layouts: Vec<_> = entries
            .iter()
            .map(|entry| (entry.key.as_str(), self.layout(entry)))
            .collect();
        let added: Vec<_> = self.changes.added.iter().filter(|_| is_last).collect();
        for (key, added) in &added {
            let layout = added_layout(base, added).ok_or_else(|| {
                Error::tensor(
                    &shard.path,
                    key,
                    "would have a precision that no file keeps",
                )
            })?;
            layouts.push((key.as_str(), layout));
        }
        let layouts = layouts
            .iter()
            .map(|(key, (dtype, shape))| (*key, *dtype, shape.as_slice()));
        let header =
            header::to_bytes(shard.header.metadata.as_ref(), layouts).ok_or_else(|| {
                Error::malformed(
                    &shard.path,
                    "the merged file would be larger than a file can be",
                )
            })?;
        file.write(&header)?;
        for entry in entries {
            match self.changes.of.get(&entry.key) {
                None => self.copy(shard, entry, 0..entry.bytes, &mut file)?,
                Some(Change::Rotate(parts)) => {
                    self.rows(shard, entry, parts, &mut file, Self::rotate)?;
                }
                Some(Change::Replace(parts)) => {
                    self.rows(shard, entry, parts, &mut file, Self::replace)?;
                }
                Some(Change::New(tensor)) => write_rounded(tensor, shard, entry, &mut file)?,
            }
        }
        for (key, added) in added {
            match added {
                Added::Saved(tensor) => {
                    write_saved(tensor.data(), tensor.data().dtype(), shard, key, &mut file)?;
                }
                Added::Copy(of) => {
                    if let Some((shard, entry)) = base.entry(of) {
                        self.copy(shard, entry, 0..entry.bytes, &mut file)?;
                    }
                }
            }
        }
        file.finish()
    }

    /// Copies bytes of a tensor.
    fn copy(
        &self,
        shard: &Shard,
        entry: &Entry,
        bytes: Range<u64>,
        file: &mut OutputFile,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; COPIED.min((bytes.end - bytes.start) as usize)];
        let mut offset = bytes.start;
        while offset < bytes.end {
            let part = buffer.len().min((bytes.end - offset) as usize);
            shard.read(entry, offset, &mut buffer[..part])?;
            file.write(&buffer[..part])?;
            offset += part as u64;
            self.progress.inc(part as u64);
        }
        Ok(())
    }

    /// Writes a tensor of which some rows change, in order: `write` writes those, and the others are copied.
    fn rows<T>(
        &mut self,
        shard: &Shard,
        entry: &Entry,
        parts: &[(Range<usize>, T)],
        file: &mut OutputFile,
        write: impl Fn(
            &mut Self,
            &Shard,
            &Entry,
            Range<usize>,
            &T,
            &mut OutputFile,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let row = row_bytes(entry);
        let mut done = 0;
        for (rows, part) in parts {
            let before = done as u64 * row..rows.start as u64 * row;
            self.copy(shard, entry, before, file)?;
            write(self, shard, entry, rows.clone(), part, file)?;
            done = rows.end;
        }
        self.copy(shard, entry, done as u64 * row..entry.bytes, file)
    }

    fn rotate(
        &mut self,
        shard: &Shard,
        entry: &Entry,
        rows: Range<usize>,
        steps: &Vec<Step>,
        file: &mut OutputFile,
    ) -> Result<(), Error> {
        let refuse = |reason: String| Error::tensor(&shard.path, &entry.key, reason);
        let d_input: usize = entry.shape[1..].iter().product();
        self.turn.start(steps, d_input).map_err(refuse)?;
        let row = row_bytes(entry);
        let together = together(steps);
        let step = (COMPUTED / d_input / together).max(1) * together;
        for start in rows.clone().step_by(step) {
            let part = start..rows.end.min(start + step);
            let mut bytes = vec![0; part.len() * row as usize];
            shard.read(entry, start as u64 * row, &mut bytes)?;
            let numbers = decode(entry.dtype, &bytes, vec![part.len(), d_input])
                .ok_or_else(|| refuse(format!("is {}", file_name(entry.dtype))))?;
            let turned = self.turn.turn(numbers, part).map_err(refuse)?;
            check_finite(&turned, shard, &entry.key)?;
            file.write(&encoded(&turned, shard, &entry.key)?)?;
            self.progress.inc(bytes.len() as u64);
        }
        Ok(())
    }

    fn replace(
        &mut self,
        shard: &Shard,
        entry: &Entry,
        rows: Range<usize>,
        tensor: &&SavedTensor,
        file: &mut OutputFile,
    ) -> Result<(), Error> {
        write_rounded(tensor, shard, entry, file)?;
        self.progress.inc(rows.len() as u64 * row_bytes(entry));
        Ok(())
    }
}

/// The count in a JSON number, which may be written as a float.
fn count(number: &Value) -> Option<u64> {
    let float = || {
        let count = number.as_f64()?;
        let is_count = count.fract() == 0.0 && (0.0..u64::MAX as f64).contains(&count);
        is_count.then_some(count as u64)
    };
    number.as_u64().or_else(float)
}

/// The precision and shape of a new tensor.
fn added_layout(base: &Base, added: &Added) -> Option<(Dtype, Vec<usize>)> {
    match added {
        Added::Saved(tensor) => {
            let dtype = to_file(tensor.data().dtype())?;
            Some((dtype, tensor.data().shape().to_vec()))
        }
        Added::Copy(of) => {
            let (_, entry) = base.entry(of)?;
            Some((entry.dtype, entry.shape.clone()))
        }
    }
}

/// The bytes of one step along the first axis.
pub fn row_bytes(entry: &Entry) -> u64 {
    let rows = entry.shape.first().copied().unwrap_or(1) as u64;
    entry.bytes.checked_div(rows).unwrap_or(0)
}

/// Writes a saved tensor in the precision of the one it replaces.
fn write_rounded(
    tensor: &SavedTensor,
    shard: &Shard,
    entry: &Entry,
    file: &mut OutputFile,
) -> Result<(), Error> {
    let dtype = from_file(entry.dtype).ok_or_else(|| {
        Error::tensor(
            &shard.path,
            &entry.key,
            format!("is {}", file_name(entry.dtype)),
        )
    })?;
    write_saved(tensor.data(), dtype, shard, &entry.key, file)
}

/// Writes numbers in a precision, and converts only a part of them at a time to save memory.
fn write_saved(
    data: &TensorData,
    dtype: DType,
    shard: &Shard,
    key: &str,
    file: &mut OutputFile,
) -> Result<(), Error> {
    let count = data.num_elements();
    for start in (0..count).step_by(COMPUTED) {
        let numbers = part(data, start..count.min(start + COMPUTED)).convert_dtype(dtype);
        check_finite(&numbers, shard, key)?;
        file.write(&encoded(&numbers, shard, key)?)?;
    }
    Ok(())
}

/// The bytes of numbers as the file holds them.
fn encoded(data: &TensorData, shard: &Shard, key: &str) -> Result<Vec<u8>, Error> {
    encode(data).ok_or_else(|| {
        let why = format!("would be {}, which no file keeps", data.dtype().name());
        Error::tensor(&shard.path, key, why)
    })
}

fn check_finite(data: &TensorData, shard: &Shard, key: &str) -> Result<(), Error> {
    match is_finite(data) {
        true => Ok(()),
        false => Err(Error::tensor(
            &shard.path,
            key,
            "would not be finite: it or the adapter holds NaN, infinity or numbers beyond its precision",
        )),
    }
}
