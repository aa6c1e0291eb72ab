//! Why a model is not adapted: [`Misfit`], and [`InjectError`] with all of them.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display, Formatter};

use super::candidates::Unsupported;
use crate::rotation::{RotationError, named};
use crate::select::PatternError;

/// How many layers a message names before it only counts them.
const NAMED: usize = 3;

/// One reason why an injection is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// The configuration gives a layer no rotation, or works in no layer.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// A pattern that cannot be used.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// No targets are set.
    #[error("target_modules is not set; name the layers to adapt, or use \"all-linear\"")]
    NoTargetSetting,
    /// The targets match no layer that is not excluded.
    #[error(
        "target_modules {targets} match none of the {layers} linear and convolution layers{}{}",
        excluded_count(excluded),
        it_has(nearest)
    )]
    NoTarget {
        /// The setting, in words.
        targets: String,
        /// How many layers could carry an adapter.
        layers: usize,
        /// How many of them `exclude_modules` or `modules_to_save` took out.
        excluded: usize,
        /// Layers with similar names.
        nearest: Vec<String>,
    },
    /// A target name that selects nothing in the model.
    #[error(
        "target_modules names `{name}`, which selects nothing in the model{}; correct or remove the name, or set \
         allow_absent_targets",
        it_has(nearest)
    )]
    UnknownTarget {
        /// The name given.
        name: String,
        /// Layers with similar names.
        nearest: Vec<String>,
    },
    /// A target that no adapter exists for.
    #[error("target_modules selects {}, {reason}; leave it out", named(path))]
    UnsupportedTarget {
        /// The module.
        path: String,
        /// Why it cannot be adapted.
        reason: Unsupported,
    },
    /// A target name whose layers are all outside of `layers_to_transform`.
    #[error(
        "target_modules names `{name}`, and layers_to_transform leaves out {}; correct the indices or \
         layers_pattern, or give full paths",
        all_of(layers)
    )]
    NotInLayers {
        /// The name given.
        name: String,
        /// How many layers it selects.
        layers: usize,
    },
    /// A module to save that the model does not have.
    #[error(
        "modules_to_save names `{name}`, which the model does not have{}",
        it_has(nearest)
    )]
    UnknownModuleToSave {
        /// The name given.
        name: String,
        /// Modules with similar names.
        nearest: Vec<String>,
    },
    /// The model carries a reparameterization already.
    #[error(
        "`{path}` already carries the reparameterization `{name}`, and Burn keeps one per parameter; \
         merge or unload it first"
    )]
    AlreadyAdapted {
        /// The parameter.
        path: String,
        /// The name of what it carries.
        name: String,
    },
    /// A quantized weight would have to be rewritten.
    #[error(
        "the weight of {} is quantized, and rotating it would rewrite it; inject into the float model and \
         quantize the base afterwards, or exclude the layer",
        named(path)
    )]
    Quantized {
        /// The layer.
        path: String,
    },
}

impl Misfit {
    /// The path of the layer that it is about, where it is about one.
    fn path_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Rotation(error) => error.path_mut(),
            Self::UnsupportedTarget { path, .. }
            | Self::AlreadyAdapted { path, .. }
            | Self::Quantized { path } => Some(path),
            Self::Pattern(_)
            | Self::NoTargetSetting
            | Self::NoTarget { .. }
            | Self::UnknownTarget { .. }
            | Self::NotInLayers { .. }
            | Self::UnknownModuleToSave { .. } => None,
        }
    }
}

fn excluded_count(excluded: &usize) -> String {
    match excluded {
        0 => String::new(),
        1 => " (1 of them is excluded by exclude_modules or modules_to_save)".to_string(),
        n => format!(" ({n} of them are excluded by exclude_modules or modules_to_save)"),
    }
}

fn all_of(layers: &usize) -> String {
    match layers {
        1 => "the one layer of that name".to_string(),
        n => format!("all {n} layers of that name"),
    }
}

/// Similar names that the model has, for the end of a message.
pub(crate) fn it_has(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; it has {}", names.join(", ")),
    }
}

/// Why [`inject`](crate::inject()) or [`plan`](crate::plan()) refuses: every misfit of the model and the settings.
///
/// `Display` has one line per misfit; layers with the same misfit share a line.
#[derive(Debug, Clone, PartialEq)]
pub struct InjectError {
    misfits: Vec<Misfit>,
}

impl InjectError {
    pub(crate) fn new(misfits: Vec<Misfit>) -> Self {
        Self { misfits }
    }

    /// What does not fit, in the model's order.
    pub fn misfits(&self) -> &[Misfit] {
        &self.misfits
    }

    /// The lines of the message: a misfit, and the other layers that have the same one.
    fn lines(&self) -> Vec<(&Misfit, Vec<String>)> {
        let mut lines: Vec<(&Misfit, Vec<String>)> = Vec::new();
        let mut line_of = HashMap::new();
        for misfit in &self.misfits {
            let mut alike = misfit.clone();
            let Some(path) = alike.path_mut().map(std::mem::take) else {
                lines.push((misfit, Vec::new()));
                continue;
            };
            match line_of.get(&alike.to_string()) {
                Some(&line) => {
                    let (_, others): &mut (_, Vec<String>) = &mut lines[line];
                    others.push(path);
                }
                None => {
                    line_of.insert(alike.to_string(), lines.len());
                    lines.push((misfit, Vec::new()));
                }
            }
        }
        lines
    }
}

impl Display for InjectError {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, (misfit, others)) in self.lines().into_iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{misfit}")?;
            let named: Vec<_> = others.iter().take(NAMED).map(|path| named(path)).collect();
            match others.len() {
                0 => {}
                1 => write!(f, " (and so for 1 more layer: {})", named[0])?,
                n if n <= NAMED => {
                    write!(f, " (and so for {n} more layers: {})", named.join(", "))?
                }
                n => write!(f, " (and so for {n} more layers: {}, …)", named.join(", "))?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for InjectError {}

/// Up to three candidates whose names are most like a name, each in backticks.
///
/// Names are compared by as many last components as the name has, and of the candidates that end alike the first is
/// given: `q_proj` finds one `…query`, not the queries of every layer.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let components = name.split('.').count();
    let mut first_of = BTreeMap::new();
    for (order, path) in candidates.filter(|path| !path.is_empty()).enumerate() {
        let start = path.rmatch_indices('.').nth(components - 1);
        let ending = start.map_or(path, |(dot, _)| &path[dot + 1..]);
        first_of.entry(ending).or_insert((order, path));
    }
    let mut scored: Vec<_> = first_of
        .into_iter()
        .map(|(ending, (order, path))| (strsim::jaro_winkler(name, ending), order, path))
        .collect();
    scored.sort_by(|(a, first, _), (b, second, _)| b.total_cmp(a).then(first.cmp(second)));
    // A name that is clearly the nearest stands alone.
    let best = scored.first().map_or(0.0, |(score, ..)| *score);
    let nearest = scored
        .into_iter()
        .take(3)
        .take_while(|(score, ..)| best - score < 0.1);
    nearest.map(|(_, _, path)| format!("`{path}`")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misfit(path: &str, d_input: usize) -> Misfit {
        let error = RotationError::IdentityBlocks {
            path: path.to_string(),
            d_input,
        };
        error.into()
    }

    #[test]
    fn layers_with_the_same_misfit_share_a_line() {
        let layers = ["a", "b", "c", "d", "e"].map(|path| misfit(path, 7));
        let error = InjectError::new([&layers[..], &[misfit("f", 13), misfit("", 7)]].concat());
        let text = error.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("`a` would"), "{text}");
        assert!(
            lines[0].ends_with("(and so for 5 more layers: `b`, `c`, `d`, …)"),
            "{text}"
        );
        assert!(lines[1].starts_with("`f` would"), "{text}");
        assert_eq!(error.misfits().len(), 7);
    }

    #[test]
    fn a_layer_at_the_root_has_a_name() {
        let text = misfit("", 7).to_string();
        assert!(text.starts_with("the model itself would"), "{text}");
    }

    #[test]
    fn names_of_pytorch_find_the_nearest_names_of_the_model() {
        let paths: Vec<_> = (0..3)
            .flat_map(|i| {
                ["query", "value", "output.dense"].map(|name| format!("layer.{i}.{name}"))
            })
            .collect();
        let found = nearest("q_proj", paths.iter().map(String::as_str));
        assert_eq!(found[0], "`layer.0.query`");
        assert!(found.len() <= 3, "{found:?}");
        let found = nearest("output.dens", paths.iter().map(String::as_str));
        assert_eq!(found, ["`layer.0.output.dense`"]);
    }
}
