//! PEFT's names: of its two files, of the settings in one and of the tensors in the other.
//!
//! | tensor | key after the prefix | shape |
//! |---|---|---|
//! | BOFT's squares | `<layer>.boft_R` | `[m, n, b, b]` |
//! | BOFT's scale | `<layer>.boft_s` | `[d_output, 1]`, of a convolution `[1, d_output]` |
//! | OFT's packed blocks | `<layer>.oft_R.weight` | `[n, b(b−1)/2]` |
//! | the same of an embedding | `<layer>.oft_embedding_R.weight` | `[n, b(b−1)/2]` |
//! | a trained bias of an adapted layer | `<layer>.base_layer.bias` | `[d_output]` |
//! | a part of a module to save, a bias of another layer | `<module>.<tensor>` | as in the model |
//! | a copy of an embedding or head of the base | `<layer>.base_layer.weight`, or `<module>.weight` | as in the model |
//!
//! Older versions had `boft_P` beside BOFT's squares, and `oft_r` with `oft_s` instead of packed blocks.
//!
//! PEFT's names in memory also have the name of the adapter, `oft_R.default.weight` and `boft_R.default`; in the file
//! it is left out (`get_peft_model_state_dict` in `src/peft/utils/save_and_load.py`). Keys are compared component by
//! component: `oft_` is a part of `boft_` and of names such as `soft_gate`.

use crate::value::keymap::{join, split};

/// The file of the settings in an adapter's folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of the tensors in an adapter's folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// The file of the tensors where PEFT wrote a pickle.
pub(super) const PICKLE_FILE: &str = "adapter_model.bin";

/// What the key of every tensor starts with: PEFT wraps the model twice, in a `PeftModel` and in the model of its
/// method.
pub const PREFIX: &str = "base_model.model.";

/// Settings that say where an adapter comes from, not what it computes; they are carried along.
pub(crate) const ABOUT: [&str; 4] = [
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
];
/// Settings of both methods.
pub(super) const COMMON: [&str; 11] = [
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "target_modules",
];
/// Settings of BOFT.
pub(super) const BOFT: [&str; 4] = [
    "boft_block_num",
    "boft_block_size",
    "boft_dropout",
    "boft_n_butterfly_factor",
];
/// Settings of OFT. The two patterns are PEFT 0.15's and older; the tensors say what they changed.
pub(super) const OFT: [&str; 10] = [
    "alpha_pattern",
    "block_share",
    "coft",
    "eps",
    "module_dropout",
    "num_cayley_neumann_terms",
    "oft_block_size",
    "r",
    "rank_pattern",
    "use_cayley_neumann",
];

/// Where PEFT keeps the parameters of an adapted layer itself.
const BASE_LAYER: &str = "base_layer";
/// Modules that transformers calls embeddings, as the last component of their path: what a model embeds tokens with, and the
/// head that gives them back. PEFT keeps a copy of their weights beside the adapter where one of them is a target, or where
/// the vocabulary was resized.
const EMBEDDINGS: [&str; 19] = [
    "decoder",
    "embed_in",
    "embed_out",
    "embed_tokens",
    "embeddings",
    "generator_lm_head",
    "input_embeds_layer",
    "lm_head",
    "lm_loss",
    "output_projection",
    "proj_out",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "tokens_embed",
    "vocab_projector",
    "word_embedding",
    "word_embeddings",
    "wte",
];
/// The tensor that every embedding with an adapter has, since PEFT 0.19.
pub(super) const EMBEDDING_ROTATION: &str = "oft_embedding_R.weight";

/// The method of an adapter, as `peft_type` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Squares, several factors, and a scale.
    Boft,
    /// Packed blocks of one factor.
    Oft,
}

impl Format {
    /// What `peft_type` says.
    pub(super) fn peft_type(self) -> &'static str {
        match self {
            Self::Boft => "BOFT",
            Self::Oft => "OFT",
        }
    }

    /// The name with its article, for a message.
    pub(super) fn article(self) -> &'static str {
        match self {
            Self::Boft => "a BOFT",
            Self::Oft => "an OFT",
        }
    }

    /// What `bias` says where the biases of the adapted layers are trained.
    pub(super) fn bias_only(self) -> &'static str {
        match self {
            Self::Boft => "boft_only",
            Self::Oft => "oft_only",
        }
    }
}

/// How the tensors of a layer are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// BOFT's squares and scale.
    Boft,
    /// OFT's packed blocks, since PEFT 0.16.
    Oft,
    /// OFT's squares and scale of PEFT 0.14 to 0.15.2.
    Squares,
}

impl Layout {
    /// The layout of a file of this method with these keys.
    pub(super) fn of<'a>(format: Format, mut keys: impl Iterator<Item = &'a String>) -> Self {
        let is_square = |key: &String| {
            let leaf = leaf(key).map(|(_, leaf)| leaf);
            matches!(
                leaf,
                Some(Leaf::Rotation(Self::Squares) | Leaf::Scale(Self::Squares))
            )
        };
        match format {
            Format::Boft => Self::Boft,
            Format::Oft if keys.any(is_square) => Self::Squares,
            Format::Oft => Self::Oft,
        }
    }

    /// The method whose layout it is.
    pub(super) fn format(self) -> Format {
        match self {
            Self::Boft => Format::Boft,
            Self::Oft | Self::Squares => Format::Oft,
        }
    }

    /// The name of the tensor that every layer has, apart from embeddings.
    pub(super) fn rotation(self) -> &'static str {
        match self {
            Self::Boft => "boft_R",
            Self::Oft => "oft_R.weight",
            Self::Squares => "oft_r",
        }
    }

    /// The name of the tensor that scales the outputs.
    pub(super) fn scale(self) -> Option<&'static str> {
        match self {
            Self::Boft => Some("boft_s"),
            Self::Oft => None,
            Self::Squares => Some("oft_s"),
        }
    }
}

/// What a key says of its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf<'a> {
    /// The rotation of an adapted layer.
    Rotation(Layout),
    /// The scale of an adapted layer.
    Scale(Layout),
    /// The dense permutations of PEFT 0.11 and 0.12.
    Permutation,
    /// The rotation of an embedding.
    Embedding,
    /// A parameter of an adapted layer.
    Base(&'a str),
    /// A parameter of another module.
    Other(&'a str),
}

/// The module and the tensor that a key names. None of a key without the prefix.
///
/// Only the end of a key decides, so a module may be called `boft_R` itself. The module is empty where the adapted
/// model is itself the layer.
pub(super) fn leaf(key: &str) -> Option<(&str, Leaf<'_>)> {
    let (front, name) = split(key.strip_prefix(PREFIX)?);
    let (outer, inner) = split(front);
    Some(match (inner, name) {
        (_, "boft_R") => (front, Leaf::Rotation(Layout::Boft)),
        (_, "boft_s") => (front, Leaf::Scale(Layout::Boft)),
        (_, "boft_P") => (front, Leaf::Permutation),
        (_, "oft_r") => (front, Leaf::Rotation(Layout::Squares)),
        (_, "oft_s") => (front, Leaf::Scale(Layout::Squares)),
        ("oft_R", "weight") => (outer, Leaf::Rotation(Layout::Oft)),
        ("oft_embedding_R", "weight") => (outer, Leaf::Embedding),
        (BASE_LAYER, name) => (outer, Leaf::Base(name)),
        (_, name) => (front, Leaf::Other(name)),
    })
}

/// The key of a tensor of a module.
///
/// ```
/// assert_eq!(burn_boft::peft::key("encoder.fc1", "boft_R"), "base_model.model.encoder.fc1.boft_R");
/// ```
pub fn key(module: &str, tensor: &str) -> String {
    format!("{PREFIX}{}", join(module, tensor))
}

/// The key of a tensor that travels beside the rotations: PEFT moves the parameters of adapted layers one level down.
///
/// `is_adapted` says whether the module carries an adapter. A tensor under the wrong one of the two keys is not read by
/// PEFT, which drops keys that it has no parameter for.
///
/// ```
/// use burn_boft::peft::saved_key;
///
/// assert_eq!(saved_key("classifier", "weight", false), "base_model.model.classifier.weight");
/// assert_eq!(saved_key("fc1", "bias", true), "base_model.model.fc1.base_layer.bias");
/// ```
pub fn saved_key(module: &str, tensor: &str, is_adapted: bool) -> String {
    match is_adapted {
        true => key(&join(module, BASE_LAYER), tensor),
        false => key(module, tensor),
    }
}

/// The module that PEFT saves, if this path is of PEFT's wrapper around it.
///
/// The wrapper holds the frozen module and a trained copy. With `bias = "all"`, PEFT collects every key that ends with
/// `.bias`, and so the biases of both, beside the entries that `modules_to_save` means; where it copies embeddings, it
/// collects every key that their names are in, and so the weights of both. Where the saved module is made of others, their names
/// come after those of the wrapper: `pooler.modules_to_save.default.dense`.
pub(super) fn wrapped(module: &str) -> Option<&str> {
    let mut start = 0;
    for name in module.split('.') {
        if matches!(name, "modules_to_save" | "original_module") {
            return Some(module[..start].trim_end_matches('.'));
        }
        start += name.len() + 1;
    }
    None
}

/// Whether PEFT may keep a copy of this tensor of the base model beside an adapter.
///
/// # References
///
/// `get_peft_model_state_dict` in `src/peft/utils/save_and_load.py`, with `save_embedding_layers`.
pub(super) fn is_copied(module: &str, tensor: &str) -> bool {
    EMBEDDINGS.contains(&split(module).1) && matches!(tensor, "weight" | "bias")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_by_components_and_not_by_letters() {
        let full = |rest: &str| format!("{PREFIX}{rest}");
        for (key, module, expected) in [
            ("a.b.boft_R", "a.b", Leaf::Rotation(Layout::Boft)),
            ("a.boft_s.boft_R", "a.boft_s", Leaf::Rotation(Layout::Boft)),
            ("soft_gate.weight", "soft_gate", Leaf::Other("weight")),
            ("a.oft_R.weight", "a", Leaf::Rotation(Layout::Oft)),
            ("a.oft_r", "a", Leaf::Rotation(Layout::Squares)),
            ("emb.oft_embedding_R.weight", "emb", Leaf::Embedding),
            ("a.base_layer.bias", "a", Leaf::Base("bias")),
            ("boft_s", "", Leaf::Scale(Layout::Boft)),
        ] {
            assert_eq!(leaf(&full(key)), Some((module, expected)));
        }
        assert_eq!(leaf("model.a.boft_R"), None);
    }

    #[test]
    fn paths_of_a_wrapper_name_the_module_that_is_saved() {
        for (path, expected) in [
            ("lm_head.modules_to_save", Some("lm_head")),
            (
                "model.embed_tokens.original_module",
                Some("model.embed_tokens"),
            ),
            ("a.pooler.modules_to_save.default.dense", Some("a.pooler")),
            ("original_module", Some("")),
            ("model.original_modules", None),
            ("lm_head", None),
        ] {
            assert_eq!(wrapped(path), expected, "{path}");
        }
    }

    #[test]
    fn one_old_key_makes_an_old_file() {
        let keys = ["a.oft_R.weight", "b.oft_s"].map(|rest| format!("{PREFIX}{rest}"));
        assert_eq!(Layout::of(Format::Oft, keys.iter()), Layout::Squares);
        assert_eq!(Layout::of(Format::Oft, keys[..1].iter()), Layout::Oft);
        assert_eq!(Layout::of(Format::Boft, keys.iter()), Layout::Boft);
    }
}
