//! `unmerge`: an adapter taken out of a model that it was merged into.

use burn::tensor::DType;
use burn_boft::Adapter;
use burn_boft::peft::LoadOptions;
use burn_boft::value::{SavedTensor, join};

use crate::base::Base;
use crate::changes::{Change, Changes};
use crate::cli::Unmerge;
use crate::error::Error;
use crate::load::load;
use crate::names::Names;
use crate::rewrite::{check_output, rewrite};
use crate::terminal::{note, plural, print};
use crate::tie::Head;
use crate::turn::Backward;

pub fn run(options: &Unmerge) -> Result<(), Error> {
    let names = Names::parse(&options.adapter.maps)?;
    let adapter = load(&options.adapter.adapter, &LoadOptions::new())?;
    let base = Base::open(&options.merged)?;
    let head = Head::of(&base)?;
    let names = names.for_model(&head);
    let mut changes = Changes::find(&adapter, &base, &names, &head)?;
    names.note().iter().for_each(|line| note(line));
    if !options.keep_saved {
        refuse_saved(&adapter)?;
    }
    changes
        .of
        .retain(|_, change| matches!(change, Change::Rotate(_)));
    changes.added.clear();
    head.untie(&base, &mut changes)?;
    check_output(&options.output, &base, &options.adapter.adapter)?;
    let mut turn = Backward::new(&adapter);
    let others = base.other_files()?;
    others.note().iter().for_each(|line| note(line));
    rewrite(&base, &others.copied, &changes, &options.output, &mut turn)?;
    let difference = turn.difference;
    print(&format!(
        "{}: {} restored; merging them again is off by at most {:.1e}, {:.1e} of a weight's norm\n",
        options.output.display(),
        plural(changes.rotations(), "layer"),
        difference.absolute(),
        difference.relative()
    ))
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
