//! Model types of which transformers 5 renamed the modules while their files kept the old names.
//!
//! An adapter has the names of the modules that it was trained on, and a model's file those of transformers 4. The type in the
//! model's `config.json` says which rules lead from the one to the other; `--map` can name another type, or none.
//!
//! The rules are the inverses of those in `conversion_mapping.py` of transformers 5.23, as far as they only rename.

use burn_boft::{KeyMap, Transformers};

/// Model types with the same rules.
struct Family {
    types: &'static [&'static str],
    /// Patterns for the names of transformers 5, and what they become. They apply one after the other.
    rules: &'static [(&'static str, &'static str)],
    /// Starts of paths that are there or not, depending on what is around the model.
    prefixes: &'static [&'static str],
}

/// The type whose files have layers that transformers 5 splits in two, which no renaming says.
const DINOV2: [&str; 2] = ["dinov2", "dinov2_with_registers"];

const FAMILIES: [Family; 7] = [
    Family {
        types: &[
            "audio-spectrogram-transformer",
            "beit",
            "deit",
            "ijepa",
            "vit",
            "vit_mae",
            "vit_msn",
            "vivit",
        ],
        rules: &[
            (r"(^|\.)layers\.(\d+)\b", "${1}encoder.layer.$2"),
            (r"\.attention\.q_proj$", ".attention.attention.query"),
            (r"\.attention\.k_proj$", ".attention.attention.key"),
            (r"\.attention\.v_proj$", ".attention.attention.value"),
            (r"\.attention\.o_proj$", ".attention.output.dense"),
            (r"\.mlp\.fc1$", ".intermediate.dense"),
            (r"\.mlp\.fc2$", ".output.dense"),
        ],
        prefixes: &[
            "audio_spectrogram_transformer.",
            "beit.",
            "deit.",
            "ijepa.",
            "vit.",
            "vivit.",
        ],
    },
    Family {
        types: &["swin"],
        rules: &[
            (r"\.attention\.q_proj$", ".attention.self.query"),
            (r"\.attention\.k_proj$", ".attention.self.key"),
            (r"\.attention\.v_proj$", ".attention.self.value"),
            (r"\.attention\.o_proj$", ".attention.output.dense"),
            (r"\.mlp\.fc1$", ".intermediate.dense"),
            (r"\.mlp\.fc2$", ".output.dense"),
        ],
        prefixes: &["swin."],
    },
    Family {
        types: &["dinov3_vit"],
        rules: &[],
        prefixes: &["model."],
    },
    Family {
        types: &["minimax", "mixtral", "phimoe"],
        rules: &[
            (r"\.mlp\.router$", ".mlp.gate"),
            (r"\.mlp\b", ".block_sparse_moe"),
        ],
        prefixes: &[],
    },
    Family {
        types: &[
            "aria",
            "aya_vision",
            "gemma3",
            "got_ocr2",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "paligemma",
            "vipllava",
        ],
        rules: &[
            (r"^lm_head\b", "language_model.lm_head"),
            (r"^model\.language_model\b", "language_model.model"),
            (r"^model\.(vision_tower|multi_modal_projector)\b", "$1"),
        ],
        prefixes: &[],
    },
    Family {
        types: &["qwen2_5_vl", "qwen2_vl"],
        rules: &[
            (r"^model\.language_model\b", "model"),
            (r"^model\.visual\b", "visual"),
        ],
        prefixes: &[],
    },
    Family {
        types: &["gpt_neox"],
        rules: &[(r"^lm_head$", "embed_out")],
        prefixes: &[],
    },
];

/// The types that have rules.
pub fn types() -> impl Iterator<Item = &'static str> {
    DINOV2
        .into_iter()
        .chain(FAMILIES.iter().flat_map(|family| family.types).copied())
}

/// The rules for models of this type, if transformers 5 renamed their modules.
pub fn rules(model_type: &str) -> Option<KeyMap> {
    if DINOV2.contains(&model_type) {
        let prefix = format!("{model_type}.");
        return Some(KeyMap::dinov2(Transformers::V5).with_optional_prefix(prefix));
    }
    let family = FAMILIES
        .iter()
        .find(|family| family.types.contains(&model_type))?;
    let mut names = KeyMap::new();
    for (pattern, replacement) in family.rules {
        let added = names.with_to_model(pattern, *replacement);
        names = added.expect("the patterns of the table are valid");
    }
    let prefixes = family.prefixes.iter();
    Some(prefixes.fold(names, |names, prefix| names.with_optional_prefix(*prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_the_table_has_rules_and_stands_there_once() {
        let mut all: Vec<_> = types().collect();
        let count = all.len();
        assert!(all.iter().all(|model_type| rules(model_type).is_some()));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(rules("llama").is_none());
    }

    #[test]
    fn names_of_transformers_5_become_those_of_files() {
        for (model_type, new, old) in [
            (
                "vit",
                "vit.layers.1.attention.q_proj",
                "vit.encoder.layer.1.attention.attention.query",
            ),
            (
                "vit",
                "vit.layers.1.attention.o_proj",
                "vit.encoder.layer.1.attention.output.dense",
            ),
            (
                "vit",
                "vit.layers.1.mlp.fc2",
                "vit.encoder.layer.1.output.dense",
            ),
            (
                "vit",
                "vit.layers.1.layernorm_after",
                "vit.encoder.layer.1.layernorm_after",
            ),
            (
                "vit_msn",
                "vit.layers.0.mlp.fc1",
                "encoder.layer.0.intermediate.dense",
            ),
            (
                "beit",
                "layers.0.attention.k_proj",
                "encoder.layer.0.attention.attention.key",
            ),
            (
                "swin",
                "swin.encoder.layers.0.blocks.1.attention.v_proj",
                "swin.encoder.layers.0.blocks.1.attention.self.value",
            ),
            (
                "dinov3_vit",
                "model.layer.0.mlp.up_proj",
                "layer.0.mlp.up_proj",
            ),
            (
                "mixtral",
                "model.layers.0.mlp.gate",
                "model.layers.0.block_sparse_moe.gate",
            ),
            (
                "phimoe",
                "model.layers.0.mlp.router",
                "model.layers.0.block_sparse_moe.gate",
            ),
            (
                "llava",
                "model.language_model.layers.0.self_attn.q_proj",
                "language_model.model.layers.0.self_attn.q_proj",
            ),
            ("llava", "lm_head", "language_model.lm_head"),
            (
                "llava",
                "model.vision_tower.encoder.layers.0.mlp.fc1",
                "vision_tower.encoder.layers.0.mlp.fc1",
            ),
            (
                "qwen2_vl",
                "model.language_model.layers.0.mlp.up_proj",
                "model.layers.0.mlp.up_proj",
            ),
            (
                "qwen2_vl",
                "model.visual.blocks.0.attn.qkv",
                "visual.blocks.0.attn.qkv",
            ),
            ("gpt_neox", "lm_head", "embed_out"),
            (
                "dinov2_with_registers",
                "dinov2_with_registers.encoder.layer.0.attention.q_proj",
                "dinov2_with_registers.encoder.layer.0.attention.attention.query",
            ),
        ] {
            let places = rules(model_type).unwrap().places(new).unwrap();
            let found = places.iter().any(|place| place.module == old);
            assert!(found, "{model_type}: {new} becomes {places:?}");
        }
    }
}
