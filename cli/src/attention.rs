//! PyTorch's `MultiheadAttention`, which keeps the projections of queries, keys and values in one tensor.
//!
//! OpenCLIP's text encoders have it, in the files of Stable Diffusion 2 and SDXL. An adapter was trained on models with three linear
//! layers in its place, so each of the three is found as a third of the rows: `attn.q_proj.weight` is the first third of
//! `attn.in_proj_weight`.

use std::collections::BTreeMap;

use burn_boft::value::{Place, join};

use crate::header::Entry;

/// The projections, in the order of their rows.
const PROJECTIONS: [&str; 3] = ["q_proj", "k_proj", "v_proj"];
/// What the names of their tensors start with.
const TOGETHER: &str = "in_proj";

/// The projections in a model's tensors, as modules with the shape of a third.
pub fn projections<'a>(entries: impl Iterator<Item = &'a Entry>) -> BTreeMap<String, Vec<usize>> {
    let thirds = |entry: &'a Entry| {
        let attention = entry.key.strip_suffix(&format!(".{TOGETHER}_weight"))?;
        let [rows, columns] = entry.shape[..] else {
            return None;
        };
        let shape = vec![rows / PROJECTIONS.len(), columns];
        let is_whole = rows.is_multiple_of(PROJECTIONS.len());
        is_whole.then(|| PROJECTIONS.map(|name| (join(attention, name), shape.clone())))
    };
    entries.filter_map(thirds).flatten().collect()
}

/// Where a tensor of a projection is, if the model has one for all three, which the keys of its tensors say.
pub fn place(module: &str, tensor: &str, has: impl Fn(&str) -> bool) -> Option<Place> {
    let (attention, name) = module.rsplit_once('.')?;
    let mut names = PROJECTIONS.iter();
    let place = Place {
        module: join(attention, TOGETHER),
        part: (
            names.position(|projection| *projection == name)?,
            PROJECTIONS.len(),
        ),
    };
    has(&key(&place, tensor)).then_some(place)
}

/// The key of a tensor at its place in a model.
pub fn key(place: &Place, tensor: &str) -> String {
    let is_together = place.module.ends_with(&format!(".{TOGETHER}"));
    match is_together && place.part.1 == PROJECTIONS.len() {
        true => format!("{}_{tensor}", place.module),
        false => join(&place.module, tensor),
    }
}
