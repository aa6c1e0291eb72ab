//! The two layouts that the names of a Stable Diffusion UNet have.
//!
//! diffusers counts blocks by levels of resolution, and what is in a block by its kind. The first Stable Diffusion, ComfyUI and
//! Stability's files count all blocks in a row, and what is in a block in its order:
//!
//! | diffusers | original |
//! |---|---|
//! | `conv_in`, `conv_norm_out`, `conv_out` | `input_blocks.0.0`, `out.0`, `out.2` |
//! | `time_embedding.linear_1`, `.linear_2` | `time_embed.0`, `.2` |
//! | `add_embedding.linear_1`, `.linear_2` | `label_emb.0.0`, `.2` |
//! | `down_blocks.i.resnets.j`, `down_blocks.i.attentions.j` | `input_blocks.k.0`, `input_blocks.k.1` |
//! | `down_blocks.i.downsamplers.0.conv` | `input_blocks.k.0.op`, in a block of its own |
//! | `mid_block.resnets.0`, `.attentions.0`, `.resnets.1` | `middle_block.0`, `.1`, `.2` |
//! | `up_blocks.i.resnets.j`, `up_blocks.i.attentions.j` | `output_blocks.k.0`, `output_blocks.k.1` |
//! | `up_blocks.i.upsamplers.0.conv` | the last of a block: `output_blocks.k.2.conv`, or `.1.conv` without attention |
//! | `norm1`, `conv1`, `time_emb_proj` of a resnet | `in_layers.0`, `in_layers.2`, `emb_layers.1` |
//! | `norm2`, `conv2`, `conv_shortcut` of a resnet | `out_layers.0`, `out_layers.3`, `skip_connection` |
//!
//! The names inside an attention are the same. With two resnets a level, as in SD 1, SD 2 and SDXL, `k` is `3i + j + 1` on the way
//! down and `3i + j` on the way up. Here it is counted from the modules of the model, so that models of other depths, such as
//! distilled ones, have their own.
//!
//! Files: `scripts/convert_diffusers_to_original_stable_diffusion.py` and `…_sdxl.py` of diffusers at commit edc154da, and
//! `convert_ldm_unet_checkpoint` in `loaders/single_file_utils.py` of diffusers 0.42.1; the same pairs are `unet_to_diffusers` in
//! `comfy/utils.py` of ComfyUI, and the names of OneTrainer 23df3832 and of sd-scripts 48d368fa, which has SDXL in the original
//! layout and SD 1 and 2 in that of diffusers.

use std::collections::BTreeSet;

/// A way to name the modules of a UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layout {
    Diffusers,
    Original,
}

use Layout::{Diffusers, Original};

impl Layout {
    pub fn other(self) -> Self {
        match self {
            Diffusers => Original,
            Original => Diffusers,
        }
    }

    /// The layout in words.
    pub fn name(self) -> &'static str {
        match self {
            Diffusers => "diffusers' layout (down_blocks)",
            Original => "the original layout (input_blocks)",
        }
    }

    /// The modules on the way down, in the middle, and on the way up.
    fn blocks(self) -> [&'static str; 3] {
        match self {
            Diffusers => ["down_blocks", "mid_block", "up_blocks"],
            Original => ["input_blocks", "middle_block", "output_blocks"],
        }
    }

    /// The layout of a name with dots or `_` for them, if it is that of a module in one of the blocks.
    pub fn of_name(name: &str) -> Option<Self> {
        let flat = name.replace('.', "_");
        let is_in_block = |layout: &Self| {
            let mut blocks = layout.blocks().into_iter();
            let rest = blocks.find_map(|block| flat.strip_prefix(block)?.strip_prefix('_'));
            rest.is_some_and(|rest| {
                let mut parts = rest.split('_').skip_while(|part| is_number(part));
                let kind = parts.next().unwrap_or_default();
                let kinds = ["attentions", "downsamplers", "resnets", "upsamplers"];
                match layout {
                    Diffusers => kinds.contains(&kind),
                    Original => rest.starts_with(|first: char| first.is_ascii_digit()),
                }
            })
        };
        [Diffusers, Original].into_iter().find(is_in_block)
    }
}

fn is_number(part: &str) -> bool {
    part.bytes().all(|byte| byte.is_ascii_digit())
}

/// What a resnet is made of, in both layouts.
const RESNET: [[&str; 2]; 6] = [
    ["norm1", "in_layers.0"],
    ["conv1", "in_layers.2"],
    ["time_emb_proj", "emb_layers.1"],
    ["norm2", "out_layers.0"],
    ["conv2", "out_layers.3"],
    ["conv_shortcut", "skip_connection"],
];

/// What an attention is made of. The names behind the one that ends with a dot are the same in both layouts.
const ATTENTION: [&str; 4] = ["norm", "proj_in", "proj_out", "transformer_blocks."];

/// The first layer of what SDXL embeds beside the time and the prompt.
const ADDED: [&str; 2] = ["add_embedding.linear_1", "label_emb.0.0"];

/// What is outside of blocks.
const OUTSIDE: [[&str; 2]; 7] = [
    ["conv_in", "input_blocks.0.0"],
    ["time_embedding.linear_1", "time_embed.0"],
    ["time_embedding.linear_2", "time_embed.2"],
    ADDED,
    ["add_embedding.linear_2", "label_emb.0.2"],
    ["conv_norm_out", "out.0"],
    ["conv_out", "out.2"],
];

/// A level of resolution, on the way down or up.
#[derive(Debug, Default)]
struct Level {
    resnets: usize,
    /// Whether there is an attention behind the last resnet.
    has_attention: bool,
    /// Whether it ends with a change of resolution.
    has_sampler: bool,
}

/// The names of the modules of a UNet.
#[derive(Debug)]
pub(super) struct Unet {
    layout: Layout,
    /// A name in each layout, or what it starts with where that ends with a dot.
    pairs: Vec<[String; 2]>,
    /// Whether it takes more than a time and a prompt, as SDXL does.
    pub has_added_embedding: bool,
}

impl Unet {
    /// The UNet that these modules make. None where a module of a block has no name in the other layout, or where modules are
    /// missing, so that those behind them would be counted wrong.
    pub fn of(modules: &BTreeSet<&str>) -> Option<Self> {
        let has = |name: String| modules.contains(name.as_str());
        let is_there = |layout: &Layout| {
            let [down, _, up] = layout.blocks();
            let blocks = [format!("{down}."), format!("{up}.")];
            let mut names = modules.iter();
            names.any(|name| blocks.iter().any(|block| name.starts_with(block)))
        };
        let (layout, [down, up]) = match [Diffusers, Original].map(|layout| is_there(&layout)) {
            [true, false] => {
                let levels = [("down_blocks", "downsamplers"), ("up_blocks", "upsamplers")];
                (Diffusers, levels.map(|names| by_levels(&has, names)))
            }
            [false, true] => {
                let down = in_a_row(&has, "input_blocks", 1, &["0.op"]);
                let up = in_a_row(&has, "output_blocks", 0, &["1.conv", "2.conv"]);
                (Original, [down, up])
            }
            _ => return None,
        };
        if !is_whole(&down, &up) {
            return None;
        }
        let unet = Self {
            layout,
            pairs: pairs(&down, &up),
            has_added_embedding: ADDED.iter().any(|name| modules.contains(name)),
        };
        let is_in_block = |name: &&&str| {
            let first = name.split('.').next().unwrap_or_default();
            layout.blocks().contains(&first)
        };
        let mut in_blocks = modules.iter().filter(is_in_block);
        let is_known = in_blocks.all(|name| unet.other_name(name).is_some());
        is_known.then_some(unet)
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What the other layout calls this module of the model.
    pub fn other_name(&self, module: &str) -> Option<String> {
        let (own, other) = (self.layout as usize, self.layout.other() as usize);
        let pairs = self.pairs.iter();
        pairs
            .map(|pair| (&*pair[own], &*pair[other]))
            .find_map(|pair| renamed(pair, module))
    }

    /// What the layout of the model calls a module that a file calls by this name of the other layout, with dots or with `_` for
    /// them. The model need not have it.
    pub fn own_name(&self, name: &str, is_flattened: bool) -> Option<String> {
        let (own, other) = (self.layout as usize, self.layout.other() as usize);
        self.pairs.iter().find_map(|pair| {
            let [own, other] = [own, other].map(|side| match is_flattened {
                true => pair[side].replace('.', "_"),
                false => pair[side].clone(),
            });
            renamed((&other, &own), name)
        })
    }
}

/// The name with the second of the pair in place of the first.
fn renamed((from, to): (&str, &str), name: &str) -> Option<String> {
    match from.ends_with(['.', '_']) {
        true => Some(format!("{to}{}", name.strip_prefix(from)?)),
        false => (name == from).then(|| to.to_string()),
    }
}

/// The levels of a UNet in the layout of diffusers.
fn by_levels(has: &impl Fn(String) -> bool, (blocks, samplers): (&str, &str)) -> Vec<Level> {
    let level = |index: usize| {
        let block = format!("{blocks}.{index}");
        let resnets = (0..).take_while(|j| has(format!("{block}.resnets.{j}.conv1")));
        let resnets = resnets.count();
        let last = resnets.checked_sub(1)?;
        Some(Level {
            resnets,
            has_attention: has(format!("{block}.attentions.{last}.proj_in")),
            has_sampler: has(format!("{block}.{samplers}.0.conv")),
        })
    };
    (0..).map_while(level).collect()
}

/// The levels of a UNet in the original layout. A block that changes the resolution is the last of its level.
fn in_a_row(
    has: &impl Fn(String) -> bool,
    blocks: &str,
    first: usize,
    samplers: &[&str],
) -> Vec<Level> {
    let mut levels = vec![Level::default()];
    for index in first.. {
        let block = format!("{blocks}.{index}");
        let has_resnet = has(format!("{block}.0.in_layers.2"));
        let has_sampler = samplers.iter().any(|name| has(format!("{block}.{name}")));
        let Some(level) = levels.last_mut().filter(|_| has_resnet || has_sampler) else {
            break;
        };
        if has_resnet {
            level.resnets += 1;
            level.has_attention = has(format!("{block}.1.proj_in"));
        }
        if has_sampler {
            level.has_sampler = true;
            levels.push(Level::default());
        }
    }
    levels
}

/// Whether every level but the last ends with a change of resolution, and the way up has one resnet more a level, which are
/// what a file with missing modules would not have.
fn is_whole(down: &[Level], up: &[Level]) -> bool {
    let changes = |levels: &[Level]| {
        let last = levels.len() - 1;
        let mut levels = levels.iter().enumerate();
        levels.all(|(index, level)| level.has_sampler == (index < last))
    };
    let mut pairs = down.iter().zip(up.iter().rev());
    !down.is_empty()
        && down.len() == up.len()
        && pairs.all(|(down, up)| down.resnets > 0 && up.resnets == down.resnets + 1)
        && changes(down)
        && changes(up)
}

/// All names in both layouts.
fn pairs(down: &[Level], up: &[Level]) -> Vec<[String; 2]> {
    let mut pairs: Vec<_> = OUTSIDE.map(|pair| pair.map(str::to_string)).into();
    // The first block holds `conv_in`.
    let mut block = 1;
    for (i, level) in down.iter().enumerate() {
        for j in 0..level.resnets {
            let (names, row) = (format!("down_blocks.{i}"), format!("input_blocks.{block}"));
            pairs.extend(resnet_and_attention(&names, j, &row));
            block += 1;
        }
        if level.has_sampler {
            let diffusers = format!("down_blocks.{i}.downsamplers.0.conv");
            pairs.push([diffusers, format!("input_blocks.{block}.0.op")]);
            block += 1;
        }
    }
    pairs.extend(resnet_and_attention("mid_block", 0, "middle_block"));
    pairs.extend(resnet("mid_block.resnets.1", "middle_block.2"));
    block = 0;
    for (i, level) in up.iter().enumerate() {
        for j in 0..level.resnets {
            let (names, row) = (format!("up_blocks.{i}"), format!("output_blocks.{block}"));
            pairs.extend(resnet_and_attention(&names, j, &row));
            block += 1;
        }
        if level.has_sampler {
            let diffusers = format!("up_blocks.{i}.upsamplers.0.conv");
            let (last, place) = (block - 1, 1 + usize::from(level.has_attention));
            pairs.push([diffusers, format!("output_blocks.{last}.{place}.conv")]);
        }
    }
    pairs
}

/// The names of a resnet and of the attention behind it, of this number in diffusers' block, and in a block of the original
/// layout.
fn resnet_and_attention(diffusers: &str, number: usize, original: &str) -> Vec<[String; 2]> {
    let names = ["resnets", "attentions"].map(|kind| format!("{diffusers}.{kind}.{number}"));
    let mut pairs = resnet(&names[0], &format!("{original}.0"));
    let attention = [&names[1], &format!("{original}.1")];
    pairs.extend(ATTENTION.map(|part| attention.map(|name| format!("{name}.{part}"))));
    pairs
}

fn resnet(diffusers: &str, original: &str) -> Vec<[String; 2]> {
    let pairs = RESNET.map(|[a, b]| [format!("{diffusers}.{a}"), format!("{original}.{b}")]);
    pairs.into()
}
