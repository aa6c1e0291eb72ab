//! An adapter without a scale stays one when it goes through PEFT's files, whose BOFT always has a scale.

use std::fs;
use std::path::Path;

use crate::common::models::{Net, numbers, set, trainable};
use burn::tensor::Device;
use burn_boft::peft::Folder;
use burn_boft::{Adapter, AdapterConfig, BoftConfig, BoftLinear, Init, inject, summary};
use safetensors::SafeTensors;

fn config(scale: bool) -> BoftConfig {
    BoftConfig::new()
        .with_scale(scale)
        .with_init(Init::Random { seed: 5 })
        .with_target_modules(["hidden", "output"])
}

fn base() -> Net<BoftLinear> {
    Net::new(3, &Device::flex().autodiff())
}

fn saved(scale: bool, folder: &Path) -> Net<BoftLinear> {
    let model = inject(base(), config(scale)).unwrap();
    let adapter = Adapter::extract_as(&model, config(scale)).unwrap();
    adapter.save(folder).unwrap();
    model
}

fn scale_of(adapter: &Adapter) -> bool {
    match adapter.config() {
        AdapterConfig::Boft(config) => config.scale,
        other => panic!("{other:?}"),
    }
}

#[test]
fn loading_gives_back_the_adapter_without_its_scale() {
    let folder = tempfile::tempdir().unwrap();
    let model = saved(false, folder.path());
    let (loaded, report) = Adapter::load(folder.path()).unwrap();
    assert!(
        report.converted.is_empty() && report.warnings.is_empty(),
        "{report}"
    );
    assert!(!scale_of(&loaded));
    assert!(loaded.layers().iter().all(|layer| layer.scale().is_none()));
    let attached = loaded.attach(base()).unwrap();
    assert_eq!(trainable(&attached), trainable(&model));
    assert_eq!(numbers(&attached), numbers(&model));
    // And again.
    let bytes = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let again = tempfile::tempdir().unwrap();
    loaded.save(again.path()).unwrap();
    assert_eq!(bytes(folder.path()), bytes(again.path()));
}

#[test]
fn the_file_has_ones_for_peft_and_a_line_of_text_for_us() {
    let folder = tempfile::tempdir().unwrap();
    saved(false, folder.path());
    let bytes = fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!(metadata["burn_boft.scale"], "untrained");
    assert_eq!(metadata["format"], "pt");
    let files = Folder::read(folder.path()).unwrap();
    let scale = &files.tensors["base_model.model.hidden.boft_s"];
    assert_eq!(scale.shape().to_vec(), [16, 1]);
    assert!(scale.iter::<f32>().all(|scale| scale == 1.0));
}

#[test]
fn a_trained_scale_needs_no_text() {
    let folder = tempfile::tempdir().unwrap();
    saved(true, folder.path());
    let files = Folder::read(folder.path()).unwrap();
    assert_eq!(files.metadata.keys().collect::<Vec<_>>(), ["format"]);
    assert!(scale_of(&Adapter::load(folder.path()).unwrap().0));
}

#[test]
fn a_scale_that_somebody_trained_afterwards_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    saved(false, folder.path());
    let mut files = Folder::read(folder.path()).unwrap();
    let key = "base_model.model.output.boft_s";
    let scale = vec![1.5f32; 12];
    let scale = burn::tensor::TensorData::new(scale, [12, 1]);
    files.tensors.insert(key.to_string(), scale);
    files.write(folder.path()).unwrap();
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert!(scale_of(&loaded));
    assert!(loaded.layers().iter().all(|layer| layer.scale().is_some()));
    // What PEFT saves has no such line, and its scale is trained.
    files.metadata.remove("burn_boft.scale");
    files.tensors.insert(key.to_string(), {
        burn::tensor::TensorData::new(vec![1f32; 12], [12, 1])
    });
    files.write(folder.path()).unwrap();
    assert!(scale_of(&Adapter::load(folder.path()).unwrap().0));
}

#[test]
fn an_adapter_with_a_scale_of_ones_is_not_taken_for_one_without() {
    let model = inject(base(), config(true).with_init(Init::Identity)).unwrap();
    let model = set(model, "hidden.weight.boft.skew", |mut values| {
        values[0] = 0.25;
        values
    });
    let adapter = Adapter::extract_as(&model, config(true)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let (loaded, _) = Adapter::load(folder.path()).unwrap();
    assert!(scale_of(&loaded) && loaded.layers().iter().all(|layer| layer.scale().is_some()));
}

#[test]
fn what_peft_stores_is_counted_with_its_scale() {
    let folder = tempfile::tempdir().unwrap();
    for scale in [true, false] {
        saved(scale, folder.path());
        let files = Folder::read(folder.path()).unwrap();
        let stored: usize = files.tensors.values().map(|data| data.num_elements()).sum();
        let (adapter, _) = Adapter::load(folder.path()).unwrap();
        let measures = adapter.measure(&Device::flex());
        let counted: usize = measures.iter().map(|layer| layer.stored_by_peft).sum();
        assert_eq!(counted, stored);
        let attached = adapter.attach(base()).unwrap();
        assert_eq!(summary(&attached).stored_by_peft(), stored);
        let free = |layer: &burn_boft::value::LayerMeasure| layer.effective;
        let squares = stored - 28;
        let expected = squares * 3 / 8 + if scale { 28 } else { 0 };
        assert_eq!(measures.iter().map(free).sum::<usize>(), expected);
    }
}
