//! The classes of a model whose head comes from the adapter, in its `config.json`.
//!
//! transformers makes a head of as many rows as the configuration has labels, and refuses a file that holds another
//! number. An adapter that saves its head brings the rows and not the names of the classes.

use serde_json::{Map, Value, json};

use crate::base::Base;
use crate::changes::{Added, Change, Changes};

/// The weights of heads with one row per label.
const HEADS: [&str; 3] = [
    "classifier.weight",
    "classifier.out_proj.weight",
    "score.weight",
];
/// How the names of architectures end whose head has one row per label, and of those without a head.
const ENDINGS: [&str; 5] = [
    "ForAudioClassification",
    "ForImageClassification",
    "ForSequenceClassification",
    "ForTokenClassification",
    "Model",
];
/// Families in which the only model with a module `classifier` is the one for image classification, from transformers 5.
const IMAGES: [&str; 7] = [
    "ConvNext",
    "ConvNextV2",
    "Dinov2",
    "Dinov2WithRegisters",
    "Swin",
    "Swinv2",
    "ViT",
];
/// How many labels a configuration has that does not say.
const DEFAULT: usize = 2;

/// Writes the number of labels of a head that the adapter saved into the configuration of the merged model, and the
/// architecture where the head decides it. Returns a line that says so, if anything changed.
///
/// `config` is the text of the `config.json` of the model. A line also says so if there is one that is no JSON object. Nothing
/// happens if the model is a file, which has no configuration of its own, or if it is not known that the rows of the head are
/// labels.
pub fn correct(base: &Base, config: &str, changes: &mut Changes) -> Option<String> {
    if !base.is_folder() {
        return None;
    }
    let text = changes.config.as_deref().unwrap_or(config);
    let (labels, is_added) = HEADS.iter().find_map(|key| labels(key, changes))?;
    let mut config: Map<String, Value> = match serde_json::from_str(text) {
        Ok(config) => config,
        Err(_) if text.is_empty() => return None,
        Err(error) => {
            return Some(format!(
                "note: the adapter brings a head for {labels} classes; the config.json of the merged model is copied as it is, \
                 since it is no JSON: {error}"
            ));
        }
    };
    let architecture = architecture(&config)?;
    if !ENDINGS.iter().any(|end| architecture.ends_with(end)) {
        return None;
    }
    let mut said = Vec::new();
    if count(&config) != labels {
        set_labels(&mut config, labels);
        let last = labels - 1;
        said.push(format!("has {labels} labels, LABEL_0 to LABEL_{last}"));
    }
    if let Some(family) = architecture.strip_suffix("Model")
        && is_added
        && IMAGES.contains(&family)
        && changes.added.contains_key("classifier.weight")
    {
        let name = format!("{family}ForImageClassification");
        said.push(format!("names {name} as its architecture"));
        config.insert("architectures".into(), json!([name]));
    }
    if said.is_empty() {
        return None;
    }
    changes.config = Some(format!("{:#}\n", Value::Object(config)));
    Some(format!(
        "note: the adapter brings a head for {labels} classes; the config.json of the merged model {}",
        said.join(" and ")
    ))
}

/// The number of rows of a head that comes from the adapter, and whether the model has none yet.
fn labels(key: &str, changes: &Changes) -> Option<(usize, bool)> {
    let (tensor, is_added) = match (changes.of.get(key), changes.added.get(key)) {
        (Some(Change::New(tensor)), _) => (tensor, false),
        (_, Some(Added::Saved(tensor))) => (tensor, true),
        _ => return None,
    };
    match tensor.data().shape()[..] {
        [rows, _] if rows > 0 => Some((rows, is_added)),
        _ => None,
    }
}

/// The only architecture of a configuration.
fn architecture(config: &Map<String, Value>) -> Option<String> {
    match config.get("architectures")?.as_array()?.as_slice() {
        [name] => name.as_str().map(str::to_string),
        _ => None,
    }
}

/// How many labels transformers reads from a configuration.
fn count(config: &Map<String, Value>) -> usize {
    let names = config.get("id2label").and_then(Value::as_object);
    let number = config.get("num_labels").and_then(Value::as_u64);
    match (names, number) {
        (Some(names), _) => names.len(),
        (None, Some(number)) => number as usize,
        (None, None) => DEFAULT,
    }
}

/// Names the labels as transformers does where nobody named them.
fn set_labels(config: &mut Map<String, Value>, labels: usize) {
    let name = |label: usize| format!("LABEL_{label}");
    let names = (0..labels).map(|label| (label.to_string(), json!(name(label))));
    let numbers = (0..labels).map(|label| (name(label), json!(label)));
    let (names, numbers): (Map<_, _>, Map<_, _>) = (names.collect(), numbers.collect());
    config.insert("id2label".into(), names.into());
    config.insert("label2id".into(), numbers.into());
    if config.contains_key("num_labels") {
        config.insert("num_labels".into(), json!(labels));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: Value) -> Map<String, Value> {
        let Value::Object(config) = json else {
            panic!("not an object")
        };
        config
    }

    #[test]
    fn labels_are_counted_as_transformers_counts_them() {
        assert_eq!(count(&config(json!({}))), 2);
        assert_eq!(count(&config(json!({"num_labels": 7}))), 7);
        let names = json!({"id2label": {"0": "a", "1": "b", "2": "c"}});
        assert_eq!(count(&config(names)), 3);
    }

    #[test]
    fn a_number_of_labels_that_is_written_out_is_corrected_too() {
        let mut config = config(json!({"num_labels": 2, "label2id": {"a": 0, "b": 1}}));
        set_labels(&mut config, 3);
        assert_eq!(config["num_labels"], 3);
        assert_eq!(
            config["label2id"],
            json!({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
        );
        assert_eq!(config["id2label"]["2"], "LABEL_2");
    }

    #[test]
    fn only_a_single_architecture_decides() {
        let of = |json| architecture(&config(json));
        assert_eq!(
            of(json!({"architectures": ["Dinov2Model"]})).as_deref(),
            Some("Dinov2Model")
        );
        assert_eq!(of(json!({"architectures": ["A", "B"]})), None);
        assert_eq!(of(json!({"architectures": null})), None);
        assert_eq!(of(json!({})), None);
    }
}
