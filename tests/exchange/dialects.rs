//! Files of other programs as values. The tool's tests merge every fixture.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, TensorData};
use burn_boft::dialects::{AdapterFile, Dialect, DialectError, Misplaced, has_rotation};
use burn_boft::value::{AdapterLayer, Axis};
use burn_boft::{Adapter, AdapterConfig, BoftConfig, Cayley, KeyMap, LayerKind};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
        .join("adapter.safetensors")
}

/// The modules of the fixtures' model.
fn modules() -> BTreeMap<String, Vec<usize>> {
    let modules: [(&str, &[usize]); 5] = [
        ("down_blocks.0.attn.to_q", &[16, 10]),
        ("down_blocks.0.attn.to_out.0", &[24, 16]),
        ("down_blocks.0.conv_in", &[8, 6, 3, 2]),
        ("down_blocks.0.proj", &[16, 8, 1, 1]),
        ("head", &[13, 24]),
    ];
    modules
        .map(|(name, shape)| (name.to_string(), shape.to_vec()))
        .into()
}

#[test]
fn a_file_of_lycoris_becomes_an_adapter_of_outputs() {
    let file = AdapterFile::read(fixture("lycoris/cases/both-methods")).unwrap();
    assert_eq!(
        file.dialects(),
        [Dialect::LycorisDiagOft, Dialect::LycorisBoft]
    );
    assert_eq!(file.key_styles(), ["lycoris_… with `_` for dots"]);
    let adapter = file.adapter(&modules(), &KeyMap::new()).unwrap();
    assert!(matches!(adapter.config(), AdapterConfig::Boft(_)));
    let [out, q, conv, proj] = adapter.layers() else {
        panic!("{:?}", adapter.layers());
    };
    assert_eq!(
        (out.path(), q.path()),
        ("down_blocks.0.attn.to_out.0", "down_blocks.0.attn.to_q")
    );
    for layer in [out, q, conv, proj] {
        assert_eq!((layer.axis(), layer.d_input()), (Axis::Output, None));
    }
    assert_eq!(
        (out.block_size(), out.n_butterfly_factor(), out.d_output()),
        (4, 1, Some(24))
    );
    assert_eq!(
        (q.block_size(), q.n_butterfly_factor(), q.span()),
        (8, 2, 16)
    );
    assert_eq!(
        (conv.kind(), q.kind()),
        (Some(LayerKind::Conv2d), Some(LayerKind::Linear))
    );
}

#[test]
fn an_adapter_is_told_from_a_model_by_the_names_of_its_tensors() {
    for name in [
        "lycoris_fc.oft_blocks",
        "lora_unet_fc.oft_R.weight",
        "fc.boft_R",
        "base_model.model.fc.oft_R.weight",
    ] {
        assert!(has_rotation(["fc.alpha", name].into_iter()), "{name}");
    }
    let model = [
        "fc.weight",
        "fc.alpha",
        "oft_blocks",
        "fc.my_oft_blocks",
        "fc.oft_R",
    ];
    assert!(!has_rotation(model.into_iter()));
}

/// A file of zeros with these names and shapes, read.
fn of_tensors(tensors: &[(&str, &[usize])]) -> Result<AdapterFile, DialectError> {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(key, shape)| (*key, *shape, vec![0u8; 4 * shape.iter().product::<usize>()]))
        .collect();
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
        (key.to_string(), view.unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    AdapterFile::from_bytes("a.safetensors", &bytes)
}

/// What LyCORIS 4.1.3 stores for its other methods, and names that it does not store beside a rotation.
#[test]
fn a_tensor_that_is_none_of_a_rotation_is_never_passed_over() {
    for module in ["x", "y"] {
        let refusal = |tensor: &str| {
            let key = format!("{module}.{tensor}");
            let tensors: [(&str, &[usize]); 3] = [
                ("x.oft_blocks", &[2, 3, 3]),
                ("x.alpha", &[]),
                (&key, &[2, 2]),
            ];
            of_tensors(&tensors).unwrap_err().to_string()
        };
        for (tensor, method) in [
            ("lora_up.weight", "LoRA"),
            ("hada_w1_a", "LoHa"),
            ("lokr_w1", "LoKr"),
            ("a1.weight", "GLoRA"),
            ("lambda_layer", "T-LoRA"),
            ("on_input", "IA3"),
            ("diff", "a full difference of weights"),
            ("diff_b", "a full difference of biases"),
            ("w_norm", "trained norms"),
        ] {
            assert_eq!(
                refusal(tensor),
                format!(
                    "a.safetensors: `{module}.{tensor}` is of {method}, and only OFT and BOFT are read; merge it with the \
                     program that wrote it"
                )
            );
        }
        for tensor in ["constraint", "scalar", "weight", "oft_blocks_2"] {
            assert_eq!(
                refusal(tensor),
                format!(
                    "a.safetensors: unexpected: `{module}.{tensor}`: it is no part of a layer of OFT or BOFT"
                )
            );
        }
    }
}

#[test]
fn a_module_may_have_the_name_of_a_tensor_of_another_method() {
    for name in ["diff", "a1", "on_input", "lora_up", "hada_gate"] {
        let module = format!("blocks.{name}.fc");
        let key = format!("{module}.oft_R.weight");
        let tensors: [(&str, &[usize]); 1] = [(&key, &[2, 6])];
        let file = of_tensors(&tensors).unwrap();
        assert_eq!(file.layers()[0].module(), module);
    }
}

#[test]
fn a_file_without_a_model_keeps_its_names_and_its_numbers() {
    let file = AdapterFile::read(fixture("lycoris/cases/both-methods")).unwrap();
    let adapter = file.unplaced();
    assert_eq!(adapter.layers().len(), file.layers().len());
    for layer in file.layers() {
        let mut layers = adapter.layers().iter();
        let unplaced = layers
            .find(|unplaced| unplaced.path() == layer.module())
            .unwrap();
        assert_eq!(unplaced, layer.layer());
    }
    assert_eq!(
        adapter.measure(&Device::flex()),
        file.measure(&Device::flex())
    );
}

#[test]
fn the_convolutions_of_onetrainer_turn_the_other_way() {
    let file = AdapterFile::read(fixture("formulas/cases/oft-v2-b4")).unwrap();
    let adapter = file.adapter(&modules(), &KeyMap::new()).unwrap();
    let AdapterConfig::Oft(config) = adapter.config() else {
        panic!("{}", adapter.config());
    };
    assert_eq!(config.cayley, Cayley::Neumann { terms: 5 });
    for (layer, stored) in adapter.layers().iter().zip(file.layers()) {
        let sign = match layer.kind() {
            Some(LayerKind::Conv2d) => -1.0,
            _ => 1.0,
        };
        let numbers = |data: &TensorData| data.iter::<f64>().collect::<Vec<_>>();
        let expected = numbers(stored.layer().skew()).into_iter().map(|x| sign * x);
        assert_eq!(
            numbers(layer.skew()),
            expected.collect::<Vec<_>>(),
            "{}",
            layer.path()
        );
    }
}

#[test]
fn a_rotation_of_outputs_is_neither_attached_nor_saved_for_peft() {
    let device = Device::flex();
    let skew = TensorData::new(vec![0.1f32; 6], [1, 6, 1]);
    let layer = AdapterLayer::new("fc", Some(LayerKind::Linear), skew, None).unwrap();
    let layer = layer.with_output_axis().unwrap();
    // The inputs are as many as the outputs, so that nothing but the axis is wrong.
    #[derive(burn::module::Module, Debug)]
    struct Model {
        fc: Linear,
    }
    let model = Model {
        fc: LinearConfig::new(12, 12).init(&device),
    };
    let config = BoftConfig::new()
        .with_block_size(2)
        .with_target_modules(["fc"]);
    let adapter = Adapter::from_parts(config, vec![layer], Vec::new()).unwrap();
    assert_eq!(
        adapter.attach(model).unwrap_err().to_string(),
        "wrong: the adapter of `fc` rotates the outputs of the layer, and only rotations of inputs are attached; merge it with \
         the tool `burn-boft`"
    );
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        adapter.save(folder.path()).unwrap_err().to_string(),
        "PEFT's format cannot hold `fc`: it rotates the outputs of its layer, and PEFT rotates inputs; no rotation of the \
         inputs does the same, so merge it"
    );
}

#[test]
fn a_scale_for_other_outputs_than_the_rotated_ones_is_refused() {
    let skew = TensorData::new(vec![0.1f32; 6], [1, 6, 1]);
    let scale = TensorData::new(vec![1.5f32; 11], [11]);
    let layer = AdapterLayer::new("fc", None, skew, Some(scale)).unwrap();
    assert_eq!(
        layer.with_output_axis().unwrap_err().to_string(),
        "wrong: the adapter of `fc` has numbers [11] f32: the blocks rotate 12 outputs"
    );
}

#[test]
fn two_names_of_one_module_are_refused_together() {
    let file = AdapterFile::read(fixture("lycoris/cases/boft-kohya")).unwrap();
    let names = KeyMap::new().with_to_model("_attn_to_q$", "_proj").unwrap();
    let error = file.adapter(&modules(), &names).unwrap_err();
    let DialectError::Misplaced { misplaced, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(
        misplaced,
        [Misplaced::Taken {
            path: "down_blocks.0.proj".into(),
            first: "lora_unet_down_blocks_0_attn_to_q".into(),
            second: "lora_unet_down_blocks_0_proj".into(),
        }]
    );
}

#[test]
fn damaged_files_are_refused_or_read_and_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let (mut read, mut placed) = (0, 0);
    for name in [
        "lycoris/cases/both-methods",
        "formulas/cases/scaled-oft-b4",
        "formulas/cases/sd-scripts-boft-m3",
    ] {
        let bytes = fs::read(fixture(name)).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for _ in 0..400 {
            let mut damaged = bytes.clone();
            for _ in 0..=random(2) {
                // Digits of shapes and letters of names more often than numbers, where nearly any byte is as good as another.
                let at = match random(4) {
                    0 => random(bytes.len()),
                    _ => 8 + random(header),
                };
                damaged[at] = match damaged[at] {
                    b'0'..=b'9' => b'0' + random(10) as u8,
                    _ => random(256) as u8,
                };
            }
            if random(10) == 0 {
                damaged.truncate(random(bytes.len()));
            }
            fs::write(&path, damaged).unwrap();
            if let Ok(file) = AdapterFile::read(&path) {
                read += 1;
                let _measured = file.measure(&Device::flex());
                placed += usize::from(file.adapter(&modules(), &KeyMap::new()).is_ok());
            }
        }
    }
    assert!(
        read > 50 && placed > 20 && placed < 1200,
        "{read} read, {placed} placed"
    );
}

#[test]
fn a_folder_and_a_device_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let error = AdapterFile::read(folder.path()).unwrap_err();
    assert!(matches!(error, DialectError::NotAFile { .. }), "{error}");
    let error = AdapterFile::read(folder.path().join("absent")).unwrap_err();
    assert!(matches!(error, DialectError::Io { .. }), "{error}");
    if cfg!(unix) {
        assert_eq!(
            AdapterFile::read("/dev/zero").unwrap_err().to_string(),
            "/dev/zero cannot be read: it is a device, and only files are read"
        );
    }
}

#[test]
fn the_page_has_the_table_of_the_library() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/dialects.md");
    let page = fs::read_to_string(path).unwrap();
    let rows = page
        .lines()
        .skip_while(|line| !line.starts_with("| dialect | written by"));
    let rows: Vec<_> = rows
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .collect();
    let expected = Dialect::ALL.map(|dialect| {
        format!(
            "| {} | {} | {} | {} | {} | {} |",
            dialect.name(),
            dialect.programs(),
            dialect.tensors(),
            dialect.axis().name(),
            dialect.merges(),
            dialect.to_peft().name()
        )
    });
    assert_eq!(rows, expected);
}

/// What scaled OFT trains is a multiple of the numbers of `Q`, and it is trained so here as well.
#[test]
fn scaled_oft_is_trained_with_a_scaled_skew() {
    let path = fixture("formulas/cases/scaled-oft-b4");
    let file = AdapterFile::read(&path).unwrap();
    let adapter = file.adapter(&modules(), &KeyMap::new()).unwrap();
    assert!(adapter.config().scaled_skew());
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let layers = file.layers().iter().zip(adapter.layers());
    for (stored, layer) in layers.filter(|(_, layer)| layer.kind() == Some(LayerKind::Linear)) {
        let tensor = tensors
            .tensor(&format!("{}.oft_R.weight", stored.module()))
            .unwrap();
        let numbers = tensor.data().chunks_exact(4);
        let numbers = numbers.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        let trained = layer.scaled_skew();
        for (trained, stored) in trained.iter::<f32>().zip(numbers) {
            assert!((trained - stored).abs() <= 1e-6 * stored.abs());
        }
    }
    let plain = AdapterFile::read(fixture("formulas/cases/oft-v2-b4")).unwrap();
    let plain = plain.adapter(&modules(), &KeyMap::new()).unwrap();
    assert!(!plain.config().scaled_skew());
}
