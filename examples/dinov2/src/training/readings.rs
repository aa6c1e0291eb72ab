//! What a run shows beside loss and accuracy: how fast it is, how much memory it takes, and how far it has rotated.

use std::marker::PhantomData;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, ExecutionError, TensorReadError};
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    AccuracyInput, Adaptor, LossInput, Metric, MetricAttributes, MetricMetadata, MetricName,
    Numeric, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn::train::{ClassificationOutput, ItemLazy};
use burn_boft::Adapter;
use peakmem_alloc::{INSTRUMENTED_SYSTEM, PeakMemAllocTrait};

/// What a step tells the metrics.
pub struct StepOutput {
    /// Loss, logits and classes.
    pub classification: ClassificationOutput,
    /// The speed of the step before; none at the first.
    pub speed: Option<f64>,
    /// The rotations, which are measured once per epoch.
    pub rotations: Option<Rotations>,
}

/// How far the rotations of a model have gone, and how orthogonal they still are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotations {
    /// The largest orthogonality defect, `max|RᵀR − I|`.
    pub defect: f64,
    /// The largest angle by which a block turns a plane, in radians.
    pub angle: f64,
}

impl Rotations {
    /// Measures the rotations of a model, if it has any. The hyperspherical energies, which cost more than an epoch of a
    /// small data set, are left to the report.
    pub fn of<M: Module>(model: &M) -> Option<Self> {
        let adapter = Adapter::extract(model).ok()?;
        let layers = adapter.measure(&Device::flex());
        layers
            .iter()
            .map(|layer| Self {
                defect: layer.orthogonality_defect,
                angle: layer.largest_angle,
            })
            .reduce(|a, b| Self {
                defect: larger(a.defect, b.defect),
                angle: larger(a.angle, b.angle),
            })
    }
}

/// The larger number; not a number if one is not.
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

impl From<ClassificationOutput> for StepOutput {
    fn from(classification: ClassificationOutput) -> Self {
        Self {
            classification,
            speed: None,
            rotations: None,
        }
    }
}

impl ItemLazy for StepOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self {
            classification: self.classification.sync()?,
            ..self
        })
    }
}

impl Adaptor<AccuracyInput> for StepOutput {
    fn adapt(&self) -> AccuracyInput {
        self.classification.adapt()
    }
}

impl Adaptor<LossInput> for StepOutput {
    fn adapt(&self) -> LossInput {
        self.classification.adapt()
    }
}

/// A number that a step may carry, and how it is shown.
pub trait Reading: Clone + Send + Sync + 'static {
    const NAME: &'static str;
    const UNIT: Option<&'static str>;
    const HIGHER_IS_BETTER: bool;

    fn value(&self) -> Option<f64>;
}

/// Images per second.
#[derive(Clone, Debug)]
pub struct Speed(Option<f64>);

impl Reading for Speed {
    const NAME: &'static str = "Images per second";
    const UNIT: Option<&'static str> = None;
    const HIGHER_IS_BETTER: bool = true;

    fn value(&self) -> Option<f64> {
        self.0
    }
}

impl Adaptor<Speed> for StepOutput {
    fn adapt(&self) -> Speed {
        Speed(self.speed)
    }
}

/// The most memory that the program has held at a time, without that of other processors.
#[derive(Clone, Debug)]
pub struct PeakMemory;

impl Reading for PeakMemory {
    const NAME: &'static str = "Peak memory";
    const UNIT: Option<&'static str> = Some("MiB");
    const HIGHER_IS_BETTER: bool = false;

    fn value(&self) -> Option<f64> {
        let bytes = Some(INSTRUMENTED_SYSTEM.get_peak_memory()).filter(|bytes| *bytes > 0);
        bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))
    }
}

impl Adaptor<PeakMemory> for StepOutput {
    fn adapt(&self) -> PeakMemory {
        PeakMemory
    }
}

/// The largest orthogonality defect.
#[derive(Clone, Debug)]
pub struct Defect(Option<f64>);

impl Reading for Defect {
    const NAME: &'static str = "Orthogonality defect";
    const UNIT: Option<&'static str> = None;
    const HIGHER_IS_BETTER: bool = false;

    fn value(&self) -> Option<f64> {
        self.0
    }
}

impl Adaptor<Defect> for StepOutput {
    fn adapt(&self) -> Defect {
        Defect(self.rotations.map(|rotations| rotations.defect))
    }
}

/// The largest angle of rotation.
#[derive(Clone, Debug)]
pub struct Angle(Option<f64>);

impl Reading for Angle {
    const NAME: &'static str = "Largest angle";
    const UNIT: Option<&'static str> = Some("°");
    const HIGHER_IS_BETTER: bool = false;

    fn value(&self) -> Option<f64> {
        self.0
    }
}

impl Adaptor<Angle> for StepOutput {
    fn adapt(&self) -> Angle {
        Angle(self.rotations.map(|rotations| rotations.angle.to_degrees()))
    }
}

/// The metric of a reading: its latest value.
#[derive(Clone)]
pub struct Gauge<R> {
    name: MetricName,
    state: NumericMetricState,
    read: bool,
    reading: PhantomData<R>,
}

impl<R: Reading> Gauge<R> {
    pub fn new() -> Self {
        Self {
            name: Arc::new(R::NAME.to_string()),
            state: NumericMetricState::new(),
            read: false,
            reading: PhantomData,
        }
    }

    fn format(&self) -> FormatOptions {
        let format = FormatOptions::new(self.name.clone()).precision(2);
        match R::UNIT {
            Some(unit) => format.unit(unit),
            None => format,
        }
    }
}

impl<R: Reading> Metric for Gauge<R> {
    type Input = R;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: R::UNIT.map(str::to_string),
            higher_is_better: R::HIGHER_IS_BETTER,
        }
        .into()
    }

    fn update(
        &mut self,
        reading: &R,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        if let Some(value) = reading.value() {
            // The latest value stands for all before it.
            self.state.reset();
            self.state.update(value, 1);
            self.read = true;
        }
        self.compute()
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(match self.read {
            true => self.state.compute_final(self.format()),
            false => SerializedEntry::not_available(R::UNIT),
        })
    }

    fn clear(&mut self) {
        self.state.reset();
        self.read = false;
    }
}

impl<R: Reading> Numeric for Gauge<R> {
    fn value(&self) -> Option<NumericEntry> {
        self.read.then(|| self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        self.read.then(|| self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}
