//! The optimizer and the learning rates of a run.

use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;

use super::recipe::Recipe;
use super::schedule::WarmUpCosine;
use crate::method::HEAD;

/// AdamW with the moments and the epsilon of PyTorch. Matrices decay; vectors, which are scales, biases and norms, do not.
pub fn optimizer<M: Module>(recipe: &Recipe, model: &M) -> ModuleOptimizer {
    let adamw = |decay: f32| {
        AdamWConfig::new()
            .with_beta_1(0.9)
            .with_beta_2(0.999)
            .with_epsilon(1e-8)
            .with_weight_decay(decay)
    };
    let decaying = adamw(recipe.weight_decay as f32).init();
    decaying.with_group(vectors(model), adamw(0.0).build(), None)
}

/// The learning rates over so many steps: one schedule for the head, one for everything else.
pub fn schedule(recipe: &Recipe, steps: usize) -> ModuleLrScheduler {
    let rate = |peak| WarmUpCosine::new(peak, recipe.warm_up, steps);
    let head = ParamGroup::from_predicate(HEAD);
    ModuleLrScheduler::new(rate(recipe.learning_rate))
        .with_group(head, rate(recipe.head_learning_rate))
}

/// The parameters with one axis.
fn vectors<M: Module>(model: &M) -> ParamGroup {
    #[derive(Default)]
    struct Vectors(Vec<ParamId>);

    impl ModuleVisitor for Vectors {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if D == 1 {
                self.0.push(param.id);
            }
        }
    }

    let mut vectors = Vectors::default();
    model.visit(&mut vectors);
    ParamGroup::from_ids(vectors.0)
}
