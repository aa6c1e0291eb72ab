//! [`AdapterBank`]: many adapters on one base, for batches whose requests use different ones.
//!
//! Burn's modules take nothing but their input, so a model cannot be told at each call which request uses which adapter.
//! Instead, [`AdapterBank::model`] makes a model for a list of requests: a clone of the base, which shares its tensors,
//! where every adapted weight carries the numbers of the adapters in the batch and the list. Nothing is shared but
//! tensors, so threads may run models of the same bank at the same time, while adapters come and go.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::Adapter;
use super::attach::AttachError;
use crate::batch::{BatchAdapter, Part};
use crate::config::LayerKind;
use crate::model::{Edit, Path, rewrite, verdicts, walk};
use crate::ops;
use crate::rotation::{Rotation, Values, named};

/// Many adapters on one base model, which serves batches whose requests use different adapters.
///
/// The base is in memory once. An adapter takes its rotations, composed to a `[d/s, s, s]` tensor for each layer with
/// spans of `s` channels, its scales and its biases; [`memory`](Self::memory) counts them. Adding one computes these, and
/// dropping one frees them, without touching the base or the other adapters.
///
/// Layers have to be [`BoftLinear`](crate::BoftLinear), on floats or on quantized weights: a `burn::nn::Linear` knows only its
/// weight, which is another one for each request. It serves requests without an adapter, and panics for a batch with one.
///
/// # Which rows belong to a request
///
/// The first axis of the input of every adapted layer counts the requests: `[requests, d]` or `[requests, tokens, d]`. A
/// layer that gets anything else panics, such as one that sees windows or single tokens along its first axis.
///
/// # Numerics
///
/// Every request gets what a model with its adapter alone computes, up to rounding: within 1e-6 of the largest number in
/// f32. Multiplicative dropout belongs to training and is ignored; the COFT radius is applied.
///
/// # Examples
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::{Device, Tensor};
/// use burn_boft::{Adapter, AdapterBank, BoftConfig, BoftLinear, BoftLinearConfig, Init, inject};
///
/// #[derive(Module, Debug)]
/// struct Model { query: BoftLinear }
///
/// # let device = Device::flex();
/// let base = Model { query: BoftLinearConfig::new(64, 32).init(&device) };
/// # let trained = |seed| {
/// #     let config = BoftConfig::new().with_target_modules(["query"]).with_init(Init::Random { seed });
/// #     Adapter::extract(&inject(base.clone(), config).unwrap()).unwrap()
/// # };
/// # let (alices, bobs) = (trained(1), trained(2));
/// let mut bank = AdapterBank::new(base)?;
/// let alice = bank.add(&alices)?; // `alices` is an `Adapter`, loaded or extracted
/// let bob = bank.add(&bobs)?;
///
/// // A batch of three requests. The second one uses the base as it is.
/// let model = bank.model(&[Some(bob), None, Some(alice)])?;
/// let output = model.query.forward(Tensor::<3>::ones([3, 5, 64], &device));
/// # drop(output);
/// bank.remove(bob);
/// # Ok::<(), burn_boft::value::BankError>(())
/// ```
#[derive(Debug, Clone)]
pub struct AdapterBank<M> {
    base: M,
    /// The linear layers of the base, in its order.
    layers: Vec<Layer>,
    /// The numbers of each adapter, in the order of the layers.
    adapters: HashMap<AdapterId, Vec<Option<Part>>>,
}

/// A linear layer of the base.
#[derive(Debug, Clone)]
struct Layer {
    path: String,
    device: Device,
    /// The precision that rotations and scales are kept in.
    dtype: DType,
    /// The precision of its bias, if it has one.
    bias: Option<DType>,
}

/// Names an adapter in an [`AdapterBank`]. No two adapters that a process adds have the same one, in whatever bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(u64);

impl AdapterId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Display for AdapterId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "adapter {}", self.0)
    }
}

/// Why an [`AdapterBank`] refuses a model, an adapter or a batch. The bank stays as it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BankError {
    /// The base is on a device with autodiff.
    #[error(
        "the model is on a device with autodiff, and a bank does not train; call `valid()` on it first"
    )]
    Autodiff,
    /// Weights of the base carry an adapter already.
    #[error(
        "{} carries an adapter already; a bank takes the base alone, so call `unload` or `merge` first",
        listed(paths)
    )]
    Adapted {
        /// The paths of the layers.
        paths: Vec<String>,
    },
    /// The adapter cannot be attached to the base.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The adapter could be attached to the base alone, and not be served beside others.
    #[error("{}", lines(misfits))]
    Misfits {
        /// Everything that a bank cannot serve.
        misfits: Vec<BankMisfit>,
    },
    /// The bank has no such adapter.
    #[error("the bank has no {id}: it was removed, or belongs to another bank")]
    Unknown {
        /// The one asked for.
        id: AdapterId,
    },
}

/// A part of an adapter that an [`AdapterBank`] cannot serve beside other adapters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BankMisfit {
    /// The layer is not linear, and reads one weight for the whole batch.
    #[error(
        "{} is {}, and a bank serves linear layers; attach the adapter to a clone of the base instead",
        named(path),
        kind.in_words()
    )]
    Kind {
        /// The layer's path.
        path: String,
        /// The kind of the layer.
        kind: LayerKind,
    },
    /// The layer was declared by `with_layer_kind`, and is not a `BoftLinear`.
    #[error(
        "{} is a layer of a type of its own, and only a BoftLinear applies several adapters; make it one, or attach the \
         adapter to a clone of the base instead",
        named(path)
    )]
    Declared {
        /// The layer's path.
        path: String,
    },
    /// The spans of the layer's rotation are not those of the adapters that are there.
    #[error(
        "{} has spans of {found} channels in this adapter and of {expected} in the bank; a bank holds one span, \
         b·2^(m−1), for each layer, so put the adapter into a bank of its own",
        named(path)
    )]
    Span {
        /// The layer's path.
        path: String,
        /// The span of this adapter.
        found: usize,
        /// The span of the adapters in the bank.
        expected: usize,
    },
    /// A saved tensor other than the bias of a linear layer.
    #[error(
        "`{path}` is saved with the adapter, and a bank serves rotations, scales and biases of linear layers; apply it \
         yourself, and build the adapter without it by Adapter::from_parts"
    )]
    Saved {
        /// The path of the parameter.
        path: String,
    },
}

fn listed(paths: &[String]) -> String {
    let named: Vec<_> = paths.iter().map(|path| named(path)).collect();
    named.join(", ")
}

fn lines(misfits: &[BankMisfit]) -> String {
    let lines: Vec<_> = misfits.iter().map(BankMisfit::to_string).collect();
    lines.join("\n")
}

impl<M: Module> AdapterBank<M> {
    /// A bank without adapters for this base.
    ///
    /// # Errors
    ///
    /// - [`BankError::Autodiff`]: the model is on a device with autodiff.
    /// - [`BankError::Adapted`]: a parameter carries an adapter of this crate or another reparameterization.
    pub fn new(base: M) -> Result<Self, BankError> {
        if base.devices().iter().any(Device::is_autodiff) {
            return Err(BankError::Autodiff);
        }
        let walk = walk(&base);
        let adapted = walk.parameters.iter().filter(|p| p.attached.is_some());
        let paths: Vec<_> = adapted.map(|p| p.owner().to_string()).collect();
        if !paths.is_empty() {
            return Err(BankError::Adapted { paths });
        }
        let parameters = walk.by_path();
        let linear = verdicts(&walk, &[], None).filter(|(_, kind)| *kind == Ok(LayerKind::Linear));
        let layers = linear.map(|(weight, _)| {
            let path = weight.owner().to_string();
            let bias = parameters.get(bias_of(&path).as_str());
            Layer {
                path,
                device: weight.stored.tensor::<2>().device(),
                dtype: ops::widened(weight.stored.dtype()),
                bias: bias.map(|bias| bias.stored.dtype()),
            }
        });
        let layers = layers.collect();
        drop(parameters);
        Ok(Self {
            base,
            layers,
            adapters: HashMap::new(),
        })
    }

    /// The base model.
    pub fn base(&self) -> &M {
        &self.base
    }

    /// The adapters in the bank, in the order in which they were added.
    pub fn ids(&self) -> Vec<AdapterId> {
        let mut ids: Vec<_> = self.adapters.keys().copied().collect();
        ids.sort();
        ids
    }

    /// The bytes that an adapter takes; none if the bank does not have it.
    pub fn memory(&self, id: AdapterId) -> Option<usize> {
        fn bytes<const D: usize>(tensor: &Option<Tensor<D>>) -> usize {
            let numbers =
                |tensor: &Tensor<D>| tensor.shape().num_elements() * tensor.dtype().size();
            tensor.as_ref().map_or(0, numbers)
        }
        let parts = self.adapters.get(&id)?.iter().flatten();
        let each = parts.map(|part| bytes(&part.rotation) + bytes(&part.scale) + bytes(&part.bias));
        Some(each.sum())
    }

    /// Adds an adapter, whose layers have to fit the base as [`Adapter::attach`] demands.
    ///
    /// A layer that the adapter does not have computes as in the base.
    ///
    /// # Errors
    ///
    /// - [`BankError::Attach`]: everything that keeps the adapter from the base.
    /// - [`BankError::Misfits`]: everything that cannot be served for one request beside others.
    pub fn add(&mut self, adapter: &Adapter) -> Result<AdapterId, BankError> {
        let walk = walk(&self.base);
        let mut fit = adapter.fit(&walk)?;
        if !fit.mismatch.is_empty() {
            return Err(AttachError::from(fit.mismatch).into());
        }
        let misfits = self.misfits(&fit.layers, &fit.tensors);
        if !misfits.is_empty() {
            return Err(BankError::Misfits { misfits });
        }
        let parts = self.layers.iter().map(|layer| {
            let rotated = fit.layers.remove(&layer.path);
            let bias = fit.tensors.remove(&bias_of(&layer.path));
            (rotated.is_some() || bias.is_some()).then(|| layer.part(rotated, bias))
        });
        let id = AdapterId::next();
        self.adapters.insert(id, parts.collect());
        Ok(id)
    }

    /// Removes an adapter, and says whether it was there. Models that were made for a batch keep its numbers as long as
    /// they live.
    pub fn remove(&mut self, id: AdapterId) -> bool {
        self.adapters.remove(&id).is_some()
    }

    /// The model for a batch, whose request `i` uses the adapter `requests[i]`, or the base where that is none.
    ///
    /// It is a clone of the base that shares every tensor with the bank. Use it for as many forward passes as the batch
    /// takes, such as all tokens of a generation. It is not for training or merging.
    ///
    /// # Errors
    ///
    /// - [`BankError::Unknown`]: the bank does not have one of the adapters.
    pub fn model(&self, requests: &[Option<AdapterId>]) -> Result<M, BankError> {
        let mut adapters = Vec::new();
        let mut places = HashMap::new();
        let mut chosen = Vec::with_capacity(requests.len());
        for request in requests {
            let Some(id) = *request else {
                chosen.push(None);
                continue;
            };
            let parts = self.adapters.get(&id).ok_or(BankError::Unknown { id })?;
            let place = *places.entry(id).or_insert_with(|| {
                adapters.push(parts);
                adapters.len() - 1
            });
            chosen.push(Some(place));
        }
        let batches = self.layers.iter().enumerate().filter_map(|(index, layer)| {
            let parts: Vec<_> = adapters.iter().map(|parts| parts[index].as_ref()).collect();
            let batch = BatchAdapter::new(&layer.path, &parts, &chosen)?;
            Some((layer.path.as_str(), batch))
        });
        let mut batches: HashMap<_, _> = batches.collect();
        let edit = |path: &Path| Edit {
            batch: match path.name() {
                "weight" => batches.remove(path.owner()),
                _ => None,
            },
            ..Edit::default()
        };
        Ok(rewrite(self.base.clone(), edit, |_| None))
    }

    /// What a bank cannot serve of an adapter that fits the base, by path.
    fn misfits(
        &self,
        layers: &HashMap<String, (Rotation, Values)>,
        tensors: &HashMap<String, TensorData>,
    ) -> Vec<BankMisfit> {
        let places = self.layers.iter().enumerate();
        let places: HashMap<_, _> = places.map(|(i, layer)| (layer.path.as_str(), i)).collect();
        let biases: Vec<_> = self
            .layers
            .iter()
            .map(|layer| bias_of(&layer.path))
            .collect();
        let layers = layers.iter().filter_map(|(path, (rotation, _))| {
            let path = path.clone();
            let Some(&place) = places.get(path.as_str()) else {
                return Some(match rotation.kind() {
                    LayerKind::Linear => BankMisfit::Declared { path },
                    kind => BankMisfit::Kind { path, kind },
                });
            };
            let (found, expected) = (rotation.sizes().span(), self.span(place)?);
            (found != expected).then_some(BankMisfit::Span {
                path,
                found,
                expected,
            })
        });
        let saved = tensors.keys().filter(|path| !biases.contains(path));
        let saved = saved.map(|path| BankMisfit::Saved { path: path.clone() });
        let mut misfits: Vec<_> = layers.chain(saved).collect();
        misfits.sort_by_cached_key(BankMisfit::to_string);
        misfits
    }

    /// The span of a layer in the adapters that are there; none if none of them rotates it.
    fn span(&self, layer: usize) -> Option<usize> {
        let parts = self
            .adapters
            .values()
            .filter_map(|parts| parts[layer].as_ref());
        let mut rotations = parts.filter_map(|part| part.rotation.as_ref());
        rotations.next().map(|rotation| rotation.dims()[1])
    }
}

impl Layer {
    /// The numbers of an adapter for this layer, on its device.
    fn part(&self, rotated: Option<(Rotation, Values)>, bias: Option<TensorData>) -> Part {
        let Self { device, dtype, .. } = self;
        let vector = |data, dtype: DType| Tensor::<1>::from_data(data, (device, dtype));
        // The numbers live as long as the bank, so they do not belong into the memory pools for activations.
        device.memory_persistent_allocations((rotated, bias), |(rotated, bias)| {
            let bias = bias.zip(self.bias).map(|(data, dtype)| vector(data, dtype));
            let Some((rotation, Values { skew, scale })) = rotated else {
                return Part {
                    rotation: None,
                    scale: None,
                    bias,
                };
            };
            let skew = Tensor::<3>::from_data(skew, (device, *dtype));
            Part {
                rotation: Some(rotation.blocks(skew).spans()),
                scale: scale.map(|scale| vector(scale, *dtype)),
                bias,
            }
        })
    }
}

/// The path of the bias of the layer at a path.
fn bias_of(path: &str) -> String {
    super::join(path, "bias")
}
