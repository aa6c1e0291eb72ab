//! The modules of a model under the names that other programs give them in files.
//!
//! A name is found by writing every module of the model as the program would, so nothing is guessed: `lora_unet_a_b` is
//! whatever module of the model has the name `a.b` or `a_b`, as long as there is one.
//!
//! Of a Stable Diffusion UNet and of OpenCLIP's text encoders, every module has two names, and programs write either.

use std::collections::BTreeMap;

use super::open_clip;
use super::unet::{Layout, Unet};

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
const DOTTED: [(&str, &[&str]); 14] = [
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
    ("text_encoders.clip_h.transformer.", FIRST_TEXT),
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
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_h.transformer.",
];
const SECOND_TEXT: &[&str] = &[
    "",
    "text_encoder_2.",
    "conditioner.embedders.0.model.",
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

    /// What comes before the name of a module, which is the same in every checkpoint.
    fn start(self) -> &'static str {
        match self {
            Self::Flattened(start) | Self::Dotted(start) => start,
        }
    }
}

/// The layout of a UNet in a name of a file, where it is the name of a module in one of its blocks.
pub(super) fn layout(module: &str) -> Option<Layout> {
    let (style, places) = Style::of(module);
    let is_denoiser = places == DENOISER || style == Style::Dotted("");
    Layout::of_name(&module[style.start().len()..]).filter(|_| is_denoiser)
}

/// Why a name in a file is another than that in the model, beside where the part is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Renamed {
    /// The module of a UNet, in a model of this layout.
    Unet(Layout),
    /// The module of a text encoder of OpenCLIP's, as transformers has it.
    OpenClip,
}

impl Renamed {
    /// What was done, behind "names are ".
    pub fn in_words(self) -> String {
        match self {
            Self::Unet(layout) => format!(
                "translated from {} of a UNet to {}, which the model has",
                layout.other().name(),
                layout.name()
            ),
            Self::OpenClip => {
                "translated from transformers' text encoder to OpenCLIP's, which the model has"
                    .to_string()
            }
        }
    }
}

/// Modules of a model by their names, with dots or with `_` for them.
struct Index<'a, T> {
    dotted: BTreeMap<String, Vec<(&'a str, T)>>,
    flattened: BTreeMap<String, Vec<(&'a str, T)>>,
}

impl<'a, T: Copy> Index<'a, T> {
    fn new() -> Self {
        Self {
            dotted: BTreeMap::new(),
            flattened: BTreeMap::new(),
        }
    }

    fn insert(&mut self, name: String, module: &'a str, what: T) {
        let flat = name.replace('.', "_");
        self.flattened.entry(flat).or_default().push((module, what));
        self.dotted.entry(name).or_default().push((module, what));
    }

    /// The modules that a file of this style calls so, without its start, where a checkpoint keeps the part here.
    fn get(&self, style: Style, place: &str, name: &str) -> impl Iterator<Item = (&'a str, T)> {
        let found = match style {
            Style::Flattened(_) => {
                let place = place.replace('.', "_");
                self.flattened.get(&format!("{place}{name}"))
            }
            Style::Dotted(_) => self.dotted.get(&format!("{place}{name}")),
        };
        found.into_iter().flatten().copied()
    }
}

/// The modules of a model, by what files call them.
pub(super) struct Modules<'a> {
    modules: &'a BTreeMap<String, Vec<usize>>,
    own: Index<'a, ()>,
    renamed: Index<'a, Renamed>,
    /// The UNets, behind what their names start with.
    unets: Vec<(&'static str, Unet)>,
}

/// What a name of a file finds.
#[derive(Debug, PartialEq)]
pub(super) enum Found<'a> {
    One(&'a str),
    /// One module, whose name in the model is another.
    Renamed(&'a str, Renamed),
    Several(Vec<String>),
    None {
        /// The file's name for the module in the layout of the model, where it has one.
        translated: Option<String>,
        /// Modules whose names end alike.
        nearest: Vec<String>,
    },
}

impl<'a> Modules<'a> {
    /// The modules of a model, with the shapes of their weights.
    pub fn new(modules: &'a BTreeMap<String, Vec<usize>>) -> Self {
        let (mut own, mut renamed) = (Index::new(), Index::new());
        for module in modules.keys() {
            own.insert(module.clone(), module, ());
        }
        let behind = |start: &str| {
            let modules = modules.keys().map(String::as_str);
            let behind = modules.filter_map(|module| Some((module, module.strip_prefix(start)?)));
            behind.collect::<Vec<_>>()
        };
        let mut unets = Vec::new();
        for start in DENOISER {
            let modules = behind(start);
            let names = modules.iter().map(|(_, name)| *name).collect();
            let Some(unet) = Unet::of(&names) else {
                continue;
            };
            for (module, name) in modules {
                if let Some(other) = unet.other_name(name) {
                    let what = Renamed::Unet(unet.layout());
                    renamed.insert(format!("{start}{other}"), module, what);
                }
            }
            unets.push((*start, unet));
        }
        for start in open_clip::PLACES {
            for (module, name) in behind(start) {
                if let Some(other) = open_clip::name_of_transformers(name) {
                    renamed.insert(format!("{start}{other}"), module, Renamed::OpenClip);
                }
            }
        }
        Self {
            modules,
            own,
            renamed,
            unets,
        }
    }

    /// The module that a file calls this.
    ///
    /// A module of exactly this name comes first. Otherwise the start of the name is replaced by every start that checkpoints
    /// have in its place. A module that has the name in another layout counts as well: which of two UNets of a checkpoint is
    /// meant is then asked, and not decided by its layout.
    pub fn find(&self, name: &str) -> Found<'a> {
        if let Some((module, _)) = self.modules.get_key_value(name) {
            return Found::One(module);
        }
        let (style, places) = Style::of(name);
        let rest = &name[style.start().len()..];
        let mut found = BTreeMap::new();
        for place in places {
            let renamed = self.renamed.get(style, place, rest);
            found.extend(renamed.map(|(module, what)| (module, Some(what))));
            let own = self.own.get(style, place, rest);
            found.extend(own.map(|(module, ())| (module, None)));
        }
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some((module, None)), None) => Found::One(module),
            (Some((module, Some(what))), None) => Found::Renamed(module, what),
            (Some(first), Some(second)) => {
                let all = [first, second].into_iter().chain(found);
                Found::Several(all.map(|(module, _)| module.to_string()).collect())
            }
            (None, _) => Found::None {
                translated: self.translated(style, places, rest),
                nearest: self.nearest(name),
            },
        }
    }

    /// A name of a file that finds nothing, as the file would write it if it had the layout of the model's UNet.
    fn translated(&self, style: Style, places: &[&str], rest: &str) -> Option<String> {
        let mut unets = self
            .unets
            .iter()
            .filter(|(start, _)| places.contains(start));
        let is_flattened = matches!(style, Style::Flattened(_));
        let own = unets.find_map(|(_, unet)| unet.own_name(rest, is_flattened))?;
        Some(format!("{}{own}", style.start()))
    }

    /// Whether this is one of the two projections around the transformer blocks of Stable Diffusion 2, stored as a matrix.
    pub fn is_projection_of_sd2(&self, module: &str) -> bool {
        let (_, last) = module.rsplit_once('.').unwrap_or_default();
        let is_matrix = self
            .modules
            .get(module)
            .is_some_and(|shape| shape.len() == 2);
        let is_in = |(start, unet): &(&str, Unet)| {
            let name = module.strip_prefix(start);
            let name = name.filter(|name| unet.other_name(name).is_some());
            name.is_some() && !unet.has_added_embedding
        };
        matches!(last, "proj_in" | "proj_out") && is_matrix && self.unets.iter().any(is_in)
    }

    /// The modules whose flattened names share the longest end with this one's.
    fn nearest(&self, name: &str) -> Vec<String> {
        let name = name.replace('.', "_");
        let shared = |other: &str| {
            let pairs = other.bytes().rev().zip(name.bytes().rev());
            pairs.take_while(|(a, b)| a == b).count()
        };
        let mut scored: Vec<_> = self
            .own
            .flattened
            .iter()
            .map(|(flat, modules)| (shared(flat), modules))
            .filter(|(score, _)| *score > 0)
            .collect();
        scored.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let modules = scored.iter().flat_map(|(_, modules)| modules.iter());
        modules
            .take(NEAREST)
            .map(|(module, ())| module.to_string())
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
        let nearest = vec!["up.1.to_q".into()];
        let translated = None;
        assert_eq!(
            found,
            Found::None {
                translated,
                nearest
            }
        );
    }
}
