//! `unmerge`: an adapter taken out of a model that it was merged into.

use burn::tensor::DType;
use burn_boft::Adapter;
use burn_boft::value::{SavedTensor, join};
use serde_json::{Value, json};

use crate::base::Base;
use crate::changes::{Change, Changes};
use crate::cli::Unmerge;
use crate::distance::{self, Difference, between};
use crate::error::Error;
use crate::load::{Wanted, load_all};
use crate::rewrite::{check_output, rewrite};
use crate::terminal::{note, plural, report};
use crate::tie::{Head, Rotated};
use crate::turn::Backward;

pub fn run(options: &Unmerge, json: bool) -> Result<(), Error> {
    let wanted = Wanted::all(&options.adapters)?;
    let merged = Base::open(&options.merged)?;
    let head = Head::of(&merged)?;
    let adapters = load_all(wanted, &merged, &head)?;
    let mut changes = Changes::default();
    for of in &adapters {
        let mut next = Changes::find(of, &merged, &head)?;
        of.names.note().iter().for_each(|line| note(line));
        if !options.keep_saved {
            refuse_saved(&of.adapter)?;
        }
        next.of
            .retain(|_, change| matches!(change, Change::Rotate(_)));
        next.added.clear();
        changes = changes.then(next, &merged)?;
    }
    head.untie(&merged, &mut changes, Rotated::Together)?;
    check_output(&options.output, &merged, &adapters)?;
    let base = options.base.as_deref().map(Base::open).transpose()?;
    if let Some(base) = &base {
        check_base(base, &merged, options, &changes)?;
    }
    let turn = Backward::new();
    let others = merged.other_files()?;
    others.notes().iter().for_each(|line| note(line));
    rewrite(&merged, &others.copied, &changes, &options.output, &turn)?;
    let again = turn.difference();
    let base = match &base {
        Some(base) => {
            let restored = Base::open(&options.output)?;
            let difference = between(&restored, base, changes.of.keys());
            Some(difference.map_err(|error| match error {
                Error::Interrupted => Error::NotCompared {
                    output: options.output.clone(),
                    base: base.path.clone(),
                },
                error => error,
            })?)
        }
        None => None,
    };
    let (output, count) = (options.output.display(), changes.rotations());
    let restored = plural(count, "layer");
    let what = match adapters.len() {
        1 => "adapter",
        _ => "adapters",
    };
    let mut text = format!(
        "{output}: {restored} restored; merging the {what} into them again would be off by about {again:.1e} of a weight's norm before it is rounded"
    );
    if let (Some(difference), Some(path)) = (&base, &options.base) {
        text.push_str(&format!(
            "; they are off from {} by at most {}",
            path.display(),
            in_words(difference)
        ));
    }
    let value = json!({
        "output": output.to_string(),
        "restored": count,
        "merging_again": {"relative": again},
        "base": base.as_ref().map(to_json),
        "left_behind": others.left_names(),
    });
    report(json, &format!("{text}\n"), &value)
}

fn in_words(difference: &Difference) -> String {
    let (absolute, relative) = (difference.absolute(), difference.relative());
    format!("{absolute:.1e}, {relative:.1e} of a weight's norm")
}

fn to_json(difference: &Difference) -> Value {
    json!({"absolute": difference.absolute(), "relative": difference.relative()})
}

/// Refuses a model from before the merge that has other layers, and an output that cannot be compared with it.
fn check_base(
    base: &Base,
    merged: &Base,
    options: &Unmerge,
    changes: &Changes,
) -> Result<(), Error> {
    if options.output.exists() {
        return Err(Error::Settings(
            "--base needs an output that can be read again, not a device or a pipe".into(),
        ));
    }
    distance::check(base, merged, changes.of.keys())
}

/// Refuses an adapter with saved tensors: it does not hold what the merge replaced by them.
fn refuse_saved(adapter: &Adapter) -> Result<(), Error> {
    // Counts of batches are not missed.
    let is_lost = |tensor: &&SavedTensor| tensor.data().dtype() != DType::I64;
    let lost: Vec<_> = adapter
        .tensors()
        .iter()
        .filter(is_lost)
        .map(|tensor| format!("`{}`", join(tensor.module(), tensor.name())))
        .collect();
    match lost.first() {
        None => Ok(()),
        Some(first) => Err(Error::Settings(format!(
            "the merge replaced {first} and everything else that the adapter saves ({} tensors), and no file holds what \
             was there before; pass --keep-saved to leave them as they are",
            lost.len()
        ))),
    }
}
