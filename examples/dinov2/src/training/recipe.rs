//! How a model is trained: everything that is chosen and not measured.

/// The numbers of a training run.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `epochs` | 20 | passes over the training images | 1 or more |
/// | `batch_size` | 32 | images per optimizer step | 1 or more |
/// | `accumulate` | 1 | parts that a batch is computed in, one after the other, to save memory | 1 to `batch_size` |
/// | `max_steps` | none | ends the run after so many optimizer steps | 1 or more |
/// | `learning_rate` | by method and width | peak rate of the adapter and of everything else but the head | above 0, at most 1 |
/// | `head_learning_rate` | by width | peak rate of the head | above 0, at most 1 |
/// | `warm_up` | 0.1 | share of the steps in which the rate rises from 0 to its peak | 0 to below 1 |
/// | `weight_decay` | 0.02 | decay of matrices; scale, biases and norms have none | 0 or more |
/// | `clip_norm` | 1 | largest norm of all gradients together; 0 for no limit | 0 or more |
/// | `label_smoothing` | 0 | share of the target that is spread over all classes | 0 to below 1 |
/// | `patience` | none | epochs without a lower validation loss after which the run ends | 1 or more |
/// | `seed` | 0 | fixes the split, the new head, the order of images, augmentation and dropout | |
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub epochs: usize,
    pub batch_size: usize,
    pub accumulate: usize,
    pub max_steps: Option<usize>,
    pub learning_rate: f64,
    pub head_learning_rate: f64,
    pub warm_up: f64,
    pub weight_decay: f64,
    pub clip_norm: f64,
    pub label_smoothing: f32,
    pub patience: Option<usize>,
    pub seed: u64,
}

impl Recipe {
    /// The optimizer steps of one epoch over so many images.
    pub fn steps_per_epoch(&self, images: usize) -> usize {
        images.div_ceil(self.batch_size)
    }

    /// The optimizer steps of the whole run.
    pub fn steps(&self, images: usize) -> usize {
        let all = self.epochs * self.steps_per_epoch(images);
        self.max_steps.map_or(all, |limit| all.min(limit))
    }

    /// The epochs that the run needs for its steps. The last one may be short.
    pub fn epochs_needed(&self, images: usize) -> usize {
        self.steps(images).div_ceil(self.steps_per_epoch(images))
    }

    /// The images that a step limit lets the run see at most. It does not evaluate on more.
    pub fn images_at_most(&self) -> Option<usize> {
        self.max_steps.map(|steps| steps * self.batch_size)
    }

    /// Images that pass through the model at a time.
    pub fn part_size(&self) -> usize {
        self.batch_size.div_ceil(self.accumulate)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn recipe() -> Recipe {
        Recipe {
            epochs: 5,
            batch_size: 10,
            accumulate: 1,
            max_steps: None,
            learning_rate: 1e-3,
            head_learning_rate: 1e-3,
            warm_up: 0.1,
            weight_decay: 0.02,
            clip_norm: 1.0,
            label_smoothing: 0.0,
            patience: None,
            seed: 0,
        }
    }

    #[test]
    fn a_step_limit_ends_the_run_within_an_epoch() {
        let limited = |max_steps| Recipe {
            max_steps,
            ..recipe()
        };
        assert_eq!(limited(None).steps(95), 50);
        assert_eq!(limited(Some(29)).steps(95), 29);
        assert_eq!(limited(Some(29)).epochs_needed(95), 3);
        assert_eq!(limited(Some(1000)).epochs_needed(95), 5);
    }

    #[test]
    fn a_batch_is_computed_in_parts_of_nearly_equal_size() {
        let parts = |accumulate| Recipe {
            accumulate,
            ..recipe()
        };
        assert_eq!(parts(1).part_size(), 10);
        assert_eq!(parts(3).part_size(), 4);
        assert_eq!(parts(10).part_size(), 1);
    }
}
