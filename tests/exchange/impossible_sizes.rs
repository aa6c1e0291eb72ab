//! Files and settings with sizes that no layer has are refused at once: no endless loop, no huge allocation, no panic.

use std::fs;

use crate::common::models::Net;
use burn::tensor::{Device, TensorData};
use burn_boft::value::{AdapterLayer, SavedTensor};
use burn_boft::{Adapter, AdapterConfig, Block, BoftConfig, BoftLinear, OftConfig};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Loads a folder with these settings and one tensor of zeros for the layer `hidden`.
fn load(settings: &Value, tensors: &[(&str, Vec<usize>)]) -> Result<Adapter, String> {
    let folder = tempfile::tempdir().unwrap();
    let zeros = [0; 1 << 16];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = &zeros[..shape
            .iter()
            .fold(4, |size: usize, axis| size.wrapping_mul(*axis))];
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (format!("base_model.model.hidden.{name}"), view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
    fs::write(
        folder.path().join("adapter_config.json"),
        settings.to_string(),
    )
    .unwrap();
    let loaded = Adapter::load(folder.path()).map(|(adapter, _)| adapter);
    loaded.map_err(|error| error.to_string())
}

#[test]
fn a_file_with_more_factors_than_any_layer_has_is_refused() {
    for factors in [64, 1 << 32, u64::MAX] {
        let settings = json!({"peft_type": "BOFT", "boft_n_butterfly_factor": factors});
        let error = load(&settings, &[]).unwrap_err();
        let expected =
            format!("`boft_n_butterfly_factor` is {factors}, not a whole number from 0 to 63");
        assert!(error.ends_with(&expected), "{error}");
    }
}

#[test]
fn a_file_with_more_factors_than_its_blocks_allow_is_refused() {
    let settings = json!({"peft_type": "BOFT"});
    for (shape, why) in [
        (
            vec![200, 2, 2, 2],
            "200 factors of block size 2 and 2 blocks do not fit",
        ),
        (
            vec![2, 6, 1, 1],
            "2 factors of block size 1 and 6 blocks do not fit",
        ),
    ] {
        let tensors = [("boft_R", shape), ("boft_s", vec![5, 1])];
        let error = load(&settings, &tensors).unwrap_err();
        assert!(error.ends_with(why), "{error}");
    }
}

#[test]
fn an_empty_tensor_cannot_claim_a_width_that_no_layer_has() {
    let settings = json!({"peft_type": "OFT", "oft_block_size": 4});
    let load = |rows| load(&settings, &[("oft_R.weight", vec![rows, 0])]);
    let error = load(1 << 60).unwrap_err();
    assert!(
        error.ends_with("no layer has 1152921504606846976 blocks of 1 channels"),
        "{error}"
    );
    assert_eq!(load(24).unwrap().layers()[0].d_input(), Some(24));
}

#[test]
fn the_transpose_of_an_empty_matrix_takes_no_time() {
    let layer = [("boft_R", vec![1, 12, 2, 2]), ("boft_s", vec![16, 1])];
    let settings = json!({"peft_type": "BOFT", "boft_block_size": 2, "modules_to_save": ["head"]});
    let head = SavedTensor::new(
        "head",
        "weight",
        TensorData::new(Vec::<f32>::new(), [0usize, 1 << 60]),
    );
    let adapter = load(&settings, &layer).unwrap();
    let layers = adapter.layers().to_vec();
    let adapter = Adapter::from_parts(adapter.config(), layers, vec![head]).unwrap();
    let model = Net::<BoftLinear>::new(3, &Device::flex().autodiff());
    let error = adapter.attach(model).unwrap_err().to_string();
    assert!(
        error.contains("`head.weight` is [12, 5] in the model"),
        "{error}"
    );
}

#[test]
fn a_layer_of_impossible_sizes_cannot_be_built() {
    for shape in [
        [1 << 40, 1 << 20, 0],
        [usize::MAX, 1, 0],
        [2, 6, 0],
        [1, 1 << 60, 0],
        [0, 0, 0],
    ] {
        let empty = TensorData::new(Vec::<f32>::new(), shape);
        let error = AdapterLayer::new("hidden", None, empty, None).unwrap_err();
        assert!(error.to_string().contains("`hidden`"), "{error}");
    }
    let empty = TensorData::new(Vec::<f32>::new(), [1, 24, 0]);
    assert!(AdapterLayer::new("hidden", None, empty, None).is_ok());
}

#[test]
fn settings_that_could_not_be_loaded_again_are_not_saved() {
    let skew = TensorData::new(vec![0.5f32; 36], [1, 6, 6]);
    let layer = AdapterLayer::new("hidden", None, skew, None).unwrap();
    for config in [
        AdapterConfig::from(OftConfig::new().with_coft_radius(f64::NAN)),
        OftConfig::new().with_coft_radius(f64::INFINITY).into(),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let error = Adapter::from_parts(config, vec![layer.clone()], Vec::new())
            .map_err(|error| error.to_string())
            .and_then(|adapter| {
                adapter
                    .save(folder.path())
                    .map_err(|error| error.to_string())
            })
            .unwrap_err();
        assert!(error.contains("not a finite number"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
    // The numbers say which block size there is, so a count of 0 does no harm.
    let config = OftConfig::new().with_block_num(0);
    let adapter = Adapter::from_parts(config, vec![layer], Vec::new()).unwrap();
    let AdapterConfig::Oft(config) = adapter.config() else {
        panic!("{:?}", adapter.config());
    };
    assert_eq!(config.block, Block::Size(4));
    assert!(serde_json::to_string(&BoftConfig::new().with_block_num(0)).is_err());
}
