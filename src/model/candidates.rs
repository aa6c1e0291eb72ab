//! [`candidates`]: which layers of a model can carry an adapter, and why the others cannot.

use std::fmt::{self, Display, Formatter};

use burn::module::Module;

use super::walk::{ModuleInfo, Parameter, Walk, walk};
use crate::config::LayerKind;
use crate::rotation::{Method, named};

/// Lists every layer that can be adapted, and every other parameter with the reason why it cannot.
///
/// Embeddings are listed with the layers, although only OFT adapts them.
///
/// Use it to find the names for `target_modules` in a model that somebody else wrote, or that a program generated from
/// an ONNX file.
///
/// # Examples
///
/// ```
/// use burn::module::Module;
/// use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
/// use burn_boft::candidates;
///
/// #[derive(Module, Debug)]
/// struct Generated { linear1: Linear, norm1: LayerNorm }
///
/// # let device = burn::tensor::Device::flex();
/// let model = Generated {
///     linear1: LinearConfig::new(64, 32).with_bias(false).init(&device),
///     norm1: LayerNormConfig::new(32).init(&device),
/// };
/// let found = candidates(&model);
/// assert_eq!(found.layers[0].path, "linear1");
/// assert_eq!(found.others[0].path, "norm1.gamma");
/// println!("{found}");
/// ```
pub fn candidates<M: Module>(model: &M) -> Candidates {
    let walk = walk(model);
    let mut candidates = Candidates::default();
    for (parameter, verdict) in verdicts(&walk, &[], None) {
        let shape = parameter.stored.shape();
        let verdict = verdict.and_then(|kind| match &parameter.attached {
            Some(attached) => Err(Unsupported::Adapted {
                name: attached.name.clone(),
            }),
            None => Ok(kind),
        });
        match verdict {
            Ok(kind) => candidates.layers.push(Candidate {
                path: parameter.owner().to_string(),
                kind,
                shape,
            }),
            Err(reason) => candidates.others.push(OtherParameter {
                path: parameter.path().to_string(),
                shape,
                reason,
            }),
        }
    }
    candidates
}

/// What can be adapted in a model and what cannot, as [`candidates`] found it. `Display` prints a line for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidates {
    /// The layers that can carry an adapter, in the model's order.
    pub layers: Vec<Candidate>,
    /// Every other parameter, in the model's order.
    pub others: Vec<OtherParameter>,
}

/// A layer that can carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// The dotted path of the layer, which is empty if the model itself is the layer.
    pub path: String,
    /// Whether it is linear, a convolution or an embedding.
    pub kind: LayerKind,
    /// The shape of its weight in Burn.
    pub shape: Vec<usize>,
}

/// A parameter that cannot carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OtherParameter {
    /// The dotted path of the parameter.
    pub path: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Why it cannot be adapted.
    pub reason: Unsupported,
}

/// Why a parameter, or the module that it belongs to, cannot be adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unsupported {
    /// Its layer is of a type that has no adapter, such as a norm.
    Type {
        /// The type's name.
        type_name: String,
    },
    /// Its layer is of a kind that OFT adapts and the configured method does not: an embedding.
    OnlyOft {
        /// The type's name.
        type_name: String,
    },
    /// It is a parameter and no module. Layers are adapted by their own names, and a parameter that no layer owns, such as
    /// a matrix in a model's struct, has none.
    NoLayer {
        /// The name of the type that owns it.
        type_name: String,
    },
    /// It is a module that contains layers and is none itself.
    Holder {
        /// The type's name.
        type_name: String,
    },
    /// It is a parameter of a layer, but not its weight.
    NotTheWeight {
        /// The type of the layer.
        type_name: String,
    },
    /// The layer is named like one of Burn's, but its weight has another number of axes.
    Rank {
        /// The type's name.
        type_name: String,
        /// The number of axes of the weight of Burn's layer.
        expected: usize,
        /// The number of axes of this weight.
        found: usize,
    },
    /// The layer is named like one of Burn's, but has a field that Burn's layer does not have.
    Field {
        /// The type's name.
        type_name: String,
        /// The name of the field.
        field: String,
    },
    /// The bias does not have as many numbers as the weight has output channels, so the axes of the weight mean
    /// something else than in Burn's layer.
    Layout {
        /// The type's name.
        type_name: String,
        /// The shape of the weight.
        weight: Vec<usize>,
        /// The shape of the bias.
        bias: Vec<usize>,
    },
    /// The configuration says, with [`with_layer_kind`](crate::BoftConfig::with_layer_kind), that it is not to be adapted.
    TakenOut,
    /// It already carries an adapter, or another of what Burn calls reparameterizations.
    Adapted {
        /// The name of what it carries.
        name: String,
    },
}

impl Display for Unsupported {
    /// A clause that continues a sentence after the name of the module.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type { type_name } => {
                write!(
                    f,
                    "which is {}; only Linear and Conv2d layers can be adapted, and by OFT Embedding layers",
                    article(type_name)
                )
            }
            Self::OnlyOft { type_name } => {
                write!(
                    f,
                    "which is {}, and BOFT adapts none; use OftConfig for it, or leave it out",
                    article(type_name)
                )
            }
            Self::NoLayer { type_name } => {
                write!(
                    f,
                    "which is a parameter of {} and no layer; name the layer that owns it, and if it is your own, \
                     call the parameter `weight` and declare the layer by with_layer_kind",
                    article(type_name)
                )
            }
            Self::Holder { type_name } => {
                write!(
                    f,
                    "which is {} that holds layers; name the layers in it",
                    article(type_name)
                )
            }
            Self::NotTheWeight { type_name } => {
                write!(
                    f,
                    "which {} has beside its weight; only weights are rotated",
                    article(type_name)
                )
            }
            Self::Rank {
                type_name,
                expected,
                found,
            } => write!(
                f,
                "{} whose weight has {found} axes where Burn's has {expected}, so it is a layer of another kind",
                article(type_name)
            ),
            Self::Field { type_name, field } => write!(
                f,
                "{} with a field `{field}`, which Burn's does not have, so how it computes is not known; \
                 with_layer_kind can say that its weight is laid out as Burn's",
                article(type_name)
            ),
            Self::Layout {
                type_name,
                weight,
                bias,
            } => write!(
                f,
                "{} whose bias {bias:?} does not fit the output axis of its weight {weight:?}, so the weight is \
                 laid out in another way than Burn's",
                article(type_name)
            ),
            Self::TakenOut => write!(f, "which layer_kinds says is not to be adapted"),
            Self::Adapted { name } => {
                write!(f, "which already carries the reparameterization `{name}`")
            }
        }
    }
}

/// The name of a type with its article.
fn article(type_name: &str) -> String {
    match type_name.starts_with(['A', 'E', 'I', 'O', 'U']) {
        true => format!("an {type_name}"),
        false => format!("a {type_name}"),
    }
}

impl Display for Candidates {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} layers can be adapted:", self.layers.len())?;
        for Candidate { path, kind, shape } in &self.layers {
            writeln!(f, "  {}, {} {shape:?}", named(path), kind.in_words())?;
        }
        write!(f, "{} other parameters:", self.others.len())?;
        for OtherParameter {
            path,
            shape,
            reason,
        } in &self.others
        {
            write!(f, "\n  {} {shape:?}, {reason}", named(path))?;
        }
        Ok(())
    }
}

/// Says of each parameter, in the model's order, whether it is the weight of a layer that can carry an adapter.
///
/// The name of a type proves nothing, since anybody can write a struct called `Linear`. Therefore the fields of the layer,
/// the axes of its weight and the length of its bias are checked as well. `layer_kinds` of the configuration overrules
/// the name. Whether the layer already carries an adapter makes no difference here.
///
/// A kind that `method` does not adapt is none; without a method, every kind is one.
pub(crate) fn verdicts<'a>(
    walk: &'a Walk,
    layer_kinds: &[(String, Option<LayerKind>)],
    method: Option<&Method>,
) -> impl Iterator<Item = (&'a Parameter, Result<LayerKind, Unsupported>)> {
    let (modules, parameters) = (walk.modules_by_path(), walk.by_path());
    walk.parameters.iter().map(move |parameter| {
        let module = modules.get(parameter.owner()).copied();
        let bias = match parameter.owner() {
            "" => parameters.get("bias"),
            owner => parameters.get(format!("{owner}.bias").as_str()),
        };
        let verdict = verdict(parameter, module, bias.copied(), layer_kinds);
        let verdict = verdict.and_then(|kind| match method {
            Some(method) if !method.adapts(kind) => Err(Unsupported::OnlyOft {
                type_name: parameter.owner_type().to_string(),
            }),
            _ => Ok(kind),
        });
        (parameter, verdict)
    })
}

/// The verdict on one parameter, of a module with this bias.
///
/// A kind that is declared in `layer_kinds` overrules the type and its fields, and not the axes: a weight of another rank or
/// a bias of another length cannot be laid out as Burn's.
fn verdict(
    parameter: &Parameter,
    module: Option<&ModuleInfo>,
    bias: Option<&Parameter>,
    layer_kinds: &[(String, Option<LayerKind>)],
) -> Result<LayerKind, Unsupported> {
    let type_name = || parameter.owner_type().to_string();
    let declared = parameter.declared(layer_kinds);
    let kind = match (declared, parameter.owner_type()) {
        (Some(Some(kind)), _) => kind,
        (Some(None), _) => return Err(Unsupported::TakenOut),
        (None, "Linear") => LayerKind::Linear,
        (None, "Conv2d") => LayerKind::Conv2d,
        (None, "Embedding") => LayerKind::Embedding,
        (None, _) => {
            let type_name = type_name();
            return Err(Unsupported::Type { type_name });
        }
    };
    if parameter.name() != "weight" {
        let type_name = type_name();
        return Err(Unsupported::NotTheWeight { type_name });
    }
    let shape = parameter.stored.shape();
    if shape.len() != kind.rank() {
        return Err(Unsupported::Rank {
            type_name: type_name(),
            expected: kind.rank(),
            found: shape.len(),
        });
    }
    let is_foreign = |field: &&String| !matches!(field.as_str(), "weight" | "bias");
    let fields = module.map_or(&[][..], |module| &module.fields);
    if let (None, Some(field)) = (declared, fields.iter().find(is_foreign)) {
        return Err(Unsupported::Field {
            type_name: type_name(),
            field: field.clone(),
        });
    }
    let (_, d_output) = kind.axes(&shape);
    if let Some(bias) = bias
        .map(|bias| bias.stored.shape())
        .filter(|bias| bias != &[d_output])
    {
        return Err(Unsupported::Layout {
            type_name: type_name(),
            weight: shape,
            bias,
        });
    }
    Ok(kind)
}
