//! Which layers, biases and modules of a model a configuration selects: PEFT's matching rules.
//!
//! A name selects the paths that are equal to it or end with it at a dot, so `query` selects `layer.0.query` and not
//! `layer.0.my_query`. A regular expression has to match a whole path. Only a layer that is selected and neither
//! excluded nor part of a module to save is a target. `layers_to_transform` restricts names further, by the index that
//! a path has after a list of layers.
//!
//! The settings are asked in this order, and the first answer counts:
//!
//! 1. `exclude_modules` selects the path: it is excluded.
//! 2. `modules_to_save` names the module or one that contains it: it is excluded, since it is trained as a whole.
//! 3. `target_modules` is `all-linear` or a regular expression: it decides alone, and `layers_to_transform` has no say.
//! 4. `target_modules` has the whole path as a name: it is a target, whatever the index of its layer.
//! 5. `target_modules` has an ending of the path as a name: it is a target if `layers_to_transform` has its layer.
//!
//! Reference: `check_target_module_exists` in PEFT 0.21's `src/peft/tuners/tuners_utils.py`. Up to PEFT 0.20 a
//! `layers_pattern` did not find a list that a path starts with, such as `layers` in `layers.0.query`.

use std::collections::{BTreeSet, HashSet};

use fancy_regex::{CompileError, Error, Regex};

use crate::config::{Bias, Selection, TargetModules};

/// The list of layers if `layers_pattern` is empty: any component of a path.
const ANY_LIST: &str = "[^.]*";

/// What the rules decide about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is adapted.
    Target,
    /// `exclude_modules` selects it, or it is part of a module in `modules_to_save`.
    Excluded,
    /// Nothing selects it.
    Unmatched,
}

/// A regular expression in the settings that cannot be used.
///
/// Expressions are in Python's syntax, since PEFT's files hold them. The few that Python's `re` and this crate would
/// read differently are refused.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::model::Misfit;
/// use burn_boft::{BoftConfig, PatternError, plan};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(64, 32).init(&device);
/// // Python reads two brackets as letters, and Rust's engines as a class in a class.
/// let config = BoftConfig::new().with_target_modules("layer[[0-3]");
/// let error = plan(&layer, config).unwrap_err();
/// let [Misfit::Pattern(PatternError::Invalid { setting, reason, .. })] = error.misfits() else {
///     panic!("{error}");
/// };
/// assert_eq!(*setting, "target_modules");
/// assert!(reason.ends_with("must be escaped in a character class"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// The pattern itself is not valid, or means something else in Python.
    #[error("{setting}: the pattern `{pattern}` cannot be used: {reason}")]
    Invalid {
        /// The setting that holds the pattern.
        setting: &'static str,
        /// The pattern as given.
        pattern: String,
        /// Why it is refused.
        reason: String,
    },
    /// The pattern is valid, but the search in one path cannot be finished.
    #[error("{setting}: the pattern `{pattern}` has no answer for `{path}`: {reason}")]
    Undecided {
        /// The setting that holds the pattern.
        setting: &'static str,
        /// The pattern as given.
        pattern: String,
        /// The dotted path of the layer.
        path: String,
        /// Why it cannot be finished, for example because it backtracks too often.
        reason: String,
    },
}

/// The matching rules of one configuration, compiled once and used for every layer.
#[derive(Debug)]
pub(crate) struct Selector {
    /// What `target_modules` selects.
    target: Modules,
    /// What `exclude_modules` selects.
    exclude: Modules,
    /// What `modules_to_save` names.
    saved: Saved,
    /// Which biases are trained.
    bias: Bias,
    /// The indices in `layers_to_transform`. An empty list restricts nothing.
    layers: Vec<usize>,
    /// The patterns of `layers_pattern`, or one that finds any list. The first that matches a path gives the index.
    lists: Vec<Pattern>,
}

impl Selector {
    /// Compiles the rules of `selection`.
    ///
    /// # Errors
    ///
    /// Every pattern that cannot be used, and not only the first. A `layers_pattern` without `layers_to_transform` is one
    /// of them.
    pub(crate) fn new(selection: &Selection) -> Result<Self, Vec<PatternError>> {
        let mut errors = Vec::new();
        let mut compile = |setting, modules: &Option<TargetModules>| {
            Modules::new(setting, modules.as_ref()).unwrap_or_else(|error| {
                errors.push(error);
                Modules::Names(Names::default())
            })
        };
        let target = compile("target_modules", &selection.target_modules);
        let exclude = compile("exclude_modules", &selection.exclude_modules);

        let (layers, names) = (&selection.layers_to_transform, &selection.layers_pattern);
        if layers.is_empty() && !names.is_empty() {
            errors.push(PatternError::Invalid {
                setting: "layers_pattern",
                pattern: names.join(", "),
                reason: "it selects nothing without layers_to_transform".to_string(),
            });
        }
        let any = names.is_empty().then_some(None);
        let named = names.iter().map(|name| Some(name.as_str()));
        let lists = any
            .into_iter()
            .chain(named)
            .filter_map(|name| Pattern::layer_list(name).map_err(|e| errors.push(e)).ok())
            .collect();

        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            target,
            exclude,
            saved: Saved::new(&selection.modules_to_save),
            bias: selection.bias,
            layers: layers.clone(),
            lists,
        })
    }

    /// What the rules decide about the layer at `path`, which is a linear layer or a convolution.
    ///
    /// `is_linear` matters for `all-linear` only. PEFT expands that to linear layers and leaves convolutions out. It
    /// also leaves out the output embedding of a language model, which Burn's modules do not mark: exclude it by name.
    ///
    /// # Errors
    ///
    /// [`PatternError::Undecided`] if the search of a pattern in this path cannot be finished.
    pub(crate) fn decide(&self, path: &str, is_linear: bool) -> Result<Decision, PatternError> {
        if self.exclude.contains(path, is_linear)? || self.saved.contains(path) {
            return Ok(Decision::Excluded);
        }
        // The index of the layer matters only for names that match by their ending. PEFT expands "all-linear" to
        // full names, and a regular expression can select layers itself.
        let by_ending = match &self.target {
            Modules::Names(names) => !names.all.contains(path),
            Modules::Regex(_) | Modules::AllLinear => false,
        };
        let targeted =
            self.target.contains(path, is_linear)? && (!by_ending || self.is_in_layers(path)?);
        Ok(if targeted {
            Decision::Target
        } else {
            Decision::Unmatched
        })
    }

    /// Whether a parameter is trained in addition to the adapters: a chosen bias, or a part of a module to save.
    ///
    /// `owner` is the path of the module that has the parameter, and `is_adapted` says whether that module carries an
    /// adapter.
    ///
    /// # References
    ///
    /// `_mark_only_adapters_as_trainable` in PEFT's `src/peft/tuners/tuners_utils.py` for the biases.
    pub(crate) fn trains(&self, owner: &str, is_bias: bool, is_adapted: bool) -> bool {
        let bias = is_bias
            && match self.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::AdapterOnly => is_adapted,
            };
        bias || self.saved.contains(owner)
    }

    /// Whether `modules_to_save` names the module at `path`, or a module that contains it.
    pub(crate) fn saves(&self, path: &str) -> bool {
        self.saved.contains(path)
    }

    /// The names in `target_modules` that select the module at `path`, whatever the index of its layer. The path itself
    /// comes first if it is one of them. A regular expression and `all-linear` have no names.
    pub(crate) fn names_of<'a>(&self, path: &'a str) -> impl Iterator<Item = &'a str> {
        let names = match &self.target {
            Modules::Names(names) => Some(names),
            Modules::Regex(_) | Modules::AllLinear => None,
        };
        names.into_iter().flat_map(|names| names.of(path))
    }

    /// Whether `layers_to_transform` has the index of the layer at `path`, or is empty.
    ///
    /// A path without an index is in no layer.
    ///
    /// # Errors
    ///
    /// [`PatternError::Undecided`]: a pattern has no answer, or no index in its answer.
    fn is_in_layers(&self, path: &str) -> Result<bool, PatternError> {
        if self.layers.is_empty() {
            return Ok(true);
        }
        for list in &self.lists {
            if let Some(index) = list.layer_index(path)? {
                return Ok(self.layers.contains(&index));
            }
        }
        Ok(false)
    }
}

/// The endings of a path at its dots that have at most so many components, the longest first: of two components, `b.c` and
/// `c` of `a.b.c`.
pub(crate) fn endings(path: &str, longest: usize) -> impl Iterator<Item = &str> {
    let dots = path.rmatch_indices('.').map(|(dot, _)| dot + 1);
    let starts: Vec<_> = dots.chain([0]).take(longest).collect();
    starts.into_iter().rev().map(|start| &path[start..])
}

/// How many components the longest of these names has.
pub(crate) fn longest<'a>(names: impl IntoIterator<Item = &'a String>) -> usize {
    let components = names.into_iter().map(|name| name.split('.').count());
    components.max().unwrap_or(0)
}

/// Names of modules: full paths, or their endings at a dot.
#[derive(Debug, Default)]
struct Names {
    all: HashSet<String>,
    /// How many components the longest of them has. Longer endings of a path are none of them.
    longest: usize,
}

impl Names {
    fn new(names: &[String]) -> Self {
        Self {
            all: names.iter().cloned().collect(),
            longest: longest(names),
        }
    }

    /// The names that select the module at `path`, the longest first.
    fn of<'a>(&self, path: &'a str) -> impl Iterator<Item = &'a str> {
        endings(path, self.longest).filter(|ending| self.all.contains(*ending))
    }
}

/// The entries of `modules_to_save`, indexed for many lookups by the rule of [`Selection::saves`].
///
/// Entries are compared letter by letter. PEFT pastes them into a regular expression, where the dot of `head.dense`
/// would match any letter.
#[derive(Debug)]
pub(crate) struct Saved(Names);

impl Saved {
    pub(crate) fn new(names: &[String]) -> Self {
        Self(Names::new(names))
    }

    /// Whether an entry is the module at `path`, or a module that contains it.
    ///
    /// It looks up every run of components of the path that is not longer than the longest entry.
    pub(crate) fn contains(&self, path: &str) -> bool {
        self.of(path).next().is_some()
    }

    /// The entries that are the module at `path`, or a module that contains it.
    pub(crate) fn of<'a>(&self, path: &'a str) -> impl Iterator<Item = &'a str> {
        let Self(Names { all, longest }) = self;
        let starts = path.match_indices('.').map(|(dot, _)| dot + 1);
        let rests = [0].into_iter().chain(starts).map(|start| &path[start..]);
        let runs = rests.filter(|_| *longest > 0).flat_map(|rest| {
            let dots = rest.match_indices('.').map(|(dot, _)| dot);
            let ends = dots.chain([rest.len()]).take(*longest);
            ends.map(move |end| &rest[..end])
        });
        runs.filter(|run| all.contains(*run))
    }
}

/// The entries of `modules_to_save`, indexed for many lookups by PEFT's rule for what it saves: endings of paths, without regard
/// to dots. Its `head` also saves `lm_head`.
///
/// # References
///
/// `_set_trainable` in `src/peft/utils/other.py`.
#[derive(Debug)]
pub(crate) struct SavedByPeft {
    names: HashSet<String>,
    /// The lengths of the names.
    lengths: BTreeSet<usize>,
}

impl SavedByPeft {
    pub(crate) fn new(names: &[String]) -> Self {
        Self {
            names: names.iter().cloned().collect(),
            lengths: names.iter().map(String::len).collect(),
        }
    }

    /// The shortest entry that the path ends with.
    pub(crate) fn of<'a>(&self, path: &'a str) -> Option<&'a str> {
        let lengths = self.lengths.range(..=path.len());
        let mut endings = lengths.filter_map(|length| path.get(path.len() - length..));
        endings.find(|ending| self.names.contains(*ending))
    }
}

/// A [`TargetModules`], compiled.
#[derive(Debug)]
enum Modules {
    /// Full paths, or their endings at a dot.
    Names(Names),
    /// An expression that must match the whole path.
    Regex(Pattern),
    AllLinear,
}

impl Modules {
    /// Compiles the value of a setting, whose name is for messages. No value selects nothing.
    fn new(setting: &'static str, modules: Option<&TargetModules>) -> Result<Self, PatternError> {
        Ok(match modules {
            None => Self::Names(Names::default()),
            Some(TargetModules::Names(names)) => Self::Names(Names::new(names)),
            Some(TargetModules::Regex(pattern)) => Self::Regex(Pattern::full(setting, pattern)?),
            Some(TargetModules::AllLinear) => Self::AllLinear,
        })
    }

    /// Whether it selects the layer at `path`.
    ///
    /// # Errors
    ///
    /// [`PatternError::Undecided`]: the search of the expression in this path cannot be finished.
    fn contains(&self, path: &str, is_linear: bool) -> Result<bool, PatternError> {
        match self {
            Self::Names(names) => Ok(names.of(path).next().is_some()),
            Self::Regex(pattern) => pattern.is_match(path),
            Self::AllLinear => Ok(is_linear),
        }
    }
}

/// A regular expression in Python's syntax, with the setting and the source for its error messages.
#[derive(Debug)]
struct Pattern {
    /// The setting that the pattern is from.
    setting: &'static str,
    /// The pattern as given.
    source: String,
    /// The pattern as it is searched for, with what the rules put around it.
    regex: Regex,
}

impl Pattern {
    /// A pattern that has to match a whole path, as Python's `fullmatch` does.
    ///
    /// The group around it keeps a bare `|` of the pattern inside.
    fn full(setting: &'static str, source: &str) -> Result<Self, PatternError> {
        Self::new(setting, source, &format!(r"\A(?:{source})\z"))
    }

    /// A pattern for a list of layers, which is followed by the index of the layer, as in PEFT's `match`.
    ///
    /// At least one component must come after the index, so the pattern finds the layer of modules in a list and never
    /// that of the list's elements themselves. A list that is named may stand at the start of the path; without a name,
    /// something must come before it. The index has a name, so that groups of the pattern's own do not take its place.
    fn layer_list(source: Option<&str>) -> Result<Self, PatternError> {
        // The start is lazy. A greedy one would find the index of the expert in `layers.1.experts.0`.
        let (source, regex) = match source {
            Some(source) => (
                source,
                format!(r"\A(?:(?:^|.*?\.){source}\.(?P<idx>\d+)\.)"),
            ),
            None => (ANY_LIST, format!(r"\A(?:.*?\.{ANY_LIST}\.(?P<idx>\d+)\.)")),
        };
        Self::new("layers_pattern", source, &regex)
    }

    /// Compiles `regex`, which contains `source`.
    ///
    /// # Errors
    ///
    /// [`PatternError::Invalid`]: `source` is not valid by itself, or would mean something else in Python.
    fn new(setting: &'static str, source: &str, regex: &str) -> Result<Self, PatternError> {
        let invalid = |reason| PatternError::Invalid {
            setting,
            pattern: source.to_string(),
            reason,
        };
        if let Some(reason) = misread(source) {
            return Err(invalid(reason.to_string()));
        }
        // It has to compile by itself first, because `a)(b` would compile between the parentheses of `regex`.
        let regex = Regex::new(source).and_then(|_| Regex::new(regex));
        let regex = regex.map_err(|error| invalid(describe(&error)))?;
        Ok(Self {
            setting,
            source: source.to_string(),
            regex,
        })
    }

    fn is_match(&self, path: &str) -> Result<bool, PatternError> {
        self.regex
            .is_match(path)
            .map_err(|error| self.undecided(path, error))
    }

    /// The index that follows the list of layers in `path`. None where the path has no such list.
    ///
    /// `001` is 1, as Python's `int` has it.
    fn layer_index(&self, path: &str) -> Result<Option<usize>, PatternError> {
        let found = self
            .regex
            .captures(path)
            .map_err(|error| self.undecided(path, error))?;
        let Some(groups) = found else { return Ok(None) };
        // The source is pasted into a larger expression, so with a bare `|` in it, a match may have no index. PEFT then
        // passes over the layer.
        match groups
            .name("idx")
            .and_then(|group| group.as_str().parse().ok())
        {
            Some(index) => Ok(Some(index)),
            None => Err(self.undecided(path, "it matches without the index of a layer")),
        }
    }

    /// The error for a path that the pattern has no answer for.
    fn undecided(&self, path: &str, reason: impl ToString) -> PatternError {
        PatternError::Undecided {
            setting: self.setting,
            pattern: self.source.clone(),
            path: path.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// Why `pattern` is refused although fancy-regex would accept it: it would mean something else than in Python.
///
/// fancy-regex takes `[`, `&&`, `--` and `~~` in a class for nested classes and set operations, and `\<` and `\>` for
/// the ends of words. Python's `re` has neither. Conditional groups and `\0` are refused too.
///
/// A pattern that fancy-regex refuses needs no entry here: the user gets its message.
fn misread(pattern: &str) -> Option<&'static str> {
    let mut in_class = false;
    let mut chars = pattern.chars();
    loop {
        let rest = chars.as_str();
        let next_is = |tokens: &[&str]| tokens.iter().any(|token| rest.starts_with(token));
        if in_class && next_is(&["[", "&&", "--", "~~"]) {
            return Some("`[`, `&&`, `--` and `~~` must be escaped in a character class");
        }
        if !in_class && next_is(&["(?("]) {
            return Some("conditional groups `(?(…)…)` are not supported");
        }
        if !in_class && next_is(&[r"\0", r"\<", r"\>"]) {
            return Some(r"the escapes `\0`, `\<` and `\>` are not supported");
        }
        match chars.next()? {
            '\\' => _ = chars.next(),
            '[' if !in_class => {
                in_class = true;
                // A `]` right after the start belongs to the class and does not end it.
                let class = chars.as_str();
                let class = class.strip_prefix('^').unwrap_or(class);
                chars = class.strip_prefix(']').unwrap_or(class).chars();
            }
            ']' => in_class = false,
            _ => {}
        }
    }
}

/// Why a pattern does not compile, in one line.
pub(crate) fn describe(error: &Error) -> String {
    // The engine below fancy-regex prints the pattern with markers over several lines. The last line has the reason.
    if let Error::CompileError(error) = error
        && let CompileError::InnerError(error) = &**error
        && let Some(error) = error.syntax_error()
    {
        let drawing = error.to_string();
        return drawing
            .lines()
            .last()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_string();
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(selection: &Selection, path: &str) -> Decision {
        let matcher = Selector::new(selection).unwrap();
        matcher.decide(path, true).unwrap()
    }

    fn targeting(modules: impl Into<TargetModules>) -> Selection {
        Selection {
            target_modules: Some(modules.into()),
            ..Default::default()
        }
    }

    fn in_layers(names: &[&str], layers: &[usize], lists: &[&str]) -> Selection {
        Selection {
            layers_to_transform: layers.to_vec(),
            layers_pattern: lists.iter().map(ToString::to_string).collect(),
            ..targeting(names.to_vec())
        }
    }

    fn refusals(selection: &Selection) -> Vec<String> {
        let errors = Selector::new(selection).unwrap_err();
        errors.iter().map(ToString::to_string).collect()
    }

    type NamesRow = (
        &'static str,
        &'static [&'static str],
        &'static [usize],
        &'static [&'static str],
        bool,
    );

    /// PEFT's REGEX_TEST_CASES with a list of targets. Its rows that differ only in how an empty
    /// `layers_pattern` is written (`[]`, `""` or `None`) are one row here.
    #[rustfmt::skip]
    const PEFT_NAMES: [NamesRow; 41] = [
        // path, target_modules, layers_to_transform, layers_pattern, targeted
        ("", &[], &[], &[], false),
        ("", &["foo"], &[], &[], false),
        ("foo", &[], &[], &[], false),
        ("foo", &["foo"], &[], &[], true),
        ("foo", &["bar"], &[], &[], false),
        ("foo", &["foo", "bar"], &[], &[], true),
        ("foo.bar.1.baz", &["baz"], &[1], &["bar"], true),
        ("foo.bar.1.baz", &["baz"], &[0], &["bar"], false),
        ("foo.bar.1.baz", &["baz"], &[2], &["bar"], false),
        ("foo.bar.10.baz", &["baz"], &[0], &["bar"], false),
        ("foo.bar.10.baz", &["baz"], &[1], &["bar"], false),
        ("foo.bar.1.baz", &["baz"], &[0, 1, 2], &["bar"], true),
        ("foo.bar.1.baz", &["baz", "spam"], &[1], &["bar"], true),
        ("foo.bar.1.baz", &["baz", "spam"], &[0, 1, 2], &["bar"], true),
        ("foo.whatever.1.baz", &["baz"], &[1], &[], true),
        ("foo.whatever.1.baz", &["baz"], &[0], &[], false),
        ("transformer.h.1.attn.attention.q_proj.foo", &["q_proj"], &[], &[], false),
        ("transformer.h.1.attn.attention.q_proj", &[], &[], &[], false),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj"], &[], &[], true),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj", "v_proj"], &[], &[], true),
        ("transformer.h.1.attn.attention.resid_dropout", &["q_proj", "v_proj"], &[], &[], false),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj"], &[1], &["h"], true),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj"], &[0], &["h"], false),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj"], &[2], &["h"], false),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj"], &[0, 1, 2], &["h"], true),
        ("transformer.h.1.attn.attention.q_proj", &["q_proj", "v_proj"], &[0, 1, 2], &["h"], true),
        ("foo.bar.q_proj", &["q_proj"], &[], &[], true),
        ("foo.bar.1.baz", &["baz"], &[1], &["foo"], false),
        ("foo.bar.1.baz", &["baz"], &[1], &["baz"], false),
        ("bar.1.baz", &["baz"], &[1], &["bar"], true),
        ("foo.bar.001.baz", &["baz"], &[1], &["bar"], true),
        ("foo.bar.1.spam.2.baz", &["baz"], &[1], &["bar"], true),
        ("foo.bar.2.spam.1.baz", &["baz"], &[1], &["bar"], false),
        ("blocks.1.weight", &["weight"], &[1], &["blocks"], true),
        ("blocks.1.weight", &["weight"], &[1], &[], false),
        ("model.h.0.key", &["key"], &[0], &["(h|layers)"], true),
        ("layers.0.key", &["key"], &[0], &["h|layers"], true),
        ("xh.0.key", &["key"], &[0], &["h"], false),
        ("blocks.1.bias", &["weight"], &[1], &["blocks"], false),
        ("mlp.blocks.1.weight", &["weight"], &[1], &["blocks"], true),
        ("mlp.blocks.1.bias", &["weight"], &[1], &["blocks"], false),
    ];

    /// PEFT's REGEX_TEST_CASES with a regular expression.
    const PEFT_REGEXES: [(&str, &str, bool); 5] = [
        // path, target_modules, targeted
        ("foo", "foo", true),
        ("foo", ".*oo", true),
        ("foo", "fo.*", true),
        ("foo", ".*bar.*", false),
        ("foobar", ".*oba.*", true),
    ];

    #[test]
    fn names_match_as_in_peft() {
        let wrong: Vec<_> = PEFT_NAMES
            .iter()
            .filter(|(path, names, layers, lists, targeted)| {
                let decision = decide(&in_layers(names, layers, lists), path);
                (decision == Decision::Target) != *targeted
            })
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn regular_expressions_match_as_in_peft() {
        for (path, regex, targeted) in PEFT_REGEXES {
            let decision = decide(&targeting(regex), path);
            assert_eq!(decision == Decision::Target, targeted, "{path} {regex}");
        }
    }

    #[test]
    fn python_syntax_means_what_it_means_in_python() {
        // What Python 3.11's `re.fullmatch` answers.
        for (regex, path, matched) in [
            (r".*\.query\Z", "layer.0.query", true),
            (r".*\.query$", "layer.0.query", true),
            (r".*\.query\Z", "layer.0.query\n", false),
            (r".*\.query", "layer.0.query\n", false),
            (r"a|ab", "ab", true),
            (r"(?P<n>a|b)\.(?P=n)", "b.b", true),
            (r"(?P<n>a|b)\.(?P=n)", "b.a", false),
            (r"(a|b)\.\1", "a.a", true),
            (r"(?!decoder).*\.query", "encoder.query", true),
            (r"(?!decoder).*\.query", "decoder.query", false),
            (r".*(?<=\.)(?<!self\.)query", "cross.query", true),
            (r".*(?<=\.)(?<!self\.)query", "self.query", false),
            (r"(?i)ENCODER.*", "encoder.query", true),
            (r"[]a]+(?:(?#why)\[|[\[])", "a][", true),
            (r"a{,2}b", "aab", true),
        ] {
            let decision = decide(&targeting(regex), path);
            assert_eq!(decision == Decision::Target, matched, "{regex} {path}");
        }
    }

    #[test]
    fn python_syntax_that_would_mean_something_else_is_refused() {
        for (regex, reason) in [
            (r"(a)?(?(1)(?:b|c))", "conditional"),
            (r"(?P<n>a)?(?(n)b|c)", "conditional"),
            (r"(a)\01", "escapes"),
            (r"\<a\>", "escapes"),
            ("[a[b]c]", "character class"),
            ("[a&&b]", "character class"),
            ("[^]a--c]", "character class"),
            (r"(?P<n>a)\1", "named backref"),
            ("(?a)b", "flag"),
            (r"\N{DIGIT ONE}", "escape"),
        ] {
            let refusals = refusals(&targeting(regex));
            assert!(refusals[0].contains(reason), "{regex}: {}", refusals[0]);
        }
    }

    #[test]
    fn excluded_names_and_expressions_come_first() {
        let mut selection = targeting(["query", "key"]);
        for (exclude, path, decision) in [
            (["key"].into(), "layer.0.key", Decision::Excluded),
            (["key"].into(), "key", Decision::Excluded),
            (["layer.0.key"].into(), "layer.0.key", Decision::Excluded),
            (["ey"].into(), "layer.0.key", Decision::Target),
            (["layer.0"].into(), "layer.0.key", Decision::Target),
            (r".*\.0\..*".into(), "layer.0.key", Decision::Excluded),
            (r"layer\.0".into(), "layer.0.key", Decision::Target),
            (TargetModules::AllLinear, "layer.0.key", Decision::Excluded),
        ] {
            selection.exclude_modules = Some(exclude);
            assert_eq!(decide(&selection, path), decision, "{selection:?}");
        }
    }

    #[test]
    fn modules_to_save_are_excluded_with_all_they_hold() {
        let selection = Selection {
            modules_to_save: vec![
                "head".to_string(),
                "pool.out".to_string(),
                "a.c".to_string(),
            ],
            ..targeting("all-linear")
        };
        let matcher = Selector::new(&selection).unwrap();
        for (path, saved) in [
            ("head", true),
            ("model.head", true),
            ("model.head.dense", true),
            ("pool.out.dense", true),
            ("lm_head", false),
            ("head_norm.dense", false),
            ("pool.dense.out", false),
            ("abc", false),
        ] {
            let decision = if saved {
                Decision::Excluded
            } else {
                Decision::Target
            };
            assert_eq!(matcher.saves(path), saved, "{path}");
            assert_eq!(matcher.decide(path, true), Ok(decision), "{path}");
        }
    }

    #[test]
    fn all_linear_takes_linear_layers_whatever_their_index() {
        let selection = Selection {
            layers_to_transform: vec![1],
            ..targeting("ALL-linear")
        };
        let matcher = Selector::new(&selection).unwrap();
        assert_eq!(
            matcher.decide("layer.0.conv", false),
            Ok(Decision::Unmatched)
        );
        assert_eq!(matcher.decide("layer.0.key", true), Ok(Decision::Target));
    }

    #[test]
    fn a_regular_expression_ignores_the_layer_filter() {
        let selection = Selection {
            layers_to_transform: vec![1],
            ..targeting(r"model\.layer\.\d\.key")
        };
        assert_eq!(decide(&selection, "model.layer.0.key"), Decision::Target);
    }

    #[test]
    fn a_full_name_is_taken_in_any_layer() {
        let selection = in_layers(&["key", "model.layer.0.key"], &[1], &["layer"]);
        assert_eq!(decide(&selection, "model.layer.0.key"), Decision::Target);
        assert_eq!(decide(&selection, "model.layer.1.key"), Decision::Target);
        assert_eq!(decide(&selection, "model.layer.2.key"), Decision::Unmatched);
    }

    #[test]
    fn a_path_without_an_index_is_in_no_layer() {
        let path = "model.pooler.dense";
        assert_eq!(
            decide(&in_layers(&["dense"], &[0], &[]), path),
            Decision::Unmatched
        );
        assert_eq!(
            decide(&in_layers(&["dense"], &[], &[]), path),
            Decision::Target
        );
    }

    #[test]
    fn the_first_index_is_the_layer() {
        let path = "model.layers.1.experts.0.up";
        assert_eq!(
            decide(&in_layers(&["up"], &[1], &[]), path),
            Decision::Target
        );
        assert_eq!(
            decide(&in_layers(&["up"], &[0], &[]), path),
            Decision::Unmatched
        );
        assert_eq!(
            decide(&in_layers(&["up"], &[0], &["experts"]), path),
            Decision::Target
        );
    }

    #[test]
    fn the_first_layers_pattern_that_fits_gives_the_index() {
        let path = "model.layers.1.experts.0.up";
        let lists = ["blocks", "experts", "layers"];
        assert_eq!(
            decide(&in_layers(&["up"], &[0], &lists), path),
            Decision::Target
        );
        assert_eq!(
            decide(&in_layers(&["up"], &[1], &lists), path),
            Decision::Unmatched
        );
    }

    #[test]
    fn a_layers_pattern_is_part_of_the_expression_as_it_stands() {
        let path = "model.layers.1.experts.0.up";
        let layer_1 = |list| decide(&in_layers(&["up"], &[1], &[list]), path);
        assert_eq!(layer_1("lay.+rs"), Decision::Target);
        // The index after the pattern counts, here that of the expert.
        assert_eq!(layer_1(r"layers\.(\d+)\.experts"), Decision::Unmatched);
        // Python's `match` starts at the front, where neither `.*?\.h` nor `layers\.…` is.
        assert_eq!(layer_1("h|layers"), Decision::Unmatched);
    }

    #[test]
    fn every_bad_pattern_is_reported_in_one_line() {
        let selection = Selection {
            exclude_modules: Some("a)(b".into()),
            layers_to_transform: vec![0],
            layers_pattern: vec!["layers".to_string(), "(h".to_string()],
            ..targeting("[z-a]")
        };
        assert_eq!(
            refusals(&selection),
            [
                "target_modules: the pattern `[z-a]` cannot be used: invalid character class \
                 range, the start must be <= the end",
                "exclude_modules: the pattern `a)(b` cannot be used: Parsing error at position 1: \
                 General parsing error: end of string not reached",
                "layers_pattern: the pattern `(h` cannot be used: Parsing error at position 2: \
                 Opening parenthesis without closing parenthesis",
            ]
        );
    }

    #[test]
    fn a_layers_pattern_needs_layers_to_transform() {
        assert_eq!(
            refusals(&in_layers(&["key"], &[], &["h", "layers"])),
            [
                "layers_pattern: the pattern `h, layers` cannot be used: it selects nothing \
                 without layers_to_transform"
            ]
        );
    }

    #[test]
    fn a_pattern_that_finds_no_answer_says_so() {
        let path = format!("{}c", "a".repeat(40));
        for (selection, path, reason) in [
            (targeting(r"(a+)+\1b"), path.as_str(), "backtracking"),
            (
                in_layers(&["key"], &[0], &["h|layers"]),
                "model.h.0.key",
                "index of a layer",
            ),
        ] {
            let matcher = Selector::new(&selection).unwrap();
            let error = matcher.decide(path, true).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains(reason), "{error}");
        }
    }
}
