//! [`BoftAdapter`]: the attached module.

use std::fmt::{self, Display, Formatter};

use burn::module::{
    Flag, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization, Reparameterizer,
};
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution as _, Normal};
use serde::{Deserialize, Serialize};

use crate::config::{AdapterConfig, Cayley, Init};
use crate::ops::{self, Base, Blocks, Direction, Pass, Side};
use crate::plan::{ButterflyPlan, LayerKind};

/// The orthogonal adapter of one weight.
///
/// `W' = R·W·diag(s)` with `R = F_{m−1} ··· F_1·F_0` from the packed skew-symmetric numbers. Attached by
/// [`inject`](crate::inject()); reached through
/// [`Param::reparameterization`](burn::module::Param::reparameterization).
///
/// Its parameters have the paths `<layer>.weight.boft.skew` and `<layer>.weight.boft.scale`.
#[derive(Module, Debug)]
pub struct BoftAdapter {
    // First, so that a traversal meets the settings before the numbers.
    settings: AdapterSettings,
    /// The strict upper triangles of `Q` row by row, a `[m, n, b(b−1)/2]` tensor (`n = 1` where one block
    /// is shared), in f32 or wider.
    skew: Param<Tensor<3>>,
    /// The scale per output channel, a `[d_output]` tensor.
    scale: Option<Param<Tensor<1>>>,
    /// Whether multiplicative dropout acts; follows `valid()`, `train()` and `freeze()`.
    training: Param<Flag>,
}

impl BoftAdapter {
    /// An adapter of these numbers, in f32 or wider.
    pub(crate) fn new(
        settings: AdapterSettings,
        values: Values,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let dtype = ops::widened(dtype);
        // The numbers live as long as the model: keep them out of the memory pools for activations.
        let (skew, scale) =
            device.memory_persistent_allocations(values, |Values { skew, scale }| {
                (
                    Param::from_tensor(Tensor::<3>::from_data(skew, (device, dtype))),
                    scale.map(|scale| {
                        Param::from_tensor(Tensor::<1>::from_data(scale, (device, dtype)))
                    }),
                )
            });
        Self {
            settings,
            skew,
            scale,
            training: Param::from_bool(true),
        }
    }

    /// The checked sizes of the rotation.
    pub fn butterfly(&self) -> ButterflyPlan {
        self.settings.butterfly()
    }

    /// The packed skew-symmetric numbers, a `[m, n, b(b−1)/2]` tensor.
    pub fn skew(&self) -> Tensor<3> {
        self.skew.val()
    }

    /// The scale per output channel, a `[d_output]` tensor.
    pub fn scale(&self) -> Option<Tensor<1>> {
        self.scale.as_ref().map(Param::val)
    }

    /// The blocks of the rotation as a forward pass uses them, multiplicative dropout included.
    pub fn blocks(&self) -> Blocks {
        let blocks = self.settings.blocks(self.skew.val());
        match self.dropped_blocks() {
            Some(mask) => blocks.replace_by_identity(mask),
            None => blocks,
        }
    }

    /// Rotates activations, `x·R`.
    ///
    /// # Shapes
    ///
    /// - input, result: `[…, d_input]`
    ///
    /// # Panics
    ///
    /// If the last axis is not `d_input`.
    pub fn rotate<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let shape = input.shape();
        let d_input = self.butterfly().d_input;
        assert_eq!(
            shape[D - 1],
            d_input,
            "rotate: the last axis of {shape:?} is not {d_input}"
        );
        let rows = shape.num_elements() / d_input;
        let rotated = self.blocks().rotate(
            input.reshape([rows, d_input]),
            Side::Right,
            Direction::Forward,
        );
        rotated.reshape(shape)
    }

    /// Applies the adapted linear layer, by the route that [`ops::route`] chooses.
    pub(crate) fn linear<const D: usize>(
        &self,
        input: Tensor<D>,
        base: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        let shape = base.dims();
        let tokens = input.shape().num_elements() / shape[0];
        let (pass, storage) = (Pass::on(&input.device()), Base::of(base.dtype()));
        let route = ops::route(tokens, shape, pass, storage);
        self.blocks().linear(input, base, self.scale(), bias, route)
    }

    /// `[m, n]` ones for the blocks that this step replaces by the identity.
    ///
    /// PEFT's rule: one factor drawn uniformly, `floor(p·n)` of its blocks drawn uniformly.
    fn dropped_blocks(&self) -> Option<Tensor<2>> {
        let plan = self.butterfly();
        let (m, n) = (plan.n_butterfly_factor, plan.block_num());
        let count = (self.settings.dropout * n as f64).floor() as usize;
        let skew = self.skew.val();
        let device = skew.device();
        if count == 0 || !self.training.is_enabled() || !device.is_autodiff() {
            return None;
        }
        let dtype = ops::widened(skew.dtype());
        let draw = |shape: [usize; 2]| {
            Tensor::<2>::random(shape, Distribution::Uniform(0.0, 1.0), (&device, dtype))
        };
        let factors = draw([m, 1]);
        let factor = factors
            .clone()
            .equal(factors.max_dim(0).expand([m, 1]))
            .float();
        // The rank of a block is how many drew less; it needs no sort, so nothing waits for the device.
        let blocks = draw([1, n]);
        let ranks = blocks
            .clone()
            .expand([n, n])
            .lower(blocks.transpose().expand([n, n]))
            .float();
        let dropped = ranks
            .sum_dim(1)
            .lower_elem(count as f64)
            .float()
            .transpose();
        Some((factor * dropped).cast(FloatDType::from(dtype)))
    }
}

impl Reparameterization for BoftAdapter {
    const NAME: &'static str = "boft";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let base = match base.dtype() {
            DType::QFloat(_) => base.dequantize(),
            _ => base,
        };
        let shape = base.shape();
        let ButterflyPlan {
            d_input, d_output, ..
        } = self.butterfly();
        let (matrix, side) = match self.settings.kind {
            LayerKind::Linear => ([d_input, d_output], Side::Left),
            LayerKind::Conv2d => ([d_output, d_input], Side::Right),
        };
        self.blocks()
            .weight(base.reshape(matrix), self.scale(), side)
            .reshape(shape)
    }
}

/// The numbers of an adapter on the host.
pub(crate) struct Values {
    /// `[m, n, b(b−1)/2]`.
    pub(crate) skew: TensorData,
    /// `[d_output]`.
    pub(crate) scale: Option<TensorData>,
}

impl Values {
    /// What the adapter of the layer at `path` starts from.
    pub(crate) fn initial(init: Init, path: &str, plan: ButterflyPlan, with_scale: bool) -> Self {
        let shape = plan.skew_shape();
        let (skew, scale) = (shape.iter().product(), plan.d_output);
        let (skew, scale) = match init {
            Init::Identity => (vec![0.0; skew], vec![1.0; scale]),
            Init::Random { seed } => {
                // FNV-1a, so that layers differ and no hasher of the platform takes part.
                let path = path.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
                });
                let mut random = StdRng::seed_from_u64(seed ^ path);
                let noise = Normal::new(0.0, 0.1).expect("0.1 is a standard deviation");
                let skew: Vec<f64> = (0..skew).map(|_| noise.sample(&mut random)).collect();
                let scale = (0..scale).map(|_| 1.0 + noise.sample(&mut random));
                (skew, scale.collect())
            }
        };
        Self {
            skew: TensorData::new(skew, shape),
            scale: with_scale.then(|| TensorData::new(scale, [plan.d_output])),
        }
    }
}

/// What an adapter is, beside its numbers.
///
/// It travels with the module as a constant. Burn shows a traversal the parameters only, so this writes
/// itself into the traversal's path as an empty level of the container type [`AdapterSettings::CONTAINER`]:
/// [`summary`](crate::summary()), [`diagnose`](crate::diagnose()) and [`project`](crate::project()) read it
/// there, and every other traversal passes by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AdapterSettings {
    kind: LayerKind,
    butterfly: ButterflyPlan,
    cayley: Cayley,
    coft_radius: Option<f64>,
    dropout: f64,
}

impl AdapterSettings {
    pub(crate) const CONTAINER: &'static str = "BoftAdapterSettings";

    pub(crate) fn new(kind: LayerKind, butterfly: ButterflyPlan, config: &AdapterConfig) -> Self {
        let (cayley, coft_radius, dropout) = match config {
            AdapterConfig::Boft(config) => (Cayley::Exact, None, config.dropout),
            AdapterConfig::Oft(config) => (config.cayley, config.coft_radius, 0.0),
        };
        Self {
            kind,
            butterfly,
            cayley,
            coft_radius,
            dropout,
        }
    }

    /// Reads the settings from a level of a traversal.
    pub(crate) fn from_level(name: &str, container: &str) -> Option<Self> {
        (container == Self::CONTAINER)
            .then(|| serde_json::from_str(name).ok())
            .flatten()
    }

    fn to_level(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    pub(crate) fn butterfly(&self) -> ButterflyPlan {
        self.butterfly
    }

    pub(crate) fn kind(&self) -> LayerKind {
        self.kind
    }

    /// How numbers become blocks: the map, and COFT's radius.
    pub(crate) fn numerics(&self) -> (Cayley, Option<f64>) {
        (self.cayley, self.coft_radius)
    }

    /// The blocks that these numbers mean.
    pub(crate) fn blocks(&self, skew: Tensor<3>) -> Blocks {
        let skew = match self.coft_radius {
            // PEFT projects the parameter before each forward pass and lets the gradient through.
            Some(_) => skew.clone() + (self.project(skew.clone()) - skew).detach(),
            None => skew,
        };
        let block_size = self.butterfly.block_size;
        let blocks = match self.polynomial() {
            None => Blocks::cayley(skew, block_size),
            Some(coefficients) => Blocks::polynomial(skew, block_size, &coefficients),
        };
        match self.butterfly.block_share {
            true => blocks.share(self.butterfly.block_num()),
            false => blocks,
        }
    }

    /// The coefficients of the polynomial that stands for the Cayley map, if one does.
    fn polynomial(&self) -> Option<Vec<f64>> {
        match self.cayley {
            Cayley::Exact => None,
            Cayley::Neumann { terms } => Some(ops::neumann_coefficients(terms)),
            Cayley::Neumann016 { terms } => Some(ops::neumann_016_coefficients(terms)),
        }
    }

    /// The angle in radians by which a block turns the plane of `‖Q‖₂`.
    pub(crate) fn angle(&self, norm: f64) -> f64 {
        let Some(coefficients) = self.polynomial() else {
            return 2.0 * norm.atan();
        };
        // The polynomial at the eigenvalue iλ: powers of i alternate between the parts.
        let (mut real, mut imaginary) = (0.0, 0.0);
        for (power, coefficient) in coefficients.into_iter().enumerate() {
            let value = coefficient * norm.powi(power as i32);
            match power % 4 {
                0 => real += value,
                1 => imaginary += value,
                2 => real -= value,
                _ => imaginary -= value,
            }
        }
        f64::atan2(imaginary, real).abs()
    }

    /// Scales every `Q` with `‖Q‖_F` beyond `radius / √(stored blocks)` back to it; without a radius, nothing.
    pub(crate) fn project(&self, skew: Tensor<3>) -> Tensor<3> {
        let Some(radius) = self.coft_radius else {
            return skew;
        };
        let [_, stored, _] = skew.dims();
        let radius = radius / (stored as f64).sqrt();
        let norm = (skew.clone().square().sum_dim(2) * 2.0).sqrt();
        skew * (norm.clamp_min(radius).recip() * radius)
    }
}

impl Module for AdapterSettings {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let level = self.to_level();
        visitor.enter_module(&level, Self::CONTAINER);
        visitor.exit_module(&level, Self::CONTAINER);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let level = self.to_level();
        mapper.enter_module(&level, Self::CONTAINER);
        mapper.exit_module(&level, Self::CONTAINER);
        self
    }

    fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        self
    }

    fn to_device(self, _: &Device) -> Self {
        self
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }
}

impl Display for AdapterSettings {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let ButterflyPlan {
            block_size,
            n_butterfly_factor,
            ..
        } = self.butterfly;
        write!(f, "b={block_size} m={n_butterfly_factor} {:?}", self.cayley)
    }
}

impl burn::module::ModuleDisplayDefault for AdapterSettings {
    fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
        content.add_formatted(&self.to_string()).optional()
    }
}

impl burn::module::ModuleDisplay for AdapterSettings {}

/// Attaches one adapter to one parameter.
pub(crate) struct Attach(pub(crate) Option<BoftAdapter>);

impl Reparameterizer for Attach {
    type Reparam = BoftAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<BoftAdapter>) {
        (param, self.0.take())
    }
}
