//! A model written anew with some of its tensors changed.
//!
//! A file is computed in waves of 16 MiB, so that memory does not grow with the model. While one wave is computed on
//! all cores, the one before it is written and the one after it prepared.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread::{self, ScopedJoinHandle};

use burn::tensor::Bytes;
use burn_boft::tensors::{from_file, is_float, to_file};
use indicatif::ProgressBar;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::base::{Base, Shard};
use crate::changes::{Added, Change, Changes};
use crate::error::Error;
use crate::header::{self, Entry};
use crate::load::Loaded;
use crate::output::{Form, OutputFile, OutputFolder, check_free, check_outside};
use crate::pieces::{Piece, Turn, of_added, of_tensor};
use crate::{terminal, tie};

/// How many bytes are computed at a time, in pieces on all cores.
const WAVE: usize = 16 << 20;

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
    turn: &impl Turn,
) -> Result<(), Error> {
    let mut writer = Writer {
        base,
        changes,
        turn,
        progress: ProgressBar::hidden(),
    };
    writer.progress = terminal::progress(writer.total());
    let result = match base.is_folder() {
        true => writer.folder(others, output),
        false => {
            let file = OutputFile::create(output);
            let file = file.and_then(|file| writer.shard(&base.shards[0], true, file));
            file.and_then(OutputFile::finish)
        }
    };
    writer.progress.finish_and_clear();
    result
}

struct Writer<'a, T> {
    base: &'a Base,
    changes: &'a Changes<'a>,
    turn: &'a T,
    progress: ProgressBar,
}

impl<T: Turn> Writer<'_, T> {
    /// How many bytes the tensors of the output have.
    fn total(&self) -> u64 {
        let bytes = |(dtype, shape): (Dtype, Vec<usize>)| {
            header::byte_count(dtype, &shape).unwrap_or_default()
        };
        let entries = self
            .base
            .shards
            .iter()
            .flat_map(|shard| &shard.header.entries);
        let entries = entries.map(|entry| self.layout(entry));
        let added = self.changes.added.values();
        let added = added.filter_map(|added| added_layout(self.base, added));
        entries.chain(added).map(bytes).sum()
    }

    fn folder(&self, others: &[PathBuf], output: &Path) -> Result<(), Error> {
        let folder = OutputFolder::create(output)?;
        self.fill(others, &folder)?;
        folder.finish()
    }

    fn fill(&self, others: &[PathBuf], folder: &OutputFolder) -> Result<(), Error> {
        let base = self.base;
        thread::scope(|scope| {
            // The disk takes up one file while the next is computed.
            let mut finishing: Option<ScopedJoinHandle<Result<(), Error>>> = None;
            for (index, shard) in base.shards.iter().enumerate() {
                let file = folder.file(Path::new(&shard.name))?;
                let file = self.shard(shard, index + 1 == base.shards.len(), file)?;
                let next = scope.spawn(|| file.finish());
                finished(finishing.replace(next))?;
            }
            finished(finishing)
        })?;
        if let Some((name, index)) = &base.index {
            let index = self.index(index.clone());
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
    fn index(&self, mut index: Map<String, Value>) -> Map<String, Value> {
        let last = self
            .base
            .shards
            .last()
            .map_or("", |shard| shard.name.as_str());
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
            self.grow(metadata, "total_size", bytes);
            self.grow(metadata, "total_parameters", numbers);
        }
        index
    }

    /// Adds to a total of the index, if it has this one, by how much the output is larger. A total that is no count of
    /// bytes, or would not be one afterwards, stays as it is.
    fn grow(
        &self,
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
        for entry in self
            .base
            .shards
            .iter()
            .flat_map(|shard| &shard.header.entries)
        {
            let (dtype, shape) = self.layout(entry);
            more += measure(dtype, &shape);
            less += measure(entry.dtype, &entry.shape);
        }
        for added in self.changes.added.values() {
            let layout = added_layout(self.base, added);
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

    /// Writes the tensors of a file, which is finished by the caller.
    fn shard(
        &self,
        shard: &Shard,
        is_last: bool,
        mut file: OutputFile,
    ) -> Result<OutputFile, Error> {
        let entries = &shard.header.entries;
        let mut layouts: Vec<_> = entries
            .iter()
            .map(|entry| (entry.key.as_str(), self.layout(entry)))
            .collect();
        let added: Vec<_> = self.changes.added.iter().filter(|_| is_last).collect();
        for (key, added) in &added {
            let layout = added_layout(self.base, added).ok_or_else(|| {
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
        let tensors = entries
            .iter()
            .flat_map(|entry| of_tensor(shard, entry, self.changes, self.turn));
        let added = added
            .into_iter()
            .flat_map(|(key, added)| of_added(self.base, shard, (key, added)));
        let mut pieces = tensors.chain(added);
        let (mut computed, mut wave) = (Vec::new(), next_wave(&mut pieces)?);
        loop {
            let (next, (written, following)) = rayon::join(
                || {
                    wave.par_iter()
                        .map_init(Vec::new, |buffer, piece| piece.bytes(self.turn, buffer))
                        .collect()
                },
                // Rotations are prepared meanwhile, too.
                || (self.write(&computed, &mut file), next_wave(&mut pieces)),
            );
            written?;
            let next: Vec<_> = next;
            computed = next.into_iter().collect::<Result<_, _>>()?;
            if wave.is_empty() {
                return Ok(file);
            }
            wave = following?;
        }
    }

    fn write(&self, pieces: &[Bytes], file: &mut OutputFile) -> Result<(), Error> {
        for bytes in pieces {
            file.write(bytes)?;
            self.progress.inc(bytes.len() as u64);
        }
        Ok(())
    }
}

/// What became of a file that a thread finishes; of none, that all is well.
fn finished(thread: Option<ScopedJoinHandle<Result<(), Error>>>) -> Result<(), Error> {
    thread.map_or(Ok(()), |thread| {
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The next pieces, of [`WAVE`] bytes or a little more; none at the end.
fn next_wave<'a, R>(
    pieces: &mut impl Iterator<Item = Result<Piece<'a, R>, Error>>,
) -> Result<Vec<Piece<'a, R>>, Error> {
    let (mut wave, mut bytes) = (Vec::new(), 0);
    while bytes < WAVE
        && let Some(piece) = pieces.next().transpose()?
    {
        bytes += piece.len();
        wave.push(piece);
    }
    Ok(wave)
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
