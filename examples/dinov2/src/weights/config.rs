//! `config.json`: which model a folder holds.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::WeightsError;
use crate::model::Dinov2Config;

/// The two families of DINOv2 in `transformers`, which differ in their names and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Plain,
    Registers,
}

impl Family {
    /// The name that `transformers` gives the model under a head, with its dot: the start of its tensors' names.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Plain => "dinov2.",
            Self::Registers => "dinov2_with_registers.",
        }
    }

    /// The class of `transformers` for a model with a head.
    pub(super) fn classifier(self) -> &'static str {
        match self {
            Self::Plain => "Dinov2ForImageClassification",
            Self::Registers => "Dinov2WithRegistersForImageClassification",
        }
    }

    fn patch_size(self) -> usize {
        match self {
            Self::Plain => 14,
            Self::Registers => 16,
        }
    }
}

/// What a `config.json` says.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) config: Dinov2Config,
    pub(super) family: Family,
    /// The names of the classes in the order of the head's outputs, if the file describes a classifier.
    pub(super) labels: Option<Vec<String>>,
    /// Whether the weights have a mask token. Only pre-training uses it.
    pub(super) has_mask_token: bool,
    /// Settings that `transformers` would apply in training, and this program does not.
    pub(super) notes: Vec<String>,
    /// The file as it is.
    pub(super) json: Map<String, Value>,
}

impl Settings {
    /// Understands the text of a `config.json`; `path` is for messages.
    ///
    /// A setting that is left out has the default of `transformers` for its family.
    pub(super) fn parse(text: &[u8], path: &Path) -> Result<Self, WeightsError> {
        let json = object(text, path)?;
        let reader = Reader { json: &json, path };
        let family = reader.family()?;
        reader.refuse_unsupported()?;
        let patch_size = reader.square("patch_size", family.patch_size())?;
        let image_size = reader.square("image_size", 224)?;
        if image_size < patch_size {
            return Err(reader.refused("image_size", "it cannot be smaller than patch_size"));
        }
        let hidden_size = reader.size("hidden_size", 768)?;
        let heads = reader.size("num_attention_heads", 12)?;
        if !hidden_size.is_multiple_of(heads) {
            let expected = format!("it must divide hidden_size, {hidden_size}");
            return Err(reader.refused("num_attention_heads", &expected));
        }
        let labels = reader.labels()?;
        let config = Dinov2Config::new(hidden_size, heads, reader.size("num_hidden_layers", 12)?)
            .with_patch_size(patch_size)
            // As `transformers` does: pixels that do not fill a patch are left out.
            .with_image_size(image_size / patch_size * patch_size)
            .with_num_channels(reader.size("num_channels", 3)?)
            .with_mlp_ratio(reader.size("mlp_ratio", 4)?)
            .with_use_swiglu_ffn(reader.flag("use_swiglu_ffn", false)?)
            .with_num_register_tokens(match family {
                Family::Plain => 0,
                Family::Registers => reader.size("num_register_tokens", 4)?,
            })
            .with_layerscale_value(reader.number("layerscale_value", 1.0)?)
            .with_layer_norm_eps(reader.number("layer_norm_eps", 1e-6)?)
            .with_num_labels(labels.as_ref().map_or(2, Vec::len));
        Ok(Self {
            config,
            family,
            labels,
            has_mask_token: reader.flag("use_mask_token", true)?,
            notes: reader.notes()?,
            json,
        })
    }
}

/// A JSON object; `path` is for messages.
pub(super) fn object(text: &[u8], path: &Path) -> Result<Map<String, Value>, WeightsError> {
    serde_json::from_slice(text).map_err(|source| WeightsError::Json {
        path: path.to_path_buf(),
        expected: "a JSON object",
        reason: source.to_string(),
    })
}

/// A setting whose value is refused.
pub(super) fn refused(
    path: &Path,
    json: &Map<String, Value>,
    setting: &str,
    expected: &str,
) -> WeightsError {
    WeightsError::Setting {
        path: path.to_path_buf(),
        setting: setting.to_string(),
        found: match json.get(setting) {
            Some(value) => value.to_string(),
            None => "missing".to_string(),
        },
        expected: expected.to_string(),
    }
}

/// Reads settings by name. JSON's `null` means the default, as in Python.
struct Reader<'a> {
    json: &'a Map<String, Value>,
    path: &'a Path,
}

impl Reader<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.json.get(name).filter(|value| !value.is_null())
    }

    fn refused(&self, setting: &str, expected: &str) -> WeightsError {
        refused(self.path, self.json, setting, expected)
    }

    /// A whole number above zero.
    fn size(&self, name: &str, default: usize) -> Result<usize, WeightsError> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => {
                whole(value).ok_or_else(|| self.refused(name, "a whole number above 0 is needed"))
            }
        }
    }

    /// The side of a square, given as one number or as two.
    fn square(&self, name: &str, default: usize) -> Result<usize, WeightsError> {
        let Some(Value::Array(sides)) = self.get(name) else {
            return self.size(name, default);
        };
        match sides.as_slice() {
            [height, width] if height == width => whole(height),
            _ => None,
        }
        .ok_or_else(|| self.refused(name, "only squares are supported"))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64, WeightsError> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .ok_or_else(|| self.refused(name, "a number is needed")),
        }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, WeightsError> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.refused(name, "true or false is needed")),
        }
    }

    fn family(&self) -> Result<Family, WeightsError> {
        match self.get("model_type").and_then(Value::as_str) {
            Some("dinov2") => Ok(Family::Plain),
            Some("dinov2_with_registers") => Ok(Family::Registers),
            Some(found) => Err(WeightsError::Architecture {
                path: PathBuf::from(self.path),
                found: found.to_string(),
            }),
            None => Err(self.refused(
                "model_type",
                "`dinov2` or `dinov2_with_registers` is needed",
            )),
        }
    }

    /// Refuses what would change the outputs of the model and is not computed here.
    fn refuse_unsupported(&self) -> Result<(), WeightsError> {
        let is_gated = self.flag("use_swiglu_ffn", false)?;
        let activation = self.get("hidden_act").and_then(Value::as_str);
        // With SwiGLU, `transformers` ignores this setting.
        if !is_gated && !matches!(activation, None | Some("gelu")) {
            return Err(self.refused("hidden_act", "only \"gelu\" is supported"));
        }
        if !self.flag("qkv_bias", true)? {
            return Err(self.refused("qkv_bias", "only models with these biases are supported"));
        }
        if self.get("quantization_config").is_some() {
            let expected = "only plain weights are supported; dequantize the model in Python first";
            return Err(self.refused("quantization_config", expected));
        }
        if let Some(head) = self.get("head_dim") {
            let width = self.size("hidden_size", 768)?;
            let heads = self.size("num_attention_heads", 12)?;
            if whole(head).and_then(|head| head.checked_mul(heads)) != Some(width) {
                let expected = "only hidden_size / num_attention_heads is supported";
                return Err(self.refused("head_dim", expected));
            }
        }
        Ok(())
    }

    /// The names of the classes, if the file describes a classifier.
    fn labels(&self) -> Result<Option<Vec<String>>, WeightsError> {
        let architectures = self.get("architectures").and_then(Value::as_array);
        let is_classifier = architectures.map(|names| {
            let mut names = names.iter().filter_map(Value::as_str);
            names.any(|name| name.ends_with("ForImageClassification"))
        });
        let given = self.get("id2label");
        match (is_classifier, given) {
            (Some(false), _) | (None, None) => Ok(None),
            (_, Some(given)) => match ordered(given) {
                Some(labels) => Ok(Some(labels)),
                None => Err(self.refused("id2label", "a name for each of 0, 1, 2, … is needed")),
            },
            // `transformers` leaves names out that are those it would give.
            (Some(true), None) => Ok(Some(numbered(self.size("num_labels", 2)?))),
        }
    }

    fn notes(&self) -> Result<Vec<String>, WeightsError> {
        let names = [
            "drop_path_rate",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
        ];
        let mut notes = Vec::new();
        for name in names {
            let value = self.number(name, 0.0)?;
            if value != 0.0 {
                notes.push(format!(
                    "{name} {value} of config.json is not applied in training; predictions do not depend on it"
                ));
            }
        }
        Ok(notes)
    }
}

/// The names that `transformers` gives to classes without a name.
pub(super) fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("LABEL_{index}")).collect()
}

/// A whole number above zero, also where Python wrote it with a decimal point.
fn whole(value: &Value) -> Option<usize> {
    let number = match value.as_u64() {
        Some(number) => number,
        None => value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && (0.0..1e9).contains(number))?
            as u64,
    };
    usize::try_from(number).ok().filter(|number| *number > 0)
}

/// The names of an `id2label` by their numbers, which must be 0, 1, 2 and so on.
fn ordered(id2label: &Value) -> Option<Vec<String>> {
    let names = id2label.as_object()?;
    (0..names.len())
        .map(|index| Some(names.get(&index.to_string())?.as_str()?.to_string()))
        .collect::<Option<Vec<_>>>()
        .filter(|labels| !labels.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(json: Value) -> Result<Settings, String> {
        Settings::parse(json.to_string().as_bytes(), Path::new("config.json"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn settings_that_are_left_out_have_the_defaults_of_transformers() {
        let plain = parse(json!({"model_type": "dinov2"})).unwrap().config;
        let registers = parse(json!({"model_type": "dinov2_with_registers", "patch_size": null}));
        let registers = registers.unwrap().config;

        let sizes = |config: &Dinov2Config| {
            let Dinov2Config {
                hidden_size,
                num_hidden_layers,
                image_size,
                patch_size,
                num_register_tokens,
                ..
            } = config;
            [
                *hidden_size,
                *num_hidden_layers,
                *image_size,
                *patch_size,
                *num_register_tokens,
            ]
        };
        assert_eq!(sizes(&plain), [768, 12, 224, 14, 0]);
        assert_eq!(sizes(&registers), [768, 12, 224, 16, 4]);
    }

    #[test]
    fn numbers_may_be_written_as_python_writes_them() {
        let settings = parse(json!({
            "model_type": "dinov2", "mlp_ratio": 2.0, "image_size": [30, 30], "patch_size": [4, 4],
        }));
        let config = settings.unwrap().config;
        assert_eq!((config.mlp_ratio, config.patch_size), (2, 4));
        // Seven patches of four pixels; the last two pixels belong to none.
        assert_eq!(config.image_size, 28);
    }

    #[test]
    fn settings_that_change_the_outputs_and_are_not_computed_are_refused_by_name() {
        for (setting, value) in [
            ("hidden_act", json!("relu")),
            ("qkv_bias", json!(false)),
            ("quantization_config", json!({"bits": 4})),
            ("head_dim", json!(32)),
            ("num_attention_heads", json!(7)),
            ("mlp_ratio", json!(2.5)),
            ("image_size", json!([224, 112])),
            ("image_size", json!(8)),
            ("hidden_size", json!("768")),
            ("hidden_size", json!(0)),
            ("layer_norm_eps", json!("small")),
            ("use_swiglu_ffn", json!("no")),
            ("id2label", json!({"1": "cat", "2": "dog"})),
        ] {
            let error = parse(json!({"model_type": "dinov2", setting: value.clone()})).unwrap_err();
            let start = format!("config.json: {setting} is {value}, but ");
            assert!(error.starts_with(&start), "{error}");
        }
        let registers = json!({"model_type": "dinov2_with_registers", "num_register_tokens": 0});
        assert!(
            parse(registers)
                .unwrap_err()
                .contains("num_register_tokens is 0")
        );
    }

    #[test]
    fn an_activation_that_swiglu_does_not_use_is_no_reason_to_refuse() {
        let json = json!({"model_type": "dinov2", "use_swiglu_ffn": true, "hidden_act": "silu"});
        assert!(parse(json).unwrap().config.use_swiglu_ffn);
    }

    #[test]
    fn dropout_of_training_is_noted_and_not_refused() {
        let settings = parse(json!({"model_type": "dinov2", "drop_path_rate": 0.1})).unwrap();
        assert_eq!(settings.notes.len(), 1);
        assert!(settings.notes[0].starts_with("drop_path_rate 0.1"));
    }

    #[test]
    fn another_architecture_is_named() {
        let error = parse(json!({"model_type": "vit"})).unwrap_err();
        assert!(
            error.contains("`vit`") && error.contains("`dinov2`"),
            "{error}"
        );
        assert!(
            parse(json!({}))
                .unwrap_err()
                .contains("model_type is missing")
        );
        assert!(parse(json!([])).unwrap_err().contains("not a JSON object"));
    }

    #[test]
    fn only_a_classifier_has_labels() {
        let labels = |architecture: &str, id2label: Value| {
            let json = json!({
                "model_type": "dinov2", "architectures": [architecture], "id2label": id2label,
            });
            parse(json).unwrap().labels
        };
        let names = json!({"10": "k", "0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f",
            "6": "g", "7": "h", "8": "i", "9": "j"});
        let classifier = "Dinov2ForImageClassification";
        let found = labels(classifier, names.clone()).unwrap();
        assert_eq!(found.concat(), "abcdefghijk");
        assert_eq!(labels("Dinov2Model", names), None);
        assert_eq!(
            labels(classifier, Value::Null).unwrap(),
            ["LABEL_0", "LABEL_1"]
        );
    }
}
