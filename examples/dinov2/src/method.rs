//! The ways to adapt a model, and which of its numbers each one trains.

use std::collections::BTreeSet;
use std::fmt;

use burn::module::{Lora, Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::prelude::*;
use burn_boft::model::Summary;
use burn_boft::{AdapterConfig, Bias, BoftConfig, OftConfig, inject, merge};

use crate::error::Error;
use crate::model::Dinov2ForImageClassification;

/// The projections of every transformer layer, by the ends of their paths. The MLP of the giant model has other names
/// than the rest.
const TARGETS: [&str; 8] = [
    "query",
    "key",
    "value",
    "output.dense",
    "mlp.fc1",
    "mlp.fc2",
    "mlp.weights_in",
    "mlp.weights_out",
];
/// The head: always trained, always saved.
const HEAD: &str = "classifier";

/// A way to adapt a model. All of them train the head.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// Nothing but the head is trained: a linear probe.
    Linear,
    /// LoRA: low-rank updates, by Burn's own implementation.
    Lora { rank: usize },
    /// OFT: rotations by blocks on the diagonal.
    Oft { block_size: usize },
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
            Self::Oft { block_size } => write!(f, "OFT b={block_size}"),
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
    /// The learning rate that did best on validation data of the digits.
    pub fn learning_rate(&self) -> f64 {
        match self {
            Self::Linear => 3e-2,
            Self::Lora { .. } => 1e-2,
            Self::Oft { .. } => 1e-2,
            Self::Boft { .. } => 1e-2,
            Self::Full => 1e-3,
        }
    }

    /// Prepares a model for training. What the method adapts and the head are trainable, and everything else is frozen.
    /// Methods with adapters also train the biases of the layers that they adapt.
    ///
    /// # Errors
    ///
    /// The adapter's sizes do not fit the model.
    pub fn prepare(
        &self,
        model: Dinov2ForImageClassification,
    ) -> Result<Dinov2ForImageClassification, Error> {
        Ok(match self {
            Self::Linear => model
                .freeze()
                .unfreeze_group(ParamGroup::from_predicate(HEAD)),
            Self::Lora { rank } => {
                let targets = TARGETS.map(|target| format!("{target}.weight"));
                let biases = TARGETS.map(|target| format!("{target}.bias"));
                model
                    .apply_lora(
                        Lora::new(*rank, 2.0 * *rank as f64)
                            .set_param_group(ParamGroup::from_any_predicates(targets.to_vec())),
                    )
                    .unfreeze_group(ParamGroup::from_any_predicates(biases.to_vec()))
                    .unfreeze_group(ParamGroup::from_predicate(HEAD))
            }
            Self::Oft { .. } | Self::Boft { .. } => match self.adapter() {
                Some(config) => inject(model, config)?,
                None => model,
            },
            Self::Full => model.unfreeze(),
        })
    }

    /// The settings of the adapter, for BOFT and OFT.
    pub fn adapter(&self) -> Option<AdapterConfig> {
        match self {
            Self::Oft { block_size } => {
                let config = OftConfig::new()
                    .with_block_size(*block_size)
                    .with_target_modules(TARGETS)
                    // The names of both kinds of MLP, of which a model has one.
                    .with_absent_targets_allowed(true)
                    .with_bias(Bias::AdapterOnly)
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
                    .with_bias(Bias::AdapterOnly)
                    .with_modules_to_save([HEAD]);
                Some(config.into())
            }
            Self::Linear | Self::Lora { .. } | Self::Full => None,
        }
    }

    /// Says which block sizes OFT uses where the requested one does not divide a layer, as PEFT does.
    pub fn adjusted(&self, sizes: &Summary) -> Option<String> {
        let Self::Oft { block_size } = self else {
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
    ) -> Result<Option<Dinov2ForImageClassification>, Error> {
        Ok(match self {
            Self::Oft { .. } | Self::Boft { .. } => Some(merge(model)?),
            Self::Lora { .. } => Some(model.materialize()),
            Self::Linear | Self::Full => None,
        })
    }
}

/// The parameters that training would change.
pub fn trainable<M: Module>(model: &M) -> ParamGroup {
    #[derive(Default)]
    struct Trainable(Vec<ParamId>);

    impl ModuleVisitor for Trainable {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.is_require_grad() {
                self.0.push(param.id);
            }
        }
    }

    let mut found = Trainable::default();
    model.visit(&mut found);
    ParamGroup::from_ids(found.0)
}
