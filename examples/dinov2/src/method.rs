//! The ways to adapt a model, and which of its numbers each one trains.

use std::collections::BTreeSet;
use std::fmt;

use burn::module::{Lora, Module, ModuleMapper, Param, ParamGroup};
use burn::prelude::*;
use burn::tensor::{DType, Distribution};
use burn_boft::model::{InjectError, MergeError, Summary};
use burn_boft::{AdapterConfig, Bias, BoftConfig, Cayley, OftConfig, inject, merge};
use serde::{Deserialize, Serialize};

use crate::model::Dinov2ForImageClassification;

/// The projections of a transformer layer, by the ends of their paths, of every model but the giant one.
pub const PROJECTIONS: [&str; 6] = [
    "query",
    "key",
    "value",
    "output.dense",
    "mlp.fc1",
    "mlp.fc2",
];
/// The same of every model. The MLP of the giant one has other names than the rest.
const TARGETS: [&str; 8] = {
    let [query, key, value, output, fc1, fc2] = PROJECTIONS;
    let [weights_in, weights_out] = ["mlp.weights_in", "mlp.weights_out"];
    [query, key, value, output, fc1, fc2, weights_in, weights_out]
};
/// The head: always trained, always saved.
pub const HEAD: &str = "classifier";

/// A way to adapt a model. All of them train the head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "name",
    rename_all = "lowercase",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Method {
    /// Nothing but the head is trained: a linear probe.
    Linear,
    /// LoRA: low-rank updates, by Burn's own implementation.
    Lora { rank: usize },
    /// OFT: rotations by blocks on the diagonal.
    Oft {
        block_size: usize,
        /// How numbers become rotations: exactly, or by PEFT's polynomial.
        cayley: Cayley,
    },
    /// BOFT: products of such rotations that reach further and further, a butterfly.
    Boft {
        block_size: usize,
        factors: usize,
        dropout: f64,
    },
    /// Every number of the model is trained: full fine-tuning.
    Full,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear => write!(f, "linear probe"),
            Self::Lora { rank } => write!(f, "LoRA r={rank}"),
            Self::Oft { block_size, cayley } => match cayley {
                Cayley::Exact => write!(f, "OFT b={block_size}"),
                Cayley::Neumann { terms } => write!(f, "OFT b={block_size} Neumann {terms}"),
                other => write!(f, "OFT b={block_size} {other}"),
            },
            Self::Boft {
                block_size,
                factors,
                ..
            } => write!(f, "BOFT b={block_size} m={factors}"),
            Self::Full => write!(f, "full"),
        }
    }
}

impl Method {
    /// OFT through the exact Cayley map.
    pub fn oft(block_size: usize) -> Self {
        Self::Oft {
            block_size,
            cayley: Cayley::Exact,
        }
    }

    /// A learning rate that serves models with tokens of this width.
    ///
    /// The wider a model is, the more a step of the same size changes what a layer returns, so the rates fall with the
    /// width. They were found on the digits (width 64) and on photographs (width 384).
    pub fn learning_rate(&self, width: usize) -> f64 {
        let width = width as f64 / 64.0;
        match self {
            Self::Linear => 1e-2 / width.sqrt(),
            Self::Lora { .. } => 1e-2 / width,
            Self::Oft { .. } | Self::Boft { .. } => 1e-2 / width,
            Self::Full => 1e-3 / (width * width),
        }
    }

    /// Prepares a model for training. What the method adapts and the head are trainable, and everything else is frozen.
    /// Methods with adapters also train the biases of the layers that they adapt, in a model of single precision.
    ///
    /// # Errors
    ///
    /// The adapter's sizes do not fit the model.
    pub fn prepare(
        &self,
        model: Dinov2ForImageClassification,
    ) -> Result<Dinov2ForImageClassification, InjectError> {
        Ok(match self {
            Self::Linear => model
                .freeze()
                .unfreeze_group(ParamGroup::from_predicate(HEAD)),
            Self::Lora { rank } => {
                let targets = TARGETS.map(|target| format!("{target}.weight"));
                let biases = TARGETS.map(|target| format!("{target}.bias"));
                let lora = Lora::new(*rank, 2.0 * *rank as f64)
                    .set_param_group(ParamGroup::from_any_predicates(targets.to_vec()));
                model
                    .apply_lora(lora)
                    .map(&mut KaimingUniform::default())
                    .unfreeze_group(ParamGroup::from_any_predicates(biases.to_vec()))
                    .unfreeze_group(ParamGroup::from_predicate(HEAD))
            }
            Self::Oft { .. } | Self::Boft { .. } => {
                // The optimizer's moments of a bias in half precision would vanish.
                let bias = match model.dinov2.dtype() {
                    DType::F32 => Bias::AdapterOnly,
                    _ => Bias::None,
                };
                match self.adapter(bias) {
                    Some(config) => inject(model, config)?,
                    None => model,
                }
            }
            Self::Full => model.unfreeze(),
        })
    }

    /// The settings of the adapter, for BOFT and OFT.
    fn adapter(&self, bias: Bias) -> Option<AdapterConfig> {
        match self {
            Self::Oft { block_size, cayley } => {
                let config = OftConfig::new()
                    .with_block_size(*block_size)
                    .with_cayley(*cayley)
                    .with_target_modules(TARGETS)
                    // The names of both kinds of MLP, of which a model has one.
                    .with_absent_targets_allowed(true)
                    .with_bias(bias)
                    .with_modules_to_save([HEAD]);
                Some(config.into())
            }
            Self::Boft {
                block_size,
                factors,
                dropout,
            } => {
                let config = BoftConfig::new()
                    .with_block_size(*block_size)
                    .with_n_butterfly_factor(*factors)
                    .with_target_modules(TARGETS)
                    // The names of both kinds of MLP, of which a model has one.
                    .with_absent_targets_allowed(true)
                    .with_dropout(*dropout)
                    .with_bias(bias)
                    .with_modules_to_save([HEAD]);
                Some(config.into())
            }
            Self::Linear | Self::Lora { .. } | Self::Full => None,
        }
    }

    /// Says which block sizes OFT uses where the requested one does not divide a layer, as PEFT does.
    pub fn adjusted(&self, sizes: &Summary) -> Option<String> {
        let Self::Oft { block_size, .. } = self else {
            return None;
        };
        let layers = sizes
            .layers
            .iter()
            .map(|layer| layer.butterfly.block_size());
        let taken: BTreeSet<usize> = layers.filter(|size| size != block_size).collect();
        let taken: Vec<String> = taken.iter().map(usize::to_string).collect();
        (!taken.is_empty()).then(|| {
            format!(
                "block size {block_size} does not divide every layer; there OFT takes {}",
                taken.join(" or ")
            )
        })
    }

    /// The same model with plain weights; none if the method adds no adapter.
    pub fn merged(
        &self,
        model: Dinov2ForImageClassification,
    ) -> Result<Option<Dinov2ForImageClassification>, MergeError> {
        Ok(match self {
            Self::Oft { .. } | Self::Boft { .. } => Some(merge(model)?),
            Self::Lora { .. } => Some(model.materialize()),
            Self::Linear | Self::Full => None,
        })
    }
}

/// Starts the first factor of every LoRA as PEFT does: uniform with `a = √5` in Kaiming's formula, which is within
/// `±1/√d_input`. Burn starts it with a standard deviation of `1/rank`, many times as large.
#[derive(Default)]
pub struct KaimingUniform {
    path: Vec<(String, String)>,
}

impl ModuleMapper for KaimingUniform {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_string(), container.to_string()));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let in_lora = self
            .path
            .iter()
            .any(|(_, container)| container == "Struct:LoraAdapter");
        let first = self.path.last().is_some_and(|(name, _)| name == "a");
        if !(in_lora && first) {
            return param;
        }
        param.map(|factor| {
            let bound = (factor.dims()[0] as f64).powf(-0.5);
            let uniform = Distribution::Uniform(-bound, bound);
            let options = (&factor.device(), factor.dtype());
            Tensor::random(factor.shape(), uniform, options).require_grad()
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::module::LoraAdapter;

    use super::*;
    use crate::device::Precision;
    use crate::precision::cast;
    use crate::weights::Checkpoint;

    fn model() -> Dinov2ForImageClassification {
        let device = Device::flex().autodiff();
        let classes = ["a", "b", "c"].map(str::to_string);
        let (model, _) = Checkpoint::embedded().load(&classes, &device).unwrap();
        model
    }

    #[test]
    fn lora_starts_as_in_peft() {
        let model = Method::Lora { rank: 4 }.prepare(model()).unwrap();
        let mlp = &model.dinov2.encoder.layer[1].mlp;
        for (layer, d_input) in [(&mlp.fc1, 64.0f64), (&mlp.fc2, 256.0)] {
            let weight = &layer.as_ref().unwrap().weight;
            let lora = weight.reparameterization::<LoraAdapter>().unwrap();
            let bound = d_input.powf(-0.5);
            let a: Vec<f64> = lora.a.val().into_data().iter::<f64>().collect();
            let largest = a.iter().copied().map(f64::abs).fold(0.0, f64::max);
            assert!((0.9 * bound..bound).contains(&largest), "{largest} {bound}");
            let mean_square = a.iter().map(|x| x * x).sum::<f64>() / a.len() as f64;
            let uniform = bound * bound / 3.0;
            assert!(
                (mean_square / uniform - 1.0).abs() < 0.3,
                "{mean_square} {uniform}"
            );
            assert_eq!(lora.b.val().abs().max().into_scalar::<f32>(), 0.0);
            assert!(lora.a.is_require_grad() && !weight.is_require_grad());
        }
    }

    #[test]
    fn the_rate_falls_with_the_width_of_the_model() {
        let boft = Method::Boft {
            block_size: 4,
            factors: 2,
            dropout: 0.1,
        };
        for method in [Method::Linear, Method::Lora { rank: 2 }, boft, Method::Full] {
            assert!(method.learning_rate(384) < method.learning_rate(64));
        }
    }

    #[test]
    fn biases_in_half_precision_are_frozen() {
        let bias = |model: &Dinov2ForImageClassification| {
            let query = &model.dinov2.encoder.layer[0].attention.attention.query;
            query.bias.as_ref().unwrap().is_require_grad()
        };
        let full = Method::oft(8).prepare(model()).unwrap();
        assert!(bias(&full));
        let half = Method::oft(8)
            .prepare(cast(model(), Precision::Bf16))
            .unwrap();
        assert!(!bias(&half));
        assert_eq!(half.dinov2.dtype(), DType::BF16);
        assert_eq!(half.classifier.weight.base().dtype(), DType::F32);
    }
}
