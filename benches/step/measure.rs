//! Measures the time and the memory of steps.

use std::alloc::System;
use std::time::Instant;

use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAlloc, PeakMemAllocTrait};
use serde::Serialize;

use crate::method::Step;

/// Counts the memory, and leaves everything else to the allocator of the system: one that clears memory itself would cost every
/// step time that it does not take in a program.
#[global_allocator]
static MEMORY: &PeakMemAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The measurements of one method.
#[derive(Debug, Serialize)]
pub struct Row {
    pub case: String,
    pub backend: &'static str,
    pub device: String,
    pub dtype: String,
    pub method: String,
    pub median_ms: f64,
    pub min_ms: f64,
    pub max_ms: f64,
    /// The time of the first call, which allocates memory, and tunes kernels on a GPU; none if another process made it.
    pub cold_ms: Option<f64>,
    pub ratio_to_frozen: Option<f64>,
    /// The most memory that a step adds to what the models hold; none if this process cannot count it, as on
    /// a GPU or in another process.
    pub peak_mib: Option<f64>,
    /// Numbers that are trained; none if the model is in another process.
    pub trainable: Option<usize>,
    /// Requests that are served in a second; none if the case is not about serving.
    pub requests_per_s: Option<f64>,
}

/// The times of one method, in milliseconds, and its memory.
#[derive(Default)]
pub struct Times {
    pub cold: Option<f64>,
    pub warm: Vec<f64>,
    pub peak_mib: Option<f64>,
}

impl Times {
    /// Runs the first call, and a second one that measures memory.
    pub fn start(step: &mut Step) -> Self {
        let cold = time(step);
        MEMORY.reset_peak_memory();
        (step.run)();
        let peak = MEMORY.get_peak_memory();
        Self {
            cold: Some(cold),
            warm: Vec::new(),
            peak_mib: Some(peak as f64 / f64::from(1 << 20)),
        }
    }

    pub fn median(&self) -> f64 {
        let mut times = self.warm.clone();
        times.sort_by(f64::total_cmp);
        let middle = times.len() / 2;
        match times.len() % 2 {
            0 => (times[middle - 1] + times[middle]) / 2.0,
            _ => times[middle],
        }
    }

    pub fn min(&self) -> f64 {
        self.warm.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub fn max(&self) -> f64 {
        self.warm.iter().copied().fold(0.0, f64::max)
    }
}

/// The milliseconds of one step, until the device has finished.
pub fn time(step: &mut Step) -> f64 {
    let start = Instant::now();
    (step.run)();
    start.elapsed().as_secs_f64() * 1e3
}
