//! [`KeyMap`]: the names of one model in Python and in Rust.

use std::ops::Range;

use fancy_regex::Regex;

/// Why a [`KeyMap`] is refused, or has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyMapError {
    /// A pattern that does not compile.
    #[error("the key pattern `{pattern}` cannot be used: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// Why it is refused.
        reason: String,
    },
    /// A pattern without an answer for a path.
    #[error("the key pattern `{pattern}` has no answer for `{path}`: {reason}")]
    Undecided {
        /// The pattern as given.
        pattern: String,
        /// The module's path.
        path: String,
        /// Why there is none, such as a search that backtracks without end.
        reason: String,
    },
    /// Two modules would get the same name.
    #[error("the key map gives `{first}` and `{second}` the same name, `{name}`")]
    Collision {
        /// The first path.
        first: String,
        /// The second path.
        second: String,
        /// The name of both.
        name: String,
    },
    /// A module would be written under a name that is read as another one.
    #[error("the key map writes `{path}` as `{written}`, and reads that as `{read}`")]
    OneWay {
        /// The path in the model.
        path: String,
        /// Its name in the file.
        written: String,
        /// What that name is read as.
        read: String,
    },
}

/// The generation of transformers whose module names a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transformers {
    /// Transformers 4.
    V4,
    /// Transformers 5.
    V5,
}

/// How the module paths of a file become those of a model, and back.
///
/// Patterns are regular expressions that are searched for in the dotted path of a module, without PEFT's
/// prefix and without the name of the tensor; `$1` and `${name}` in a replacement are groups. Patterns of a
/// direction apply one after the other.
///
/// # Examples
///
/// ```
/// use burn_boft::KeyMap;
///
/// // The file says `transformer.h.0.attn`, the model `blocks.0.attention`.
/// let names = KeyMap::new()
///     .with_to_model(r"^transformer\.h\.(\d+)\.attn\b", "blocks.$1.attention")?
///     .with_to_file(r"^blocks\.(\d+)\.attention\b", "transformer.h.$1.attn")?;
/// # drop(names);
/// # Ok::<(), burn_boft::value::KeyMapError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct KeyMap {
    /// Names that files of a known model may have, to those of the model.
    known: Vec<(Regex, String)>,
    /// Patterns for paths of the file, and their replacements.
    to_model: Vec<(Regex, String)>,
    /// Patterns for paths of the model, and their replacements.
    to_file: Vec<(Regex, String)>,
    /// Other names that a file may have for a path of the model.
    aliases: Vec<(Regex, String)>,
    /// Layers that the file has in parts.
    fused: Vec<Fused>,
    /// Starts of paths that are there or not, depending on what is around the model.
    prefixes: Vec<String>,
}

/// Where a module may be, by [`KeyMap::places`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The path of the module that it is, or is a part of.
    pub module: String,
    /// Which part, of how many equal shares of the output: `(0, 1)` is the whole.
    pub part: (usize, usize),
}

impl Place {
    /// Which of the outputs of the module are meant, of `d_output` in all. None where they do not split evenly.
    ///
    /// ```
    /// use burn_boft::value::Place;
    ///
    /// let second_half = Place { module: "mlp.weights_in".into(), part: (1, 2) };
    /// assert_eq!(second_half.rows(20), Some(10..20));
    /// assert_eq!(second_half.rows(21), None);
    /// ```
    pub fn rows(&self, d_output: usize) -> Option<Range<usize>> {
        let (index, count) = self.part;
        let each = d_output.checked_div(count)?;
        (each * count == d_output).then(|| index * each..(index + 1) * each)
    }
}

/// A layer of the model that is several layers in the file, halves of its output one after the other.
#[derive(Debug, Clone)]
struct Fused {
    /// Ending of the path of the whole layer, in the file's naming.
    whole: String,
    /// Last components of the paths of the parts.
    parts: Vec<String>,
    /// Whether the parts are written, and not only read.
    written: bool,
}

/// A module of the file that is a part of one in the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Which part it is.
    pub(crate) index: usize,
    /// The paths of all parts in the file.
    pub(crate) parts: Vec<String>,
    /// The path that the whole has in the file's naming.
    pub(crate) whole: String,
}

impl KeyMap {
    /// The map that leaves every name as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// The names of DINOv2, of which transformers 5 renamed the layers while model files kept the old names.
    ///
    /// The model has the names of the files, which are those of transformers 4: `attention.attention.query`,
    /// `attention.output.dense`, `mlp.weights_in`, `mlp.weights_out`. Files of both generations load, and
    /// `version` says which one is written. Transformers 5 has `gate_proj` and `up_proj` for the two halves of
    /// the output of `weights_in`: an adapter of the fused layer is written as two with the same rotation, and
    /// two adapters load where their rotations are the same.
    pub fn dinov2(version: Transformers) -> Self {
        const NAMES: [(&str, &str); 5] = [
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.weights_out", "mlp.down_proj"),
        ];
        let rule = |from: &str, to: &str| {
            let pattern = format!(r"(^|\.){}$", from.replace('.', r"\."));
            let regex = Regex::new(&pattern).expect("names make valid patterns");
            (regex, format!("${{1}}{to}"))
        };
        let new_names = version == Transformers::V5;
        let aliases: Vec<_> = NAMES.iter().map(|(old, new)| rule(old, new)).collect();
        Self {
            known: NAMES.iter().map(|(old, new)| rule(new, old)).collect(),
            to_model: Vec::new(),
            prefixes: vec!["dinov2.".to_string()],
            to_file: match new_names {
                true => aliases.clone(),
                false => Vec::new(),
            },
            aliases,
            fused: vec![Fused {
                whole: "mlp.weights_in".into(),
                parts: vec!["gate_proj".into(), "up_proj".into()],
                written: new_names,
            }],
        }
    }

    /// Adds a pattern for paths of the file, applied when one is read.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Pattern`] where the pattern does not compile.
    pub fn with_to_model(
        mut self,
        pattern: &str,
        replacement: impl Into<String>,
    ) -> Result<Self, KeyMapError> {
        self.to_model.push((compile(pattern)?, replacement.into()));
        Ok(self)
    }

    /// Adds a pattern for paths of the model, applied when a file is written.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Pattern`] where the pattern does not compile.
    pub fn with_to_file(
        mut self,
        pattern: &str,
        replacement: impl Into<String>,
    ) -> Result<Self, KeyMapError> {
        self.to_file.push((compile(pattern)?, replacement.into()));
        Ok(self)
    }

    /// Adds a layer that the file has in parts.
    ///
    /// `whole` is how the path of the layer ends, as the file would name it, and `parts` are the names that its last
    /// component has there, in the order of their shares of the output.
    ///
    /// The parts have the same input, and so one rotation. An adapter of the file loads only where the rotations of all
    /// parts are the same; scales, biases and weights follow one another.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_boft::KeyMap;
    ///
    /// let names = KeyMap::new().with_fused("in_proj", ["gate_proj", "up_proj"]);
    /// assert_eq!(names.file_paths("layers.0.mlp.in_proj")?, ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]);
    /// // Names are compared between dots.
    /// assert_eq!(names.file_paths("layers.0.mlp.main_proj")?, ["layers.0.mlp.main_proj"]);
    /// # Ok::<(), burn_boft::value::KeyMapError>(())
    /// ```
    pub fn with_fused(
        mut self,
        whole: impl Into<String>,
        parts: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        self.fused.push(Fused {
            whole: whole.into(),
            parts: parts.into_iter().map(Into::into).collect(),
            written: true,
        });
        self
    }

    /// Adds a start of paths, with its dot, that may be there or not: transformers puts `dinov2.` before the names of a
    /// backbone that has a head.
    ///
    /// [`KeyMap::places`] looks for modules with it and without it; names that are read and written stay as they are.
    pub fn with_optional_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefixes.push(prefix.into());
        self
    }

    /// Where a module may be when it is not said whose naming is in use.
    ///
    /// The first place is the name that the patterns of [`KeyMap::with_to_model`] give it, its own name where there are
    /// none. Then come the names that a known model has for it, and all of them with or without the optional prefixes.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Undecided`] where a pattern has no answer.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_boft::{KeyMap, Transformers};
    ///
    /// let names = KeyMap::dinov2(Transformers::V5);
    /// let places = names.places("encoder.layer.0.mlp.up_proj")?;
    /// // The second half of a layer that older files have in one piece.
    /// assert_eq!(places[1].module, "encoder.layer.0.mlp.weights_in");
    /// assert_eq!(places[1].part, (1, 2));
    /// # Ok::<(), burn_boft::value::KeyMapError>(())
    /// ```
    pub fn places(&self, module: &str) -> Result<Vec<Place>, KeyMapError> {
        let place = |module: String, part| Place { module, part };
        let module = apply(&self.to_model, module)?;
        let mut places = vec![place(module.clone(), (0, 1))];
        for rules in [&self.known, &self.aliases] {
            let name = apply(rules, &module)?;
            if name != module {
                places.push(place(name, (0, 1)));
            }
        }
        if let Some(part) = self.part(&module) {
            let whole = apply(&self.known, &part.whole)?;
            places.push(place(whole, (part.index, part.parts.len())));
        }
        for prefix in &self.prefixes {
            let toggled = |path: &String| match path.strip_prefix(prefix) {
                Some(rest) => rest.to_string(),
                None => format!("{prefix}{path}"),
            };
            let others: Vec<_> = places
                .iter()
                .map(|Place { module, part }| place(toggled(module), *part))
                .collect();
            places.extend(others);
        }
        Ok(places)
    }

    /// The path in the model of a module of the file.
    ///
    /// A part of a fused layer keeps its name here; [`KeyMap::places`] finds the whole.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Undecided`] where a pattern has no answer.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_boft::{KeyMap, Transformers};
    ///
    /// // Both generations of the file lead to the one name that the model has.
    /// let names = KeyMap::dinov2(Transformers::V4);
    /// let query = "encoder.layer.0.attention.attention.query";
    /// assert_eq!(names.model_path("encoder.layer.0.attention.q_proj")?, query);
    /// assert_eq!(names.model_path(query)?, query);
    /// # Ok::<(), burn_boft::value::KeyMapError>(())
    /// ```
    pub fn model_path(&self, file: &str) -> Result<String, KeyMapError> {
        apply(&self.to_model, &apply(&self.known, file)?)
    }

    /// The module that a module of the file is a part of. None of a module that is whole, and of a part's name
    /// elsewhere in the model.
    pub(crate) fn part(&self, file: &str) -> Option<Part> {
        self.fused.iter().find_map(|fused| {
            let holder = holder(&fused.whole);
            let (front, name) = split(file);
            let index = fused.parts.iter().position(|part| part == name)?;
            let fits = match holder {
                "" => true,
                holder => ends_with(front, holder),
            };
            fits.then(|| Part {
                index,
                parts: fused.parts.iter().map(|part| join(front, part)).collect(),
                whole: join(front, split(&fused.whole).1),
            })
        })
    }

    /// The paths in the file of a module of the model: one, or those of its parts.
    ///
    /// # Errors
    ///
    /// [`KeyMapError::Undecided`] where a pattern has no answer, and [`KeyMapError::OneWay`] where the module would be
    /// read back under another name.
    pub fn file_paths(&self, model: &str) -> Result<Vec<String>, KeyMapError> {
        let path = apply(&self.to_file, model)?;
        let parts = self
            .fused
            .iter()
            .find(|fused| fused.written && ends_with(&path, &fused.whole))
            .map(|fused| {
                let (front, _) = split(&path);
                fused.parts.iter().map(|part| join(front, part)).collect()
            });
        let paths = parts.unwrap_or_else(|| vec![path]);
        for written in &paths {
            let whole = self.part(written).map(|part| part.whole);
            let read = self.model_path(whole.as_deref().unwrap_or(written))?;
            if read != model {
                return Err(KeyMapError::OneWay {
                    path: model.to_string(),
                    written: written.clone(),
                    read,
                });
            }
        }
        Ok(paths)
    }

    /// Every name that a module of the model may have in a file: what its targets may mean. Parts of a fused layer
    /// count whether they are written or only read.
    pub(crate) fn file_names(&self, model: &str) -> Result<Vec<String>, KeyMapError> {
        let path = apply(&self.to_file, model)?;
        let parts = self
            .fused
            .iter()
            .filter(|fused| ends_with(&path, &fused.whole))
            .flat_map(|fused| fused.parts.iter().map(|part| join(split(&path).0, part)));
        let mut names: Vec<_> = parts.collect();
        names.extend([apply(&self.aliases, model)?, path]);
        Ok(names)
    }

    /// Whether every name stays as it is.
    pub(crate) fn is_identity(&self) -> bool {
        let rules = [&self.known, &self.to_model, &self.to_file];
        rules.into_iter().all(Vec::is_empty) && self.fused.is_empty()
    }
}

/// Compiles a pattern.
///
/// # Errors
///
/// [`KeyMapError::Pattern`]: it is not valid.
fn compile(pattern: &str) -> Result<Regex, KeyMapError> {
    Regex::new(pattern).map_err(|error| KeyMapError::Pattern {
        pattern: pattern.to_string(),
        reason: crate::select::describe(&error),
    })
}

/// Applies patterns one after the other, each to what the one before made, and each as often as it is found.
///
/// # Errors
///
/// [`KeyMapError::Undecided`]: the search of a pattern cannot be finished.
fn apply(rules: &[(Regex, String)], path: &str) -> Result<String, KeyMapError> {
    let mut result = path.to_string();
    for (regex, replacement) in rules {
        let replaced = regex
            .try_replacen(&result, 0, replacement.as_str())
            .map_err(|error| KeyMapError::Undecided {
                pattern: regex.as_str().to_string(),
                path: path.to_string(),
                reason: error.to_string(),
            })?;
        result = replaced.into_owned();
    }
    Ok(result)
}

/// The path of what holds a module, and the module's name.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

fn holder(path: &str) -> &str {
    split(path).0
}

/// The path of a module, or of a tensor, by the path of what holds it. The root has the empty path.
pub fn join(front: &str, name: &str) -> String {
    match (front, name) {
        ("", name) => name.to_string(),
        (front, "") => front.to_string(),
        (front, name) => format!("{front}.{name}"),
    }
}

/// Whether a path ends with an ending, at a dot.
pub(crate) fn ends_with(path: &str, ending: &str) -> bool {
    path.strip_suffix(ending)
        .is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: &str = "dinov2.encoder.layer.3";

    fn path(ending: &str) -> String {
        format!("{LAYER}.{ending}")
    }

    #[test]
    fn dinov2_reads_the_names_of_both_generations() {
        for version in [Transformers::V4, Transformers::V5] {
            let names = KeyMap::dinov2(version);
            for (new, old) in [
                ("attention.q_proj", "attention.attention.query"),
                ("attention.k_proj", "attention.attention.key"),
                ("attention.v_proj", "attention.attention.value"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.down_proj", "mlp.weights_out"),
                ("mlp.fc1", "mlp.fc1"),
            ] {
                assert_eq!(names.model_path(&path(new)).unwrap(), path(old));
                assert_eq!(names.model_path(&path(old)).unwrap(), path(old));
                let written = match version {
                    Transformers::V4 => old,
                    Transformers::V5 => new,
                };
                assert_eq!(names.file_paths(&path(old)).unwrap(), [path(written)]);
            }
            assert_eq!(names.model_path("classifier").unwrap(), "classifier");
        }
    }

    #[test]
    fn dinov2_has_the_fused_layer_in_two_parts_since_transformers_5() {
        let whole = path("mlp.weights_in");
        let parts = [path("mlp.gate_proj"), path("mlp.up_proj")];
        let (v4, v5) = (
            KeyMap::dinov2(Transformers::V4),
            KeyMap::dinov2(Transformers::V5),
        );
        assert_eq!(v4.file_paths(&whole).unwrap(), std::slice::from_ref(&whole));
        assert_eq!(v5.file_paths(&whole).unwrap(), parts);
        for names in [v4, v5] {
            for (index, file) in parts.iter().enumerate() {
                let part = names.part(file).unwrap();
                assert_eq!((part.index, &part.whole), (index, &whole));
                assert_eq!(part.parts, parts);
            }
            assert_eq!(names.part("gate_proj"), None, "of no mlp");
            assert_eq!(names.part(&path("mlp.gate_project")), None);
            assert_eq!(names.part(&whole), None);
        }
    }

    #[test]
    fn a_module_is_looked_for_under_all_its_names() {
        let names = KeyMap::dinov2(Transformers::V5);
        let place = |ending: &str, part| Place {
            module: path(ending),
            part,
        };
        let whole = |ending: &str| place(ending, (0, 1));
        for (ending, expected) in [
            (
                "attention.q_proj",
                vec![
                    whole("attention.q_proj"),
                    whole("attention.attention.query"),
                ],
            ),
            (
                "mlp.weights_out",
                vec![whole("mlp.weights_out"), whole("mlp.down_proj")],
            ),
            (
                "mlp.up_proj",
                vec![whole("mlp.up_proj"), place("mlp.weights_in", (1, 2))],
            ),
            ("mlp.weights_in", vec![whole("mlp.weights_in")]),
        ] {
            let places = names.places(&path(ending)).unwrap();
            let (places, others) = places.split_at(expected.len());
            assert_eq!(places, expected);
            // And all of them without the prefix.
            for (place, other) in places.iter().zip(others) {
                assert_eq!(place.module, format!("dinov2.{}", other.module));
                assert_eq!(place.part, other.part);
            }
            assert_eq!(others.len(), expected.len());
        }
        let names = names.with_to_model("^model\\.", "").unwrap();
        let places = names.places("model.encoder.attention.q_proj").unwrap();
        let modules: Vec<_> = places.iter().map(|place| place.module.as_str()).collect();
        let expected = [
            "encoder.attention.q_proj",
            "encoder.attention.attention.query",
            "dinov2.encoder.attention.q_proj",
            "dinov2.encoder.attention.attention.query",
        ];
        assert_eq!(modules, expected);
    }

    #[test]
    fn patterns_of_a_direction_apply_one_after_the_other() {
        let names = KeyMap::new()
            .with_to_model(r"^h\.(\d+)", "blocks.$1")
            .unwrap()
            .with_to_model(r"blocks\.(?=1\b)", "first.")
            .unwrap();
        assert_eq!(names.model_path("h.1.up").unwrap(), "first.1.up");
        assert_eq!(names.model_path("h.12.up").unwrap(), "blocks.12.up");
        assert!(!names.is_identity() && KeyMap::new().is_identity());
    }

    #[test]
    fn what_would_not_be_read_back_is_not_written() {
        let names = KeyMap::new().with_to_file("^fc1$", "up").unwrap();
        let error = names.file_paths("fc1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the key map writes `fc1` as `up`, and reads that as `up`"
        );
        assert_eq!(names.file_paths("fc2").unwrap(), ["fc2"]);
    }

    #[test]
    fn a_bad_pattern_is_refused_in_one_line() {
        let error = KeyMap::new().with_to_model("(a", "b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the key pattern `(a` cannot be used: Parsing error at position 2: Opening parenthesis \
             without closing parenthesis"
        );
    }

    #[test]
    fn a_pattern_that_searches_without_end_has_no_answer() {
        let names = KeyMap::new().with_to_model(r"(a+)+\1b", "c").unwrap();
        let path = format!("{}c", "a".repeat(40));
        let error = names.model_path(&path).unwrap_err().to_string();
        assert!(
            error.contains(&path) && error.contains("backtrack"),
            "{error}"
        );
    }
}
