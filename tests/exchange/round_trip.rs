//! A model computes the same after its adapter was extracted and attached again, as a value or through files.

use std::fs;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{self, BatchNorm, BatchNormConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_boft::{
    Adapter, AdapterConfig, Bias, BoftConfig, BoftLinear, Cayley, LayerKind, OftConfig, inject,
    merge, unload,
};
use serde_json::json;

use super::support::*;
use crate::common::models::{Layer, distance, linear, numbers, rows, set, trainable};
use crate::common::noise;

fn goes_there_and_back<L: Layer>(config: impl Into<AdapterConfig>) {
    let config = config.into();
    let model = adapted::<L>(&config);
    let adapter = Adapter::extract_as(&model, &config).unwrap();
    let folder = saved(&adapter);
    let (loaded, report) = Adapter::load(folder.path()).unwrap();
    assert!(report.converted.is_empty(), "{report}");
    assert_eq!(report.applied.len(), stored(folder.path()).len());
    assert_eq!(loaded.tensors(), adapter.tensors());
    for (loaded, extracted) in loaded.layers().iter().zip(adapter.layers()) {
        assert_eq!(loaded.path(), extracted.path());
        assert_eq!(loaded.skew(), extracted.skew());
        assert_eq!(loaded.scale(), extracted.scale());
        assert!(
            loaded
                .kind()
                .is_none_or(|kind| Some(kind) == extracted.kind())
        );
    }
    // A base without adapters, one with other adapters, and one with adapters of the same settings.
    let other = OftConfig::new()
        .with_block_size(2)
        .with_target_modules(["head", "output"]);
    for model_to in [
        base::<L>(),
        inject(base::<L>(), other.with_init(INIT)).unwrap(),
        inject(base::<L>(), &config).unwrap(),
    ] {
        let attached = loaded.attach(model_to).unwrap();
        assert_eq!(numbers(&attached), numbers(&model));
        assert_eq!(trainable(&attached), trainable(&model));
        assert_eq!(distance(outputs(&attached), outputs(&model)), 0.0);
        let merged = (merge(attached.valid()), merge(model.valid()));
        assert_eq!(numbers(&merged.0.unwrap()), numbers(&merged.1.unwrap()));
    }
    // Saving the same adapter again gives the same bytes.
    let again =
        saved(&Adapter::extract_as(&loaded.attach(base::<L>()).unwrap(), loaded.config()).unwrap());
    for file in [CONFIG, TENSORS] {
        let bytes = |folder: &tempfile::TempDir| fs::read(folder.path().join(file)).unwrap();
        if file == TENSORS || config.selection().bias != Bias::All {
            assert_eq!(bytes(&folder), bytes(&again), "{file}");
        }
    }
}

#[test]
fn a_saved_and_loaded_adapter_gives_the_same_model() {
    let oft = || {
        OftConfig::new()
            .with_block_size(4)
            .with_init(INIT)
            .with_target_modules(["hidden", "output"])
    };
    goes_there_and_back::<nn::Linear>(boft());
    goes_there_and_back::<BoftLinear>(boft());
    goes_there_and_back::<BoftLinear>(boft().with_bias(Bias::All).with_block_size(2));
    goes_there_and_back::<BoftLinear>(boft().with_n_butterfly_factor(1).with_block_num(4));
    goes_there_and_back::<nn::Linear>(oft().with_modules_to_save(["head"]));
    goes_there_and_back::<BoftLinear>(oft().with_block_share(true).with_bias(Bias::AdapterOnly));
    goes_there_and_back::<BoftLinear>(oft().with_coft_radius(0.3));
    goes_there_and_back::<BoftLinear>(
        oft()
            .with_block_size(5)
            .with_cayley(Cayley::Neumann { terms: 6 }),
    );
    goes_there_and_back::<BoftLinear>(oft().with_cayley(Cayley::Neumann016 { terms: 3 }));
}

#[derive(Module, Debug)]
struct ConvNet {
    conv: Conv2d,
    norm: BatchNorm,
    head: BoftLinear,
}

impl ConvNet {
    fn new(device: &Device) -> Self {
        let model = Self {
            conv: Conv2dConfig::new([4, 6], [3, 2]).init(device),
            norm: BatchNormConfig::new(6).init(device),
            head: linear([6, 3], 4, DType::F32, device).into(),
        };
        let model = set(model, "conv.weight", |values| noise(values.len(), 8, 0.5));
        set(model, "conv.bias", |values| noise(values.len(), 9, 0.5))
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let features = self.norm.forward(self.conv.forward(images));
        let [batch, channels, height, width] = features.dims();
        let features = features.reshape([batch, channels, height * width]);
        self.head
            .forward(features.mean_dim(2).reshape([batch, channels]))
    }
}

#[test]
fn an_adapter_keeps_convolutions_and_running_statistics() {
    let config = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_target_modules(["conv"])
        .with_modules_to_save(["norm"]);
    let mut model = inject(ConvNet::new(&device()), &config).unwrap();
    for (index, path) in [
        "norm.gamma",
        "norm.beta",
        "norm.running_mean",
        "norm.running_var",
    ]
    .into_iter()
    .enumerate()
    {
        model = set(model, path, |values| {
            let noise = noise(values.len(), 50 + index as u64, 0.4);
            noise.iter().map(|x| 1.0 + x).collect()
        });
    }
    let folder = saved(&Adapter::extract_as(&model, &config).unwrap());
    let expected = [
        ("conv.boft_R", vec![2, 6, 4, 4]),
        ("conv.boft_s", vec![1, 6]),
        ("norm.bias", vec![6]),
        ("norm.num_batches_tracked", vec![]),
        ("norm.running_mean", vec![6]),
        ("norm.running_var", vec![6]),
        ("norm.weight", vec![6]),
    ];
    let expected = expected.map(|(key, shape)| (key.to_string(), shape));
    assert_eq!(shapes(folder.path()), expected);
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert_eq!(loaded.layers()[0].kind(), Some(LayerKind::Conv2d));
    let attached = loaded.attach(ConvNet::new(&device())).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
    let images = rows([2, 4, 5, 6], 6, &Device::flex());
    let outputs = |model: &ConvNet| model.valid().forward(images.clone());
    assert_eq!(distance(outputs(&attached), outputs(&model)), 0.0);
    assert!(distance(outputs(&attached), outputs(&unload(attached.clone()))) > 0.1);
}

#[test]
fn two_adapters_on_one_base_keep_separate_running_statistics() {
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["conv"])
        .with_modules_to_save(["norm"]);
    let adapter = |seed| {
        let model = inject(ConvNet::new(&device()), &config).unwrap();
        let model = set(model, "norm.running_mean", |values| {
            noise(values.len(), seed, 0.5)
        });
        Adapter::extract_as(&model, &config).unwrap()
    };
    let base = ConvNet::new(&Device::flex());
    let before = numbers(&base);
    let served = [61, 62].map(|seed| adapter(seed).attach(base.clone()).unwrap());
    for (model, seed) in served.iter().zip([61, 62]) {
        let mean: Vec<f64> = noise(6, seed, 0.5)
            .iter()
            .map(|x| f64::from(*x as f32))
            .collect();
        assert_eq!(numbers(model)["norm.running_mean"], mean);
    }
    assert_eq!(numbers(&base), before);
}

#[test]
fn attaching_leaves_the_base_weights_as_they_were() {
    let model = base::<BoftLinear>();
    let adapter = Adapter::extract_as(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let before = numbers(&model);
    let attached = adapter.attach(model.clone()).unwrap();
    assert!(distance(outputs(&attached), outputs(&model)) > 0.1);
    assert_eq!(numbers(&model), before, "the base was changed");
    let plain = numbers(&unload(attached));
    for path in ["hidden.weight", "output.weight", "norm.gamma"] {
        assert_eq!(plain[path], before[path], "{path}");
    }
}

#[test]
fn a_loaded_adapter_can_be_inspected_without_a_model() {
    let folder = write(
        &json!({"peft_type": "OFT", "oft_block_size": 3, "block_share": true, "coft": true, "eps": 0.2,
            "use_cayley_neumann": false, "target_modules": ["hidden"], "peft_version": "0.21.2",
            "base_model_name_or_path": "facebook/dinov2-small"}),
        &[("hidden.oft_R.weight", vec![1, 3])],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.base_model(), Some("facebook/dinov2-small"));
    let layer = &adapter.layers()[0];
    assert_eq!(
        (layer.path(), layer.block_size(), layer.n_butterfly_factor()),
        ("hidden", 3, 1)
    );
    assert_eq!(
        (layer.d_input(), layer.d_output(), layer.kind()),
        (None, None, None)
    );
    assert!(layer.block_share() && layer.scale().is_none() && !layer.is_identity());
    let rotation = |d_input| adapter.rotation(layer, [d_input, 16], &Device::flex());
    assert_eq!(rotation(24).unwrap().unwrap().values().dims(), [1, 8, 3, 3]);
    let error = rotation(25).unwrap_err().to_string();
    assert_eq!(
        error,
        "wrong: the adapter of `hidden`: 1 factor of block size 3 and 25 input features do not fit"
    );
    let attached = adapter.attach(base::<BoftLinear>()).unwrap();
    let rotated = adapter
        .rotation(layer, [24, 16], &Device::flex())
        .unwrap()
        .unwrap();
    let weight = base::<BoftLinear>().valid().hidden.weight.val();
    let merged = merge(attached.valid()).unwrap();
    let expected = rotated.weight(weight, None, burn_boft::ops::Side::Left);
    assert!(distance(merged.hidden.weight.val(), expected) < 1e-6);
}
