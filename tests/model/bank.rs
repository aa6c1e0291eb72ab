//! A bank serves batches whose requests use different adapters: each gets what its adapter alone computes.

use burn::module::{Module, ParamGroup, Quantizer};
use burn::nn;
use burn::tensor::quantization::{Calibration, QuantValue};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::value::{AttachError, BankError, BankMisfit};
use burn_boft::{
    Adapter, AdapterBank, AdapterConfig, Bias, BoftConfig, BoftLinear, Cayley, Init, LayerKind,
    OftConfig, inject, merge, unload,
};

use crate::common::models::{INPUT, Net, distance, linear, rows, set};
use crate::common::{devices, host, noise};

type Model = Net<BoftLinear>;

fn boft(seed: u64, [b, m]: [usize; 2]) -> BoftConfig {
    BoftConfig::new()
        .with_block_size(b)
        .with_n_butterfly_factor(m)
        .with_init(Init::Random { seed })
        .with_target_modules(["hidden", "output"])
}

/// An adapter with random numbers, whose biases have moved as well if it trains them.
fn adapter<M: Module>(base: &M, config: impl Into<AdapterConfig>) -> Adapter {
    let config = config.into();
    let adapted = inject(base.clone(), config.clone()).unwrap();
    let moved = match config.selection().bias {
        Bias::None => adapted,
        _ => set(adapted, "hidden.bias", |bias| noise(bias.len(), 77, 2.0)),
    };
    Adapter::extract(&moved).unwrap()
}

/// Adapters of spans of 4 in every layer: by one factor, by two, with and without scale and bias, of one layer only,
/// and by PEFT's polynomial, which is not orthogonal.
fn adapters(base: &Model) -> Vec<Adapter> {
    let oft = OftConfig::new()
        .with_block_size(4)
        .with_init(Init::Random { seed: 5 })
        .with_target_modules(["hidden", "output"]);
    vec![
        adapter(base, boft(1, [4, 1])),
        adapter(base, boft(2, [2, 2]).with_bias(Bias::AdapterOnly)),
        adapter(base, boft(3, [2, 2]).with_scale(false)),
        adapter(base, boft(4, [4, 1]).with_target_modules(["output"])),
        adapter(base, oft.clone().with_bias(Bias::AdapterOnly)),
        adapter(base, oft.with_cayley(Cayley::Neumann { terms: 5 })),
    ]
}

/// What each request of a batch gets when its adapter is alone, and the batch has one row for each.
fn alone(
    base: &Model,
    adapters: &[Adapter],
    requests: &[Option<usize>],
    x: &Tensor<2>,
) -> Vec<f64> {
    let outputs = requests.iter().enumerate().map(|(row, request)| {
        let model = match request {
            Some(index) => adapters[*index].attach(base.clone()).unwrap().valid(),
            None => base.clone(),
        };
        host(model.forward(x.clone().narrow(0, row, 1)))
    });
    outputs.collect::<Vec<_>>().concat()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}

#[test]
fn every_request_gets_what_its_adapter_alone_computes() {
    for (name, device) in devices() {
        let base = Model::new(3, &device);
        let adapters = adapters(&base);
        let mut bank = AdapterBank::new(base.clone()).unwrap();
        let ids: Vec<_> = adapters.iter().map(|a| bank.add(a).unwrap()).collect();
        let batches: [&[Option<usize>]; 5] = [
            &[
                Some(1),
                None,
                Some(0),
                Some(5),
                Some(1),
                Some(2),
                Some(3),
                Some(4),
                None,
            ],
            &[None, None],
            &[Some(3), None],
            &[Some(4)],
            &[Some(2); 3],
        ];
        for requests in batches {
            let x = rows([requests.len(), INPUT], 8, &device);
            let named: Vec<_> = requests.iter().map(|r| r.map(|index| ids[index])).collect();
            let served = host(bank.model(&named).unwrap().forward(x.clone()));
            let expected = alone(&base, &adapters, requests, &x);
            let pairs = served.iter().zip(&expected);
            let drift = pairs.fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
            let bound = 1e-6 * largest(&expected).max(1.0);
            assert!(drift <= bound, "{drift:.1e} for {requests:?} on {name}");
        }
        // The adapters are told apart: they do not compute the same.
        let x = rows([1, INPUT], 8, &device);
        let outputs = (0..adapters.len()).map(|index| alone(&base, &adapters, &[Some(index)], &x));
        let mut outputs: Vec<_> = outputs.chain([alone(&base, &[], &[None], &x)]).collect();
        outputs.sort_by(|a, b| a[0].total_cmp(&b[0]));
        let apart = |pair: &[Vec<f64>]| largest(&[pair[0][0] - pair[1][0]]) > 1e-4;
        assert!(outputs.windows(2).all(apart), "{outputs:?}");
    }
}

#[test]
fn a_request_of_many_tokens_rotates_all_of_them() {
    for (name, device) in devices() {
        let layer: BoftLinear = linear([24, 10], 3, DType::F32, &device).into();
        let config = |seed| boft(seed, [4, 2]).with_target_modules("all-linear");
        let [a, b] = [1, 2].map(|seed| adapter(&layer, config(seed)));
        let mut bank = AdapterBank::new(layer.clone()).unwrap();
        let [first, second] = [&a, &b].map(|adapter| bank.add(adapter).unwrap());
        let model = bank.model(&[Some(first), Some(second), None]).unwrap();
        // More tokens than a task takes, and no multiple of the rows that pass at a time.
        let input = rows([3, 301, 24], 9, &device);
        let output = model.forward(input.clone());
        let alone = [&a, &b].map(|adapter| adapter.attach(layer.clone()).unwrap().valid());
        for (request, model) in [&alone[0], &alone[1], &layer].into_iter().enumerate() {
            let request = request..request + 1;
            let expected = model.forward(input.clone().slice([request.clone()]));
            let bound = 1e-6 * largest(&host(expected.clone()));
            let drift = distance(output.clone().slice([request.clone()]), expected);
            assert!(
                drift <= bound,
                "{drift:.1e} for request {request:?} on {name}"
            );
        }
    }
}

#[test]
fn a_quantized_base_serves_many_adapters() {
    for (name, device) in devices() {
        let scheme = device.settings().quantization.scheme;
        let scheme = scheme.with_value(QuantValue::Q8S);
        let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
        let weights = ParamGroup::from_paths(vec!["hidden.weight", "output.weight"]);
        let base = Model::new(3, &device).quantize_weights_group(&mut quantizer, weights);
        let adapters = adapters(&base);
        let mut bank = AdapterBank::new(base.clone()).unwrap();
        let ids: Vec<_> = adapters.iter().map(|a| bank.add(a).unwrap()).collect();
        let requests = [Some(1), None, Some(0), Some(2), Some(4)];
        let named = requests.map(|request| request.map(|index| ids[index]));
        let x = rows([requests.len(), INPUT], 8, &device);
        let model = bank.model(&named).unwrap();
        assert!(matches!(
            model.hidden.weight.base().dtype(),
            DType::QFloat(_)
        ));
        let served = host(model.forward(x.clone()));
        let expected = alone(&base, &adapters, &requests, &x);
        let drift = served
            .iter()
            .zip(&expected)
            .fold(0.0f64, |max, (a, b)| max.max((a - b).abs()));
        assert!(
            drift <= 1e-6 * largest(&expected).max(1.0),
            "{drift:.1e} on {name}"
        );
    }
}

#[test]
fn adapters_come_and_go_while_models_of_the_bank_are_in_use() {
    let device = Device::flex();
    let base = Model::new(3, &device);
    let adapters = adapters(&base);
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let [first, second] = [0, 1].map(|index| bank.add(&adapters[index]).unwrap());
    let x = rows([2, INPUT], 8, &device);
    let model = bank.model(&[Some(first), Some(second)]).unwrap();
    let before = host(model.forward(x.clone()));

    let other = bank.clone();
    assert!(bank.remove(first));
    assert!(!bank.remove(first));
    let third = bank.add(&adapters[2]).unwrap();
    assert_eq!(bank.ids(), [second, third]);
    assert_eq!(other.ids(), [first, second]);
    assert_eq!(
        bank.model(&[Some(first)]).unwrap_err(),
        BankError::Unknown { id: first }
    );
    assert_eq!(host(model.forward(x.clone())), before);

    let serve = |bank: &AdapterBank<Model>, id| {
        let model = bank.model(&[Some(id), None]).unwrap();
        host(model.forward(x.clone()))
    };
    let expected = [serve(&other, first), serve(&bank, third)];
    std::thread::scope(|scope| {
        let threads = [(&other, first, &expected[0]), (&bank, third, &expected[1])];
        let threads = threads.map(|(bank, id, expected)| {
            scope.spawn(move || (0..20).for_each(|_| assert_eq!(serve(bank, id), *expected)))
        });
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn adapters_of_another_span_are_refused_by_layer_and_size() {
    let base = Model::new(3, &Device::flex());
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let four = bank
        .add(&adapter(
            &base,
            boft(1, [4, 1]).with_target_modules(["output"]),
        ))
        .unwrap();
    // Nobody rotates `hidden` yet, so any span fits there.
    let hidden = adapter(&base, boft(1, [4, 2]).with_target_modules(["hidden"]));
    bank.add(&hidden).unwrap();

    let error = bank.add(&adapter(&base, boft(2, [2, 1]))).unwrap_err();
    let span = |path: &str, found, expected| BankMisfit::Span {
        path: path.into(),
        found,
        expected,
    };
    let misfits = vec![span("hidden", 2, 8), span("output", 2, 4)];
    assert_eq!(error, BankError::Misfits { misfits });
    assert_eq!(
        error.to_string().lines().next().unwrap(),
        "`hidden` has spans of 2 channels in this adapter and of 8 in the bank; a bank holds one span, b·2^(m−1), for \
         each layer, so put the adapter into a bank of its own"
    );
    assert_eq!(bank.ids().len(), 2);
    // The span of a layer is free again when the last adapter that has it is gone.
    bank.remove(four);
    let eight = boft(2, [8, 1]).with_target_modules(["output"]);
    bank.add(&adapter(&base, eight)).unwrap();
}

#[derive(Module, Debug)]
struct Mixed {
    conv: nn::conv::Conv2d,
    query: BoftLinear,
    head: BoftLinear,
}

impl Mixed {
    fn new(device: &Device) -> Self {
        Self {
            conv: nn::conv::Conv2dConfig::new([4, 6], [2, 2]).init(device),
            query: linear([24, 10], 3, DType::F32, device).into(),
            head: linear([10, 3], 4, DType::F32, device).into(),
        }
    }
}

#[test]
fn all_that_a_bank_cannot_serve_is_refused_at_once() {
    let base = Mixed::new(&Device::flex());
    let config = boft(1, [4, 1])
        .with_target_modules(["conv", "query"])
        .with_modules_to_save(["head"])
        .with_bias(Bias::AdapterOnly);
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let adapter = Adapter::extract(&inject(base, config).unwrap()).unwrap();
    let BankError::Misfits { misfits } = bank.add(&adapter).unwrap_err() else {
        panic!("the adapter fits the base");
    };
    let saved = |path: &str| BankMisfit::Saved { path: path.into() };
    let conv = BankMisfit::Kind {
        path: "conv".into(),
        kind: LayerKind::Conv2d,
    };
    for misfit in [&conv, &saved("conv.bias"), &saved("head.weight")] {
        assert!(misfits.contains(misfit), "{misfit} is not in {misfits:?}");
    }
    // The bias of a linear layer is served, whether the layer is rotated or saved.
    assert_eq!(misfits.len(), 3, "{misfits:?}");
    assert!(bank.ids().is_empty());

    let stranger =
        Adapter::extract(&inject(Model::new(3, &Device::flex()), boft(1, [4, 1])).unwrap());
    let error = bank.add(&stranger.unwrap()).unwrap_err();
    assert!(
        matches!(error, BankError::Attach(AttachError::Mismatch(_))),
        "{error}"
    );
}

#[test]
fn a_base_that_trains_or_is_adapted_is_refused() {
    let device = Device::flex();
    let training = Model::new(3, &device.clone().autodiff());
    assert_eq!(
        AdapterBank::new(training.clone()).unwrap_err(),
        BankError::Autodiff
    );
    AdapterBank::new(training.valid()).unwrap();
    let adapted = inject(Model::new(3, &device), boft(1, [4, 1])).unwrap();
    let paths = vec!["hidden".to_string(), "output".to_string()];
    assert_eq!(
        AdapterBank::new(adapted).unwrap_err(),
        BankError::Adapted { paths }
    );
    let bank = AdapterBank::new(Model::new(3, &device)).unwrap();
    let mut other = AdapterBank::new(Model::new(3, &device)).unwrap();
    let id = other.add(&adapter(other.base(), boft(1, [4, 1]))).unwrap();
    assert_eq!(
        bank.model(&[None, Some(id)]).unwrap_err(),
        BankError::Unknown { id }
    );
}

#[test]
#[should_panic = "`hidden` read its weight, which is another one for each request of a batch: make it a BoftLinear"]
fn a_linear_layer_of_burn_does_not_serve_two_adapters_as_one() {
    let base = Net::<nn::Linear>::new(3, &Device::flex());
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let id = bank.add(&adapter(&base, boft(1, [4, 1]))).unwrap();
    let x = rows([2, INPUT], 8, &Device::flex());
    bank.model(&[None, None]).unwrap().forward(x.clone());
    bank.model(&[Some(id), None]).unwrap().forward(x);
}

#[test]
#[should_panic = "`hidden` serves a batch of 2 requests, and the first axis of its input [6, 24] is not theirs"]
fn rows_that_are_not_requests_are_not_given_away() {
    let device = Device::flex();
    let base = Model::new(3, &device);
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let id = bank.add(&adapter(&base, boft(1, [4, 1]))).unwrap();
    bank.model(&[Some(id), None])
        .unwrap()
        .forward(rows([6, INPUT], 8, &device));
}

/// A model for a batch is not one adapted model, so the verbs on adapted models have nothing to say about it.
#[test]
fn a_model_for_a_batch_is_neither_merged_nor_unloaded_nor_injected() {
    let base = Model::new(3, &Device::flex());
    let mut bank = AdapterBank::new(base.clone()).unwrap();
    let id = bank.add(&adapter(&base, boft(1, [4, 1]))).unwrap();
    let model = bank.model(&[Some(id)]).unwrap();
    assert_eq!(
        merge(model.clone())
            .unwrap_err()
            .to_string()
            .lines()
            .count(),
        1
    );
    let x = rows([1, INPUT], 8, &Device::flex());
    let expected = host(model.forward(x.clone()));
    assert_eq!(host(unload(model.clone()).forward(x)), expected);
    let error = inject(model, boft(1, [4, 1])).unwrap_err().to_string();
    assert!(error.contains("boft_batch"), "{error}");
}
