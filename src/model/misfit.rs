//! Why a model cannot be adapted: [`Misfit`], one reason, and [`InjectError`], all of them.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display, Formatter};

use super::candidates::Unsupported;
use crate::rotation::{RotationError, named};
use crate::select::PatternError;

/// How many layers a message names before it only counts the rest.
const NAMED: usize = 3;

/// One reason why [`inject`](crate::inject()) refuses a configuration for a model.
///
/// PEFT is silent about some of them: a target that is absent beside one that is found, and a module to save that does
/// not exist.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::model::Misfit;
/// use burn_boft::{OftConfig, plan};
///
/// # let device = burn::tensor::Device::flex();
/// # #[derive(burn::module::Module, Debug)]
/// # struct Model { query: burn::nn::Linear }
/// let model = Model { query: LinearConfig::new(64, 32).init(&device) };
/// let config = OftConfig::new().with_target_modules(["querry"]).with_modules_to_save(["score"]);
/// let error = plan(&model, config).unwrap_err();
/// // All misfits come at once, and names come with the nearest ones of the model.
/// let [Misfit::UnknownModuleToSave { .. }, Misfit::UnknownTarget { nearest, .. }] = error.misfits() else {
///     panic!("{error}");
/// };
/// assert_eq!(nearest, &["`query`"]);
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// The configuration cannot rotate a layer, or any layer at all.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// A regular expression in the settings cannot be used.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// `target_modules` is not set.
    #[error("target_modules is not set; name the layers to adapt, or use \"all-linear\"")]
    NoTargetSetting,
    /// `target_modules` selects no layer, or only layers that are excluded.
    #[error(
        "target_modules {targets} match {}{}{}",
        none_of(layers),
        excluded_count(excluded),
        it_has(nearest)
    )]
    NoTarget {
        /// The setting as a message shows it.
        targets: String,
        /// How many layers of the model can carry an adapter.
        layers: usize,
        /// How many of them `exclude_modules` or `modules_to_save` excludes.
        excluded: usize,
        /// Layers with similar names.
        nearest: Vec<String>,
    },
    /// A name in `target_modules` selects nothing in the model.
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
    /// `target_modules` selects a module that cannot be adapted.
    #[error(
        "target_modules selects {}, {reason}{}",
        named(path),
        or_leave_out(reason)
    )]
    UnsupportedTarget {
        /// The module.
        path: String,
        /// Why it cannot be adapted.
        reason: Unsupported,
    },
    /// A name in `target_modules` selects only layers that `layers_to_transform` leaves out.
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
    /// A name in `modules_to_save` is not the name of a module with parameters.
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
    /// A parameter already carries an adapter, or another of what Burn calls reparameterizations.
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
    /// A target has the same weight as another one: one parameter, cloned into two places.
    ///
    /// Two adapters would give the places two weights, and training one adapter for both is not possible, because Burn's
    /// optimizers step a parameter at the first place where they meet it. A weight that is tied to one that is no target can
    /// be adapted: the other place keeps the base, as in PEFT.
    #[error(
        "{} shares its weight with {}, and two adapters would make two weights of it; exclude one of them, or \
         give one a parameter of its own by Param::from_tensor(weight.val())",
        named(path),
        named(first)
    )]
    Tied {
        /// The layer.
        path: String,
        /// The target before it that has the same weight.
        first: String,
    },
    /// A bias or a part of a module to save is quantized. The weight of an adapted layer may be, since it is frozen.
    #[error(
        "`{path}` is to be trained and is quantized, so no optimizer can change it; leave it out of the quantization, or \
         do not train it"
    )]
    Quantized {
        /// The parameter.
        path: String,
    },
}

impl Misfit {
    /// The path of the layer that it is about; none if it is about the settings.
    fn path_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Rotation(error) => error.path_mut(),
            Self::UnsupportedTarget { path, .. }
            | Self::AlreadyAdapted { path, .. }
            | Self::Tied { path, .. }
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

/// The end of a message about a module that cannot be adapted, unless its reason has said what to do instead.
fn or_leave_out(reason: &Unsupported) -> &'static str {
    match reason {
        Unsupported::Holder { .. } | Unsupported::OnlyOft { .. } | Unsupported::NoLayer { .. } => {
            ""
        }
        _ => "; leave it out",
    }
}

/// The part of a message about the layers of which none is meant.
fn none_of(layers: &usize) -> String {
    match layers {
        0 => "nothing: the model has no layer that can be adapted".to_string(),
        1 => "not the one layer that can be adapted".to_string(),
        n => format!("none of the {n} layers that can be adapted"),
    }
}

/// The part of a message about layers that are excluded; empty if none is.
fn excluded_count(excluded: &usize) -> String {
    match excluded {
        0 => String::new(),
        1 => " (1 of them is excluded by exclude_modules or modules_to_save)".to_string(),
        n => format!(" ({n} of them are excluded by exclude_modules or modules_to_save)"),
    }
}

/// A number of layers with the same name, in words.
fn all_of(layers: &usize) -> String {
    match layers {
        1 => "the one layer of that name".to_string(),
        n => format!("all {n} layers of that name"),
    }
}

/// The end of a message: similar names that the model does have.
pub(crate) fn it_has(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; it has {}", names.join(", ")),
    }
}

/// Why [`inject`](crate::inject()) or [`plan`](crate::plan()) refuses: every misfit of the settings and the model.
///
/// `Display` prints one line per misfit. Layers with the same misfit share a line.
///
/// # Examples
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn_boft::model::Misfit;
/// use burn_boft::{BoftConfig, plan};
///
/// # let device = burn::tensor::Device::flex();
/// let layer = LinearConfig::new(100, 10).init(&device);
/// let error = plan(&layer, BoftConfig::new().with_block_size(12)).unwrap_err();
/// assert!(matches!(error.misfits(), [Misfit::NoTargetSetting]));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct InjectError {
    /// At least one misfit, in the order in which they were found.
    misfits: Vec<Misfit>,
}

impl InjectError {
    /// An error of these misfits, of which there must be one.
    pub(crate) fn new(misfits: Vec<Misfit>) -> Self {
        Self { misfits }
    }

    /// What does not fit: first the settings, then the layers in the model's order.
    pub fn misfits(&self) -> &[Misfit] {
        &self.misfits
    }

    /// The lines of the message: each a misfit, and the paths of other layers with the same one.
    ///
    /// Two misfits are the same if their texts are, apart from the path: twelve layers of 384 channels that 7 does not
    /// divide are one line.
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

/// Up to three candidates whose names are most similar to a name, each in backticks.
///
/// Only the last components are compared, as many as the name has. Of several candidates with the same ending, the first
/// one stands for all: `q_proj` finds one `…query`, and not those of every layer.
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
