//! Reads and writes the header of a safetensors file, and checks what it reads.

use std::fmt::{self, Formatter};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn_boft::input::{self, LONGEST_HEADER};
use burn_boft::tensors::file_name;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Value, json};

use crate::error::Error;

/// How many bytes the length of the header takes at the start of a file.
const PREFIX: u64 = 8;
const METADATA: &str = "__metadata__";
/// Formats that are taken for this one, by how their files start. As the length of a header, each would be too long.
const OTHER_FORMATS: [(&[u8], &str); 3] = [
    (b"GGUF", "of GGUF"),
    (b"PK\x03\x04", "an archive, as PyTorch's pickles are"),
    (b"\x89HDF", "of HDF5, as Keras writes it"),
];

/// One tensor of a file.
#[derive(Debug, Clone)]
pub struct Entry {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where its numbers start, counted from the start of the file.
    pub start: u64,
    /// How many bytes they are.
    pub bytes: u64,
}

/// What a file says before the numbers of its tensors.
#[derive(Debug)]
pub struct Header {
    /// The free text of the file, as JSON.
    pub metadata: Option<Value>,
    /// The tensors in the order of their numbers.
    pub entries: Vec<Entry>,
}

/// How many bytes a tensor of this precision and shape takes. None where that is not a whole number, or too large to
/// count.
pub fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |product, axis| {
            product.checked_mul(u64::try_from(*axis).ok()?)
        })?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Reads the header of a file. The numbers of its tensors cover the rest of the file, without gap or overlap.
pub fn read(path: &Path, file: &mut File) -> Result<Header, Error> {
    let malformed =
        |reason: String| Error::malformed(path, format!("not a safetensors file: {reason}"));
    let length = file.metadata().map_err(Error::read(path))?.len();
    let mut prefix = [0; PREFIX as usize];
    if length < PREFIX {
        return Err(malformed(format!(
            "it has {length} bytes, fewer than the {PREFIX} that say how long its header is"
        )));
    }
    file.read_exact(&mut prefix).map_err(Error::read(path))?;
    if let Some((_, what)) = OTHER_FORMATS
        .iter()
        .find(|(start, _)| prefix.starts_with(start))
    {
        return Err(malformed(format!(
            "it is {what}; save the model as safetensors first"
        )));
    }
    let header = u64::from_le_bytes(prefix);
    if header > length - PREFIX {
        return Err(malformed(format!(
            "it announces a header of {header} bytes, and the whole file has {length}"
        )));
    }
    input::check_length("its header", header, LONGEST_HEADER).map_err(Error::read(path))?;
    let mut bytes = vec![0; header as usize];
    file.read_exact(&mut bytes).map_err(Error::read(path))?;
    let data = PREFIX + header;
    let mut reader = HeaderReader::new(data);
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let read = json
        .deserialize_map(&mut reader)
        .and_then(|()| json.end())
        .map_err(|error| malformed(format!("its header is not a JSON object: {error}")));
    let HeaderReader {
        metadata,
        mut entries,
        fault,
        ..
    } = reader;
    if let Some((key, reason)) = fault {
        return Err(Error::tensor(path, &key, reason));
    }
    read?;
    check_keys(path, &entries)?;
    entries.sort_by(|a, b| (a.start, a.bytes, &a.key).cmp(&(b.start, b.bytes, &b.key)));
    check_cover(path, &entries, data, length)?;
    Ok(Header { metadata, entries })
}

/// Reads a header one tensor at a time, so that it takes no more memory than its tensors.
struct HeaderReader {
    /// Where the numbers start in the file.
    data: u64,
    metadata: Option<Value>,
    entries: Vec<Entry>,
    /// The first tensor that is malformed, and why.
    fault: Option<(String, String)>,
}

impl HeaderReader {
    fn new(data: u64) -> Self {
        Self {
            data,
            metadata: None,
            entries: Vec::new(),
            fault: None,
        }
    }
}

impl<'de> Visitor<'de> for &mut HeaderReader {
    type Value = ();

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("an object with an entry for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == METADATA {
                self.metadata = Some(map.next_value()?);
                continue;
            }
            let entry = match map.next_value() {
                Ok(fields) => entry(&key, fields, self.data),
                Err(error) => Err(format!("is malformed: {error}")),
            };
            match entry {
                Ok(entry) => self.entries.push(entry),
                Err(reason) => {
                    self.fault = Some((key, reason));
                    return Err(A::Error::custom("a tensor is malformed"));
                }
            }
        }
        Ok(())
    }
}

/// What a header says of one tensor. A field that stands there twice is refused, as the `safetensors` crate refuses it.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Fields {
    dtype: Option<Value>,
    shape: Option<Value>,
    data_offsets: Option<Value>,
}

/// One tensor of a header.
fn entry(key: &str, fields: Fields, data: u64) -> Result<Entry, String> {
    let none = |name: &str| format!("has no {name}");
    let dtype = fields.dtype.ok_or_else(|| none("dtype"))?;
    let dtype: Dtype = serde_json::from_value(dtype.clone())
        .map_err(|_| format!("has the unknown dtype {dtype}"))?;
    let shape = fields.shape.ok_or_else(|| none("shape"))?;
    let shape: Vec<usize> =
        serde_json::from_value(shape.clone()).map_err(|_| format!("has the shape {shape}"))?;
    let offsets = fields.data_offsets.ok_or_else(|| none("data_offsets"))?;
    let (start, end): (u64, u64) = serde_json::from_value(offsets.clone())
        .map_err(|_| format!("has the offsets {offsets}"))?;
    let name = file_name(dtype);
    let bytes = byte_count(dtype, &shape)
        .ok_or_else(|| format!("is {shape:?} of {name}, which is larger than any file"))?;
    if end.checked_sub(start) != Some(bytes) {
        return Err(format!(
            "is {shape:?} of {name}, {bytes} bytes, and has the offsets {start} to {end}"
        ));
    }
    let start = start
        .checked_add(data)
        .ok_or_else(|| format!("has the offsets {start} to {end}"))?;
    Ok(Entry {
        key: key.to_string(),
        dtype,
        shape,
        start,
        bytes,
    })
}

/// Refuses a header that has a tensor twice, of which a reader would take the one or the other.
fn check_keys(path: &Path, entries: &[Entry]) -> Result<(), Error> {
    let mut keys: Vec<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::tensor(path, pair[0], "stands in the header twice")),
        None => Ok(()),
    }
}

/// Refuses numbers that overlap, leave a gap or do not end where the file does.
fn check_cover(path: &Path, entries: &[Entry], data: u64, length: u64) -> Result<(), Error> {
    let mut end = data;
    for entry in entries {
        if entry.start != end {
            let what = match entry.start < end {
                true => "starts inside the tensor before it",
                false => "leaves a gap after the tensor before it",
            };
            return Err(Error::tensor(path, &entry.key, what));
        }
        end = end
            .checked_add(entry.bytes)
            .filter(|end| *end <= length)
            .ok_or_else(|| {
                let reason =
                    format!("ends beyond the file, which has {length} bytes; it is cut off");
                Error::tensor(path, &entry.key, reason)
            })?;
    }
    match end == length {
        true => Ok(()),
        false => Err(Error::malformed(
            path,
            format!("{} bytes follow the last tensor", length - end),
        )),
    }
}

/// The bytes before the numbers of these tensors, which follow in this order.
pub fn to_bytes<'a>(
    metadata: Option<&Value>,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
) -> Option<Vec<u8>> {
    // Written piece by piece, since a map would not keep the order.
    let mut pieces: Vec<String> = metadata
        .map(|metadata| format!("\"{METADATA}\":{metadata}"))
        .into_iter()
        .collect();
    let mut start = 0u64;
    for (key, dtype, shape) in tensors {
        let end = start.checked_add(byte_count(dtype, shape)?)?;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        pieces.push(format!("{}:{entry}", Value::from(key)));
        start = end;
    }
    let mut header = format!("{{{}}}", pieces.join(",")).into_bytes();
    // As other writers do it, the numbers start at a multiple of eight bytes, though not every tensor does.
    header.resize(header.len().next_multiple_of(PREFIX as usize), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn parse(header: &str, data: usize) -> Result<Header, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes())
            .unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.write_all(&vec![0; data]).unwrap();
        file.rewind().unwrap();
        read(Path::new("file"), &mut file).map_err(|error| error.line())
    }

    #[test]
    fn what_is_written_is_read() {
        let metadata = json!({"format": "pt"});
        let tensors = [
            ("second \"b\"", Dtype::F32, &[2usize, 3][..]),
            ("first", Dtype::BF16, &[0, 7]),
            ("third", Dtype::I64, &[]),
        ];
        let bytes = to_bytes(Some(&metadata), tensors.into_iter()).unwrap();
        assert!(bytes.len().is_multiple_of(8));
        let header = std::str::from_utf8(&bytes[8..]).unwrap();
        let header = parse(header, 32).unwrap();
        assert_eq!(header.metadata, Some(metadata));
        let mut read: Vec<_> = header
            .entries
            .iter()
            .map(|entry| (entry.key.as_str(), entry.dtype, entry.shape.as_slice()))
            .collect();
        // Without numbers, the order is free.
        read.sort_by_key(|(key, ..)| tensors.iter().position(|(other, ..)| other == key));
        assert_eq!(read, tensors);
    }

    #[test]
    fn hostile_headers_are_refused_with_their_key() {
        let one = |entry: &str| parse(&format!("{{\"w\":{entry}}}"), 24).unwrap_err();
        for (entry, expected) in [
            (
                "1",
                "file: `w` is malformed: invalid type: integer `1`, expected an object at line 1 column 6",
            ),
            ("{}", "file: `w` has no dtype"),
            (
                r#"{"dtype":"F32","shape":[6],"dtype":"F32","data_offsets":[0,24]}"#,
                "file: `w` is malformed: duplicate field `dtype` at line 1 column 39",
            ),
            (
                r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"w":{"dtype":"F32","shape":[3],"data_offsets":[12,24]}"#,
                "file: `w` stands in the header twice",
            ),
            (
                r#"{"dtype":"F12"}"#,
                r#"file: `w` has the unknown dtype "F12""#,
            ),
            (
                r#"{"dtype":"F32","shape":[-1]}"#,
                "file: `w` has the shape [-1]",
            ),
            (
                r#"{"dtype":"F32","shape":[6],"data_offsets":[0]}"#,
                "file: `w` has the offsets [0]",
            ),
            (
                r#"{"dtype":"F32","shape":[6],"data_offsets":[24,0]}"#,
                "file: `w` is [6] of f32, 24 bytes, and has the offsets 24 to 0",
            ),
            (
                r#"{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,0]}"#,
                "file: `w` is [4294967296, 4294967296, 2] of f32, which is larger than any file",
            ),
            (
                r#"{"dtype":"F32","shape":[7],"data_offsets":[0,28]}"#,
                "file: `w` ends beyond the file, which has 87 bytes; it is cut off",
            ),
            (
                r#"{"dtype":"F32","shape":[5],"data_offsets":[4,24]}"#,
                "file: `w` leaves a gap after the tensor before it",
            ),
            (
                r#"{"dtype":"F32","shape":[5],"data_offsets":[0,20]}"#,
                "file: 4 bytes follow the last tensor",
            ),
            (
                r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"v":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}"#,
                "file: `v` starts inside the tensor before it",
            ),
        ] {
            assert_eq!(one(entry), expected);
        }
        let long = parse("", 0).unwrap_err();
        assert!(
            long.starts_with("file: not a safetensors file: its header is not a JSON object"),
            "{long}"
        );
    }
}
