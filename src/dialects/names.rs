//! The modules of a model under the names that other programs give them in files.
//!
//! A name is found by writing every module of the model as the program would, so nothing is guessed: `lora_unet_a_b` is
//! whatever module of the model has the name `a.b` or `a_b`, as long as there is one.

use std::collections::{BTreeMap, BTreeSet};

/// Starts of names in files with `_` in place of dots, and where checkpoints keep that part of a pipeline.
const FLATTENED: [(&str, &[&str]); 9] = [
    ("lora_unet_", DENOISER),
    ("oft_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lora_prior_", DENOISER),
    ("lycoris_", DENOISER),
    ("lora_te_", FIRST_TEXT),
    ("lora_te1_", FIRST_TEXT),
    ("lora_te2_", SECOND_TEXT),
    ("lora_te3_", THIRD_TEXT),
];

/// Starts of names in files with dots, likewise.
const DOTTED: [(&str, &[&str]); 13] = [
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
    ("prior.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("text_encoder.", FIRST_TEXT),
    ("clip_l.", FIRST_TEXT),
    ("text_encoder_1.", FIRST_TEXT),
    ("text_encoder_2.", SECOND_TEXT),
    ("clip_g.", SECOND_TEXT),
    ("text_encoder_3.", THIRD_TEXT),
    ("text_encoders.clip_l.transformer.", FIRST_TEXT),
    ("text_encoders.clip_g.transformer.", SECOND_TEXT),
    ("text_encoders.t5xxl.transformer.", THIRD_TEXT),
];

/// A checkpoint of the part alone has no start; one of a whole pipeline has that of diffusers, ComfyUI or the first Stable
/// Diffusion.
const DENOISER: &[&str] = &[
    "",
    "unet.",
    "transformer.",
    "prior.",
    "diffusion_model.",
    "model.diffusion_model.",
];
const FIRST_TEXT: &[&str] = &[
    "",
    "text_encoder.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.",
];
const SECOND_TEXT: &[&str] = &[
    "",
    "text_encoder_2.",
    "conditioner.embedders.1.model.",
    "text_encoders.clip_g.transformer.",
];
const THIRD_TEXT: &[&str] = &["", "text_encoder_3.", "text_encoders.t5xxl.transformer."];

/// How many similar names a message has.
const NEAREST: usize = 2;

/// How a file writes names of modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Style {
    /// With `_` for dots behind this start.
    Flattened(&'static str),
    /// With dots, behind this start or none.
    Dotted(&'static str),
}

impl Style {
    /// The style of a name, and where checkpoints keep the part that it starts with.
    fn of(module: &str) -> (Self, &'static [&'static str]) {
        let starts = |(start, _): &&(&str, &[&str])| module.starts_with(start);
        if let Some((start, places)) = FLATTENED.iter().find(starts) {
            return (Self::Flattened(start), places);
        }
        match DOTTED.iter().find(starts) {
            Some((start, places)) => (Self::Dotted(start), places),
            None => (Self::Dotted(""), &[""]),
        }
    }

    /// The style of a name.
    pub fn of_module(module: &str) -> Self {
        Self::of(module).0
    }

    /// The style in words.
    pub fn in_words(self) -> String {
        match self {
            Self::Flattened(start) => format!("{start}… with `_` for dots"),
            Self::Dotted("") => "dotted".to_string(),
            Self::Dotted(start) => format!("{start}… dotted"),
        }
    }
}

/// The modules of a model, by what files call them.
pub(super) struct Modules<'a> {
    modules: &'a BTreeMap<String, Vec<usize>>,
    flattened: BTreeMap<String, Vec<&'a str>>,
}

/// What a name of a file finds.
#[derive(Debug, PartialEq)]
pub(super) enum Found<'a> {
    One(&'a str),
    Several(Vec<String>),
    None(Vec<String>),
}

impl<'a> Modules<'a> {
    /// The modules of a model, with the shapes of their weights.
    pub fn new(modules: &'a BTreeMap<String, Vec<usize>>) -> Self {
        let mut flattened = BTreeMap::<_, Vec<_>>::new();
        for module in modules.keys() {
            flattened
                .entry(module.replace('.', "_"))
                .or_default()
                .push(module.as_str());
        }
        Self { modules, flattened }
    }

    /// The module that a file calls this.
    ///
    /// A module of exactly this name comes first. Otherwise the start of the name is replaced by every start that
    /// checkpoints have in its place.
    pub fn find(&self, name: &str) -> Found<'a> {
        if let Some((module, _)) = self.modules.get_key_value(name) {
            return Found::One(module);
        }
        let (style, places) = Style::of(name);
        let mut found = BTreeSet::new();
        for place in places {
            match style {
                Style::Flattened(start) => {
                    let name = format!("{}{}", place.replace('.', "_"), &name[start.len()..]);
                    found.extend(self.flattened.get(&name).into_iter().flatten().copied());
                }
                Style::Dotted(start) => {
                    let name = format!("{place}{}", &name[start.len()..]);
                    let entry = self.modules.get_key_value(&name);
                    found.extend(entry.map(|(module, _)| module.as_str()));
                }
            }
        }
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some(module), None) => Found::One(module),
            (Some(first), Some(second)) => {
                let all = [first, second].into_iter().chain(found);
                Found::Several(all.map(str::to_string).collect())
            }
            (None, _) => Found::None(self.nearest(name)),
        }
    }

    /// The modules whose flattened names share the longest end with this one's.
    fn nearest(&self, name: &str) -> Vec<String> {
        let name = name.replace('.', "_");
        let shared = |other: &str| {
            let pairs = other.bytes().rev().zip(name.bytes().rev());
            pairs.take_while(|(a, b)| a == b).count()
        };
        let mut scored: Vec<_> = self
            .flattened
            .iter()
            .map(|(flat, modules)| (shared(flat), modules))
            .filter(|(score, _)| *score > 0)
            .collect();
        scored.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let modules = scored.iter().flat_map(|(_, modules)| modules.iter());
        modules
            .take(NEAREST)
            .map(|module| module.to_string())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(names: &[&str]) -> BTreeMap<String, Vec<usize>> {
        let entry = |name: &&str| (name.to_string(), vec![4, 6]);
        names.iter().map(entry).collect()
    }

    #[test]
    fn a_flattened_name_finds_the_module_wherever_checkpoints_keep_the_part() {
        for (module, name) in [
            ("down.0.to_q", "lora_unet_down_0_to_q"),
            ("down_0.to_q", "lycoris_down_0_to_q"),
            ("model.diffusion_model.down.0.to_q", "lora_unet_down_0_to_q"),
            ("transformer.blocks.0.qkv", "lora_transformer_blocks_0_qkv"),
            ("conditioner.embedders.1.model.ln.fc", "lora_te2_ln_fc"),
            (
                "model.diffusion_model.blocks.0.qkv",
                "diffusion_model.blocks.0.qkv",
            ),
            ("blocks.0.qkv", "transformer.blocks.0.qkv"),
            ("blocks.0.qkv", "blocks.0.qkv"),
        ] {
            let model = model(&["other.module", module]);
            assert_eq!(
                Modules::new(&model).find(name),
                Found::One(module),
                "{name}"
            );
        }
    }

    #[test]
    fn two_modules_of_one_flattened_name_are_both_named() {
        let model = model(&["a.b_c", "a_b.c", "x"]);
        let modules = Modules::new(&model);
        let both = Found::Several(vec!["a.b_c".into(), "a_b.c".into()]);
        assert_eq!(modules.find("lora_unet_a_b_c"), both);
        // The exact name is no question.
        assert_eq!(modules.find("a_b.c"), Found::One("a_b.c"));
    }

    #[test]
    fn a_name_of_no_module_comes_with_names_that_end_alike() {
        let model = model(&["up.1.to_k", "up.1.to_q", "norm"]);
        let found = Modules::new(&model).find("lora_unet_down_1_to_q");
        assert_eq!(found, Found::None(vec!["up.1.to_q".into()]));
    }
}
