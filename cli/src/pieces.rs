//! The tensors of a file in pieces: what each piece holds, in the order of the file, and the bytes that it becomes.
//!
//! A piece is small enough for a cache, and no piece needs another one, so they are computed on all cores.

use std::iter;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bytes, DType, TensorData};
use burn_boft::tensors::{decode, encode, file_name, from_file, is_finite, part};
use burn_boft::value::SavedTensor;

use crate::base::{Base, Shard};
use crate::changes::{Added, Change, Changes, Step, least_common_multiple, together};
use crate::error::Error;
use crate::header::Entry;

/// How many bytes are copied at a time.
const COPIED: usize = 1 << 20;
/// How many numbers are computed with at a time, unless a single row has more.
pub const COMPUTED: usize = 256 << 10;

/// Rotates rows of weights, or undoes that.
pub trait Turn: Sync {
    /// What rows of a weight are turned with.
    type Rotations: Send + Sync;

    /// Prepares for rows that these rotations turn one after the other, of a weight of so many inputs.
    fn prepare(&self, steps: &[Step], d_input: usize) -> Result<Self::Rotations, String>;

    /// The rotated rows, in the precision that they came in. `rows` counts from the first row of the weight, and where
    /// outputs are rotated, they are whole spans.
    fn turn(
        &self,
        rotations: &Self::Rotations,
        numbers: TensorData,
        rows: Range<usize>,
    ) -> Result<TensorData, String>;
}

/// A part of a file of tensors.
pub enum Piece<'a, R> {
    /// Bytes of the model as they are.
    Copy {
        shard: &'a Shard,
        entry: &'a Entry,
        bytes: Range<u64>,
    },
    /// Rows of a weight that are turned.
    Turn {
        shard: &'a Shard,
        entry: &'a Entry,
        rows: Range<usize>,
        rotations: Arc<R>,
    },
    /// Numbers of a saved tensor in this precision.
    Save {
        data: &'a TensorData,
        numbers: Range<usize>,
        dtype: DType,
        shard: &'a Shard,
        key: &'a str,
    },
}

type Pieces<'a, R> = Box<dyn Iterator<Item = Result<Piece<'a, R>, Error>> + Send + 'a>;

/// The pieces of a tensor of the model.
pub fn of_tensor<'a, T: Turn>(
    shard: &'a Shard,
    entry: &'a Entry,
    changes: &'a Changes<'a>,
    turn: &'a T,
) -> Pieces<'a, T::Rotations> {
    match changes.of.get(&entry.key) {
        None => copied(shard, entry, 0..entry.bytes),
        Some(Change::Rotate(parts)) => around(shard, entry, parts, move |rows, steps| {
            turned(shard, entry, (rows, steps), turn)
        }),
        Some(Change::Replace(parts)) => around(shard, entry, parts, move |_, tensor| {
            replaced(shard, entry, tensor)
        }),
        Some(Change::New(tensor)) => replaced(shard, entry, tensor),
    }
}

/// The pieces of a tensor that the model does not have yet.
pub fn of_added<'a, R: Send + Sync + 'a>(
    base: &'a Base,
    shard: &'a Shard,
    (key, added): (&'a str, &'a Added<'a>),
) -> Pieces<'a, R> {
    match added {
        Added::Saved(tensor) => saved(shard, key, tensor.data(), tensor.data().dtype()),
        Added::Copy(of) => match base.entry(of) {
            Some((shard, entry)) => copied(shard, entry, 0..entry.bytes),
            None => Box::new(iter::empty()),
        },
    }
}

/// Bytes of a tensor.
fn copied<'a, R: Send + Sync + 'a>(
    shard: &'a Shard,
    entry: &'a Entry,
    bytes: Range<u64>,
) -> Pieces<'a, R> {
    let starts = bytes.clone().step_by(COPIED);
    Box::new(starts.map(move |start| {
        let bytes = start..bytes.end.min(start + COPIED as u64);
        Ok(Piece::Copy {
            shard,
            entry,
            bytes,
        })
    }))
}

/// A tensor of which some rows change, in order. The others are copied.
fn around<'a, R: Send + Sync + 'a, P: Sync>(
    shard: &'a Shard,
    entry: &'a Entry,
    parts: &'a [(Range<usize>, P)],
    changed: impl Fn(Range<usize>, &'a P) -> Pieces<'a, R> + Send + 'a,
) -> Pieces<'a, R> {
    let row = row_bytes(entry);
    let ends = parts.iter().map(move |(rows, _)| rows.end as u64 * row);
    let starts = parts.iter().map(move |(rows, _)| rows.start as u64 * row);
    let gaps = iter::once(0).chain(ends).zip(starts.chain([entry.bytes]));
    let gaps = gaps.map(move |(start, end)| copied(shard, entry, start..end));
    let changes = parts.iter();
    let changes = changes.map(move |(rows, part)| Some(changed(rows.clone(), part)));
    let both = gaps.zip(changes.chain([None]));
    Box::new(both.flat_map(|(gap, change)| gap.chain(change.into_iter().flatten())))
}

/// Rows that are turned. What turns them is prepared when the first of them is asked for.
fn turned<'a, T: Turn>(
    shard: &'a Shard,
    entry: &'a Entry,
    (rows, steps): (Range<usize>, &'a [Step<'a>]),
    turn: &'a T,
) -> Pieces<'a, T::Rotations> {
    // Such a weight may be for more channels than memory holds the rotations of.
    if rows.is_empty() {
        return Box::new(iter::empty());
    }
    let d_input = d_input(entry);
    let at_once = at_once(steps, d_input);
    let prepare = move || turn.prepare(steps, d_input);
    Box::new(
        iter::once_with(prepare).flat_map(move |rotations| -> Pieces<_> {
            let rotations = match rotations {
                Ok(rotations) => Arc::new(rotations),
                Err(reason) => {
                    let error = Error::tensor(&shard.path, &entry.key, reason);
                    return Box::new(iter::once(Err(error)));
                }
            };
            let end = rows.end;
            Box::new(rows.clone().step_by(at_once).map(move |start| {
                Ok(Piece::Turn {
                    shard,
                    entry,
                    rows: start..end.min(start + at_once),
                    rotations: Arc::clone(&rotations),
                })
            }))
        }),
    )
}

/// A saved tensor in the precision of the one that it replaces.
fn replaced<'a, R: Send + Sync + 'a>(
    shard: &'a Shard,
    entry: &'a Entry,
    tensor: &'a SavedTensor,
) -> Pieces<'a, R> {
    match from_file(entry.dtype) {
        Some(dtype) => saved(shard, &entry.key, tensor.data(), dtype),
        None => {
            let why = format!("is {}", file_name(entry.dtype));
            Box::new(iter::once(Err(Error::tensor(&shard.path, &entry.key, why))))
        }
    }
}

fn saved<'a, R: Send + Sync + 'a>(
    shard: &'a Shard,
    key: &'a str,
    data: &'a TensorData,
    dtype: DType,
) -> Pieces<'a, R> {
    let count = data.num_elements();
    Box::new((0..count).step_by(COMPUTED).map(move |start| {
        Ok(Piece::Save {
            data,
            numbers: start..count.min(start + COMPUTED),
            dtype,
            shard,
            key,
        })
    }))
}

impl<R> Piece<'_, R> {
    /// How many bytes it becomes.
    pub fn len(&self) -> usize {
        match self {
            Self::Copy { bytes, .. } => (bytes.end - bytes.start) as usize,
            Self::Turn { entry, rows, .. } => rows.len() * row_bytes(entry) as usize,
            Self::Save { numbers, dtype, .. } => numbers.len() * dtype.size(),
        }
    }

    /// Its bytes, as the file holds them. `buffer` is for what is read on the way, and spares clearing memory for every piece.
    ///
    /// # Errors
    ///
    /// The model cannot be read, or numbers would not be finite.
    pub fn bytes(
        &self,
        turn: &impl Turn<Rotations = R>,
        buffer: &mut Vec<u8>,
    ) -> Result<Bytes, Error> {
        match self {
            Self::Copy {
                shard,
                entry,
                bytes,
            } => {
                let mut copied = vec![0; self.len()];
                shard.read(entry, bytes.start, &mut copied)?;
                Ok(Bytes::from_bytes_vec(copied))
            }
            Self::Turn {
                shard,
                entry,
                rows,
                rotations,
            } => {
                let refuse = |reason: String| Error::tensor(&shard.path, &entry.key, reason);
                let numbers = read_rows(shard, entry, rows, buffer)?;
                let turned = turn.turn(rotations, numbers, rows.clone());
                encoded(turned.map_err(refuse)?, shard, &entry.key)
            }
            Self::Save {
                data,
                numbers,
                dtype,
                shard,
                key,
            } => encoded(
                part(data, numbers.clone()).convert_dtype(*dtype),
                shard,
                key,
            ),
        }
    }
}

/// How many numbers a row of a weight has.
pub fn d_input(entry: &Entry) -> usize {
    entry.shape[1..].iter().product()
}

/// How many rows of a weight are computed with at a time.
pub fn at_once(steps: &[Step], d_input: usize) -> usize {
    // Kernels are at their best with 16 rows, which they take in groups of four or eight.
    const ROWS: usize = 16;
    let (together, rows) = (together(steps), COMPUTED / d_input);
    let whole = least_common_multiple(together, ROWS);
    match rows < whole {
        true => (rows / together).max(1) * together,
        false => rows / whole * whole,
    }
}

/// Rows of a weight, in the precision of the file. Their bytes are left in `buffer`.
pub fn read_rows(
    shard: &Shard,
    entry: &Entry,
    rows: &Range<usize>,
    buffer: &mut Vec<u8>,
) -> Result<TensorData, Error> {
    let row = row_bytes(entry);
    let len = rows.len() * row as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let bytes = &mut buffer[..len];
    shard.read(entry, rows.start as u64 * row, bytes)?;
    decode(entry.dtype, bytes, vec![rows.len(), d_input(entry)]).ok_or_else(|| {
        let why = format!("is {}", file_name(entry.dtype));
        Error::tensor(&shard.path, &entry.key, why)
    })
}

/// The bytes of one step along the first axis.
pub fn row_bytes(entry: &Entry) -> u64 {
    let rows = entry.shape.first().copied().unwrap_or(1) as u64;
    entry.bytes.checked_div(rows).unwrap_or(0)
}

/// The bytes of numbers as the file holds them.
///
/// # Errors
///
/// They are not finite, or of a precision that no file keeps.
fn encoded(data: TensorData, shard: &Shard, key: &str) -> Result<Bytes, Error> {
    check_finite(&data, shard, key)?;
    let dtype = data.dtype();
    encode(data).ok_or_else(|| {
        let why = format!("would be {}, which no file keeps", dtype.name());
        Error::tensor(&shard.path, key, why)
    })
}

/// Refuses merged numbers that are not finite.
pub fn check_finite(data: &TensorData, shard: &Shard, key: &str) -> Result<(), Error> {
    match is_finite(data) {
        true => Ok(()),
        false => Err(Error::tensor(
            &shard.path,
            key,
            "would not be finite: it or the adapter holds NaN, infinity or numbers beyond its precision",
        )),
    }
}
