//! Heads that share the weight of the input embedding, as transformers ties them.
//!
//! Most language models keep one tensor for both: `config.json` or the model type says so, and the file lacks the
//! head's. An adapter that replaces one of the two must not change the other, so the merged model gets a tensor for
//! each and a `config.json` that says so.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use burn_boft::LayerKind;
use burn_boft::input::{self, LONGEST_SETTINGS};
use serde_json::{Map, Value};

use crate::base::{Base, is_same};
use crate::changes::{Added, Change, Changes, steps};
use crate::error::Error;

/// The file of a model's folder that says what the model is.
pub const FILE: &str = "config.json";
const FLAG: &str = "tie_word_embeddings";

/// The names of modules that embed tokens, as the last component of their path.
const EMBEDDINGS: [&str; 9] = [
    "embed_in",
    "embed_tokens",
    "embeddings",
    "shared",
    "tok_embeddings",
    "tokens_embed",
    "word_embedding",
    "word_embeddings",
    "wte",
];
/// The names of the heads of language models, as the end of their path.
const HEADS: [&str; 14] = [
    "cls.predictions.decoder",
    "embed_out",
    "entity_predictions.decoder",
    "generator_lm_head",
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "lm_loss",
    "mlm_score.decoder",
    "output_projection",
    "pred_layer.proj",
    "predictions.decoder",
    "proj_out",
    "vocab_projector",
];
/// How transformers ends the names of architectures without the head of a language model.
const HEADLESS: [&str; 7] = [
    "ForAudioClassification",
    "ForImageClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
];

/// Model types whose head can be given tensors of its own, because `tie_word_embeddings` decides nothing else in them.
struct Family {
    types: &'static [&'static str],
    /// What holds where `config.json` does not say, in transformers 4 and 5 alike.
    tied: bool,
    /// The head's tensors, each with the one that it shares. The weight comes first.
    shared: &'static [(&'static str, &'static str)],
}

const LM_HEAD: &str = "lm_head.weight";
/// From `_tied_weights_keys` and the configurations of transformers 4.57 and 5.
const FAMILIES: [Family; 12] = [
    Family {
        types: &[
            "apertus",
            "arcee",
            "bitnet",
            "cwm",
            "deepseek_v2",
            "deepseek_v3",
            "diffllama",
            "doge",
            "dots1",
            "exaone4",
            "falcon_h1",
            "flex_olmo",
            "glm",
            "glm4",
            "glm4_moe",
            "gpt_oss",
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "helium",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "llama",
            "llama4_text",
            "longcat_flash",
            "minimax",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "nemotron",
            "olmo",
            "olmo2",
            "olmo3",
            "olmoe",
            "persimmon",
            "phi",
            "phi3",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "qwen3_next",
            "seed_oss",
            "stablelm",
        ],
        tied: false,
        shared: &[(LM_HEAD, "model.embed_tokens.weight")],
    },
    Family {
        types: &[
            "cohere",
            "cohere2",
            "ernie4_5",
            "ernie4_5_moe",
            "gemma",
            "gemma2",
            "gemma3_text",
            "jetmoe",
            "recurrent_gemma",
            "smollm3",
            "starcoder2",
            "vaultgemma",
            "xglm",
        ],
        tied: true,
        shared: &[(LM_HEAD, "model.embed_tokens.weight")],
    },
    Family {
        types: &["gpt2", "gpt_bigcode", "gpt_neo", "mpt"],
        tied: true,
        shared: &[(LM_HEAD, "transformer.wte.weight")],
    },
    Family {
        types: &["codegen", "gptj"],
        tied: false,
        shared: &[(LM_HEAD, "transformer.wte.weight")],
    },
    Family {
        types: &["opt"],
        tied: true,
        shared: &[(LM_HEAD, "model.decoder.embed_tokens.weight")],
    },
    Family {
        types: &["bloom", "falcon"],
        tied: true,
        shared: &[(LM_HEAD, "transformer.word_embeddings.weight")],
    },
    Family {
        types: &["falcon_mamba", "mamba"],
        tied: true,
        shared: &[(LM_HEAD, "backbone.embeddings.weight")],
    },
    Family {
        types: &["bert", "big_bird", "megatron-bert"],
        tied: true,
        shared: &[
            (
                "cls.predictions.decoder.weight",
                "bert.embeddings.word_embeddings.weight",
            ),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ],
    },
    Family {
        types: &[
            "camembert",
            "roberta",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ],
        tied: true,
        shared: &[
            (
                "lm_head.decoder.weight",
                "roberta.embeddings.word_embeddings.weight",
            ),
            ("lm_head.decoder.bias", "lm_head.bias"),
        ],
    },
    Family {
        types: &["albert"],
        tied: true,
        shared: &[
            (
                "predictions.decoder.weight",
                "albert.embeddings.word_embeddings.weight",
            ),
            ("predictions.decoder.bias", "predictions.bias"),
        ],
    },
    Family {
        types: &["distilbert"],
        tied: true,
        shared: &[(
            "vocab_projector.weight",
            "distilbert.embeddings.word_embeddings.weight",
        )],
    },
    Family {
        types: &["electra"],
        tied: true,
        shared: &[(
            "generator_lm_head.weight",
            "electra.embeddings.word_embeddings.weight",
        )],
    },
];

/// Whether a model's head and its input embedding are one tensor.
#[derive(Debug, PartialEq, Eq)]
enum Tied {
    Yes,
    No,
    /// The reason continues "the adapter changes … and".
    Unknown(String),
}

/// What the rotation of an embedding means for a head that shares its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotated {
    /// The embedding is rotated and the head is not, as in the model that was trained. PEFT's own merge rotates the one tensor, and
    /// so both.
    Alone,
    /// Both were rotated by that merge, and both are restored.
    Together,
}

/// What a model's `config.json` says of its head.
pub struct Head {
    path: PathBuf,
    text: String,
    config: Option<Map<String, Value>>,
    tied: Tied,
    family: Option<&'static Family>,
}

impl Head {
    /// Reads the `config.json` of a model: in its folder, or beside its file.
    pub fn of(base: &Base) -> Result<Self, Error> {
        let path = match base.is_folder() {
            true => base.path.join(FILE),
            false => base.path.with_file_name(FILE),
        };
        let text = input::read(&path, LONGEST_SETTINGS).and_then(|bytes| {
            String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
        });
        let text = match text {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::read(&path)(error)),
        };
        let config: Result<Map<_, _>, _> = serde_json::from_str(&text);
        let shown = path.display();
        let unknown = match &config {
            Err(error) if !text.is_empty() => format!(
                "{shown}, which says whether embedding and head are one tensor, is no JSON: {error}; mend it"
            ),
            _ => format!(
                "nothing says whether embedding and head are one tensor; if they are two, write {shown} with `\"{FLAG}\": \
                 false`"
            ),
        };
        let config = config.ok();
        let family = config.as_ref().and_then(family);
        let tied = match &config {
            Some(config) => tied(&shown.to_string(), config, family),
            None => Tied::Unknown(unknown),
        };
        Ok(Self {
            path,
            text,
            config,
            tied,
            family,
        })
    }

    /// The text of the `config.json`; empty if there is none.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Every `model_type` in the `config.json`: that of the model, and those of the models that it is made of.
    pub fn model_types(&self) -> Vec<&str> {
        let mut types = Vec::new();
        if let Some(config) = &self.config {
            collect_types(config, &mut types);
        }
        types
    }

    /// Whether this is a tensor of the head that the file may lack, because it is the same as another.
    pub fn is_shared(&self, key: &str) -> bool {
        let shared = self.family.map_or(&[][..], |family| family.shared);
        self.tied == Tied::Yes && shared.iter().any(|(own, _)| *own == key)
    }

    /// Whether this is a tensor of a head that the file lacks, because the model has one tensor for it and the embedding.
    pub fn is_tied(&self, key: &str) -> bool {
        self.is_shared(key) || (self.tied == Tied::Yes && is_head(key))
    }

    /// Gives the merged model a head of its own, if the adapter changes the head or the embedding and the two are one.
    ///
    /// # Errors
    ///
    /// If the head changes or may change with the embedding, and cannot be given tensors of its own.
    pub fn untie(&self, base: &Base, changes: &mut Changes, rotated: Rotated) -> Result<(), Error> {
        // A rotated layer that is called like an embedding and is none is something else.
        let changes_embedding = |change: &Change| match change {
            Change::Rotate(parts) => {
                let mut kinds = steps(parts).map(|step| step.layer.kind());
                rotated == Rotated::Alone && kinds.any(|kind| kind == Some(LayerKind::Embedding))
            }
            _ => true,
        };
        let is_touched = |(key, change): &(&String, &Change)| {
            let holds_tokens = || match change {
                Change::Rotate(_) => self.may_hold_tokens(key, base),
                _ => false,
            };
            let is_of_embedding = || is_embedding(key, base) || holds_tokens();
            is_head(key) || (changes_embedding(change) && is_of_embedding())
        };
        let added = changes.added.keys();
        let added = added.filter(|key| is_head(key) || is_embedding(key, base));
        let touched = changes.of.iter().filter(is_touched).map(|(key, _)| key);
        let touched: Vec<_> = touched.chain(added).cloned().collect();
        let Some(first) = touched.first() else {
            return Ok(());
        };
        let refuse = |why: &str| {
            let path = base.path.clone();
            let reason = format!("the adapter changes `{first}`, and {why}");
            Err(Error::Malformed { path, reason })
        };
        if touched.iter().any(|key| last(key) == "shared") {
            return refuse(
                "the encoder and the decoder share it, and PEFT trains a copy that neither of them uses; train the adapter \
                 without it",
            );
        }
        match &self.tied {
            Tied::No => Ok(()),
            _ if self.is_headless() && !touched.iter().any(|key| is_head(key)) => Ok(()),
            Tied::Unknown(_) if has_own_head(base)? => Ok(()),
            Tied::Unknown(why) => refuse(why),
            Tied::Yes if !base.is_folder() => refuse(&format!(
                "{} ties the head to the embedding, which a merged file alone cannot correct; name the model's folder \
                 instead of the file",
                self.path.display()
            )),
            Tied::Yes => match self.separate(base, changes, &touched) {
                Ok(config) => {
                    changes.config = Some(config);
                    Ok(())
                }
                Err(Separate::Error(error)) => Err(error),
                Err(Separate::Impossible(why)) => refuse(&format!(
                    "{} ties the head to the embedding, which cannot be undone here: {why}; save the model with a head \
                     of its own first",
                    self.path.display()
                )),
            },
        }
    }

    /// Adds the tensors that the head shares, and returns the corrected `config.json`.
    fn separate(
        &self,
        base: &Base,
        changes: &mut Changes,
        touched: &[String],
    ) -> Result<String, Separate> {
        let impossible = |why: String| Err(Separate::Impossible(why));
        let is_plain = self.config.as_ref().is_some_and(|config| {
            config.get("is_encoder_decoder") != Some(&Value::Bool(true))
                && !config.values().any(|value| value.get(FLAG).is_some())
        });
        let Some(family) = self.family.filter(|_| is_plain) else {
            return impossible("burn-boft does not know how models of its type share it".into());
        };
        let (head, embedding) = family.shared[0];
        if let Some(other) = touched.iter().find(|key| {
            !family
                .shared
                .iter()
                .any(|(own, of)| own == key || of == key)
        }) {
            return impossible(format!(
                "transformers calls the two `{embedding}` and `{head}`, and `{other}` is neither"
            ));
        }
        if base.entry(embedding).is_none() {
            return impossible(format!("the file has no `{embedding}`"));
        }
        if let Some(Change::New(_)) = changes.of.get(embedding)
            && !changes.added.contains_key(head)
        {
            return impossible("the embedding gets another number of rows".into());
        }
        for (own, shared) in family.shared {
            let is_there = base.entry(own).is_some();
            if is_there && !are_equal(base, own, shared).map_err(Separate::Error)? {
                return impossible(format!(
                    "the file has a `{own}` with other numbers than `{shared}`"
                ));
            }
            if is_there || changes.added.contains_key(*own) || base.entry(shared).is_none() {
                continue;
            }
            changes.added.insert(own.to_string(), Added::Copy(shared));
        }
        corrected(&self.text)
            .ok_or_else(|| Separate::Impossible(format!("`{FLAG}` cannot be set in it")))
    }

    /// Whether this matrix, which is an embedding, may be that of the tokens, whatever its name: it has a row for each of
    /// them, or nothing says how many there are. Embeddings of positions have other counts of rows.
    fn may_hold_tokens(&self, key: &str, base: &Base) -> bool {
        let mut sizes = Vec::new();
        if let Some(config) = &self.config {
            collect_vocabularies(config, &mut sizes);
        }
        let rows = base.entry(key).and_then(|(_, entry)| entry.shape.first());
        self.tied == Tied::Yes
            && rows.is_some_and(|&rows| sizes.is_empty() || sizes.contains(&(rows as u64)))
    }

    /// Whether no architecture of the model has the head of a language model.
    fn is_headless(&self) -> bool {
        let architectures = self
            .config
            .as_ref()
            .and_then(|config| config.get("architectures"));
        let Some(Value::Array(names)) = architectures else {
            return false;
        };
        let is_headless = |name: &Value| {
            name.as_str().is_some_and(|name| {
                HEADLESS.iter().any(|end| name.ends_with(end))
                    || (name.ends_with("Model")
                        && !name.ends_with("HeadModel")
                        && !name.ends_with("HeadsModel"))
            })
        };
        !names.is_empty() && names.iter().all(is_headless)
    }
}

/// Why a head cannot be given tensors of its own.
enum Separate {
    Impossible(String),
    Error(Error),
}

fn collect_types<'a>(config: &'a Map<String, Value>, types: &mut Vec<&'a str>) {
    types.extend(config.get("model_type").and_then(Value::as_str));
    for part in config.values().filter_map(Value::as_object) {
        collect_types(part, types);
    }
}

fn collect_vocabularies(config: &Map<String, Value>, sizes: &mut Vec<u64>) {
    sizes.extend(config.get("vocab_size").and_then(Value::as_u64));
    for part in config.values().filter_map(Value::as_object) {
        collect_vocabularies(part, sizes);
    }
}

fn family(config: &Map<String, Value>) -> Option<&'static Family> {
    let model_type = config.get("model_type")?.as_str()?;
    FAMILIES
        .iter()
        .find(|family| family.types.contains(&model_type))
}

fn tied(path: &str, config: &Map<String, Value>, family: Option<&Family>) -> Tied {
    // A model of several models keeps the configuration of its language model inside its own.
    let parts = config.values().filter_map(|value| value.get(FLAG));
    let stated: Vec<_> = parts
        .chain(config.get(FLAG))
        .filter_map(Value::as_bool)
        .collect();
    match (stated.contains(&true), stated.contains(&false), family) {
        (true, ..) => Tied::Yes,
        (_, true, _) => Tied::No,
        (_, _, Some(family)) if family.tied => Tied::Yes,
        (_, _, Some(_)) => Tied::No,
        _ => Tied::Unknown(format!(
            "{path} does not say whether embedding and head are one tensor; if they are two, add `\"{FLAG}\": false`"
        )),
    }
}

/// The last name of the module of a tensor.
fn last(key: &str) -> &str {
    let module = key.rsplit_once('.').map_or("", |(module, _)| module);
    module.rsplit('.').next().unwrap_or(module)
}

fn is_embedding(key: &str, base: &Base) -> bool {
    let is_matrix = base
        .entry(key)
        .is_none_or(|(_, entry)| entry.shape.len() == 2);
    is_matrix && key.ends_with(".weight") && EMBEDDINGS.contains(&last(key))
}

/// Whether this is a tensor of the head of a language model.
pub fn is_head(key: &str) -> bool {
    let module = key.rsplit_once('.').map_or("", |(module, _)| module);
    HEADS.iter().any(|head| {
        let front = module.strip_suffix(head);
        front.is_some_and(|front| front.is_empty() || front.ends_with('.'))
    })
}

/// Whether the file shows that its head is a tensor of its own, or has no embedding to share.
fn has_own_head(base: &Base) -> Result<bool, Error> {
    let embeddings: Vec<_> = base.keys().filter(|key| is_embedding(key, base)).collect();
    let heads: Vec<_> = base
        .keys()
        .filter(|key| is_head(key) && key.ends_with(".weight"))
        .collect();
    for embedding in &embeddings {
        for head in &heads {
            if are_equal(base, head, embedding)? {
                return Ok(false);
            }
        }
    }
    Ok(embeddings.is_empty() || !heads.is_empty())
}

/// Whether two tensors of the model hold the same numbers.
fn are_equal(base: &Base, a: &str, b: &str) -> Result<bool, Error> {
    match (base.entry(a), base.entry(b)) {
        (Some(a), Some(b)) => is_same(a, b),
        _ => Ok(false),
    }
}

/// The text of a `config.json` with `tie_word_embeddings: false`, and everything else as it is written.
fn corrected(text: &str) -> Option<String> {
    let key = format!("\"{FLAG}\"");
    let found = match text.split_once(&key) {
        Some((before, after)) => {
            let rest = after.trim_start().strip_prefix(':')?.trim_start();
            format!("{before}{key}: false{}", rest.strip_prefix("true")?)
        }
        None => format!(
            "{{\n  {key}: false,{}",
            text.trim_start().strip_prefix('{')?
        ),
    };
    // Checked, since the key could be part of a string or occur twice.
    let mut expected: Map<String, Value> = serde_json::from_str(text).ok()?;
    expected.insert(FLAG.into(), Value::Bool(false));
    let written: Map<String, Value> = serde_json::from_str(&found).ok()?;
    (written == expected).then_some(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(config: Value) -> Tied {
        let Value::Object(config) = config else {
            panic!("not an object")
        };
        tied("config.json", &config, family(&config))
    }

    #[test]
    fn the_model_type_decides_where_the_configuration_does_not_say() {
        assert_eq!(state(json!({"model_type": "gpt2"})), Tied::Yes);
        assert_eq!(state(json!({"model_type": "llama"})), Tied::No);
        assert_eq!(state(json!({"model_type": "llama", FLAG: true})), Tied::Yes);
        assert_eq!(state(json!({"model_type": "gpt2", FLAG: false})), Tied::No);
        assert_eq!(
            state(json!({"model_type": "llava", "text_config": {FLAG: true}, FLAG: false})),
            Tied::Yes
        );
        assert!(matches!(
            state(json!({"model_type": "new"})),
            Tied::Unknown(_)
        ));
        assert!(matches!(state(json!({FLAG: null})), Tied::Unknown(_)));
    }

    #[test]
    fn a_corrected_configuration_differs_in_one_value_alone() {
        let text = "{\n  \"eps\": 1e-05,\n  \"tie_word_embeddings\" :true,\n  \"z\": 0.10\n}\n";
        assert_eq!(
            corrected(text).unwrap(),
            "{\n  \"eps\": 1e-05,\n  \"tie_word_embeddings\": false,\n  \"z\": 0.10\n}\n"
        );
        assert_eq!(
            corrected("{\n  \"eps\": 1e-05\n}").unwrap(),
            "{\n  \"tie_word_embeddings\": false,\n  \"eps\": 1e-05\n}"
        );
        for strange in [
            "[]",
            r#"{"a": {"tie_word_embeddings": true}}"#,
            r#"{"tie_word_embeddings": null}"#,
            r#"{"tie_word_embeddings": true, "tie_word_embeddings": true}"#,
        ] {
            assert_eq!(corrected(strange), None, "{strange}");
        }
    }

    #[test]
    fn heads_and_embeddings_are_known_by_their_names() {
        for head in [
            "lm_head.weight",
            "cls.predictions.decoder.bias",
            "text.lm_head.weight",
        ] {
            assert!(is_head(head), "{head}");
        }
        for other in [
            "my_lm_head.weight",
            "classifier.weight",
            "decoder.weight",
            "weight",
        ] {
            assert!(!is_head(other), "{other}");
        }
        assert_eq!(last("model.embed_tokens.weight"), "embed_tokens");
        assert_eq!(last("wte.weight"), "wte");
        assert_eq!(last("weight"), "");
    }
}
