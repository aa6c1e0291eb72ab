//! Adapters as values and as files: out of a model, into PEFT's folder, and back.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{self, BatchNorm, BatchNormConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_boft::{
    Adapter, AdapterConfig, AdapterLayer, Bias, BoftConfig, BoftLinear, Cayley, Init, KeyMap,
    LayerKind, LoadError, LoadOptions, OftConfig, SaveOptions, SavedTensor, Transformers, inject,
    merge, unload,
};
use common::models::{INPUT, Layer, Net, distance, linear, numbers, rows, set, trainable};
use common::noise;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const INIT: Init = Init::Random { seed: 11 };
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn device() -> Device {
    Device::flex().autodiff()
}

fn boft() -> BoftConfig {
    BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_target_modules(["hidden", "output"])
        .with_bias(Bias::AdapterOnly)
        .with_modules_to_save(["head"])
}

fn oft() -> OftConfig {
    OftConfig::new()
        .with_block_size(4)
        .with_init(INIT)
        .with_target_modules(["hidden", "output"])
        .with_bias(Bias::AdapterOnly)
        .with_modules_to_save(["head"])
}

/// A model in which everything that an adapter keeps differs from the base.
fn adapted<L: Layer>(config: impl Into<AdapterConfig>) -> Net<L> {
    let model = inject(Net::<L>::new(3, &device()), config).unwrap();
    trainable(&model)
        .into_iter()
        .filter(|path| !path.contains(".boft."))
        .fold(model, |model, path| {
            set(model, &path, |values| {
                let noise = noise(values.len(), 77, 0.25);
                values.iter().zip(noise).map(|(v, n)| v + n).collect()
            })
        })
}

fn base<L: Layer>() -> Net<L> {
    Net::new(3, &device())
}

fn outputs<L: Layer>(model: &Net<L>) -> Tensor<2> {
    let input = rows([6, INPUT], 5, &Device::flex());
    model.valid().forward(input)
}

fn saved(adapter: &Adapter) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    folder
}

/// A tensor of a file: its precision, shape and numbers.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn stored(folder: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(folder.join(TENSORS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| {
        let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (key.to_string(), stored)
    });
    tensors.collect()
}

fn shapes(folder: &Path) -> Vec<(String, Vec<usize>)> {
    stored(folder)
        .into_iter()
        .map(|(key, (dtype, shape, _))| {
            assert!(matches!(dtype, Dtype::F32 | Dtype::I64), "{key}");
            (key.replace("base_model.model.", ""), shape)
        })
        .collect()
}

fn settings(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap()
}

fn single(stored: &Stored) -> Vec<f32> {
    assert_eq!(stored.0, Dtype::F32);
    let chunks = stored.2.as_chunks::<4>().0.iter();
    chunks.map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Writes a folder of any content.
fn write(json: &Value, tensors: &[(&str, Vec<usize>)]) -> tempfile::TempDir {
    let tensors: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(index, (key, shape))| {
            let count = shape.iter().product();
            let numbers = noise(count, index as u64 + 1, 0.4);
            let bytes = numbers.iter().flat_map(|x| (*x as f32).to_le_bytes());
            (*key, shape.clone(), bytes.collect::<Vec<u8>>())
        })
        .collect();
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let key = format!("base_model.model.{key}");
        (
            key,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(CONFIG), json.to_string()).unwrap();
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join(TENSORS), bytes).unwrap();
    folder
}

fn boft_json(fields: Value) -> Value {
    let mut json =
        json!({"peft_type": "BOFT", "peft_version": "0.21.2", "target_modules": ["hidden"]});
    let object = json.as_object_mut().unwrap();
    object.extend(fields.as_object().unwrap().clone());
    json
}

/// The tensors of an adapter of `hidden` alone.
fn hidden() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("hidden.boft_R", vec![1, 6, 4, 4]),
        ("hidden.boft_s", vec![16, 1]),
    ]
}

fn refusal(folder: &Path) -> String {
    let error = Adapter::load(folder).unwrap_err().to_string();
    error.replace(&folder.display().to_string(), "…")
}

/// What a load says of the tensors, after the file's name.
fn amiss(folder: &Path) -> String {
    let refusal = refusal(folder);
    let amiss = refusal.strip_prefix(&format!("…/{TENSORS}: "));
    amiss.unwrap_or_else(|| panic!("{refusal}")).to_string()
}

// ---------------------------------------------------------------------------------------------------------
// There and back
// ---------------------------------------------------------------------------------------------------------

fn goes_there_and_back<L: Layer>(config: impl Into<AdapterConfig>) {
    let config = config.into();
    let model = adapted::<L>(&config);
    let adapter = Adapter::extract(&model, &config).unwrap();
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
    // A fresh base, one with other adapters, and one that is adapted alike.
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
    // Files of the same adapter are the same, byte for byte.
    let again =
        saved(&Adapter::extract(&loaded.attach(base::<L>()).unwrap(), loaded.config()).unwrap());
    for file in [CONFIG, TENSORS] {
        let bytes = |folder: &tempfile::TempDir| fs::read(folder.path().join(file)).unwrap();
        if file == TENSORS || config.selection().bias != Bias::All {
            assert_eq!(bytes(&folder), bytes(&again), "{file}");
        }
    }
}

#[test]
fn every_adapter_goes_there_and_back() {
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

#[test]
fn an_adapter_of_parts_is_the_one_that_they_were_taken_from() {
    for config in [AdapterConfig::from(boft()), oft().into()] {
        let adapter = Adapter::extract(&adapted::<BoftLinear>(config.clone()), config).unwrap();
        let adapter = adapter.with_base_model("some/model");
        let layers = adapter.layers().iter().rev().map(|layer| {
            let (skew, scale) = (layer.skew().clone(), layer.scale().cloned());
            AdapterLayer::new(layer.path(), layer.kind(), skew, scale).unwrap()
        });
        let tensors = adapter
            .tensors()
            .iter()
            .map(|tensor| SavedTensor::new(tensor.module(), tensor.name(), tensor.data().clone()));
        let parts = Adapter::from_parts(
            adapter.config().clone(),
            layers.collect(),
            tensors.collect(),
        );
        let parts = parts.unwrap().with_about(&adapter.settings());
        assert_eq!(parts.settings(), adapter.settings());
        let (own, again) = (saved(&adapter), saved(&parts));
        assert_eq!(stored(own.path()), stored(again.path()));
        let outputs = [&adapter, &parts]
            .map(|adapter| outputs(&adapter.attach(base::<BoftLinear>()).unwrap()));
        let [one, other] = outputs;
        assert_eq!(distance(one, other), 0.0);
    }
}

#[test]
fn parts_that_make_no_adapter_are_refused() {
    let data =
        |shape: &[usize]| TensorData::new(vec![0.5f32; shape.iter().product()], shape.to_vec());
    let layer = |skew: TensorData, scale: Option<TensorData>| {
        AdapterLayer::new("hidden", None, skew, scale)
    };
    let refused = |skew: TensorData, scale| layer(skew, scale).unwrap_err().to_string();
    let of = "wrong: the adapter of `hidden` has numbers";
    for (shape, why) in [
        (
            &[6, 6][..],
            "factors, blocks and packed numbers are three axes",
        ),
        (&[1, 6, 5], "no block has 5 numbers, b(b−1)/2"),
        (
            &[2, 3, 6],
            "2 factors of block size 4 and 3 blocks do not fit",
        ),
        (
            &[0, 3, 6],
            "0 factors of block size 4 and 3 blocks do not fit",
        ),
    ] {
        let expected = format!("{of} {shape:?} F32: {why}");
        assert_eq!(refused(data(shape), None), expected);
    }
    assert_eq!(
        refused(data(&[1, 6, 6]), Some(data(&[16, 1]))),
        format!("{of} [16, 1] F32: a scale has one axis")
    );
    assert_eq!(
        refused(TensorData::new(vec![1i64; 6], [1, 1, 6]), None),
        format!("{of} [1, 1, 6] I64: an adapter computes with floats")
    );
    let scaled = layer(data(&[1, 6, 6]), Some(data(&[16]))).unwrap();
    let bias = SavedTensor::new("hidden", "bias", data(&[15]));
    let flag = SavedTensor::new("head", "flag", TensorData::new(vec![true], [1]));
    let error = Adapter::from_parts(oft(), vec![scaled.clone()], vec![bias, flag]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden` has a scale, several factors or blocks that are not shared, and the settings say \
         OFT without\n\
         wrong: `head.flag` is Bool(Native), which no file keeps\n\
         wrong: the bias of `hidden` is [15], where its adapter has 16 outputs"
    );
    let adapter = Adapter::from_parts(boft(), vec![scaled], Vec::new()).unwrap();
    assert_eq!(
        adapter.settings()["boft_n_butterfly_factor"],
        1,
        "as the numbers say"
    );
}

#[test]
fn the_file_has_the_keys_and_shapes_of_peft() {
    let folder = saved(&Adapter::extract(&adapted::<BoftLinear>(boft()), boft()).unwrap());
    let expected = [
        ("head.bias", vec![5]),
        ("head.weight", vec![5, 12]),
        ("hidden.base_layer.bias", vec![16]),
        ("hidden.boft_R", vec![2, 6, 4, 4]),
        ("hidden.boft_s", vec![16, 1]),
        ("output.base_layer.bias", vec![12]),
        ("output.boft_R", vec![2, 4, 4, 4]),
        ("output.boft_s", vec![12, 1]),
    ];
    let expected = expected.map(|(key, shape)| (key.to_string(), shape));
    assert_eq!(shapes(folder.path()), expected);
    let bytes = fs::read(folder.path().join(TENSORS)).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    assert_eq!(metadata, [("format".to_string(), "pt".to_string())].into());

    let model = adapted::<BoftLinear>(boft());
    let numbers = numbers(&model);
    let file = stored(folder.path());
    let r = single(&file["base_model.model.hidden.boft_R"]);
    let skew = &numbers["hidden.weight.boft.skew"];
    assert_eq!((r[1], r[4], r[0]), (skew[0] as f32, -skew[0] as f32, 0.0));
    let head = single(&file["base_model.model.head.weight"]);
    let ours = &numbers["head.weight"];
    assert_eq!((head[1], head[12]), (ours[5] as f32, ours[1] as f32));

    let json = settings(folder.path());
    assert_eq!(json["bias"], "boft_only");
    assert_eq!(json["boft_n_butterfly_factor"], 2);
    assert_eq!(json["target_modules"], json!(["hidden", "output"]));
    assert_eq!(json["modules_to_save"], json!(["head"]));
}

#[test]
fn all_linear_is_written_as_the_names_it_stood_for() {
    let config = boft().with_target_modules("all-linear");
    let folder = saved(&Adapter::extract(&adapted::<BoftLinear>(&config), &config).unwrap());
    assert_eq!(
        settings(folder.path())["target_modules"],
        json!(["hidden", "output"])
    );
}

#[test]
fn a_scale_that_is_not_trained_is_written_as_ones() {
    let config = boft().with_scale(false);
    let model = adapted::<BoftLinear>(&config);
    let folder = saved(&Adapter::extract(&model, &config).unwrap());
    let file = stored(folder.path());
    assert_eq!(single(&file["base_model.model.hidden.boft_s"]), [1.0; 16]);
    let attached = Adapter::load(folder.path())
        .unwrap()
        .0
        .attach(base::<BoftLinear>())
        .unwrap();
    assert_eq!(distance(outputs(&attached), outputs(&model)), 0.0);
}

#[test]
fn half_precision_is_written_on_request_and_read() {
    let model = adapted::<BoftLinear>(boft());
    let adapter = Adapter::extract(&model, boft()).unwrap();
    for (dtype, stored_as, tolerance) in [
        (FloatDType::F16, Dtype::F16, 2e-3),
        (FloatDType::BF16, Dtype::BF16, 2e-2),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let options = SaveOptions::new().with_dtype(dtype);
        adapter.save_with(folder.path(), &options).unwrap();
        let file = stored(folder.path());
        assert_eq!(file["base_model.model.hidden.boft_R"].0, stored_as);
        assert_eq!(file["base_model.model.output.boft_s"].0, stored_as);
        assert_eq!(file["base_model.model.head.weight"].0, Dtype::F32);
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        assert_eq!(loaded.layers()[0].skew().dtype(), DType::F32);
        let attached = loaded.attach(base::<BoftLinear>()).unwrap();
        let drift = distance(outputs(&attached), outputs(&model));
        assert!(drift > 0.0 && drift < tolerance, "{dtype:?}: {drift}");
    }
}

#[test]
fn double_precision_stays_double() {
    #[derive(Module, Debug)]
    struct One {
        hidden: BoftLinear,
    }
    let one = |device: &Device| One {
        hidden: linear([24, 16], 9, DType::F64, device).into(),
    };
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["hidden"]);
    let model = inject(one(&device()), &config).unwrap();
    let folder = saved(&Adapter::extract(&model, &config).unwrap());
    let file = stored(folder.path());
    assert_eq!(file["base_model.model.hidden.boft_R"].0, Dtype::F64);
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        numbers(&loaded.attach(one(&device())).unwrap()),
        numbers(&model)
    );
}

#[test]
fn named_adapters_have_folders_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let first = Adapter::extract(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let config = boft().with_block_size(2);
    let second = Adapter::extract(&adapted::<BoftLinear>(&config), &config).unwrap();
    first.save(folder.path()).unwrap();
    let named = SaveOptions::new().with_name("digits");
    second.save_with(folder.path(), &named).unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    first
        .save_with(folder.path(), &SaveOptions::new().with_name("default"))
        .unwrap();

    let load = |name: &str| {
        let options = LoadOptions::new().with_name(name);
        Adapter::load_with(folder.path(), &options).map(|(adapter, _)| adapter)
    };
    assert_eq!(load("default").unwrap().layers()[0].block_size(), 4);
    assert_eq!(load("digits").unwrap().layers()[0].block_size(), 2);
    assert!(folder.path().join("digits").join(TENSORS).exists());
    assert_eq!(fs::read(folder.path().join("notes.txt")).unwrap(), b"mine");
    let error = load("../digits").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`../digits` cannot name an adapter: it must be the name of one folder, without `.` and separators"
    );
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
fn convolutions_and_running_statistics_travel() {
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
    let folder = saved(&Adapter::extract(&model, &config).unwrap());
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
fn adapters_served_from_one_base_have_running_statistics_of_their_own() {
    let config = BoftConfig::new()
        .with_init(INIT)
        .with_target_modules(["conv"])
        .with_modules_to_save(["norm"]);
    let adapter = |seed| {
        let model = inject(ConvNet::new(&device()), &config).unwrap();
        let model = set(model, "norm.running_mean", |values| {
            noise(values.len(), seed, 0.5)
        });
        Adapter::extract(&model, &config).unwrap()
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
fn attaching_shares_the_base() {
    let model = base::<BoftLinear>();
    let adapter = Adapter::extract(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let before = numbers(&model);
    let first = adapter.attach(model.clone()).unwrap();
    assert_eq!(numbers(&model), before, "a clone was changed");
    let plain = unload(first);
    assert_eq!(numbers(&plain)["hidden.weight"], before["hidden.weight"]);
}

#[test]
fn an_adapter_is_a_value_that_needs_no_model() {
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

// ---------------------------------------------------------------------------------------------------------
// What the tensors say
// ---------------------------------------------------------------------------------------------------------

#[test]
fn the_number_of_factors_comes_from_the_tensor() {
    let folder = write(&boft_json(json!({"boft_n_butterfly_factor": 2})), &hidden());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.layers()[0].n_butterfly_factor(), 1);
    assert_eq!(
        report.converted,
        [
            "`hidden` has 1 factor, not the 2 of the configuration: PEFT without its CUDA kernel trains one and does \
             not say so"
        ]
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    let adapter = Adapter::extract(&model, adapter.config()).unwrap();
    let folder = saved(&adapter);
    assert_eq!(settings(folder.path())["boft_n_butterfly_factor"], 1);
}

#[test]
fn the_block_size_comes_from_the_tensor() {
    let folder = write(
        &boft_json(json!({"boft_block_size": 8, "target_modules": ["hidden"]})),
        &hidden(),
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.converted,
        ["`hidden` has blocks of 4, not those of 8 that the configuration means"]
    );
    assert_eq!(settings(saved(&adapter).path())["boft_block_size"], 4);
}

#[test]
fn layers_with_factors_of_their_own_load_and_are_not_written() {
    let folder = write(
        &boft_json(json!({"boft_n_butterfly_factor": 2, "target_modules": ["hidden", "output"]})),
        &[
            ("hidden.boft_R", vec![2, 6, 4, 4]),
            ("hidden.boft_s", vec![16, 1]),
            ("output.boft_R", vec![1, 4, 4, 4]),
            ("output.boft_s", vec![12, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(report.converted.len(), 1, "{report}");
    adapter.attach(base::<BoftLinear>()).unwrap();
    let error = adapter.save(folder.path().join("new")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `output`: it has 1 factor where the configuration says 2, and PEFT has one \
         number for all layers"
    );
    assert!(!folder.path().join("new").exists());
}

#[test]
fn blocks_of_one_channel_are_kept_and_not_attached() {
    let json = json!({"peft_type": "OFT", "oft_block_size": 3, "target_modules": ["hidden", "output"],
        "peft_version": "0.21.2"});
    let folder = write(
        &json,
        &[
            ("hidden.oft_R.weight", vec![24, 0]),
            ("output.oft_R.weight", vec![4, 6]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["`hidden` has blocks of one channel, which do not rotate; nothing is attached there"]
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    assert!(model.hidden.adapter().is_none() && model.output.adapter().is_some());
}

#[test]
fn a_scale_beside_blocks_of_one_channel_is_not_lost() {
    let folder = write(
        &boft_json(json!({"boft_block_size": 1})),
        &[
            ("hidden.boft_R", vec![1, 24, 1, 1]),
            ("hidden.boft_s", vec![16, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "`hidden` has blocks of one channel, which do not rotate; its scale can be merged, and not attached"
        ]
    );
    assert!(!adapter.layers()[0].is_identity());
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden`: its blocks of one channel do not rotate, and a scale alone is not attached; \
         merge it with the tool `burn-boft`, or in PEFT"
    );
}

#[test]
fn the_old_series_is_told_where_it_is_computed_and_not_of_exact_squares() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/old");
    let warnings = |name: &str| Adapter::load(fixtures.join(name)).unwrap().1.warnings;
    assert_eq!(
        warnings("oft-neumann-4"),
        [
            "the Neumann series of PEFT 0.16 and 0.17 is used with 4 terms (peft_version: none); PEFT 0.18 and later \
             would compute another from the same numbers"
        ]
    );
    for name in [
        "oft-square",
        "oft-square-coft",
        "oft-square-mlp",
        "oft-square-share",
    ] {
        assert_eq!(warnings(name), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn an_old_square_is_written_when_its_model_has_told_its_kind() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft/old");
    let (adapter, _) = Adapter::load(fixtures.join("oft-square-conv")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = adapter.save(folder.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `conv1`: its file does not tell a linear layer from a convolution, whose scales PEFT \
         stores differently; attach the adapter to its model and extract it there"
    );

    #[derive(Module, Debug)]
    struct Model {
        conv1: Conv2d,
    }
    let model = Model {
        conv1: Conv2dConfig::new([4, 6], [3, 3]).init(&device()),
    };
    let model = adapter.attach(model).unwrap();
    let adapter = Adapter::extract(&model, adapter.config()).unwrap();
    let folder = saved(&adapter);
    assert_eq!(
        shapes(folder.path())[1],
        ("conv1.boft_s".to_string(), vec![1, 6])
    );
}

#[test]
fn a_shared_square_of_old_becomes_blocks_when_it_meets_its_model() {
    let folder = write(
        &json!({"peft_type": "OFT", "r": 0, "oft_block_size": 4, "block_share": true, "module_dropout": 0.1,
            "target_modules": ["hidden"]}),
        &[
            ("hidden.oft_r", vec![1, 4, 4]),
            ("hidden.oft_s", vec![16, 1]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.converted,
        ["`hidden` has the squares of PEFT 0.14 to 0.15.2: it is BOFT with one factor"]
    );
    let AdapterConfig::Boft(config) = adapter.config() else {
        panic!("{:?}", adapter.config());
    };
    assert_eq!((config.dropout, config.n_butterfly_factor), (0.1, 1));
    let error = adapter.save(folder.path().join("new")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `hidden`: its blocks share their numbers, and BOFT's have their own; attach the \
         adapter to its model and extract it there"
    );
    let model = adapter.attach(base::<BoftLinear>()).unwrap();
    let whole = Adapter::extract(&model, adapter.config()).unwrap();
    let folder = saved(&whole);
    let again = Adapter::load(folder.path()).unwrap().0;
    assert_eq!(again.layers()[0].skew().shape().to_vec(), [1, 6, 6]);
    let again = again.attach(base::<BoftLinear>()).unwrap();
    assert_eq!(distance(outputs(&again), outputs(&model)), 0.0);
}

// ---------------------------------------------------------------------------------------------------------
// Strict and partial
// ---------------------------------------------------------------------------------------------------------

#[test]
fn anything_missing_or_unexpected_is_an_error_that_lists_all_of_it() {
    let folder = write(
        &boft_json(json!({"target_modules": ["hidden", "output"]})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("output.boft_s", vec![12, 1]),
            ("output.lora_A.weight", vec![2, 16]),
            ("output.base_layer.bias", vec![12]),
            ("emb.oft_embedding_R.weight", vec![4, 6]),
            ("hidden.base_layer.weight", vec![16, 24]),
        ],
    );
    let tensors = fs::read(folder.path().join(TENSORS)).unwrap();
    assert_eq!(
        amiss(folder.path()),
        "missing: `base_model.model.hidden.boft_s`\n\
         missing: `base_model.model.output.boft_R`\n\
         unexpected: `base_model.model.emb.oft_embedding_R.weight`: an adapter of an embedding; only linear layers and \
         convolutions are adapted\n\
         unexpected: `base_model.model.hidden.base_layer.weight`: a base weight; only adapters and biases are read\n\
         unexpected: `base_model.model.output.base_layer.bias`: the bias of an adapted layer, where the configuration \
         trains none\n\
         unexpected: `base_model.model.output.lora_A.weight`: neither an adapter, nor a trained bias, nor part of a \
         module to save"
    );
    let partial = LoadOptions::new().allow_partial(true);
    let (adapter, report) = Adapter::load_with(folder.path(), &partial).unwrap();
    assert_eq!((report.missing.len(), report.unexpected.len()), (2, 4));
    assert_eq!(adapter.layers().len(), 1);
    assert_eq!(adapter.layers()[0].path(), "hidden");
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: the adapter of `output`, which `target_modules` names"
    );
    let (model, report) = adapter.attach_partial(base::<BoftLinear>()).unwrap();
    assert_eq!(report.applied, ["the adapter of `hidden`"]);
    assert_eq!(report.missing.len(), 1);
    assert!(model.hidden.adapter().is_some() && model.output.adapter().is_none());
    assert_eq!(fs::read(folder.path().join(TENSORS)).unwrap(), tensors);
}

#[test]
fn a_model_that_does_not_fit_is_an_error_that_lists_all_of_it() {
    let config = boft().with_bias(Bias::All);
    let adapter = Adapter::extract(&adapted::<BoftLinear>(&config), &config).unwrap();

    #[derive(Module, Debug)]
    struct Other {
        hidden: BoftLinear,
        out: BoftLinear,
        head: BoftLinear,
    }
    let layer = |sizes| BoftLinear::from(linear(sizes, 1, DType::F32, &device()));
    let other = Other {
        hidden: layer([32, 16]),
        out: layer([16, 12]),
        head: layer([12, 7]),
    };
    let before = numbers(&other);
    let error = adapter.attach(other.clone()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `out.bias`, a bias that the configuration trains; PEFT 0.20 and older trained some and did not save \
         them\n\
         unexpected: an adapter of `output`, where the model has no linear layer or convolution; it has `out`\n\
         unexpected: `norm.bias`, which the model has no parameter for\n\
         unexpected: `output.bias`, which the model has no parameter for\n\
         wrong: `head.bias` is [7] in the model, [5] in the file\n\
         wrong: `head.weight` is [12, 7] in the model, [5, 12] in the file\n\
         wrong: the adapter of `hidden`: it rotates 24 input features, the layer has 32"
    );
    assert!(adapter.attach_partial(other.clone()).is_err());
    assert_eq!(numbers(&other), before);
}

#[test]
fn biases_that_an_old_file_lost_are_missing() {
    let json = boft_json(json!({"bias": "boft_only", "peft_version": "0.20.0"}));
    let folder = write(&json, &hidden());
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `hidden.bias`, a bias that the configuration trains; PEFT 0.20 and older trained some and did not \
         save them"
    );
    assert!(adapter.attach_partial(base::<BoftLinear>()).is_ok());
}

#[test]
fn a_module_to_save_without_tensors_is_missing_only_where_the_model_has_it() {
    let json = boft_json(json!({"modules_to_save": ["head", "score"]}));
    let folder = write(&json, &hidden());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["head", "score"].map(|name| format!(
            "`modules_to_save` names `{name}`, and the file has nothing of it"
        ))
    );
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "missing: `head.weight`, a part of a module to save\n\
         missing: `head.bias`, a part of a module to save"
    );
    let saved = saved(&adapter);
    assert_eq!(
        settings(saved.path())["modules_to_save"],
        json!(["head", "score"])
    );
}

#[test]
fn what_the_settings_name_and_the_file_lacks_is_told_once() {
    let json = boft_json(json!({
        "bias": "all", "target_modules": ["hidden", "output", "head", "classifier"],
        "modules_to_save": ["head", "classifier", "score"]
    }));
    let classifier = [
        ("classifier.weight", vec![5, 12]),
        ("classifier.bias", vec![5]),
    ];
    let folder = write(&json, &[hidden(), classifier.to_vec()].concat());
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        [
            "`target_modules` names `output`, and the file has no adapter of it",
            "`modules_to_save` names `head`, and the file has nothing of it",
            "the configuration trains biases, and the file has none: the layers have none, or PEFT 0.20 or older \
             trained them and did not save them",
        ]
    );
    assert_eq!(
        adapter.config().selection().modules_to_save,
        ["classifier", "head"],
        "PEFT names `score` beside `classifier` by itself"
    );
    let partial = LoadOptions::new().allow_partial(true);
    let nothing = write(&json, &classifier);
    let (_, report) = Adapter::load_with(nothing.path(), &partial).unwrap();
    assert_eq!(
        (report.missing, report.warnings),
        (
            vec!["the file holds no `boft_R` at all".to_string()],
            Vec::new()
        )
    );
}

#[test]
fn the_adapter_of_a_convolution_is_for_no_linear_layer() {
    let folder = write(
        &boft_json(json!({})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", vec![1, 16]),
        ],
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden` is for a convolution, the model has a linear layer"
    );
}

#[test]
fn a_foreign_reparameterization_is_refused() {
    use burn::module::Lora;
    let model = base::<BoftLinear>().apply_lora(Lora::new(2, 4.0));
    let adapter = Adapter::extract(&adapted::<BoftLinear>(boft()), boft()).unwrap();
    let error = adapter.attach(model).unwrap_err().to_string();
    assert!(
        error.contains("`hidden.weight` already carries the reparameterization `lora`"),
        "{error}"
    );
}

// ---------------------------------------------------------------------------------------------------------
// Extraction
// ---------------------------------------------------------------------------------------------------------

#[test]
fn extraction_wants_the_settings_of_the_injection() {
    let error = Adapter::extract(&base::<BoftLinear>(), boft()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model carries no adapter; inject one first"
    );

    let oft = OftConfig::new()
        .with_block_size(4)
        .with_target_modules(["hidden"]);
    let model = inject(base::<BoftLinear>(), oft.clone().with_coft_radius(0.5)).unwrap();
    let refused = |config: AdapterConfig| Adapter::extract(&model, config).unwrap_err().to_string();
    assert_eq!(
        refused(oft.clone().into()),
        "`hidden` was adapted with COFT radius 0.5, but the configuration says no COFT radius"
    );
    assert_eq!(
        refused(oft.clone().with_cayley(Cayley::Neumann { terms: 5 }).into()),
        "`hidden` was adapted with Exact, but the configuration says Neumann { terms: 5 }"
    );
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract(&model, &oft).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`hidden` was adapted with BOFT, but the configuration says OFT"
    );
    let wrong_size = boft().with_block_size(2);
    let adapter = Adapter::extract(&model, wrong_size).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = adapter.save(folder.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PEFT's format cannot hold `hidden`: it has blocks of 4, and PEFT makes blocks of 2 of the configuration"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn nothing_that_was_trained_is_left_behind() {
    let model = adapted::<BoftLinear>(boft());
    let error = Adapter::extract(&model, boft().with_bias(Bias::None)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`hidden.bias`, `output.bias` would be left behind, being trained while the configuration keeps neither their \
         biases nor their modules; name those in modules_to_save, or freeze them"
    );
    // A model in validation is the same model.
    let adapter = Adapter::extract(&model.valid(), boft()).unwrap();
    assert_eq!(adapter.tensors().len(), 4);
    assert!(Adapter::extract(&model.valid(), boft().with_bias(Bias::None)).is_err());
}

// ---------------------------------------------------------------------------------------------------------
// Malformed files
// ---------------------------------------------------------------------------------------------------------

#[test]
fn files_that_are_not_there_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let not_found = "No such file or directory (os error 2)";
    assert_eq!(
        refusal(folder.path()),
        format!("…/{CONFIG} cannot be read: {not_found}")
    );
    fs::write(folder.path().join(CONFIG), boft_json(json!({})).to_string()).unwrap();
    assert_eq!(
        refusal(folder.path()),
        format!("…/{TENSORS} cannot be read: {not_found}")
    );
    fs::write(folder.path().join("adapter_model.bin"), "pickle").unwrap();
    assert_eq!(
        refusal(folder.path()),
        "… has adapter_model.bin and no adapter_model.safetensors; pickles run code, so load it in PEFT and save it \
         there as safetensors"
    );
}

#[test]
fn settings_that_are_no_settings_are_refused() {
    let folder = write(&boft_json(json!({})), &hidden());
    let refused = |text: &str| {
        fs::write(folder.path().join(CONFIG), text).unwrap();
        refusal(folder.path())
    };
    assert_eq!(
        refused("{\"peft_type\": "),
        format!("…/{CONFIG} is not a JSON object: EOF while parsing a value at line 1 column 14")
    );
    assert_eq!(
        refused("[1]"),
        format!("…/{CONFIG} is not a JSON object: it holds another kind of value")
    );
    assert_eq!(
        refused(r#"{"peft_type": "LORA"}"#),
        format!("…/{CONFIG}: `peft_type` is LORA, and only BOFT and OFT are supported")
    );
    assert!(refused("\u{feff}{}").contains("is not a JSON object"));
    assert!(refused("").contains("is not a JSON object"));
}

/// A safetensors file with any header.
fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    bytes
}

#[test]
fn hostile_tensor_files_are_errors() {
    let folder = write(&boft_json(json!({})), &hidden());
    let good = fs::read(folder.path().join(TENSORS)).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(folder.path().join(TENSORS), bytes).unwrap();
        refusal(folder.path())
    };
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let huge = u64::MAX;
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("", Vec::new()),
        ("three bytes", vec![1, 2, 3]),
        (
            "a header beyond the file",
            1_000_000u64.to_le_bytes().to_vec(),
        ),
        ("a header of all there is", huge.to_le_bytes().to_vec()),
        ("no JSON", safetensors_file("nonsense", 0)),
        (
            "no UTF-8",
            [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(),
        ),
        ("cut", good[..good.len() - 1].to_vec()),
        ("too long", [&good[..], &[0]].concat()),
        (
            "an overflow",
            safetensors_file(&entry(&format!("[{huge},{huge}]"), "[0,4]"), 4),
        ),
        (
            "a wrong length",
            safetensors_file(&entry("[3]", "[0,4]"), 4),
        ),
        (
            "offsets backwards",
            safetensors_file(&entry("[1]", "[4,0]"), 4),
        ),
        (
            "offsets outside",
            safetensors_file(&entry("[1]", "[0,400]"), 4),
        ),
        (
            "a negative shape",
            safetensors_file(&entry("[-1]", "[0,4]"), 4),
        ),
        (
            "an unknown precision",
            safetensors_file(&entry("[1]", "[0,4]").replace("F32", "F7"), 4),
        ),
        ("deep nesting", safetensors_file(&"[".repeat(100_000), 0)),
    ];
    for (what, bytes) in files {
        let error = refused(&bytes);
        let start = format!("…/{TENSORS} is not a safetensors file: ");
        assert!(error.starts_with(&start), "{what}: {error}");
        assert!(
            error.len() < 400 && !error.contains('\n'),
            "{what}: {error}"
        );
    }
    // Every prefix of a file, and every byte of its header changed, is an error or a file.
    for end in 0..good.len().min(400) {
        assert!(refused(&good[..end]).contains("is not a safetensors file"));
    }
    for position in 0..200 {
        let mut bytes = good.clone();
        bytes[position] ^= 0x15;
        fs::write(folder.path().join(TENSORS), bytes).unwrap();
        _ = Adapter::load(folder.path());
    }
}

#[test]
fn tensors_that_cannot_be_are_all_told() {
    let boft = |tensors: &[(&str, Vec<usize>)]| amiss(write(&boft_json(json!({})), tensors).path());
    for (shape, why) in [
        (
            vec![6, 4, 4],
            "factors, blocks, rows and columns are four axes",
        ),
        (vec![1, 6, 4, 3], "factors and blocks of squares expected"),
        (vec![0, 6, 4, 4], "factors and blocks of squares expected"),
        (vec![1, 0, 4, 4], "factors and blocks of squares expected"),
        (vec![1, 6, 0, 0], "factors and blocks of squares expected"),
        (
            vec![3, 6, 4, 4],
            "3 factors of block size 4 and 6 blocks do not fit",
        ),
        (
            vec![2, 6, 3, 3],
            "2 factors of block size 3 and 6 blocks do not fit",
        ),
    ] {
        let expected = format!("wrong: `base_model.model.hidden.boft_R` is {shape:?}: {why}");
        let error = boft(&[("hidden.boft_R", shape), ("hidden.boft_s", vec![16, 1])]);
        assert_eq!(error, expected);
    }
    for shape in [vec![16], vec![4, 4], vec![0, 1], vec![16, 1, 1], vec![]] {
        let expected = format!(
            "wrong: `base_model.model.hidden.boft_s` is {shape:?}: (outputs, 1) or (1, outputs) expected"
        );
        let error = boft(&[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", shape),
        ]);
        assert_eq!(error, expected);
    }
    assert_eq!(
        boft(&[("hidden.oft_R.weight", vec![6, 6])]),
        "unexpected: `base_model.model.hidden.oft_R.weight`: an OFT tensor in a BOFT adapter"
    );
    assert_eq!(boft(&[]), "missing: the file holds no `boft_R` at all");

    let oft = |fields: Value, tensors: &[(&str, Vec<usize>)]| {
        let mut json = json!({"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.21.2"});
        let object = json.as_object_mut().unwrap();
        object.extend(fields.as_object().unwrap().clone());
        amiss(write(&json, tensors).path())
    };
    let packed = |shape: &[usize], why: &str| {
        format!("wrong: `base_model.model.hidden.oft_R.weight` is {shape:?}: {why}")
    };
    let one = |shape: &[usize]| oft(json!({}), &[("hidden.oft_R.weight", shape.to_vec())]);
    assert_eq!(
        one(&[6, 5]),
        packed(&[6, 5], "no block has 5 numbers, b(b−1)/2")
    );
    assert_eq!(
        one(&[6]),
        packed(&[6], "blocks and packed numbers are two axes")
    );
    assert_eq!(one(&[0, 6]), packed(&[0, 6], "blocks expected, 0 found"));
    assert_eq!(
        oft(
            json!({"block_share": true}),
            &[("hidden.oft_R.weight", vec![2, 6])]
        ),
        packed(&[2, 6], "one block expected, 2 found")
    );
    assert_eq!(
        oft(json!({}), &[("hidden.oft_r", vec![6, 4, 4])]),
        "wrong: `base_model.model.hidden.oft_r` without `oft_s`: PEFT 0.13 or older wrote it, whose rotation is another; \
         merge it with that version, or train it anew"
    );
    assert_eq!(
        oft(
            json!({}),
            &[
                ("hidden.oft_r", vec![6, 4, 3]),
                ("hidden.oft_s", vec![16, 1])
            ]
        ),
        "wrong: `base_model.model.hidden.oft_r` is [6, 4, 3]: blocks must be squares"
    );
    assert_eq!(
        oft(
            json!({"coft": true, "block_share": true}),
            &[
                ("hidden.oft_r", vec![1, 4, 4]),
                ("hidden.oft_s", vec![16, 1])
            ]
        ),
        "wrong: `base_model.model.hidden.oft_r` is [1, 4, 4]: the radius of a shared block depends on the number of \
         blocks, which the file does not hold"
    );
    let mixed = [
        ("hidden.oft_R.weight", vec![6, 6]),
        ("output.oft_r", vec![4, 4, 4]),
        ("output.oft_s", vec![12, 1]),
    ];
    assert_eq!(
        oft(json!({}), &mixed),
        "wrong: `base_model.model.hidden.oft_R.weight` beside layers of PEFT 0.14 to 0.15.2"
    );
}

#[test]
fn keys_are_read_by_components() {
    // `soft_gate` holds `oft_`, and a layer may be called like a tensor's end.
    let folder = write(
        &boft_json(
            json!({"target_modules": ["soft_gate.boft_s", "hidden"], "modules_to_save": ["gate"]}),
        ),
        &[
            ("soft_gate.boft_s.boft_R", vec![1, 6, 4, 4]),
            ("soft_gate.boft_s.boft_s", vec![16, 1]),
            ("gate.weight", vec![3, 2]),
            ("soft_gate.weight", vec![3, 2]),
        ],
    );
    let (adapter, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.layers()[0].path(), "soft_gate.boft_s");
    let modules: Vec<_> = adapter.tensors().iter().map(|t| t.module()).collect();
    // PEFT saves whatever ends with an entry.
    assert_eq!(modules, ["gate", "soft_gate"]);
    assert_eq!(report.applied.len(), 4);
    let names = &adapter.config().selection().modules_to_save;
    assert_eq!(names, &["gate", "soft_gate"]);
}

#[test]
fn numbers_that_are_not_finite_are_told() {
    let model = set(
        adapted::<BoftLinear>(boft()),
        "hidden.weight.boft.scale",
        |mut values| {
            values[3] = f64::NAN;
            values
        },
    );
    let folder = saved(&Adapter::extract(&model, boft()).unwrap());
    let (_, report) = Adapter::load(folder.path()).unwrap();
    assert_eq!(
        report.warnings,
        ["the adapter of `hidden` holds NaN or infinity"]
    );
}

#[test]
fn a_pattern_that_cannot_be_used_is_refused_with_the_reason() {
    let folder = write(
        &boft_json(json!({"target_modules": "hidden|(out"})),
        &hidden(),
    );
    let (adapter, _) = Adapter::load(folder.path()).unwrap();
    let error = adapter.attach(base::<BoftLinear>()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "target_modules: the pattern `hidden|(out` cannot be used: Parsing error at position 11: Opening parenthesis \
         without closing parenthesis"
    );
    let folder = write(
        &boft_json(json!({"target_modules": r"(?!head)\w*dden"})),
        &hidden(),
    );
    Adapter::load(folder.path())
        .unwrap()
        .0
        .attach(base::<BoftLinear>())
        .unwrap();
}

// ---------------------------------------------------------------------------------------------------------
// Names
// ---------------------------------------------------------------------------------------------------------

/// A layer of DINOv2 with the names of its files.
#[derive(Module, Debug)]
struct Dino {
    encoder: Encoder,
    classifier: BoftLinear,
}

#[derive(Module, Debug)]
struct Encoder {
    layer: Vec<DinoLayer>,
}

#[derive(Module, Debug)]
struct DinoLayer {
    attention: Attention,
    mlp: SwiGlu,
}

#[derive(Module, Debug)]
struct Attention {
    attention: Projections,
    output: Dense,
}

#[derive(Module, Debug)]
struct Projections {
    query: BoftLinear,
    value: BoftLinear,
}

#[derive(Module, Debug)]
struct Dense {
    dense: BoftLinear,
}

#[derive(Module, Debug)]
struct SwiGlu {
    weights_in: BoftLinear,
    weights_out: BoftLinear,
}

impl Dino {
    fn new() -> Self {
        let mut seed = 0;
        let mut layer = |sizes| {
            seed += 2;
            BoftLinear::from(linear(sizes, seed, DType::F32, &device()))
        };
        let block = |layer: &mut dyn FnMut([usize; 2]) -> BoftLinear| DinoLayer {
            attention: Attention {
                attention: Projections {
                    query: layer([8, 12]),
                    value: layer([8, 12]),
                },
                output: Dense {
                    dense: layer([12, 8]),
                },
            },
            mlp: SwiGlu {
                weights_in: layer([8, 20]),
                weights_out: layer([12, 8]),
            },
        };
        Self {
            encoder: Encoder {
                layer: vec![block(&mut layer), block(&mut layer)],
            },
            classifier: layer([8, 3]),
        }
    }
}

fn dino() -> BoftConfig {
    BoftConfig::new()
        .with_block_size(2)
        .with_n_butterfly_factor(2)
        .with_init(INIT)
        .with_bias(Bias::AdapterOnly)
        .with_target_modules([
            "query",
            "value",
            "output.dense",
            "weights_in",
            "weights_out",
        ])
        .with_modules_to_save(["classifier"])
}

#[test]
fn dinov2_is_written_for_either_transformers_and_read_from_both() {
    let model = inject(Dino::new(), dino()).unwrap();
    let adapter = Adapter::extract(&model, dino()).unwrap();
    let mut written = Vec::new();
    for version in [Transformers::V4, Transformers::V5] {
        let folder = tempfile::tempdir().unwrap();
        let names = SaveOptions::new().with_key_map(KeyMap::dinov2(version));
        adapter.save_with(folder.path(), &names).unwrap();
        let modules: BTreeSet<_> = shapes(folder.path())
            .into_iter()
            .filter_map(|(key, _)| {
                let key = key
                    .strip_prefix("encoder.layer.1.")?
                    .strip_suffix(".boft_R")?;
                Some(key.to_string())
            })
            .collect();
        written.push(modules.into_iter().collect::<Vec<_>>());
        // Either map reads either file.
        for reader in [Transformers::V4, Transformers::V5] {
            let names = LoadOptions::new().with_key_map(KeyMap::dinov2(reader));
            let (loaded, report) = Adapter::load_with(folder.path(), &names).unwrap();
            assert!(report.converted.is_empty(), "{report}");
            let attached = loaded.attach(Dino::new()).unwrap();
            assert_eq!(
                numbers(&attached),
                numbers(&model),
                "{version:?} by {reader:?}"
            );
            let again = Adapter::extract(&attached, loaded.config()).unwrap();
            assert_eq!(again.layers(), adapter.layers());
        }
    }
    let v4 = [
        "attention.attention.query",
        "attention.attention.value",
        "attention.output.dense",
        "mlp.weights_in",
        "mlp.weights_out",
    ];
    let v5 = [
        "attention.o_proj",
        "attention.q_proj",
        "attention.v_proj",
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ];
    assert_eq!(written, [v4.to_vec(), v5.to_vec()]);
}

#[test]
fn a_fused_layer_splits_into_the_same_rotation_twice_and_halves_of_the_rest() {
    let adapter = Adapter::extract(&inject(Dino::new(), dino()).unwrap(), dino()).unwrap();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapter.save(whole.path()).unwrap();
    let names = SaveOptions::new().with_key_map(KeyMap::dinov2(Transformers::V5));
    adapter.save_with(parts.path(), &names).unwrap();
    let (whole, file) = (stored(whole.path()), stored(parts.path()));
    let key = |name: &str| format!("base_model.model.encoder.layer.0.mlp.{name}");
    let rotation = &whole[&key("weights_in.boft_R")];
    assert_eq!(&file[&key("gate_proj.boft_R")], rotation);
    assert_eq!(&file[&key("up_proj.boft_R")], rotation);
    for (name, shape) in [("boft_s", vec![10, 1]), ("base_layer.bias", vec![10])] {
        let all = single(&whole[&key(&format!("weights_in.{name}"))]);
        let gate = &file[&key(&format!("gate_proj.{name}"))];
        let up = &file[&key(&format!("up_proj.{name}"))];
        assert_eq!((&gate.1, &up.1), (&shape, &shape));
        assert_eq!(single(gate), all[..10]);
        assert_eq!(single(up), all[10..]);
    }
    let targets = &settings(parts.path())["target_modules"];
    assert_eq!(targets.as_array().unwrap().len(), 12);
    assert!(
        targets
            .to_string()
            .contains("\"encoder.layer.1.mlp.up_proj\""),
        "{targets}"
    );
}

#[test]
fn two_rotations_fit_no_fused_layer() {
    let json = boft_json(json!({"boft_block_size": 2, "target_modules": ["gate_proj", "up_proj"]}));
    let key = |index: usize, name: &str| format!("encoder.layer.{index}.mlp.{name}");
    let keys = [
        (key(0, "gate_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(0, "gate_proj.boft_s"), vec![10, 1]),
        (key(0, "up_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(0, "up_proj.boft_s"), vec![10, 1]),
        (key(1, "gate_proj.boft_R"), vec![1, 4, 2, 2]),
        (key(1, "gate_proj.boft_s"), vec![10, 1]),
    ];
    let tensors: Vec<_> = keys.iter().map(|(k, s)| (k.as_str(), s.clone())).collect();
    let folder = write(&json, &tensors);
    let names = LoadOptions::new()
        .with_key_map(KeyMap::dinov2(Transformers::V5))
        .allow_partial(true);
    let error = Adapter::load_with(folder.path(), &names).unwrap_err();
    let LoadError::Mismatch { mismatch, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(
        mismatch.to_string(),
        "wrong: `encoder.layer.0.mlp.gate_proj` and `encoder.layer.0.mlp.up_proj` are one layer here, \
         `encoder.layer.0.mlp.weights_in`, and one layer has one rotation where theirs differ; merge the adapter in \
         PEFT instead\n\
         wrong: `encoder.layer.1.mlp.weights_in` is one layer here and 2 in the file, which has nothing for \
         `encoder.layer.1.mlp.up_proj`"
    );
    // A model that has two layers as well needs no map, and no such rule.
    assert_eq!(Adapter::load(folder.path()).unwrap().0.layers().len(), 3);
}

#[test]
fn a_fused_layer_beside_its_parts_is_refused() {
    let json = boft_json(
        json!({"boft_block_size": 2, "target_modules": ["weights_in", "gate_proj", "up_proj"]}),
    );
    let layer = |name: &str| format!("mlp.{name}");
    let keys = ["weights_in", "gate_proj", "up_proj"].map(|name| {
        let outputs = if name == "weights_in" { 20 } else { 10 };
        [
            (layer(&format!("{name}.boft_R")), vec![1, 4, 2, 2]),
            (layer(&format!("{name}.boft_s")), vec![outputs, 1]),
        ]
    });
    let tensors: Vec<_> = keys
        .iter()
        .flatten()
        .map(|(k, s)| (k.as_str(), s.clone()))
        .collect();
    let folder = write(&json, &tensors);
    let names = LoadOptions::new().with_key_map(KeyMap::dinov2(Transformers::V4));
    let error = Adapter::load_with(folder.path(), &names).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the key map gives `mlp.weights_in` and `mlp.gate_proj` the same name, `mlp.weights_in`"
    );
}

#[test]
fn two_files_of_one_name_are_refused() {
    let folder = write(
        &boft_json(json!({"target_modules": ["up", "hidden"]})),
        &[
            ("hidden.boft_R", vec![1, 6, 4, 4]),
            ("hidden.boft_s", vec![16, 1]),
            ("up.boft_R", vec![1, 6, 4, 4]),
            ("up.boft_s", vec![16, 1]),
        ],
    );
    let names = KeyMap::new().with_to_model("^up$", "hidden").unwrap();
    let options = LoadOptions::new().with_key_map(names);
    let error = Adapter::load_with(folder.path(), &options).unwrap_err();
    assert!(matches!(error, LoadError::KeyMap(_)));
    assert_eq!(
        error.to_string(),
        "the key map gives `hidden` and `up` the same name, `hidden`"
    );
}

#[test]
fn targets_of_a_file_are_checked_in_its_own_names() {
    // The last layer is missing, which only the names of the file can tell.
    let json = boft_json(json!({"boft_block_size": 2, "target_modules": ["q_proj"]}));
    let folder = write(
        &json,
        &[
            ("encoder.layer.0.attention.q_proj.boft_R", vec![1, 4, 2, 2]),
            ("encoder.layer.0.attention.q_proj.boft_s", vec![12, 1]),
        ],
    );
    for version in [Transformers::V4, Transformers::V5] {
        let names = LoadOptions::new().with_key_map(KeyMap::dinov2(version));
        let (adapter, _) = Adapter::load_with(folder.path(), &names).unwrap();
        let error = adapter.attach(Dino::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing: the adapter of `encoder.layer.1.attention.attention.query`, which `target_modules` names"
        );
    }
}

// ---------------------------------------------------------------------------------------------------------
// Crashes
// ---------------------------------------------------------------------------------------------------------

const SAVES_INTO: &str = "BURN_BOFT_SAVES_INTO";

/// Two adapters that differ in settings and numbers, and not in shapes.
fn two_adapters() -> [Adapter; 2] {
    [Cayley::Neumann { terms: 4 }, Cayley::Neumann { terms: 6 }].map(|cayley| {
        let Cayley::Neumann { terms } = cayley else {
            unreachable!()
        };
        let config = OftConfig::new()
            .with_block_size(4)
            .with_cayley(cayley)
            .with_init(Init::Random { seed: terms as u64 })
            .with_target_modules(["hidden"]);
        let model = inject(base::<BoftLinear>(), &config).unwrap();
        Adapter::extract(&model, &config).unwrap()
    })
}

/// The process that [`a_killed_save_leaves_one_adapter`] kills. By itself it does nothing.
#[test]
fn saves_until_it_is_killed() {
    let Ok(folder) = std::env::var(SAVES_INTO) else {
        return;
    };
    let adapters = two_adapters();
    loop {
        adapters
            .iter()
            .for_each(|adapter| adapter.save(&folder).unwrap());
    }
}

#[test]
fn a_killed_save_leaves_one_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = two_adapters();
    adapters[0].save(folder.path()).unwrap();
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "saves_until_it_is_killed"])
            .env(SAVES_INTO, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60 + 7 * round));
        // Readers find one adapter while it is being replaced, too.
        for _ in 0..20 {
            let (loaded, _) = Adapter::load(folder.path()).unwrap();
            assert!(adapters.iter().any(|adapter| is_same(&loaded, adapter)));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        let which = adapters
            .iter()
            .position(|adapter| is_same(&loaded, adapter));
        seen.insert(which.expect("settings of one adapter and numbers of the other"));
    }
    assert_eq!(seen.len(), 2, "no save was ever finished");
}

fn is_same(loaded: &Adapter, saved: &Adapter) -> bool {
    let cayley = |adapter: &Adapter| match adapter.config() {
        AdapterConfig::Oft(config) => config.cayley,
        other => panic!("{other:?}"),
    };
    cayley(loaded) == cayley(saved) && loaded.layers()[0].skew() == saved.layers()[0].skew()
}

#[test]
fn a_refused_save_leaves_the_adapter_as_it_was() {
    let folder = saved(&Adapter::extract(&adapted::<BoftLinear>(boft()), boft()).unwrap());
    let before = [CONFIG, TENSORS].map(|file| fs::read(folder.path().join(file)).unwrap());
    let model = adapted::<BoftLinear>(boft());
    let wrong = Adapter::extract(&model, boft().with_n_butterfly_factor(1)).unwrap();
    assert!(wrong.save(folder.path()).is_err());
    let names = KeyMap::new().with_to_file("^hidden$", "up").unwrap();
    let right = Adapter::extract(&model, boft()).unwrap();
    let options = SaveOptions::new().with_key_map(names);
    assert!(right.save_with(folder.path(), &options).is_err());
    let after = [CONFIG, TENSORS].map(|file| fs::read(folder.path().join(file)).unwrap());
    assert_eq!(before, after);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

// ---------------------------------------------------------------------------------------------------------
// Checkpoints
// ---------------------------------------------------------------------------------------------------------

mod checkpoints {
    use burn::data::dataloader::{DataLoaderBuilder, batcher::Batcher};
    use burn::data::dataset::InMemDataset;
    use burn::optim::AdamWConfig;
    use burn::store::ModuleRecord;
    use burn::train::checkpoint::{Checkpointer, FileCheckpointer, KeepLastNCheckpoints};
    use burn::train::metric::LossMetric;
    use burn::train::renderer::CliMetricsRenderer;
    use burn::train::{
        InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
    };
    use burn_boft::AdapterCheckpointer;

    use super::*;

    /// A model with running statistics outside of the adapter, which training moves.
    #[derive(Module, Debug)]
    struct Tower {
        hidden: BoftLinear,
        norm: BatchNorm,
        head: BoftLinear,
    }

    impl Tower {
        fn new(seed: u64) -> Self {
            let layer = |sizes, seed| BoftLinear::from(linear(sizes, seed, DType::F32, &device()));
            Self {
                hidden: layer([INPUT, 16], seed),
                norm: BatchNormConfig::new(16).init(&device()),
                head: layer([16, 5], seed + 10),
            }
        }

        fn forward(&self, input: Tensor<2>) -> Tensor<2> {
            let hidden = self.norm.forward(self.hidden.forward(input));
            self.head.forward(burn::tensor::activation::gelu(hidden))
        }
    }

    fn config() -> BoftConfig {
        BoftConfig::new()
            .with_n_butterfly_factor(2)
            .with_target_modules(["hidden"])
            .with_bias(Bias::AdapterOnly)
            .with_modules_to_save(["head"])
    }

    fn tower() -> Tower {
        inject(Tower::new(3), config()).unwrap()
    }

    #[derive(Clone, Debug)]
    pub struct Batch {
        input: Tensor<2>,
        targets: Tensor<2>,
    }

    struct Rows;

    impl Batcher<(Vec<f32>, Vec<f32>), Batch> for Rows {
        fn batch(&self, items: Vec<(Vec<f32>, Vec<f32>)>, device: &Device) -> Batch {
            let count = items.len();
            let (inputs, targets): (Vec<_>, Vec<_>) = items.into_iter().unzip();
            let stack = |rows: Vec<Vec<f32>>, width| {
                Tensor::from_data(TensorData::new(rows.concat(), [count, width]), device)
            };
            Batch {
                input: stack(inputs, INPUT),
                targets: stack(targets, 5),
            }
        }
    }

    fn regress(model: &Tower, batch: Batch) -> RegressionOutput {
        let output = model.forward(batch.input);
        let loss = (output.clone() - batch.targets.clone()).square().mean();
        RegressionOutput::new(loss, output, batch.targets)
    }

    impl TrainStep for Tower {
        type Input = Batch;
        type Output = RegressionOutput;

        fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
            let output = regress(self, batch);
            TrainOutput::new(self, output.loss.backward(), output)
        }
    }

    impl InferenceStep for Tower {
        type Input = Batch;
        type Output = RegressionOutput;

        fn step(&self, batch: Batch) -> RegressionOutput {
            regress(self, batch)
        }
    }

    /// Trains for some epochs, from the checkpoint of an epoch where one is given.
    fn train(folder: &Path, epochs: usize, resume: Option<usize>) -> BTreeMap<String, Vec<f64>> {
        let items: Vec<_> = (0..30u64)
            .map(|row| {
                let single = |values: Vec<f64>| values.iter().map(|x| *x as f32).collect();
                let input: Vec<f32> = single(noise(INPUT, 900 + row, 1.0));
                let targets: Vec<f32> = single(noise(5, 300 + row, 1.0));
                (input, targets)
            })
            .collect();
        let loader = || {
            DataLoaderBuilder::new(Rows)
                .batch_size(10)
                .build(InMemDataset::new(items.clone()))
        };
        let model = tower();
        let training = SupervisedTraining::new(folder, loader(), loader())
            .metrics((LossMetric::new(),))
            .with_application_logger(None)
            .renderer(Box::new(CliMetricsRenderer::new()))
            .with_custom_checkpointers(
                AdapterCheckpointer::new(folder.join("kept"), &model).unwrap(),
                FileCheckpointer::new(folder.join("kept"), "optim"),
                FileCheckpointer::new(folder.join("kept"), "scheduler"),
            )
            .with_checkpointing_strategy(KeepLastNCheckpoints::new(2))
            .num_epochs(epochs);
        let training = match resume {
            Some(epoch) => training.checkpoint(epoch),
            None => training,
        };
        let optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
        let result = training.launch(Learner::new(model, optimizer, 1e-2));
        assert!(result.error.is_none(), "{:?}", result.error);
        numbers(&result.model)
    }

    #[test]
    fn a_run_resumes_bit_for_bit_from_what_it_changed() {
        let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let expected = train(whole.path(), 4, None);
        let halfway = train(halves.path(), 2, None);
        assert_ne!(expected, halfway);
        let resumed = train(halves.path(), 4, Some(2));
        assert_eq!(resumed, expected);

        let path = halves.path().join("kept/adapter-4.bpk");
        let reader = burn_pack::Reader::from_file(&path).unwrap();
        let mut kept = reader.tensor_names();
        kept.sort_unstable();
        assert_eq!(
            kept,
            [
                "head.bias",
                "head.weight",
                "hidden.bias",
                "hidden.weight.boft.scale",
                "hidden.weight.boft.skew",
                "norm.running_mean",
                "norm.running_var",
            ]
        );
        assert!(!halves.path().join("kept/adapter-2.bpk").exists());
    }

    #[test]
    fn a_checkpoint_over_another_base_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let checkpointer = AdapterCheckpointer::new(folder.path(), &tower()).unwrap();
        checkpointer.save(1, tower().into_record()).unwrap();
        let other = inject(Tower::new(4), config()).unwrap();
        let other = AdapterCheckpointer::new(folder.path(), &other).unwrap();
        let restored = |checkpointer: &AdapterCheckpointer, epoch| {
            Checkpointer::<ModuleRecord>::restore(checkpointer, epoch)
        };
        let error = restored(&other, 1).unwrap_err().to_string();
        assert!(
            error.contains("was saved over another base model"),
            "{error}"
        );
        assert!(restored(&checkpointer, 2).is_err());
        let again = AdapterCheckpointer::new(folder.path(), &tower()).unwrap();
        let model = tower()
            .try_load_record(restored(&again, 1).unwrap())
            .unwrap();
        assert_eq!(numbers(&model), numbers(&tower()));
        Checkpointer::<ModuleRecord>::delete(&again, 1).unwrap();
        Checkpointer::<ModuleRecord>::delete(&again, 1).unwrap();
        assert!(restored(&again, 1).is_err());
    }
}
