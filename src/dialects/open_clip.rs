//! OpenCLIP's text encoders, under the names that transformers gives to their modules.
//!
//! Stability's files of SD 2 and SDXL hold the larger text encoder as OpenCLIP made it, while every program trains
//! transformers' `CLIPTextModel`. Only names differ, and that PyTorch's `MultiheadAttention` keeps the three projections of
//! its inputs in one tensor, `in_proj_weight`, of which each has a third of the rows:
//! [`AdapterFile::place`](super::AdapterFile::place) takes them as modules `q_proj`, `k_proj` and `v_proj` beside `out_proj`.
//!
//! Files: `convert_openclip_text_enc_state_dict` in `scripts/convert_diffusers_to_original_sdxl.py` of diffusers at commit
//! edc154da, and `convert_open_clip_checkpoint` in `loaders/single_file_utils.py` of diffusers 0.42.1.

/// Where checkpoints keep such a text encoder: alone, in SD 2, in SDXL's refiner, and in SDXL.
pub(super) const PLACES: [&str; 4] = [
    "",
    "cond_stage_model.model.",
    "conditioner.embedders.0.model.",
    "conditioner.embedders.1.model.",
];

/// The blocks of a text encoder, in both.
const BLOCKS: [&str; 2] = ["transformer.resblocks.", "text_model.encoder.layers."];

/// What a block is made of, in both.
const BLOCK: [[&str; 2]; 8] = [
    ["ln_1", "layer_norm1"],
    ["ln_2", "layer_norm2"],
    ["mlp.c_fc", "mlp.fc1"],
    ["mlp.c_proj", "mlp.fc2"],
    ["attn.q_proj", "self_attn.q_proj"],
    ["attn.k_proj", "self_attn.k_proj"],
    ["attn.v_proj", "self_attn.v_proj"],
    ["attn.out_proj", "self_attn.out_proj"],
];

/// What transformers calls a module that OpenCLIP calls this.
pub(super) fn name_of_transformers(module: &str) -> Option<String> {
    let [own, other] = BLOCKS;
    let (number, part) = module.strip_prefix(own)?.split_once('.')?;
    let [_, part] = BLOCK.iter().find(|[name, _]| *name == part)?;
    Some(format!("{other}{number}.{part}"))
}
