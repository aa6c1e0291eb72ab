//! The names of an adapter's modules in a model's file.

use burn_boft::value::Place;
use burn_boft::{KeyMap, Transformers};
use fancy_regex::Regex;

use crate::base::Base;
use crate::error::Error;

/// The name that stands for the rules of DINOv2.
const DINOV2: &str = "dinov2";
/// How transformers starts the names of a DINOv2 that has a head.
const DINOV2_PREFIX: &str = "dinov2.";

/// The rules of `--map`.
#[derive(Debug, Default)]
pub struct Names {
    rules: Vec<(Regex, String)>,
    dinov2: Option<KeyMap>,
}

impl Names {
    /// Reads the rules: `dinov2`, or `<regex>=<replacement>`, split at the last `=`.
    pub fn parse(rules: &[String]) -> Result<Self, Error> {
        let mut names = Self::default();
        for rule in rules {
            if rule == DINOV2 {
                names.dinov2 = Some(KeyMap::dinov2(Transformers::V5));
                continue;
            }
            let refuse = |reason: String| Error::Settings(format!("--map {rule}: {reason}"));
            let (pattern, replacement) = rule
                .rsplit_once('=')
                .ok_or_else(|| refuse("neither `dinov2` nor <regex>=<replacement>".into()))?;
            let regex = Regex::new(pattern).map_err(|error| refuse(error.to_string()))?;
            names.rules.push((regex, replacement.to_string()));
        }
        Ok(names)
    }

    /// The rules for reading an adapter whose names become the model's.
    pub fn to_key_map(&self) -> Result<KeyMap, Error> {
        let mut map = self.dinov2.clone().unwrap_or_default();
        for (regex, replacement) in &self.rules {
            map = map
                .with_to_model(regex.as_str(), replacement)
                .map_err(|error| Error::Settings(error.to_string()))?;
        }
        Ok(map)
    }

    /// Where a module of the adapter is in the file: the first of its names that the file has a tensor for, else
    /// the name that the rules give it.
    pub fn place(&self, module: &str, tensor: &str, base: &Base) -> Result<Place, Error> {
        let mapped = self.apply(module)?;
        let candidates = self.candidates(&mapped)?;
        let found = candidates
            .iter()
            .find(|place| base.entry(&join(&place.module, tensor)).is_some());
        Ok(found.unwrap_or(&candidates[0]).clone())
    }

    fn apply(&self, module: &str) -> Result<String, Error> {
        let mut name = module.to_string();
        for (regex, replacement) in &self.rules {
            let replaced = regex.try_replacen(&name, 0, replacement.as_str());
            name = replaced
                .map_err(|error| {
                    let pattern = regex.as_str();
                    Error::Settings(format!(
                        "--map {pattern} has no answer for `{module}`: {error}"
                    ))
                })?
                .into_owned();
        }
        Ok(name)
    }

    fn candidates(&self, module: &str) -> Result<Vec<Place>, Error> {
        let Some(dinov2) = &self.dinov2 else {
            let (module, part) = (module.to_string(), (0, 1));
            return Ok(vec![Place { module, part }]);
        };
        let mut places = dinov2
            .places(module)
            .map_err(|error| Error::Settings(error.to_string()))?;
        let others: Vec<_> = places
            .iter()
            .map(|Place { module, part }| {
                let module = match module.strip_prefix(DINOV2_PREFIX) {
                    Some(rest) => rest.to_string(),
                    None => format!("{DINOV2_PREFIX}{module}"),
                };
                Place {
                    module,
                    part: *part,
                }
            })
            .collect();
        places.extend(others);
        Ok(places)
    }
}

/// The key of a tensor of a module.
pub fn join(module: &str, tensor: &str) -> String {
    match module {
        "" => tensor.to_string(),
        module => format!("{module}.{tensor}"),
    }
}

/// Up to three keys that are written most like this one, for a message.
pub fn nearest(key: &str, base: &Base) -> String {
    const SHOWN: usize = 3;
    let (_, tensor) = key.rsplit_once('.').unwrap_or(("", key));
    let mut scored: Vec<_> = base
        .keys()
        .filter(|other| other.rsplit('.').next() == Some(tensor))
        .map(|other| (strsim::sorensen_dice(key, other), other))
        .filter(|(score, _)| *score > 0.0)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    let names: Vec<_> = scored
        .iter()
        .take(SHOWN)
        .map(|(_, key)| format!("`{key}`"))
        .collect();
    match names.is_empty() {
        true => String::new(),
        false => format!("; it has {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_apply_one_after_the_other() {
        let names =
            Names::parse(&["^model\\.(?=h)=".into(), "h\\.(\\d+)=layers.$1.mlp".into()]).unwrap();
        assert_eq!(names.apply("model.h.3.fc").unwrap(), "layers.3.mlp.fc");
        assert_eq!(names.apply("model.x").unwrap(), "model.x");
    }

    #[test]
    fn rules_that_are_none_are_refused() {
        let refused = |rule: &str| Names::parse(&[rule.to_string()]).unwrap_err().line();
        assert_eq!(
            refused("dino"),
            "--map dino: neither `dinov2` nor <regex>=<replacement>"
        );
        assert!(
            refused("(=x").starts_with("--map (=x: "),
            "{}",
            refused("(=x")
        );
    }

    #[test]
    fn dinov2_is_found_under_both_names_with_and_without_its_prefix() {
        let names = Names::parse(&["dinov2".into()]).unwrap();
        let candidates = names
            .candidates("dinov2.encoder.layer.0.mlp.up_proj")
            .unwrap();
        let expected = [
            ("dinov2.encoder.layer.0.mlp.up_proj", (0, 1)),
            ("dinov2.encoder.layer.0.mlp.weights_in", (1, 2)),
            ("encoder.layer.0.mlp.up_proj", (0, 1)),
            ("encoder.layer.0.mlp.weights_in", (1, 2)),
        ];
        let found: Vec<_> = candidates
            .iter()
            .map(|place| (place.module.as_str(), place.part))
            .collect();
        assert_eq!(found, expected);
    }
}
