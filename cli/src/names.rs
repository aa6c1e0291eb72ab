//! The names of an adapter's modules in a model's file.

use burn_boft::value::{Place, join};
use burn_boft::{KeyMap, Transformers};

use crate::base::Base;
use crate::error::Error;

/// The name that stands for the rules of DINOv2.
const DINOV2: &str = "dinov2";

/// The rules of `--map`.
#[derive(Debug, Default)]
pub struct Names(KeyMap);

impl Names {
    /// Reads the rules: `dinov2`, or `<regex>=<replacement>`, split at the last `=`.
    pub fn parse(rules: &[String]) -> Result<Self, Error> {
        let mut names = match rules.iter().any(|rule| rule == DINOV2) {
            true => KeyMap::dinov2(Transformers::V5),
            false => KeyMap::new(),
        };
        for rule in rules.iter().filter(|rule| *rule != DINOV2) {
            let refuse = |reason: String| Error::Settings(format!("--map {rule}: {reason}"));
            let (pattern, replacement) = rule
                .rsplit_once('=')
                .ok_or_else(|| refuse("a rule is `dinov2` or <regex>=<replacement>".into()))?;
            names = names
                .with_to_model(pattern, replacement)
                .map_err(|error| refuse(error.to_string()))?;
        }
        Ok(Self(names))
    }

    /// The rules for reading an adapter whose names become the model's.
    pub fn into_key_map(self) -> KeyMap {
        self.0
    }

    /// Where a module of the adapter is in the file: the first of its names that the file has a tensor for, or else
    /// the name that the rules give it.
    pub fn place(&self, module: &str, tensor: &str, base: &Base) -> Result<Place, Error> {
        let places = self.places(module)?;
        let found = places
            .iter()
            .find(|place| base.entry(&join(&place.module, tensor)).is_some());
        Ok(found.unwrap_or(&places[0]).clone())
    }

    fn places(&self, module: &str) -> Result<Vec<Place>, Error> {
        let places = self.0.places(module);
        places.map_err(|error| Error::Settings(format!("--map: {error}")))
    }
}

/// Up to three keys whose spelling is closest to this one, as the end of a message.
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
        let name = |module: &str| names.places(module).unwrap()[0].module.clone();
        assert_eq!(name("model.h.3.fc"), "layers.3.mlp.fc");
        assert_eq!(name("model.x"), "model.x");
    }

    #[test]
    fn a_rule_that_is_malformed_is_refused() {
        let refused = |rule: &str| Names::parse(&[rule.to_string()]).unwrap_err().line();
        assert_eq!(
            refused("dino"),
            "--map dino: a rule is `dinov2` or <regex>=<replacement>"
        );
        assert!(
            refused("(=x").starts_with("--map (=x: "),
            "{}",
            refused("(=x")
        );
    }

    #[test]
    fn the_rules_for_dinov2_come_after_the_other_rules_wherever_they_stand() {
        let rule = "^backbone=dinov2".to_string();
        for rules in [[rule.clone(), "dinov2".into()], ["dinov2".into(), rule]] {
            let places = Names::parse(&rules).unwrap().places("backbone.mlp.up_proj");
            let whole = Place {
                module: "dinov2.mlp.weights_in".into(),
                part: (1, 2),
            };
            assert!(places.unwrap().contains(&whole), "{rules:?}");
        }
    }

    #[test]
    fn a_rule_that_searches_without_end_is_reported_with_the_module() {
        let names = Names::parse(&[r"(a+)+\1b=c".into()]).unwrap();
        let path = format!("{}c", "a".repeat(40));
        let line = names.places(&path).unwrap_err().line();
        assert!(
            line.starts_with("--map: ") && line.contains(&path),
            "{line}"
        );
    }

    #[test]
    fn dinov2_is_found_under_both_names_with_and_without_its_prefix() {
        let names = Names::parse(&["dinov2".into()]).unwrap();
        let places = names.places("dinov2.encoder.layer.0.mlp.up_proj").unwrap();
        let expected = [
            ("dinov2.encoder.layer.0.mlp.up_proj", (0, 1)),
            ("dinov2.encoder.layer.0.mlp.weights_in", (1, 2)),
            ("encoder.layer.0.mlp.up_proj", (0, 1)),
            ("encoder.layer.0.mlp.weights_in", (1, 2)),
        ];
        let found: Vec<_> = places
            .iter()
            .map(|place| (place.module.as_str(), place.part))
            .collect();
        assert_eq!(found, expected);
    }
}
