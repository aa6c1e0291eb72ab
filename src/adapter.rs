//! [`BoftAdapter`]: the module that is attached to a weight, and how it tells traversals what it computes.

use burn::module::{
    Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer,
};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};

use crate::cached::CachedBlocks;
use crate::config::LayerKind;
use crate::ops::{self, Base, Blocks, Direction, Pass, Side};
use crate::rotation::{ButterflyPlan, Rotation, Values};

/// The adapter of one weight: `W' = R·W·diag(s)`, where `R = F_{m−1} ··· F_1·F_0` is computed from the skew. Of an
/// embedding it is `W' = W·R`.
///
/// [`inject`](crate::inject()) attaches it to a parameter, as what Burn calls a reparameterization: the parameter keeps
/// its base value, and whoever reads it gets the rotated one. Its own parameters have the paths
/// `<layer>.weight.boft.skew` and `<layer>.weight.boft.scale`, and with
/// [`with_scaled_skew`](crate::BoftConfig::with_scaled_skew) the first is `<layer>.weight.boft.scaled_skew`.
///
/// # Examples
///
/// A layer of your own gets the adapter of its weight, and can decide how to use it:
///
/// ```
/// use burn::nn::Linear;
/// use burn::tensor::Tensor;
/// use burn_boft::BoftAdapter;
///
/// fn forward_without_bias(layer: &Linear, input: Tensor<2>) -> Tensor<2> {
///     match layer.weight.reparameterization::<BoftAdapter>() {
///         // Rotates the input and leaves the weight alone. OFT has no scale.
///         Some(adapter) if adapter.scale().is_none() => {
///             adapter.rotate(input).matmul(layer.weight.base())
///         }
///         _ => input.matmul(layer.weight.val()),
///     }
/// }
/// # let _ = forward_without_bias;
/// ```
#[derive(Module, Debug)]
pub struct BoftAdapter {
    // The first field, so that a traversal learns what is computed before it sees the numbers.
    rotation: Rotation,
    /// The strict upper triangles of `Q` row by row, a `[m, n, b(b−1)/2]` tensor in f32 or wider; `n` is 1 where one
    /// block is shared. None if the skew is scaled.
    skew: Option<Param<Tensor<3>>>,
    /// The same numbers times `2√(b−1)`, where the skew is scaled. They have a name of their own, so that no record of one
    /// kind is taken for the other.
    scaled_skew: Option<Param<Tensor<3>>>,
    /// The scale per output channel, a `[d_output]` tensor in f32 or wider; none if no scale is trained.
    scale: Option<Param<Tensor<1>>>,
    /// Whether multiplicative dropout is on. Burn changes it with `valid()`, `train()` and `freeze()`.
    training: Param<Flag>,
    /// The blocks, on a device without autodiff.
    cached: CachedBlocks,
}

impl BoftAdapter {
    /// Makes an adapter with these numbers for a weight of this device and precision. They are kept in f32 or wider.
    pub(crate) fn new(
        rotation: Rotation,
        values: Values,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let dtype = ops::widened(dtype);
        let Values { skew, scale } = values;
        let numbers = (rotation.trained_numbers(skew), scale);
        // The numbers live as long as the model, so they do not belong into the memory pools for activations.
        let (trained, scale) = device.memory_persistent_allocations(numbers, |(trained, scale)| {
            (
                Param::from_tensor(Tensor::<3>::from_data(trained, (device, dtype))),
                scale.map(|scale| {
                    Param::from_tensor(Tensor::<1>::from_data(scale, (device, dtype)))
                }),
            )
        });
        Self::of_params(rotation, trained, scale, true)
    }

    /// An adapter that shares these tensors, of which the first holds the numbers that are trained. Blocks are dropped if
    /// `drops` says so.
    pub(crate) fn of_parts(
        rotation: Rotation,
        trained: Tensor<3>,
        scale: Option<Tensor<1>>,
        drops: bool,
    ) -> Self {
        let trained = Param::initialized(ParamId::new(), trained);
        let scale = scale.map(|scale| Param::initialized(ParamId::new(), scale));
        Self::of_params(rotation, trained, scale, drops)
    }

    fn of_params(
        rotation: Rotation,
        trained: Param<Tensor<3>>,
        scale: Option<Param<Tensor<1>>>,
        drops: bool,
    ) -> Self {
        let (skew, scaled_skew) = match rotation.skew_divisor() {
            None => (Some(trained), None),
            Some(_) => (None, Some(trained)),
        };
        Self {
            rotation,
            skew,
            scaled_skew,
            scale,
            training: Param::from_bool(drops),
            cached: CachedBlocks::default(),
        }
    }

    /// The numbers that are trained: those of the skew, or a multiple of them.
    fn trained(&self) -> &Param<Tensor<3>> {
        let trained = self.skew.as_ref().or(self.scaled_skew.as_ref());
        trained.expect("an adapter is made with one of the two")
    }

    /// The sizes of the rotation, which fit the weight.
    pub fn butterfly(&self) -> ButterflyPlan {
        self.rotation.sizes()
    }

    /// The skew: the strict upper triangles of the matrices `Q` row by row, a `[m, n, b(b−1)/2]` tensor.
    ///
    /// `n` is 1 where one block is shared. Of a scaled skew it is a quotient of the numbers that are trained.
    pub fn skew(&self) -> Tensor<3> {
        let trained = ops::dequantized(self.trained().val());
        self.rotation.skew_of(trained)
    }

    /// The scale per output channel, a `[d_output]` tensor; none if no scale is trained, as in OFT.
    pub fn scale(&self) -> Option<Tensor<1>> {
        let scale = self.scale.as_ref().map(Param::val);
        scale.map(ops::dequantized)
    }

    /// The blocks of the rotation, within the COFT radius if there is one, and without multiplicative dropout. Those of an
    /// embedding are transposed, so that a weight with outputs in rows is always `W·Rᵀ`.
    pub fn blocks(&self) -> Blocks {
        self.rotation.blocks(self.skew())
    }

    /// The blocks as a forward pass uses them: in training, multiplicative dropout replaces some by the identity.
    ///
    /// Each call draws other blocks. After `valid()`, and on a device without autodiff, nothing is dropped; the blocks are
    /// then computed once and composed, a block for each span.
    pub fn training_blocks(&self) -> Blocks {
        if !self.trained().device().is_autodiff() {
            return self.cached.get(|| self.blocks().composed());
        }
        let blocks = self.blocks();
        match self.dropped_blocks() {
            Some(mask) => blocks.replace_by_identity(mask),
            None => blocks,
        }
    }

    /// Rotates the input of the layer, `x·R`, with multiplicative dropout in training. The scale is not applied.
    ///
    /// Of an embedding it rotates the rows that were looked up in the base.
    ///
    /// # Shapes
    ///
    /// - input, result: `[…, d_input]`
    ///
    /// # Panics
    ///
    /// - If the last axis is not `d_input`.
    pub fn rotate<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let shape = input.shape();
        let d_input = self.butterfly().d_input();
        assert_eq!(
            shape[D - 1],
            d_input,
            "rotate: the last axis of {shape:?} is not {d_input}"
        );
        let rows = shape.num_elements() / d_input;
        // The blocks of an embedding are those of `Rᵀ`; see `Rotation::blocks`.
        let direction = match self.rotation.kind() {
            LayerKind::Embedding => Direction::Back,
            LayerKind::Linear | LayerKind::Conv2d => Direction::Forward,
        };
        let input = ops::reshaped(input, [rows, d_input]);
        let rotated = self.training_blocks().rotate(input, Side::Right, direction);
        ops::reshaped(rotated, shape)
    }

    /// Applies the adapted linear layer, by the route that [`ops::route`] chooses for this number of tokens.
    ///
    /// # Shapes
    ///
    /// - input: `[…, d_input]`
    /// - base: `[d_input, d_output]`
    /// - bias: `[d_output]`
    /// - result: `[…, d_output]`
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
        self.training_blocks()
            .linear(input, base, self.scale(), bias, route)
    }

    /// Applies the adapted convolution.
    ///
    /// # Shapes
    ///
    /// - input: `[n, c·groups, h, w]`
    /// - base: `[o, c, kh, kw]`, which may be quantized
    /// - bias: `[o]`
    /// - result: `[n, o, h', w']`
    pub(crate) fn conv2d(
        &self,
        input: Tensor<4>,
        base: Tensor<4>,
        bias: Option<Tensor<1>>,
        options: ConvOptions<2>,
    ) -> Tensor<4> {
        let base = ops::dequantized(base);
        self.training_blocks()
            .conv2d(input, base, self.scale(), bias, options)
    }

    /// A `[m, n]` tensor with ones for the blocks that this step replaces by the identity; none if it replaces none.
    ///
    /// As in PEFT, one factor is drawn uniformly, and `floor(p·n)` of its blocks are drawn uniformly.
    fn dropped_blocks(&self) -> Option<Tensor<2>> {
        let plan = self.butterfly();
        let (m, n) = (plan.n_butterfly_factor(), plan.block_num());
        let count = (self.rotation.dropout() * n as f64).floor() as usize;
        let trained = self.trained();
        let device = trained.device();
        if count == 0 || !self.training.is_enabled() || !device.is_autodiff() {
            return None;
        }
        let dtype = ops::widened(trained.val().dtype());
        let draw = |shape: [usize; 2]| {
            Tensor::<2>::random(shape, Distribution::Uniform(0.0, 1.0), (&device, dtype))
        };
        let factors = draw([m, 1]);
        let factor = factors
            .clone()
            .equal(factors.max_dim(0).expand([m, 1]))
            .float();
        // The blocks with the smallest numbers are dropped. The rank of a block is how many have smaller numbers; computed
        // by comparing all pairs, some blocks at a time, it needs no sort on the host, so nothing waits for the device.
        let blocks = draw([1, n]);
        let ranks = blocks.clone().transpose().split(RANKED_BLOCKS, 0);
        let ranks = ranks.into_iter().map(|some| {
            let pairs = [some.dims()[0], n];
            let smaller = blocks.clone().expand(pairs).lower(some.expand(pairs));
            smaller.int().sum_dim(1)
        });
        let dropped = Tensor::cat(ranks.collect(), 0).lower_elem(count as i64);
        let dropped = dropped.float().transpose();
        Some((factor * dropped).cast(FloatDType::from(dtype)))
    }
}

/// The blocks whose ranks are computed at a time, from pairs with all blocks.
const RANKED_BLOCKS: usize = 256;

impl Reparameterization for BoftAdapter {
    const NAME: &'static str = "boft";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let base = ops::dequantized(base);
        let shape = base.shape();
        let sizes = self.butterfly();
        let (d_input, d_output) = (sizes.d_input(), sizes.d_output());
        let (matrix, side) = match self.rotation.kind() {
            LayerKind::Linear => ([d_input, d_output], Side::Left),
            LayerKind::Conv2d | LayerKind::Embedding => ([d_output, d_input], Side::Right),
        };
        self.training_blocks()
            .weight(base.reshape(matrix), self.scale(), side)
            .reshape(shape)
    }
}

/// The container type, as Burn calls it, of the level by which an adapter tells a traversal what it computes.
const ROTATION_LEVEL: &str = "BoftRotation";

/// Reads what an adapter computes from a level of a traversal, if it is the level that [`Rotation`] writes.
///
/// Burn shows a traversal the tensors of a module and the names around them. It shows neither the constants of a module
/// nor, with a weight, the adapter that the weight carries. Therefore a [`Rotation`] enters and leaves an empty level
/// before the tensors of its adapter are shown, and the name of the level is the rotation itself as JSON. The traversal
/// in `model/walk.rs` is the only reader. Every other traversal passes an empty level, which changes nothing.
pub(crate) fn rotation_of_level(name: &str, container: &str) -> Option<Rotation> {
    (container == ROTATION_LEVEL)
        .then(|| serde_json::from_str(name).expect("an adapter wrote its own rotation"))
}

impl Module for Rotation {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let level = serde_json::to_string(self).expect("a rotation is finite numbers and names");
        visitor.enter_module(&level, ROTATION_LEVEL);
        visitor.exit_module(&level, ROTATION_LEVEL);
    }

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
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

impl burn::module::ModuleDisplayDefault for Rotation {
    fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
        content.add_formatted(&self.to_string()).optional()
    }
}

impl burn::module::ModuleDisplay for Rotation {}

/// Attaches one adapter to one parameter, as Burn's `apply_reparameterization` asks for it.
pub(crate) struct Attach<R>(pub(crate) Option<R>);

impl<R: Reparameterization> Reparameterizer for Attach<R> {
    type Reparam = R;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<R>) {
        (param, self.0.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OftConfig;
    use crate::rotation::Method;

    /// What Burn shows a visitor, one line each.
    #[derive(Default)]
    struct Seen {
        lines: Vec<String>,
        rotations: Vec<Rotation>,
    }

    impl ModuleVisitor for Seen {
        fn enter_module(&mut self, name: &str, container: &str) {
            let rotation = rotation_of_level(name, container);
            let name = rotation.as_ref().map_or(name, |_| "(the rotation)");
            self.lines.push(format!("enter {name} of {container}"));
            self.rotations.extend(rotation);
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let adapter = param.reparameterization::<BoftAdapter>();
            assert!(
                adapter.is_none(),
                "Burn shows a visitor the adapter of a weight: read the rotation from it, and remove the level that \
                 `Rotation` writes, `rotation_of_level`, and its use in `model/walk.rs`"
            );
            self.lines.push(format!("float of {D} axes"));
        }
    }

    fn adapted(radius: f64) -> (Param<Tensor<2>>, Rotation) {
        let config = OftConfig::new().with_block_size(4).with_coft_radius(radius);
        let method = Method::new(&config.into()).unwrap();
        let rotation = method
            .rotation("layer", LayerKind::Linear, (24, 10))
            .unwrap();
        let device = Device::flex();
        let values = rotation.initial("layer");
        let adapter = BoftAdapter::new(rotation.clone(), values, (&device, DType::F32));
        let weight = Param::from_tensor(Tensor::ones([24, 10], &device));
        (
            weight.apply_reparameterization(Attach(Some(adapter))),
            rotation,
        )
    }

    /// If this fails, Burn traverses a reparameterization in another order: `model/walk.rs` puts a weight, the rotation
    /// and the numbers together by this order.
    #[test]
    fn burn_shows_the_weight_then_the_rotation_then_the_numbers() {
        let (weight, rotation) = adapted(0.5);
        let mut seen = Seen::default();
        weight.visit(&mut seen);
        assert_eq!(
            seen.lines,
            [
                "float of 2 axes",
                "enter boft of Reparameterization",
                "enter rotation of Struct:BoftAdapter",
                "enter (the rotation) of BoftRotation",
                "enter skew of Struct:BoftAdapter",
                "float of 3 axes",
                "enter scaled_skew of Struct:BoftAdapter",
                "enter scale of Struct:BoftAdapter",
                "enter training of Struct:BoftAdapter",
                "enter cached of Struct:BoftAdapter",
            ]
        );
        assert_eq!(seen.rotations, [rotation]);
    }

    #[test]
    fn a_rotation_keeps_every_digit_on_its_way_through_a_traversal() {
        for radius in [
            0.381_889_671_742_117_24,
            f64::MIN_POSITIVE,
            6e-5,
            1.0 / 3.0,
            1e300,
        ] {
            let (weight, rotation) = adapted(radius);
            let mut seen = Seen::default();
            weight.visit(&mut seen);
            assert_eq!(seen.rotations, [rotation]);
        }
    }
}
