//! Copies of embeddings and heads that an adapter keeps of its base.
//!
//! PEFT puts them into the model before it merges. A model with the same numbers needs none of that; one with others is not the
//! one that the adapter was trained on.

use burn_boft::tensors::{decode, from_file, is_float, is_same, part};
use burn_boft::value::SavedTensor;

use crate::attention::key;
use crate::base::Base;
use crate::changes::Changes;
use crate::error::Error;
use crate::load::Loaded;
use crate::pieces::COMPUTED;
use crate::tie::Head;

/// Refuses a model whose embeddings or heads differ from the copies that the adapter keeps. What adapters before it have
/// changed cannot be compared.
pub fn check(of: &Loaded, base: &Base, head: &Head, before: &Changes) -> Result<(), Error> {
    let mut problems = Vec::new();
    for copy in of.adapter.base_copies() {
        let place = of.names.place(copy.module(), copy.name(), base)?;
        let key = key(&place, copy.name());
        let path = base.path.display();
        if let Some(first) = before.by.get(&key) {
            problems.push(format!(
                "{path}: `{key}` is changed by {}, and {} keeps a copy of it that the model must agree with; merge one after \
                 the other, through a file",
                first.display(),
                of.path.display()
            ));
            continue;
        }
        if base.entry(&key).is_none() {
            if !head.is_tied(&key) {
                problems.push(format!(
                    "{path} has no `{key}`, and the adapter keeps a copy of it; use --map to rename modules"
                ));
            }
            continue;
        }
        if !is_copy(base, &key, place.part, copy)? {
            problems.push(format!(
                "{path}: `{key}` has other numbers than the copy that the adapter keeps of it; name the model that the \
                 adapter was trained on"
            ));
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Fit(problems)),
    }
}

/// Whether a tensor of the model, or one of so many equal parts of it, has the numbers of this copy.
fn is_copy(
    base: &Base,
    key: &str,
    (index, parts): (usize, usize),
    copy: &SavedTensor,
) -> Result<bool, Error> {
    let Some((shard, entry)) = base.entry(key) else {
        return Ok(false);
    };
    let shape = copy.data().shape();
    let count = copy.data().num_elements();
    let rows = shape.first().and_then(|rows| rows.checked_mul(parts));
    let is_alike = rows.is_some()
        && entry.shape.first().copied() == rows
        && entry.shape.get(1..) == shape.get(1..)
        && from_file(entry.dtype).is_some_and(is_float)
        && entry.bytes > 0;
    if !is_alike {
        return Ok(false);
    }
    let width = entry.bytes / (count * parts) as u64;
    let start = (index * count) as u64 * width;
    for at in (0..count).step_by(COMPUTED) {
        let numbers = at..count.min(at + COMPUTED);
        let mut bytes = vec![0; numbers.len() * width as usize];
        shard.read(entry, start + at as u64 * width, &mut bytes)?;
        let own = decode(entry.dtype, &bytes, vec![numbers.len()]);
        if !own.is_some_and(|own| is_same(&own, &part(copy.data(), numbers))) {
            return Ok(false);
        }
    }
    Ok(true)
}
