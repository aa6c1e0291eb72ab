//! One run: a method, a learning rate and a seed.

use std::fmt::{self, Display, Formatter};

use burn::module::{Module, Param, ParamGroup};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor};
use burn_boft::summary;
use dinov2::method::HEAD;
use dinov2::model::Dinov2ForImageClassification;
use dinov2::weights::Checkpoint;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Loss;
use crate::digits::{Digits, Part};
use crate::method::{Bits, Method};

/// Images of a training step.
const BATCH: usize = 32;
/// Steps between two measured losses.
const EVERY: usize = 25;
/// The learning rate of the head, which is that of the linear probe in the DINOv2 example.
const HEAD_RATE: f64 = 1e-2;

/// What a run is.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    pub bits: Bits,
    pub method: Method,
    /// The learning rate of the adapter, the same at every step.
    pub rate: f64,
    pub seed: u64,
    pub steps: usize,
}

impl Training {
    /// Whether a loss is one of this run.
    pub fn is_of(&self, loss: &Loss) -> bool {
        (self.bits, self.method, self.seed) == (loss.bits, loss.method, loss.seed)
            && self.rate == loss.rate
            && loss.step <= self.steps
    }

    /// Trains with Adam and measures every [`EVERY`] steps, at the start, and at the end.
    pub fn run(self, digits: &Digits) -> Result<Vec<Loss>, String> {
        let (mut model, trained) = self.model(digits)?;
        let mut optimizer = AdamConfig::new().with_epsilon(1e-8).init();
        let mut rates = ModuleLrScheduler::new(self.rate)
            .with_group(ParamGroup::from_predicate(HEAD), HEAD_RATE);
        let mut order = Order::new(digits.train.len(), self.seed);
        let mut losses = vec![self.measure(&model, digits, trained, 0)];
        for step in 1..=self.steps {
            let batch = digits.train.select(&order.take(BATCH));
            let logits = model.forward(Tensor::from_inner(batch.pixels));
            let gradients = cross_entropy(logits, Tensor::from_inner(batch.labels)).backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(rates.step(), model, gradients);
            if step % EVERY == 0 || step == self.steps {
                losses.push(self.measure(&model, digits, trained, step));
            }
        }
        Ok(losses)
    }

    /// The model before the first step, and how many numbers its adapter has.
    fn model(self, digits: &Digits) -> Result<(Dinov2ForImageClassification, usize), String> {
        let device = Device::flex().autodiff();
        // One sequence of random numbers for the head and one for the adapter, so that all methods have the same head.
        device.seed(2 * self.seed);
        let (model, _) = Checkpoint::embedded()
            .load(&digits.classes, &device)
            .map_err(|error| error.to_string())?;
        // Burn draws the random numbers of a parameter when it is first read.
        model.classifier.weight.val();
        model.classifier.bias.as_ref().map(Param::val);
        let head = model.classifier.num_params();
        device.seed(2 * self.seed + 1);
        let model = self.method.prepare(model, self.bits)?;
        let trained = summary(&model).trainable - head;
        Ok((model, trained))
    }

    fn measure(
        self,
        model: &Dinov2ForImageClassification,
        digits: &Digits,
        trained: usize,
        step: usize,
    ) -> Loss {
        let model = model.valid();
        let score = |part: &Part| score(model.forward(part.pixels.clone()), &part.labels);
        let ([train, _], [valid, _]) = (score(&digits.train), score(&digits.valid));
        let [test, accuracy] = score(&digits.test);
        Loss {
            bits: self.bits,
            method: self.method,
            trained,
            rate: self.rate,
            seed: self.seed,
            step,
            train,
            valid,
            test,
            accuracy,
        }
    }
}

impl Display for Training {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            bits,
            method,
            rate,
            seed,
            ..
        } = self;
        write!(f, "{bits}, {method}, rate {rate:e}, seed {seed}")
    }
}

fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    let loss = CrossEntropyLossConfig::new().init(&logits.device());
    loss.forward(logits, labels)
}

/// The mean loss of logits, and the share of them that is right.
fn score(logits: Tensor<2>, labels: &Tensor<1, Int>) -> [f64; 2] {
    let loss = cross_entropy(logits.clone(), labels.clone());
    let answers: Tensor<1, Int> = logits.argmax(1).squeeze_dim(1);
    let right = answers.equal(labels.clone()).float().mean();
    [loss.into_scalar::<f64>(), right.into_scalar::<f64>()]
}

/// The order of the images: each once, shuffled, and then again in another order.
struct Order {
    rng: StdRng,
    images: Vec<usize>,
    next: usize,
}

impl Order {
    fn new(count: usize, seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            images: (0..count).collect(),
            next: count,
        }
    }

    fn take(&mut self, count: usize) -> Vec<usize> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            if self.next == self.images.len() {
                self.images.shuffle(&mut self.rng);
                self.next = 0;
            }
            taken.push(self.images[self.next]);
            self.next += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// Burn's random numbers come from one sequence, which runs at the same time would share.
    static RANDOM: Mutex<()> = Mutex::new(());

    fn run(method: Method, bits: Bits) -> Vec<Loss> {
        let training = Training {
            bits,
            method,
            rate: 1e-2,
            seed: 3,
            steps: 25,
        };
        let _alone = RANDOM.lock().unwrap_or_else(PoisonError::into_inner);
        training.run(&Digits::new()).unwrap()
    }

    #[test]
    fn methods_start_from_the_same_packed_model_and_lower_its_loss() {
        for bits in Bits::ALL {
            let runs = Method::ALL.map(|method| run(method, bits));
            for losses in &runs {
                let [start, end] = [&losses[0], &losses[1]];
                assert_eq!([start.step, end.step], [0, 25]);
                let off = (start.train - runs[0][0].train).abs();
                assert!(off < 1e-4 * start.train, "{}: {off}", start.method);
                assert!(end.train < 0.8 * start.train, "{start:?} {end:?}");
            }
            let trained: Vec<_> = runs.iter().map(|losses| losses[0].trained).collect();
            assert_eq!(trained, [0, 9216, 8064, 9216, 9216]);
        }
        let start = |bits| run(Method::Boft, bits)[0].train;
        assert_ne!(start(Bits::Eight), start(Bits::Four));
    }

    #[test]
    fn a_loss_in_a_file_is_read_as_it_was_measured() {
        for loss in run(Method::LoraAsInPeft, Bits::Eight) {
            let line = crate::line(&loss);
            assert_eq!(serde_json::from_str::<Loss>(&line).unwrap(), loss);
        }
        assert!(serde_json::from_str::<Bits>("\"3 bits\"").is_err());
    }

    #[test]
    fn a_seed_fixes_a_run() {
        let lora = run(Method::LoraAsInPeft, Bits::Four);
        assert_eq!(lora, run(Method::LoraAsInPeft, Bits::Four));
    }

    #[test]
    fn every_image_comes_once_before_any_comes_again() {
        let mut order = Order::new(10, 1);
        let mut first = [order.take(4), order.take(4), order.take(2)].concat();
        let shuffled = first.clone();
        first.sort();
        assert_eq!(first, (0..10).collect::<Vec<_>>());
        assert_ne!(shuffled, first);
        assert_ne!(order.take(10), shuffled);
    }
}
