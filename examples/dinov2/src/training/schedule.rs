//! The learning rate over a run: a linear warm-up, then half a cosine down to zero.

use burn::optim::LearningRate;
use burn::optim::lr_scheduler::{LrScheduler, LrSchedulerRecord};

/// Where the number of steps done is kept in a checkpoint.
const STEP: &str = "step";

/// Rises from zero to the peak in the first steps, and falls to zero along a cosine in the rest.
#[derive(Clone, Debug)]
pub struct WarmUpCosine {
    peak: LearningRate,
    warm_up: usize,
    steps: usize,
    done: usize,
}

impl WarmUpCosine {
    /// A schedule for so many steps, of which the first `warm_up` share rises.
    pub fn new(peak: LearningRate, warm_up: f64, steps: usize) -> Self {
        Self {
            peak,
            warm_up: (warm_up * steps as f64).round() as usize,
            steps,
            done: 0,
        }
    }

    /// The rate of a step; the first step is 0.
    fn rate(&self, step: usize) -> LearningRate {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        let rest = (self.steps - self.warm_up).max(1) as f64;
        let done = ((step - self.warm_up) as f64 / rest).min(1.0);
        0.5 * self.peak * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

impl LrScheduler for WarmUpCosine {
    fn step(&mut self) -> LearningRate {
        let rate = self.rate(self.done);
        self.done += 1;
        rate
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar(STEP, self.done)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        if let Some(done) = record.scalar(STEP) {
            self.done = done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_to_zero() {
        let mut schedule = WarmUpCosine::new(0.4, 0.2, 10);
        let rates: Vec<f64> = (0..10).map(|_| schedule.step()).collect();
        assert_eq!(rates[..3], [0.2, 0.4, 0.4]);
        assert!((rates[6] - 0.2).abs() < 1e-12, "{rates:?}");
        assert!(rates[3..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!(rates[9] > 0.0 && schedule.step() < 1e-12);
    }

    #[test]
    fn without_warm_up_the_first_step_has_the_peak() {
        assert_eq!(WarmUpCosine::new(0.1, 0.0, 5).step(), 0.1);
        assert_eq!(WarmUpCosine::new(0.1, 0.1, 1).step(), 0.1);
    }

    #[test]
    fn a_record_continues_the_schedule() {
        let mut first = WarmUpCosine::new(0.1, 0.1, 30);
        for _ in 0..7 {
            first.step();
        }
        let mut second = WarmUpCosine::new(0.1, 0.1, 30);
        second.load_record(first.to_record());
        assert_eq!(first.step(), second.step());
    }
}
