//! The names of an adapter's modules in a model's file.

use std::cell::Cell;

use burn_boft::value::Place;
use burn_boft::{KeyMap, Transformers};

use crate::attention::{self, key};
use crate::base::Base;
use crate::error::Error;
use crate::families;
use crate::tie::Head;

/// The type of models whose rules are also used where an adapter is read.
const DINOV2: &str = "dinov2";
/// The rule that turns off what the type of the model would choose.
const NONE: &str = "none";

/// The rules of `--map`, and those that the type of the model brings.
#[derive(Debug, Default)]
pub struct Names {
    own: KeyMap,
    family: Option<Family>,
    /// Whether the type of the model may choose the rules.
    fixed: bool,
}

/// The names that transformers 5 gives to the modules of a model.
#[derive(Debug)]
struct Family {
    model_type: &'static str,
    names: KeyMap,
    /// How many tensors only these rules found.
    found: Cell<usize>,
}

impl Family {
    fn of(model_type: &str) -> Option<Self> {
        let names = families::rules(model_type)?;
        let model_type = families::types().find(|known| *known == model_type)?;
        Some(Self {
            model_type,
            names,
            found: Cell::new(0),
        })
    }
}

impl Names {
    /// Reads the rules: the type of a model, `none`, or `<regex>=<replacement>`, split at the last `=`.
    pub fn parse(rules: &[String]) -> Result<Self, Error> {
        let mut names = Self::default();
        if rules.iter().any(|rule| rule == DINOV2) {
            names.own = KeyMap::dinov2(Transformers::V5);
        }
        for rule in rules {
            let refuse = |reason: String| Error::Settings(format!("--map {rule}: {reason}"));
            let Some((pattern, replacement)) = rule.rsplit_once('=') else {
                names.fixed = true;
                if let Some(family) = Family::of(rule) {
                    names.family = Some(family);
                } else if rule != NONE {
                    let types: Vec<_> = families::types().collect();
                    return Err(refuse(format!(
                        "a rule is <regex>=<replacement>, `{NONE}`, or one of the model types {}",
                        types.join(", ")
                    )));
                }
                continue;
            };
            names.own = names
                .own
                .with_to_model(pattern, replacement)
                .map_err(|error| refuse(error.to_string()))?;
        }
        Ok(names)
    }

    /// Lets the type in the model's `config.json` choose the rules for names of transformers 5, unless `--map` did.
    pub fn for_model(mut self, head: &Head) -> Self {
        if !self.fixed {
            self.family = head.model_types().into_iter().find_map(Family::of);
        }
        self
    }

    /// The rules for reading an adapter whose names become the model's.
    pub fn into_key_map(self) -> KeyMap {
        self.own
    }

    /// The rules, for names that are read with them.
    pub fn key_map(&self) -> &KeyMap {
        &self.own
    }

    /// Where a module of the adapter is in the file: the first of its names that the file has a tensor for, or else
    /// the name that the rules give it. What the rules of `--map` find goes before what the type of the model finds.
    pub fn place(&self, module: &str, tensor: &str, base: &Base) -> Result<Place, Error> {
        let is_there = |place: &&Place| base.entry(&key(place, tensor)).is_some();
        let places = places(&self.own, module)?;
        if let Some(found) = places.iter().find(is_there) {
            return Ok(found.clone());
        }
        if let Some(family) = &self.family
            && let Some(found) = self::places(&family.names, &places[0].module)?
                .iter()
                .find(is_there)
        {
            family.found.set(family.found.get() + 1);
            return Ok(found.clone());
        }
        let has = |key: &str| base.entry(key).is_some();
        let projection = attention::place(&places[0].module, tensor, has);
        Ok(projection.unwrap_or_else(|| places[0].clone()))
    }

    /// What is to be said of names that only the type of the model explains.
    pub fn note(&self) -> Option<String> {
        let family = self.family.as_ref()?;
        let (model_type, found) = (family.model_type, family.found.get());
        (found > 0 && !self.fixed).then(|| {
            format!(
                "note: the adapter has the names of transformers 5, and the file those of transformers 4: the rules for \
                 `{model_type}`, the type in config.json, found the tensors of {found} names; --map {NONE} turns them off"
            )
        })
    }
}

fn places(names: &KeyMap, module: &str) -> Result<Vec<Place>, Error> {
    let places = names.places(module);
    places.map_err(|error| Error::Settings(format!("--map: {error}")))
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
        let name = |module: &str| places(&names.own, module).unwrap()[0].module.clone();
        assert_eq!(name("model.h.3.fc"), "layers.3.mlp.fc");
        assert_eq!(name("model.x"), "model.x");
    }

    #[test]
    fn a_rule_that_is_malformed_is_refused() {
        let refused = |rule: &str| Names::parse(&[rule.to_string()]).unwrap_err().line();
        let line = refused("dino");
        let expected = "--map dino: a rule is <regex>=<replacement>, `none`, or one of the model types dinov2, ";
        assert!(line.starts_with(expected), "{line}");
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
            let names = Names::parse(&rules).unwrap();
            let places = places(&names.own, "backbone.mlp.up_proj");
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
        let line = places(&names.own, &path).unwrap_err().line();
        assert!(
            line.starts_with("--map: ") && line.contains(&path),
            "{line}"
        );
    }

    #[test]
    fn dinov2_is_found_under_both_names_with_and_without_its_prefix() {
        let names = Names::parse(&["dinov2".into()]).unwrap();
        let places = places(&names.own, "dinov2.encoder.layer.0.mlp.up_proj").unwrap();
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
