//! Every way in which a module can hold another.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::nn;
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{BoftConfig, Init, inject, merge, plan, summary};

use crate::check::{Verdict, adapted, boft, device, error, flat, oft};
use crate::common::models::{linear, numbers, rows};
use crate::common::{Matrix, Sizes, assert_close, rotation};
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("The model itself", the_model_itself),
    ("Vec", a_list),
    ("Array", an_array),
    ("Tuple", a_tuple),
    ("Option with a layer", an_option),
    ("Option without a layer", an_empty_option),
    ("Enum", an_enum),
    ("A variant that the enum does not hold", an_absent_variant),
    ("Nested generics", nested_generics),
    ("Box, in a module of your own", a_box),
    ("A model without parameters", an_empty_model),
    ("Ten thousand layers", ten_thousand_layers),
];

/// Of the layers with the seeds 10, 20, 30 and so on, each takes what the one before it makes.
fn layer(seed: u64) -> nn::Linear {
    let sizes = match seed / 10 % 2 {
        1 => [16, 24],
        _ => [24, 16],
    };
    linear(sizes, seed, DType::F32, &device())
}

fn input() -> Tensor<2> {
    rows([7, 16], 9, &device())
}

/// Applies layers one after the other.
fn chain<'a>(layers: impl IntoIterator<Item = &'a nn::Linear>) -> Vec<Tensor<1>> {
    let apply = |hidden: Tensor<2>, layer: &nn::Linear| layer.forward(hidden).tanh();
    vec![flat(layers.into_iter().fold(input(), apply))]
}

fn the_model_itself() -> Verdict {
    adapted(layer(10), &[boft(), oft()], |model| chain([model]))
}

#[derive(Module, Debug)]
struct List {
    layers: Vec<nn::Linear>,
}

fn a_list() -> Verdict {
    let base = List {
        layers: (1..4).map(|seed| layer(10 * seed)).collect(),
    };
    adapted(base, &[boft(), oft()], |model| chain(&model.layers))
}

#[derive(Module, Debug)]
struct Fixed {
    layers: [nn::Linear; 3],
}

fn an_array() -> Verdict {
    let base = Fixed {
        layers: [layer(10), layer(20), layer(30)],
    };
    adapted(base, &[boft(), oft()], |model| chain(&model.layers))
}

#[derive(Module, Debug)]
struct Pair {
    pair: (nn::Linear, nn::Linear),
}

fn a_tuple() -> Verdict {
    let base = Pair {
        pair: (layer(10), layer(20)),
    };
    adapted(base, &[boft(), oft()], |model| {
        chain([&model.pair.0, &model.pair.1])
    })
}

#[derive(Module, Debug)]
struct Perhaps {
    perhaps: Option<nn::Linear>,
    linear: nn::Linear,
}

fn an_option() -> Verdict {
    let base = Perhaps {
        perhaps: Some(layer(10)),
        linear: layer(20),
    };
    adapted(base, &[boft(), oft()], |model| {
        chain(model.perhaps.iter().chain([&model.linear]))
    })
}

fn an_empty_option() -> Verdict {
    let base = Perhaps {
        perhaps: None,
        linear: layer(20),
    };
    Verdict::Refused(error(&base, &boft(), ["perhaps", "linear"]))
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
enum Choice {
    Plain(nn::Linear),
    Deep(List),
}

#[derive(Module, Debug)]
struct Chosen {
    first: Choice,
    second: Choice,
}

impl Chosen {
    fn new() -> Self {
        Self {
            first: Choice::Plain(layer(10)),
            second: Choice::Deep(List {
                layers: vec![layer(20), layer(30)],
            }),
        }
    }

    fn layers(&self) -> impl Iterator<Item = &nn::Linear> {
        [&self.first, &self.second]
            .into_iter()
            .flat_map(|choice| match choice {
                Choice::Plain(layer) => std::slice::from_ref(layer),
                Choice::Deep(list) => &list.layers[..],
            })
    }
}

fn an_enum() -> Verdict {
    adapted(Chosen::new(), &[boft(), oft()], |model| {
        chain(model.layers())
    })
}

fn an_absent_variant() -> Verdict {
    let names = ["first.Plain", "second.Plain"];
    Verdict::Refused(error(&Chosen::new(), &boft(), names))
}

#[derive(Module, Debug)]
struct Wrapper<T: Module> {
    inner: Vec<Option<T>>,
}

#[derive(Module, Debug)]
struct Generic<A: Module, B: Module> {
    a: A,
    b: B,
}

type Nested = Generic<Wrapper<Generic<nn::Linear, nn::LayerNorm>>, Wrapper<(nn::Linear, List)>>;

fn nested_generics() -> Verdict {
    let norm = || nn::LayerNormConfig::new(24).init(&device());
    let first = Generic {
        a: layer(10),
        b: norm(),
    };
    let list = List {
        layers: vec![layer(30), layer(40)],
    };
    let base: Nested = Generic {
        a: Wrapper {
            inner: vec![None, Some(first)],
        },
        b: Wrapper {
            inner: vec![Some((layer(20), list))],
        },
    };
    adapted(base, &[boft(), oft()], |model| {
        let first = model.a.inner[1].as_ref().unwrap();
        let (second, list) = model.b.inner[0].as_ref().unwrap();
        let hidden = first.b.forward(first.a.forward(input()));
        let layers = [second].into_iter().chain(&list.layers);
        let apply = |hidden: Tensor<2>, layer: &nn::Linear| layer.forward(hidden).tanh();
        vec![flat(layers.fold(hidden, apply))]
    })
}

/// Whether a type is a module, which only the compiler knows.
struct IsModule<T>(PhantomData<T>);

impl<T: Module> IsModule<T> {
    const ANSWER: bool = true;
}

trait IsNoModule {
    const ANSWER: bool = false;
}

impl<T> IsNoModule for IsModule<T> {}

/// A module on the heap: Burn 0.22 has none of its own.
#[derive(Clone, Debug)]
struct Boxed<T>(Box<T>);

impl<T: Module> Module for Boxed<T> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.0.visit(visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self(Box::new(self.0.map(mapper)))
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(Box::new(self.0.fork(device)))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(Box::new(self.0.to_device(device)))
    }

    fn materialize(self) -> Self {
        Self(Box::new(self.0.materialize()))
    }

    fn valid(&self) -> Self {
        Self(Box::new(self.0.valid()))
    }

    fn train(self) -> Self {
        Self(Box::new(self.0.train()))
    }
}

impl<T: ModuleDisplay> ModuleDisplayDefault for Boxed<T> {
    fn content(&self, content: Content) -> Option<Content> {
        self.0.content(content)
    }
}

impl<T: ModuleDisplay> ModuleDisplay for Boxed<T> {}

#[derive(Module, Debug)]
struct Heap {
    boxed: Boxed<Generic<nn::Linear, List>>,
}

fn a_box() -> Verdict {
    const { assert!(IsModule::<nn::Linear>::ANSWER) };
    const {
        assert!(
            !IsModule::<Box<nn::Linear>>::ANSWER,
            "Burn has modules in boxes: use one in `Heap`, and say so in docs/layers.md"
        );
    }
    let list = List {
        layers: vec![layer(20), layer(30)],
    };
    let inner = Generic {
        a: layer(10),
        b: list,
    };
    let base = Heap {
        boxed: Boxed(Box::new(inner)),
    };
    adapted(base, &[boft(), oft()], |model| {
        let Generic { a, b } = &*model.boxed.0;
        chain([a].into_iter().chain(&b.layers))
    })
}

#[derive(Module, Debug)]
struct Nothing {
    dropout: nn::Dropout,
    none: Option<nn::Linear>,
    list: Vec<nn::Linear>,
}

fn an_empty_model() -> Verdict {
    let model = Nothing {
        dropout: nn::DropoutConfig::new(0.1).init(),
        none: None,
        list: Vec::new(),
    };
    let named = error(&model, &boft(), ["linear"]);
    assert!(
        named.contains("`linear`, which selects nothing in the model"),
        "{named}"
    );
    let texts =
        [boft(), oft()].map(|config| inject(model.clone(), config).unwrap_err().to_string());
    assert_eq!(texts[0], texts[1]);
    let counts = summary(&model);
    assert_eq!((counts.total, counts.layers.len()), (0, 0));
    Verdict::Refused(texts[0].clone())
}

static TRAVERSALS: AtomicUsize = AtomicUsize::new(0);
static LAYERS_SEEN: AtomicUsize = AtomicUsize::new(0);

/// Layers that count how often a traversal visits or maps them, and all of them together.
#[derive(Clone, Debug)]
struct Counted(Vec<nn::Linear>);

impl Counted {
    fn count(&self) {
        TRAVERSALS.fetch_add(1, Ordering::Relaxed);
        LAYERS_SEEN.fetch_add(self.0.len(), Ordering::Relaxed);
    }
}

impl Module for Counted {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.count();
        self.0.visit(visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        self.count();
        Self(self.0.map(mapper))
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.to_device(device))
    }

    fn materialize(self) -> Self {
        Self(self.0.materialize())
    }

    fn valid(&self) -> Self {
        Self(self.0.valid())
    }

    fn train(self) -> Self {
        Self(self.0.train())
    }
}

impl ModuleDisplayDefault for Counted {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add_formatted(&format!("{} layers", self.0.len()))
            .optional()
    }
}

impl ModuleDisplay for Counted {}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers", self.0.len())
    }
}

/// How often injecting into so many layers, and merging, traverses them; and the layers seen on the way. The weights are
/// compared with those that were rotated by hand.
fn traversals(count: usize) -> [usize; 2] {
    let sizes = [4, 3];
    let layers = (0..count).map(|i| linear(sizes, i as u64 + 1, DType::F32, &Device::flex()));
    let base = Counted(layers.collect());
    let before = numbers(&base);
    let config = BoftConfig::new()
        .with_init(Init::Random { seed: 3 })
        .with_target_modules((0..count).map(|i| i.to_string()).collect::<Vec<_>>());
    assert_eq!(plan(&base, &config).unwrap().layers.len(), count);
    TRAVERSALS.store(0, Ordering::Relaxed);
    LAYERS_SEEN.store(0, Ordering::Relaxed);
    let model = inject(base, config).unwrap();
    let found = [&TRAVERSALS, &LAYERS_SEEN].map(|counter| counter.load(Ordering::Relaxed));
    let adapted = numbers(&model);
    let merged = numbers(&merge(model).unwrap());
    for index in 0..count {
        let number = |name: &str| &adapted[&format!("{index}.weight.boft.{name}")];
        let (sizes, scale) = (Sizes { d: 4, b: 4, m: 1 }, number("scale"));
        let path = format!("{index}.weight");
        let base = Matrix::new(4, 3, before[&path].clone());
        let mut expected = rotation(sizes, number("skew")).matmul(&base);
        let numbers = expected.values.iter_mut().enumerate();
        numbers.for_each(|(i, value)| *value *= scale[i % 3]);
        assert_close(&path, &merged[&path], &expected.values, 2e-6);
        assert_ne!(merged[&path], before[&path]);
    }
    found
}

/// Ten thousand layers are traversed as often as ten, so the work of a traversal grows with them and no more.
fn ten_thousand_layers() -> Verdict {
    let [few, many] = [10, 10_000].map(traversals);
    assert_eq!(few[0], many[0], "traversals");
    assert_eq!(few[1] * 1_000, many[1], "layers seen");
    assert!((2..=4).contains(&many[0]), "{} traversals", many[0]);
    Verdict::Adapted(["9999.weight".to_string()].into())
}
