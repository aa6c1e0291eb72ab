//! Layers that store their weight as `[d_input, d_output]`: transformers' `Conv1D`, in GPT-2 and its relatives.
//!
//! Everything else in PyTorch stores `[d_output, d_input]`, which is what is rotated here. PEFT's OFT and BOFT refuse a
//! `Conv1D`, so that there is nothing to agree with, and an adapter for one is refused here too. Where the weight is
//! square its shape does not tell, so the model's `config.json` or its other layers must.

use std::cell::OnceCell;

use crate::base::Base;
use crate::tie::Head;

/// The model types of transformers 4 and 5 that have layers of this class. Other types use `nn.Linear` under the same names:
/// `gpt_bigcode` does.
const TYPES: [&str; 6] = [
    "clvp",
    "clvp_decoder",
    "decision_transformer",
    "gpt2",
    "imagegpt",
    "openai-gpt",
];
/// The last component of the path of every such layer.
const NAMES: [&str; 4] = ["c_attn", "c_fc", "c_proj", "q_attn"];
/// Those of them that have more outputs than inputs.
const WIDENING: [&str; 2] = ["c_attn", "c_fc"];

/// How a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    /// `[d_output, d_input]`, as `nn.Linear` does.
    OutputsFirst,
    /// `[d_input, d_output]`, as `Conv1D` does.
    InputsFirst,
}

/// How the layers of a model are stored.
pub struct Orientation<'a> {
    base: &'a Base,
    /// The types of the model and of its parts.
    types: Vec<&'a str>,
    /// What the other layers with names of GPT-2 say, once somebody asked.
    others: OnceCell<Option<Stored>>,
}

impl<'a> Orientation<'a> {
    pub fn of(base: &'a Base, head: &'a Head) -> Self {
        Self {
            base,
            types: head.model_types(),
            others: OnceCell::new(),
        }
    }

    /// Why the layer at this path must not be rotated: the words after its name. None where it may be.
    pub fn refusal(&self, module: &str) -> Option<&'static str> {
        const CONV1D: &str = "is stored as [d_input, d_output], as transformers' Conv1D stores it, and neither PEFT's OFT \
                              and BOFT nor burn-boft rotates that; train the adapter on a model with nn.Linear in its place";
        const UNKNOWN: &str = "has a name of GPT-2's, whose weights are stored the other way round, and neither its shape nor a \
                               config.json says which it is; put the config.json of the model beside it";
        let refuse = |stored: Stored| (stored == Stored::InputsFirst).then_some(CONV1D);
        match stored(self.base, module) {
            Some(stored) => refuse(stored),
            None if !is_named(module) => None,
            None if self.types.iter().any(|model| TYPES.contains(model)) => Some(CONV1D),
            None if !self.types.is_empty() => None,
            None => match self.others.get_or_init(|| others(self.base)) {
                Some(stored) => refuse(*stored),
                None => Some(UNKNOWN),
            },
        }
    }
}

/// Whether the layer has a name that layers of this class have.
pub fn is_named(module: &str) -> bool {
    NAMES.contains(&last(module))
}

/// How the weight of a layer is stored, as far as its own tensors say: its bias has as many numbers as there are outputs.
fn stored(base: &Base, module: &str) -> Option<Stored> {
    let shape = |tensor: &str| {
        Some(
            base.entry(&format!("{module}.{tensor}"))?
                .1
                .shape
                .as_slice(),
        )
    };
    let [rows, columns] = *shape("weight")? else {
        return None;
    };
    let d_output = match shape("bias") {
        Some([d_output]) => *d_output,
        None if WIDENING.contains(&last(module)) => rows.max(columns),
        _ => return None,
    };
    match (d_output == rows, d_output == columns) {
        (true, false) => Some(Stored::OutputsFirst),
        (false, true) => Some(Stored::InputsFirst),
        _ => None,
    }
}

/// How the layers are stored that have names of GPT-2 and a shape that tells.
fn others(base: &Base) -> Option<Stored> {
    let modules = base.keys().filter_map(|key| key.strip_suffix(".weight"));
    let mut named = modules.filter(|module| is_named(module));
    named.find_map(|module| stored(base, module))
}

/// The last component of a path.
fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}
